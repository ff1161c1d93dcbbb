"""Reward functions: how they are made of a measure, called, checked.

A reward function is f(prompts, completions, **columns) -> list[float | None], one per completion,
higher is better, None for no score. An expression (expression.py) asks several of them; here is
what all have in common. Left out on purpose: any particular reward; the functions of a user's own
file (reward_files.py).

    python rewards.py "2*rouge_l - 1" examples/scored.jsonl
"""

import itertools
import math
import numbers
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch

import parallel
from engine import NonFiniteReward, UserError, first_line
from reward_files import ANYTHING

# ------------------------------------------------------------------ made of a measure


def completion_reward(measure: Callable[[str], float]) -> Callable:
    """A reward function from a measure of the completion alone."""

    def reward(prompts, completions, **columns):
        return [measure(completion) for completion in completions]

    return reward


def reference_reward(
    metric: Callable[[str, list[str]], float], name: str, tokens_of: Callable | None = None
) -> Callable:
    """A reward function from metric(hypothesis, list of references).

    `tokens_of(text)` is what the metric reads of a text: the first reference without is noted.
    """
    note = first_unread(name, tokens_of)

    def reward(prompts, completions, **columns):
        references = references_of(columns, name)
        note(itertools.chain.from_iterable(references))
        return [metric(text, texts) for text, texts in zip(completions, references, strict=True)]

    return reward


def first_unread(name: str, tokens_of: Callable | None) -> Callable:
    """A function of reference texts that notes, once, a text of which the reward reads nothing."""
    is_noted = tokens_of is None

    def note(texts: Iterable[str]) -> None:
        nonlocal is_noted
        for text in texts:
            if not is_noted and text.strip() and not tokens_of(text):
                is_noted = True
                what = f"the target {text[:40]!r}: such rows score 0"
                parallel.note(f"{name} finds nothing that it can read in {what}")

    return note


def best_reference_reward(
    metric: Callable[[str, str], float], name: str, tokens_of: Callable | None = None
) -> Callable:
    """A reward function from metric(hypothesis, reference): the best reference counts."""

    def best(hypothesis: str, references: list[str]) -> float:
        return max(metric(hypothesis, reference) for reference in references)

    return reference_reward(best, name, tokens_of)


def best_of(
    metric: Callable[[str, str], float], name: str, tokens_of: Callable | None = None
) -> Callable:
    """The `make` of a reward without arguments: metric(completion, best reference)."""
    return lambda context: best_reference_reward(metric, name, tokens_of)


def without_arguments(reward: Callable) -> Callable:
    """The `make` of a reward function that takes no arguments."""
    return lambda context: reward


def references_of(columns: dict[str, list], name: str) -> list[list[str]]:
    """The references of each completion: the field `references`, or where it is empty `target`.

    Raises UserError, naming the reward, where the data have neither.
    """
    targets, references = columns.get("target"), columns.get("references")
    if targets is None and references is None:
        raise UserError(
            f"reward '{name}' compares with a reference text, but the data has no target"
        )
    if references is None:
        return [as_list(target) for target in targets]
    if targets is None:
        targets = [""] * len(references)
    return [as_list(texts or target) for texts, target in zip(references, targets)]


def as_list(references: str | list[str]) -> list[str]:
    """One text or several -> a list. Raises UserError for anything else."""
    texts = [references] if isinstance(references, str) else references
    if not isinstance(texts, (list, tuple)) or not all(isinstance(text, str) for text in texts):
        raise UserError(
            f"a target is {references!r}; a reward compares with a text, or with a list of texts"
        )
    return list(texts)


def check_count(reward: str, name: str, value: int) -> None:
    """Raises UserError, naming the reward and the argument, unless it is a count up to 100."""
    if type(value) is not int or not 0 < value <= 100:
        raise UserError(f"{reward}({name}={value!r}): expected a whole number above 0, at most 100")


def check_above_0(reward: str, name: str, value: float) -> None:
    """Raises UserError, naming the reward and the argument, unless 0 < value < infinity."""
    if not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise UserError(f"{reward}({name}={value!r}): expected a number above 0")


# ------------------------------------------------------------------ called, checked

# Columns that hold texts as messages, each a list of {role, content}: for functions that want them.
PROMPT_MESSAGES, COMPLETION_MESSAGES = "prompt_messages", "completion_messages"


def as_messages(texts: list[str], messages: list | None, role: str) -> list[list[dict]]:
    """The messages of each text; one message of `role` where the data have none."""
    messages = messages or [None] * len(texts)
    return [
        turns or [{"role": role, "content": text}]
        for text, turns in zip(texts, messages, strict=True)
    ]


def call_leaf(
    name: str, function: Callable, prompts: list[str], completions: list[str], columns: dict
) -> torch.Tensor:
    """(B,) values of a reward function, NaN where it says None: no score for that row.

    A function with the attribute `wants_messages` gets prompts and completions as lists of
    {role, content}. Raises UserError that names the function and a completion.
    """
    columns = dict(columns)
    of_prompts = columns.pop(PROMPT_MESSAGES, None)
    of_completions = columns.pop(COMPLETION_MESSAGES, None)
    texts = completions
    if getattr(function, "wants_messages", False):
        prompts = as_messages(prompts, of_prompts, "user")
        completions = as_messages(completions, of_completions, "assistant")
    try:
        values = function(prompts, completions, **columns)
    except UserError:
        raise
    except ANYTHING as problem:
        raise _named(problem, name, texts[0]) from problem
    if hasattr(values, "tolist"):  # of numpy, torch, pandas
        values = values.tolist()
    values = checked_values(name, values, texts)
    # No score, such as that of a judge that could not be reached, is not a score of 0.
    values = [math.nan if value is None else value for value in values]
    return torch.tensor(values, dtype=torch.float32)


def _named(problem: BaseException, name: str, text: str) -> UserError:
    """What a reward function raised, in one line that names it."""
    frames = traceback.extract_tb(problem.__traceback__)
    message = (
        f"reward '{name}' raised {type(problem).__name__}: {first_line(problem)} "
        f"({Path(frames[-1].filename).name}:{frames[-1].lineno}); first completion: {text[:80]!r}"
    )
    if isinstance(problem, (TypeError, IndexError)) and "string ind" in str(problem):
        message += "; to a function that reads messages, give them: file.py:function(messages=True)"
    return UserError(message)


def checked_values(name: str, values, completions: list[str]) -> list[float | None]:
    """The values as plain numbers. Raises UserError unless they are a list of one finite number, or
    None, per completion."""
    is_list = isinstance(values, (list, tuple))
    if not is_list or len(values) != len(completions):
        returned = f"{len(values)} values" if is_list else type(values).__name__
        raise UserError(
            f"reward '{name}' must return a list of {len(completions)} floats, "
            f"one per completion; it returned {returned}"
        )
    values = [_plain(value) for value in values]
    for value, text in zip(values, completions):
        # float32 ends at 3.4e38. A comparison with NaN is false.
        is_number = isinstance(value, numbers.Real) and abs(value) < 1e38
        if value is not None and not is_number:
            raise NonFiniteReward(
                f"reward '{name}' gave {value!r}, not a finite number, "
                f"for the completion {text[:80]!r}"
            )
    return values


def _plain(value):
    """A number of numpy or torch as one of Python; anything else as it is."""
    is_array = isinstance(value, (np.generic, np.ndarray, torch.Tensor))
    return value.item() if is_array and math.prod(value.shape) == 1 else value
