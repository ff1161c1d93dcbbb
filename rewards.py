"""Rewards: text in, one float per completion out, higher is better.

A reward is any callable  f(prompts, completions, **columns) -> list[float]; every column of the data arrives as a keyword
list, the reference text as `target` (the convention of TRL's GRPO reward functions, so those written for plain text run unchanged).
`--reward` takes an expression over the names in `REWARDS` below, read with `ast` and never evaluated as Python:

    rouge_l                                 0.7*rouge_l + 0.3*bleu - 0.1*length(target=40)
    sentiment(lexicon="vader.txt")          my_rewards.py:politeness

    clip(ema(sentiment), -3, 3) + 0.2*length(target=40)      mixture(bleu, rouge_l, sentiment)

The metrics are written out by hand and equal the reference implementations (sacrebleu; Google's rouge_score without stemming)
to 1e-9. Rewards that ask a second model live in judges.py. Left out on purpose: stemming, and anything that looks at token ids.

    python rewards.py --list                                       # every name, its range and what it needs
    python rewards.py "0.7*rouge_l + 0.3*bleu" scored.jsonl        # try it on records with prompt, completion, target
"""

import ast
import functools
import importlib.util
import inspect
import json
import math
import numbers
import operator
import random
import re
import sys
import traceback
from collections import Counter
from contextlib import contextmanager
from decimal import Decimal
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np
import torch

import parallel
from data import Example, encode_prompt, encode_target, read_records
from engine import NonFiniteReward, Parser, UserError, one_line_errors
from judges import JUDGES, frozen_lm
from lm import context_of
from mixture import Mixture, RunningNorm
from self_play import SelfPlay

# ------------------------------------------------------------------------------------------------ BLEU

_SPLIT_13A = [
    (re.compile(r"([{-~\[-`!-&(-+:-@/])"), r" \1 "),  # ASCII punctuation but , - . and '
    (re.compile(r"([^0-9])([.,])"), r"\1 \2 "),  # . and , unless a digit stands before ...
    (re.compile(r"([.,])([^0-9])"), r" \1 \2"),  # ... or after
    (re.compile(r"([0-9])(-)"), r"\1 \2 "),  # a dash after a digit
]


def tokenize_13a(text: str) -> list[str]:
    """The `mteval-v13a` tokeniser, sacrebleu's default: split punctuation off, but not inside numbers."""
    text = text.rstrip().replace("<skipped>", "").replace("-\n", "").replace("\n", " ")
    if "&" in text:
        for entity, char in (("&quot;", '"'), ("&amp;", "&"), ("&lt;", "<"), ("&gt;", ">")):
            text = text.replace(entity, char)
    text = f" {text} "
    for pattern, replacement in _SPLIT_13A:
        text = pattern.sub(replacement, text)
    return text.split()


def _ngrams(tokens: list[str], max_order: int) -> Counter:
    counts = Counter()
    for n in range(1, max_order + 1):
        counts.update(zip(*(tokens[i:] for i in range(n))))
    return counts


def _bleu_counts(
    hypothesis: str, references: list[str], max_order: int
) -> tuple[list[int], list[int], int, int]:
    """(matches per order, n-grams per order, hypothesis length, length of the closest reference) of one sentence."""
    tokens, reference_tokens = (
        tokenize_13a(hypothesis),
        [tokenize_13a(reference) for reference in references],
    )
    counts = [_ngrams(reference, max_order) for reference in reference_tokens]
    most = (
        counts[0] if len(counts) == 1 else functools.reduce(operator.or_, counts)
    )  # an n-gram counts no oftener than in one reference
    matches = [0] * max_order
    for ngram, count in _ngrams(tokens, max_order).items():
        if ngram in most:
            matches[len(ngram) - 1] += min(count, most[ngram])
    totals = [max(len(tokens) - n, 0) for n in range(max_order)]
    closest = min(
        (len(reference) for reference in reference_tokens), key=lambda n: (abs(n - len(tokens)), n)
    )  # ties: the shorter
    return matches, totals, len(tokens), closest


def _bleu_score(
    matches: list[int], totals: list[int], length: int, reference_length: int, effective_order: bool
) -> float:
    """Papineni et al. 2002, section 2.3: brevity penalty times the geometric mean of the n-gram precisions.

    An order without a match gets 1 / (2^k n-grams) instead of 0, k counting such orders ("exp" smoothing of mteval-v13a).
    `effective_order` leaves out the orders that the hypothesis is too short to have.
    """
    if not any(matches):
        return 0.0
    log_precisions, halvings = [], 0
    for match, total in zip(matches, totals):
        if total == 0:
            break
        if match == 0:
            halvings += 1
        log_precisions.append(math.log(match / total if match else 1 / (2**halvings * total)))
    if len(log_precisions) < len(matches) and not effective_order:
        return 0.0
    brevity_penalty = min(1.0, math.exp(1 - reference_length / length))
    return brevity_penalty * math.exp(sum(log_precisions) / len(log_precisions))


def bleu(hypothesis: str, references: list[str], max_order: int = 4) -> float:
    """Sentence BLEU in 0..1; equals sacrebleu's `sentence_bleu(...) / 100` (13a tokens, exp smoothing, effective order).

    >>> round(bleu("the cat sat on the mat", ["the cat sat on a mat"]), 4)
    0.5373
    """
    return _bleu_score(
        *_bleu_counts(hypothesis, _as_list(references), max_order), effective_order=True
    )


def corpus_bleu(hypotheses: list[str], references: list[list[str]], max_order: int = 4) -> float:
    """Corpus BLEU in 0..1: counts are summed before dividing, so it is no mean of sentence scores.

    `references` holds one list of strings per hypothesis. Equals sacrebleu's `corpus_bleu(...) / 100` with its defaults.
    """
    counts = [
        _bleu_counts(hyp, _as_list(refs), max_order)
        for hyp, refs in zip(hypotheses, references, strict=True)
    ]
    matches, totals = ([sum(column) for column in zip(*(c[k] for c in counts))] for k in (0, 1))
    return _bleu_score(
        matches, totals, sum(c[2] for c in counts), sum(c[3] for c in counts), effective_order=False
    )


def _as_list(references: str | list[str]) -> list[str]:
    return [references] if isinstance(references, str) else list(references)


# ------------------------------------------------------------------------------------------------ ROUGE


class Rouge(NamedTuple):
    """Each 0..1. f1 is the harmonic mean of precision (over the hypothesis) and recall (over the reference)."""

    precision: float
    recall: float
    f1: float


