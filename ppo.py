"""PPO on a language model: sample, score, penalise the drift from a reference, estimate advantages, take clipped steps.

Read beside: PPO (Schulman et al. 1707.06347), GAE (1506.02438), Ziegler et al. 1909.08593 (the KL penalty and its controller),
the N+ details (Huang et al. 2403.17031). One token is one action; one response is one episode; gamma is 1 by default.

    column          0    1    2    3    4    5    6
    input_ids       q0   q1   q2   r0   r1  EOS  PAD
    response_mask   0    0    0    1    1    1    0
    logprobs        0    0    0    *    *    *    0     log pi(token t | tokens < t)
    values          0    0    0    *    *    *    0     V(state just before token t)
    rewards         0    0    0   -kl  -kl  -kl+score   the score sits on the LAST RESPONSE token

Left out on purpose: an entropy bonus, a separate critic, reward models (a reward is any function of text, see rewards.py),
and skipping of "bad" batches: whatever is skipped is counted. Run it alone: `python train.py --ppo-ratio 1`.
"""

from dataclasses import dataclass

import torch

from data import Batch, Example, decode, encode_prompt, make_batch
from engine import accumulate, apply_gradients
from generate import generate
from hybrid import HybridModel, TokenScores, masked_mean

# ------------------------------------------------------------------------------------------------ pure functions


def masked_whiten(x: torch.Tensor, mask: torch.Tensor, shift_mean: bool = True) -> torch.Tensor:
    """(x - mean) / std over the True positions of mask, 0 elsewhere; with `shift_mean=False` the mean is put back.

    The variance is the biased one, as in Ziegler et al.'s code (N+ details). A single element has no spread: it becomes 0.

    >>> masked_whiten(torch.tensor([1.0, 3.0, 99.0]), torch.tensor([True, True, False])).round(decimals=3).tolist()
    [-1.0, 1.0, 0.0]
    """
    mean = masked_mean(x, mask)  # scalar
    variance = masked_mean((x - mean) ** 2, mask)  # scalar
    white = (x - mean) * torch.rsqrt(variance + 1e-8)
    return torch.where(mask, white if shift_mean else white + mean, 0)


def kl_estimate(logprobs: torch.Tensor, ref_logprobs: torch.Tensor, kind: str = "k1") -> torch.Tensor:
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
    rewards: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, gamma: float = 1.0, lam: float = 0.95
) -> tuple[torch.Tensor, torch.Tensor]:
    """Generalised advantage estimation (1506.02438, eq. 16). All (B, T) float32 -> advantages, returns, 0 off the mask.

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
    """The clipped surrogate (1707.06347, eq. 7, with its sign turned) plus vf_coef times the clipped value loss. All (B, T).

    A > 0: the gradient stops once ratio > 1 + cliprange; A < 0: once ratio < 1 - cliprange. Outside those two cases a step
    that undoes the drift is never clipped. Returns a scalar mean over tokens and detached scalar stats.
    """
    log_ratio = torch.where(mask, new_logprobs - old_logprobs, 0)  # (B, T)
    ratio = torch.exp(log_ratio)  # (B, T)  r_t(theta), eq. 6
    surrogate = -advantages * ratio  # (B, T)
    surrogate_clipped = -advantages * ratio.clamp(1 - cliprange, 1 + cliprange)  # (B, T)
    policy_loss = masked_mean(torch.max(surrogate, surrogate_clipped), mask)  # scalar, eq. 7

    values_clipped = old_values + (new_values - old_values).clamp(-cliprange_value, cliprange_value)  # (B, T)
    value_error = (new_values - returns) ** 2  # (B, T)
    value_error_clipped = (values_clipped - returns) ** 2  # (B, T)
    value_loss = 0.5 * masked_mean(torch.max(value_error, value_error_clipped), mask)  # scalar

    loss = policy_loss + vf_coef * value_loss
    with torch.no_grad():
        stats = {
            "policy_loss": policy_loss,
            "value_loss": value_loss,
            "approxkl": masked_mean(0.5 * log_ratio**2, mask),
            "clipfrac": masked_mean((surrogate_clipped > surrogate).float(), mask),
            "value_clipfrac": masked_mean((value_error_clipped > value_error).float(), mask),
            "ratio_gap_max": torch.where(mask, (ratio - 1).abs(), 0).max(),
        }
    return loss, {name: value.detach() for name, value in stats.items()}


class AdaptiveKLController:
    """Moves `value`, the KL coefficient, until the KL of a response is `target` nats (Ziegler et al. 1909.08593, section 2.2).

    `horizon` is in episodes: the number over which a coefficient that is wrong by a factor can be mended.
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

    logprobs: torch.Tensor  # under the policy that sampled them, recomputed by the same forward that trains
    ref_logprobs: torch.Tensor  # under the reference
    values: torch.Tensor  # V(state just before the token)
    rewards: torch.Tensor  # -kl_coef * kl, plus the score on the last response token
    advantages: torch.Tensor  # whitened
    returns: torch.Tensor  # what the value head is to predict: GAE advantages before whitening, plus values


