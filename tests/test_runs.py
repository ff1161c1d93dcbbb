"""Runs that are killed, interrupted, starved of disk or fed with NaN: nothing is lost, and the
end is that of an undisturbed run."""

import doctest
import json
import math
import os
import random
import resource
import shutil
import signal
import sys
import threading
import time
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import FAST
from safetensors.torch import load_file
from script import run_script
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM

import dpo
import engine
import hybrid
import parallel
import plot
import runs
import train
from engine import UserError
from evaluate import main as evaluate_main
from health import RULES, verdict
from hybrid import HybridModel, merge
from lm import build_tiny
from runs import Stop
from train import main

SHORT = (
    "--limit 60 --steps 14 --sft-warmup 4 --batch-size 4 --micro-batch-size 3 "
    "--max-new-tokens 6 --eval-size 4 --eval-every 5 --save-every 3"
).split()
SHORT += [
    "--reward",
    "clip(ema(sentiment), -3, 3) + mixture(length, repetition)",
    "--ref-refresh",
    "2",
    "--device",
    "cpu",
    "--keep",
    "2",
]


def rows_of(out: Path) -> list[dict]:
    return [
        {k: v for k, v in row.items() if k != "seconds"}
        for row in runs.read_rows(out / "metrics.jsonl")
    ]


def assert_equal_runs(a: Path, b: Path) -> None:
    assert rows_of(a) == rows_of(b)
    assert (a / "samples.jsonl").read_text() == (b / "samples.jsonl").read_text()
    for name in ("model.safetensors", "value_head.safetensors"):
        left, right = load_file(a / "final" / name), load_file(b / "final" / name)
        assert left.keys() == right.keys() and all(
            torch.equal(left[key], right[key]) for key in left
        )
    left, right = (torch.load(x / "final" / "trainer_state.pt", weights_only=True) for x in (a, b))
    assert str(left["stateful"]) == str(right["stateful"]) and str(left["counters"]) == str(
        right["counters"]
    )


def in_a_child(argv: list[str]) -> int:
    """Fork and run `main(argv)`; -> process id. A fork has torch loaded already, so that twenty of
    them take no time."""
    pid = os.fork()
    if pid == 0:
        torch.set_num_threads(1)  # OpenMP's threads do not survive a fork
        # All forks would share one lock of tqdm's, and one that is killed may hold it for ever.
        tqdm.set_lock(threading.RLock())
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        devnull = os.open(os.devnull, os.O_WRONLY)
        os.dup2(devnull, 1)
        os.dup2(devnull, 2)
        code = 0
        try:
            main(argv)
        except SystemExit as stop:
            code = int(stop.code or 0)
        except BaseException:
            code = 99
        os._exit(code)
    return pid


