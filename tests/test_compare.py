"""The comparison of schedules: its arithmetic by hand, and a whole one, small."""

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
from conftest import ROOT, build_lm
from test_children import wait_until
from transformers import AutoModelForCausalLM, AutoTokenizer

import arms
import budgets
import compare
import evaluate
import figures
import razor
import report
import tables
import train
from compare import main
from data import batch_of
from engine import UserError
from hybrid import HybridModel
from lock import one_writer
from runs import read_rows


def test_intervals_are_students():
    assert tables.interval([1.0, 3.0]) == (2.0, pytest.approx(12.71))  # s = sqrt 2, sqrt n = sqrt 2
    mean, half = tables.interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert mean == 3 and half == pytest.approx(2.776 * math.sqrt(2.5) / math.sqrt(5))
    assert math.isnan(tables.interval([7.0])[1])


DEFAULTS = ["SFT", "PPO", "SFT, then PPO", "hybrid"]


def test_the_arms_differ_in_their_schedule_alone():
    four = arms.parse_arms(arms.DEFAULT, steps=101)
    assert list(four) == DEFAULTS
    assert {flag for flags in four.values() for flag in flags if flag.startswith("--")} == {
        "--ppo-ratio",
        "--sft-warmup",
    }
    assert four["SFT, then PPO"] == ["--ppo-ratio", "1", "--sft-warmup", "50"]


@pytest.mark.parametrize(
    "text, label, flags",
    [
        ("then@0.29", "SFT, then PPO@0.29", "--ppo-ratio 1 --sft-warmup 29"),  # 0.29 * 100 < 29
        ("then@.50", "SFT, then PPO", "--ppo-ratio 1 --sft-warmup 50"),
        ("turns@0.25", "hybrid@0.25", "--ppo-ratio 0.25"),
        ("ramp", "ramp", "--ppo-ratio 0:1"),
        ("ramp@.2:0.80", "ramp@0.2:0.8", "--ppo-ratio 0.2:0.8"),
        ("gate", "gate", "--schedule gate --threshold 0"),
        ("buffer@-0.5", "buffer@-0.5", "--schedule buffer --threshold -0.5"),
        ("mix@0.8", "mix@0.8", "--schedule mix --ppo-ratio 0.8"),
        ("my arm=--lr 1e-4 --reward 'a + b'", "my arm", "--lr|1e-4|--reward|a + b"),
        ("plain=", "plain", ""),
    ],
)
def test_an_arm_is_the_flags_it_says(text, label, flags):
    words = flags.split("|" if "|" in flags else None)
    assert arms.parse_arm(text, steps=100) == (label, words)


@pytest.mark.parametrize(
    "text, message",
    [
        ("thn", "--arms thn: unknown; expected sft, ppo, then"),
        ("sft@0.5", "sft has no number"),
        ("then@1", "above 0 and below 1, found 1"),
        ("then@nan", "above 0 and below 1, found nan"),
        ("then@0.1:0.2", "above 0 and below 1, found 0.1:0.2"),
        ("turns@half", "expected a number after @, found 'half'"),
        ("turns@1.5", "--ppo-ratio: expected a number"),
        ("turns@", "expected a number after @, found ''"),
        ("mix@0", "--schedule mix without PPO is pure SFT"),
        ("a/b=--lr 1", "a name has letters, digits"),
        ("hybrid=--lr 1", "hybrid has a meaning here"),
        ("x=--lr '1", "No closing quotation"),
        ("x=--lrr 1", "--arms x: unrecognized arguments: --lrr 1"),
        ("x=--steps 0", "--steps: expected a whole number at least 1"),
        ("x=--seed 3", "--seed is not for an arm here"),
        ("x=--sft-warmup 600", "--sft-warmup 600 leaves no PPO step in --steps 600"),
    ],
)
def test_a_wrong_arm_is_one_line_before_anything_runs(text, message):
    with pytest.raises(UserError, match=message) as caught:
        compare.parse_args(["--out", "c", "--arms", "sft", text])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("texts", [("x=--lr 1", "y=", "x=--lr 2"), ("A b=", "a, b=")])
def test_two_arms_do_not_share_a_name_or_a_folder(texts):
    with pytest.raises(UserError, match=f"--arms has two arms called {texts[-1].split('=')[0]};"):
        arms.parse_arms(texts, steps=10)
    assert len(arms.parse_arms(["x=--lr 1", "turns@0.5", "turns", "x=--lr 1"], steps=10)) == 2


