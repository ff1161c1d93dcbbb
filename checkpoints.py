"""What a run leaves on the disk, so that a crash loses nothing: config, rows, checkpoints.

    out/
      config.json             every flag as resolved, versions, git commit if any
      metrics.jsonl           one object per step; samples.jsonl, skipped.jsonl likewise
      checkpoint-000200/      a plain Hugging Face folder, value_head.safetensors, and
                              trainer_state.pt: everything else that the next step depends on
      final/                  the same form, at the end
      best/                   a model alone, the best by --keep-best (best.py)
      .new-run/               a run of --overwrite until its first evaluation has passed

Nothing else in the folder is ever touched.

A checkpoint and config.json are written under another name, flushed to the disk (fsync), renamed.
A folder is renamed before it is deleted. So a folder called checkpoint-* is complete, whenever the
process dies. Left out on purpose: uploading.

    python train.py --resume out
"""

import errno
import json
import os
import pickle
import random
import re
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors import SafetensorError

from engine import UserError, first_line
from flags import read_json

ROW_FILES = ("metrics.jsonl", "samples.jsonl", "skipped.jsonl")
RUN_FILES = ("config.json", *ROW_FILES, "final", "best")
REPLACED = ("final", "best")  # folders that a newer one of the same name replaces
NEW = ".new-run"
STATE = "trainer_state.pt"
# What torch.load raises for bytes that are not as they were written
DAMAGED = (OSError, RuntimeError, LookupError, EOFError, pickle.UnpicklingError)
DAMAGED += (ValueError, TypeError, AttributeError, AssertionError)
# What a killed process may leave: files and folders that were half written or half deleted
TEMPORARY = re.compile(rf"\.({'|'.join(RUN_FILES)}|checkpoint-\d+)\.(tmp|old)")

# ---------------------------------------------------------------------------------- files


