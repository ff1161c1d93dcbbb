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
    # Where a flag is not given:
    defaults: dict = {}
    lr: float = 1.0  # the built-in model's --lr, as a share of the optimiser's default
    warmup: float = 0.3  # the built-in model's --sft-warmup, as a share of --steps


REVIEWS = Task("the built-in film reviews", review_texts, review_metrics, reward="sentiment")
SORT = Task(
    "the built-in letters to sort",
    letter_texts,
    letter_metrics,
    reward="exact_match",
    defaults=dict(
        demonstrations=100, steps=500, batch_size=64, max_new_tokens=8, kl_coef=0.02, ppo_epochs=4
    ),
    lr=0.2,  # at a higher rate the reward teaches nothing
    warmup=1 / 6,  # SFT alone is at its best then
)
TASKS = {"reviews": REVIEWS, "sort": SORT}


def task_of(source: str | list[str] | None) -> Task | None:
    """The built-in task that --data names, if it names one."""
    if isinstance(source, list) and len(source) == 1:
        source = source[0]
    return TASKS.get(source) if isinstance(source, str) else None