def test_an_arm_has_its_own_steps_and_rates():
    own = ["short=--steps 37 --kl-coef 0.7 --ppo-ratio 1", "fixed=--lr 3e-4 --rl-lr 1e-4", "sft"]
    args, _ = compare.parse_args(["--arms", *own, "--steps", "90", "--kl-coefs", "0.1", "0.3"])
    assert [arm.steps for arm in args.arms.values()] == [37, 90, 90]
    jobs = [(job.arm, job.lr, job.kl_coef) for job in compare.tuning_grid(args)]
    assert jobs == [
        ("short", 1e-3, None),
        ("short", 3e-3, None),
        ("fixed", None, 0.1),
        ("fixed", None, 0.3),
        ("SFT", 1e-3, None),
        ("SFT", 3e-3, None),
    ]
    line = compare.command_line(compare.Job("short", 2, 1e-3, None), args)
    run = train.parse_args(line, train.ALGORITHMS, train.SCHEDULES)
    assert (run.steps, run.eval_every, run.kl_coef, run.lr, run.seed) == (37, 3, 0.7, 1e-3, 2)
    assert (run.ppo_epochs, run.minibatches, run.reward) == (1, 1, "sentiment")


def test_an_arm_without_a_kl_price_is_tuned_over_rates_alone():
    own = ["taught=--teacher out/final", "pairs=--algorithm dpo", "turns"]
    args, _ = compare.parse_args(["--arms", *own, "--lrs", "7e-4", "--kl-coefs", "0.3"])
    jobs = [(job.arm, job.lr, job.kl_coef) for job in compare.tuning_grid(args)]
    assert jobs == [("taught", 7e-4, None), ("pairs", 7e-4, None), ("hybrid", 7e-4, 0.3)]


def test_untuned_runs_have_the_defaults_of_the_task():
    words = "--untuned --arms sft then@0.25 dpo=--algorithm|dpo -- --data sort".split(" ")
    args, _ = compare.parse_args([word.replace("|", " ") for word in words])
    jobs = compare.tuning_grid(args)
    assert [(job.lr, job.kl_coef) for job in jobs] == [(None, None)] * 3
    assert jobs[1].folder(Path("c")) == Path("c/sft-then-ppo@0.25-seed0")
    run = train.parse_args(compare.command_line(jobs[1], args), train.ALGORITHMS, train.SCHEDULES)
    assert (run.steps, run.sft_warmup, run.batch_size, run.reward) == (500, 125, 64, "exact_match")
    assert (run.lr, run.rl_lr) == (None, None)  # prepare.py fills in those of the task
    assert (run.kl_coef, run.ppo_epochs, run.minibatches) == (0.02, 4, 2)
    # Tuned: one update a rollout, and the reward is still that of the task.
    args, _ = compare.parse_args("--arms turns -- --data sort".split())
    run = train.parse_args(
        compare.command_line(compare.Job("hybrid", 1, 2e-3, 0.1), args),
        train.ALGORITHMS,
        train.SCHEDULES,
    )
    assert (run.ppo_epochs, run.minibatches, run.reward, run.lr) == (1, 1, "exact_match", 2e-3)
    assert compare.parse_args(["--untuned"])[0].steps == 500  # train.py's own
    with pytest.raises(UserError, match="--untuned tries no --lrs"):
        compare.parse_args(["--untuned", "--lrs", "1e-3"])


