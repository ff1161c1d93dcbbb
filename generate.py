"""Our own sampler: what it samples from is exactly what PPO scores.

Hugging Face's `generate` reads the model's `generation_config`, and with it a top-k, a penalty or a
minimum length that nobody asked for: the sampled distribution is then no longer the scored one, and
the KL may turn negative. Here a token is drawn from softmax(logits / temperature) and nothing else.
Left out on purpose: top-k, top-p, penalties, beams. This is the only file that pads on the left:
decoding needs all rows to end in the same column; the rows it returns are plain lists of ids.

    python sample.py out/final "the movie was"
"""

from dataclasses import dataclass

import torch

import parallel
from hybrid import HybridModel

KEEP_WHILE = 0.75  # finished rows leave the batch once at most this share of it is unfinished


@dataclass
class Generation:
    """What was sampled, one entry for each prompt.

    `responses` end in EOS unless the length limit truncated them; `logprobs` are of their tokens.
    """

    responses: list[list[int]]
    logprobs: list[list[float]]


@torch.no_grad()
def generate(
    model: HybridModel,
    prompts: list[list[int]],
    *,
    max_new_tokens: int,
    eos_token_id: int | list[int],
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
) -> Generation:
    """Sample a response to each prompt (token ids, none empty): `max_new_tokens` at most with EOS.

    A response ends at `eos_token_id`, or at the first of several; no other file is asked.
    `temperature` 0 takes the most likely token. `generator` makes the draw repeatable; it must live
    on the model's device.
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()  # gradient checkpointing would switch the cache off; dropout is 0 either way
    n, width = len(prompts), max(len(ids) for ids in prompts)
    padding = [width - len(ids) for ids in prompts]
    ends = torch.tensor(eos_token_id, device=device).flatten()  # (E,)
    # The model never sees what the mask hides; EOS is an id that every model has.
    rows = [[int(ends[0])] * pad + ids for pad, ids in zip(padding, prompts)]
    masks = [[0] * pad + [1] * len(ids) for pad, ids in zip(padding, prompts)]
    input_ids = torch.tensor(rows, device=device)  # (B, P)
    attention_mask = torch.tensor(masks, device=device)  # (B, P)
    # Positions count real tokens only (critical!): under left padding a plain 0..P-1 would shift
    # learned positions such as GPT-2's.
    position_ids = (attention_mask.cumsum(1) - 1).clamp(min=0)  # (B, P)
    cache = model.new_cache()
    tokens = torch.zeros(n, max_new_tokens, dtype=torch.long, device=device)  # (B, R)
    logprobs = torch.zeros(n, max_new_tokens, device=device)  # (B, R)
    lengths = torch.zeros(n, dtype=torch.long, device=device)  # (B,)
    row = torch.arange(n, device=device)  # (b,) the unfinished prompts, and some that ended
    alive = torch.ones_like(row, dtype=torch.bool)  # (b,) unfinished
    with model.autocast():  # around the loop: weights are converted to low precision only once
        for i in range(max_new_tokens):
            hidden = model.hidden_states(
                input_ids, attention_mask, position_ids=position_ids, cache=cache
            )[:, -1]  # (b, H)
            logp = torch.log_softmax(model.logits(hidden, temperature or 1.0), dim=-1)  # (b, V)
            token = logp.argmax(-1) if temperature == 0 else draw(logp.exp(), generator)  # (b,)
            tokens[row, i] = token
            logprobs[row, i] = logp.gather(1, token[:, None]).squeeze(1)
            lengths[row] += alive
            # (b,) A row stops at its first EOS; later tokens are not counted in `lengths`.
            alive = alive & ~torch.isin(token, ends)
            n_alive = int(alive.sum())
            if n_alive == 0 or i + 1 == max_new_tokens:
                break
            ones = torch.ones_like(attention_mask[:, :1])  # (b, 1)
            attention_mask = torch.cat([attention_mask, ones], dim=1)  # (b, P + i + 1)
            if cache is None:  # read the whole row again
                input_ids = torch.cat([input_ids, token[:, None]], dim=1)
                position_ids = (attention_mask.cumsum(1) - 1).clamp(min=0)
            else:
                input_ids = token[:, None]  # (b, 1)
                position_ids = position_ids[:, -1:] + 1  # (b, 1)
            if n_alive <= KEEP_WHILE * len(row):  # not after every end: it copies the cache
                kept = alive.nonzero().squeeze(1)  # (b',)
                row, alive, input_ids = row[kept], alive[kept], input_ids[kept]
                attention_mask, position_ids = attention_mask[kept], position_ids[kept]
                if cache is not None:
                    cache.batch_select_indices(kept)
    model.train(was_training)
    sizes = lengths.tolist()
    return Generation(
        responses=[ids[:size] for ids, size in zip(tokens.tolist(), sizes)],
        logprobs=[values[:size] for values, size in zip(logprobs.tolist(), sizes)],
    )


def sample(model: HybridModel, prompts: list[list[int]], **options) -> Generation:
    """`generate`, but each process samples its share, and every process gets all responses."""
    my_prompts = parallel.share(prompts)
    generation = generate(model, my_prompts, **options) if my_prompts else Generation([], [])
    return Generation(parallel.gather(generation.responses), parallel.gather(generation.logprobs))


def draw(probs: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
    """One index a row, by its probability: probs (b, V) -> (b,).

    The inverse of the cumulative distribution at a uniform number.
    """
    cumulative = probs.cumsum(-1)  # (b, V)
    uniform = torch.rand(len(probs), 1, device=probs.device, generator=generator)  # (b, 1)
    threshold = uniform * cumulative[:, -1:]  # (b, 1)
    # right: the first index whose cumulative probability EXCEEDS the number, so that an index of
    # probability 0 is never drawn
    index = torch.searchsorted(cumulative, threshold, right=True).squeeze(1)  # (b,)
    return index.clamp(max=probs.shape[1] - 1)
