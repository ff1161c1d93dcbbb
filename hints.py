"""Hints: where the answers to a prompt were bad, the first words of its target are given.

    prompt          Ann has 7 apples and buys 5 more. How many has she?
    with a hint     Ann has 7 apples and buys 5 more. How many has she? 7 + 5 =

The model goes on from there, and only what it writes itself is scored and learnt from. A reward
that says only right or wrong teaches nothing where every answer is wrong; from a part of the right
answer some are right (POPE 2601.18779, PrefixRL 2601.18795). The share of the target that is given
falls to 0 over two thirds of the run, and evaluations give no hint. Left out on purpose: hints in
the middle of an answer, dialogues of several turns, hints for a chat template, which would write
the end of the turn.

    python train.py --hints 0.8 --threshold 0.5 --out out-hints
"""

import re
from dataclasses import replace

import torch

from chat import dialogue_of
from data import Example
from engine import UserError
from schedules import Ratio, hard_examples

LAST = 2 / 3  # of the steps after the SFT warm-up: from then on there are no hints


class Hints(Ratio):
    """The phases of `ratio`; the prompts of a rollout get hints where they were hard last time."""

    def __init__(self, examples: list[Example], *, hints: float, **options):
        super().__init__(examples, **options)
        self.hints = hints
        self.numbers = {id(example): i for i, example in enumerate(examples)}
        self.hard: set[int] = set()  # numbers of the prompts that were hard when last drawn
        self.asked: dict[int, int] = {}  # of this rollout: id of what is asked -> its number
        self.hinted = 0.0  # the share of the last prompts that got a hint

    def prompts(self, examples: list[Example], step: int) -> list[Example]:
        index, total = step - self.sft_warmup, self.steps - self.sft_warmup
        share = self.hints * max(0.0, 1 - index / (LAST * total))
        numbers = [self.numbers[id(example)] for example in examples]
        asked = []
        for example, number in zip(examples, numbers):
            asked.append(with_hint(example, share) if number in self.hard else example)
        self.asked = {id(example): number for example, number in zip(asked, numbers)}
        self.hinted = sum(a is not b for a, b in zip(asked, examples)) / len(examples)
        return asked

    def after_rollout(self, examples: list[Example], scores: torch.Tensor) -> list[Example]:
        hard = hard_examples(examples, scores, self.threshold)
        self.hard -= set(self.asked.values())
        self.hard |= {self.asked[id(example)] for example in hard}
        return []

    def metrics(self) -> dict[str, float]:
        return {"schedule/hinted": self.hinted}

    def state_dict(self) -> dict:
        return {"hard": sorted(self.hard)}

    def load_state_dict(self, state: dict) -> None:
        self.hard = set(state["hard"])


def with_hint(example: Example, share: float) -> Example:
    """The example with this share of its target, in whole words, moved to the end of the prompt.

    One word at least is left to say. The reward, too, compares with what is left.

    >>> hinted = with_hint(Example("7 and 5?", " 7 + 5 = 12"), 0.7)
    >>> hinted.prompt, hinted.target
    ('7 and 5? 7 + 5', ' = 12')
    """
    words = re.findall(r"\s*\S+", example.target)
    n = min(int(share * len(words)), len(words) - 1)
    if n < 1:
        return example
    hint = "".join(words[:n])
    prompt, target = example.prompt + hint, example.target[len(hint) :]
    named = dict(example.named)
    for name, value in named.items():
        if value == example.prompt:
            named[name] = prompt
        elif value == example.target:
            named[name] = target
    return replace(example, prompt=prompt, target=target, named=named)


def check_prompts(tokenizer, prompts: list[Example]) -> int:
    """-> how many prompts have a hint to give. Raises UserError where none has one, or where a chat
    template writes the prompt."""
    if any(dialogue_of(tokenizer, example) is not None for example in prompts):
        raise UserError(
            "--hints adds words to the end of a prompt, and the chat template of this model ends "
            "it; leave out --hints, or give a model without a template"
        )
    n = sum(with_hint(example, 1.0) is not example for example in prompts)
    if n == 0:
        raise UserError("--hints gives the first words of a target, and no target has two words")
    return n