def write_text(path: Path, text: str) -> None:
    """Write a file. A crash leaves the whole new text, or what was there before."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    flush(temporary)
    os.replace(temporary, path)
    flush(path.parent)


def discard(path: Path) -> None:
    """Delete a file or folder. It is renamed first, so that a crash never leaves a half-deleted
    folder under this name. (To `.tmp`: `recover` takes a whole `final` back from `.final.old`.)"""
    renamed = path.with_name(f".{path.name}.tmp")
    remove(renamed)
    os.replace(path, renamed)
    remove(renamed)


def remove(path: Path) -> None:
    """Delete a file, or a folder with all that is in it; of a symbolic link, the link alone.
    Nothing happens where there is none."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """fsync a file or folder: without it a rename may reach the disk before the contents.

    Windows flushes only what is open for writing, and opens no folder: there is nothing to flush.
    """
    try:
        descriptor = os.open(path, os.O_RDWR)
    except (IsADirectoryError, PermissionError):  # a folder, or a file that is read-only
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except PermissionError:
            if path.is_dir():
                return
            raise
    try:
        os.fsync(descriptor)
    except OSError as problem:
        # EINVAL: some network file systems refuse a folder so.
        if problem.errno not in (errno.EBADF, errno.EINVAL, errno.EACCES):
            raise
    finally:
        os.close(descriptor)


# ---------------------------------------------------------------------------------- rows


def append_rows(path: Path, rows: list[dict]) -> None:
    """Add JSON lines. Raises UserError where they cannot be written, ValueError for NaN and
    infinity, which JSON lacks."""
    lines = [_line(row) for row in rows]
    try:
        with path.open("a", encoding="utf-8", errors="backslashreplace") as file:
            file.write("".join(lines))
    except OSError as problem:
        go_on = f"go on with --resume {path.parent}"
        if path.parent.name == NEW:
            go_on = f"start again; the old run is still in {path.parent.parent}"
        raise UserError(
            f"{path} cannot be written: {problem.strerror}; make room and {go_on}"
        ) from None


def _line(row: dict) -> str:
    """The row as JSON with its line break, every character that does not print as its JSON escape:
    a sampled control character must not act on the terminal of whoever looks at the file."""
    line = json.dumps(row, ensure_ascii=False, allow_nan=False)
    printable = "".join(char if char.isprintable() else json.dumps(char)[1:-1] for char in line)
    return printable + "\n"


def read_rows(path: Path) -> list[dict]:
    """The complete lines of a .jsonl file; none where there is no file."""
    if not path.is_file():
        return []
    lines = path.read_bytes().split(b"\n")[:-1]  # the last line is not complete without its break
    rows = []
    for line in lines:
        try:
            rows.append(json.loads(line))
        except ValueError:
            break  # a full disk truncated this line; do not trust what was written after it
    return rows


def forget_after(out: Path, step: int) -> None:
    """Drop the rows that a run resumed at `step` will write again; with them the samples of that
    step, if its evaluation did not come to its row."""
    rows = {name: read_rows(out / name) for name in ROW_FILES}
    is_measured = any(
        row["step"] == step and row.get("phase") == "eval" for row in rows["metrics.jsonl"]
    )
    for name in ROW_FILES:
        last = step - 1 if name == "samples.jsonl" and not is_measured else step
        if (out / name).exists():
            lines = [_line(row) for row in rows[name] if row["step"] <= last]
            write_text(out / name, "".join(lines))


# ---------------------------------------------------------------------------------- config.json


def run_paths(out: Path) -> list[Path]:
    """What a run has written in its folder, as far as it is there."""
    paths = [*[out / name for name in RUN_FILES], *checkpoints(out)]
    return [path for path in paths if path.exists() or path.is_symlink()]


def check_free(out: Path, overwrite: bool, used: dict[str, Path]) -> None:
    """Raises UserError unless a new run may be written to `out`.

    An old run needs `overwrite`, and it is not deleted where this run reads from it: `used` are the
    paths that flags name, by flag. What no run has written is never deleted.
    """
    old = run_paths(out)
    if not old:
        return
    config = read_json(out / "config.json")
    if "model_type" in config:
        raise UserError(f"--out {out} holds a model, and no run; give another folder")
    if "ppo_ratio" not in config:
        raise UserError(
            f"--out {out} already holds a run ({old[0].name}), but none of train.py; give another "
            "folder"
        )
    if not overwrite:
        raise UserError(
            f"--out {out} already holds a run ({old[0].name}); give another folder, "
            f"--resume {out}, or --overwrite"
        )
    for flag, path in used.items():
        place = path.resolve()
        for doomed in [out, *old]:
            if place == doomed.resolve() or (doomed != out and doomed.resolve() in place.parents):
                raise UserError(
                    f"{flag} is in the run that --overwrite would delete; give another --out"
                )


def open_run_folder(out: Path, flags: dict) -> Path:
    """Create the folder and config.json. -> where to write: `out`, or beside an old run
    `out`/.new-run, until `replace_old_run`."""
    try:
        remove(out / NEW)
        place = out / NEW if run_paths(out) else out
        place.mkdir(parents=True, exist_ok=True)
        versions = {
            "python": sys.version.split()[0],
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }
        write_config(place, {**flags, "versions": versions, "git_commit": git_commit()})
    except OSError as problem:
        raise UserError(f"--out {out} cannot be written: {problem.strerror or problem}") from None
    return place


def replace_old_run(out: Path) -> None:
    """Delete the old run, and put what was written to `out`/.new-run in its place.

    config.json comes last: whenever the process dies, the folder holds the one run or the other.
    Raises UserError where something cannot be deleted.
    """
    try:
        remove_leftovers(out)
        for path in run_paths(out):
            if path.name != "config.json":
                discard(path)
        written = sorted((out / NEW).iterdir(), key=lambda path: path.name == "config.json")
        for path in written:
            os.replace(path, out / path.name)
        (out / NEW).rmdir()
    except OSError as problem:
        raise UserError(
            f"the old run in {out} cannot be deleted ({problem.strerror}: {problem.filename}); "
            "mend that and start again with --overwrite"
        ) from None


def write_config(out: Path, config: dict) -> None:
    write_text(out / "config.json", json.dumps(config, indent=2) + "\n")


def git_commit() -> str | None:
    """The commit of this code, None where there is no git or no repository."""
    if shutil.which("git") is None:
        return None
    command = ["git", "rev-parse", "HEAD"]
    options = dict(cwd=Path(__file__).parent, capture_output=True, text=True, encoding="utf-8")
    done = subprocess.run(command, **options)
    return done.stdout.strip() or None


# ---------------------------------------------------------------------------------- save and load


def save_checkpoint(folder: Path, run, states: dict, keep: int) -> None:
    """Write the model of a run (runs.py) as a plain Hugging Face folder with a trainer_state.pt.

    `states` has the state_dict of everything in `run.stateful()`, by name. The newest `keep`
    folders checkpoint-* remain. Raises UserError where the folder cannot be written.
    """
    reference = None
    if run.reference is not None and not run.algorithm.from_teacher:  # a teacher never changes
        reference = run.reference.state_dict()
    state = {
        "fingerprint": run.fingerprint,
        "counters": run.counters(),
        "stateful": states,
        "order": run.order_generator.get_state(),
        "rng": random_state(),
        "reference": reference,
    }
    with new_folder(folder, keep) as unfinished:
        run.model.save(unfinished, run.tokenizer)
        torch.save(state, unfinished / STATE)


@contextmanager
def new_folder(folder: Path, keep: int | None = None):
    """`with new_folder(path) as unfinished:` write into `unfinished`, and it becomes `path`.

    A crash leaves the whole new folder, or the one that was there before (`recover`). Then the
    newest `keep` checkpoints beside it remain (None: all). Raises UserError where it cannot be
    written.
    """
    unfinished = folder.with_name(f".{folder.name}.tmp")
    replaced = folder.with_name(f".{folder.name}.old")
    try:
        remove(unfinished)
        yield unfinished
        for path in [*unfinished.rglob("*"), unfinished]:
            flush(path)
        # One of REPLACED; recover() repairs a crash between the two renames.
        if folder.exists() or folder.is_symlink():
            remove(replaced)
            os.replace(folder, replaced)
        os.replace(unfinished, folder)
        flush(folder.parent)
        remove(replaced)
        for old in checkpoints(folder.parent)[: -keep if keep else 0]:
            discard(old)
    except (OSError, RuntimeError, SafetensorError) as problem:  # any of them: full disk
        shutil.rmtree(unfinished, ignore_errors=True)
        newest = newest_checkpoint(folder.parent)
        hint = "there is no older one"
        if newest is not None:
            hint = (
                f"the newest complete checkpoint is {newest}; "
                f"make room and go on with --resume {folder.parent}"
            )
        raise UserError(f"{folder} could not be written ({first_line(problem)}); {hint}") from None


def load_checkpoint(folder: Path, run) -> None:
    """Restore in `run` what the next step depends on beside the model, which `prepare` took from
    this folder. Raises UserError where the file is damaged, or does not fit config.json."""
    state = read_state(folder)
    try:
        for name, component in run.stateful().items():
            component.load_state_dict(state["stateful"][name])
        run.order_generator.set_state(state["order"])
        set_random_state(state["rng"])
        saved = state["reference"]
        if saved is not None:
            if run.reference is None or _shapes(run.reference.state_dict()) != _shapes(saved):
                # It is a copy of the policy, which has replaced a --ref-model of another shape.
                run.reference = run.model.frozen_copy()
            run.reference.load_state_dict(saved)
        for name, value in state["counters"].items():
            setattr(run, name, value)
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as problem:
        raise UserError(
            f"{folder / STATE} does not fit {folder.parent / 'config.json'} "
            f"({type(problem).__name__}: {first_line(problem)}): one of them was edited, or is of "
            f"another version; start a new run with --model {folder}"
        ) from None


def checkpoints(out: Path) -> list[Path]:
    """The folders checkpoint-<number>, oldest first. Folders with other names are not ours."""
    numbered = [path for path in out.glob("checkpoint-*") if path.name[11:].isdecimal()]
    return sorted(numbered, key=lambda path: int(path.name[11:]))


def newest_checkpoint(out: Path) -> Path | None:
    """The complete checkpoint, `final` included, with the most steps. Raises UserError for one that
    cannot be read."""
    newest, most = None, -1
    for folder in [*checkpoints(out), out / "final"]:
        if (folder / STATE).is_file():
            # Mapped, since only one number is wanted; nothing holds the file afterwards.
            state = read_state(folder, mmap=True)
            try:
                step = state["counters"]["step"]
            except (KeyError, TypeError):
                raise UserError(f"{folder / STATE} has no number of steps; move it away") from None
            if step > most:
                newest, most = folder, step
    return newest


def recover(out: Path) -> None:
    """Clean up after a killed process: `final` and `best` get their name back if the process died
    while they were being replaced; what was half written or half deleted is deleted."""
    for name in REPLACED:
        if (out / f".{name}.old" / "config.json").is_file() and not (out / name).exists():
            os.replace(out / f".{name}.old", out / name)
    remove(out / NEW)
    remove_leftovers(out)


def remove_leftovers(out: Path) -> None:
    for path in list(out.iterdir()):
        if TEMPORARY.fullmatch(path.name):
            remove(path)


def read_state(folder: Path, mmap: bool = False) -> dict:
    """`mmap`: tensors are read when they are used, and hold the file. Windows and NFS cannot delete
    or rename such a file, and the optimiser would keep it for the whole run."""
    path = folder / STATE
    try:
        return torch.load(path, weights_only=True, map_location="cpu", mmap=mmap)
    except DAMAGED as problem:
        raise UserError(
            f"{path} is damaged ({first_line(problem)}); "
            f"move {folder} away to resume from an older checkpoint"
        ) from None


def _shapes(state: dict) -> dict:
    return {name: value.shape for name, value in state.items()}


def random_state() -> dict:
    """What a user's reward may draw from. The seed of the responses follows from the step."""
    kind, keys, *position = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (kind, keys.tolist(), *position),
        "torch": torch.get_rng_state(),
    }


def set_random_state(state: dict) -> None:
    """The inverse of `random_state`."""
    random.setstate(state["python"])
    kind, keys, *position = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *position))
    torch.set_rng_state(state["torch"])