def tokenize_rouge(text: str) -> list[str]:
    """Lower-case runs of a-z and 0-9, as rouge_score does without a stemmer: everything else, accents too, separates."""
    return re.findall(r"[a-z0-9]+", text.lower())


def _score(matches: int, hypothesis_size: int, reference_size: int) -> Rouge:
    precision, recall = matches / max(hypothesis_size, 1), matches / max(reference_size, 1)
    return Rouge(
        precision, recall, 2 * precision * recall / (precision + recall) if matches else 0.0
    )


def rouge_n(hypothesis: str, reference: str, n: int) -> Rouge:
    """Overlap of n-grams (Lin 2004, section 2, which defines the recall); each n-gram counts at most as often as the other side has it.

    >>> rouge_n("testing one", "testing one two", 2)
    Rouge(precision=1.0, recall=0.5, f1=0.6666666666666666)
    """
    ours, theirs = (
        [*zip(*(tokens[i:] for i in range(n)))]
        for tokens in (tokenize_rouge(hypothesis), tokenize_rouge(reference))
    )
    return _score((Counter(ours) & Counter(theirs)).total(), len(ours), len(theirs))


def rouge_l(hypothesis: str, reference: str) -> Rouge:
    """Longest common subsequence of the two token lists (Lin 2004, section 3.1)."""
    ours, theirs = tokenize_rouge(hypothesis), tokenize_rouge(reference)
    return _score(_lcs_length(ours, theirs), len(ours), len(theirs))


def rouge_lsum(hypothesis: str, reference: str) -> Rouge:
    """Summary-level ROUGE-L (Lin 2004, section 3.2): sentences are lines; a reference sentence is covered by the UNION of its
    common subsequences with all hypothesis sentences, and no token is counted more often than either side has it."""
    ours, theirs = (
        [tokenize_rouge(line) for line in text.split("\n") if line]
        for text in (hypothesis, reference)
    )
    left, right = (Counter(token for line in lines for token in line) for lines in (ours, theirs))
    sizes = left.total(), right.total()
    hits = 0
    for line in theirs:
        covered = set().union(*(_lcs_positions(line, other) for other in ours))
        for token in (line[i] for i in sorted(covered)):
            if left[token] > 0 and right[token] > 0:
                hits += 1
                left[token] -= 1
                right[token] -= 1
    return _score(hits, *sizes)


def _lcs_rows(a: list[str], b: list[str]) -> list[int]:
    """The table of longest common subsequences, one big integer per prefix of b (Crochemore et al. 2001; Hyyro 2004).

    Bit i of rows[j] is 0 where the table grows by one at a[i]: the length for a[:i] and b[:j] is the number of zeros below bit i. An
    addition carries the growth along a whole row, which makes this ten times faster than filling the table cell by cell.
    """
    where: dict[str, int] = {}
    for i, token in enumerate(a):
        where[token] = where.get(token, 0) | 1 << i
    full = (1 << len(a)) - 1
    rows = [full]
    for token in b:
        match = rows[-1] & where.get(token, 0)
        rows.append((rows[-1] + match | rows[-1] - match) & full)
    return rows


def _lcs_length(a: list[str], b: list[str]) -> int:
    return len(a) - _lcs_rows(a, b)[-1].bit_count()


def _lcs_positions(a: list[str], b: list[str]) -> set[int]:
    """Positions in a of one longest common subsequence: the one that walking back from the end finds, as ROUGE-1.5.5 does."""
    rows = _lcs_rows(a, b)

    def length(i: int, j: int) -> int:  # of a[:i] and b[:j]
        return i - (rows[j] & (1 << i) - 1).bit_count()

    positions, i, j = set(), len(a), len(b)
    while i and j:
        if a[i - 1] == b[j - 1]:
            positions.add(i - 1)
            i, j = i - 1, j - 1
        elif length(i, j - 1) > length(i - 1, j):
            j -= 1
        else:
            i -= 1
    return positions


# ------------------------------------------------------------------------------------------------ perplexity, cosine, words


@torch.no_grad()
def perplexity(
    model, tokenizer, texts: list[str], contexts: list[str] | None = None, batch_size: int = 16
) -> list[float]:
    """exp(mean negative log-likelihood per token) of each text, given its context if there are contexts.

    `model` is a Hugging Face causal LM, used as it stands. Context and text are tokenised apart; without a context the text
    follows BOS (EOS where there is none); what is beyond the model's context is cut, contexts on the left. A text without tokens has no perplexity: it gets infinity, never a good score.
    """
    device = next(model.parameters()).device
    limit = context_of(model)
    rows = []
    for text, context in zip(texts, contexts or [""] * len(texts), strict=True):
        ids = encode_target(tokenizer, text)[:-1][: limit - 1]  # without EOS
        context_ids = encode_prompt(
            tokenizer, Example(context, "")
        )  # BOS, or EOS where there is none, for an empty context
        rows.append((context_ids[-(limit - len(ids)) :], ids))
    result = []
    for begin in range(0, len(rows), batch_size):
        part = rows[begin : begin + batch_size]
        width = max(len(context) + len(ids) for context, ids in part)
        input_ids = torch.tensor(
            [c + t + [0] * (width - len(c) - len(t)) for c, t in part], device=device
        )  # (b, T)
        column = torch.arange(width)[None]  # (1, T)
        n_context, n_all = torch.tensor([[len(c), len(c) + len(t)] for c, t in part]).T[
            :, :, None
        ]  # (b, 1) each
        attention_mask = (column < n_all).to(device)  # (b, T)
        scored = ((column >= n_context) & (column < n_all)).to(device)[
            :, 1:
        ]  # (b, T-1) text tokens, by their own column
        logits = (
            model(input_ids=input_ids, attention_mask=attention_mask.long()).logits[:, :-1].float()
        )  # (b, T-1, V)
        logprobs = (
            torch.log_softmax(logits, dim=-1).gather(2, input_ids[:, 1:, None]).squeeze(2)
        )  # (b, T-1)
        for row, mask in zip(logprobs, scored):
            result.append(
                math.exp(min(-float(row[mask].mean()), 700.0)) if mask.any() else math.inf
            )
    return result


