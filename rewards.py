"""Rewards: text in, one float per completion out, higher is better.

A reward is any callable  f(prompts, completions, **columns) -> list[float]; every field of the data
arrives as a keyword list, the reference text as `target` (the convention of TRL's GRPO reward
functions, so those written for plain text run unchanged). `--reward` takes an expression over the
names in `REWARDS` below; expression.py is its language:

    rouge_l                                 0.7*rouge_l + 0.3*bleu - 0.1*length(target=40)
    sentiment(lexicon="vader.txt")          my_rewards.py:politeness

    clip(ema(sentiment), -3, 3) + 0.2*length(target=40)      mixture(bleu, rouge_l, sentiment)

The metrics are written out by hand and equal the reference implementations (sacrebleu; Google's
rouge_score without stemming) to 1e-9. More measures of text are in measures.py, rewards for right
answers in answers.py, rewards that ask a model in judges.py. Left out on purpose: stemming.

    python rewards.py --list                                  # every name, its range, what it needs
    python rewards.py "0.7*rouge_l + 0.3*bleu" examples/scored.jsonl
"""

import contextlib
import functools
import math
import operator
import re
import sys
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

from answers import ANSWERS
from data import columns_of
from engine import Parser, UserError, one_line_errors
from expression import DESCRIPTIONS, Reward, parse
from judges import JUDGES
from judges import perplexity as perplexity  # importable from here
from leaves import (
    as_list,
    best_of,
    best_reference_reward,
    check_above_0,
    check_count,
    completion_reward,
    reference_reward,
)
from measures import MEASURES, read_lexicon, truthful_reward
from measures import chrf as chrf  # importable from here
from score_file import print_scores, read_scored, summary
from words import DEFAULT_LEXICON, quoted_words_of, words_of

# ------------------------------------------------------------------ BLEU

_SPLIT_13A = [
    (re.compile(r"([{-~\[-`!-&(-+:-@/])"), r" \1 "),  # ASCII punctuation but , - . and '
    (re.compile(r"([^0-9])([.,])"), r"\1 \2 "),  # . and , unless a digit stands before ...
    (re.compile(r"([.,])([^0-9])"), r" \1 \2"),  # ... or after
    (re.compile(r"([0-9])(-)"), r"\1 \2 "),  # a dash after a digit
]


def tokenize_13a(text: str) -> list[str]:
    """`mteval-v13a`, sacrebleu's default: punctuation is split off, but not inside numbers."""
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


class BleuCounts(NamedTuple):
    """What BLEU counts in a sentence; those of a corpus are the sums."""

    matches: list[int]  # per order
    ngrams: list[int]  # per order, of the hypothesis
    length: int  # of the hypothesis
    reference_length: int  # of the reference whose length is closest


def _bleu_counts(hypothesis: str, references: str | list[str], max_order: int) -> BleuCounts:
    tokens = tokenize_13a(hypothesis)
    reference_tokens = [tokenize_13a(reference) for reference in as_list(references)]
    # An n-gram counts at most as often as in the one reference that has it most often.
    most = functools.reduce(operator.or_, [_ngrams(r, max_order) for r in reference_tokens])
    matches = [0] * max_order
    for ngram, count in _ngrams(tokens, max_order).items():
        if ngram in most:
            matches[len(ngram) - 1] += min(count, most[ngram])
    ngrams = [max(len(tokens) - n, 0) for n in range(max_order)]
    lengths = [len(reference) for reference in reference_tokens]
    closest = min(lengths, key=lambda n: (abs(n - len(tokens)), n))  # ties: the shorter
    return BleuCounts(matches, ngrams, len(tokens), closest)


def _bleu_score(counts: BleuCounts, effective_order: bool) -> float:
    """Papineni et al. 2002, section 2.3: brevity penalty times the geometric mean of the n-gram
    precisions.

    An order without a match gets 1 / (2^k n-grams) instead of 0, k counting such orders ("exp"
    smoothing of mteval-v13a). `effective_order` leaves out the orders that the hypothesis is too
    short to have.
    """
    if not any(counts.matches):
        return 0.0
    log_precisions, halvings = [], 0
    for matches, ngrams in zip(counts.matches, counts.ngrams):
        if ngrams == 0:
            break
        if matches == 0:
            halvings += 1
        log_precisions.append(math.log(matches / ngrams if matches else 1 / (2**halvings * ngrams)))
    if len(log_precisions) < len(counts.matches) and not effective_order:
        return 0.0
    brevity_penalty = min(1.0, math.exp(1 - counts.reference_length / counts.length))
    return brevity_penalty * math.exp(sum(log_precisions) / len(log_precisions))