@torch.no_grad()
def score_rows(model: HybridModel, batch: Batch, micro_batch_size: int | None, temperature: float) -> TokenScores:
    """`model.forward` over the whole batch without gradient, `micro_batch_size` rows at a time. Each (B, T)."""
    width = batch.input_ids.shape[1]
    parts = []
    for rows in torch.arange(len(batch), device=batch.input_ids.device).split(micro_batch_size or len(batch)):
        part = batch.rows(rows)
        scores = model(part.input_ids, part.attention_mask, part.response_mask, temperature)  # (b, t) each
        parts.append([torch.nn.functional.pad(x, (0, width - x.shape[1])) for x in scores])  # (b, T) each
    return TokenScores(*(torch.cat(columns) for columns in zip(*parts)))


def place_rewards(kl: torch.Tensor, scores: torch.Tensor, mask: torch.Tensor, kl_coef: float) -> torch.Tensor:
    """Per-token reward: kl, mask (B, T), scores (B,) -> (B, T). Each row sums to score - kl_coef * sum(kl)."""
    column = torch.arange(mask.shape[1], device=mask.device)  # (T,)
    last = torch.where(mask, column, -1).max(dim=1).values  # (B,) the last response token, EOS included
    rewards = torch.where(mask, -kl_coef * kl, 0)  # (B, T)
    return rewards + scores[:, None] * (column == last[:, None])


@torch.no_grad()
def collect_rollout(
    model: HybridModel,
    reference: HybridModel,
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
) -> tuple[Rollout, dict[str, float], list[dict]]:
    """Sample one response per example, score it, and work out advantages. -> rollout, metrics, samples (one dict a row).

    Must be called after the SFT steps of its cycle, since the old log-probabilities belong to the weights as they are now.
    `reward(prompts, completions, **columns) -> (B,)`; `missing_eos_penalty` is taken off the score of a response that the
    length limit cut. Temperature divides the logits of policy and reference alike.
    """
    device = next(model.parameters()).device
    prompts = [encode_prompt(tokenizer, example)[-(max_length - max_new_tokens) :] for example in examples]
    generation = generate(
        model,
        prompts,
        max_new_tokens=max_new_tokens,
        eos_token_id=tokenizer.eos_token_id,
        temperature=temperature,
        generator=generator,
    )
    completions = [decode(tokenizer, response) for response in generation.responses]
    raw_scores = reward([e.prompt for e in examples], completions, **columns_of(examples)).to(device)  # (B,)
    ended = torch.tensor([response[-1] == tokenizer.eos_token_id for response in generation.responses], device=device)  # (B,)
    scores = raw_scores - missing_eos_penalty * ~ended  # (B,)

    batch = make_batch(tokenizer, prompts, generation.responses, max_length).to(device)
    mask = batch.response_mask  # (B, T)
    # Recomputed, not the sampler's: the ratio of the first update is then 1 because both come from the same forward (critical!)
    policy = score_rows(model, batch, micro_batch_size, temperature)
    ref = score_rows(reference, batch, micro_batch_size, temperature)
    kl = kl_estimate(policy.logprobs, ref.logprobs, kl_estimator)  # (B, T)
    rewards = place_rewards(kl, scores, mask, kl_coef)  # (B, T)
    if whiten_rewards:
        rewards = masked_whiten(rewards, mask, shift_mean=False)
    advantages, returns = compute_gae(rewards, policy.values, mask, gamma, lam)  # (B, T) each
    rollout = Rollout(
        batch.input_ids,
        batch.attention_mask,
        mask,
        logprobs=policy.logprobs,
        ref_logprobs=ref.logprobs,
        values=policy.values,
        rewards=rewards,
        advantages=masked_whiten(advantages, mask),
        returns=returns,
    )

    sampled = torch.zeros_like(policy.logprobs)  # (B, T)
    sampled[mask] = torch.tensor([x for row in generation.logprobs for x in row], device=device)
    k1 = kl_estimate(policy.logprobs, ref.logprobs, "k1").sum(1)  # (B,) nats a response
    k3 = kl_estimate(policy.logprobs, ref.logprobs, "k3").sum(1)  # (B,)
    variance = masked_mean((returns - masked_mean(returns, mask)) ** 2, mask)  # scalar
    unexplained = masked_mean((returns - policy.values) ** 2, mask)  # scalar
    metrics = {
        "score": raw_scores.mean(),
        "reward": (scores - kl_coef * kl.sum(1)).mean(),
        "kl": k3.mean(),
        "kl_k1": k1.mean(),
        "kl_coef": kl_coef,
        "entropy": masked_mean(policy.entropy, mask),
        "response_length": mask.sum(1).float().mean(),
        "eos_rate": ended.float().mean(),
        "sampler_gap": (sampled - policy.logprobs).abs().max(),
        "var_explained": 1 - unexplained / variance.clamp(min=1e-8),
    }
    samples = [
        {"prompt": example.prompt, "response": completion, "score": float(score), "kl": float(row_kl)}
        for example, completion, score, row_kl in zip(examples, completions, raw_scores, k1)
    ]
    return rollout, {f"ppo/{name}": float(value) for name, value in metrics.items()}, samples


