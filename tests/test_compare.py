"""The four-arm comparison: its arithmetic by hand, and a whole one, small."""

import json
import math
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT
from test_children import wait_until
from transformers import AutoModelForCausalLM, AutoTokenizer

import compare
import evaluate
import train
from compare import main
from engine import UserError
from runs import read_rows


def test_intervals_are_students():
    assert compare.interval([1.0, 3.0]) == (
        2.0,
        pytest.approx(12.71),
    )  # s = sqrt 2, sqrt n = sqrt 2
    mean, half = compare.interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert mean == 3 and half == pytest.approx(2.776 * math.sqrt(2.5) / math.sqrt(5))
    assert math.isnan(compare.interval([7.0])[1])


def test_the_arms_differ_in_their_schedule_alone():
    arms = compare.arms(100)
    assert {flag for flags in arms.values() for flag in flags if flag.startswith("--")} == {
        "--ppo-ratio",
        "--sft-warmup",
    }
    assert arms["SFT, then PPO"] == ["--ppo-ratio", "1", "--sft-warmup", "50"]


def test_a_summary_counts_what_was_sampled():
    rows = [
        {"step": 0, "phase": "eval", "eval/nll": 6.0, "eval/reward": 0.0},
        {"step": 1, "phase": "sft", "sft/loss": 1.0, "seconds": 0.5},
        {"step": 2, "phase": "ppo", "ppo/response_length": 7.0, "seconds": 1.5},
        {"step": 2, "phase": "eval", "eval/nll": 2.0, "eval/reward": 1.0},
    ]
    summary = compare.summarise(rows, batch_size=4)
    assert (summary["seconds"], summary["sampled tokens"], summary["PPO steps"]) == (2, 28, 1)
    assert (
        summary["curve"] == [(0, 6.0, 0.0), (2, 2.0, 1.0)]
        and summary["before"]["eval/nll"] == 6
        and summary["eval/nll"] == 2
    )
    assert (
        compare.utility(summary, "reward-nll") == -1
        and compare.utility(summary, "eval/reward") == 1
    )
    with pytest.raises(
        UserError,
        match="fluent is no metric of these runs; they have reward-nll, eval/nll, eval/reward",
    ):
        compare.utility(summary, "fluent")


def test_the_table_shows_the_leaves_where_there_are_several():
    run = {"eval/nll": 1.0, "eval/reward": 2.0, "eval/reward/a": 3.0}
    assert compare.columns_in([run]) == ["eval/nll", "eval/reward"]
    assert compare.columns_in([run | {"eval/reward/b": 4.0}, {"eval/kl": 0.0}]) == [
        "eval/nll",
        "eval/reward",
        "eval/reward/a",
        "eval/reward/b",
        "eval/kl",
    ]


def test_the_nll_at_equal_reward_is_read_off_the_mean_curves():
    def runs(*curves):
        return [{"curve": [(step, *point) for step, point in enumerate(curve)]} for curve in curves]

    results = {
        "hybrid": runs([(2.0, 0.0), (1.5, 0.4)], [(2.0, 0.0), (1.7, 0.6)]),  # ends at 1.6 with 0.5
        "PPO": runs([(2.0, 0.0), (3.0, 1.0)]),  # half of the way
        "SFT, then PPO": runs([(2.0, 0.0), (1.0, 0.4)]),
    }
    assert compare.at_equal_reward(results).endswith(
        "(0.50): hybrid: 1.60; PPO: 2.50; SFT, then PPO: never there."
    )


@pytest.fixture
def trained(tmp_path, monkeypatch) -> list[str]:
    """Runs happen in this process: no time for imports. -> the --out of each."""
    folders = []

    def run_here(children, command, environment):
        train.main(command[2:])
        folders.append(command[command.index("--out") + 1])
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(compare.Children, "run", run_here)
    return folders


SMALL = "--limit 40 --batch-size 4 --max-new-tokens 4 --eval-size 4 --device cpu".split()


@pytest.mark.slow
def test_a_small_comparison_from_one_command(tmp_path, trained, capsys):
    pytest.importorskip("matplotlib", reason="matplotlib is an optional package")
    command = [
        *"--out c --seeds 2 --steps 4 --lrs 1e-3 --kl-coefs 0.05 0.1 --jobs 1 --".split(),
        *SMALL,
    ]
    main(command)
    report = json.loads((tmp_path / "c" / "compare.json").read_text())
    assert report["command"] == ["compare.py", *command]
    assert set(report["runs"]) == {"SFT", "PPO", "SFT, then PPO", "hybrid"} and all(
        len(runs) == 2 for runs in report["runs"].values()
    )
    assert len(report["tuning"]) == 7, "SFT has no KL price to tune"
    best = max(
        (r for r in report["tuning"] if r["arm"] == "PPO"),
        key=lambda r: r["eval/reward"] - r["eval/nll"],
    )
    assert report["chosen"]["PPO"] == {"lr": best["lr"], "kl_coef": best["kl_coef"]}
    tokens, steps = (
        {arm: runs[0][name] for arm, runs in report["runs"].items()}
        for name in ("sampled tokens", "PPO steps")
    )
    assert tokens["SFT"] == 0 < tokens["hybrid"] < tokens["PPO"] and steps == {
        "SFT": 0,
        "PPO": 4,
        "SFT, then PPO": 2,
        "hybrid": 1,
    }
    for run in report["runs"]["PPO"]:
        assert len(run["curve"]) == 5
    table = (tmp_path / "c" / "compare.md").read_text()
    assert (
        "| before training |" in table
        and "| hybrid |" in table
        and (tmp_path / "c" / "pareto.png").stat().st_size > 10_000
    )

    # Interrupted: one run is lost, one has no final model. The command repeats these two only.
    lost, cut = (
        tmp_path / "c" / name for name in ("sft-seed1-lr0.001-kl0.05", "sft-seed2-lr0.001-kl0.05")
    )
    shutil.rmtree(lost)
    shutil.rmtree(cut / "final")
    trained.clear()
    main(command)
    assert trained == [str(path.relative_to(tmp_path)) for path in (lost, cut)]
    again = json.loads((tmp_path / "c" / "compare.json").read_text())
    assert [{**run, "seconds": 0} for run in again["runs"]["SFT"]] == [
        {**run, "seconds": 0} for run in report["runs"]["SFT"]
    ]
    metrics = (
        tmp_path / "c" / cut.name / "metrics.jsonl"
    )  # a model without its last evaluation is no complete run either
    metrics.write_text("".join(metrics.read_text().splitlines(keepends=True)[:-1]))
    trained.clear()
    main(command)
    assert trained == [str(cut.relative_to(tmp_path))]
    with pytest.raises(SystemExit):
        main(["--out", "c"])
    assert "holds a comparison with other --steps" in capsys.readouterr().err


