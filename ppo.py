"""PPO on a language model: sample, score, penalise the drift from a reference, estimate advantages, take clipped steps.

Read beside: PPO (Schulman et al. 1707.06347), GAE (1506.02438), Ziegler et al. 1909.08593 (the KL penalty and its controller),
the N+ details (Huang et al. 2403.17031). One token is one action; one response is one episode; gamma is 1 by default.

    column          0    1    2    3    4    5    6
    input_ids       q0   q1   q2   r0   r1  EOS  PAD
    response_mask   0    0    0    1    1    1    0
    logprobs        0    0    0    *    *    *    0     log pi(token t | tokens < t)
    values          0    0    0    *    *    *    0     V(state just before token t)
    rewards         0    0    0   -kl  -kl  -kl+score   the score sits on the LAST RESPONSE token

Left out on purpose: an entropy bonus, a separate critic, reward models (a reward is any function of text, see rewards.py), dropping
batches by a threshold (only a gradient that is not finite is skipped, and counted: engine.py). Run it alone: `python train.py --ppo-ratio 1`.
"""

import math
from dataclasses import dataclass

import torch

from data import Batch, Example, batch_of, columns_of
from dialogue import sample_episodes
from engine import Backend, accumulate, apply_gradients
from hybrid import HybridModel, forward_rows, masked_mean
from references import ReferenceMixture, reference_logprobs
from sft import sft_loss

# ------------------------------------------------------------------------------------------------ pure functions


