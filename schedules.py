"""When to learn from demonstrations and when from the reward: the phase of each step.

    ratio    a fixed share of the steps is RL, or a ramp (`is_ppo_step` below)
    gate     every step is a rollout; prompts whose responses all score below --threshold get an SFT
             update at once, the others an RL update (SuperRL 2506.01096; HPT 2509.04419)
    buffer   like gate, but hard prompts are collected, and an SFT step runs when they fill a batch
             (ReLIFT 2506.07527)
    mix      every step is a rollout, and every update has both losses: ratio * RL + (1 - ratio) *
             SFT (PPO-ptx 2203.02155; CHORD 2508.11408)

"RL" is whatever --algorithm names. The loop asks `phase(step)` before a step; after a rollout it
gives `after_rollout` the scores. A schedule of your own is a subclass of Ratio and a line in
SCHEDULES.

    python train.py --schedule gate --threshold 0.2 --out out-gate2
"""

import math

import torch

from data import Example, demonstration_batch
from engine import UserError


def is_ppo_step(
    step: int, ppo_ratio: float | tuple[float, float], steps: int | None = None
) -> bool:
    """Is step `step` (from 0) a PPO step? Of the first k steps, floor(k * ppo_ratio) are PPO, for
    every k: so the steps of both kinds are spread evenly.

    A pair (start, end) is a ramp over `steps` steps: the ratio moves in a line from start to end,
    and k * ppo_ratio above becomes the area under this line.

    >>> [is_ppo_step(step, 0.5) for step in range(4)]
    [False, True, False, True]
    """

    def owed(k: int) -> float:  # PPO steps due among the first k
        if isinstance(ppo_ratio, tuple):
            start, end = ppo_ratio
            return k * start + (end - start) * k * k / (2 * steps)
        return k * ppo_ratio

    return math.floor(owed(step + 1)) > math.floor(owed(step))


class Ratio:
    """SFT for `sft_warmup` steps, then RL in a share of the steps. Others are subclasses."""

    flags: tuple[str, ...] = ()  # flags that not every schedule uses, but this one does

    def __init__(
        self,
        examples: list[Example],
        *,
        ppo_ratio: float | tuple[float, float],
        steps: int,
        sft_warmup: int,
        threshold: float,
        batch_size: int,
    ):
        self.examples, self.ppo_ratio, self.steps = examples, ppo_ratio, steps
        self.sft_warmup, self.threshold, self.batch_size = sft_warmup, threshold, batch_size

    def phase(self, step: int) -> str:
        """What step `step` learns from: `sft` or `rl`."""
        index, total = step - self.sft_warmup, self.steps - self.sft_warmup  # after the warm-up
        if index >= 0 and is_ppo_step(index, self.ppo_ratio, total):
            return "rl"
        return "sft"

    def demonstrations(self) -> list[Example] | None:
        """The examples of an SFT step; None: the next ones of the data."""

    def sft_weight(self, step: int) -> float:
        """The share of SFT in the loss of an RL update."""
        return 0.0

    def prompts(self, examples: list[Example], step: int) -> list[Example]:
        """What a rollout is sampled for, where these examples were drawn."""
        return examples

    def after_rollout(self, examples: list[Example], scores: torch.Tensor) -> list[Example]:
        """The examples of a rollout and their scores (B,), NaN where there is none -> the examples
        that get an SFT update now; their rows are then left out of the RL loss."""
        return []

    def metrics(self) -> dict[str, float]:
        return {}

    def state_dict(self) -> dict:
        return {}

    def load_state_dict(self, state: dict) -> None:
        """This schedule has no state."""


class _AlwaysRollout(Ratio):
    """After the SFT warm-up every step is a rollout, whatever --ppo-ratio says."""

    def phase(self, step: int) -> str:
        return "sft" if step < self.sft_warmup else "rl"


class Gate(_AlwaysRollout):
    """Hard prompts get an SFT update at once."""

    flags = ("threshold",)
    hard_share = 0.0  # of the prompts of the last rollout

    def after_rollout(self, examples: list[Example], scores: torch.Tensor) -> list[Example]:
        hard = hard_examples(examples, scores, self.threshold)
        self.hard_share = len(hard) / len({id(example) for example in examples})
        return hard

    def metrics(self) -> dict[str, float]:
        return {"schedule/hard": self.hard_share}