def cosine(a: str, b: str) -> float:
    """Cosine of the term-frequency vectors of two texts (lower-cased words, order ignored), 0..1; 0 when either has no word.

    >>> round(cosine("good good plot", "good plot plot"), 4)
    0.8
    """
    left, right = (Counter(re.findall(r"\w+", text.lower())) for text in (a, b))
    dot = sum(count * right[word] for word, count in left.items())
    norm = math.sqrt(sum(c * c for c in left.values()) * sum(c * c for c in right.values()))
    return dot / norm if dot else 0.0


POSITIVE_WORDS = """amazing awesome beautiful beloved best bright brilliant captivating charming clever compelling delightful elegant
engaging enjoy enjoyed enjoyable excellent exciting fantastic fresh friend fun funny gentle glad good gorgeous great gripping happy
heartfelt hilarious hope impressive inspired joy kind laughed lively love loved lovely magic masterful memorable moving nice original
perfect pleasant powerful pretty proud remarkable rich safe satisfying smart smile smiled special stunning superb sweet tender thrilling
touching warm witty wonderful""".split()
NEGATIVE_WORDS = """afraid angry annoying awful bad bland bleak boring broken clumsy confusing cried cruel dead dreadful dreary dull
empty fail failed fake flat forgettable hate hated hollow horrible hurt lame lazy lifeless lost mean mediocre mess messy miserable
painful pathetic pointless poor predictable sad scared scary shallow silly sloppy slow sorry stale stupid terrible tedious tired tiresome
tragic ugly unfunny upset weak worse worst wrong""".split()
DEFAULT_LEXICON = {word: 2.0 for word in POSITIVE_WORDS} | {word: -2.0 for word in NEGATIVE_WORDS}


def read_lexicon(path: str, default: float | None = None) -> dict[str, float]:
    """Words and valences from a file: `word TAB valence ...` a line (VADER's format). Raises UserError naming the line.

    With a `default` valence, lines may hold a word alone; lines that start with `;` are then comments.
    """
    lexicon = {}
    for number, line in enumerate(_read_text(path, "lexicon").split("\n"), start=1):
        word, _, rest = line.partition("\t")
        if not word.strip() or (default is not None and word.startswith(";")):
            continue
        try:
            lexicon[word.strip().lower()] = (
                float(rest.split("\t")[0]) if rest or default is None else default
            )
        except ValueError:
            raise UserError(
                f"{path}:{number}: expected 'word TAB valence', found {line[:40]!r}"
            ) from None
    if not lexicon:
        raise UserError(f"lexicon {path} is empty")
    return lexicon


def lexicon_sentiment(text: str, lexicon: dict[str, float] = DEFAULT_LEXICON) -> float:
    """s / sqrt(s^2 + 15), s the summed valence of the words (the normalisation of the vaderSentiment package); -1..1.

    No grammar at all: "not good" is good here, and a quoted 'good' is another word. That makes it easy to please, which is what the built-in task is about.

    >>> round(lexicon_sentiment("a brilliant, funny plot and a dull ending"), 4)
    0.4588
    """
    total = sum(lexicon.get(word, 0.0) for word in re.findall(r"[\w'-]+", text.lower()))
    return total / math.sqrt(total * total + 15)


# ------------------------------------------------------------------------------------------------ more measures of text


def chrf(hypothesis: str, references: list[str], char_order: int = 6, beta: int = 2) -> float:
    """Character n-gram F-score (Popovic 2015), white space ignored, the best over the references; 0..1.

    Precision and recall are averaged over the orders that both sides have; beta 2 weighs recall twice. Equals sacrebleu's
    `sentence_chrf(...) / 100`.
    """
    return max(
        (
            _chrf_one("".join(hypothesis.split()), "".join(r.split()), char_order, beta)
            for r in _as_list(references)
        ),
        default=0.0,
    )


def _chrf_one(ours: str, theirs: str, char_order: int, beta: int) -> float:
    orders = min(char_order, len(ours), len(theirs))
    left, right = (
        Counter([text[i : i + n] for n in range(1, orders + 1) for i in range(len(text) - n + 1)])
        for text in (ours, theirs)
    )
    matches = [0] * orders
    for gram in left.keys() & right.keys():
        matches[len(gram) - 1] += min(left[gram], right[gram])
    precision = sum(matched / (len(ours) - n) for n, matched in enumerate(matches)) / max(orders, 1)
    recall = sum(matched / (len(theirs) - n) for n, matched in enumerate(matches)) / max(orders, 1)
    return (1 + beta**2) * precision * recall / (beta**2 * precision + recall) if precision else 0.0


STOP_WORDS = set(
    """a about above after again all also am an and any are as at be because been before being below between both but by can could did do
does doing down during each few for from further had has have having he her here hers him his how i if in into is it its just me more
most my no nor not now of off on once only or other our ours out over own same she should so some such than that the their theirs them
then there these they this those through to too under until up very was we were what when where which while who whom why will with would
you your yours""".split()
)


def words_of(text: str) -> list[str]:
    """Lower-cased words, digits and accents kept, apostrophes and hyphens inside a word too."""
    return re.findall(r"\w+(?:['-]\w+)*", text.lower())


def coverage(text: str, keywords: str | list[str]) -> float:
    """Share of the keywords' content words (all but stop words) that the text has; 0 when there are none; 0..1."""
    wanted = {
        word
        for word in words_of(keywords if isinstance(keywords, str) else " ".join(keywords))
        if word not in STOP_WORDS
    }
    return len(wanted & set(words_of(text))) / len(wanted) if wanted else 0.0


def inverse_document_frequency(documents: list[str]) -> Callable[[str], float]:
    """word -> ln((1 + n) / (1 + df)) + 1, df the number of the n documents that have it (smooth idf, as in scikit-learn)."""
    counts = Counter(word for document in documents for word in set(words_of(document)))
    return lambda word: math.log((1 + len(documents)) / (1 + counts[word])) + 1


def tfidf_cosine(a: str, b: str, idf: Callable[[str], float]) -> float:
    """Cosine of the TF-IDF vectors of two texts; 0..1, 0 when either has no word."""
    left, right = (Counter(words_of(text)) for text in (a, b))
    vectors = [
        {word: count * idf(word) for word, count in counts.items()} for counts in (left, right)
    ]
    dot = sum(value * vectors[1].get(word, 0.0) for word, value in vectors[0].items())
    return (
        dot / math.sqrt(math.prod(sum(v * v for v in vector.values()) for vector in vectors))
        if dot
        else 0.0
    )


