"""What other machines lack, on this one: MPS has no float64; Windows and NFS hold files that are
open or mapped; a console may not know a character."""

import ast
import errno
import fcntl
import io
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from conftest import FAST, REVIEWS, ROOT, ragged_batch
from test_dpo import pair_batch
from test_steps import random_rollout
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import checkpoints
import ppo
from data import batch_of, make_batch
from data import main as data_main
from distill import distill_step
from dpo import dpo_step
from engine import OPTIMIZERS
from generate import generate
from grpo import grpo_step
from hybrid import HybridModel, forward_rows
from lm import release_files
from lock import LOCK_FILE
from runs import read_rows
from sft import sft_step
from train import main

EVERY = [*FAST, "--steps", "4", "--sft-warmup", "1", "--save-every", "2"]  # both phases, saved


class NoFloat64(TorchDispatchMode):
    """Every operation that makes a float64 tensor is refused, as MPS does."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            assert getattr(x, "dtype", None) != torch.float64, f"{func} made a float64 tensor"
        return result


def test_no_tensor_is_made_where_the_model_is_not(model, tiny, monkeypatch):
    """On a GPU a tensor without a device lies on the CPU. Here it lies on "meta", where nothing
    can be read. Two are made on the CPU on purpose and moved: batches and the order of rows."""
    batch = make_batch(None, *ragged_batch(), max_length=32)
    rollout, pairs, prompts = random_rollout(model), pair_batch(model), ragged_batch()[0]
    optimizer, size = torch.optim.SGD(model.parameters(), lr=1e-3), {"micro_batch_size": 3}
    policy, tokenizer, hidden = HybridModel(tiny[0]), tiny[1], torch.ones(2, 32)
    reference, shuffle = policy.frozen_copy(), torch.randperm
    teacher = model.frozen_copy()

    def on_cpu(*args):
        with torch.device("cpu"):
            return batch_of(*args)

    def scores(prompts, completions, **columns):
        return torch.arange(len(completions), dtype=torch.float32, device="cpu")

    monkeypatch.setattr(ppo, "batch_of", on_cpu)
    monkeypatch.setattr(torch, "randperm", lambda n, **kw: shuffle(n, device="cpu", **kw))
    limits = dict(kl_coef=0.1, max_length=40, max_new_tokens=5, missing_eos_penalty=0.3)
    with torch.device("meta"):
        sft_step(model, batch, optimizer, **size)
        ppo.ppo_step(model, rollout, optimizer, demonstrations=batch, sft_weight=0.3, **size)
        grpo_step(model, rollout, optimizer, group_size=2, **size)
        dpo_step(model, pairs, optimizer, **size)
        distill_step(model, batch, optimizer, teacher=teacher, **size)
        forward_rows(model, batch, 3)
        inputs = batch.input_ids, batch.attention_mask, batch.response_mask
        results = [*model(*inputs, entropy=False), *HybridModel(model.lm).parameters()]
        results += model._score(hidden, batch.input_ids[0, :2], 1.0, entropy=False)
        for temperature in (0, 0.7):
            options = dict(max_new_tokens=5, eos_token_id=[2, 3, 4], temperature=temperature)
            generate(model, prompts, **options)
        model._cache_name = None
        generate(model, prompts, **options)
        collected, metrics = ppo.collect_rollout(
            policy, reference, tokenizer, REVIEWS[:4], scores, **limits
        )
    results += list(vars(collected).values())
    assert {result.device.type for result in results} == {"cpu"}
    assert metrics["ppo/sampler_gap"] < 1e-4 and collected.rewards.isfinite().all()


@pytest.mark.parametrize(
    "flags",
    [
        # torch's Muon multiplies in bf16, which takes minutes on a CPU without such instructions.
        *[f"--ppo-ratio 0.5 --optimizer {name}" for name in OPTIMIZERS if name != "muon"],
        "--ppo-ratio 1 --whiten-rewards --kl-target 2 --ref-ema 0.9 --target-kl 0.1",
        "--algorithm grpo --group-size 2",
        "--algorithm dpo",
        "--model {folder} --max-length 40 --teacher {folder}",
        "--schedule mix --missing-eos-penalty 0.5",
    ],
)
def test_no_float64_tensor_is_made_in_a_whole_run(flags, tiny_folder, tmp_path):
    with NoFloat64(), pytest.raises(AssertionError, match="float64"):
        torch.ones(2).double()
    with NoFloat64():
        words = flags.format(folder=tiny_folder).split()
        main([*EVERY, *words, "--out", str(tmp_path / "run")])


# ---- files


def held_files(path: str | Path) -> set[str]:
    """What this process has mapped or open at that path or below it."""
    root = os.path.realpath(path)
    maps = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    names = {line.split(None, 5)[-1].strip() for line in maps if "/" in line}
    for descriptor in os.listdir("/proc/self/fd"):
        try:
            names.add(os.readlink(f"/proc/self/fd/{descriptor}"))
        except OSError:  # the descriptor of the listing itself
            continue
    return {name for name in names if name == root or name.startswith(root + "/")}


class Windows:
    """Windows' rules for files, put in place of os and shutil."""

    def __init__(self, monkeypatch):
        self.fsync, self.open = os.fsync, os.open
        self.replace, self.rmtree = os.replace, shutil.rmtree
        self.flushed: set[str] = set()
        for name in ("open", "fsync", "replace"):
            monkeypatch.setattr(os, name, getattr(self, f"_{name}"))
        monkeypatch.setattr(shutil, "rmtree", self._rmtree)

    def _open(self, path, flags, *args, **kwargs):
        inside_rmtree = kwargs.get("dir_fd") is not None or flags & os.O_DIRECTORY
        if os.path.isdir(path) and not inside_rmtree and sys._getframe(1).f_code.co_name == "flush":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return self.open(path, flags, *args, **kwargs)

    def _fsync(self, descriptor):
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, "Bad file descriptor")
        self.flushed.add(os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))
        return self.fsync(descriptor)

    def _refuse_held(self, path):
        held = held_files(path)
        if held:
            raise PermissionError(13, f"[WinError 32] used by this process: {held}", str(path))

    def _replace(self, source, target):
        self._refuse_held(source)
        self._refuse_held(target)
        if os.path.isdir(target):
            raise PermissionError(5, "[WinError 5] Access is denied", str(target))
        return self.replace(source, target)

    def _rmtree(self, path, ignore_errors=False, **options):
        held = held_files(path)
        if held and not ignore_errors:
            raise OSError(39, f"Directory not empty: {held}", str(path))
        return self.rmtree(path, ignore_errors=ignore_errors, **options)