def wait_for(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_a_reward_that_draws_gives_the_same_run_twice(tmp_path):
    """Python's generator, NumPy's and torch's: wherever they stood, the seed sets them."""
    reward = tmp_path / "chance.py"
    reward.write_text(
        "import random, numpy, torch\n"
        "def score(prompts, completions):\n"
        "    return [random.random() + numpy.random.rand() + float(torch.rand(1))\n"
        "            for _ in completions]\n"
    )
    flags = [*FAST, "--steps", "4", "--ppo-ratio", "1", "--reward", f"{reward}:score"]
    for name, seed in (("a", 7), ("b", 7), ("c", 8)):
        main([*flags, "--seed", str(seed), "--out", str(tmp_path / name)])
    assert_equal_runs(tmp_path / "a", tmp_path / "b")
    assert rows_of(tmp_path / "a") != rows_of(tmp_path / "c")


@pytest.mark.parametrize("algorithm", ["ppo", "grpo"])
def test_a_model_with_more_rows_than_tokens_trains_is_measured_and_resumes(
    padded_folder, tmp_path, algorithm
):
    flags = [*FAST, "--model", str(padded_folder), "--algorithm", algorithm, "--ppo-ratio", "0.5"]
    flags += ["--reward", "length + rouge_l + perplexity", "--save-every", "2"]
    flags += ["--group-size", "2"] if algorithm == "grpo" else []
    main([*flags, "--out", str(tmp_path / "run")])
    rows = rows_of(tmp_path / "run")
    assert [row["phase"] for row in rows].count(algorithm) == 3
    assert all(row.get("ppo/sampler_gap", 0) < 1e-4 for row in rows)
    main(["--resume", str(tmp_path / "run"), "--steps", "8"])


@pytest.mark.slow
def test_a_run_killed_at_random_moments_ends_like_one_that_was_not(tmp_path):
    whole, out = tmp_path / "whole", tmp_path / "out"
    flags = [*SHORT, "--eval-every", "2", "--keep-best", "eval/response_length"]
    started = time.perf_counter()
    assert wait_for(in_a_child([*flags, "--out", str(whole)])) == 0
    seconds = time.perf_counter() - started
    rng, kills, finished = random.Random(0), 0, 0
    while kills < 12 or not finished:
        if kills >= 12:
            delay = 60.0
        else:
            delay = rng.random() * seconds * 0.7
        resumable = (out / "config.json").exists()
        pid = in_a_child(
            ["--resume", str(out)] if resumable else [*flags, "--out", str(out), "--overwrite"]
        )
        deadline = time.perf_counter() + delay
        while time.perf_counter() < deadline:
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                # Killed after `final` was written and before it could say so, the run is complete,
                # and --resume says that (status 2).
                code = os.waitstatus_to_exitcode(status)
                assert code == 0 or (
                    code == 2 and resumable and (out / "final" / "trainer_state.pt").is_file()
                )
                break
            time.sleep(0.002)
        else:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            kills += 1
            for folder in out.glob("checkpoint-*"):
                assert (folder / "trainer_state.pt").is_file() and (
                    folder / "model.safetensors"
                ).is_file(), "a named folder is complete"
            continue
        assert_equal_runs(whole, out)
        for name in ("best.json", "model.safetensors"):
            assert (whole / "best" / name).read_bytes() == (out / "best" / name).read_bytes()
        finished += 1
        if kills < 12:
            shutil.rmtree(out)  # it got through between two kills: once more from the start
    assert finished >= 1


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_after_the_step_saved(tmp_path, number):
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert wait_for(in_a_child([*SHORT, "--out", str(whole)])) == 0
    pid = in_a_child([*SHORT, "--save-every", "0", "--out", str(out)])
    while len(runs.read_rows(out / "metrics.jsonl")) < 4:
        time.sleep(0.005)
    os.kill(pid, number)
    assert wait_for(pid) == 128 + number
    (checkpoint,) = out.glob("checkpoint-*")
    assert runs.read_rows(out / "metrics.jsonl")[-1]["step"] == int(checkpoint.name[-6:])
    assert wait_for(in_a_child(["--resume", str(out)])) == 0
    assert_equal_runs(whole, out)


def test_a_signal_says_how_to_go_on(tmp_path, capsys, monkeypatch):
    original = train.sft_step

    def interrupted(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGINT)
        return original(*args, **kwargs)

    monkeypatch.setattr(train, "sft_step", interrupted)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(SystemExit) as caught:
        main([*SHORT, "--out", str(tmp_path / "run")])
    assert caught.value.code == 130 and signal.getsignal(signal.SIGINT) is before
    assert (
        f"stopped after step 1; go on with: python train.py --resume {tmp_path / 'run'}"
        in capsys.readouterr().out
    )


@pytest.mark.slow
def test_a_full_disk_is_one_line_and_the_run_goes_on_later(tmp_path):
    """A limit on the size of files stands in for the disk: the optimiser's state does not fit, the
    model does."""
    out = tmp_path / "run"
    script = (
        "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (6_000_000, "
        "resource.RLIM_INFINITY)); import sys; import train; train.main(sys.argv[1:])"
    )
    (tmp_path / "full.py").write_text(script)
    done = run_script(["full.py", *SHORT, "--out", str(out)], tmp_path)
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert (
        "error: " in last
        and "checkpoint-000003 could not be written" in last
        and "there is no older one" in last
    )
    assert not list(out.glob(".*tmp")) and rows_of(out)[-1]["step"] == 3
    assert wait_for(in_a_child(["--resume", str(out)])) == 0
    assert (
        rows_of(out)[-1]["step"] == 14
        and resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY
    )


def test_metrics_that_cannot_be_written_are_one_line(tmp_path):
    with pytest.raises(
        UserError,
        match="metrics.jsonl cannot be written: No space left on device; "
        "make room and go on with --resume",
    ):
        (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
        runs.append_rows(tmp_path / "metrics.jsonl", [{"step": 1}])


def test_old_checkpoints_are_removed_whole(tmp_path):
    main([*SHORT, "--out", str(tmp_path / "run")])
    assert sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*")) == [
        "checkpoint-000009",
        "checkpoint-000012",
    ]
    assert not list((tmp_path / "run").glob(".*")), "no temporary folder is left"


def test_a_due_checkpoint_is_written_whatever_stands_under_its_name(tmp_path):
    main([*SHORT, "--out", str(tmp_path / "whole")])
    shutil.copytree(tmp_path / "whole", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "final")
    (tmp_path / "run" / "checkpoint-000012" / "trainer_state.pt").unlink()
    main(["--resume", str(tmp_path / "run")])
    assert (tmp_path / "run" / "checkpoint-000012" / "trainer_state.pt").is_file()
    assert_equal_runs(tmp_path / "whole", tmp_path / "run")


def test_pairs_of_a_step_that_failed_are_drawn_again(tmp_path, tiny_folder, monkeypatch, capsys):
    pairs = [{"prompt": f"the {i}", "chosen": " a b", "rejected": f" c {i}"} for i in range(9)]
    (tmp_path / "prefs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    flags = [*FAST, "--sft-warmup", "1", "--ppo-ratio", "0.9", "--max-length", "40"]
    flags += ["--model", str(tiny_folder), "--algorithm", "dpo"]
    flags += ["--preference-data", str(tmp_path / "prefs.jsonl")]
    main([*flags, "--out", str(tmp_path / "whole")])

    batches, preference_batch = [], dpo.preference_batch

    def fails_at_the_third(tokenizer, reference, drawn, **options):
        batches.append(drawn)
        if len(batches) == 3:
            raise UserError("the reference is gone")
        return preference_batch(tokenizer, reference, drawn, **options)

    monkeypatch.setattr(dpo, "preference_batch", fails_at_the_third)
    with pytest.raises(SystemExit):
        main([*flags, "--out", str(tmp_path / "run")])
    assert "the reference is gone" in capsys.readouterr().err
    main(["--resume", str(tmp_path / "run")])
    assert_equal_runs(tmp_path / "whole", tmp_path / "run")


def test_a_pair_that_names_no_reference_is_found_before_the_first_step(
    tmp_path, tiny_folder, capsys
):
    pairs = [{"prompt": f"the {i}", "chosen": " a b", "rejected": f" c {i}"} for i in range(9)]
    pairs[4]["reference"] = "nobody"
    (tmp_path / "prefs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    flags = [*FAST, "--model", str(tiny_folder), "--algorithm", "dpo", "--max-length", "40"]
    flags += ["--ref-model", f"a={tiny_folder}", "--ref-model", f"b={tiny_folder}"]
    flags += ["--preference-data", str(tmp_path / "prefs.jsonl"), "--out", str(tmp_path / "run")]
    with pytest.raises(SystemExit):
        main(flags)
    assert "names the reference 'nobody'" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


REWARD_THAT_FAILS = """import random, sys
calls = []
def r(completions, **columns):
    calls.append(0)
    if len(calls) == {}:
        {}
    return [random.random() + 0.1 * len(c) for c in completions]
"""
REWARD_FLAGS = (
    "--limit 60 --steps 6 --ppo-ratio 0.5 --sft-warmup 0 --batch-size 4 --max-new-tokens 6 "
    "--eval-size 4 --eval-every 2 --save-every 2 --device cpu --kl-target 1 --kl-horizon 40"
).split()


# The calls: the probe, the evaluation at step 0, then at 2 (a rollout, an evaluation), at 4, at 6.
@pytest.mark.parametrize(
    "call, failure, says",
    [
        (5, "raise ValueError('oops')", "saved as of step 3"),  # in the rollout of step 4
        (5, "sys.exit(3)", "saved as of step 3"),
        (4, "sys.exit('enough')", "saved as of step 2"),
        (4, "raise ValueError('oops')", "saved as of step 2"),  # in the evaluation of step 2
    ],
)
def test_a_run_that_failed_goes_on_bit_by_bit_once_it_is_mended(
    tmp_path, capsys, call, failure, says
):
    (tmp_path / "r.py").write_text(REWARD_THAT_FAILS.format(0, "pass"))
    flags = [*REWARD_FLAGS, "--reward", f"{tmp_path}/r.py:r"]
    main([*flags, "--out", str(tmp_path / "whole")])
    (tmp_path / "r.py").write_text(REWARD_THAT_FAILS.format(call, failure))
    with pytest.raises(SystemExit):
        main([*flags, "--out", str(tmp_path / "run")])
    said = capsys.readouterr().err
    name = "ValueError: oops" if "oops" in failure else "SystemExit: "
    assert f"reward 'r' raised {name}" in said and says in said
    (tmp_path / "r.py").write_text(REWARD_THAT_FAILS.format(0, "pass"))
    main(["--resume", str(tmp_path / "run")])
    assert_equal_runs(tmp_path / "whole", tmp_path / "run")
    evaluations = [r["step"] for r in rows_of(tmp_path / "run") if r["phase"] == "eval"]
    assert evaluations == [0, 2, 4, 6], "the evaluation that failed is made up"


def test_whatever_calls_sys_exit_is_said_to_have_done_so(tmp_path, monkeypatch, capsys):
    calls = []

    def leaves(*args, **kwargs):
        calls.append(1)
        return original(*args, **kwargs) if len(calls) < 3 else sys.exit("enough")

    original = train.sft_step
    monkeypatch.setattr(train, "sft_step", leaves)
    with pytest.raises(SystemExit):
        main([*SHORT, "--ppo-ratio", "0", "--out", str(tmp_path / "run")])
    assert "something called sys.exit('enough'); saved as of step 2" in capsys.readouterr().err


def test_what_is_printed_cannot_lose_a_step(tmp_path, monkeypatch, capsys):
    main([*SHORT, "--out", str(tmp_path / "whole")])
    show, shown = runs.ProgressBar.show, []

    def breaks(bar, metrics):
        shown.append(metrics)
        if len(shown) == 5:
            raise BrokenPipeError("nobody reads this")
        show(bar, metrics)

    monkeypatch.setattr(runs.ProgressBar, "show", breaks)
    with pytest.raises(BrokenPipeError):
        main([*SHORT, "--out", str(tmp_path / "run")])
    assert "BrokenPipeError; saved as of step 5" in capsys.readouterr().err
    monkeypatch.undo()
    main(["--resume", str(tmp_path / "run")])
    assert_equal_runs(tmp_path / "whole", tmp_path / "run")


def test_torn_lines_are_dropped_and_newer_rows_forgotten(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    runs.forget_after(tmp_path, 2)
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n{"step": 2}\n'
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"st{"step": 2}\n{"step": 3}\n')
    assert runs.read_rows(tmp_path / "metrics.jsonl") == [{"step": 1}]


def test_constant_rate_runs_may_be_made_longer_without_a_trace(tmp_path):
    """2N steps == N steps, then --resume with 2N."""
    flags = [*SHORT, "--scheduler", "constant", "--eval-every", "0"]
    main([*flags, "--out", str(tmp_path / "whole"), "--save-every", "0"])
    main([*flags, "--out", str(tmp_path / "half"), "--steps", "7", "--save-every", "0"])
    main(["--resume", str(tmp_path / "half"), "--steps", "14"])
    left, right = (
        load_file(tmp_path / name / "final" / "model.safetensors") for name in ("whole", "half")
    )
    assert all(torch.equal(left[key], right[key]) for key in left)


# ---- numbers that are not finite


@pytest.mark.parametrize("phase", ["sft", "ppo"])
def test_a_lost_update_is_skipped_counted_and_reported_with_its_batch(
    tmp_path, capsys, monkeypatch, phase
):
    calls, original = [], engine.apply_gradients

    def poisoned(backend, *rest):
        calls.append(0)
        if len(calls) == 3:
            next(backend.model.parameters()).grad.fill_(math.nan)
        return original(backend, *rest)

    for module in ("sft", "ppo"):
        monkeypatch.setattr(sys.modules[module], "apply_gradients", poisoned)
    ratio = {"sft": "0", "ppo": "1"}[phase]
    main(
        (
            "--limit 60 --steps 4 --batch-size 4 --max-new-tokens 6 --eval-size 4 "
            "--device cpu --minibatches 1 --ppo-epochs 1"
        ).split()
        + ["--ppo-ratio", ratio, "--out", str(tmp_path / "run")]
    )
    rows = {
        row["step"]: row
        for row in runs.read_rows(tmp_path / "run" / "metrics.jsonl")
        if row["phase"] == phase
    }
    assert [rows[step][f"{phase}/skipped_steps"] for step in (1, 2, 3, 4)] == [
        0,
        0,
        1,
        0,
    ] and f"{phase}/grad_norm" not in rows[3]
    (report,) = runs.read_rows(tmp_path / "run" / "skipped.jsonl")
    assert report["step"] == 3 and len(report["prompts"]) == 4
    assert (
        f"step 3: {phase} reward or gradient not finite, update skipped" in capsys.readouterr().out
    )
    assert all(
        torch.isfinite(x).all()
        for x in load_file(tmp_path / "run" / "final" / "model.safetensors").values()
    )


def test_a_reward_that_turns_nan_costs_one_update(tmp_path, capsys):
    (tmp_path / "r.py").write_text(
        "calls = []\ndef r(completions, **columns):\n    calls.append(0)\n"
        "    return [float('nan') if len(calls) == 5 else 1.0] + [0.0] * (len(completions) - 1)\n"
    )  # probe, evaluation, rollouts 1 and 2, and then the NaN
    flags = (
        "--limit 60 --steps 4 --ppo-ratio 1 --batch-size 4 --max-new-tokens 6 "
        "--eval-size 4 --eval-every 0 --device cpu"
    ).split()
    main([*flags, "--reward", f"{tmp_path}/r.py:r", "--out", str(tmp_path / "run")])
    rows = [
        row for row in runs.read_rows(tmp_path / "run" / "metrics.jsonl") if row["phase"] == "ppo"
    ]
    assert [row["ppo/skipped_steps"] for row in rows] == [0, 0, 1, 0] and "ppo/score" not in rows[2]
    assert runs.read_rows(tmp_path / "run" / "skipped.jsonl")[0]["step"] == 3
    assert (
        "step 3: reward 'r' gave nan, not a finite number, for the completion"
        in capsys.readouterr().out
    )


def test_a_reward_that_turns_nan_while_measuring_costs_that_measurement(tmp_path, capsys):
    (tmp_path / "r.py").write_text(
        "calls = []\ndef r(completions, **columns):\n    calls.append(0)\n"
        "    return [float('nan') if len(calls) > 4 else 1.0] * len(completions)\n"
    )
    flags = (
        "--limit 60 --steps 2 --ppo-ratio 1 --batch-size 4 --max-new-tokens 6 "
        "--eval-size 4 --eval-every 0 --device cpu"
    ).split()
    metrics = main(
        [*flags, "--reward", f"{tmp_path}/r.py:r", "--out", str(tmp_path / "run")]
    )  # probe, evaluation, two rollouts, evaluation
    assert (
        "eval/reward" not in metrics
        and "eval/nll" in metrics
        and (tmp_path / "run" / "final" / "config.json").is_file()
    )
    assert "step 2: reward 'r' gave nan" in capsys.readouterr().out


@pytest.mark.parametrize("calls, saved", [(4, 2), (5, 3)], ids=["in a rollout", "in an evaluation"])
def test_a_reward_that_raises_in_mid_run_loses_no_step(tmp_path, capsys, calls, saved):
    body = (
        "def r(completions, **columns):\n    calls.append(0)\n"
        "    assert len(calls) <= {}, 'oops'\n    return [1.0] * len(completions)\n"
    )
    (tmp_path / "r.py").write_text(
        "calls = []\n" + body.format(calls)
    )  # probe, evaluation, rollouts 1 to 3, evaluation
    flags = (
        "--limit 60 --steps 3 --ppo-ratio 1 --batch-size 4 --max-new-tokens 6 "
        "--eval-size 4 --eval-every 0 --device cpu"
    ).split()
    with pytest.raises(SystemExit):
        main([*flags, "--reward", f"{tmp_path}/r.py:r", "--out", str(tmp_path / "run")])
    error = capsys.readouterr().err
    assert "AssertionError: oops (r.py:4)" in error
    if saved == 3:
        assert (
            "all steps are done, the model is in" in error
            and (tmp_path / "run" / "final" / "config.json").is_file()
        )
    else:
        assert "saved as of step 2: mend it and go on with --resume" in error
        (tmp_path / "r.py").write_text("calls = []\n" + body.format(99))
        assert main(["--resume", str(tmp_path / "run")])["eval/reward"] == 1
        main([*flags, "--reward", f"{tmp_path}/r.py:r", "--out", str(tmp_path / "whole")])
        mended, whole = (
            (tmp_path / name / "final" / "model.safetensors").read_bytes()
            for name in ("run", "whole")
        )
        assert mended == whole, "as if it had never raised"


@pytest.mark.filterwarnings("ignore:Detected call of")
def test_ten_lost_updates_in_a_row_stop_with_the_last_good_weights(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(engine.torch.nn.utils, "clip_grad_norm_", lambda *_: torch.tensor(math.nan))
    with pytest.raises(SystemExit) as caught:
        main(
            [
                *SHORT,
                "--ppo-ratio",
                "0",
                "--sft-warmup",
                "0",
                "--reward",
                "length",
                "--steps",
                "30",
                "--save-every",
                "0",
                "--out",
                str(tmp_path / "run"),
            ]
        )
    monkeypatch.undo()
    message = capsys.readouterr().err
    assert (
        caught.value.code == 2
        and "no finite reward and gradient in 10 steps in a row (now step 10)" in message
        and "checkpoint-000010" in message
    )
    saved = load_file(tmp_path / "run" / "checkpoint-000010" / "model.safetensors")
    from data import load_examples, split_examples

    lm, _ = build_tiny(
        [e.prompt + e.target for e in split_examples(load_examples("reviews", limit=60))[0]]
    )
    assert all(torch.equal(x, lm.state_dict()[name]) for name, x in saved.items()), (
        "the weights before the first lost update"
    )


# ---- merging


def tiny_model(seed: int) -> HybridModel:
    model = HybridModel(build_tiny(["a b c", "d e f"], seed)[0])
    torch.manual_seed(seed)
    torch.nn.init.normal_(model.value_head.weight)
    return model


@pytest.mark.parametrize("weight", [0.0, 0.3, 0.5, 1.0])
def test_merging_is_the_average_and_tied_weights_stay_tied(weight):
    a, b = tiny_model(1), tiny_model(2)
    expected = {
        name: (1 - weight) * x + weight * b.state_dict()[name] for name, x in a.state_dict().items()
    }
    merged = merge(a, b, weight)
    for name, x in merged.state_dict().items():
        torch.testing.assert_close(x, expected[name], msg=name)
        if weight in (0, 1):
            assert torch.equal(x, expected[name])
    assert merged.lm.lm_head.weight is merged.lm.model.embed_tokens.weight
    twin = tiny_model(3)
    before = {name: x.clone() for name, x in twin.state_dict().items()}
    assert all(
        torch.equal(x, before[name])
        for name, x in merge(twin, tiny_model(3), weight).state_dict().items()
    )


def test_integer_buffers_are_copied():
    def with_counter(seed, count):
        model = tiny_model(seed)
        model.lm.register_buffer("steps_seen", torch.tensor(count))
        return model

    assert merge(with_counter(1, 5), with_counter(2, 8), 0.5).lm.steps_seen.item() == 5


def test_the_merge_command(tmp_path, capsys, tiny_folder):
    model, tokenizer = HybridModel.load(str(tiny_folder))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.04)
    model.save(tmp_path / "b", tokenizer)
    out = tmp_path / "merged"
    hybrid.main(
        ["merge", str(tiny_folder), str(tmp_path / "b"), "--weight", "0.25", "--out", str(out)]
    )
    lm, report = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    original = AutoModelForCausalLM.from_pretrained(tiny_folder)
    torch.testing.assert_close(lm.transformer.wte.weight, original.transformer.wte.weight + 0.01)
    other = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("gpt2", vocab_size=len(tokenizer), n_embd=16, n_layer=1, n_head=2)
    )
    HybridModel(other).save(tmp_path / "small", tokenizer)
    _, strange = build_tiny(["x y z"])
    HybridModel(build_tiny(["x y z"])[0]).save(tmp_path / "strange", strange)
    for argv, message in [
        (["merge", str(tiny_folder), str(tmp_path / "b"), "--out", str(out)], "already exists"),
        (
            ["merge", str(tiny_folder), str(tmp_path / "small"), "--out", str(tmp_path / "m")],
            "do not fit together",
        ),
        (
            ["merge", str(tiny_folder), str(tmp_path / "strange"), "--out", str(tmp_path / "m")],
            "different vocabularies",
        ),
        (["merge", str(tiny_folder), "./nowhere", "--out", str(tmp_path / "m")], "config.json"),
        (
            [
                "merge",
                str(tiny_folder),
                str(tiny_folder),
                "--weight",
                "2",
                "--out",
                str(tmp_path / "m"),
            ],
            "at most 1",
        ),
    ]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            hybrid.main(argv)
        assert caught.value.code == 2 and message in capsys.readouterr().err


# ---- logging, verdict, curves


def test_wandb_mirrors_the_metrics_on_one_step_axis(tmp_path, monkeypatch):
    sent, started = [], {}
    fake = types.SimpleNamespace(
        init=lambda **kwargs: (
            started.update(kwargs)
            or types.SimpleNamespace(log=lambda metrics, step: sent.append((step, metrics)))
        )
    )
    monkeypatch.setitem(sys.modules, "wandb", fake)
    main([*SHORT, "--log", "wandb", "--out", str(tmp_path / "run")])
    rows = runs.read_rows(tmp_path / "run" / "metrics.jsonl")
    assert [(step, metrics) for step, metrics in sent] == [
        (r["step"], {k: v for k, v in r.items() if k not in ("step", "phase")}) for r in rows
    ]
    assert [step for step, _ in sent] == sorted(step for step, _ in sent) and started["config"][
        "steps"
    ] == 14


@pytest.mark.parametrize("package", ["wandb", "tensorboard"])
def test_a_missing_logger_says_what_to_install(tmp_path, capsys, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(SystemExit) as caught:
        main([*SHORT, "--log", package, "--out", str(tmp_path / "run")])
    assert caught.value.code == 2 and f"pip install {package}" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_tensorboard_writes_events(tmp_path):
    pytest.importorskip("tensorboard", reason="optional: pip install tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    main([*SHORT, "--log", "tensorboard", "--out", str(tmp_path / "run")])
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    rows = [row for row in runs.read_rows(tmp_path / "run" / "metrics.jsonl") if "sft/loss" in row]
    assert [event.step for event in events.Scalars("sft/loss")] == [row["step"] for row in rows]


def healthy_rows() -> list[dict]:
    rows = []
    for step in range(1, 31):
        rows.append(
            {"step": step, "phase": "sft", "sft/loss": 2 - step / 60, "sft/skipped_steps": 0}
        )
        ppo = {
            "sampler_gap": 1e-6,
            "first_ratio_gap": 0,
            "kl": 1.5,
            "kl_k1": 1.4,
            "score": step / 30,
            "entropy": 2 - step / 60,
            "clipfrac": 0.1,
        }
        ppo |= {
            "var_explained": 0.2,
            "score_std": 0.5,
            "response_length": 14,
            "eos_rate": 1,
            "unscored": 0,
            "skipped_steps": 0,
        }
        rows.append({"step": step, "phase": "ppo", **{f"ppo/{k}": v for k, v in ppo.items()}})
        rows.append({"step": step, "phase": "dpo", "dpo/accuracy": 0.8, "dpo/skipped_steps": 0})
    return rows + [{"step": 30, "phase": "eval", "eval/nll": 1.9, "eval/distinct": 0.98}]


def taught_rows(steps: int = 60) -> list[dict]:
    """A run with a teacher: the KL falls, and all else becomes as the teacher has it."""
    rows = []
    for step in range(1, steps + 1):
        left = 1 - step / steps
        distill = {"kl": 0.05 + 2 * left, "kl_sampled": 0.05 + 2 * left, "entropy": 0.1 + 6 * left}
        distill |= {"response_length": 5 + 27 * left, "eos_rate": 1 - left, "skipped_steps": 0}
        named = {f"distill/{name}": value for name, value in distill.items()}
        rows.append({"step": step, "phase": "distill", **named})
    return rows


def test_a_phase_of_ones_own_is_judged_like_ppo():
    rows = [
        {
            name.replace("ppo", "mine"): value.replace("ppo", "mine")
            if isinstance(value, str)
            else value
            for name, value in row.items()
        }
        for row in healthy_rows()
    ]
    assert verdict(rows) == verdict(healthy_rows())


def test_a_healthy_run_is_called_so():
    line = verdict(healthy_rows())
    assert (
        line.startswith("verdict: healthy (ppo/score 0.183 -> 0.85, ppo/kl 1.5")
        and "\n" not in line
    )


SICK = {
    "ppo/sampler_gap": 5.0,
    "ppo/first_ratio_gap": 0.2,
    "ppo/kl_k1": -3.0,
    "ppo/kl": 80.0,
    "ppo/score": -1.0,
    "ppo/entropy": 0.05,
    "ppo/clipfrac": 0.6,
    "ppo/score_std": 0.0,
    "ppo/var_explained": -4.0,
    "ppo/response_length": 60,
    "ppo/eos_rate": 0.01,
    "ppo/unscored": 0.5,
    "sft/skipped_steps": 1,
    "ppo/skipped_steps": 1,
    "sft/loss": 5.0,
    "dpo/skipped_steps": 1,
    "dpo/accuracy": 0.3,
    "distill/kl": 2.5,
    "distill/eos_rate": 0.01,
    "distill/skipped_steps": 1,
}


@pytest.mark.parametrize("key, text", [(key, text) for key, _, text in RULES])
def test_each_rule_finds_its_own_illness_and_no_other(key, text):
    rows = taught_rows() if key.startswith("distill/") else healthy_rows()
    for row in rows[len(rows) // 2 :]:
        if key in row:
            row[key] = SICK[key]
    line = verdict(rows)
    assert (
        line.startswith("verdict: suspect ")
        and text in line
        and sum(other in line for _, _, other in RULES) == 1
    )


def test_the_reward_falls_when_every_raw_part_of_it_falls():
    rows = healthy_rows()
    for i, row in enumerate(rows):
        if row["phase"] == "ppo":
            row |= {"ppo/score": 0.0, "reward/a": -i, "reward/b": 1.0}
    assert verdict(rows).startswith("verdict: healthy"), (
        "one part holds; and a standardised total has no trend"
    )
    for i, row in enumerate(rows):
        if row["phase"] == "ppo":
            row["reward/b"] = 1 - i / 10
    assert "every part of the reward falls" in verdict(rows)


def test_a_line_torn_inside_a_character_is_dropped(tmp_path):
    (tmp_path / "samples.jsonl").write_bytes(
        '{"step": 1, "prompt": "é"}\n{"step": 2, "prompt": "'.encode() + b"\xc3"
    )
    runs.forget_after(tmp_path, 5)
    assert runs.read_rows(tmp_path / "samples.jsonl") == [{"step": 1, "prompt": "é"}]


def test_final_gets_its_name_back_when_it_was_being_replaced(tmp_path):
    main([*SHORT, "--save-every", "0", "--out", str(tmp_path / "run")])
    os.rename(
        tmp_path / "run" / "final", tmp_path / "run" / ".final.old"
    )  # killed between the two renames
    (tmp_path / "run" / ".final.tmp").mkdir()
    main(["--resume", str(tmp_path / "run"), "--steps", "16"])
    assert [row["step"] for row in rows_of(tmp_path / "run") if row["phase"] != "eval"] == list(
        range(1, 17)
    )
    assert json.loads((tmp_path / "run" / "config.json").read_text())["steps"] == 16
    assert not list((tmp_path / "run").glob(".*"))


def test_only_numbered_checkpoints_are_ours_and_their_order_is_that_of_numbers(tmp_path):
    for name in ("checkpoint-999900", "checkpoint-1000000", "checkpoint-best"):
        (tmp_path / name).mkdir()
    assert [path.name for path in runs.checkpoints(tmp_path)] == [
        "checkpoint-999900",
        "checkpoint-1000000",
    ]


def test_a_damaged_state_is_one_line(tmp_path, capsys):
    main([*SHORT, "--out", str(tmp_path / "run")])
    state = tmp_path / "run" / "final" / "trainer_state.pt"
    state.write_bytes(state.read_bytes()[:1000])
    with pytest.raises(SystemExit) as caught:
        main(["--resume", str(tmp_path / "run"), "--steps", "20"])
    assert caught.value.code == 2 and "trainer_state.pt is damaged" in capsys.readouterr().err


def test_the_verdict_reads_the_held_out_numbers_too():
    rows = healthy_rows()
    rows[-1] |= {"eval/nll": 3.1, "eval/distinct": 0.2}
    line = verdict([{"step": 0, "phase": "eval", "eval/nll": 2.0}, *rows])
    assert (
        "1.1 above its best: PPO forgets the language" in line
        and "more than half of the responses are repeats" in line
    )
    rows[-1] |= {"eval/fluent": 0.38, "eval/right": 0.62}
    better = {"eval/nll": 3.0, "eval/fluent": 0.93, "eval/right": 0.81}
    line = verdict([{"step": 0, "phase": "eval", **better}, *rows])
    assert "eval/fluent 0.38, 0.55 below its best: what SFT taught is lost" in line
    assert "eval/right" not in line
    assert verdict([]) == "verdict: nothing was recorded"
    assert verdict(rows[:2] * 15).startswith("verdict: healthy")
    short = verdict(rows[:2] * 14)
    assert short.startswith("verdict: too short to tell (steps: 28; a verdict needs 30) (ppo/score")


def test_health_and_plot_commands(tmp_path, capsys):
    (tmp_path / "metrics.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in healthy_rows())
    )
    evaluate_main(["--health", str(tmp_path)])
    assert capsys.readouterr().out.startswith("verdict: healthy")
    for argv in ([], ["--health", str(tmp_path / "nowhere")]):
        with pytest.raises(SystemExit) as caught:
            evaluate_main(argv)
        assert caught.value.code == 2


@pytest.mark.parametrize(
    "line, message",
    [
        ("[1, 2]", "holds [1, 2], expected an object"),
        ("null", "holds null, expected an object"),
        ('"ppo"', 'holds "ppo", expected an object'),
        ('{"step": 3', "is not JSON"),
        ("", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ('{"phase": "sft", "sft/loss": 2}', "has no 'step'"),
        ('{"step": 3, "sft/loss": 2}', "has no 'phase'"),
        ('{"step": 3, "phase": null}', "has the phase null, expected a text"),
        ('{"step": "3", "phase": "sft"}', "has 'step': \"3\", expected a finite number"),
        ('{"step": 3, "phase": "ppo", "ppo/kl": "2.5"}', "has 'ppo/kl': \"2.5\", expected"),
        ('{"step": 3, "phase": "ppo", "ppo/kl": null}', "has 'ppo/kl': null, expected"),
        ('{"step": 3, "phase": "ppo", "ppo/kl": NaN}', "has 'ppo/kl': NaN, expected"),
        ('{"step": 3, "phase": "ppo", "ppo/kl": -Infinity}', "has 'ppo/kl': -Infinity, expected"),
        ('{"step": 3, "phase": "ppo", "ppo/kl": true}', "has 'ppo/kl': true, expected"),
        ('{"step": 3, "phase": "ppo", "ppo/kl": [1]}', "has 'ppo/kl': [1], expected"),
        ('{"step": 3, "phase": "ppo", "ppo/kl": 1' + "0" * 400 + "}", "has 'ppo/kl': 1000"),
    ],
)
@pytest.mark.parametrize("flag", ["--health", "--plot"])
def test_a_damaged_row_is_one_line_with_its_place(tmp_path, capsys, flag, line, message):
    if flag == "--plot":
        pytest.importorskip("matplotlib", reason="optional: pip install matplotlib")
    rows = [json.dumps(row) for row in healthy_rows()]
    rows[16] = line
    (tmp_path / "metrics.jsonl").write_text("\n".join(rows) + "\n")
    with pytest.raises(SystemExit) as caught:
        evaluate_main([flag, str(tmp_path)])
    err = capsys.readouterr().err
    assert caught.value.code == 2 and err.count("\n") == 1 and len(err) < 400
    assert f"metrics.jsonl:17: the line {message}" in err and "remove it" in err


def health_of(folder: Path, text: str, capsys) -> str:
    (folder / "metrics.jsonl").write_text(text)
    evaluate_main(["--health", str(folder)])
    return capsys.readouterr().out


def test_odd_rows_of_a_whole_file_get_one_line(tmp_path, capsys):
    def lines(*rows: dict) -> str:
        return "".join(json.dumps(row) + "\n" for row in rows)

    bare = [{"step": step, "phase": "ppo"} for step in range(1, 40)]  # no metric at all
    assert health_of(tmp_path, lines(*bare), capsys) == "verdict: healthy (skipped updates 0)\n"
    for n, rows in ((1, healthy_rows()[:1]), (0, healthy_rows()[-1:] * 50), (29, bare[:29])):
        said = health_of(tmp_path, lines(*rows), capsys)
        assert said.startswith(f"verdict: too short to tell (steps: {n}; a verdict needs 30)")
        assert said.count("\n") == 1
    silent = [row | {"ppo/response_length": 0} for row in bare]  # 0 divides nothing
    assert health_of(tmp_path, lines(*silent), capsys).startswith("verdict: healthy")
    longer = [row | {"ppo/response_length": 0 if row["step"] < 20 else 9} for row in bare]
    assert "changed their length" in health_of(tmp_path, lines(*longer), capsys)
    mine = [{"step": row["step"], "phase": "a b/c", "a b/c/kl": 80.0} for row in bare]
    assert "the KL is above 50" in health_of(tmp_path, lines(*mine), capsys)
    torn = lines(*bare) + '{"step": 40, "pha'  # a crash: the last line is not complete
    assert health_of(tmp_path, torn, capsys).startswith("verdict: healthy")
    for text in ("", '{"step": 1, "pha'):
        with pytest.raises(SystemExit):
            health_of(tmp_path, text, capsys)
        assert "has no complete line yet" in capsys.readouterr().err


# ---- curves


def test_smooth_curves_are_means_over_both_sides():
    rng = np.random.default_rng(3)
    for n in (1, 2, 24, 25, 77):
        values = rng.normal(size=n)
        for i, found in enumerate(plot.smooth(values)):
            half = min(i, n // plot.SMOOTH)
            assert found == pytest.approx(np.mean(values[i - half : i + half + 1]))


def test_bands_are_whole_phases_or_coarse_where_they_alternate():
    assert doctest.testmod(plot).failed == 0
    phases = ["sft"] * 300 + ["ppo", "sft"] * 200 + ["ppo"] * 100 + ["ppo", "mine"] * 2
    rows = [{"step": step + 1, "phase": phase} for step, phase in enumerate(phases)]
    rows.insert(100, {"step": 100, "phase": "eval"})
    assert plot.bands(rows) == [
        (0, 300, "SFT"),
        (300, 700, "SFT and PPO"),
        (700, 801, "PPO"),
        (801, 804, "PPO and MINE"),
    ]
    assert plot.bands(rows[100:101]) == [] and plot.bands([]) == []


def figure_of(rows: list[dict], path: Path, monkeypatch):
    pyplot = pytest.importorskip("matplotlib.pyplot", reason="optional: pip install matplotlib")
    monkeypatch.setattr(pyplot, "close", lambda figure: None)
    plot.plot(rows, path, "here")
    figure = pyplot.gcf()
    monkeypatch.undo()
    pyplot.close(figure)
    return figure


def test_the_curves_of_each_phase_are_drawn_and_explained(tmp_path, monkeypatch):
    update = {"grpo/group_std": 0.3, "grpo/kl_loss": 0.1}
    pairs = {"dpo/loss": 0.6, "dpo/chosen_reward": 0.1, "dpo/rejected_reward": -0.2}
    rows = [row | pairs if row["phase"] == "dpo" else row for row in healthy_rows()]
    rows = [row | update if row["phase"] == "ppo" else row for row in rows]
    rows = [row | {"step": step} for step, row in enumerate(rows, start=1)]
    figure = figure_of(rows, tmp_path / "curves.png", monkeypatch)
    assert (tmp_path / "curves.png").stat().st_size > 10_000
    assert figure.get_suptitle() == "Run here: 30 SFT, 30 PPO, 30 DPO steps"
    said = [text.get_text() for text in figure.legends[0].get_texts()]
    assert {"faint line: every step", "line: the same, smoothed", "dots: evaluations"} <= set(said)
    assert "shaded: SFT and PPO and DPO steps" in said
    labels = {}  # of each panel: what its legend names
    for axis in figure.axes:
        labels[axis.get_ylabel()] = [text.get_text() for text in axis.get_legend().get_texts()]
        box = axis.get_legend().get_window_extent()
        assert box.x0 >= axis.get_window_extent().x1, "beside the curves, not over them"
        assert len(axis.collections) == len(said) - 3, "all bands of a kind are one object"
    assert figure.axes[-1].get_xlabel() == "step"
    assert labels["NLL, nats a token"] == ["sft/loss", "eval/nll"]
    assert ["grpo/group_std"] in labels.values() and ["grpo/kl_loss"] in labels.values()
    assert ["dpo/chosen_reward", "dpo/rejected_reward"] in labels.values()
    # a raw curve is faint, a smoothed one is not, an evaluation has dots
    raw, smoothed, evaluations = figure.axes[1].lines
    assert raw.get_alpha() < 0.5 and smoothed.get_alpha() is None
    assert raw.get_linewidth() < smoothed.get_linewidth() and evaluations.get_marker() == "o"
    assert np.allclose(smoothed.get_ydata(), plot.smooth(raw.get_ydata()))


def test_eight_thousand_rows_are_drawn_in_seconds(tmp_path, monkeypatch):
    rows = []
    for step in range(1, 8001):
        rows.append({"step": step, "phase": "sft", "sft/loss": 2.0})
        if step > 2400 and step % 2:
            rows[-1] = {"step": step, "phase": "ppo", "ppo/score": 0.5, "ppo/kl": 2.0}
    started = time.perf_counter()
    figure = figure_of(rows, tmp_path / "curves.png", monkeypatch)
    drawn = sum(len(c.get_paths()) for axis in figure.axes for c in axis.collections)
    assert drawn == 2 * len(figure.axes)  # SFT, then both: not a span for each row
    assert time.perf_counter() - started < 60


def test_a_run_with_nothing_to_draw_is_one_line(tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="optional: pip install matplotlib")
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "phase": "mine", "mine/x": 2}\n')
    with pytest.raises(SystemExit):
        evaluate_main(["--plot", str(tmp_path)])
    assert "has no metric that --plot draws" in capsys.readouterr().err


def test_a_missing_matplotlib_says_what_to_install(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "phase": "eval"}\n')
    with pytest.raises(SystemExit):
        evaluate_main(["--plot", str(tmp_path)])
    assert "pip install matplotlib" in capsys.readouterr().err


def test_a_signal_that_comes_while_the_processes_ask_counts_at_the_next_step(monkeypatch, tmp_path):
    with Stop() as stop:

        def everybody(mine):
            if stop.signal is None:  # it comes when None is already on its way to the others
                stop.ask(signal.SIGTERM, None)
            return [None, mine]

        monkeypatch.setattr(parallel, "everybody", everybody)
        assert not stop.asked()
        stop.exit_if_asked(6, tmp_path)  # the step was not saved: it goes on
        assert stop.asked()
        with pytest.raises(SystemExit) as caught:
            stop.exit_if_asked(7, tmp_path)
    assert caught.value.code == 128 + signal.SIGTERM