FORMAL_WORDS = """accordingly additionally although consequently demonstrate furthermore hence however indicate moreover nevertheless notwithstanding
obtain regarding require sufficient therefore thus upon whereas whilst""".split()
INFORMAL_WORDS = """awesome bro btw cool crap damn dude gonna gotta guy guys haha hey kinda lol lots nah nope okay omg stuff super thing things wanna
whatever wow ya yeah yep""".split()


def sentence_length_fit(text: str, target: float) -> float:
    """1 - |mean words per sentence - target| / target, not below 0. A sentence ends at . ! ? or a line break."""
    lengths = [
        n for n in (len(words_of(sentence)) for sentence in re.split(r"[.!?\n]+", text)) if n
    ]
    return max(0.0, 1 - abs(sum(lengths) / len(lengths) - target) / target) if lengths else 0.0


def type_token_ratio(text: str) -> float:
    """Different words / words; 0 for a text without words."""
    words = words_of(text)
    return len(set(words)) / len(words) if words else 0.0


def formality(text: str) -> float:
    """Formal words / (formal + informal words) by the two lists above; 0.5 when the text has neither, 0 when it has no word."""
    words = words_of(text)
    formal, informal = (
        sum(w in FORMAL_WORDS for w in words),
        sum(w in INFORMAL_WORDS for w in words),
    )
    return formal / (formal + informal) if formal + informal else 0.5 * bool(words)


def distinct_n(text: str, n: int) -> float:
    """Different word n-grams / n-grams. A text too short for one repeats nothing: 1; a text without words: 0."""
    words = words_of(text)
    ngrams = list(zip(*(words[i:] for i in range(n))))
    return len(set(ngrams)) / len(ngrams) if ngrams else float(bool(words))


TOXIC_WORDS = """arse arsehole ass asshole bastard bitch bitches bullshit coward cretin crap cunt damn dick dickhead douche dumb dumbass fool freak
fuck fucked fucker fucking garbage hate idiot idiotic idiots imbecile kill loser losers moron morons pathetic pig prick pussy retard retarded
scum shit shithead shitty shut slut stupid suck sucks trash trashy ugly vermin whore worthless""".split()


def lexicon_toxicity(text: str, lexicon: set[str] | dict = frozenset(TOXIC_WORDS)) -> float:
    """hits / (hits + 1), the number of listed words; 0..1, MORE IS WORSE: subtract it. Long texts cannot dilute it."""
    hits = sum(word in lexicon for word in words_of(text))
    return hits / (hits + 1)


def normalize_answer(text: str) -> str:
    """Lower case, no punctuation, no articles, single spaces: the comparison of SQuAD (Rajpurkar et al. 2016)."""
    return " ".join(
        word
        for word in re.sub(r"[^\w\s]", "", text.lower()).split()
        if word not in ("a", "an", "the")
    )


def last_number(text: str) -> Decimal | None:
    """The last number of a text: sign, thousands commas and decimals understood (GSM8K's answers stand at the end)."""
    found = r"(?<![\w.])-?(?:(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)"
    numbers = re.findall(found, text.replace("\u2212", "-"))  # the typographic minus
    return Decimal(numbers[-1].replace(",", "")) if numbers else None


# ------------------------------------------------------------------------------------------------ the names in --reward


def _references(columns: dict, name: str) -> list[list[str]]:
    """One list of reference texts per completion: the column `references` if the data has one, else `target`."""
    targets = columns.get("target")
    if "references" in columns:  # a row without any falls back on its target
        return [
            _as_list(value or (targets[i] if targets else ""))
            for i, value in enumerate(columns["references"])
        ]
    if targets is not None:
        return [_as_list(value) for value in targets]
    raise UserError(f"reward '{name}' compares with a reference text, but the data has no target")


def _best(metric: Callable[[str, str], float], name: str) -> Callable:
    """A reward from a metric of (hypothesis, reference): the best over the references, as multi-reference ROUGE is defined."""
    return lambda prompts, completions, **columns: [
        max(metric(completion, reference) for reference in references)
        for completion, references in zip(completions, _references(columns, name), strict=True)
    ]


def _multi(metric: Callable[[str, list[str]], float], name: str) -> Callable:
    """A reward from a metric of (hypothesis, list of references)."""
    return lambda prompts, completions, **columns: [
        metric(completion, references)
        for completion, references in zip(completions, _references(columns, name), strict=True)
    ]


def _bleu_reward(context, max_order: int = 4):
    _above_0("bleu", "max_order", max_order)
    return _multi(lambda h, rs: bleu(h, rs, max_order), "bleu")


def _perplexity_reward(context, model: str | None = None):
    lm, tokenizer = frozen_lm(context, "perplexity", model)
    return lambda prompts, completions, **columns: [
        1 / value for value in perplexity(lm, tokenizer, completions, prompts)
    ]


def _each(measure: Callable[[str], float]) -> Callable:
    """A reward from a measure of the completion alone."""
    return lambda prompts, completions, **columns: [
        measure(completion) for completion in completions
    ]


def _sentiment_reward(context, lexicon: str | None = None):
    words = read_lexicon(lexicon) if lexicon else DEFAULT_LEXICON
    return _each(lambda text: lexicon_sentiment(text, words))


def _toxicity_reward(context, lexicon: str | None = None):
    words = set(read_lexicon(lexicon, default=-1.0)) if lexicon else frozenset(TOXIC_WORDS)
    return _each(lambda text: lexicon_toxicity(text, words))


def _length_reward(context, target: int = 20):
    _above_0("length", "target", target)
    return _each(lambda text: max(0.0, 1 - abs(len(text.split()) - target) / target))


def _repetition_reward(context, n: int = 2):
    _above_0("repetition", "n", n)
    return _each(lambda text: distinct_n(text, n))


def _style_reward(context, aspect: str = "all", sentence_length: float = 15):
    _above_0("style", "sentence_length", sentence_length)
    aspects = {
        "sentence_length": lambda text: sentence_length_fit(text, sentence_length),
        "type_token_ratio": type_token_ratio,
        "formality": formality,
    }
    if aspect != "all" and aspect not in aspects:
        raise UserError(f"style(aspect={aspect!r}): known aspects are all, {', '.join(aspects)}")
    chosen = list(aspects.values()) if aspect == "all" else [aspects[aspect]]
    return _each(lambda text: sum(measure(text) for measure in chosen) / len(chosen))


