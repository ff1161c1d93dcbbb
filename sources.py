"""Where examples come from: a file, a hub dataset or the built-in task.

files.py reads records, records.py turns one into examples or a pair, messages.py knows dialogues;
here are whole sources. A record that cannot be used is left out, and a note says how many and why.
Token ids and batches are in data.py. Left out on purpose: endless corpora, cleaning texts.

    python data.py examples/my_data.jsonl        # print what a source becomes
"""

import random
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace

import parallel
from engine import UserError
from files import PAIR_FIELDS, placed_records, read_records
from flags import add_data_flags, data_options, pair_options
from messages import plain_reply, render_dialogue, said_in
from records import (
    EMPTY_PROMPT,
    NO_TARGET,
    PAIRS,
    REPEATS,
    Example,
    Pair,
    to_examples,
    to_pair,
    to_prompts,
    without_target,
)
from reviews import BLAME, PRAISE, review_texts, with_judgements
from tasks import task_of

# What belongs to records, and the flags by which a source is read, are offered here too.
__all__ = [
    "Example",
    "Pair",
    "add_data_flags",
    "data_options",
    "load_examples",
    "load_pairs",
    "load_prompts",
    "make_reviews",
    "pair_options",
    "plain_reply",
    "read_records",
    "render_dialogue",
    "review_pairs",
    "to_examples",
    "to_pair",
]


# ------------------------------------------------------------------------------------ whole sources


def load_examples(
    source: str | list[str],
    *,
    limit: int | None = None,
    prompt_field: str | None = None,
    target_field: str | None = None,
    prompt_words: int = 12,
    encoding: str = "utf-8",
    config: str | None = None,
    split: str = "train",
    seed: int = 0,
    strict: bool = False,
    raw: bool = False,
    template_args: dict | None = None,
    what: str = "--data",
    convert: Callable | None = None,
) -> list[Example]:
    """Examples from a built-in task (tasks.py), files, patterns of files, or a hub dataset id.

    A record is one of: prompt + target (other names in files.py; context, system, history, tools
    beside them are part of the prompt); `messages`, one example for every assistant turn, with its
    history as prompt; `turns`, what a user says in a dialogue that has no answers yet; `text`,
    whose first `prompt_words` words are the prompt. At most `limit` records are read. Records that
    cannot be used are left out and counted on stderr; with `strict`, or if there is no other, the
    first is a UserError that names file and line. `convert` is `to_examples` or the like.
    """
    task = task_of(source)
    if task is not None:
        return [Example(prompt, target) for prompt, target in task.texts(limit or 4000, seed)]
    counts, convert = Counter(), convert or to_examples

    def examples_of(record: dict) -> list[Example]:
        return convert(record, prompt_field, target_field, prompt_words, raw, counts)

    records = placed_records(source, limit, encoding, config, split, what)
    placed = _usable(records, examples_of, source, strict, what)
    if convert is to_examples:
        without = [example for _, example in placed if not example.target]
        counts[NO_TARGET] = len(without)
        counts[PAIRS] = sum(set(PAIR_FIELDS) <= example.columns.keys() for example in without)
        different = {(example.prompt, example.target) for _, example in placed}
        counts[REPEATS] = len(placed) - len(different)
    counts[EMPTY_PROMPT] = sum(asks_nothing(example) for _, example in placed)
    _say_counts(counts, len(placed), source)
    shared = template_args or {}
    return with_all_columns(
        [
            replace(example, template_args={**shared, **example.template_args}, place=place)
            for place, example in placed
        ]
    )


def asks_nothing(example: Example) -> bool:
    """Is the prompt empty, or of a dialogue its last turn?"""
    last = example.messages[-1] if example.messages else {"content": example.prompt}
    return not said_in(last).strip()


def with_all_columns(examples: list[Example]) -> list[Example]:
    """Every example with every field, None where its record lacks it: a reward can rely on them."""
    names = dict.fromkeys(name for example in examples for name in example.columns)
    return [replace(e, columns={name: e.columns.get(name) for name in names}) for e in examples]


