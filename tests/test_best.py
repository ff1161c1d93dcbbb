"""--keep-best: the model in best/ is the one that the log calls best, also after a crash."""

import json
import math
import os
import shutil
from types import SimpleNamespace

import pytest
import torch
from conftest import FAST
from transformers import AutoModelForCausalLM

import best
import checkpoints
from flags import join_metric
from hybrid import HybridModel
from runs import read_rows
from train import main

EVERY_STEP = [*FAST, "--eval-every", "1", "--save-every", "1", "--keep", "9"]


def weights(folder) -> dict:
    return HybridModel.load(str(folder))[0].state_dict()


def assert_same_weights(a, b) -> None:
    a, b = weights(a), weights(b)
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("metric", ["eval/response_length", "-eval/response_length", "-eval/kl"])
def test_best_is_the_checkpoint_of_the_best_evaluation_in_the_log(tmp_path, capsys, metric):
    out = tmp_path / "run"
    flags = ["--sft-warmup", "1", "--max-new-tokens", "12", "--keep-best", metric]
    main([*EVERY_STEP, *flags, "--out", str(out)])
    name = metric.removeprefix("-")
    values = {
        row["step"]: row[name]
        for row in read_rows(out / "metrics.jsonl")
        if row["phase"] == "eval" and row["step"] > 0 and name in row
    }
    value = (min if metric.startswith("-") else max)(values.values())
    step = min(step for step in values if values[step] == value)
    assert len(set(values.values())) > 1
    folder = out / "final" if step == 6 else out / f"checkpoint-{step:06d}"
    assert_same_weights(out / "best", folder)
    assert f"best {name}: {value:.4g} at step {step}; model in {out / 'best'}" in (
        capsys.readouterr().out
    )
    AutoModelForCausalLM.from_pretrained(out / "best")
    assert not (out / "best" / "trainer_state.pt").exists()
    flags = ["--model", str(out / "best"), "--max-length", "40", "--steps", "1"]
    main([*FAST, *flags, "--out", str(tmp_path / "from-best")])


def test_only_a_finite_and_better_value_replaces_the_best(tmp_path, tiny):
    run = SimpleNamespace(model=HybridModel(tiny[0]), tokenizer=tiny[1], before=None)
    args = SimpleNamespace(keep_best="eval/x", ppo_ratio=0)
    seen = []
    for step, value in enumerate([9.0, math.nan, None, 0.5, math.inf, 0.5, 0.7, 0.6, -math.inf]):
        run.step, run.after = step, {} if value is None else {"eval/x": value}
        best.keep_best(run, args, tmp_path)
        record = best.read_best(tmp_path)
        seen.append(record and record["step"])
    assert seen == [None, None, None, 3, 3, 3, 6, 6, 6], "step 0 counts for nothing"
    args.keep_best = "-eval/x"  # another question: what was kept answers it no longer
    run.step, run.after = 9, {"eval/x": 8.0}
    best.keep_best(run, args, tmp_path)
    assert best.read_best(tmp_path) == {"metric": "-eval/x", "value": 8.0, "step": 9}


@pytest.mark.parametrize(
    "flags, listed, unlisted",
    [
        ("--ppo-ratio 0 --keep-best -eval/kl", "eval/nll", "eval/reward"),
        ("--keep-best eval/rewrd", "eval/reward, ", "eval/preference_accuracy"),
        ("--algorithm dpo --keep-best -fluent", "eval/kl, eval/preference_accuracy", "eval/x"),
    ],
)
def test_an_unknown_metric_is_one_line_before_the_first_step(
    tmp_path, capsys, flags, listed, unlisted
):
    with pytest.raises(SystemExit) as caught:
        main([*FAST, *flags.split(), "--out", str(tmp_path / "run")])
    err = capsys.readouterr().err
    error = err[err.index("error: ") :]
    assert caught.value.code == 2 and error.count("\n") == 1
    assert "is no metric of this run's evaluations" in error
    assert listed in error and unlisted not in error.partition("they have")[2]
    assert {row["step"] for row in read_rows(tmp_path / "run" / "metrics.jsonl")} == {0}


def test_a_metric_that_needs_a_reference_is_known_before_there_is_one(tmp_path):
    flags = ["--algorithm", "dpo", "--keep-best", "eval/preference_margin"]
    main([*FAST, *flags, "--out", str(tmp_path / "run")])
    assert best.read_best(tmp_path / "run")["step"] == 6


def test_the_best_survives_what_a_crash_leaves_and_a_resumed_run_agrees(tmp_path, capsys):
    whole, out = tmp_path / "whole", tmp_path / "out"
    flags = [*EVERY_STEP, "--keep-best", "eval/response_length"]
    main([*flags, "--out", str(whole)])
    shutil.copytree(whole, out)
    # Killed between the two renames of best/, and the newest checkpoint is an old one.
    shutil.rmtree(out / "final")
    for step in (3, 4, 5):
        shutil.rmtree(out / f"checkpoint-{step:06d}")
    os.rename(out / "best", out / ".best.old")
    (out / ".best.tmp").mkdir()
    with pytest.raises(SystemExit):
        main(["--resume", str(out), "--keep-best", "eval/nil"])
    assert "--keep-best eval/nil is no metric" in capsys.readouterr().err
    main(["--resume", str(out)])
    assert not list(out.glob(".*"))
    assert best.read_best(out) == best.read_best(whole)
    assert_same_weights(out / "best", whole / "best")
    # A run that resumes may begin to keep one, or by another metric.
    main(["--resume", str(out), "--steps", "7", "--keep-best", "-eval/nll"])
    assert best.read_best(out)["metric"] == "-eval/nll" and best.read_best(out)["step"] == 7
    assert json.loads((out / "config.json").read_text())["keep_best"] == "-eval/nll"


def test_overwrite_removes_the_best_of_the_old_run(tmp_path, capsys):
    out = tmp_path / "run"
    main([*FAST, "--keep-best", "-eval/nll", "--out", str(out)])
    (out / ".best.old").mkdir()  # left by a killed --overwrite: recover() must not bring it back
    (out / ".best.old" / "config.json").touch()
    with pytest.raises(SystemExit):
        main([*FAST, "--out", str(out)])
    assert (out / "best").is_dir() and "already holds a run" in capsys.readouterr().err
    main([*FAST, "--overwrite", "--out", str(out)])
    assert not (out / "best").exists() and not list(out.glob(".*"))
    assert checkpoints.newest_checkpoint(out) == out / "final"


def test_a_damaged_record_is_one_line(tmp_path):
    (tmp_path / "best").mkdir()
    for text in ("{", "[1]", '{"metric": "eval/x"}'):
        (tmp_path / "best" / "best.json").write_text(text)
        with pytest.raises(best.UserError, match="best.json is damaged"):
            best.read_best(tmp_path)


def test_a_metric_after_a_minus_is_no_flag():
    argv = "--keep-best -eval/nll --keep 3 --keep-best --overwrite --kl-coef -1".split()
    assert join_metric(argv) == [
        "--keep-best=-eval/nll", "--keep", "3", "--keep-best", "--overwrite", "--kl-coef", "-1"
    ]  # fmt: skip
