"""The worked forks of docs/extensions.md: built by the recipe, then trained, resumed, checked.

A fork is one new file, one import and one entry in train.py; whatever else depends on the algorithm
follows from the entry.
"""

import importlib.util
import json
import re
import shutil

import pytest
import torch
from conftest import FAST, ROOT
from script import run_script

TEXT = (ROOT / "docs" / "extensions.md").read_text(encoding="utf-8")


def block(name: str, kind: str) -> str:
    """The code block of a fork: its file, or its diff of train.py."""
    blocks = re.findall(rf"```{kind}\n(.*?)```", TEXT, re.DOTALL)
    return next(b for b in blocks if re.search(rf"^# {name}\.py$|^\+import {name}$", b, re.M))


def apply(diff: str, source: str) -> str:
    """Put the `+` lines of a diff behind the line of context that stands before them."""
    for context, added in re.findall(r"^ (.*\n)((?:\+.*\n)+)", diff, re.MULTILINE):
        lines = "".join(line[1:] for line in added.splitlines(keepends=True))
        assert source.count(f"\n{context}") == 1, context
        source = source.replace(f"\n{context}", f"\n{context}{lines}")
    return source


@pytest.fixture(scope="module")
def fork(tmp_path_factory):
    """A copy of the code in which all forks are built."""
    folder = tmp_path_factory.mktemp("fork")
    for path in ROOT.glob("*.py"):
        shutil.copy(path, folder)
    source = (folder / "train.py").read_text(encoding="utf-8")
    for name in ("ipo", "rloo", "opd"):
        (folder / f"{name}.py").write_text(block(name, "python"), encoding="utf-8")
        diff = block(name, "diff")
        source = apply(diff, source)
        added = [line for line in diff.splitlines() if line.startswith("+")]
        assert len(added) <= 12 and sum("import" in line for line in added) == 1
    (folder / "train.py").write_text(source, encoding="utf-8")
    return folder


def run(folder, *flags):
    return run_script(["train.py", *map(str, flags)], folder)


def rows_of(folder, phase: str) -> list[dict]:
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [row for row in map(json.loads, lines) if row["phase"] == phase]


FLAGS = {
    "ipo": ["--beta", "0.2"],
    "rloo": ["--group-size", "2", "--target-kl", "0.5"],
    "opd": ["--reward", "0*length", "--ref-model", "{teacher}"],
}


@pytest.fixture(scope="module")
def teacher(fork, tmp_path_factory):
    out = tmp_path_factory.mktemp("teacher") / "out"
    done = run(fork, *FAST, "--ppo-ratio", 0, "--lr", 2e-2, "--out", out)
    assert done.returncode == 0, done.stderr[-2000:]
    return out / "final"


@pytest.mark.slow
@pytest.mark.parametrize("name", FLAGS)
def test_a_fork_by_the_recipe_trains_and_resumes_bit_by_bit(fork, teacher, tmp_path, name):
    own = [word.format(teacher=teacher) for word in FLAGS[name]]
    flags = [*FAST, "--sft-warmup", 1, "--algorithm", name, *own, "--save-every", 3]
    for out in ("whole", "half"):
        done = run(fork, *flags, "--out", tmp_path / out)
        assert done.returncode == 0, done.stderr[-2000:]
    rows = rows_of(tmp_path / "whole", name)
    assert len(rows) >= 2 and all(row[f"{name}/grad_norm"] > 0 for row in rows)
    assert rows[0].get("rloo/first_ratio_gap", 0) < 1e-5
    shutil.rmtree(tmp_path / "half" / "final")
    done = run(fork, "--resume", tmp_path / "half")
    assert done.returncode == 0, done.stderr[-2000:]
    whole, half = [tmp_path / out / "final" / "model.safetensors" for out in ("whole", "half")]
    assert whole.read_bytes() == half.read_bytes()