def load_prompts(source: str | list[str], **options) -> list[Example]:
    """Prompts alone, for reward steps: what `load_examples` reads, without its targets.

    Where a record has a target, `columns["target"]` is it. A dialogue is one prompt: it ends with
    the first user turn that nobody answers, or with the first one if all are answered. `options`
    and errors are those of `load_examples`.
    """
    if task_of(source) is not None:
        return [without_target(example) for example in load_examples(source, **options)]
    return load_examples(source, **options, convert=to_prompts)


def load_pairs(
    source: str | list[str],
    *,
    limit: int | None = None,
    encoding: str = "utf-8",
    config: str | None = None,
    split: str = "train",
    what: str = "--data",
    strict: bool = False,
    raw: bool = False,
    template_args: dict | None = None,
) -> list[Pair]:
    """Pairs from records with a prompt, `chosen` and `rejected`, or with two dialogues.

    A dialogue is a list of messages, or a transcript (Anthropic's format) that alternates
    "\\n\\nHuman:" and "\\n\\nAssistant:"; the prompt is what the two share. Records without two
    different responses are left out, as in `load_examples`. Raises UserError likewise.
    """
    counts = Counter()

    def pairs_of(record: dict) -> list[Pair]:
        found = Counter()
        pair = to_pair(record, raw, found)
        # Public data has pairs of equal responses, in which neither is preferred.
        if (pair.chosen, pair.chosen_reply) == (pair.rejected, pair.rejected_reply):
            raise UserError("'chosen' and 'rejected' are the same, so neither is preferred")
        counts.update(found)
        return [pair]

    records = placed_records(source, limit, encoding, config, split, what)
    placed = _usable(records, pairs_of, source, strict, what)
    _say_counts(counts, len(placed), source)
    shared = template_args or {}
    return [
        replace(pair, place=place, template_args={**shared, **pair.template_args})
        for place, pair in placed
    ]


def _usable(
    records: Iterable[tuple[str, dict]], convert: Callable, source, strict: bool, what: str
) -> list[tuple[str, Example | Pair]]:
    """(place, what `convert` makes of the record) for the records that it can use.

    A note counts the others. The first of them is a UserError if `strict`, or if all are such.
    """
    placed, first_places, counts, n_records = [], {}, Counter(), 0
    for place, record in records:
        n_records += 1
        try:
            placed += [(place, item) for item in convert(record)]
        except UserError as problem:
            reason = str(problem)
            if strict:
                raise UserError(f"{place}: {reason}") from None
            first_places.setdefault(reason, place)
            counts[reason] += 1
    if not placed and first_places:
        reason, place = next(iter(first_places.items()))
        raise UserError(f"{place}: {reason}")
    if not placed:
        raise UserError(f"{what} {name_of(source)} holds no record that can be used")
    reasons = [f"{n} x {why} (first: {first_places[why]})" for why, n in counts.most_common(5)]
    if len(counts) > len(reasons):
        reasons.append(f"and {len(counts) - len(reasons)} other reasons")
    if counts:
        left_out = f"{counts.total()} of {n_records} records of {name_of(source)} are left out"
        parallel.note(f"{left_out}: {'; '.join(reasons)}")
    return placed


def name_of(source: str | list[str]) -> str:
    """A source as it is written in a line for people."""
    return source if isinstance(source, str) else ", ".join(source)


def _say_counts(counts: Counter, n_all: int, source: str | list[str]) -> None:
    """A note for each count above 0; its text is the key."""
    for text, n in counts.items():
        if n:
            parallel.note(text.format(n=n, all=n_all, source=name_of(source)))


def make_reviews(n: int, seed: int = 0) -> list[Example]:
    """`n` examples of the built-in task, which reviews.py describes."""
    return [Example(prompt, target) for prompt, target in review_texts(n, seed)]


def review_pairs(examples: list[Example], seed: int = 0) -> list[Pair]:
    """For each review two endings that differ only in their adjectives; praise is preferred."""
    rng = random.Random(seed)
    pairs = []
    for example in examples:
        praising = with_judgements(example.target, PRAISE, rng)
        blaming = with_judgements(example.target, BLAME, rng)
        if praising != blaming:
            pairs.append(Pair(example.prompt, praising, blaming))
    return pairs