def columns_of(examples: list[Example]) -> dict[str, list]:
    """The keyword lists that rewards receive: `target` and every other column of the data, None where a record lacks it."""
    names = {name: None for example in examples for name in example.columns}  # a dict keeps the order
    columns = {name: [example.columns.get(name) for example in examples] for name in names}
    return {**columns, "target": [example.target for example in examples]}


# ------------------------------------------------------------------------------------------------ the update


def ppo_step(
    model: HybridModel,
    rollout: Rollout,
    optimizer: torch.optim.Optimizer,
    *,
    ppo_epochs: int = 4,
    minibatches: int = 1,
    micro_batch_size: int | None = None,
    temperature: float = 1.0,
    cliprange: float = 0.2,
    cliprange_value: float = 0.2,
    vf_coef: float = 0.1,
    target_kl: float | None = None,
    max_grad_norm: float = 1.0,
    generator: torch.Generator | None = None,
) -> dict[str, float]:
    """`ppo_epochs` passes over the rollout, each in a fresh order and cut into `minibatches` optimiser steps of equal size.

    After an epoch whose mean `approxkl` exceeds `target_kl` the remaining epochs are not run. Returns the means over all
    optimiser steps taken, the largest `ratio_gap_max`, and `first_ratio_gap`: max |ratio - 1| of the first minibatch,
    which is 0 up to rounding as long as rollouts are on-policy. `generator` (CPU) orders the rows.
    """

    def loss_fn(part: Rollout):
        new = model(part.input_ids, part.attention_mask, part.response_mask, temperature)
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

    history: list[dict[str, float]] = []
    epochs = 0
    for _ in range(ppo_epochs):
        order = torch.randperm(len(rollout), generator=generator).to(rollout.input_ids.device)  # (B,)
        first_of_epoch = len(history)
        for rows in torch.tensor_split(order, min(minibatches, len(rollout))):  # equal sizes: no tiny last minibatch
            stats = accumulate(rollout, rows, micro_batch_size, loss_fn)
            history.append(stats | apply_gradients(model, optimizer, max_grad_norm))
        epochs += 1
        approxkl = [stats["approxkl"] for stats in history[first_of_epoch:]]
        if target_kl is not None and sum(approxkl) / len(approxkl) > target_kl:
            break
    metrics = {"epochs": float(epochs), "first_ratio_gap": history[0]["ratio_gap_max"]}
    for name in history[0].keys() | history[-1].keys():
        values = [stats[name] for stats in history if name in stats]
        join = max if name.endswith("_max") else sum if name == "skipped_steps" else lambda v: sum(v) / len(v)
        metrics[name] = join(values)
    return {f"ppo/{name}": value for name, value in metrics.items()}
