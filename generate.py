"""Our own sampler: what it samples from is exactly what PPO scores.

Hugging Face's `generate` reads the model's `generation_config`, and with it a top-k, a penalty or a minimum length that nobody
asked for: the sampled distribution is then no longer the scored one, and the KL turns negative. Here a token is drawn from
softmax(logits / temperature) and from nothing else.
Left out on purpose: top-k, top-p, penalties, beams. This is the only file that pads on the left: decoding wants all rows to end
in the same column; the rows it returns are plain lists of ids.

    python sample.py out/final "the movie was"
"""

from dataclasses import dataclass

import torch

import parallel
from hybrid import HybridModel

KEEP_WHILE = (
    0.75  # finished rows leave the batch once no more than this share of it is still being written
)


@dataclass
class Generation:
    """What was sampled, one entry a prompt. `responses` end in EOS unless the length limit cut them; `logprobs` are theirs."""

    responses: list[list[int]]
    logprobs: list[list[float]]


@torch.no_grad()
def generate(
    model: HybridModel,
    prompts: list[list[int]],
    *,
    max_new_tokens: int,
    eos_token_id: int,
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
) -> Generation:
    """Sample one response for each prompt (lists of token ids, none empty), at most `max_new_tokens` long, EOS included.

    `temperature` 0 takes the most likely token. `generator` makes the draw repeatable; it must live on the model's device.
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()  # gradient checkpointing would switch the cache off; dropout is 0 either way
    width = max(len(ids) for ids in prompts)
    filler = eos_token_id  # what stands under a mask of 0 is never seen
    input_ids = torch.tensor(
        [[filler] * (width - len(ids)) + ids for ids in prompts], device=device
    )  # (B, P)
    attention_mask = torch.tensor(
        [[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts], device=device
    )  # (B, P)
    # Positions count real tokens only (critical!): under left padding a plain 0..P-1 would shift learned positions such as GPT-2's.
    position_ids = (attention_mask.cumsum(1) - 1).clamp(min=0)  # (B, P)
    cache = model.new_cache()
    tokens = torch.zeros(len(prompts), max_new_tokens, dtype=torch.long, device=device)  # (B, R)
    logprobs = torch.zeros(len(prompts), max_new_tokens, device=device)  # (B, R)
    lengths = torch.zeros(len(prompts), dtype=torch.long, device=device)  # (B,)
    row = torch.arange(
        len(prompts), device=device
    )  # (b,) the prompts whose responses are still being written, and a few that ended
    alive = torch.ones_like(row, dtype=torch.bool)  # (b,)
    with model.autocast():  # around the loop, so that weights are converted to low precision once and not at every token
        for step in range(max_new_tokens):
            hidden = model.hidden_states(
                input_ids, attention_mask, position_ids=position_ids, cache=cache
            )[:, -1]  # (b, H)
            logp = torch.log_softmax(model.logits(hidden, temperature or 1.0), dim=-1)  # (b, V)
            token = logp.argmax(-1) if temperature == 0 else draw(logp.exp(), generator)  # (b,)
            tokens[row, step], logprobs[row, step] = (
                token,
                logp.gather(1, token[:, None]).squeeze(1),
            )
            lengths[row] += alive
            alive = alive & (
                token != eos_token_id
            )  # (b,) a row stops at its first EOS; what follows is thrown away
            n_alive = int(alive.sum())
            if n_alive == 0 or step + 1 == max_new_tokens:
                break
            attention_mask = torch.cat(
                [attention_mask, torch.ones_like(attention_mask[:, :1])], dim=1
            )  # (b, P + step + 1)
            if cache is None:  # no cache: read the whole row again
                input_ids = torch.cat([input_ids, token[:, None]], dim=1)
                position_ids = (attention_mask.cumsum(1) - 1).clamp(min=0)
            else:
                input_ids = token[:, None]  # (b, 1)
                position_ids = position_ids[:, -1:] + 1  # (b, 1)
            if n_alive <= KEEP_WHILE * len(
                row
            ):  # the cache is copied, so not for every row that ends
                kept = alive.nonzero().squeeze(1)  # (b',)
                row, alive, input_ids, attention_mask, position_ids = (
                    x[kept] for x in (row, alive, input_ids, attention_mask, position_ids)
                )
                if cache is not None:
                    cache.batch_select_indices(kept)
    model.train(was_training)
    lengths, tokens, logprobs = lengths.tolist(), tokens.tolist(), logprobs.tolist()
    return Generation(
        responses=[ids[:n] for ids, n in zip(tokens, lengths)],
        logprobs=[values[:n] for values, n in zip(logprobs, lengths)],
    )


def sample(model: HybridModel, prompts: list[list[int]], **options) -> Generation:
    """`generate`, shared out over the processes: each samples its own prompts, alone and at its own pace, then all hear of all."""
    mine = parallel.share(prompts)
    generation = generate(model, mine, **options) if mine else Generation([], [])
    return Generation(parallel.gather(generation.responses), parallel.gather(generation.logprobs))


def draw(probs: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
    """One index a row, by its probability: probs (b, V) -> (b,). The inverse of the cumulative distribution at a uniform number."""
    cumulative = probs.cumsum(-1)  # (b, V)
    uniform = torch.rand(len(probs), 1, device=probs.device, generator=generator)  # (b, 1)
    # right: the first index whose cumulative probability EXCEEDS the number, so that none of probability 0 is ever drawn
    return (
        torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True)
        .squeeze(1)
        .clamp(max=probs.shape[1] - 1)
    )