def bleu(hypothesis: str, references: str | list[str], max_order: int = 4) -> float:
    """Sentence BLEU in 0..1; equals sacrebleu's `sentence_bleu(...) / 100` (13a tokens, exp
    smoothing, effective order).

    >>> round(bleu("the cat sat on the mat", ["the cat sat on a mat"]), 4)
    0.5373
    """
    return _bleu_score(_bleu_counts(hypothesis, references, max_order), effective_order=True)


def corpus_bleu(hypotheses: list[str], references: list[list[str]], max_order: int = 4) -> float:
    """Corpus BLEU in 0..1: counts are summed before dividing, so it is no mean of sentence scores.

    `references` holds one list of strings per hypothesis. Equals sacrebleu's
    `corpus_bleu(...) / 100` with its defaults.
    """
    counts = [
        _bleu_counts(hypothesis, texts, max_order)
        for hypothesis, texts in zip(hypotheses, references, strict=True)
    ]
    total = BleuCounts(
        matches=[sum(order) for order in zip(*(c.matches for c in counts))],
        ngrams=[sum(order) for order in zip(*(c.ngrams for c in counts))],
        length=sum(c.length for c in counts),
        reference_length=sum(c.reference_length for c in counts),
    )
    return _bleu_score(total, effective_order=False)


# ------------------------------------------------------------------ ROUGE


class Rouge(NamedTuple):
    """0..1 each."""

    precision: float  # over the hypothesis
    recall: float  # over the reference
    f1: float  # their harmonic mean


def tokenize_rouge(text: str) -> list[str]:
    """Lower-case runs of a-z and 0-9, as in rouge_score without a stemmer; accents separate too."""
    return re.findall(r"[a-z0-9]+", text.lower())


def _rouge(matches: int, hypothesis_size: int, reference_size: int) -> Rouge:
    if not matches:
        return Rouge(0.0, 0.0, 0.0)
    precision, recall = matches / hypothesis_size, matches / reference_size
    return Rouge(precision, recall, 2 * precision * recall / (precision + recall))


def rouge_n(hypothesis: str, reference: str, n: int) -> Rouge:
    """Overlap of n-grams (Lin 2004, section 2, which defines the recall).

    An n-gram counts at most as often as the other side has it.

    >>> rouge_n("testing one", "testing one two", 2)
    Rouge(precision=1.0, recall=0.5, f1=0.6666666666666666)
    """
    tokens, reference_tokens = tokenize_rouge(hypothesis), tokenize_rouge(reference)
    ngrams = Counter(zip(*(tokens[i:] for i in range(n))))
    reference_ngrams = Counter(zip(*(reference_tokens[i:] for i in range(n))))
    matches = (ngrams & reference_ngrams).total()
    return _rouge(matches, ngrams.total(), reference_ngrams.total())


def rouge_l(hypothesis: str, reference: str) -> Rouge:
    """Longest common subsequence of the two token lists (Lin 2004, section 3.1)."""
    tokens, reference_tokens = tokenize_rouge(hypothesis), tokenize_rouge(reference)
    longest = len(tokens) - _lcs_rows(tokens, reference_tokens)[-1].bit_count()
    return _rouge(longest, len(tokens), len(reference_tokens))