def masked_variance(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Biased variance of x over the True positions of mask. Returns a scalar."""
    return masked_mean((x - masked_mean(x, mask)) ** 2, mask)


def masked_whiten(x: torch.Tensor, mask: torch.Tensor, shift_mean: bool = True) -> torch.Tensor:
    """(x - mean) / std over the True positions of mask, 0 elsewhere; with `shift_mean=False` the mean is put back.

    The variance is the biased one, as in Ziegler et al.'s code (N+ details). A single element has no spread: it becomes 0
    (its mean, with `shift_mean=False`).

    >>> masked_whiten(torch.tensor([1.0, 3.0, 99.0]), torch.tensor([True, True, False])).round(decimals=3).tolist()
    [-1.0, 1.0, 0.0]
    """
    mean = masked_mean(x, mask)  # scalar
    white = (x - mean) * torch.rsqrt(masked_variance(x, mask) + 1e-8)  # as x
    return torch.where(mask, white if shift_mean else white + mean, 0)


def kl_estimate(
    logprobs: torch.Tensor, ref_logprobs: torch.Tensor, kind: str = "k1"
) -> torch.Tensor:
    """Per-token estimate of KL(pi || ref) from tokens drawn from pi; any shape. Schulman, "Approximating KL Divergence" (2020).

    With d = log pi - log ref:  k1 = d (unbiased, may be negative);  k2 = d^2 / 2 (biased, small variance);
    k3 = exp(-d) - 1 + d (unbiased, never negative). Raises ValueError for another kind.
    """
    d = logprobs - ref_logprobs
    if kind == "k1":
        return d
    if kind == "k2":
        return 0.5 * d**2
    if kind == "k3":
        return torch.expm1(-d) + d
    raise ValueError(f"unknown KL estimator {kind!r}: known are k1, k2, k3")


def compute_gae(
    rewards: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor,
    gamma: float = 1.0,
    lam: float = 0.95,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Generalised advantage estimation (1506.02438, eq. 16, as the recursion that follows from it). All (B, T) float32 -> advantages, returns, 0 off the mask.

        delta_t = r_t + gamma V_{t+1} - V_t            A_t = delta_t + gamma lam A_{t+1}            returns = A + V

    "t+1" is the next column ON the mask: columns off it (prompt, padding, the user's turns of a dialogue) are skipped, they are
    not states of value zero. After the last response token the episode is over: its next value is 0.

    >>> advantages, _ = compute_gae(torch.tensor([[0.0, 0.0, 1.0]]), torch.tensor([[0.0, 0.5, 0.6]]), torch.tensor([[False, True, True]]), lam=1.0)
    >>> advantages.round(decimals=3).tolist()          # lam 1: what came (1) minus what was expected (0.5, 0.6)
    [[0.0, 0.5, 0.4]]
    """
    next_value = torch.zeros_like(values[:, 0])  # (B,)
    next_advantage = torch.zeros_like(next_value)  # (B,)
    advantages = torch.zeros_like(values)  # (B, T)
    for t in reversed(range(values.shape[1])):
        on = mask[:, t]  # (B,)
        delta = rewards[:, t] + gamma * next_value - values[:, t]  # (B,)
        advantage = delta + gamma * lam * next_advantage  # (B,)
        advantages[:, t] = torch.where(on, advantage, 0)
        next_advantage = torch.where(on, advantage, next_advantage)
        next_value = torch.where(on, values[:, t], next_value)
    return advantages, torch.where(mask, advantages + values, 0)


def clipped_surrogate(
    new_logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    cliprange: float = 0.2,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The clipped surrogate of 1707.06347 (eq. 7), with its sign turned, as a mean over tokens. All (B, T) -> scalar, detached stats.

    A > 0: the gradient stops once ratio > 1 + cliprange; A < 0: once ratio < 1 - cliprange. Elsewhere it flows, so that a ratio
    that drifted the wrong way can always come back.
    """
    log_ratio = torch.where(mask, new_logprobs - old_logprobs, 0).clamp(
        max=20
    )  # (B, T) beyond that exp would overflow
    ratio = torch.exp(log_ratio)  # (B, T)  r_t(theta), eq. 6
    advantages = torch.where(mask, advantages, 0)  # (B, T)
    surrogate = -advantages * ratio  # (B, T)
    surrogate_clipped = -advantages * ratio.clamp(1 - cliprange, 1 + cliprange)  # (B, T)
    policy_loss = masked_mean(torch.max(surrogate, surrogate_clipped), mask)  # scalar, eq. 7
    stats = {
        "policy_loss": policy_loss,
        "approxkl": masked_mean(0.5 * log_ratio**2, mask),
        "clipfrac": masked_mean((surrogate_clipped > surrogate).float(), mask),
        "ratio_gap_max": torch.where(mask, (ratio - 1).abs(), 0).max(),
    }
    return policy_loss, {name: value.detach() for name, value in stats.items()}


def ppo_loss(
    new_logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    new_values: torch.Tensor,
    old_values: torch.Tensor,
    returns: torch.Tensor,
    mask: torch.Tensor,
    cliprange: float = 0.2,
    cliprange_value: float = 0.2,
    vf_coef: float = 0.1,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The clipped surrogate plus vf_coef times the clipped value loss. All (B, T) -> a scalar mean over tokens, detached scalar stats.

    The paper's value loss is not clipped; this clip and the factor 0.5 are those of Ziegler et al.'s code.
    """
    policy_loss, stats = clipped_surrogate(new_logprobs, old_logprobs, advantages, mask, cliprange)
    values_clipped = old_values + (new_values - old_values).clamp(
        -cliprange_value, cliprange_value
    )  # (B, T)
    value_error = torch.where(mask, new_values - returns, 0) ** 2  # (B, T)
    value_error_clipped = torch.where(mask, values_clipped - returns, 0) ** 2  # (B, T)
    value_loss = 0.5 * masked_mean(torch.max(value_error, value_error_clipped), mask)  # scalar
    stats["value_loss"] = value_loss.detach()
    stats["value_clipfrac"] = masked_mean((value_error_clipped > value_error).float(), mask)
    return policy_loss + vf_coef * value_loss, stats


class AdaptiveKLController:
    """Moves `value`, the KL coefficient, until the KL of a response is `target` nats (Ziegler et al. 1909.08593, section 2.2).

    `horizon` is in episodes: while the KL is 20 % or more off its target, the coefficient changes by a factor e^0.2 = 1.22 per
    horizon. (The paper has a constant K_beta = 0.1 per batch; n_steps / horizon is the authors' code.)
    """

    def __init__(self, init_kl_coef: float, target: float, horizon: float):
        self.value, self.target, self.horizon = init_kl_coef, target, horizon

    def update(self, current_kl: float, n_steps: int) -> None:
        """current_kl: mean over responses of the summed KL, in nats; n_steps: episodes since the last update."""
        error = min(max(current_kl / self.target - 1, -0.2), 0.2)
        self.value *= 1 + error * n_steps / self.horizon

    def state_dict(self) -> dict[str, float]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.value = state["value"]


class FixedKLController(AdaptiveKLController):
    """The same face, a constant coefficient."""

    def __init__(self, kl_coef: float):
        self.value = kl_coef

    def update(self, current_kl: float, n_steps: int) -> None:
        """Nothing to do."""


# ------------------------------------------------------------------------------------------------ the rollout


@dataclass
class Rollout(Batch):
    """A Batch of sampled responses and what PPO knows about each token. All (B, T) float32, 0 off the response mask."""

    logprobs: (
        torch.Tensor
    )  # under the policy that sampled them, recomputed by the same forward that trains
    ref_logprobs: torch.Tensor  # under the reference
    values: torch.Tensor  # V(state just before the token)
    rewards: torch.Tensor  # -kl_coef * kl, plus the score on the last response token
    advantages: torch.Tensor  # whitened
    returns: (
        torch.Tensor
    )  # what the value head is to predict: GAE advantages before whitening, plus values


def place_rewards(
    kl: torch.Tensor,
    mask: torch.Tensor,
    kl_coef: float,
    scores: torch.Tensor,
    rows: torch.Tensor,
    columns: torch.Tensor,
) -> torch.Tensor:
    """Per-token reward: kl, mask (B, T) -> (B, T). Score n (of scores, rows, columns (n,)) stands at its row and column, the last token of
    the response that it is about, EOS included; each row sums to its scores - kl_coef * sum(kl)."""
    placed = torch.zeros_like(kl).index_put_((rows, columns), scores, accumulate=True)  # (B, T)
    return torch.where(mask, placed - kl_coef * kl, 0)


@torch.no_grad()
def collect_rollout(
    model: HybridModel,
    reference: HybridModel | ReferenceMixture,
    tokenizer,
    examples: list[Example],
    reward,
    *,
    kl_coef: float,
    max_length: int,
    max_new_tokens: int,
    temperature: float = 1.0,
    gamma: float = 1.0,
    lam: float = 0.95,
    kl_estimator: str = "k1",
    missing_eos_penalty: float = 0.0,
    whiten_rewards: bool = False,
    micro_batch_size: int | None = None,
    generator: torch.Generator | None = None,
    turns: int = 1,
    user=None,
    turn_rewards: bool = False,
) -> tuple[Rollout, dict[str, float]]:
    """Sample one episode per example (a response, or several), score it, and work out advantages. -> rollout, metrics.

    Must be called after the SFT steps of its cycle, since the old log-probabilities belong to the weights as they are now.
    `reward(prompts, completions, **columns) -> (n,)`, n = B but for `turn_rewards`; where it is NaN (a judge that gave no answer) the response is taken off the
    mask, so that nothing is learnt from it. `missing_eos_penalty` is taken off the score of a response that the length limit cut.
    With `turns` above 1 an episode is a dialogue with `user` (dialogue.py): one score at its end, for all that was said, or with `turn_rewards`
    one for each response, given what was said before it.
    """
    device = next(model.parameters()).device
    lengths = dict(max_length=max_length, max_new_tokens=max_new_tokens)
    episodes = sample_episodes(
        model,
        tokenizer,
        examples,
        turns=turns,
        user=user,
        **lengths,
        temperature=temperature,
        generator=generator,
    )
    # What is scored: (row, prompt, completion, column of the score), one for each row, or for each turn of each row
    if turn_rewards:
        judged = [
            (i, *turn)
            for i, e in enumerate(episodes)
            for turn in zip(e.histories, e.responses, e.ends)
        ]
    else:
        judged = [(i, e.example.prompt, e.text(), e.ends[-1]) for i, e in enumerate(episodes)]
    rows, prompts, completions, columns = zip(*judged)
    raw_scores = reward(
        list(prompts), list(completions), **columns_of([examples[i] for i in rows])
    ).to(device)  # (n,)
    rows, columns = (
        torch.tensor(rows, device=device),
        torch.tensor(columns, device=device),
    )  # (n,) each
    finite = torch.isfinite(raw_scores)  # (n,)
    scored = torch.ones(len(examples), dtype=torch.bool, device=device)  # (B,)
    scored[rows[~finite]] = False
    cut = [
        (i, end)
        for i, e in enumerate(episodes)
        for end, truncated in zip(e.ends, e.truncated)
        if truncated
    ]  # by the length limit
    penalties = torch.tensor(cut, dtype=torch.long, device=device).view(
        -1, 2
    )  # (c, 2) rows and columns
    n_responses = sum(len(e.responses) for e in episodes)

    batch = batch_of(tokenizer, [e.ids for e in episodes], [e.response_mask for e in episodes]).to(
        device
    )
    # Recomputed, not the sampler's: the ratio of the first update is then 1 because both come from the same forward (critical!)
    policy = forward_rows(model, batch, micro_batch_size, temperature)  # (B, T) each
    ref_logprobs, named = reference_logprobs(
        reference, batch, examples, micro_batch_size, temperature
    )  # (B, T), {name: (B, T)}
    sampled = torch.zeros_like(policy.logprobs)  # (B, T) what the sampler saw, for `sampler_gap`
    sampled[batch.response_mask] = torch.tensor(
        [x for e in episodes for x in e.logprobs], device=device
    )

    mask = batch.response_mask & scored[:, None]  # (B, T)
    kl = kl_estimate(policy.logprobs, ref_logprobs, kl_estimator)  # (B, T)
    rewards = place_rewards(
        kl, mask, kl_coef,
        scores=torch.cat([raw_scores.nan_to_num(0), torch.full((len(cut),), -missing_eos_penalty, device=device)]),
        rows=torch.cat([rows, penalties[:, 0]]), columns=torch.cat([columns, penalties[:, 1]]),
    )  # fmt: skip
    metrics = {
        "score": raw_scores.nanmean(),
        "score_std": raw_scores[finite].double().std(unbiased=False)
        if finite.sum() > 1
        else math.nan,  # one score has no spread
        "unscored": (~scored).float().mean(),
        "reward": rewards.sum(1)[scored].mean(),
        "kl": kl_estimate(policy.logprobs, ref_logprobs, "k3").sum(1)[scored].mean(),
        "kl_k1": kl_estimate(policy.logprobs, ref_logprobs, "k1").sum(1)[scored].mean(),
        "kl_coef": kl_coef,
        "entropy": masked_mean(policy.entropy, mask),
        "response_length": batch.response_mask.sum(1).float().mean(),
        "eos_rate": 1 - len(cut) / n_responses,
        "sampler_gap": (sampled - policy.logprobs).abs().max(),
    }
    metrics |= {
        f"kl/{name}": kl_estimate(policy.logprobs, each, "k3").sum(1)[scored].mean()
        for name, each in named.items()
    }
    if turns > 1:
        metrics["turns"] = n_responses / len(episodes)
    if whiten_rewards:
        rewards = masked_whiten(rewards, mask, shift_mean=False)
    advantages, returns = compute_gae(rewards, policy.values, mask, gamma, lam)  # (B, T) each
    metrics["var_explained"] = 1 - masked_variance(returns - policy.values, mask) / masked_variance(
        returns, mask
    ).clamp(min=1e-8)
    rollout = Rollout(
        batch.input_ids,
        batch.attention_mask,
        response_mask=mask,
        logprobs=policy.logprobs,
        ref_logprobs=ref_logprobs,
        values=policy.values,
        rewards=rewards,
        advantages=masked_whiten(advantages, mask),
        returns=returns,
    )
    return rollout, {f"ppo/{name}": float(value) for name, value in metrics.items()}


# ------------------------------------------------------------------------------------------------ the update


def ppo_step(
    model: HybridModel,
    rollout: Rollout,
    optimizer: torch.optim.Optimizer,
    *,
    ppo_epochs: int = 2,
    minibatches: int = 2,
    micro_batch_size: int | None = None,
    temperature: float = 1.0,
    cliprange: float = 0.2,
    cliprange_value: float = 0.2,
    vf_coef: float = 0.1,
    target_kl: float | None = None,
    max_grad_norm: float = 1.0,
    backend: Backend | None = None,
    generator: torch.Generator | None = None,
    demonstrations: Batch | None = None,
    sft_weight: float = 0.0,
) -> dict[str, float]:
    """PPO's updates on one rollout: `update_epochs` with `ppo_loss`. -> metrics named `ppo/...`."""

    def loss_fn(part: Rollout):
        new = model(
            part.input_ids, part.attention_mask, part.response_mask, temperature, entropy=False
        )
        return ppo_loss(
            new.logprobs,
            part.logprobs,
            part.advantages,
            new.values,
            part.values,
            part.returns,
            part.response_mask,
            cliprange,
            cliprange_value,
            vf_coef,
        )

    metrics = update_epochs(
        model, rollout, optimizer, loss_fn, epochs=ppo_epochs, minibatches=minibatches, micro_batch_size=micro_batch_size,
        target_kl=target_kl, max_grad_norm=max_grad_norm, backend=backend, generator=generator, demonstrations=demonstrations, sft_weight=sft_weight,
    )  # fmt: skip
    return {f"ppo/{name}": value for name, value in metrics.items()}


def update_epochs(
    model: HybridModel,
    rollout: Rollout,
    optimizer: torch.optim.Optimizer,
    loss_fn,
    *,
    epochs: int,
    minibatches: int,
    micro_batch_size: int | None,
    target_kl: float | None,
    max_grad_norm: float,
    backend: Backend | None,
    generator: torch.Generator | None,
    demonstrations: Batch | None = None,
    sft_weight: float = 0.0,
) -> dict[str, float]:
    """`epochs` passes over the rollout, each in a fresh order and cut into `minibatches` optimiser steps of equal size
    (to within one row).

    `loss_fn(part of the rollout) -> (loss, stats)`, means over its response tokens. Returns the means of the stats over the optimiser steps taken
    (the maximum where a name ends in `_max`) and the number of those skipped. After an epoch whose mean `approxkl` exceeds `target_kl` the remaining
    epochs are not run. A stat `ratio_gap_max` also gives `first_ratio_gap`: max |ratio - 1| of the first minibatch, which is 0 up to rounding as long as rollouts are on-policy. `generator` (CPU) orders the rows; `backend` is for float16 and several
    processes, None is plain torch.

    With `demonstrations`, every update follows (1 - sft_weight) * loss_fn + sft_weight * sft_loss (InstructGPT 2203.02155, eq. 2, has a sum with
    a coefficient), and `sft_loss` is among the stats.
    """
    backend = backend or Backend(model)

    def weighted_loss(part: Rollout):
        loss, stats = loss_fn(part)
        return (1 - sft_weight) * loss, stats

    def weighted_sft_loss(part: Batch):
        loss = sft_loss(
            model(part.input_ids, part.attention_mask, part.response_mask, entropy=False).logprobs,
            part.response_mask,
        )
        return sft_weight * loss, {"sft_loss": loss.detach()}

    usable = rollout.response_mask.any(1).nonzero().squeeze(1)  # (b,) rows with a score
    if not len(
        usable
    ):  # nothing to learn from: no judge answered, or every prompt is demonstrated instead
        return {"skipped_steps": 0.0}
    history: list[dict[str, float]] = []
    passes = 0
    for _ in range(epochs):
        order = usable[torch.randperm(len(usable), generator=generator).to(usable.device)]  # (b,)
        first_of_epoch = len(history)
        for rows in torch.tensor_split(
            order, min(minibatches, len(usable))
        ):  # no tiny last minibatch
            stats = accumulate(
                backend,
                rollout,
                rows,
                micro_batch_size,
                loss_fn if demonstrations is None else weighted_loss,
            )
            if demonstrations is not None:
                every = torch.arange(len(demonstrations), device=usable.device)
                stats |= accumulate(
                    backend, demonstrations, every, micro_batch_size, weighted_sft_loss
                )
            history.append(stats | apply_gradients(backend, optimizer, max_grad_norm))
        passes += 1
        latest = history[first_of_epoch:]
        if (
            target_kl is not None
            and sum(stats["approxkl"] for stats in latest) / len(latest) > target_kl
        ):
            break
    metrics = {"epochs": float(passes)}
    if "ratio_gap_max" in history[0]:
        metrics["first_ratio_gap"] = history[0]["ratio_gap_max"]
    taken = [stats for stats in history if not stats["skipped_steps"]] or history
    for name in taken[0]:
        values = [stats[name] for stats in taken]
        metrics[name] = max(values) if name.endswith("_max") else sum(values) / len(values)
    metrics["skipped_steps"] = sum(stats["skipped_steps"] for stats in history)
    return metrics