def test_the_tax_is_the_perplexity_elsewhere(tmp_path, trained, tiny_folder):
    pytest.importorskip("matplotlib", reason="matplotlib is an optional package")
    (tmp_path / "text.txt").write_text("the plot was warm and bold\nyet the cast felt dull\n")
    flags = (
        "--out c --seeds 1 --steps 2 --lrs 1e-3 --kl-coefs 0.1 --jobs 1 --tax text.txt --".split()
    )
    main([*flags, "--model", str(tiny_folder), "--max-length", "40", *SMALL])
    runs = json.loads((tmp_path / "c" / "compare.json").read_text())["runs"]
    # The same by Hugging Face's own loss: the records one by one, all but the first word.
    for folder, said in (
        (tiny_folder, runs["hybrid"][0]["before"]),
        (next((tmp_path / "c").glob("hybrid-*")) / "final", runs["hybrid"][0]),
    ):
        lm, tokenizer = (
            AutoModelForCausalLM.from_pretrained(folder),
            AutoTokenizer.from_pretrained(folder),
        )
        total = count = 0
        for line in (tmp_path / "text.txt").read_text().splitlines():
            prompt, target = (tokenizer(part).input_ids for part in (line[:3], line[3:]))
            ids = torch.tensor([[*prompt, *target]])
            labels = ids.masked_fill(torch.arange(ids.shape[1]) < len(prompt), -100)
            total += lm(input_ids=ids, labels=labels).loss.item() * len(target)
            count += len(target)
        assert said["perplexity elsewhere"] == pytest.approx(math.exp(total / count), rel=1e-5)
    assert "perplexity elsewhere" in (tmp_path / "c" / "compare.md").read_text()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="children outlive a SIGKILL elsewhere")
def test_no_run_goes_on_after_compare_is_killed_and_the_command_repeats_it(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is an optional package")
    flags = "--out c --seeds 1 --steps 400 --lrs 1e-3 --kl-coefs 0.1 --jobs 1 --".split()
    command = [sys.executable, str(ROOT / "compare.py"), *flags, *SMALL]
    metrics = tmp_path / "c" / "sft-seed1-lr0.001-kl0.1" / "metrics.jsonl"

    def start_and_kill(is_far_enough) -> str:
        parent = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL)
        try:
            assert wait_until(is_far_enough, seconds=240)
        finally:
            parent.send_signal(signal.SIGKILL)
            parent.wait()
        time.sleep(0.5)
        return metrics.read_text()

    def lines() -> int:
        return metrics.read_text().count("\n") if metrics.exists() else 0

    first = start_and_kill(lambda: lines() >= 9)
    time.sleep(1)
    assert metrics.read_text() == first and not (metrics.parent / "final").exists()
    second = start_and_kill(lambda: 4 <= lines() <= 8)
    # Nobody else wrote into the folder of the run that began again: every step is there once.
    steps = [json.loads(line)["step"] for line in second.splitlines()]
    assert steps[:2] == [0, 1] and steps == sorted(steps)
    trained = [row["step"] for row in read_rows(metrics) if row["phase"] != "eval"]
    assert trained == list(range(1, len(trained) + 1))


@pytest.mark.slow
def test_what_cannot_be_compared_is_one_line_before_any_run(tmp_path, monkeypatch, capsys):
    def refused(flags: str, main=main) -> str:
        with pytest.raises(SystemExit) as caught:
            main(flags.split())
        err = capsys.readouterr().err
        assert caught.value.code == 2 and err.count("\n") == 1
        return err

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(compare, "load_pyplot", lambda what: None)
    assert "nowhere.txt does not exist" in refused("--out d --tax nowhere.txt")
    assert "found a b c d" in refused("--out d --tax a b c d")
    (tmp_path / "d").mkdir()
    assert "--out d already exists" in refused("--out d")
    assert "--temperature: expected a number" in refused(
        "--out e --seeds 1 --steps 2 --lrs 1e-3 --kl-coefs 0.1 --jobs 1 -- --temperature 0"
    )
    assert "--steps is not for train.py here" in refused("--out d2 -- --steps 9")
    assert "go together" in refused("--perplexity gpt2", evaluate.main)
    assert "a command of its own: python compare.py" in refused("compare --seeds 2", evaluate.main)