def _coverage_reward(context):
    def reward(prompts, completions, **columns):
        keywords = columns.get("keywords", [None] * len(completions))
        if None in keywords:  # a row without any falls back on its reference
            keywords = [
                k if k is not None else " ".join(r)
                for k, r in zip(keywords, _references(columns, "coverage"), strict=True)
            ]
        return [
            coverage(completion, wanted)
            for completion, wanted in zip(completions, keywords, strict=True)
        ]

    return reward


def _relevance_reward(context, corpus: str | None = None):
    if corpus is None:  # to the prompt; the data at hand say which words are common
        idf = inverse_document_frequency(context.get("documents", []))
        return lambda prompts, completions, **columns: [
            tfidf_cosine(c, p, idf) for c, p in zip(completions, prompts, strict=True)
        ]
    lines = [line for line in _read_text(corpus, "relevance").split("\n") if line.strip()]
    idf, domain = inverse_document_frequency(lines), " ".join(lines)
    return _each(lambda text: tfidf_cosine(text, domain, idf))


def _truthful_reward(context, metric: str = "rouge_1"):
    similarity = {
        "rouge_1": lambda h, r: rouge_n(h, r, 1).f1,
        "rouge_l": lambda h, r: rouge_l(h, r).f1,
        "bleu": lambda h, r: bleu(h, [r]),
    }.get(metric)
    if similarity is None:
        raise UserError(f"truthful(metric={metric!r}): known metrics are rouge_1, rouge_l, bleu")

    def reward(prompts, completions, **columns):
        sides = []
        for name in ("correct_answers", "incorrect_answers"):
            answers = columns.get(
                name, columns.get(name.replace("_", " ").title())
            )  # TruthfulQA's file says "Correct Answers"
            if answers is None:
                raise UserError(
                    f"reward 'truthful' needs the columns correct_answers and incorrect_answers; {name} is missing"
                )
            answers = [
                [a.strip() for a in x.split(";")] if isinstance(x, str) else x or []
                for x in answers
            ]
            sides.append(
                [
                    max((similarity(c, a) for a in row), default=0.0)
                    for c, row in zip(completions, answers, strict=True)
                ]
            )
        return [right - wrong for right, wrong in zip(*sides)]

    return reward


def _numeric(completion: str, reference: str) -> float:
    wanted = last_number(reference)
    return float(wanted is not None and last_number(completion) == wanted)


