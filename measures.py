"""More measures of text: chrF, coverage, relevance, style, repetition, toxicity.

Each measure is a plain function of strings; the lower half of the file makes rewards of them, the
table MEASURES for rewards.py. Words and their lists are in words.py. Left out on purpose: stemming,
parsing, word lists of any size (give `toxicity` and `sentiment` a file), right answers
(answers.py), and everything that asks a model (judges.py).

    python rewards.py "coverage - toxicity + 0.2*style()" examples/scored.jsonl
"""

import functools
import itertools
import math
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from engine import UserError
from leaves import (
    as_list,
    check_above_0,
    check_count,
    completion_reward,
    first_unread,
    reference_reward,
    references_of,
    without_arguments,
)
from words import FORMAL_WORDS, INFORMAL_WORDS, STOP_WORDS, TOXIC_WORDS, composed, words_of

# ------------------------------------------------------------------ measures of one text


def chrf(hypothesis: str, references: list[str], char_order: int = 6, beta: int = 2) -> float:
    """Character n-gram F-score (Popovic 2015), white space ignored, best over references; 0..1.

    Precision and recall are averaged over the orders that both sides have; beta 2 weighs recall
    twice. Equals sacrebleu's `sentence_chrf(...) / 100`.
    """
    squeezed = "".join(hypothesis.split())
    scores = [
        _chrf_one(squeezed, "".join(reference.split()), char_order, beta)
        for reference in as_list(references)
    ]
    return max(scores, default=0.0)


def _chrf_one(hypothesis: str, reference: str, char_order: int, beta: int) -> float:
    orders = min(char_order, len(hypothesis), len(reference))
    grams, reference_grams = _char_ngrams(hypothesis, orders), _char_ngrams(reference, orders)
    matches = [0] * orders
    for gram in grams.keys() & reference_grams.keys():
        matches[len(gram) - 1] += min(grams[gram], reference_grams[gram])
    precisions = [matched / (len(hypothesis) - n) for n, matched in enumerate(matches)]
    recalls = [matched / (len(reference) - n) for n, matched in enumerate(matches)]
    precision, recall = sum(precisions) / max(orders, 1), sum(recalls) / max(orders, 1)
    if not precision:
        return 0.0
    return (1 + beta**2) * precision * recall / (beta**2 * precision + recall)


def _char_ngrams(text: str, orders: int) -> Counter:
    counts = Counter()
    for n in range(1, orders + 1):
        counts.update([text[i : i + n] for i in range(len(text) - n + 1)])
    return counts


def content_words(text: str) -> set[str]:
    """The words without stop words."""
    return set(words_of(text)) - set(STOP_WORDS)


def coverage(text: str, keywords: str | list[str]) -> float:
    """Share of the keywords, without stop words, that the text has; 0..1, 0 when there are none."""
    wanted = content_words(keywords if isinstance(keywords, str) else " ".join(keywords))
    return len(wanted & set(words_of(text))) / len(wanted) if wanted else 0.0


def inverse_document_frequency(documents: list[str]) -> Callable[[str], float]:
    """word -> ln((1 + n) / (1 + df)) + 1 (smooth idf, as in scikit-learn).

    n is the number of documents; df is the number of those that have the word.
    """
    counts = Counter(word for document in documents for word in set(words_of(document)))

    def idf(word: str) -> float:
        return math.log((1 + len(documents)) / (1 + counts[word])) + 1

    return idf


def tfidf_cosine(a: str, b: str, idf: Callable[[str], float]) -> float:
    """Cosine of the TF-IDF vectors of two texts; 0..1, 0 when either has no word."""
    left, right = (
        {word: count * idf(word) for word, count in Counter(words_of(text)).items()}
        for text in (a, b)
    )
    dot = sum(value * right.get(word, 0.0) for word, value in left.items())
    squares = [sum(value * value for value in vector.values()) for vector in (left, right)]
    return dot / math.sqrt(squares[0] * squares[1]) if dot else 0.0


