"""Reward functions: how they are made of a measure, loaded from a file of yours, called, checked.

A reward function is f(prompts, completions, **columns) -> list[float], one float per completion,
higher is better. An expression (expression.py) asks several of them; here is what all have in
common. Left out on purpose: any particular reward.

    python rewards.py "examples/my_rewards.py:politeness" examples/scored.jsonl
"""

import importlib.util
import inspect
import math
import numbers
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from engine import NonFiniteReward, UserError

# ------------------------------------------------------------------ made of a measure


def completion_reward(measure: Callable[[str], float]) -> Callable:
    """A reward function from a measure of the completion alone."""

    def reward(prompts, completions, **columns):
        return [measure(completion) for completion in completions]

    return reward


def reference_reward(metric: Callable[[str, list[str]], float], name: str) -> Callable:
    """A reward function from metric(hypothesis, list of references)."""

    def reward(prompts, completions, **columns):
        references = references_of(columns, name)
        return [metric(text, texts) for text, texts in zip(completions, references, strict=True)]

    return reward


def best_reference_reward(metric: Callable[[str, str], float], name: str) -> Callable:
    """A reward function from metric(hypothesis, reference): the best reference counts."""

    def best(hypothesis: str, references: list[str]) -> float:
        return max(metric(hypothesis, reference) for reference in references)

    return reference_reward(best, name)


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
    """One text or several -> a list."""
    return [references] if isinstance(references, str) else list(references)


def check_above_0(reward: str, name: str, value: float) -> None:
    """Raises UserError, naming the reward and the argument, unless 0 < value < infinity."""
    if not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise UserError(f"{reward}({name}={value!r}): expected a number above 0")


# ------------------------------------------------------------------ loaded, called, checked


def load_function(file: str, name: str) -> Callable:
    """The callable `name` of a Python file; an instance, where it is a class."""
    path, source = Path(file).expanduser(), f"--reward {file}:{name}"
    if not path.is_file():
        raise UserError(f"{source}: there is no file {file} (write spaces around a minus sign)")
    spec = importlib.util.spec_from_file_location(f"reward_file_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up there
    try:
        spec.loader.exec_module(module)
    except Exception as problem:  # the user's own file may raise anything while it is imported
        message = f"importing the file raised {type(problem).__name__}: {problem}"
        raise UserError(f"{source}: {message}") from problem
    function = getattr(module, name, None)
    if not callable(function):
        raise UserError(
            f"{source}: the file has no function of that name; "
            f"expected def {name}(prompts, completions, **columns) -> list[float]"
        )
    try:
        return function() if isinstance(function, type) else function
    except Exception as problem:  # the user's constructor may raise anything
        message = f"{name}() raised {type(problem).__name__}: {problem}"
        raise UserError(f"{source}: {message}") from problem


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
        parameters = inspect.signature(function).parameters
        if all(p.kind is not inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
            columns = {key: values for key, values in columns.items() if key in parameters}
        values = function(prompts=prompts, completions=completions, **columns)
    except UserError:
        raise
    except Exception as problem:  # the user's own code may raise anything; it is named, not hidden
        frame = traceback.extract_tb(problem.__traceback__)[-1]
        raise UserError(
            f"reward '{name}' raised {type(problem).__name__}: {problem} "
            f"({Path(frame.filename).name}:{frame.lineno}); "
            f"first completion: {texts[0][:80]!r}"
        ) from problem
    if isinstance(values, (torch.Tensor, np.ndarray)):
        values = values.tolist()
    check_values(name, values, texts)
    # No score, such as that of a judge that could not be reached, is not a score of 0.
    values = [math.nan if value is None else value for value in values]
    return torch.tensor(values, dtype=torch.float32)


def check_values(name: str, values, completions: list[str]) -> None:
    """Raises UserError unless `values` is a list of one finite number, or None, per completion."""
    is_list = isinstance(values, (list, tuple))
    if not is_list or len(values) != len(completions):
        returned = f"{len(values)} values" if is_list else type(values).__name__
        raise UserError(
            f"reward '{name}' must return a list of {len(completions)} floats, "
            f"one per completion; it returned {returned}"
        )
    for value, text in zip(values, completions):
        # float32 ends at 3.4e38. A comparison with NaN is false.
        is_number = isinstance(value, numbers.Real) and abs(value) < 1e38
        if value is not None and not is_number:
            raise NonFiniteReward(
                f"reward '{name}' gave {value!r}, not a finite number, "
                f"for the completion {text[:80]!r}"
            )
