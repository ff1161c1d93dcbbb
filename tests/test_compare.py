"""The four-arm comparison: its arithmetic by hand, and a whole one, small."""

import json
import math
import subprocess
from types import SimpleNamespace

import pytest

import compare
import train
from evaluate import main


def test_intervals_are_students():
    assert compare.interval([1.0, 3.0]) == (2.0, pytest.approx(12.71))  # s = sqrt 2, sqrt n = sqrt 2
    mean, half = compare.interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert mean == 3 and half == pytest.approx(2.776 * math.sqrt(2.5) / math.sqrt(5))
    assert math.isnan(compare.interval([7.0])[1])


def test_the_arms_differ_in_their_schedule_alone():
    arms = compare.arms(100)
    assert {flag for flags in arms.values() for flag in flags if flag.startswith("--")} == {"--ppo-ratio", "--sft-warmup"}
    assert arms["SFT, then PPO"] == ["--ppo-ratio", "1", "--sft-warmup", "50"]


def test_a_summary_counts_what_was_sampled():
    rows = [
        {"step": 0, "phase": "eval", "eval/nll": 6.0, "eval/reward": 0.0},
        {"step": 1, "phase": "sft", "sft/loss": 1.0, "seconds": 0.5},
        {"step": 2, "phase": "ppo", "ppo/response_length": 7.0, "seconds": 1.5},
        {"step": 2, "phase": "eval", "eval/nll": 2.0, "eval/reward": 1.0},
    ]
    summary = compare.summarise(rows)
    assert summary["seconds"] == 2 and summary["responses"] == 7 and summary["curve"] == [(0, 6.0, 0.0), (2, 2.0, 1.0)]
    assert compare.utility(summary, "reward-nll") == -1 and compare.utility(summary, "eval/reward") == 1


def test_a_small_comparison_from_one_command(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib", reason="matplotlib is an optional package")
    monkeypatch.chdir(tmp_path)

    def run_here(command, **options):  # not in a process of its own, whose imports take longer than the run
        train.main(command[2:])
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(compare, "subprocess", SimpleNamespace(run=run_here))
    flags = "compare --out c --seeds 2 --steps 4 --lrs 1e-3 --kl-coefs 0.05 0.1 --jobs 1 -- --limit 40 --batch-size 4 --max-new-tokens 4 --eval-size 4 --device cpu"
    main(flags.split())
    report = json.loads((tmp_path / "c" / "compare.json").read_text())
    assert set(report["runs"]) == {"SFT", "PPO", "SFT, then PPO", "hybrid"} and all(len(runs) == 2 for runs in report["runs"].values())
    assert len(report["tuning"]) == 7, "SFT has no KL price to tune"
    best = max((r for r in report["tuning"] if r["arm"] == "PPO"), key=lambda r: r["eval/reward"] - r["eval/nll"])
    assert report["chosen"]["PPO"] == {"lr": best["lr"], "kl_coef": best["kl_coef"]}
    assert report["runs"]["SFT"][0]["tokens"] == 0 < report["runs"]["hybrid"][0]["tokens"] < report["runs"]["PPO"][0]["tokens"]
    for run in report["runs"]["PPO"]:
        assert len(run["curve"]) == 5
    assert "| hybrid |" in (tmp_path / "c" / "compare.md").read_text() and (tmp_path / "c" / "pareto.png").stat().st_size > 10_000
    with pytest.raises(SystemExit):
        main(["compare", "--out", "c"])
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        main("compare --out d --seeds 1 --steps 2 --lrs 1e-3 --kl-coefs 0.1 --jobs 1 -- --ppo-ratio 7".split())
    assert "--ppo-ratio: expected a number" in capsys.readouterr().err
