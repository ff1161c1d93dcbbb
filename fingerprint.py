"""What a run learns from, as short fingerprints: a resumed run must not learn from something else.

A checkpoint keeps them, and --resume compares: the examples (number and hash), the vocabulary, the
folders that --model and its like name, and the files that --reward names. Of a large weight file
only the size and both ends are read. Left out on purpose: a hub id, whose files are in a cache that
nobody edits; the code of this repository, whose commit is in config.json.

    python train.py --resume out                      # refused if the data file has changed
    python train.py --resume out --accept-changes     # goes on all the same
"""

import glob
import hashlib
import os
import re
from dataclasses import fields
from pathlib import Path

import torch

from cli import UserError
from expression import files_and_texts
from flags import spelled
from references import parse_reference

ENDS = 2**20  # bytes that are read of a file's beginning, and of its end
MODEL_FLAGS = ("model", "user_model", "teacher")
DATA_FLAGS = ("data", "prompts", "preference_data", "mixture_data")
CODE_AND_MODELS = ("--model", "--user-model", "--teacher", "--ref-model", "--reward")
CODE_AND_MODELS += ("--mixture-data",)
MODEL_FILES = ("*.json", "*.safetensors", "*.bin", "*.model", "*.txt", "*.jinja")


def digest(parts) -> str:
    """16 hex digits of some strings, bytes or other things that print alike."""
    sha = hashlib.sha256()
    for part in parts:
        if not isinstance(part, bytes):  # an object without a text of its own prints its address
            text = repr(part)
            if " at 0x" in text:
                text = re.sub(" at 0x[0-9a-f]+", "", text)
            part = text.encode("utf-8", "surrogatepass")
        sha.update(len(part).to_bytes(8, "big") + part)
    return sha.hexdigest()[:16]


def of_files(path: Path) -> str:
    """A file, or the files of a model folder."""
    files = [path]
    if (path / "final").is_dir():  # a run folder stands for its model
        path = path / "final"
    if path.is_dir():
        found = {file for pattern in MODEL_FILES for file in path.glob(pattern)}
        files = sorted(file for file in found if file.is_file())
    parts = []
    for file in files:
        size = file.stat().st_size
        with file.open("rb") as opened:
            start = opened.read(ENDS)
            opened.seek(max(0, size - ENDS))
            parts += [file.name, size, start, opened.read()]
    return digest(parts)


def used_paths(args) -> dict[str, Path]:
    """What the flags name on this disk, by `--flag name`."""
    words = {spelled(name): [getattr(args, name)] for name in MODEL_FLAGS}
    for name in DATA_FLAGS:
        value = getattr(args, name) or []
        names = [value] if isinstance(value, str) else value
        words[spelled(name)] = [path for name in names for path in matches(name)]
    words["--ref-model"] = [parse_reference(ref)[1] for ref in args.ref_model or []]
    code, texts = named_in(args.reward)
    words["--reward"] = [*code, *texts]
    found = {}
    for flag, names in words.items():
        for name in names:
            path = os.path.expanduser(name) if flag == "--reward" else name
            if name and os.path.exists(path):  # of a long text too, where Path.exists() raises
                found[f"{flag} {name}"] = Path(path)
    return found


def matches(name: str) -> list[str]:
    """The files that a pattern names; any other name stands for itself."""
    is_pattern = glob.has_magic(name) and not os.path.exists(name)
    return sorted(glob.glob(name, recursive=True)) if is_pattern else [name]


def named_in(reward: str | None) -> tuple[list[str], list[str]]:
    """The files whose code --reward runs; its texts, such as lexicon='words.txt'. None of either
    where it is no expression, which is an error once the reward is built."""
    try:
        return files_and_texts(reward or "0")
    except UserError:
        return [], []


def of_records(records: list) -> list:
    """How many examples or pairs, and a hash of all that they hold but their place in a file."""
    names = [f.name for f in fields(records[0]) if f.name != "place"]
    parts = (tuple(getattr(record, name) for name in names) for record in records)
    return [len(records), digest(parts)]


def take(args, data) -> dict[str, list]:
    """The fingerprints of a run, by what a person calls the thing. `data` is of prepare.py."""
    taken = {"examples": of_records([*data.train, *data.held_out])}
    if data.pairs:
        taken["preference pairs"] = of_records([*data.pairs, *data.held_out_pairs])
    for name, path in used_paths(args).items():
        if name.split()[0] in CODE_AND_MODELS:  # the records of the others are counted above
            try:
                taken[name] = [None, of_files(path)]
            except OSError as problem:
                raise UserError(f"{name} cannot be read: {problem.strerror}") from None
    return taken


def of_vocabulary(tokenizer) -> list:
    vocabulary = tokenizer.get_vocab()
    return [len(vocabulary), digest(sorted(vocabulary.items()))]


def of_frozen(model) -> list:
    """Of the weights that are not trained: how many, and a hash of both ends of each. Training
    changes every tensor, so another base differs there; a model on the hub may change too."""
    frozen = [p.detach().flatten() for p in model.parameters() if not p.requires_grad]
    ends = [torch.cat([p[:64], p[-64:]]).float().cpu().numpy().tobytes() for p in frozen]
    return [sum(map(len, frozen)), digest(ends)]


def changes(saved: dict[str, list], now: dict[str, list]) -> dict[str, str]:
    """What differs, each in a few words.

    >>> changes({"examples": [400, "a1"], "--model x": [None, "b"]}, {"examples": [440, "c2"]})
    {'examples': '440 examples instead of 400', '--model x': '--model x is not there'}
    """
    found = {}
    for name, (count, fingerprint) in saved.items():
        if name not in now:
            found[name] = f"{name} is not there"
        elif now[name][0] != count:
            found[name] = f"{now[name][0]} {name} instead of {count}"
        elif now[name][1] != fingerprint:
            found[name] = f"{name} {'has' if count is None else 'have'} changed"
    return found | {name: f"{name} is new" for name in now if name not in saved}


def check_unchanged(saved: dict | None, now: dict, accept: bool, mended: bool, say) -> None:
    """Raises UserError where a resumed run would go on with something else than it began with.

    `accept` allows it. `mended`: the run ended by a failure, so its reward may have been mended.
    What is allowed is said all the same.
    """
    if saved is None:
        say("note: this checkpoint is of an older version: whether its data changed is not known")
        return
    found = changes(saved, now)
    if not found:
        return
    what = "; ".join(found.values())
    if not accept and not (mended and all(name.startswith("--reward ") for name in found)):
        raise UserError(
            f"--resume: not what this run began with: {what}; give it back, start a new run, or "
            "go on with --accept-changes"
        )
    say(f"note: not what this run began with: {what}")