needs_proc = pytest.mark.skipif(
    not os.path.exists("/proc/self/maps"), reason="reads /proc/self/maps, which only Linux has"
)


@needs_proc
def test_a_run_is_saved_resumed_and_replaced_by_the_rules_of_windows(tmp_path, monkeypatch):
    """`final` is replaced twice: by a run that was resumed from it, and by a new one."""
    windows, out = Windows(monkeypatch), tmp_path / "my run"
    main([*EVERY, "--keep", "1", "--out", str(out)])
    assert {".config.json.tmp", "model.safetensors", "trainer_state.pt"} <= windows.flushed
    main(["--resume", str(out), "--steps", "6"])
    assert not held_files(out)
    assert read_rows(out / "metrics.jsonl")[-1]["step"] == 6
    main([*EVERY, "--out", str(out), "--overwrite"])
    assert not held_files(out) and (out / "final" / "trainer_state.pt").is_file()


@needs_proc
def test_no_file_of_a_checkpoint_is_held_after_it_was_read(tmp_path, monkeypatch):
    held, load = [], checkpoints.load_checkpoint

    def watch(folder, run):
        load(folder, run)
        held.append(held_files(folder.parent))

    monkeypatch.setattr("runs.load_checkpoint", watch)
    main([*EVERY, "--ref-ema", "0.9", "--out", str(tmp_path / "run")])
    main(["--resume", str(tmp_path / "run"), "--steps", "6"])
    assert held == [{str(tmp_path / "run" / LOCK_FILE)}], "the lock is in nobody's way"


@needs_proc
def test_released_weights_are_the_same_and_hold_no_file(tiny_folder, tmp_path):
    folder = tmp_path / "model"  # its own: models of other tests may hold tiny_folder
    shutil.copytree(tiny_folder, folder)
    model, _ = HybridModel.load(str(folder))
    assert held_files(folder), "safetensors maps its files: else nothing is to release"
    before = {name: x.clone() for name, x in model.state_dict().items()}
    tied = model.lm.get_input_embeddings().weight is model.lm.get_output_embeddings().weight
    release_files(model)
    assert not held_files(folder)
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert tied and (
        model.lm.get_input_embeddings().weight is model.lm.get_output_embeddings().weight
    )


def test_a_file_that_cannot_be_flushed_for_another_reason_is_an_error(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    path = tmp_path / "file"
    path.write_text("text", encoding="utf-8")
    path.chmod(0o444)
    checkpoints.flush(path)  # read-only
    checkpoints.flush(tmp_path)  # a folder
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        checkpoints.flush(path)


# ---- the console


def test_a_character_that_the_console_lacks_is_replaced(tmp_path, monkeypatch):
    """`data.py` shows the prompt; cp1252, the code page of many consoles, has no arrow."""
    data = tmp_path / "data.jsonl"
    data.write_text('{"prompt": "caf\u00e9 \u2192 \u65e5", "target": "\U0001f600"}\n' * 3, "utf-8")
    console = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
    with pytest.raises(UnicodeEncodeError):
        console.write("\u2192")
    monkeypatch.setattr(sys, "stdout", console)
    data_main([str(data)])
    console.flush()
    assert "caf\u00e9 ? ?" in console.buffer.getvalue().decode("cp1252")


def test_every_text_is_read_and_written_in_a_named_encoding():
    """Windows reads and writes in a code page of its own where a call names none."""
    lacking = []
    for path in sorted(ROOT.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            keywords = {keyword.arg for keyword in node.keywords}
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            is_text = name in ("write_text", "read_text") and isinstance(node.func, ast.Attribute)
            is_text = is_text or "text" in keywords and name in ("run", "Popen", "check_output")
            if name in ("open", "fdopen"):
                modes = [ast.unparse(argument) for argument in node.args[:2]]
                is_builtin = isinstance(node.func, ast.Name)
                is_text = is_builtin and not any("b" in mode for mode in modes[1:])
            if is_text and not keywords & {"encoding", None}:
                lacking.append(f"{path.name}:{node.lineno}: {ast.unparse(node)[:60]}")
    assert not lacking
