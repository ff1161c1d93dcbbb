"""What a run leaves behind, so that nothing is lost: its folder, rows of metrics, checkpoints, and how it stops.

    out/
      config.json             every flag as resolved, versions, git commit if any
      metrics.jsonl           one object per step; samples.jsonl, skipped.jsonl likewise
      checkpoint-000200/      a plain Hugging Face folder, value_head.safetensors, and trainer_state.pt: what the next step depends on
      final/                  the same form, at the end

Every file that counts is written under another name, flushed to the disk (fsync) and renamed, and is renamed before it is deleted, so
a folder called checkpoint-* is complete whenever the process dies. A torn last line of a .jsonl is dropped when the run goes on.
Left out on purpose: uploading, best-of selection.

    python train.py --resume out
"""

import importlib
import json
import math
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors import SafetensorError

from engine import UserError, first_line
from hybrid import HybridModel


def open_run_folder(out: Path, flags: dict, overwrite: bool) -> None:
    """Create the folder with its config.json. Raises UserError rather than write over anything without `overwrite`."""
    files = [
        out / name
        for name in ("config.json", "metrics.jsonl", "samples.jsonl", "skipped.jsonl", "final")
    ]
    try:
        old = [path for path in [*files, *out.glob("checkpoint-*")] if path.exists()]
        if old and not overwrite:
            raise UserError(
                f"--out {out} already holds a run ({old[0].name}); give another folder, --resume {out}, or --overwrite"
            )
        out.mkdir(parents=True, exist_ok=True)
        for path in old:
            discard(path)
        versions = {
            "python": sys.version.split()[0],
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }
        write_config(out, {**flags, "versions": versions, "git_commit": git_commit()})
    except OSError as problem:
        raise UserError(f"--out {out} cannot be written: {problem.strerror or problem}") from None


def write_config(out: Path, config: dict) -> None:
    write_text(out / "config.json", json.dumps(config, indent=2) + "\n")


def read_config(out: Path) -> dict:
    """The flags of a run. Raises UserError where there is none."""
    try:
        config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        config = None
    if not isinstance(config, dict) or "ppo_ratio" not in config:
        raise UserError(
            f"--resume {out}: nothing to resume there; expected a run folder with a config.json"
        )
    config["ppo_ratio"] = (
        tuple(config["ppo_ratio"]) if isinstance(config["ppo_ratio"], list) else config["ppo_ratio"]
    )
    return config


def git_commit() -> str | None:
    """The commit of this code, None where there is no git or no repository."""
    if shutil.which("git") is None:
        return None
    done = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True
    )
    return done.stdout.strip() or None


# ------------------------------------------------------------------------------------------------ files that survive


def write_text(path: Path, text: str) -> None:
    """The whole text or none of it."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    _flush(temporary)
    os.replace(temporary, path)
    _flush(path.parent)


def discard(path: Path) -> None:
    """Delete a file or folder so that no half of it keeps its name."""
    doomed = path.with_name(f".{path.name}.old")
    shutil.rmtree(doomed, ignore_errors=True)
    os.replace(path, doomed)
    shutil.rmtree(doomed) if doomed.is_dir() else doomed.unlink()


def _flush(path: Path) -> None:
    """fsync of a file or folder: a rename may reach the disk before the contents do."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def append_rows(path: Path, rows: list[dict]) -> None:
    """Add JSON lines. Raises UserError when the disk does not take them, and ValueError for a number that JSON lacks."""
    text = "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
    try:
        with path.open("a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)
    except OSError as problem:
        raise UserError(
            f"{path} cannot be written: {problem.strerror}; make room and go on with --resume {path.parent}"
        ) from None


def read_rows(path: Path) -> list[dict]:
    """The complete lines of a .jsonl file; none where there is no file."""
    if not path.is_file():
        return []
    lines = path.read_bytes().split(b"\n")[:-1]  # what follows the last line break was torn
    rows = []
    for line in lines:
        try:
            rows.append(json.loads(line))
        except ValueError:
            break  # torn by a full disk, and written on behind: nothing after it can be trusted
    return rows


def forget_after(out: Path, step: int) -> None:
    """Drop the rows that a run resumed at `step` will write again."""
    for name in ("metrics.jsonl", "samples.jsonl", "skipped.jsonl"):
        kept = [row for row in read_rows(out / name) if row["step"] <= step]
        if (out / name).exists():
            write_text(
                out / name, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept)
            )


# ------------------------------------------------------------------------------------------------ checkpoints


def save_checkpoint(
    folder: Path,
    model,
    tokenizer,
    reference,
    counters: dict,
    states: dict,
    order: torch.Generator,
    keep: int,
) -> None:
    """The model as a plain Hugging Face folder, and `trainer_state.pt`: everything else that the next step depends on.

    `states` are state_dicts by name, `order` draws the order of PPO's minibatches; `keep` newest checkpoint-* remain. Raises UserError when the disk refuses.
    """
    unfinished = folder.with_name(f".{folder.name}.tmp")
    state = {
        "counters": counters,
        "stateful": states,
        "order": order.get_state(),
        # For rewards that users write. Responses are drawn from a seed that follows from the step.
        "rng": {
            "python": random.getstate(),
            "numpy": _numpy_state(),
            "torch": torch.get_rng_state(),
        },
        "reference": reference and reference.state_dict(),
    }
    try:
        shutil.rmtree(unfinished, ignore_errors=True)
        model.save(unfinished, tokenizer)
        torch.save(state, unfinished / "trainer_state.pt")
        for path in [*unfinished.rglob("*"), unfinished]:
            _flush(path)
        replaced = folder.with_name(f".{folder.name}.old")
        if (
            folder.exists()
        ):  # only `final` is ever there already; for an instant it has no name, and recover() knows
            shutil.rmtree(replaced, ignore_errors=True)
            os.replace(folder, replaced)
        os.replace(unfinished, folder)
        _flush(folder.parent)
        shutil.rmtree(replaced, ignore_errors=True)
        for old in checkpoints(folder.parent)[:-keep]:
            discard(old)
    except (
        OSError,
        RuntimeError,
        SafetensorError,
    ) as problem:  # torch and safetensors have errors of their own for a full disk
        shutil.rmtree(unfinished, ignore_errors=True)
        newest = newest_checkpoint(folder.parent)
        rest = (
            f"the newest complete checkpoint is {newest}; make room and go on with --resume {folder.parent}"
            if newest
            else "there is no older one"
        )
        raise UserError(f"{folder} could not be written ({first_line(problem)}); {rest}") from None