def test_a_summary_counts_updates_and_what_was_sampled():
    rows = [
        {"step": 0, "phase": "eval", "eval/nll": 6.0, "eval/reward": 0.0},
        {"step": 1, "phase": "sft", "sft/loss": 1.0, "seconds": 0.5},
        {"step": 2, "phase": "ppo", "ppo/response_length": 7.25, "ppo/epochs": 2.0, "seconds": 1.5},
        {"step": 2, "phase": "eval", "eval/nll": 3.0, "eval/reward": 0.5},
        # --target-kl: one pass instead of two; a gate: SFT on the hard prompts
        {"step": 3, "phase": "ppo", "ppo/response_length": 2.0, "ppo/epochs": 1.0, "sft/loss": 1.0},
        {"step": 4, "phase": "grpo", "ppo/response_length": 1.0, "grpo/epochs": 2.0},
        {"step": 5, "phase": "ppo", "ppo/skipped_steps": 1.0},  # the reward was not finite
        {"step": 6, "phase": "dpo", "dpo/loss": 1.0},
        {"step": 6, "phase": "eval", "eval/nll": 2.0, "eval/reward": 1.0},
    ]
    summary = budgets.summarise(rows, {"batch_size": 4, "minibatches": 3})
    assert (summary["seconds"], summary["sampled tokens"], summary["rollouts"]) == (2, 41, 3)
    assert summary["updates"] == 1 + 2 * 3 + (3 + 1) + 2 * 3 + 0 + 1
    points = [
        (p["step"], p["updates"], p["sampled tokens"], p["eval/nll"]) for p in summary["curve"]
    ]
    assert points == [(0, 0, 0, 6.0), (2, 7, 29, 3.0), (6, 18, 41, 2.0)]
    assert summary["before"] == {"step": 0, "eval/nll": 6.0, "eval/reward": 0.0}
    assert budgets.utility(summary, "reward-nll") == -1
    assert budgets.utility(summary, "eval/reward") == 1
    with pytest.raises(
        UserError,
        match="fluent is no metric of these runs; they have reward-nll, eval/nll, eval/reward",
    ):
        budgets.utility(summary, "fluent")


def test_the_metric_is_that_of_the_flag_or_of_the_task():
    summary = {"eval/nll": 1.0, "eval/reward": 2.0, "eval/fluent_and_positive": 0.5}
    assert budgets.metric_of(summary, None, "reward-nll") == "eval/fluent_and_positive"
    assert budgets.metric_of({**summary, "eval/right": 1.0}, None, "reward-nll") == "eval/right"
    assert budgets.metric_of(summary, None, "eval/nll") == "eval/nll"
    assert budgets.metric_of(summary, "eval/reward", "eval/nll") == "eval/reward"
    with pytest.raises(UserError, match="--metric eval/right is no metric of these runs; they hav"):
        budgets.metric_of(summary, "eval/right", "reward-nll")


def curve_of(*points) -> dict:
    """A summary with a curve of (updates, sampled tokens, seconds, metric)."""
    names = (*budgets.BUDGETS, "m")
    curve = [dict(zip(names, point)) for point in points]
    return {**curve[-1], "curve": curve, "rollouts": int(curve[-1]["sampled tokens"] > 0)}


def test_a_curve_is_read_between_its_evaluations():
    # As in `then`: no token is sampled for half of the run.
    run = curve_of((0, 0, 0.0, 0.1), (30, 0, 2.5, 0.4), (37, 0, 3.1, 0.2), (90, 1300, 19.0, 0.93))
    read = [
        ("updates", 0, 0.1),
        ("updates", 10, 0.2),
        ("updates", 30, 0.4),
        ("updates", 34, 0.4 - 0.2 * 4 / 7),
        ("updates", 91, 0.93),
        ("sampled tokens", 130, 0.2 + 0.73 / 10),
        ("sampled tokens", 1300, 0.93),
        ("seconds", 2.8, 0.3),
    ]
    for budget, amount, value in read:
        assert budgets.read_at(run["curve"], budget, amount, "m") == pytest.approx(value)


