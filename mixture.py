"""Rewards of different scales on one scale: running statistics, and a mixture that learns weights.

A weighted sum needs weights, and good ones depend on scales that are not known beforehand.
`ema(x)` standardises a reward by running statistics; `mixture(a, b, c)` standardises several and
learns how much each counts, in one of two ways:

  fitted    from preference pairs, by Bradley-Terry: the weights that best explain which of two
            texts people preferred (`--mixture-data prefs.jsonl`); after that they are fixed;
  online    without pairs, by absolute learning progress (Oudeyer et al. 2007): a reward that
            moves, up or down, gets more weight, since there is something to learn or to repair.

Left out on purpose: weights that depend on the prompt, negative weights (write `- x` inside).

    python rewards.py "mixture(rouge_l, length(target=8))" examples/scored.jsonl
"""

import math
from collections.abc import Callable

import torch

import parallel
from chat import reply_of
from data import Pair
from engine import UserError
from leaves import COMPLETION_MESSAGES, PROMPT_MESSAGES


class RunningNorm:
    """(x - mean) / std by exponentially weighted moments of all batches, this one included.

    Moments are taken over a batch, so the order of its samples does not matter. The weights are
    divided by their sum (as in Adam), so the first batch is standardised by its own mean and std (a
    constant one becomes 0). NaN marks a sample without a score: it does not count and stays NaN.
    """

    def __init__(self, decay: float = 0.99):
        if not 0 <= decay < 1:
            raise ValueError(f"decay must be at least 0 and below 1, found {decay}")
        self.decay = decay
        self.weight = 0.0  # the sum of the weights of all batches so far
        self.mean = self.variance = 0.0  # of all samples so far, by their weights

    def __call__(self, x: torch.Tensor, learn: bool = True) -> torch.Tensor:
        """x (B,) -> (B,). `learn=False` does not update the statistics (if there are none yet, the
        batch is standardised by its own)."""
        known = x[torch.isfinite(x)].double()  # (b,)
        weight, mean, variance = self.weight, self.mean, self.variance
        if len(known) and (learn or not weight):
            weight = self.decay * weight + (1 - self.decay)
            share = (1 - self.decay) / weight  # of this batch in all
            # Two groups become one (Chan et al. 1983). Unlike E[x^2] - E[x]^2 it loses no small
            # spread beside a large mean, and it is 0, exactly, for samples that are all equal.
            step = float(known.mean()) - mean
            spread = float(known.var(unbiased=False))
            variance = (1 - share) * (variance + share * step**2) + share * spread
            mean = mean + share * step
        if learn:
            self.weight, self.mean, self.variance = weight, mean, variance
        if not weight:
            return x
        if variance > 0:
            return ((x.double() - mean) / math.sqrt(variance)).float()
        return ((x - mean) * 0).float()

    def state_dict(self) -> dict[str, float]:
        return {"weight": self.weight, "mean": self.mean, "variance": self.variance}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.weight, self.mean, self.variance = state["weight"], state["mean"], state["variance"]


