"""The second built-in task: sort a few letters. An answer is right or wrong, nothing between.

    sort c f a c :  ->  a c c f

Few of its prompts have a demonstration (`--demonstrations`), and a checker knows the answer to all:
so SFT alone soon knows its demonstrations by heart, and what generalises is learnt from the reward.
A letter may stand twice: without that, SFT alone solves the task with a hundred demonstrations.
Left out on purpose: partial credit.

    python data.py sort           # print some of them
"""

import random

LETTERS = "abcdefgh"
FEWEST, MOST = 3, 5  # letters of a prompt


def letter_texts(n: int, seed: int = 0) -> list[tuple[str, str]]:
    """`n` different prompts with their answers, as (prompt, target); all 37,376 if `n` is more.

    >>> letter_texts(1)
    [('sort g d c e :', ' c d e g')]
    """
    rng, answers = random.Random(seed), {}
    n_all = sum(len(LETTERS) ** length for length in range(FEWEST, MOST + 1))
    while len(answers) < min(n, n_all):
        letters = rng.choices(LETTERS, k=rng.randint(FEWEST, MOST))
        answers[f"sort {' '.join(letters)} :"] = " " + " ".join(sorted(letters))
    return list(answers.items())


def is_right(prompt: str, completion: str) -> bool:
    """Are these the letters of the prompt in their order? White space around them does not count.

    >>> [is_right("sort c f a c :", text) for text in (" a c c f", " a c f", " a c c f .")]
    [True, False, False]
    """
    return completion.split() == sorted(prompt.split()[1:-1])


def letter_metrics(prompts: list[str], completions: list[str]) -> dict[str, float]:
    """`right`: the share of the completions that are the answer, 0..1."""
    right = [is_right(*both) for both in zip(prompts, completions, strict=True)]
    return {"right": sum(right) / len(right)}