def test_the_equal_budget_is_the_most_that_every_run_which_samples_has_spent():
    sft = curve_of((0, 0, 0.0, 0.0), (50, 0, 5.0, 0.3))
    one = curve_of((0, 0, 0.0, 0.0), (200, 1000, 40.0, 0.8))
    other = curve_of((0, 0, 0.0, 0.0), (80, 2000, 32.0, 1.0))
    results = {"SFT": [sft], "PPO": [one, other]}
    assert budgets.add_equal_budgets(results, "m") == {
        "updates": 80,
        "sampled tokens": 1000,
        "seconds": 32.0,
    }
    names = [f"at equal {budget}" for budget in budgets.BUDGETS]
    assert [sft[name] for name in names] == [0.3] * 3  # it shows its end
    assert [one[name] for name in names] == pytest.approx([0.32, 0.8, 0.64])
    assert [other[name] for name in names] == pytest.approx([1.0, 0.5, 1.0])
    table = tables.markdown({arm: [r | {"before": {}} for r in results[arm]] for arm in results},
                            "m", budgets.add_equal_budgets(results, "m"))  # fmt: skip
    head, _, before, *rows = table.splitlines()
    assert head.endswith(
        "| m at the end | at 80 updates | at 1,000 sampled tokens | at 32 seconds |"
    )
    assert before.startswith("| before training | - |")
    half = 12.71 * 0.2 / math.sqrt(2) / math.sqrt(2)  # 0.8 and 1.0
    assert rows[1].split(" | ")[5] == f"0.90 ± {half:.2f}"
    # Where nothing samples, there is no budget of tokens.
    assert set(budgets.add_equal_budgets({"SFT": [sft]}, "m")) == {"updates", "seconds"}


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
    def runs(*curves, rollouts=9):
        names = "eval/nll", "eval/reward"
        curves = [[dict(zip(names, point)) for point in curve] for curve in curves]
        return [{"curve": curve, "rollouts": rollouts} for curve in curves]

    results = {
        "SFT": runs([(2.0, 0.0), (1.0, 0.6)], rollouts=0),
        "hybrid": runs([(2.0, 0.0), (1.5, 0.4)], [(2.0, 0.0), (1.7, 0.6)]),  # ends at 1.6 with 0.5
        "PPO": runs([(2.0, 0.0), (3.0, 1.0)]),  # half of the way
        "SFT, then PPO": runs([(2.0, 0.0), (1.0, 0.4)]),
    }
    assert tables.at_equal_reward(results).endswith(
        "(0.50): hybrid: 1.60; PPO: 2.50; SFT, then PPO: never there.\n"
    )
    results.pop("hybrid")
    assert tables.at_equal_reward(results) == ""


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
    found = json.loads((tmp_path / "c" / "compare.json").read_text())
    assert found["command"] == ["compare.py", *command]
    assert set(found["runs"]) == {"SFT", "PPO", "SFT, then PPO", "hybrid"} and all(
        len(runs) == 2 for runs in found["runs"].values()
    )
    assert len(found["tuning"]) == 6, "SFT has no KL price to tune"
    best = max(
        (r for r in found["tuning"] if r["arm"] == "PPO"),
        key=lambda r: r["eval/reward"] - r["eval/nll"],
    )
    rates = {"lr": best["lr"], "rl_lr": 0.6 * best["lr"], "kl_coef": best["kl_coef"]}
    assert found["chosen"]["PPO"] == rates
    assert found["metric"] == "eval/fluent_and_positive"
    tokens, steps = (
        {arm: runs[0][name] for arm, runs in found["runs"].items()}
        for name in ("sampled tokens", "rollouts")
    )
    assert tokens["SFT"] == 0 < tokens["hybrid"] < tokens["PPO"] and steps == {
        "SFT": 0,
        "PPO": 4,
        "SFT, then PPO": 2,
        "hybrid": 1,
    }
    for run in found["runs"]["PPO"]:
        assert len(run["curve"]) == 5 and run["updates"] == run["rollouts"]
        assert run["at equal updates"] == run["eval/fluent_and_positive"]
    table = (tmp_path / "c" / "compare.md").read_text()
    assert (
        "| before training |" in table
        and "| hybrid |" in table
        and f"at {found['equal budgets']['sampled tokens']:,} sampled tokens |" in table
        and (tmp_path / "c" / "pareto.png").stat().st_size > 10_000
    )

    # Interrupted: one run is lost, one has no final model. The command repeats these two only.
    lost, cut = (tmp_path / "c" / name for name in ("sft-seed1-lr0.001", "sft-seed2-lr0.001"))
    shutil.rmtree(lost)
    shutil.rmtree(cut / "final")
    trained.clear()
    main(command)
    assert trained == [str(path.relative_to(tmp_path)) for path in (lost, cut)]
    again = json.loads((tmp_path / "c" / "compare.json").read_text())

    def without_times(runs):
        points = [[{**point, "seconds": 0} for point in run["curve"]] for run in runs]
        return [
            {**run, "seconds": 0, "at equal seconds": 0, "curve": curve}
            for run, curve in zip(runs, points)
        ]

    assert without_times(again["runs"]["SFT"]) == without_times(found["runs"]["SFT"])
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
    kls = [run["KL from the start"] for of_arm in runs.values() for run in of_arm]
    assert all(0 < kl < 5 for kl in kls) and len(set(kls)) == 3  # of two steps
    assert runs["PPO"][0]["before"]["KL from the start"] == 0
    for name in ("pareto.png", "razor.png"):
        assert (tmp_path / "c" / name).stat().st_size > 10_000
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