def sentence_length_fit(text: str, target: float) -> float:
    """1 - |mean words per sentence - target| / target, at least 0; 0 for a text without words."""
    lengths = [len(words_of(sentence)) for sentence in re.split(r"[.!?\n]+", text)]
    lengths = [length for length in lengths if length]
    return max(0.0, 1 - abs(sum(lengths) / len(lengths) - target) / target) if lengths else 0.0


def type_token_ratio(text: str) -> float:
    """Different words / words; 0 for a text without words."""
    words = words_of(text)
    return len(set(words)) / len(words) if words else 0.0


def formality(text: str) -> float:
    """Formal / (formal + informal) words; 0.5 when the text has neither, 0 when it has no word."""
    words = words_of(text)
    formal = sum(word in FORMAL_WORDS for word in words)
    informal = sum(word in INFORMAL_WORDS for word in words)
    if formal + informal:
        return formal / (formal + informal)
    return 0.5 if words else 0.0


def distinct_n(text: str, n: int) -> float:
    """Different word n-grams / n-grams; 1 for a text too short for one, 0 for one without words."""
    words = words_of(text)
    ngrams = list(zip(*(words[i:] for i in range(n))))
    if ngrams:
        return len(set(ngrams)) / len(ngrams)
    return 1.0 if words else 0.0


def lexicon_toxicity(text: str, lexicon: set[str] | dict = frozenset(TOXIC_WORDS)) -> float:
    """hits / (hits + 1), hits = listed words, however long the text; 0..1, MORE IS WORSE."""
    hits = sum(word in lexicon for word in words_of(text))
    return hits / (hits + 1)


# ------------------------------------------------------------------ rewards