class Buffer(Gate):
    """Hard prompts are collected until they fill a batch."""

    def __init__(self, examples: list[Example], **options):
        super().__init__(examples, **options)
        self.numbers = {id(example): i for i, example in enumerate(examples)}
        self.buffer: list[Example] = []

    def phase(self, step: int) -> str:
        is_full = len(self.buffer) >= self.batch_size
        return "sft" if step < self.sft_warmup or is_full else "rl"

    def demonstrations(self) -> list[Example] | None:
        if len(self.buffer) < self.batch_size:
            return None
        batch = self.buffer[: self.batch_size]
        self.buffer = self.buffer[self.batch_size :]
        return batch

    def after_rollout(self, examples: list[Example], scores: torch.Tensor) -> list[Example]:
        self.buffer += super().after_rollout(examples, scores)
        return []

    def metrics(self) -> dict[str, float]:
        return {"schedule/hard": self.hard_share, "schedule/buffer": float(len(self.buffer))}

    def state_dict(self) -> dict:
        return {"buffer": [self.numbers[id(example)] for example in self.buffer]}

    def load_state_dict(self, state: dict) -> None:
        self.buffer = [self.examples[i] for i in state["buffer"]]


class Mix(_AlwaysRollout):
    """Both losses in every update; --ppo-ratio is the weight of RL."""

    def sft_weight(self, step: int) -> float:
        if not isinstance(self.ppo_ratio, tuple):
            return 1 - self.ppo_ratio
        start, end = self.ppo_ratio
        last = max(1, self.steps - 1 - self.sft_warmup)
        return 1 - (start + (end - start) * (step - self.sft_warmup) / last)


SCHEDULES = {"ratio": Ratio, "gate": Gate, "buffer": Buffer, "mix": Mix}


def hard_examples(examples: list[Example], scores: torch.Tensor, below: float) -> list[Example]:
    """The examples (each once) that have a target and whose responses all score below `below`.

    A response without a score (NaN) counts as good, since it might be.
    """
    best: dict[int, float] = {}
    for example, score in zip(examples, scores.tolist()):
        score = math.inf if math.isnan(score) else score
        best[id(example)] = max(best.get(id(example), -math.inf), score)
    hard = {id(e): e for e in examples if e.target and best[id(e)] < below}
    return list(hard.values())


def leave_out(rollout, examples: list[Example], chosen: list[Example]) -> None:
    """Take the rows of the `chosen` examples out of the RL loss of a rollout, in place.

    The advantages were whitened before, over all rows, these included.
    """
    chosen_ids = {id(example) for example in chosen}
    kept = [id(example) not in chosen_ids for example in examples]
    rollout.response_mask &= torch.tensor(kept, device=rollout.response_mask.device)[:, None]


def mixed_in(run) -> dict:
    """The demonstrations that this RL update learns from too, as options of `update_epochs`: the
    next ones of the data, if the schedule gives SFT a weight now."""
    sft_weight = run.schedule.sft_weight(run.step)
    if sft_weight == 0:
        return {}
    batch = demonstration_batch(run.tokenizer, run.sft_stream.next(), **run.limits)
    return dict(demonstrations=batch.to(run.device), sft_weight=sft_weight)


# ---------------------------------------------------------------------------------- flags


def check_flags(args) -> None:
    """Raises UserError for flags of a schedule that contradict each other."""
    if args.hints is not None and (args.schedule != "ratio" or args.ppo_ratio == 0):
        raise UserError("--hints is for rollouts of --schedule ratio; leave one of the two out")
    if args.schedule != "ratio" and args.ppo_ratio == 0:
        raise UserError(
            f"--schedule {args.schedule} without PPO is pure SFT: say --ppo-ratio 0 alone"
        )
    warmup = args.sft_warmup
    if warmup is not None and warmup >= args.steps and args.ppo_ratio != 0:
        raise UserError(
            f"--sft-warmup {warmup} leaves no PPO step in --steps {args.steps}; "
            "for pure SFT say --ppo-ratio 0"
        )
