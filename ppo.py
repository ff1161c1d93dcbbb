"""PPO on a language model: sample, score, subtract the KL, estimate advantages, update.

Read beside: PPO (Schulman et al. 1707.06347), GAE (Schulman et al. 1506.02438), Ziegler et al.
1909.08593 (the KL penalty and its controller), the N+ details (Huang et al. 2403.17031). One token
is one action; one response is one episode; gamma is 1 by default.

    column          0    1    2    3    4    5    6
    input_ids       q0   q1   q2   r0   r1  EOS  PAD
    response_mask   0    0    0    1    1    1    0
    logprobs        0    0    0    *    *    *    0     log pi(token t | tokens < t)
    values          0    0    0    *    *    *    0     V(state just before token t)
    rewards         0    0    0    p    p   p+score     p = -kl_coef*kl of the token; the score sits
                                                        on the LAST RESPONSE token

The episode is over after the last response token: the next value is 0, after EOS and also where the
length limit truncated the response.

Left out on purpose: an entropy bonus, a separate critic, rewards themselves (any function of text,
rewards.py), a limit of the ratio above which an update is skipped. Skipped, and counted, are only
an update whose gradient is not finite (engine.py) and a step whose reward is not finite (runs.py).

    python train.py --ppo-ratio 1 --out out-ppo-only          # PPO alone
"""

import math
from dataclasses import dataclass
from statistics import pstdev

import torch
from tqdm import tqdm

from data import Batch, Example, batch_of
from dialogue import Episode, Scores, sample_episodes, score_episodes, with_penalties
from engine import Backend, accumulate, apply_gradients, join_stats
from hybrid import HybridModel, forward_rows, masked_mean
from references import ReferenceMixture, reference_logprobs
from sft import sft_loss

# ---------------------------------------------------------------------------------- pure functions