def load_checkpoint(
    folder: Path,
    model: HybridModel,
    reference: HybridModel | None,
    stateful: dict,
    order: torch.Generator,
):
    """The inverse: everything is put back in place, `stateful` things by their load_state_dict. -> counters, reference."""
    state = _read_state(folder)
    model.load_state_dict(HybridModel.load(str(folder), "checkpoint")[0].state_dict())
    for name, thing in stateful.items():
        thing.load_state_dict(state["stateful"][name])
    order.set_state(state["order"])
    random.setstate(state["rng"]["python"])
    kind, keys, *rest = state["rng"]["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(state["rng"]["torch"])
    if state["reference"] is not None:
        shapes = {name: value.shape for name, value in state["reference"].items()}
        if (
            reference is None
            or {name: value.shape for name, value in reference.state_dict().items()} != shapes
        ):
            reference = model.frozen_copy()  # it was taken from the policy; a --ref-model of another shape has been replaced since
        reference.load_state_dict(state["reference"])
    return state["counters"], reference


def checkpoints(out: Path) -> list[Path]:
    """The folders checkpoint-<number>, oldest first; folders of other names are somebody else's."""
    return sorted(
        (path for path in out.glob("checkpoint-*") if path.name[11:].isdecimal()),
        key=lambda path: int(path.name[11:]),
    )


def recover(out: Path) -> None:
    """Clean up behind a killed process: `final` gets its name back if it died while being replaced, half-deleted things go."""
    if (out / ".final.old" / "trainer_state.pt").is_file() and not (out / "final").exists():
        os.replace(out / ".final.old", out / "final")
    for rest in [*out.glob(".*.old"), *out.glob(".*.tmp")]:
        shutil.rmtree(rest) if rest.is_dir() else rest.unlink()


def newest_checkpoint(out: Path) -> Path | None:
    """The complete checkpoint, `final` included, with the most steps. Raises UserError for one that cannot be read."""
    newest, most = None, -1
    for folder in [*checkpoints(out), out / "final"]:
        if (folder / "trainer_state.pt").is_file():
            step = _read_state(folder)["counters"]["step"]
            newest, most = (folder, step) if step > most else (newest, most)
    return newest


def _read_state(folder: Path) -> dict:
    try:
        return torch.load(
            folder / "trainer_state.pt", weights_only=True, map_location="cpu", mmap=True
        )
    except (OSError, RuntimeError, KeyError, EOFError, pickle.UnpicklingError) as problem:
        reason = first_line(problem)
        raise UserError(
            f"{folder}/trainer_state.pt is damaged ({reason}); move {folder} away to resume from an older checkpoint"
        ) from None


def _numpy_state() -> tuple:
    kind, keys, *rest = np.random.get_state()
    return (kind, keys.tolist(), *rest)


# ------------------------------------------------------------------------------------------------ how a run stops


class Stop:
    """`signal` is None until the user (Ctrl-C) or the machine (SIGTERM) asks the run to end."""

    def __init__(self):
        self.signal: int | None = None


@contextmanager
def graceful_stop():
    """Let the first SIGINT or SIGTERM wait until the step is done and saved; a second one acts at once."""
    stop = Stop()
    if (
        threading.current_thread() is not threading.main_thread()
    ):  # only the main thread may set handlers
        yield stop
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def ask(number, frame):
        stop.signal = number
        for each, handler in before.items():
            signal.signal(each, handler)

    for number in before:
        signal.signal(number, ask)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# ------------------------------------------------------------------------------------------------ metrics


def finite(metrics: dict[str, float]) -> dict[str, float]:
    """JSON knows no NaN: a number that is none, as the loss of a skipped step may be, is left out."""
    return {name: value for name, value in metrics.items() if math.isfinite(value)}


class MetricLog:
    """metrics.jsonl is the truth; Weights & Biases or TensorBoard may mirror it. One global step for both phases."""

    def __init__(self, out: Path, mirror: str, config: dict):
        self.path, self._send = out / "metrics.jsonl", lambda step, metrics: None
        if mirror == "wandb":
            run = require("wandb").init(
                project="hybridtrainer", dir=str(out), config=config
            )  # WANDB_MODE=offline works
            self._send = lambda step, metrics: run.log(metrics, step=step)
        if mirror == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter

            writer = SummaryWriter(str(out / "tensorboard"))

            def send(step: int, metrics: dict) -> None:
                for name, value in metrics.items():
                    writer.add_scalar(name, value, step)
                writer.flush()

            self._send = send

    def write(self, step: int, phase: str, metrics: dict[str, float]) -> None:
        append_rows(self.path, [{"step": step, "phase": phase, **finite(metrics)}])
        self._send(step, finite(metrics))


def require(package: str):
    """The optional package of `--log`. Raises UserError that says how to install it."""
    try:
        return importlib.import_module(package)
    except ImportError:
        raise UserError(
            f"--log {package} needs the package {package}: pip install {package}"
        ) from None
