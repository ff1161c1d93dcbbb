"""Texts of a file, scored by a reward: what each gets, and whether the reward tells them apart.

A record is read as data.py reads it (its names for prompt and target, dialogues too), and beside
that it has the text to score, in one of COMPLETION_FIELDS or as the last turn of its messages.
Left out on purpose: choosing a reward by such numbers (train with it, and read the samples).

    python rewards.py "0.7*rouge_l + 0.3*bleu" examples/scored.jsonl
    python rewards.py rouge_l examples/scored.jsonl 2>/dev/null | head -1   # a JSON object per line
"""

import json
import os
import statistics
import sys
from collections import Counter

import torch

import parallel
from cli import UserError, visible
from files import DIALOGUE_FIELDS, PROMPT_FIELDS, TARGET_FIELDS, placed_records
from messages import is_dialogue, said_in, to_messages
from sources import Example, to_prompts, with_all_columns

COMPLETION_FIELDS = ("completion", "response", "output", "prediction", "generated_text")
SHOWN = 5  # of the best and of the worst


def read_scored(file: str) -> tuple[list[str], list[Example]]:
    """The text of each record that is to be scored, and the rest of it as an example without target
    (a reward finds that among the columns). Raises UserError that names the line.

    A record of training data has no such text: then its target is scored, which is said.
    """
    completions, examples, n_targets = [], [], 0
    for place, record in placed_records(file, what="FILE"):
        try:
            completion, rest = _take_completion(record)
            example = _example(rest)
            if completion is None:
                completion = example.columns.get("target")
                n_targets += 1
            if not isinstance(completion, str):
                raise UserError(
                    f"no text to score: looked for {', '.join(COMPLETION_FIELDS)}, messages that "
                    "end in an assistant turn, or a target; "
                    f"the record has {', '.join(record) or 'nothing'}"
                )
        except UserError as problem:
            raise UserError(f"{place}: {problem}") from None
        completions.append(completion)
        examples.append(example)
    if not completions:
        raise UserError(f"{file} holds no record")
    if n_targets:
        counted = f"{n_targets} of {len(examples)} records"
        parallel.note(f"{counted} have no completion: their target is scored")
    return completions, with_all_columns(examples)


def _take_completion(record: dict) -> tuple[str | None, dict]:
    """-> the text to score (None: there is none), and what else the record holds. A field that
    stands there without a value, as an empty cell of a table does, is an empty text."""
    holds = {name: value for name, value in record.items() if value is not None}
    names = [name for name in COMPLETION_FIELDS if name in holds]
    names = names or [name for name in COMPLETION_FIELDS if name in record]
    for name in names[:1]:
        value = holds.pop(name, "")
        if not is_dialogue(value):
            if not isinstance(value, str):
                kind = type(value).__name__
                raise UserError(f"field '{name}' must be a string or messages, found {kind}")
            return value, holds
        messages = to_messages(value, name)[0]
        if len(messages) > 1:
            raise UserError(f"field '{name}' holds {len(messages)} messages; expected one")
        return said_in(messages[0]), holds
    record = holds
    for name in DIALOGUE_FIELDS:
        messages = to_messages(record[name], name)[0] if name in record else []
        if messages and messages[-1]["role"] == "assistant":
            return said_in(messages[-1]), {**record, name: messages[:-1]}
    return None, record


def _example(record: dict) -> Example:
    if not any(name in record for name in (*PROMPT_FIELDS, *DIALOGUE_FIELDS, "turns")):
        record = {"prompt": "", **record}
    has_target = any(name in record for name in TARGET_FIELDS)
    # A dummy, for a field whose name resembles that of a target is not one here.
    example = to_prompts(record if has_target else {**record, "target": "-"})[0]
    if not has_target:
        del example.columns["target"]
    return example


def print_scores(scored: dict[str, torch.Tensor], completions: list[str]) -> None:
    """A JSON object per line: the scores (N,) of each name, null for none, and the text's begin."""
    try:
        for i, completion in enumerate(completions):
            values = {name: values[i].item() for name, values in scored.items()}
            line = {name: round(v, 6) if v == v else None for name, v in values.items()}
            print(json.dumps({**line, "completion": completion[:80]}))
        sys.stdout.flush()
    except BrokenPipeError:  # `| head` has read enough; Python would try again when it ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def summary(scored: dict[str, torch.Tensor], completions: list[str]) -> list[str]:
    """Lines about the scores, (N,) of each name, `total` first: means, spread, how many are equal,
    the best and the worst texts. NaN is no score."""
    means = [f"{name} {values.double().nanmean().item():.4f}" for name, values in scored.items()]
    values = [value for value in scored["total"].tolist() if value == value]
    lines = ["mean  " + "  ".join(means)]
    if len(values) < len(completions):
        lines.append(f"{len(completions) - len(values)} of {len(completions)} have no score")
    if not values:
        return lines
    score, n = Counter(values).most_common(1)[0]
    lines.append(
        f"spread {statistics.pstdev(values):.4f} (standard deviation), "
        f"from {min(values):.4f} to {max(values):.4f}; "
        f"equal: {n / len(values):.0%} of the scores are {score:.4f}"
    )
    if min(values) == max(values):
        return lines
    score_of = dict(zip(completions, scored["total"].tolist()))  # a text that stands twice: once
    ranked = sorted(text for text in score_of if score_of[text] == score_of[text])
    ranked.sort(key=lambda text: score_of[text])
    worst = ranked[: min(SHOWN, len(ranked) // 2)]
    best = ranked[len(worst) :][-SHOWN:]
    for name, texts in (("best", best[::-1]), ("worst", worst)):
        lines.append(name)
        lines += [f"  {score_of[text]:+.4f}  {visible(text.strip()[:80])}" for text in texts]
    return lines
