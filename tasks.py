"""The built-in tasks: data that need no download, with a measure that is exact.

A task is a name for --data. Left out on purpose: tasks of yours, which are files (`--data FILE`)
with a reward function.

    python data.py sort           # print some examples of one
"""

from collections.abc import Callable
from typing import NamedTuple

from letters import letter_metrics, letter_texts
from reviews import review_metrics, review_texts


class Task(NamedTuple):
    """What is built in for one name of --data."""

    said: str  # what it is called before training
    texts: Callable[[int, int], list[tuple[str, str]]]  # (n, seed) -> (prompt, target) of each
    metrics: Callable[[list[str], list[str]], dict[str, float]]  # of (prompts, completions)
    reward: str  # where --reward names none
    defaults: dict  # of flags that are not given


# By three seeds: at higher rates the reward teaches nothing, and SFT alone stays where it is.
SORT_DEFAULTS = dict(
    demonstrations=100,
    steps=600,
    batch_size=64,
    max_new_tokens=8,
    lr=1e-3,
    rl_lr=3e-4,
    kl_coef=0.02,
)
TASKS = {
    "reviews": Task("the built-in film reviews", review_texts, review_metrics, "sentiment", {}),
    "sort": Task(
        "the built-in letters to sort", letter_texts, letter_metrics, "exact_match", SORT_DEFAULTS
    ),
}


def task_of(source: str | list[str] | None) -> Task | None:
    """The built-in task that --data names, if it names one."""
    if isinstance(source, list) and len(source) == 1:
        source = source[0]
    return TASKS.get(source) if isinstance(source, str) else None
