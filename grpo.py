"""GRPO: several responses to each prompt, and each is as good as it is better than its siblings (Shao et al. 2402.03300). The second fork.

    A_i = (score_i - mean of the group) / standard deviation of the group            for every token of response i; no value head, no GAE
    loss = clipped surrogate + kl_coef * k3(pi || reference)                         (the paper's eq. 3 and 4, with the sign turned)

Departures, both common since: the mean is over the tokens of the whole optimiser step, as everywhere here, where the paper takes the mean of
each response first; and the KL is penalised in the loss, as in the paper, not in the reward, as in ppo.py.
Left out on purpose: process rewards. Run it: `python train.py --algorithm grpo --group-size 8`.
"""

from dataclasses import replace

import torch

from data import Batch
from engine import Backend
from hybrid import HybridModel, masked_mean
from ppo import Rollout, clipped_surrogate, kl_estimate, update_epochs


def group_advantages(scores: torch.Tensor, group_size: int) -> torch.Tensor:
    """scores (B,), the responses to one prompt next to each other -> (B,): standardised within each group, 0 where all are alike.

    NaN marks a response without a score: it is left out of its group's statistics and gets 0.

    >>> group_advantages(torch.tensor([1.0, 3.0, 5.0, 5.0]), group_size=2).tolist()
    [-1.0, 1.0, 0.0, 0.0]
    """
    groups = scores.view(-1, group_size)  # (prompts, group_size)
    centered = groups - groups.nanmean(1, keepdim=True)
    std = (centered**2).nanmean(1, keepdim=True).sqrt()
    return torch.where(std > 1e-6, centered / std, 0).nan_to_num(0).view(-1)


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
    kl = masked_mean(
        torch.where(mask, kl_estimate(new_logprobs, ref_logprobs, "k3"), 0), mask
    )  # scalar, nats a token; eq. 4
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
    micro_batch_size: int | None = None,
    temperature: float = 1.0,
    cliprange: float = 0.2,
    target_kl: float | None = None,
    max_grad_norm: float = 1.0,
    backend: Backend | None = None,
    generator: torch.Generator | None = None,
    demonstrations: Batch | None = None,
    sft_weight: float = 0.0,
) -> dict[str, float]:
    """GRPO's updates on a rollout of `collect_rollout(..., kl_coef=0)`, whose rewards are then the scores alone. -> metrics `grpo/...`."""
    scored = rollout.response_mask.any(1)  # (B,)
    scores = torch.where(scored, rollout.rewards.sum(1), torch.nan)  # (B,)
    advantages = group_advantages(scores, group_size)[:, None] * rollout.response_mask  # (B, T)

    def loss_fn(part: Rollout):
        new = model(
            part.input_ids, part.attention_mask, part.response_mask, temperature, entropy=False
        )
        return grpo_loss(
            new.logprobs,
            part.logprobs,
            part.ref_logprobs,
            part.advantages,
            part.response_mask,
            cliprange,
            kl_coef,
        )

    metrics = update_epochs(
        model, replace(rollout, advantages=advantages), optimizer, loss_fn, epochs=ppo_epochs, minibatches=minibatches,
        micro_batch_size=micro_batch_size, target_kl=target_kl, max_grad_norm=max_grad_norm, backend=backend, generator=generator, demonstrations=demonstrations, sft_weight=sft_weight,
    )  # fmt: skip
    metrics["group_std"] = float(scores.view(-1, group_size).std(1, unbiased=False).nanmean())
    return {f"grpo/{name}": value for name, value in metrics.items()}