REFUSED = {
    "--algorithm rloo --group-size 2 --gamma 0.9": "--gamma belongs to ppo and does nothing here",
    "--algorithm rloo --group-size 2 --vf-coef 0.3": "--vf-coef belongs to ppo",
    "--algorithm rloo": "give --group-size 2 or more",
    "--algorithm rloo --group-size 2 --beta 0.3": "--beta belongs to ipo and dpo",
    "--algorithm ipo --kl-coef 0.3": "--kl-coef belongs to opd and rloo and ppo and grpo",
    "--algorithm ipo --data examples.jsonl": "examples.jsonl does not exist",
    "--algorithm ipo --schedule gate": "samples nothing",
}


@pytest.mark.slow
@pytest.mark.parametrize("flags", REFUSED)
def test_a_fork_refuses_the_flags_that_do_nothing_in_it(fork, tmp_path, flags):
    done = run(fork, *FAST, *flags.split(), "--out", tmp_path / "out")
    [error] = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 2 and REFUSED[flags] in error, done.stderr
    assert not (tmp_path / "out").exists()


def load(fork, name: str):
    spec = importlib.util.spec_from_file_location(f"fork_{name}", fork / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_ipo_by_hand(fork):
    logps = torch.tensor([[-3.1, -7.3], [-4.7, -2.9], [-3.7, -8.0], [-4.2, -3.3]])
    losses, chosen, rejected = load(fork, "ipo").ipo_loss(*logps, beta=0.3)
    # margins: (0.6 - -0.5) = 1.1 and (0.7 - 0.4) = 0.3; the target is 1 / 0.6
    expected = torch.tensor([(1.1 - 1 / 0.6) ** 2, (0.3 - 1 / 0.6) ** 2])
    torch.testing.assert_close(losses, expected)
    torch.testing.assert_close(chosen, torch.tensor([0.18, 0.21]))
    torch.testing.assert_close(rejected, torch.tensor([-0.15, 0.12]))


def test_rloo_by_hand(fork):
    nan = float("nan")
    rewards = torch.tensor([1.3, -0.4, 2.2, 0.7, nan, 0.2, nan, nan, 5.0])
    advantages = load(fork, "rloo").leave_one_out(rewards, group_size=3)
    expected = [1.3 - 0.9, -0.4 - 1.75, 2.2 - 0.45, 0.7 - 0.2, 0, 0.2 - 0.7, 0, 0, 0]
    torch.testing.assert_close(advantages, torch.tensor(expected))


def test_opd_by_hand(fork):
    """Plain SGD from equal old and new: the gradient is -mean((log p_t - log p_s) grad log p_s)."""
    from conftest import build_lm, ragged_batch

    from data import make_batch
    from hybrid import HybridModel
    from ppo import Rollout

    model = HybridModel(build_lm("gpt2"))
    batch = make_batch(None, *ragged_batch(3, rows=5), max_length=32)
    inputs = batch.input_ids, batch.attention_mask, batch.response_mask
    logprobs = model(*inputs).logprobs
    noise = torch.randn(logprobs.shape, generator=torch.Generator().manual_seed(1)) * 0.7
    ref_logprobs = (logprobs.detach() + noise) * batch.response_mask
    wanted = -(noise * logprobs * batch.response_mask).sum() / batch.response_mask.sum()
    gradient = torch.autograd.grad(wanted, model.lm.transformer.h[0].mlp.c_fc.weight)[0]
    unused = torch.full_like(logprobs, 3.3).detach()
    columns = dict(logprobs=logprobs.detach(), ref_logprobs=ref_logprobs, values=unused)
    columns |= dict(rewards=unused, advantages=unused, returns=unused)
    weight = model.lm.transformer.h[0].mlp.c_fc.weight
    before = weight.detach().clone()
    load(fork, "opd").opd_step(
        model,
        Rollout(**vars(batch), **columns),
        torch.optim.SGD(model.parameters(), lr=0.5),
        ppo_epochs=1,
        minibatches=1,
        max_grad_norm=1e9,
    )
    torch.testing.assert_close(before - weight, 0.5 * gradient, atol=1e-6, rtol=1e-4)
    assert gradient.abs().max() > 1e-3
