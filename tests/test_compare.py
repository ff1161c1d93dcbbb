"""The four-arm comparison: its arithmetic by hand, and a whole one, small."""

import json
import math
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from test_children import wait_until
from transformers import AutoModelForCausalLM, AutoTokenizer

import compare
import evaluate
import tables
import train
from compare import main
from engine import UserError
from lock import one_writer
from runs import read_rows


def test_intervals_are_students():
    assert tables.interval([1.0, 3.0]) == (2.0, pytest.approx(12.71))  # s = sqrt 2, sqrt n = sqrt 2
    mean, half = tables.interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert mean == 3 and half == pytest.approx(2.776 * math.sqrt(2.5) / math.sqrt(5))
    assert math.isnan(tables.interval([7.0])[1])


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
    assert tables.columns_in([run]) == ["eval/nll", "eval/reward"]
    assert tables.columns_in([run | {"eval/reward/b": 4.0}, {"eval/kl": 0.0}]) == [
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
    assert tables.at_equal_reward(results).endswith(
        "(0.50): hybrid: 1.60; PPO: 2.50; SFT, then PPO: never there."
    )


@pytest.fixture
def trained(tmp_path, monkeypatch) -> list[str]:
    """Runs happen in this process: no time for imports. -> the --out of each."""
    folders = []

    def run_here(children, command, environment, log):
        train.main(command[2:])
        folders.append(command[command.index("--out") + 1])
        return 0

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


@pytest.mark.parametrize(
    "words, named",
    [
        ("--steps 5", "--steps"),
        ("--steps=5", "--steps"),
        ("--step 5", "--steps"),
        ("--ste=5", "--steps"),
        ("--batch-size 4 --see 1", "--seed"),
        ("--ou x", "--out"),
        ("--lr 1", "--lr"),
        ("--kl-coe 0", "--kl-coef"),
        ("--ppo-ra 0.5", "--ppo-ratio"),
        ("--res x", "--resume"),
        ("--overw", "--overwrite"),
        ("--dry", "--dry-run"),
        ("--keep-best -eval/nll --seed=0", "--seed"),
    ],
)
def test_a_flag_that_is_set_here_is_refused_however_it_is_spelt(words, named):
    with pytest.raises(UserError, match=rf"^{named} is not for train.py here"):
        compare.parse_args(["--", *words.split()])


@pytest.mark.parametrize(
    "words, message",
    [
        ("--nonsense 3", "unrecognized arguments: --nonsense 3"),
        ("--s 3", "ambiguous option: --s"),
        ("--batch-size", "--batch-size: expected one argument"),
        ("--temperature 0", "--temperature: expected a number"),
        ("--limit 4 -- --steps 5", "unrecognized arguments"),
        ("--limit 4 --", "unrecognized arguments"),
        ("word", "unrecognized arguments: word"),
        ("--beta 0.3", "--beta belongs to dpo and does nothing here"),
        ("--micro-batch-size 2 --grad-accum 2", "say the same in two ways"),
        ("--schedule gate", "--schedule gate follows the scores, not --ppo-ratio"),
    ],
)
def test_what_train_would_refuse_is_refused_before_it_starts(words, message):
    with pytest.raises(UserError, match=message) as caught:
        compare.parse_args(["--out", "c", "--", *words.split()])
    assert "\n" not in str(caught.value)


def test_flags_of_train_pass_through_as_they_are():
    words = "--keep-best -eval/nll --sft-warm 3 --batch-size=4 --data a.jsonl b.jsonl".split()
    args, train_flags = compare.parse_args(["--steps", "10", "--", *words])
    assert train_flags == words and args.steps == 10
    line = compare.command_line(compare.Job("hybrid", 3, 1e-3, 0.02), args, train_flags)
    assert line[line.index("--keep-best") :][: len(words)] == words


def test_equal_numbers_are_one_job_and_different_ones_have_different_folders():
    words = "--lrs 1e-4 0.0001 1.00000001e-4 1e-4 --kl-coefs 0.1 .1 -0.0 0 0.10000000000000001"
    args, _ = compare.parse_args(words.split())
    assert args.lrs == [1e-4, 1.00000001e-4] and args.kl_coefs == [0.1, 0.0]
    assert not str(args.kl_coefs[1]).startswith("-")
    jobs = compare.tuning_grid(args)
    assert len(jobs) == 2 + 3 * 4 and len(set(jobs)) == len(jobs)
    assert len({job.folder(Path("c")) for job in jobs}) == len(jobs)
    # The names that ordinary numbers have always had
    for lr, kl, name in (
        (1e-3, 0.05, "lr0.001-kl0.05"),
        (3e-5, 0.0, "lr3e-05-kl0"),
        (2.0, 1e-7, "lr2-kl1e-07"),
        (1.00000001e-4, 0.1 + 0.2, "lr0.000100000001-kl0.30000000000000004"),
    ):
        folder = compare.Job("SFT, then PPO", 4, lr, kl).folder(Path("c"))
        assert folder == Path("c") / f"sft-then-ppo-seed4-{name}"
    numbers = [math.nextafter(1e-3, 1), 1e-3, math.nextafter(1e-3, 0), 0.0010000004, 1e22, 1e22 * 3]
    assert all(float(compare.exact(number)) == number for number in numbers)


@pytest.fixture
def pretended(tmp_path, monkeypatch):
    """Runs that only write metrics. -> the names of those that were begun, and a dict: the start
    of a name -> the exit status and the log of a run that fails."""
    trained, failing = [], {}

    def run(children, command, environment, log):
        folder = Path(command[command.index("--out") + 1])
        steps = int(command[command.index("--steps") + 1])
        trained.append(folder.name)
        for prefix, (status, text) in failing.items():
            if folder.name.startswith(prefix):
                log.write_text(text)
                return status
        (folder / "final").mkdir(parents=True)
        (folder / "config.json").write_text('{"batch_size": 4, "ppo_ratio": 0.5}')
        rows = [
            {"step": step, "phase": "eval", "eval/nll": 3.0 - step, "eval/reward": 0.5 * step}
            for step in (0, steps)
        ]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return 0

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(compare.Children, "run", run)
    monkeypatch.setattr(compare, "load_pyplot", lambda what: None)
    monkeypatch.setattr(compare, "pareto", lambda results, path: None)
    return trained, failing


def test_a_run_that_fails_is_one_line_and_the_others_are_kept(pretended, capsys):
    trained, failing = pretended
    bar = "train: 10%\rtrain: 20%\n"
    failing["ppo-"] = (1, f"{bar}Traceback\n  File x\nRuntimeError: out of memory at 7\n\n")
    command = "--out c --seeds 2 --steps 2 --lrs 1e-3 --kl-coefs 0.1 --jobs 1".split()
    with pytest.raises(SystemExit) as caught:
        main(command)
    out, err = capsys.readouterr()
    log = Path("c") / "ppo-seed1-lr0.001-kl0.1.log"
    line = (
        f"PPO (seed 1, lr 0.001, kl-coef 0.1) failed, see {log}: RuntimeError: out of memory at 7"
    )
    assert err == f"error: {line} (and 1 more failed)\n" and caught.value.code == 2
    assert {line, line.replace("seed 1", "seed 2").replace("seed1", "seed2")} < {*out.splitlines()}
    assert len(trained) == 8 and out.count("done: ") == 6
    assert not (Path("c") / "compare.json").exists()
    trained.clear()
    failing.clear()
    failing["ppo-seed2"] = (-9, "step 3\n")
    with pytest.raises(SystemExit):
        main(command)
    assert trained == ["ppo-seed1-lr0.001-kl0.1", "ppo-seed2-lr0.001-kl0.1"]
    assert capsys.readouterr().err.endswith("ppo-seed2-lr0.001-kl0.1.log: ended by signal 9\n")
    failing.clear()
    trained.clear()
    report = main(command)
    assert trained == ["ppo-seed2-lr0.001-kl0.1"]
    assert {arm: len(runs) for arm, runs in report["runs"].items()} == dict.fromkeys(
        ("SFT", "PPO", "SFT, then PPO", "hybrid"), 2
    )


def test_a_mistake_of_the_command_is_not_repeated_by_every_run(pretended, capsys):
    trained, failing = pretended
    failing[""] = (2, "error: --data nowhere.jsonl does not exist\n")
    with pytest.raises(SystemExit):
        main("--out c --seeds 2 --steps 2 --jobs 1".split())
    assert trained == ["sft-seed0-lr0.001-kl0.02"]
    log = Path("c") / "sft-seed0-lr0.001-kl0.02.log"
    what = f"SFT (seed 0, lr 0.001, kl-coef 0.02) failed, see {log}"
    assert capsys.readouterr().err == (
        f"error: {what}: error: --data nowhere.jsonl does not exist\n"
    )


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


def test_two_comparisons_do_not_share_a_folder(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(compare, "load_pyplot", lambda what: None)
    out = tmp_path / "c"
    out.mkdir()
    flags = ["--steps", "3", "--out", str(out)]
    (out / "command.json").write_text(
        json.dumps({"steps": 3, "train.py": []}, indent=1) + "\n", encoding="utf-8"
    )
    with one_writer(str(out)), pytest.raises(SystemExit):
        main(flags)
    assert f"{out} is in use" in capsys.readouterr().err
    assert [path.name for path in out.iterdir()] == ["command.json"]