def _read_text(path: str, name: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as problem:
        raise UserError(f"reward '{name}': {path} cannot be read: {problem}") from None


def _above_0(reward: str, name: str, value: float) -> None:
    if not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise UserError(f"{reward}({name}={value!r}): expected a number above 0")


# name -> (make(context, **arguments) -> reward function, "range, needs: meaning")
REWARDS: dict[str, tuple[Callable, str]] = {
    "bleu": (_bleu_reward, "0..1, target: sentence BLEU, equal to sacrebleu's"),
    "chrf": (
        lambda context: _multi(chrf, "chrf"),
        "0..1, target: character n-gram F-score, equal to sacrebleu's",
    ),
    "rouge_1": (
        lambda context: _best(lambda h, r: rouge_n(h, r, 1).f1, "rouge_1"),
        "0..1, target: shared words, F1",
    ),
    "rouge_2": (
        lambda context: _best(lambda h, r: rouge_n(h, r, 2).f1, "rouge_2"),
        "0..1, target: shared word pairs, F1",
    ),
    "rouge_n": (
        lambda context, n=1: (
            _above_0("rouge_n", "n", n) or _best(lambda h, r: rouge_n(h, r, n).f1, "rouge_n")
        ),
        "0..1, target: shared n-grams, F1",
    ),
    "rouge_l": (
        lambda context: _best(lambda h, r: rouge_l(h, r).f1, "rouge_l"),
        "0..1, target: longest common subsequence, F1",
    ),
    "rouge_lsum": (
        lambda context: _best(lambda h, r: rouge_lsum(h, r).f1, "rouge_lsum"),
        "0..1, target: the same over the lines of a summary, F1",
    ),
    "cosine": (lambda context: _best(cosine, "cosine"), "0..1, target: bag-of-words cosine"),
    "coverage": (
        _coverage_reward,
        "0..1, keywords or target: share of their content words that appear",
    ),
    "exact_match": (
        lambda context: _best(
            lambda c, r: float(normalize_answer(c) == normalize_answer(r)), "exact_match"
        ),
        "0 or 1, target: equal but for case, punctuation and articles",
    ),
    "numeric": (
        lambda context: _best(_numeric, "numeric"),
        "0 or 1, target: the last numbers are equal (GSM8K)",
    ),
    "truthful": (
        _truthful_reward,
        "-1..1, correct_answers and incorrect_answers: nearer to which (TruthfulQA)",
    ),
    "relevance": (_relevance_reward, "0..1, prompt or corpus=file: TF-IDF cosine"),
    "perplexity": (
        _perplexity_reward,
        "0..1, the starting model or model=: 1 / perplexity; 0 for empty text",
    ),
    "sentiment": (
        _sentiment_reward,
        "-1..1, nothing or lexicon=file: praise minus blame by a word list",
    ),
    "toxicity": (
        _toxicity_reward,
        "0..1, nothing or lexicon=file: listed words, MORE IS WORSE, so subtract it",
    ),
    "style": (
        _style_reward,
        "0..1, nothing: mean of sentence length, type-token ratio and formality, or aspect=one of them",
    ),
    "repetition": (
        _repetition_reward,
        "0..1, nothing: share of word n-grams that are different, 1 is no repetition",
    ),
    "length": (
        _length_reward,
        "0..1, nothing: 1 at `target` words, falling to 0 at none and at twice as many",
    ),
    **JUDGES,
}

# ------------------------------------------------------------------------------------------------ the expression


def _bounds(low: float, high: float) -> tuple[float, float]:
    if not all(type(x) in (int, float) and math.isfinite(x) for x in (low, high)) or low > high:
        raise ValueError(
            f"expected finite numbers, the lower first, found {low!r}"
            + (f" and {high!r}" if high is not low else "")
        )
    return float(low), float(high)


# name -> make(**literals) -> function of (x (B,), learn) -> (B,); only `ema` has a memory
POST_PROCESSORS: dict[str, tuple[Callable, str]] = {
    "clip": (
        lambda low, high: lambda x, learn, bounds=_bounds(low, high): x.clamp(*bounds),
        "clip(x, low, high): no less than low, no more than high",
    ),
    "scale": (
        lambda factor: lambda x, learn, factor=_bounds(factor, factor)[0]: x * factor,
        "scale(x, factor): times factor",
    ),
    "tanh": (lambda: lambda x, learn: torch.tanh(x), "tanh(x): squashed into -1..1"),
    "whiten": (
        lambda: lambda x, learn: RunningNorm()(x),
        "whiten(x): minus the mean of the batch, over its standard deviation",
    ),
    "ema": (
        lambda decay=0.99: RunningNorm(decay),
        "ema(x, decay=0.99): the same by running statistics, which checkpoints keep",
    ),
}


class Reward:
    """A parsed expression. Calling it gives a (B,) float32 tensor, NaN where a judge abstained; `parts` then holds every leaf, raw.

    Calling it also moves its statistics (`ema`, `mixture`), but not inside `with reward.frozen():`, which is for measuring.
    """

    def __init__(
        self,
        evaluate: Callable,
        leaves: dict[str, Callable],
        stateful: dict[str, RunningNorm | Mixture | SelfPlay],
    ):
        self._evaluate, self._leaves, self._stateful = evaluate, leaves, stateful
        self._learn = True
        self.parts: dict[str, torch.Tensor] = {}
        self.total = torch.zeros(0)  # (B,) what the last call returned
        self.reference = None  # the KL reference, for `self_play(..., opponent="reference")`; train.py keeps it up to date

    def __call__(self, prompts: list[str], completions: list[str], **columns) -> torch.Tensor:
        """One float per completion. Raises UserError naming reward and text where a leaf raises, miscounts or gives no number."""
        opponents = {}
        for name, thing in self._stateful.items():
            if isinstance(thing, SelfPlay):
                opponents[name] = self._ask_leaves(
                    prompts, thing.answers(prompts, self.reference, self._learn), columns
                )
        self.parts = self._ask_leaves(prompts, completions, columns)
        self.total = self._evaluate(self.parts | opponents, self._learn) + torch.zeros(
            len(completions)
        )  # (B,) also for a mere number
        if torch.isinf(self.total).any():
            raise NonFiniteReward(f"the reward is too large for a float32: {self.total.tolist()}")
        return self.total

    def _ask_leaves(
        self, prompts: list[str], completions: list[str], columns: dict[str, list]
    ) -> dict[str, torch.Tensor]:
        """The raw values (B,) of every leaf; each process asks for its share of the texts, and a text that fails fails for all."""
        problem, parts = None, {}
        prompts, completions, columns = (
            parallel.share(prompts),
            parallel.share(completions),
            {k: parallel.share(v) for k, v in columns.items()},
        )
        try:
            parts = {
                name: _call_leaf(name, f, prompts, completions, columns)
                for name, f in self._leaves.items()
                if completions
            }
        except UserError as raised:
            problem = raised
        for each in parallel.everybody(problem):
            if each is not None:
                raise each
        return {
            name: torch.tensor(parallel.gather(parts[name].tolist() if completions else []))
            for name in self._leaves
        }

    @property
    def opponent(self) -> SelfPlay | None:
        """That of `self_play`, if the expression has one."""
        return next(
            (thing for thing in self._stateful.values() if isinstance(thing, SelfPlay)), None
        )

    @contextmanager
    def frozen(self):
        """Measuring leaves no trace: no statistics, and the random states that a user's reward may draw from are put back."""
        states = random.getstate(), np.random.get_state(), torch.get_rng_state()
        self._learn = False
        try:
            yield
        finally:
            self._learn = True
            random.setstate(states[0])
            np.random.set_state(states[1])
            torch.set_rng_state(states[2])

    def metrics(self) -> dict[str, float]:
        """Of the last call: `reward/<leaf>`, the mean of its raw values, and `reward_weight/<name>` of a mixture."""
        means = {f"reward/{name}": float(values.nanmean()) for name, values in self.parts.items()}
        mixtures = [thing for thing in self._stateful.values() if isinstance(thing, Mixture)]
        weights = {
            f"reward_weight/{n}": float(w) for m in mixtures for n, w in zip(m.names, m.weights())
        }
        return (
            means
            | weights
            | {
                "self_play/win_rate": play.win_rate
                for play in self._stateful.values()
                if isinstance(play, SelfPlay)
            }
        )

    def state_dict(self) -> dict[str, dict]:
        return {name: thing.state_dict() for name, thing in self._stateful.items()}

    def load_state_dict(self, state: dict[str, dict]) -> None:
        for name, thing in self._stateful.items():
            thing.load_state_dict(state[name])


def _call_leaf(
    name: str, function: Callable, prompts: list[str], completions: list[str], columns: dict
) -> torch.Tensor:
    try:
        values = function(prompts=prompts, completions=completions, **_accepted(function, columns))
    except UserError:
        raise
    except Exception as problem:  # the user's own code may raise anything; it is named, not hidden
        frame = traceback.extract_tb(problem.__traceback__)[-1]
        where = f"{Path(frame.filename).name}:{frame.lineno}"
        raise UserError(
            f"reward '{name}' raised {type(problem).__name__}: {problem} ({where}); first completion: {completions[0][:80]!r}"
        ) from problem
    if isinstance(values, (torch.Tensor, np.ndarray)):
        values = values.tolist()
    if getattr(
        function, "may_abstain", False
    ):  # a judge that could not be reached: no score, which is not a score of 0
        return torch.tensor(
            [math.nan if value is None else value for value in values], dtype=torch.float32
        )
    if not isinstance(values, (list, tuple)) or len(values) != len(completions):
        found = (
            f"{len(values)} values" if isinstance(values, (list, tuple)) else type(values).__name__
        )
        raise UserError(
            f"reward '{name}' must return a list of {len(completions)} floats, one per completion; it returned {found}"
        )
    for value, text in zip(values, completions):
        if (
            not isinstance(value, numbers.Real) or not abs(value) < 1e38
        ):  # float32 ends at 3.4e38; a NaN is not below anything
            raise NonFiniteReward(
                f"reward '{name}' gave {value!r}, not a finite number, for the completion {text[:80]!r}"
            )
    return torch.tensor(values, dtype=torch.float32)


def _accepted(function: Callable, columns: dict) -> dict:
    """The columns that the function takes: all with **kwargs, else those it names."""
    parameters = inspect.signature(function).parameters
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        return columns
    return {name: values for name, values in columns.items() if name in parameters}


_FILE_FUNCTION = re.compile(r"""(?<![\w./~"'-])([\w./~-]+\.py):(\w+)""")


def build_reward(expression: str, **context) -> Reward:
    """Parse a reward expression: names, numbers, + - *, calls with literal arguments, post-processors, `mixture`, `file.py:function`.

    `context` is what some rewards need: `model` (a Hugging Face causal LM) and `tokenizer` for those that ask the starting model,
    `documents` (texts) for `relevance`, `device`, and `mixture_pairs` (prompt, chosen, rejected, columns) to fit a `mixture`.
    Raises UserError that quotes the part it does not understand and lists the known names.
    """
    return _Parser(expression, context).reward()


class _Parser:
    """Turns the syntax tree into nested functions of (leaf values by name, learn) -> (B,) tensor. Nothing is evaluated as Python."""

    def __init__(self, expression: str, context: dict):
        self.expression, self.context = expression, context
        self.functions: dict[
            str, tuple[str, str]
        ] = {}  # placeholder -> (file, function): a path is no Python expression
        self.leaves: dict[str, Callable] = {}
        self.sources: dict[str, str] = {}  # leaf -> file: two files may have functions of one name
        self.stateful: dict[str, RunningNorm | Mixture] = {}

    def reward(self) -> Reward:
        def stand_in(match: re.Match) -> str:
            self.functions[f"_file{len(self.functions)}_"] = match.groups()
            return list(self.functions)[-1]

        source = _FILE_FUNCTION.sub(stand_in, self.expression.strip())
        try:
            reward = Reward(
                self.build(ast.parse(source, mode="eval").body), self.leaves, self.stateful
            )
        except (SyntaxError, RecursionError, MemoryError, OverflowError) as problem:
            raise UserError(
                f"--reward {self.expression[:200]!r} is not an expression: {getattr(problem, 'msg', problem)}; {_known()}"
            ) from None
        if "mixture_pairs" in self.context and not any(
            isinstance(thing, Mixture) for thing in self.stateful.values()
        ):
            raise UserError(
                f"--mixture-data fits the weights of a mixture(...), and --reward {self.expression!r} has none"
            )
        return reward

    def build(self, node: ast.expr) -> Callable:
        if isinstance(node, ast.BinOp) and type(node.op) in (ast.Add, ast.Sub, ast.Mult):
            left, right = self.build(node.left), self.build(node.right)
            operation = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul}[
                type(node.op)
            ]
            return lambda parts, learn: operation(left(parts, learn), right(parts, learn))
        if isinstance(node, ast.UnaryOp) and type(node.op) in (ast.USub, ast.UAdd):
            operand, sign = self.build(node.operand), -1 if isinstance(node.op, ast.USub) else 1
            return lambda parts, learn: sign * operand(parts, learn)
        if (
            isinstance(node, ast.Constant)
            and type(node.value) in (int, float)
            and math.isfinite(node.value)
        ):
            return lambda parts, learn: torch.tensor(float(node.value))
        if isinstance(node, ast.Name) and node.id in self.functions:
            file, function = self.functions[node.id]
            return self.leaf(function, load_function(file, function), source=file)
        if isinstance(node, ast.Name) and node.id in REWARDS:
            return self.leaf(node.id, self.call(node, REWARDS[node.id][0], self.context))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            name = node.func.id
            if name in REWARDS:
                return self.leaf(self.text(node), self.call(node, REWARDS[name][0], self.context))
            if name in POST_PROCESSORS and node.args:
                return self.post_processor(node)
            if name in ("min", "max") and len(node.args) > 1 and not node.keywords:
                parts_of, best = (
                    [self.build(argument) for argument in node.args],
                    {"min": torch.minimum, "max": torch.maximum}[name],
                )
                return lambda parts, learn: functools.reduce(
                    best, [part(parts, learn) for part in parts_of]
                )
            if name == "self_play" and node.args:
                return self.self_play(node)
            if name == "mixture":
                return self.mixture(node)
        raise UserError(
            f"--reward {self.expression!r}: cannot read {self.text(node)!r}; {_known()}"
        )

    def leaf(self, name: str, function: Callable, source: str = "") -> Callable:
        if self.sources.setdefault(name, source) != source:
            raise UserError(
                f"--reward {self.expression!r}: two different rewards are called {name!r}; rename one"
            )
        self.leaves[name] = function
        return lambda parts, learn: parts[name]

    def post_processor(self, node: ast.Call) -> Callable:
        inner = self.build(node.args[0])
        process = self.call(node, POST_PROCESSORS[node.func.id][0], skip=1)
        if isinstance(process, RunningNorm):
            self.remember(node, process)
        return lambda parts, learn: process(inner(parts, learn), learn)

    def remember(self, node: ast.Call, thing: RunningNorm | Mixture | SelfPlay) -> str:
        key = self.text(node)
        key = f"{key} #{len(self.stateful)}" if key in self.stateful else key
        self.stateful[key] = thing
        return key

    def self_play(self, node: ast.Call) -> Callable:
        base = self.build(node.args[0])
        if any(isinstance(thing, SelfPlay) for thing in self.stateful.values()):
            raise UserError(f"--reward {self.expression!r}: one self_play is enough")
        play = self.call(node, SelfPlay, self.context, skip=1)
        key = self.remember(node, play)  # the opponent's leaves stand under it, beside ours
        return lambda parts, learn: play(base(parts, learn), base(parts[key], False))

    def mixture(self, node: ast.Call) -> Callable:
        outside, self.leaves, stateful = self.leaves, {}, set(self.stateful)
        components = [self.build(argument) for argument in node.args]
        inside, self.leaves = self.leaves, outside | self.leaves
        names = [self.text(argument) for argument in node.args]
        mixture = self.call(node, Mixture, names, skip=len(names))
        self.remember(node, mixture)
        if "mixture_pairs" in self.context:
            pairs = self.context["mixture_pairs"]
            if any(
                isinstance(thing, SelfPlay)
                for name, thing in self.stateful.items()
                if name not in stateful
            ):
                raise UserError(
                    f"--reward {self.expression!r}: preference pairs know no opponent, so --mixture-data does not go with self_play"
                )
            # Both sides in one call, so that whatever standardises a component by its batch treats them alike.
            completions = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
            columns = {
                name: [pair.columns.get(name) for pair in pairs] * 2
                for name in {n: 0 for pair in pairs for n in pair.columns}
            }
            prompts = [pair.prompt for pair in pairs] * 2
            parts = {
                name: _call_leaf(name, f, prompts, completions, columns)
                for name, f in inside.items()
            }
            scores = torch.stack(
                [
                    component(parts, False) + torch.zeros(len(completions))
                    for component in components
                ],
                dim=1,
            )  # (2n, K)
            chosen, rejected = scores.chunk(2)  # (n, K) each
            answered = torch.isfinite(chosen).all(1) & torch.isfinite(rejected).all(1)  # (n,)
            if not answered.any():
                raise UserError(
                    f"--reward {self.expression!r}: no preference pair has a score from every part of the mixture"
                )
            accuracy = mixture.fit(chosen[answered], rejected[answered])
            if parallel.rank() == 0:
                print(
                    f"the mixture agrees with {accuracy:.0%} of the {len(chosen)} preference pairs that it was fitted to"
                )
        return lambda parts, learn: mixture(
            torch.broadcast_tensors(*[component(parts, learn) for component in components]), learn
        )

    def call(self, node: ast.Name | ast.Call, make: Callable, *first, skip: int = 0):
        """make(*first, literals of the call after `skip` of them). Raises UserError for arguments that are no literals, or do not fit."""
        try:
            arguments = [self.literal(argument) for argument in getattr(node, "args", [])[skip:]]
            keywords = {
                keyword.arg: self.literal(keyword.value)
                for keyword in getattr(node, "keywords", [])
            }
            inspect.signature(make).bind(*first, *arguments, **keywords)
            return make(*first, *arguments, **keywords)
        except UserError:
            raise
        except (ValueError, TypeError, AttributeError) as problem:
            raise UserError(
                f"--reward {self.expression!r}: cannot read {self.text(node)!r}: {problem}"
            ) from None

    def literal(self, node: ast.expr):
        value = ast.literal_eval(node)
        return self.restore(value) if isinstance(value, str) else value

    def text(self, node: ast.expr) -> str:
        """The part of the expression as the user wrote it, but for spaces."""
        return self.restore(ast.unparse(node).replace("'", '"'))

    def restore(self, text: str) -> str:
        """Put the `file.py:function` back where a placeholder stands for it."""
        for placeholder, (file, function) in self.functions.items():
            text = text.replace(placeholder, f"{file}:{function}")
        return text