def test_the_kl_from_the_start_is_that_of_the_whole_vocabulary(model, monkeypatch):
    other = HybridModel(build_lm(model.lm.config.model_type, seed=5))
    rows = [[3, 4, 5, 6, 7], [8, 9, 10], [11, 12, 13, 14, 15, 16, 17], [18, 19]]
    masks = [[i >= begin for i in range(len(row))] for row, begin in zip(rows, (2, 1, 6, 1))]
    batch = batch_of(None, rows, masks)
    monkeypatch.setattr(razor, "ROWS", 3)
    monkeypatch.setattr(razor, "LOGIT_CHUNK", 2)
    total = 0.0
    for row, mask in zip(rows, masks):  # the definition, each row alone, in float64
        rows_of = [m.lm(torch.tensor([row])).logits[0] for m in (model, other)]
        logits = [of_model.detach().double() / 0.7 for of_model in rows_of]
        p, q = [torch.softmax(of_model, dim=-1) for of_model in logits]
        for t, is_response in enumerate(mask):
            if is_response:
                total += float((p[t - 1] * (p[t - 1] / q[t - 1]).log()).sum())
    found = razor.response_kl(model, other, batch, temperature=0.7)
    assert found == pytest.approx(total / 4, rel=1e-4) and found > 0.5
    back = razor.response_kl(other, model, batch, temperature=0.7)
    assert back != pytest.approx(found, rel=1e-2)
    assert razor.response_kl(model, model, batch, temperature=0.7) == 0


def test_labels_cover_no_point_and_no_other_label():
    pyplot = pytest.importorskip("matplotlib.pyplot", reason="matplotlib is an optional package")
    figure, axis = pyplot.subplots()
    points = [(1.8, 0.5)] * 3 + [(1.81, 0.51), (6.0, 0.1), (6.5, 0.9)]
    axis.plot(*zip(*points), "o")
    figure.draw_without_rendering()
    figures.place_labels(axis, [(*point, "0.05", "C1") for point in points], points)
    boxes = [text.get_window_extent() for text in axis.texts]
    assert len(boxes) == 6
    pixels = axis.transData.transform(points)
    for i, box in enumerate(boxes):
        assert not box.count_overlaps(boxes[:i]) and not box.count_contains(pixels)
    pyplot.close(figure)


def test_the_figures_of_one_seed_and_of_far_values_are_drawn(tmp_path, monkeypatch):
    pyplot = pytest.importorskip("matplotlib.pyplot", reason="matplotlib is an optional package")

    def run(nll, reward, kl, perplexity):
        curve = [{"eval/nll": 2.0, "eval/reward": -0.1}, {"eval/nll": nll, "eval/reward": reward}]
        names = "KL from the start", "perplexity elsewhere"
        before = dict(zip(names, (0.0, 90.0)))
        return {**curve[-1], "curve": curve, "before": before, **dict(zip(names, (kl, perplexity)))}

    near = {"SFT": [run(1.7, 0.1, 0.3, 80.0)], "PPO": [run(1.9, 0.7, 0.5, 99.0)]}
    far = {**near, "PPO": [run(6.5, 0.7, 31.0, 2e4)]}
    job = compare.Job("PPO", 0, 1e-3, 0.02)
    closed = []
    monkeypatch.setattr(pyplot, "close", closed.append)
    title = "stories_of_a_long_name.txt, model stories: 120 steps; elsewhere: another long file.txt"
    for name, results in (("near", near), ("far", far)):
        path = tmp_path / f"{name}.png"
        figures.draw_pareto(results, [(job, results["PPO"][0])], "eval/reward", title, path)
        figures.draw_razor(results, title, tmp_path / f"razor-{name}.png")
        for drawn in (path, tmp_path / f"razor-{name}.png"):
            assert drawn.stat().st_size > 10_000
    monkeypatch.undo()
    for figure in closed:
        [legend] = figure.legends
        assert figure.get_suptitle().split() == title.split()
        box = figure._suptitle.get_window_extent()
        assert figure.bbox.x0 < box.x0 and box.x1 < figure.bbox.x1
        assert not box.overlaps(legend.get_window_extent())
        pyplot.close(figure)


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
    line = compare.command_line(compare.Job("hybrid", 3, 1e-3, 0.02), args)
    assert line[line.index("--keep-best") :][: len(words)] == words


