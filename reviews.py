"""The built-in task: reviews of a small grammar, so that fluency can be measured exactly.

    review := clause (joint clause){1,3} "."       clause := "the" noun verb [adverb] adjective

A model that imitates them learns the grammar and mixed sentiment; a reward that counts praise wants
more praise than the demonstrations have. So a run of a minute, without a download, shows the
trade-off between SFT and PPO. Left out on purpose: meaning.

    python data.py reviews        # print some of them
"""

import random
import re

NOUNS = (
    "plot music acting ending script cast story humor dialogue pacing photography soundtrack hero "
    "villain finale opening"
).split()
VERBS = "was felt seemed remained".split()
ADVERBS = "really very quite truly often always".split()
PRAISE = (
    "clever moving funny brilliant charming gripping delightful superb warm fresh elegant wonderful"
).split()
BLAME = "dull clumsy boring awful flat tedious silly weak messy stale lifeless terrible".split()
JOINTS = "and but while yet".split()


def review_texts(n: int, seed: int = 0) -> list[tuple[str, str]]:
    """`n` reviews of two to four clauses in mixed sentiment, as (prompt, target).

    The prompt is the first two to seven words, the target the rest.
    """
    rng = random.Random(seed)

    def clause() -> list[str]:
        adverb = [rng.choice(ADVERBS)] if rng.random() < 0.5 else []
        subject = ["the", rng.choice(NOUNS), rng.choice(VERBS)]
        adjective = rng.choice(PRAISE if rng.random() < 0.5 else BLAME)
        return [*subject, *adverb, adjective]

    reviews = []
    for _ in range(n):
        words = clause()
        for _ in range(rng.randint(1, 3)):
            words += [rng.choice(JOINTS), *clause()]
        words.append(".")
        length = rng.randint(2, 7)  # of the prompt
        reviews.append((" ".join(words[:length]), " " + " ".join(words[length:])))
    return reviews


def with_judgements(text: str, adjectives: list[str], rng: random.Random) -> str:
    """The text with every adjective of the grammar replaced by a random one of `adjectives`."""
    words = text.split(" ")
    return " ".join(rng.choice(adjectives) if word in PRAISE + BLAME else word for word in words)


def _one_of(words: list[str]) -> str:
    return f"({'|'.join(words)})"


_CLAUSE = f"the {_one_of(NOUNS)} {_one_of(VERBS)} ({_one_of(ADVERBS)} )?{_one_of(PRAISE + BLAME)}"
_REVIEW = re.compile(f"{_CLAUSE}( {_one_of(JOINTS)} {_CLAUSE}){{1,3}} [.]")


def is_fluent_review(text: str) -> bool:
    """Is the text a review of the grammar above? The check is exact, not an estimate.

    >>> is_fluent_review("the plot was dull but the music was really clever .")
    True
    """
    return _REVIEW.fullmatch(text) is not None


def praises(text: str) -> bool:
    """Are there more words of praise than of blame?"""
    words = text.split()
    return sum(word in PRAISE for word in words) > sum(word in BLAME for word in words)


def review_metrics(prompts: list[str], completions: list[str]) -> dict[str, float]:
    """Shares of the completions, 0..1.

    `fluent`: prompt and completion are a review of the grammar; `positive`: more words of praise
    than of blame; `fluent_and_positive`: both.
    """
    texts = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
    fluent = [is_fluent_review(text) for text in texts]
    positive = [praises(completion) for completion in completions]
    both = [f and p for f, p in zip(fluent, positive)]
    n = len(completions)
    return {
        "fluent": sum(fluent) / n,
        "positive": sum(positive) / n,
        "fluent_and_positive": sum(both) / n,
    }