def read_text(path: str, name: str) -> str:
    """The text of a file that the reward `name` needs. Raises UserError."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as problem:
        raise UserError(f"reward '{name}': {path} cannot be read: {problem}") from None


def read_lexicon(path: str, default: float | None = None) -> dict[str, float]:
    """Words and valences of a file, `word TAB valence ...` a line (VADER's format).

    With a `default` valence a line may hold a word alone, and lines that start with `;` are
    comments. Raises UserError that names the line.
    """
    lexicon = {}
    for number, line in enumerate(read_text(path, "lexicon").split("\n"), start=1):
        word, _, values = line.partition("\t")
        if not word.strip() or (default is not None and word.startswith(";")):
            continue
        try:
            valence = float(values.split("\t")[0]) if values or default is None else default
        except ValueError:
            message = f"expected 'word TAB valence', found {line[:40]!r}"
            raise UserError(f"{path}:{number}: {message}") from None
        lexicon[composed(word.strip()).lower()] = valence
    if not lexicon:
        raise UserError(f"lexicon {path} is empty")
    return lexicon


def toxicity_reward(context: dict, lexicon: str | None = None) -> Callable:
    words = frozenset(TOXIC_WORDS)
    if lexicon is not None:
        words = frozenset(read_lexicon(lexicon, default=-1.0))
    return completion_reward(functools.partial(lexicon_toxicity, lexicon=words))


def repetition_reward(context: dict, n: int = 2) -> Callable:
    check_count("repetition", "n", n)
    return completion_reward(functools.partial(distinct_n, n=n))


def style_reward(context: dict, aspect: str = "all", sentence_length: float = 15) -> Callable:
    check_above_0("style", "sentence_length", sentence_length)
    aspects = {
        "sentence_length": functools.partial(sentence_length_fit, target=sentence_length),
        "type_token_ratio": type_token_ratio,
        "formality": formality,
    }
    if aspect != "all" and aspect not in aspects:
        raise UserError(f"style(aspect={aspect!r}): known aspects are all, {', '.join(aspects)}")
    chosen = list(aspects.values()) if aspect == "all" else [aspects[aspect]]

    def style(text: str) -> float:
        return sum(measure(text) for measure in chosen) / len(chosen)

    return completion_reward(style)


def coverage_reward(context: dict) -> Callable:
    note = first_unread("coverage", content_words)

    def reward(prompts, completions, **columns):
        keywords = columns.get("keywords", [None] * len(completions))
        if None in keywords:  # where a record has no keywords, its references are used
            references = references_of(columns, "coverage")
            keywords = [
                " ".join(texts) if words is None else words
                for words, texts in zip(keywords, references, strict=True)
            ]
        keywords = [words if isinstance(words, str) else " ".join(words) for words in keywords]
        note(keywords)
        return [coverage(text, words) for text, words in zip(completions, keywords, strict=True)]

    return reward


def relevance_reward(context: dict, corpus: str | None = None) -> Callable:
    """Relevance to the prompt; or, with a corpus, to all of that file, one document a line."""
    if corpus is not None:
        lines = [line for line in read_text(corpus, "relevance").split("\n") if line.strip()]
        idf = inverse_document_frequency(lines)
        return completion_reward(functools.partial(tfidf_cosine, b=" ".join(lines), idf=idf))
    idf = inverse_document_frequency(context.get("documents", []))  # says which words are common

    def reward(prompts, completions, **columns):
        return [tfidf_cosine(c, p, idf) for c, p in zip(completions, prompts, strict=True)]

    return reward


def truthful_reward(
    similarities: dict, tokens_of: Callable, context: dict, metric: str = "rouge_1"
) -> Callable:
    """Similarity to the nearest right answer minus that to the nearest wrong one (TruthfulQA).

    `similarities`: name of a metric -> function of (hypothesis, reference), from rewards.py;
    `tokens_of` is what those whose names begin with "rouge" read of a text.
    """
    if metric not in similarities:
        known = ", ".join(similarities)
        raise UserError(f"truthful(metric={metric!r}): known metrics are {known}")
    similarity = similarities[metric]
    note = first_unread("truthful", tokens_of if metric.startswith("rouge") else None)

    def nearest(completion: str, answers: list[str]) -> float:
        return max((similarity(completion, answer) for answer in answers), default=0.0)

    def reward(prompts, completions, **columns):
        correct = _answers(columns, "correct_answers")
        incorrect = _answers(columns, "incorrect_answers")
        note(itertools.chain.from_iterable(correct))
        return [
            nearest(completion, right) - nearest(completion, wrong)
            for completion, right, wrong in zip(completions, correct, incorrect, strict=True)
        ]

    return reward


def _answers(columns: dict[str, list], name: str) -> list[list[str]]:
    """The answers of each record: a list of texts, or one text with `;` between the answers."""
    title = name.replace("_", " ").title()  # TruthfulQA's file says "Correct Answers"
    values = columns.get(name, columns.get(title))
    if values is None:
        raise UserError(
            "reward 'truthful' needs the fields correct_answers and incorrect_answers; "
            f"{name} is missing"
        )
    answers = []
    for value in values:
        if isinstance(value, str):
            value = [answer.strip() for answer in value.split(";")]
        answers.append(value or [])
    return answers


# name -> (make(context, **arguments) -> reward function, "range, needs: meaning")
MEASURES: dict[str, tuple[Callable, str]] = {
    "chrf": (
        without_arguments(reference_reward(chrf, "chrf")),
        "0..1, target: character n-gram F-score, equal to sacrebleu's",
    ),
    "coverage": (
        coverage_reward,
        "0..1, keywords or target: share of their content words that appear",
    ),
    "relevance": (relevance_reward, "0..1, prompt or corpus=file: TF-IDF cosine"),
    "toxicity": (toxicity_reward, "0..1, nothing or lexicon=file: toxic words, so subtract it"),
    "style": (
        style_reward,
        "0..1, nothing or aspect=: sentence length, type-token ratio, formality",
    ),
    "repetition": (
        repetition_reward,
        "0..1, nothing: share of different n-grams, 1 is no repetition",
    ),
}
