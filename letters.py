"""The second built-in task: sort a few letters. An answer is right or wrong, nothing between.

    sort k b r :  ->  b k r

A hundred prompts have a demonstration (`--demonstrations`), and a checker knows the answer to all:
SFT knows the hundred by heart after a few passes, and orders in them only some of the letters that
other prompts have. The rest can be learnt from the reward. Left out on purpose: letters that stand
twice, partial credit.

    python data.py sort           # print some of them
"""

import math
import random

LETTERS = "abcdefghijklmnopqrs"
FEWEST, MOST = 3, 5  # letters of a prompt, all different


def letter_texts(n: int, seed: int = 0) -> list[tuple[str, str]]:
    """`n` different prompts with their answers, as (prompt, target); all, where `n` is more.

    >>> letter_texts(1)
    [('sort n b i p :', ' b i n p')]
    """
    rng, answers = random.Random(seed), {}
    n_all = sum(math.perm(len(LETTERS), length) for length in range(FEWEST, MOST + 1))
    while len(answers) < min(n, n_all):
        letters = rng.sample(LETTERS, rng.randint(FEWEST, MOST))
        answers[f"sort {' '.join(letters)} :"] = " " + " ".join(sorted(letters))
    return list(answers.items())


def is_right(prompt: str, completion: str) -> bool:
    """Are these the letters of the prompt in their order? White space around them does not count.

    >>> [is_right("sort k b r :", text) for text in (" b k r", " b r k", " b k r .")]
    [True, False, False]
    """
    return completion.split() == sorted(prompt.split()[1:-1])


def letter_metrics(prompts: list[str], completions: list[str]) -> dict[str, float]:
    """`right`: the share of the completions that are the answer, 0..1."""
    right = [is_right(*both) for both in zip(prompts, completions, strict=True)]
    return {"right": sum(right) / len(right)}
