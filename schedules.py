"""When to demonstrate and when to let the policy try: what each cycle of the loop does, also by what the last rollouts were like.

    ratio     by a fixed share of the cycles, or a ramp (`is_ppo_step` below)
    gate      every cycle is a rollout; prompts whose responses all score below --threshold are demonstrated, the others are learnt from by
              reinforcement (SuperRL 2506.01096; HPT 2509.04419)
    buffer    like gate, but hard prompts are collected, and an SFT cycle runs whenever they fill a batch (ReLIFT 2506.07527)
    mix       every cycle is a rollout, and every update has both losses: ratio * RL + (1 - ratio) * SFT (PPO-ptx 2203.02155; CHORD 2508.11408)

`phase(step)` is asked before a cycle, `look(examples, scores)` hears how a rollout went and returns the examples to demonstrate in the same cycle, after the
RL update, which must stay on-policy. A schedule of your own is a subclass of Ratio and a line in SCHEDULES.

    python train.py --schedule gate --threshold 0.2
"""

import math

import torch

from data import Example


def is_ppo_step(
    step: int, ppo_ratio: float | tuple[float, float], steps: int | None = None
) -> bool:
    """Is cycle `step` (from 0) a PPO cycle? Error diffusion: of the first k cycles, floor(k * ppo_ratio) are PPO, for every k.

    A pair (start, end) is a ramp over `steps` cycles, the curriculum: the k * ratio above becomes the area under the ramp.

    >>> [is_ppo_step(step, 0.5) for step in range(4)]
    [False, True, False, True]
    """

    def owed(k: int) -> float:  # PPO cycles due among the first k
        if isinstance(ppo_ratio, tuple):
            start, end = ppo_ratio
            return k * start + (end - start) * k * k / (2 * steps)
        return k * ppo_ratio

    return math.floor(owed(step + 1)) > math.floor(owed(step))


class Ratio:
    """SFT for `sft_warmup` cycles, then RL in a share of them. The others differ from it in a method or two."""

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
        self.examples, self.ppo_ratio, self.steps, self.sft_warmup = (
            examples,
            ppo_ratio,
            steps,
            sft_warmup,
        )
        self.threshold, self.batch_size = threshold, batch_size

    def phase(self, step: int) -> str:
        """Whose turn it is: `sft` or `rl`."""
        since = step - self.sft_warmup
        return (
            "rl"
            if since >= 0 and is_ppo_step(since, self.ppo_ratio, self.steps - self.sft_warmup)
            else "sft"
        )

    def demonstrations(self) -> list[Example] | None:
        """What an SFT cycle is to learn from; None: whatever comes next."""

    def sft_weight(self, step: int) -> float:
        """The share of SFT in the loss of an RL update."""
        return 0.0

    def look(self, examples: list[Example], scores: torch.Tensor) -> list[Example]:
        """A rollout's examples and their scores (B,), NaN where there is none -> examples to demonstrate now, instead of learning from their rollouts."""
        return []

    def hard(self, examples: list[Example], scores: torch.Tensor) -> list[Example]:
        """The examples (each once) whose responses all score below the threshold, and that have a target to be shown."""
        best: dict[int, float] = {}
        for example, score in zip(examples, scores.tolist()):
            best[id(example)] = max(
                best.get(id(example), -math.inf), math.inf if math.isnan(score) else score
            )
        chosen = {
            id(example): example
            for example in examples
            if example.target and best[id(example)] < self.threshold
        }
        return list(chosen.values())

    def metrics(self) -> dict[str, float]:
        return {}

    def state_dict(self) -> dict:
        return {}

    def load_state_dict(self, state: dict) -> None:
        """Nothing to remember."""


class _AlwaysRollout(Ratio):
    """After the warm-up every cycle is a rollout, whatever --ppo-ratio says."""

    def phase(self, step: int) -> str:
        return "sft" if step < self.sft_warmup else "rl"


class Gate(_AlwaysRollout):
    """Hard prompts are demonstrated at once."""

    hard_share = 0.0  # of the prompts of the last rollout

    def look(self, examples: list[Example], scores: torch.Tensor) -> list[Example]:
        hard = self.hard(examples, scores)
        self.hard_share = len(hard) / len({id(example) for example in examples})
        return hard

    def metrics(self) -> dict[str, float]:
        return {"schedule/hard": self.hard_share}


class Buffer(Gate):
    """Hard prompts wait until they fill a batch."""

    def __init__(self, examples: list[Example], **options):
        super().__init__(examples, **options)
        self.buffer: list[Example] = []

    def phase(self, step: int) -> str:
        return "sft" if step < self.sft_warmup or len(self.buffer) >= self.batch_size else "rl"

    def demonstrations(self) -> list[Example] | None:
        if len(self.buffer) < self.batch_size:
            return None
        batch, self.buffer = self.buffer[: self.batch_size], self.buffer[self.batch_size :]
        return batch

    def look(self, examples: list[Example], scores: torch.Tensor) -> list[Example]:
        self.buffer += super().look(examples, scores)
        return []

    def metrics(self) -> dict[str, float]:
        return {"schedule/hard": self.hard_share, "schedule/buffer": float(len(self.buffer))}

    def state_dict(self) -> dict:
        numbers = {id(example): i for i, example in enumerate(self.examples)}
        return {"buffer": [numbers[id(example)] for example in self.buffer]}

    def load_state_dict(self, state: dict) -> None:
        self.buffer = [self.examples[i] for i in state["buffer"]]


class Mix(_AlwaysRollout):
    """Both losses in every update; --ppo-ratio is the weight of RL."""

    def sft_weight(self, step: int) -> float:
        if not isinstance(self.ppo_ratio, tuple):
            return 1 - self.ppo_ratio
        start, end = self.ppo_ratio
        return 1 - (
            start
            + (end - start) * (step - self.sft_warmup) / max(1, self.steps - 1 - self.sft_warmup)
        )


SCHEDULES = {"ratio": Ratio, "gate": Gate, "buffer": Buffer, "mix": Mix}
