"""Our own sampler: what it samples from is exactly what PPO scores.

Hugging Face's `generate` reads the model's `generation_config`, and with it a top-k, a penalty or a minimum length that nobody
asked for: the sampled distribution is then no longer the scored one, and the KL turns negative. Here a token is drawn from
softmax(logits / temperature) and from nothing else.
Left out on purpose: top-k, top-p, penalties, beams. This is the only file with left padding: decoding wants all rows to end
in the same column; the rows it returns are plain lists of ids.

    python sample.py out/final "the movie was"
"""

from dataclasses import dataclass

import torch

from hybrid import HybridModel


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
    input_ids = torch.tensor([[filler] * (width - len(ids)) + ids for ids in prompts], device=device)  # (B, P)
    attention_mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts], device=device)  # (B, P)
    # Positions count real tokens only (critical!): under left padding a plain 0..P-1 would shift learned positions such as GPT-2's.
    position_ids = (attention_mask.cumsum(1) - 1).clamp(min=0)  # (B, P)
    cache = model.new_cache()
    alive = torch.ones(len(prompts), dtype=torch.bool, device=device)  # (B,)
    tokens, logprobs, alive_at = [], [], []
    for _ in range(max_new_tokens):
        hidden = model.hidden_states(input_ids, attention_mask, position_ids=position_ids, cache=cache)[:, -1]  # (B, H)
        logp = torch.log_softmax(model.logits(hidden, temperature or 1.0), dim=-1)  # (B, V)
        if temperature == 0:
            token = logp.argmax(-1)  # (B,)
        else:
            token = torch.multinomial(logp.exp(), 1, generator=generator).squeeze(1)  # (B,)
        tokens.append(token)
        logprobs.append(logp.gather(1, token[:, None]).squeeze(1))  # (B,)
        alive_at.append(alive)
        alive = alive & (token != eos_token_id)  # (B,) a row stops at its first EOS; what follows is thrown away
        if not alive.any():
            break
        attention_mask = torch.cat([attention_mask, torch.ones_like(attention_mask[:, :1])], dim=1)  # (B, P + step)
        if cache is None:  # no cache: read the whole row again
            input_ids = torch.cat([input_ids, token[:, None]], dim=1)
            position_ids = (attention_mask.cumsum(1) - 1).clamp(min=0)
        else:
            input_ids = token[:, None]  # (B, 1)
            position_ids = position_ids[:, -1:] + 1  # (B, 1)
    model.train(was_training)
    lengths = torch.stack(alive_at, dim=1).sum(1).tolist()  # B
    tokens, logprobs = torch.stack(tokens, dim=1).tolist(), torch.stack(logprobs, dim=1).tolist()  # B x R
    return Generation(
        responses=[row[:n] for row, n in zip(tokens, lengths)],
        logprobs=[row[:n] for row, n in zip(logprobs, lengths)],
    )