class Mixture:
    """sum_i w_i z_i, z_i the standardised rewards; w = floor + (1 - K floor) softmax(logits).

    So the weights sum to 1, and no weight falls below `floor`. Online,
    `logits = progress / temperature` with progress_i = |fast_i - slow_i|: two moving averages of
    the mean of z_i, which differ as long as the reward moves.
    """

    FAST, SLOW = 0.8, 0.95  # decay per batch: a memory of about 5 and of about 20 batches

    def __init__(self, names: list[str], floor: float = 0.05, temperature: float = 0.1):
        if len(names) < 2 or not 0 <= floor < 1 / len(names) or not temperature > 0:
            raise ValueError(
                "a mixture needs at least two rewards, 0 <= floor < 1 / their number, "
                "and temperature > 0"
            )
        self.names, self.floor, self.temperature = names, floor, temperature
        self.norms = [RunningNorm() for _ in names]
        self.logits = torch.zeros(len(names), dtype=torch.float64)  # (K,)
        self.fast = self.slow = torch.zeros(len(names), dtype=torch.float64)  # (K,)
        self.fitted = False

    def weights(self) -> torch.Tensor:
        """(K,) float64, positive, sum 1."""
        return self.floor + (1 - len(self.names) * self.floor) * torch.softmax(self.logits, 0)

    def __call__(self, rewards: list[torch.Tensor], learn: bool = True) -> torch.Tensor:
        """K tensors (B,) -> (B,), by the weights as they were before this batch."""
        learn = learn and not self.fitted
        z = torch.stack([norm(x, learn) for norm, x in zip(self.norms, rewards)])  # (K, B)
        total = (self.weights()[:, None] * z.double()).sum(0).float()  # (B,)
        means = [float(x.nanmean()) for x in rewards]
        if learn and all(math.isfinite(mean) for mean in means):
            # In units of the reward's spread, so that a large scale does not look like progress.
            positions = [self._position(norm, mean) for norm, mean in zip(self.norms, means)]
            position = torch.tensor(positions, dtype=torch.float64)  # (K,)
            self.fast = self.FAST * self.fast + (1 - self.FAST) * position
            self.slow = self.SLOW * self.slow + (1 - self.SLOW) * position
            self.logits = (self.fast - self.slow).abs() / self.temperature
        return total

    @staticmethod
    def _position(norm: RunningNorm, mean: float) -> float:
        return (mean - norm.mean) / math.sqrt(norm.variance) if norm.variance > 0 else 0.0

    def fit(self, chosen: torch.Tensor, rejected: torch.Tensor) -> float:
        """Fit the weights to preferences: chosen, rejected (n, K), raw rewards of the two texts of
        n pairs. Returns the pair accuracy.

        Maximises  sum log sigmoid(s w . (z_chosen - z_rejected))  over the logits of w and a scale
        s > 0 (Bradley & Terry 1952; s says how consistent the choices are, and is not kept). The
        statistics that standardise are those of all the texts, and stay fixed.
        """
        for k, norm in enumerate(self.norms):
            norm(torch.cat([chosen[:, k], rejected[:, k]]))
        by_reward = zip(self.norms, chosen.T, rejected.T)
        difference = torch.stack([n(c, False) - n(r, False) for n, c, r in by_reward], dim=1)
        difference = difference.double()  # (n, K)
        self.logits = torch.zeros(len(self.names), dtype=torch.float64, requires_grad=True)
        log_scale = torch.zeros((), dtype=torch.float64, requires_grad=True)
        parameters = [self.logits, log_scale]
        optimizer = torch.optim.LBFGS(parameters, max_iter=200, line_search_fn="strong_wolfe")

        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            margin = log_scale.exp() * (difference @ self.weights())  # (n,)
            # If all pairs agree, log_scale would grow without bound: the penalty keeps it near 0.
            penalty = 1e-5 * (self.logits**2).sum() + 1e-2 * log_scale**2
            loss = -torch.nn.functional.logsigmoid(margin).mean() + penalty
            loss.backward()
            return loss

        optimizer.step(closure)
        self.logits, self.fitted = self.logits.detach(), True
        return float(((difference @ self.weights()) > 0).double().mean())

    def state_dict(self) -> dict:
        names = ("logits", "fast", "slow")
        state = {name: getattr(self, name).tolist() for name in names}
        return state | {"fitted": self.fitted, "norms": [norm.state_dict() for norm in self.norms]}

    def load_state_dict(self, state: dict) -> None:
        for name in ("logits", "fast", "slow"):
            setattr(self, name, torch.tensor(state[name], dtype=torch.float64))
        self.fitted = state["fitted"]
        for norm, norm_state in zip(self.norms, state["norms"], strict=True):
            norm.load_state_dict(norm_state)


def fit_to_pairs(mixture: Mixture, pairs: list[Pair], scores: Callable) -> None:
    """Fit a mixture to preference pairs and print the pair accuracy.

    `scores(prompts, completions, columns) -> (N, K)` gives the raw rewards. One call scores all
    texts, so that `whiten`, which standardises a batch, treats them all alike. A pair counts if all
    K rewards of both texts are finite. Raises UserError if there is no such pair.
    """
    prompts = [pair.prompt for pair in pairs]
    completions = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
    names = dict.fromkeys(name for pair in pairs for name in pair.columns)
    columns = {name: [pair.columns.get(name) for pair in pairs] * 2 for name in names}
    columns[PROMPT_MESSAGES] = [pair.messages for pair in pairs] * 2
    sides = zip(*[pair.sides() for pair in pairs])  # all chosen, all rejected
    columns[COMPLETION_MESSAGES] = [[reply_of(example)] for side in sides for example in side]
    chosen, rejected = scores(prompts * 2, completions, columns).chunk(2)  # (n, K) each
    answered = torch.isfinite(chosen).all(1) & torch.isfinite(rejected).all(1)  # (n,)
    if not answered.any():
        rewards = ", ".join(mixture.names)
        raise UserError(f"--mixture-data: no preference pair has a score from each of {rewards}")
    accuracy = mixture.fit(chosen[answered], rejected[answered])
    if parallel.rank() == 0:
        print(
            f"the mixture agrees with {accuracy:.0%} of the {len(chosen)} preference pairs "
            "that it was fitted to"
        )
