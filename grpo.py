"""GRPO: several responses to each prompt; an advantage compares a score with those of its group.

Shao et al. 2402.03300. No value head and no GAE: for every token of response i

    A_i = (score_i - mean of the group) / standard deviation of the group
    loss = clipped surrogate + kl_coef * k3(pi || reference)    (minus eq. 3, with eq. 4)

The loss contains the KL, as in the paper; in ppo.py the reward contains it. One difference: the
mean is over the tokens of the whole update, as everywhere here; the paper takes the mean of each
response first. Left out on purpose: process rewards.

    python train.py --algorithm grpo --group-size 8 --out out-grpo8
"""

from dataclasses import replace

import torch

from hybrid import HybridModel, masked_mean
from ppo import Rollout, clipped_surrogate, kl_estimate, update_epochs


def group_advantages(scores: torch.Tensor, group_size: int) -> torch.Tensor:
    """scores (B,), the responses to one prompt next to each other -> (B,): standardised within each
    group, at any scale; exactly 0 where all scores of the group are equal.

    NaN marks a response without a score: it is left out of its group's statistics and gets 0.

    >>> group_advantages(torch.tensor([1.0, 3.0, 5.0, 5.0]), group_size=2).tolist()
    [-1.0, 1.0, 0.0, 0.0]
    """
    groups = scores.view(-1, group_size)  # (prompts, group_size)
    missing = groups.isnan()
    low = groups.masked_fill(missing, torch.inf).amin(1, keepdim=True)  # (prompts, 1)
    high = groups.masked_fill(missing, -torch.inf).amax(1, keepdim=True)  # (prompts, 1)
    # Seen from `low`, in units of the range: the mean of large scores that are nearly equal is
    # rounded by as much as they differ, and the square of a tiny score is 0.
    groups = (groups - low) / (high - low)  # 0..1
    centered = groups - groups.nanmean(1, keepdim=True)
    std = (centered**2).nanmean(1, keepdim=True).sqrt()
    return torch.where(high > low, centered / std, 0).nan_to_num(0).view(-1)


def grpo_loss(
    new_logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    ref_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    cliprange: float = 0.2,
    kl_coef: float = 0.04,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """All (B, T) -> a scalar mean over tokens, detached scalar stats."""
    policy_loss, stats = clipped_surrogate(new_logprobs, old_logprobs, advantages, mask, cliprange)
    kl = kl_estimate(new_logprobs, ref_logprobs, "k3")  # (B, T) eq. 4
    kl = masked_mean(torch.where(mask, kl, 0), mask)  # scalar, nats a token
    return policy_loss + kl_coef * kl, stats | {"kl_loss": kl.detach()}


def grpo_step(
    model: HybridModel,
    rollout: Rollout,
    optimizer: torch.optim.Optimizer,
    *,
    group_size: int,
    kl_coef: float = 0.04,
    ppo_epochs: int = 1,
    minibatches: int = 1,
    temperature: float = 1.0,
    cliprange: float = 0.2,
    **options,
) -> dict[str, float]:
    """GRPO's updates on a rollout of `collect_rollout(..., kl_coef=0)`, whose rewards are then
    scores minus penalties. `options` are those of `update_epochs`. -> metrics `grpo/...`; the
    metrics of the rollout keep their names, `ppo/...`."""
    scored = rollout.response_mask.any(1)  # (B,)
    # Sorted: the same scores of turns, in other columns, must give the same sum to the last bit.
    totals = rollout.rewards.sort(1).values.sum(1)  # (B,)
    scores = torch.where(scored, totals, torch.nan)  # (B,)
    advantages = group_advantages(scores, group_size)[:, None] * rollout.response_mask  # (B, T)
    rollout = replace(rollout, advantages=advantages)

    def loss_fn(micro_batch: Rollout):
        inputs = micro_batch.input_ids, micro_batch.attention_mask, micro_batch.response_mask
        new = model(*inputs, temperature, entropy=False)
        return grpo_loss(
            new.logprobs, micro_batch.logprobs, micro_batch.ref_logprobs, micro_batch.advantages,
            micro_batch.response_mask, cliprange, kl_coef,
        )  # fmt: skip

    options |= dict(ppo_epochs=ppo_epochs, minibatches=minibatches)
    metrics = update_epochs(model, rollout, optimizer, loss_fn, **options)
    metrics["group_std"] = float(scores.view(-1, group_size).std(1, unbiased=False).nanmean())
    return {f"grpo/{name}": value for name, value in metrics.items()}
