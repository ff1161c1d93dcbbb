"""The second built-in task: sort a few letters. An answer is right or wrong, nothing between.

    sort c f a :  ->  a c f

Few of its prompts have a demonstration (`--demonstrations`), and a checker knows the answer to all:
so SFT alone soon knows its demonstrations by heart, and what generalises is learnt from the reward.
Left out on purpose: letters that stand twice, partial credit.

    python data.py sort           # print some of them
"""

import random

LETTERS = "abcdefgh"
FEWEST, MOST = 3, 5  # letters of a prompt


def letter_texts(n: int, seed: int = 0) -> list[tuple[str, str]]:
    """`n` different prompts with their answers, as (prompt, target); at most 8,736, which is all.

    >>> letter_texts(1)
    [('sort g a e h :', ' a e g h')]
    """
    rng, prompts = random.Random(seed), {}
    n_all = sum(_arrangements(length) for length in range(FEWEST, MOST + 1))
    while len(prompts) < min(n, n_all):
        letters = rng.choices(LETTERS, k=rng.randint(FEWEST, MOST))
        prompts["sort " + " ".join(letters) + " :"] = " " + " ".join(sorted(letters))
    return list(prompts.items())


def _arrangements(length: int) -> int:
    """How many prompts of so many letters there are."""
    n = 1
    for i in range(length):
        n *= len(LETTERS) - i
    return n


def is_right(prompt: str, completion: str) -> bool:
    """Are these the letters of the prompt in their order? White space around them does not count.

    >>> is_right("sort c f a :", " a c f"), is_right("sort c f a :", " a c")
    (True, False)
    """
    return completion.split() == sorted(prompt.split()[1:-1])


def letter_metrics(prompts: list[str], completions: list[str]) -> dict[str, float]:
    """`right`: the share of the completions that are the answer, 0..1."""
    right = [is_right(*both) for both in zip(prompts, completions, strict=True)]
    return {"right": sum(right) / len(right)}