def masked_variance(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Biased variance of x over the True positions of mask. Returns a scalar."""
    return masked_mean((x - masked_mean(x, mask)) ** 2, mask)


def explained_variance(
    values: torch.Tensor, returns: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    """1 - var(returns - values) / var(returns) over the mask: 1 is a perfect value head, 0 one that
    always says the mean. All (B, T) -> scalar."""
    unexplained = masked_variance(returns - values, mask)
    return 1 - unexplained / masked_variance(returns, mask).clamp(min=1e-8)


def masked_whiten(x: torch.Tensor, mask: torch.Tensor, shift_mean: bool = True) -> torch.Tensor:
    """(x - mean) / std over the True positions of mask, 0 elsewhere.

    `shift_mean=False` adds the mean back. The variance is the biased one, as in the code of Ziegler
    et al. (N+ details). Equal elements, or a single one, become exactly 0 (or the mean, if added).

    >>> x, mask = torch.tensor([1.0, 3.0, 99.0]), torch.tensor([True, True, False])
    >>> masked_whiten(x, mask).round(decimals=3).tolist()
    [-1.0, 1.0, 0.0]
    """
    mean = masked_mean(x, mask)  # scalar
    white = (x - mean) * torch.rsqrt(masked_variance(x, mask) + 1e-8)  # as x
    low, high = x.masked_fill(~mask, torch.inf).min(), x.masked_fill(~mask, -torch.inf).max()
    white = torch.where(high > low, white, 0)  # the mean of large equal numbers is rounded
    return torch.where(mask, white if shift_mean else white + mean, 0)


def kl_estimate(
    logprobs: torch.Tensor, ref_logprobs: torch.Tensor, kind: str = "k1"
) -> torch.Tensor:
    """Per-token estimate of KL(pi || ref) from tokens drawn from pi; any shape.

    Schulman, "Approximating KL Divergence" (2020). With d = log pi - log ref:

        k1 = d                  unbiased, may be negative
        k2 = d^2 / 2            biased, small variance
        k3 = exp(-d) - 1 + d    unbiased, never negative

    Raises ValueError for another kind.
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
    """Generalised advantage estimation: 1506.02438, eq. 16, as the recursion that follows from it.

        delta_t = r_t + gamma V_{t+1} - V_t    A_t = delta_t + gamma lam A_{t+1}    returns = A + V

    All (B, T) float32 -> advantages, returns, 0 off the mask. "t+1" is the next column ON the mask:
    columns off it (prompt, padding, user turns of a dialogue) are skipped; they are not states of
    value zero. After the last response token the episode is over: the next value is 0, also where
    the response was truncated.

    >>> rewards, values = torch.tensor([[0.0, 0.0, 1.0]]), torch.tensor([[0.0, 0.5, 0.75]])
    >>> advantages, _ = compute_gae(rewards, values, torch.tensor([[False, True, True]]), lam=1.0)
    >>> advantages.tolist()  # lam 1: what came (1) minus what was expected
    [[0.0, 0.5, 0.25]]
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
    """The clipped surrogate of 1707.06347 (eq. 7), with its sign turned, as a mean over tokens.

    All (B, T) -> scalar, detached scalar stats. A > 0: no gradient once ratio > 1 + cliprange;
    A < 0: none once ratio < 1 - cliprange. Everywhere else there is one (up to a log-ratio of 20),
    so that a ratio that moved in the wrong direction can come back.
    """
    log_ratio = torch.where(mask, new_logprobs - old_logprobs, 0)  # (B, T)
    log_ratio = log_ratio.clamp(max=20)  # beyond that exp would overflow
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
    """The clipped surrogate plus vf_coef times the clipped value loss (1707.06347, eq. 9).

    All (B, T) -> a scalar mean over tokens, detached scalar stats. The paper's value loss is not
    clipped; this clip and the factor 0.5 are those of Ziegler et al.'s code.
    """
    policy_loss, stats = clipped_surrogate(new_logprobs, old_logprobs, advantages, mask, cliprange)
    value_change = (new_values - old_values).clamp(-cliprange_value, cliprange_value)  # (B, T)
    values_clipped = old_values + value_change  # (B, T)
    value_error = torch.where(mask, new_values - returns, 0) ** 2  # (B, T)
    value_error_clipped = torch.where(mask, values_clipped - returns, 0) ** 2  # (B, T)
    value_loss = 0.5 * masked_mean(torch.max(value_error, value_error_clipped), mask)  # scalar
    stats["value_loss"] = value_loss.detach()
    stats["value_clipfrac"] = masked_mean((value_error_clipped > value_error).float(), mask)
    return policy_loss + vf_coef * value_loss, stats


# A hundred times the default 0.05 is a higher price than any reward of unit scale can pay, and a
# hundredth is next to free. If the KL still misses its target there, another price will not help.
# Without a bound the price would go on to grow or shrink, and would need as long to come back.
KL_COEF_RANGE = 100.0


class AdaptiveKLController:
    """Moves `value`, the KL coefficient, until the KL of a response is `target` nats.

    Ziegler et al. 1909.08593, section 2.2. `horizon` is in episodes: while the KL is 20 % or more
    off its target, the coefficient changes by a factor e^0.2 = 1.22 per horizon, or e^-0.2 = 0.82.
    (The paper has a constant K_beta = 0.1 per batch; n_steps / horizon is the authors' code.) With
    a target of None it never changes. It stays between init_kl_coef / KL_COEF_RANGE and
    init_kl_coef * KL_COEF_RANGE (the authors have no bounds); one line says when it reaches one.
    """

    def __init__(self, init_kl_coef: float, target: float | None, horizon: float):
        self.value, self.target, self.horizon = init_kl_coef, target, horizon
        self.bounds = init_kl_coef / KL_COEF_RANGE, init_kl_coef * KL_COEF_RANGE
        self.reached: list[float] = []  # bounds that were announced

    def update(self, current_kl: float, n_steps: int) -> None:
        """current_kl: mean KL of a response, in nats; n_steps: episodes that this mean is over."""
        if self.target is None or math.isnan(current_kl):
            return
        error = min(max(current_kl / self.target - 1, -0.2), 0.2)
        self.value *= 1 + error * n_steps / self.horizon
        low, high = self.bounds
        self.value = min(max(self.value, low), high)
        if self.value in self.bounds and self.value not in self.reached:
            self.reached.append(self.value)
            tqdm.write(
                f"the price of KL has reached its bound, --kl-coef {self.value:g}: the KL is "
                f"{current_kl:.3g} nats a response, and --kl-target {self.target:g} may be out of "
                "reach"
            )

    def state_dict(self) -> dict:
        return {"value": self.value, "reached": self.reached}

    def load_state_dict(self, state: dict) -> None:
        # A checkpoint that was saved before there were bounds has reached none.
        self.value, self.reached = state["value"], list(state.get("reached", []))


# ---------------------------------------------------------------------------------- the rollout


@dataclass
class Rollout(Batch):
    """Sampled responses and what PPO knows of each token. Rows without a score are off the mask."""

    logprobs: torch.Tensor  # (B, T), as all below; under the policy, by the forward that trains
    ref_logprobs: torch.Tensor  # under the reference
    values: torch.Tensor  # V(state just before the token)
    rewards: torch.Tensor  # -kl_coef * kl, plus the score on the last response token
    advantages: torch.Tensor  # whitened
    returns: torch.Tensor  # what the value head must predict: values + advantages before whitening


def place_rewards(
    kl: torch.Tensor, mask: torch.Tensor, kl_coef: float, scores: Scores
) -> torch.Tensor:
    """Per-token rewards (1909.08593, eq. 2): kl, mask (B, T) -> (B, T).

    A score stands on the last token of the response that it is about, EOS included, so that each
    row sums to its scores - kl_coef * sum(kl).
    """
    placed = torch.zeros_like(kl)  # (B, T)
    placed.index_put_((scores.rows, scores.columns), scores.values, accumulate=True)
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
    temperature: float = 1.0,
    gamma: float = 1.0,
    lam: float = 0.95,
    kl_estimator: str = "k1",
    missing_eos_penalty: float = 0.0,
    whiten_rewards: bool = False,
    turn_rewards: bool = False,
    micro_batch_size: int | None = None,
    **sampling,
) -> tuple[Rollout, dict[str, float]]:
    """Sample one episode per example, score it, work out advantages. -> rollout, metrics `ppo/...`.

    Call it just before the updates that use it: the old log-probabilities must belong to the
    present weights. `reward(prompts, completions, **columns) -> (n,)`; a row with a score of NaN
    leaves the mask, so nothing is learnt from it. `missing_eos_penalty` is subtracted from the
    score of a truncated response. `sampling` is for `sample_episodes`: max_length, max_new_tokens,
    generator, turns, user.
    """
    # 1. sample
    episodes = sample_episodes(model, tokenizer, examples, temperature=temperature, **sampling)
    device = next(model.parameters()).device
    batch = batch_of(tokenizer, [e.ids for e in episodes], [e.response_mask for e in episodes])
    batch = batch.to(device)
    # 2. ask the reward
    scores = score_episodes(episodes, reward, turn_rewards, device)
    has_score = torch.ones(len(episodes), dtype=torch.bool, device=device)  # (B,)
    has_score[scores.rows[~torch.isfinite(scores.values)]] = False
    mask = batch.response_mask & has_score[:, None]  # (B, T)
    # 3. log-probabilities and values by the forward that trains: the first ratio is 1 (critical!)
    options = dict(micro_batch_size=micro_batch_size, temperature=temperature)
    policy = forward_rows(model, batch, **options)  # (B, T) each
    ref_logprobs, by_name = reference_logprobs(reference, batch, examples, **options)  # (B, T) each
    # 4. rewards: the KL on every token, the score (and the cost of a missing EOS) on the last one
    kl = kl_estimate(policy.logprobs, ref_logprobs, kl_estimator)  # (B, T)
    to_place = with_penalties(scores, episodes, missing_eos_penalty)
    rewards = place_rewards(kl, mask, kl_coef, to_place)  # (B, T)
    mean_reward = rewards.sum(1)[has_score].mean()  # scalar, as it is before whitening
    if whiten_rewards:
        rewards = masked_whiten(rewards, mask, shift_mean=False)
    # 5. advantages
    advantages, returns = compute_gae(rewards, policy.values, mask, gamma, lam)  # (B, T) each
    rollout = Rollout(
        batch.input_ids, batch.attention_mask, mask, policy.logprobs, ref_logprobs, policy.values,
        rewards, masked_whiten(advantages, mask), returns,
    )  # fmt: skip
    metrics = rollout_metrics(rollout, episodes, batch.response_mask, scores.values, by_name)
    metrics |= {"reward": mean_reward, "kl_coef": kl_coef}
    metrics["entropy"] = masked_mean(policy.entropy, mask)
    if sampling.get("turns", 1) > 1:
        metrics["turns"] = sum(len(episode.responses) for episode in episodes) / len(episodes)
    return rollout, {f"ppo/{name}": float(value) for name, value in metrics.items()}


def rollout_metrics(
    rollout: Rollout,
    episodes: list[Episode],
    response_mask: torch.Tensor,
    scores: torch.Tensor,
    by_name: dict[str, torch.Tensor],
) -> dict[str, float | torch.Tensor]:
    """What is logged of a rollout. response_mask (B, T) includes responses without a score; scores
    (n,) are raw; `by_name` has the log-probabilities (B, T) under each named reference."""
    mask, has_score = rollout.response_mask, rollout.response_mask.any(1)  # (B, T), (B,)

    def kl_of(ref_logprobs: torch.Tensor, kind: str) -> torch.Tensor:  # scalar, nats a response
        return kl_estimate(rollout.logprobs, ref_logprobs, kind).sum(1)[has_score].mean()

    sampled = torch.zeros_like(rollout.logprobs)  # (B, T) what the sampler saw
    sampled[response_mask] = torch.tensor(
        [logprob for episode in episodes for logprob in episode.logprobs], device=mask.device
    )
    finite = scores[torch.isfinite(scores)].tolist()  # MPS has no float64, Python's floats are
    n_responses = sum(len(episode.responses) for episode in episodes)
    n_truncated = sum(sum(episode.truncated) for episode in episodes)
    metrics = {
        "score": scores.nanmean(),
        "score_std": pstdev(finite) if len(finite) > 1 else math.nan,
        "unscored": (~has_score).float().mean(),
        "kl": kl_of(rollout.ref_logprobs, "k3"),
        "kl_k1": kl_of(rollout.ref_logprobs, "k1"),
        "response_length": response_mask.sum(1).float().mean(),
        "eos_rate": 1 - n_truncated / n_responses,
        "sampler_gap": (sampled - rollout.logprobs).abs().max(),
        "var_explained": explained_variance(rollout.values, rollout.returns, mask),
    }
    metrics |= {f"kl/{name}": kl_of(logprobs, "k3") for name, logprobs in by_name.items()}
    return metrics


# ---------------------------------------------------------------------------------- the update


def ppo_step(
    model: HybridModel,
    rollout: Rollout,
    optimizer: torch.optim.Optimizer,
    *,
    temperature: float = 1.0,
    cliprange: float = 0.2,
    cliprange_value: float = 0.2,
    vf_coef: float = 0.1,
    **options,
) -> dict[str, float]:
    """PPO's updates on one rollout: `update_epochs` with `ppo_loss`. -> metrics named `ppo/...`.

    `options` are those of `update_epochs`: ppo_epochs, minibatches, target_kl, backend, ...
    """

    def loss_fn(old: Rollout):  # a micro-batch, as it was when it was sampled
        inputs = old.input_ids, old.attention_mask, old.response_mask
        new = model(*inputs, temperature, entropy=False)
        return ppo_loss(
            new.logprobs, old.logprobs, old.advantages, new.values, old.values, old.returns,
            old.response_mask, cliprange, cliprange_value, vf_coef,
        )  # fmt: skip

    metrics = update_epochs(model, rollout, optimizer, loss_fn, **options)
    return {f"ppo/{name}": value for name, value in metrics.items()}


def update_epochs(
    model: HybridModel,
    rollout: Rollout,
    optimizer: torch.optim.Optimizer,
    loss_fn,
    *,
    ppo_epochs: int = 2,
    minibatches: int = 2,
    target_kl: float | None = None,
    micro_batch_size: int | None = None,
    max_grad_norm: float = 1.0,
    backend: Backend | None = None,
    generator: torch.Generator | None = None,
    demonstrations: Batch | None = None,
    sft_weight: float = 0.0,
) -> dict[str, float]:
    """`ppo_epochs` passes over the rollout, each in a new order and cut into `minibatches` updates
    of equal size (to within one row). After a pass whose mean `approxkl` exceeds `target_kl` no
    other pass follows.

    `loss_fn(rows of the rollout) -> (loss, stats)`, means over their response tokens. With
    `demonstrations`, the loss of an update is (1 - sft_weight) * loss_fn + sft_weight * sft_loss
    (InstructGPT 2203.02155, eq. 2, has a sum). `generator` (CPU) orders the rows. `backend` is for
    float16 and several processes. `micro_batch_size` rows pass through the model together.

    Returns the means of the stats over the updates (maxima of those named `..._max`), the number of
    updates skipped, of passes (`epochs`), and `first_ratio_gap`: max |ratio - 1| in the first
    update, which is 0 up to rounding as long as rollouts are on-policy.
    """
    backend = backend or Backend(model)

    def weighted_loss(micro_batch: Rollout):
        loss, stats = loss_fn(micro_batch)
        return (1 - sft_weight) * loss, stats

    def weighted_sft_loss(rows: Batch):
        scores = model(rows.input_ids, rows.attention_mask, rows.response_mask, entropy=False)
        loss = sft_loss(scores.logprobs, rows.response_mask)
        return sft_weight * loss, {"sft_loss": loss.detach()}

    def update(rows: torch.Tensor) -> dict[str, float]:
        stats = accumulate(backend, rollout, rows, micro_batch_size, weighted_loss)
        if demonstrations is not None:
            every = torch.arange(len(demonstrations), device=rows.device)
            stats |= accumulate(backend, demonstrations, every, micro_batch_size, weighted_sft_loss)
        return stats | apply_gradients(backend, optimizer, max_grad_norm)

    usable = rollout.response_mask.any(1).nonzero().squeeze(1)  # (b,) rows to learn from
    if not len(usable):  # no judge answered, or every prompt gets an SFT update instead
        return {"skipped_steps": 0.0}
    history: list[dict[str, float]] = []
    passes = 0
    for _ in range(ppo_epochs):
        order = usable[torch.randperm(len(usable), generator=generator).to(usable.device)]  # (b,)
        split = torch.tensor_split(order, min(minibatches, len(usable)))  # no tiny last minibatch
        latest = [update(rows) for rows in split]
        history += latest
        passes += 1
        if target_kl is not None and sum(s["approxkl"] for s in latest) / len(latest) > target_kl:
            break
    taken = [stats for stats in history if not stats["skipped_steps"]] or history
    metrics = join_stats([(stats, 1.0) for stats in taken], divisor=len(taken))
    metrics["skipped_steps"] = sum(stats["skipped_steps"] for stats in history)
    metrics["epochs"] = float(passes)
    if "ratio_gap_max" in history[0]:
        metrics["first_ratio_gap"] = history[0]["ratio_gap_max"]
    return metrics