def test_different_rewards_are_said_before_training(capsys):
    arms_of = ["--arms", "turns", "other=--reward bleu"]
    args, _ = compare.parse_args([*arms_of, "--untuned"])
    compare.say_different_rewards(args.rewards)
    said = "the arms have different rewards (hybrid: sentiment; other: bleu)"
    assert said in capsys.readouterr().out
    args, _ = compare.parse_args([*arms_of[:2], "same=--kl-coef 0.1", "--untuned"])
    compare.say_different_rewards(args.rewards)
    assert capsys.readouterr().out == ""


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
        config = {"batch_size": 4, "ppo_ratio": 0.5, "lr": 1e-3, "rl_lr": 2e-3, "kl_coef": 0.1}
        (folder / "config.json").write_text(json.dumps(config))
        rows = [
            {"step": step, "phase": "eval", "eval/nll": 3.0 - step, "eval/reward": 0.5 * step}
            for step in (0, steps)
        ]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return 0

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(compare.Children, "run", run)
    monkeypatch.setattr(compare, "load_pyplot", lambda what: None)
    monkeypatch.setattr(report, "draw_pareto", lambda *given: None)
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
    found = main(command)
    assert trained == ["ppo-seed2-lr0.001-kl0.1"]
    assert {arm: len(runs) for arm, runs in found["runs"].items()} == dict.fromkeys(
        ("SFT", "PPO", "SFT, then PPO", "hybrid"), 2
    )


def test_arms_may_be_added_but_not_changed(pretended, capsys):
    trained, _ = pretended
    common = "--out c --seeds 1 --steps 2 --lrs 1e-3 --kl-coefs 0.1 --jobs 1".split()
    main([*common, "--arms", "sft", "x=--ppo-ratio 0.3"])
    trained.clear()
    found = main([*common, "--arms", "x=--ppo-ratio 0.3", "mix@0.8", "y=--steps 1"])
    assert trained == ["mix@0.8-seed1-lr0.001-kl0.1", "y-seed1-lr0.001-kl0.1"]
    assert list(found["runs"]) == ["x", "mix@0.8", "y"]
    assert "y: 1 steps, lr 0.001" in (Path("c") / "compare.md").read_text()
    trained.clear()
    main([*common, "--arms", "y=--steps 1"])  # its own number of steps is complete
    assert trained == []
    capsys.readouterr()
    for arms_now in (["x=--ppo-ratio 0.4"], ["sft", "y=--steps 2"]):
        with pytest.raises(SystemExit):
            main([*common, "--arms", *arms_now])
        assert f"holds a comparison with another arm '{arms_now[-1][0]}'" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main("--out c --untuned --seeds 1 --steps 2 --arms sft".split())
    assert "other --steps or flags of train.py" in capsys.readouterr().err
    assert trained == []


def test_a_mistake_of_the_command_is_not_repeated_by_every_run(pretended, capsys):
    trained, failing = pretended
    failing[""] = (2, "error: --data nowhere.jsonl does not exist\n")
    with pytest.raises(SystemExit):
        main("--out c --seeds 2 --steps 2 --jobs 1".split())
    assert trained == ["sft-seed0-lr0.001"]
    log = Path("c") / "sft-seed0-lr0.001.log"
    what = f"SFT (seed 0, lr 0.001) failed, see {log}"
    assert capsys.readouterr().err == (
        f"error: {what}: error: --data nowhere.jsonl does not exist\n"
    )


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="children outlive a SIGKILL elsewhere")
def test_no_run_goes_on_after_compare_is_killed_and_the_command_repeats_it(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is an optional package")
    flags = "--out c --seeds 1 --steps 400 --lrs 1e-3 --kl-coefs 0.1 --jobs 1 --".split()
    command = [sys.executable, str(ROOT / "compare.py"), *flags, *SMALL]
    metrics = tmp_path / "c" / "sft-seed1-lr0.001" / "metrics.jsonl"

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