def rouge_lsum(hypothesis: str, reference: str) -> Rouge:
    """Summary-level ROUGE-L (Lin 2004, section 3.2): sentences are lines.

    A reference sentence is covered by the UNION of its common subsequences with all hypothesis
    sentences, and no token is counted more often than either side has it.
    """
    lines = [tokenize_rouge(line) for line in hypothesis.split("\n") if line]
    reference_lines = [tokenize_rouge(line) for line in reference.split("\n") if line]
    left = Counter(token for line in lines for token in line)
    reference_left = Counter(token for line in reference_lines for token in line)
    sizes = left.total(), reference_left.total()
    matches = 0
    for reference_line in reference_lines:
        covered = set().union(*(_lcs_positions(reference_line, line) for line in lines))
        for i in sorted(covered):
            token = reference_line[i]
            if left[token] > 0 and reference_left[token] > 0:
                matches += 1
                left[token] -= 1
                reference_left[token] -= 1
    return _rouge(matches, *sizes)


def _lcs_rows(a: list[str], b: list[str]) -> list[int]:
    """Longest common subsequences, an integer per prefix of b (Crochemore 2001; Hyyro 2004).

    Bit i of rows[j] is 0 where the table grows by one at a[i]: the length for a[:i] and b[:j] is
    the number of zeros below bit i. An addition carries the growth along a whole row, which makes
    this ten times faster than filling the table cell by cell.
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


def _lcs_positions(a: list[str], b: list[str]) -> set[int]:
    """Positions in a of the longest common subsequence that is found from the end (ROUGE-1.5.5)."""
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


# ------------------------------------------------------------------ cosine, sentiment, length


def cosine(a: str, b: str) -> float:
    """Cosine of the word counts of two texts; 0..1, 0 when either has no word.

    >>> round(cosine("good good plot", "good plot plot"), 4)
    0.8
    """
    left, right = Counter(words_of(a)), Counter(words_of(b))
    dot = sum(count * right[word] for word, count in left.items())
    norm = math.sqrt(sum(c * c for c in left.values()) * sum(c * c for c in right.values()))
    return dot / norm if dot else 0.0


def lexicon_sentiment(text: str, lexicon: dict[str, float] = DEFAULT_LEXICON) -> float:
    """s / sqrt(s^2 + 15), s the summed valence of the words (the normalisation of the
    vaderSentiment package); -1..1.

    No grammar at all: "not good" is good here, and a quoted 'good' is another word. That makes it
    easy to please, which is what the built-in task is about.

    >>> round(lexicon_sentiment("a brilliant, funny plot and a dull ending"), 4)
    0.4588
    """
    total = sum(lexicon.get(word, 0.0) for word in quoted_words_of(text))
    return total / math.sqrt(total * total + 15)


def length_fit(text: str, target: float) -> float:
    """1 at `target` words, falling to 0 at none and at twice as many."""
    return max(0.0, 1 - abs(len(text.split()) - target) / target)


# ------------------------------------------------------------------ the names in --reward


def f1_of(rouge: Callable[..., Rouge], *arguments) -> Callable[[str, str], float]:
    """The metric (hypothesis, reference) -> F1 of one of the ROUGE functions above."""

    def f1(hypothesis: str, reference: str) -> float:
        return rouge(hypothesis, reference, *arguments).f1

    return f1


def best_rouge(metric: Callable[[str, str], float], name: str) -> Callable:
    return best_of(metric, name, tokenize_rouge)


def bleu_reward(context: dict, max_order: int = 4) -> Callable:
    check_count("bleu", "max_order", max_order)
    return reference_reward(functools.partial(bleu, max_order=max_order), "bleu")


def rouge_n_reward(context: dict, n: int = 1) -> Callable:
    check_count("rouge_n", "n", n)
    return best_reference_reward(f1_of(rouge_n, n), "rouge_n", tokenize_rouge)


def sentiment_reward(context: dict, lexicon: str | None = None) -> Callable:
    words = DEFAULT_LEXICON if lexicon is None else read_lexicon(lexicon)
    return completion_reward(functools.partial(lexicon_sentiment, lexicon=words))


def length_reward(context: dict, target: int = 20) -> Callable:
    check_above_0("length", "target", target)
    return completion_reward(functools.partial(length_fit, target=target))


ROUGE_1, ROUGE_2 = f1_of(rouge_n, 1), f1_of(rouge_n, 2)
ROUGE_L, ROUGE_LSUM = f1_of(rouge_l), f1_of(rouge_lsum)

SIMILARITIES = {"rouge_1": ROUGE_1, "rouge_l": ROUGE_L, "bleu": bleu}

# name -> (make(context, **arguments) -> reward function, "range, needs: meaning")
REWARDS: dict[str, tuple[Callable, str]] = {
    "bleu": (bleu_reward, "0..1, target: sentence BLEU, equal to sacrebleu's"),
    "rouge_1": (best_rouge(ROUGE_1, "rouge_1"), "0..1, target: shared words, F1"),
    "rouge_2": (best_rouge(ROUGE_2, "rouge_2"), "0..1, target: shared word pairs, F1"),
    "rouge_n": (rouge_n_reward, "0..1, target: shared n-grams, F1"),
    "rouge_l": (best_rouge(ROUGE_L, "rouge_l"), "0..1, target: longest common subsequence, F1"),
    "rouge_lsum": (
        best_rouge(ROUGE_LSUM, "rouge_lsum"),
        "0..1, target: the same over the lines of a summary, F1",
    ),
    "cosine": (best_of(cosine, "cosine", words_of), "0..1, target: bag-of-words cosine"),
    "truthful": (
        functools.partial(truthful_reward, SIMILARITIES, tokenize_rouge),
        "-1..1, correct_answers and incorrect_answers: nearer to which (TruthfulQA)",
    ),
    "sentiment": (sentiment_reward, "-1..1, nothing or lexicon=file: praise minus blame, by words"),
    "length": (length_reward, "0..1, nothing: 1 at `target` words, 0 at none and at twice as many"),
    **MEASURES,
    **ANSWERS,
    **JUDGES,
}


def build_reward(expression: str, **context) -> Reward:
    """The reward of an expression such as "0.7*rouge_l + 0.3*bleu" (see expression.py).

    `context` is what some rewards need: `model` (a Hugging Face causal LM) and `tokenizer` for
    those that ask the starting model, `documents` (texts) for `relevance`, `device`, and
    `mixture_pairs` (prompt, chosen, rejected, columns) to fit a `mixture`. Raises UserError that
    quotes what it does not understand and lists the known names.
    """
    return parse(expression, REWARDS, context)


# ------------------------------------------------------------------ the command


def list_rewards() -> str:
    """One line per name: what it gives, what it needs, what it means."""
    lines = [f"{name:13} {description}" for name, (_, description) in REWARDS.items()]
    lines += ["", "functions of any expression:"]
    lines += [f"  {description}" for description in DESCRIPTIONS.values()]
    lines += ["", "your own: path/to/file.py:function, with"]
    lines += ["  def function(prompts, completions, **columns) -> list[float]"]
    return "\n".join(lines)


@one_line_errors
def main(argv: list[str]) -> None:
    """Score the texts of a file: a JSON line for each, and a summary on stderr."""
    parser = Parser(main.__doc__)
    example = '{"prompt": "Say hello.", "completion": "Hello!", "target": "Hello there!"}'
    listing = "print every reward, its range and what it needs"
    parser.add_argument("expression", nargs="?", help="an expression, as for --reward of train.py")
    parser.add_argument("file", nargs="?", help=f"records such as {example}")
    parser.add_argument("--list", action="store_true", help=listing)
    is_flag = argv[:1] in (["-h"], ["--help"], ["--list"])
    args = parser.parse_args(argv if is_flag else ["--", *argv])  # "-bleu" is an expression
    if args.list:
        return print(list_rewards())
    if args.file is None:
        raise UserError(
            'usage: python rewards.py --list | python rewards.py "EXPRESSION" FILE '
            "(with prompt, completion, target)"
        )
    completions, examples = read_scored(args.file)
    prompts, columns = [example.prompt for example in examples], columns_of(examples)
    if not any(columns["target"]):
        del columns["target"]
    with contextlib.redirect_stdout(sys.stderr):  # what a reward prints is no score
        reward = build_reward(args.expression, documents=prompts)
        total = reward(prompts, completions, **columns)  # (N,)
    scored = {"total": total, **reward.parts}
    print_scores(scored, completions)
    print("\n".join(summary(scored, completions)), file=sys.stderr)


if __name__ == "__main__":
    main(sys.argv[1:])