def load_function(file: str, name: str) -> Callable:
    """The callable `name` of a Python file; a class is instantiated without arguments."""
    path = Path(file).expanduser()
    if not path.is_file():
        raise UserError(
            f"--reward {file}:{name}: there is no file {file} (write spaces around a minus sign)"
        )
    spec = importlib.util.spec_from_file_location(f"reward_file_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up there
    try:
        spec.loader.exec_module(module)
    except Exception as problem:  # the user's own file may raise anything while it is imported
        raise UserError(
            f"--reward {file}:{name}: importing the file raised {type(problem).__name__}: {problem}"
        ) from problem
    function = getattr(module, name, None)
    if not callable(function):
        raise UserError(
            f"--reward {file}:{name}: the file has no function of that name; expected def {name}(prompts, completions, **columns) -> list[float]"
        )
    try:
        return function() if isinstance(function, type) else function
    except Exception as problem:  # the user's constructor may raise anything
        raise UserError(
            f"--reward {file}:{name}: {name}() raised {type(problem).__name__}: {problem}"
        ) from problem


def _known() -> str:
    return f"known are {', '.join([*REWARDS, *POST_PROCESSORS, 'min', 'max', 'self_play', 'mixture'])}, and file.py:function"


def list_rewards() -> str:
    """One line per name: what it gives, what it needs, what it means."""
    lines = [f"{name:13} {doc}" for name, (_, doc) in REWARDS.items()] + [
        "",
        "post-processors, applied to any expression:",
    ]
    lines += [f"  {doc}" for _, doc in POST_PROCESSORS.values()]
    lines += [
        "  min(a, b, ...), max(a, b, ...): the smaller, the larger: a floor that no other part can buy off"
    ]
    lines += [
        '  self_play(x, opponent="snapshot", every=50, shape="win"): the probability that x prefers our response to that of an earlier self'
    ]
    lines += [
        "  mixture(a, b, ...): a weighted sum of the standardised a, b, ... with weights that are learned"
    ]
    return "\n".join(
        [
            *lines,
            "",
            "your own: path/to/file.py:function, with def function(prompts, completions, **columns) -> list[float]",
        ]
    )


@one_line_errors
def main(argv: list[str]) -> None:
    """Score the texts of a file: one JSON line per record with the total and every leaf, then the means."""
    parser = Parser(main.__doc__)
    parser.add_argument(
        "expression", nargs="?", help="a reward expression, as for --reward of train.py"
    )
    parser.add_argument(
        "file",
        nargs="?",
        help='records such as {"prompt": "Say hello.", "completion": "Hello!", "target": "Hello there!"}',
    )
    parser.add_argument(
        "--list", action="store_true", help="print every reward, its range and what it needs"
    )
    is_flag = argv[:1] in (["-h"], ["--help"], ["--list"])
    args = parser.parse_args(
        argv if is_flag else ["--", *argv]
    )  # an expression may begin with a minus
    if args.list:
        return print(list_rewards())
    if args.file is None:
        raise UserError(
            'usage: python rewards.py --list | python rewards.py "EXPRESSION" FILE (with prompt, completion, target)'
        )
    records = list(read_records(args.file))
    if not records or not all(isinstance(r.get("completion"), str) for r in records):
        raise UserError(
            f"{args.file}: every record needs a string 'completion'; prompt, target and other columns as the reward asks"
        )
    names = {name for record in records for name in record if record[name] is not None} - {
        "prompt",
        "completion",
        "prompts",
        "completions",
    }
    columns = {name: [record.get(name) for record in records] for name in names}
    prompts = [str(record.get("prompt") or "") for record in records]
    reward = build_reward(args.expression, documents=prompts)
    total = reward(prompts, [record["completion"] for record in records], **columns)  # (B,)
    scored = {"total": total, **reward.parts}
    for i in range(len(records)):
        print(
            json.dumps(
                {name: round(values[i].item(), 6) for name, values in scored.items()}
                | {"completion": records[i]["completion"][:80]}
            )
        )
    print(
        "mean  "
        + "  ".join(f"{name} {values.nanmean().item():.4f}" for name, values in scored.items())
    )


if __name__ == "__main__":
    main(sys.argv[1:])
