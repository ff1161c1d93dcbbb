"""SFT alone, PPO alone, SFT then PPO, and the two in turns: the same code, data, steps and tuning for all, several seeds, one table and one figure.

    python evaluate.py compare --seeds 5 --out compare                                   # built-in task
    python evaluate.py compare --seeds 5 --out compare-mine -- --model gpt2 --data my_data.jsonl --reward rouge_l

Whatever follows `--` goes to train.py as it stands. Every step of every arm is ONE optimiser step on one batch (`--ppo-epochs 1 --minibatches 1`, unless
you say otherwise), so equal steps are equal updates and equal numbers of rows; what sampling costs on top, tokens and seconds, is in the table. Every arm is tuned
over the same grid of learning rates and KL prices on a seed of its own, which is not among those that are reported; the choice is by --select.

`--tax` adds what training has cost elsewhere: the perplexity of every final model, and of the one before training, on a text that it was not trained for.
The same command goes on where it was interrupted: a run that is complete is not repeated, also where there are to be more seeds, rates or prices.

Left out on purpose: a winner. The table has means with 95 % intervals (Student's t over seeds), compare.json every number, pareto.png the reward against the
held-out NLL along training, one line an arm: up and to the left is better.
"""

import itertools
import json
import math
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from engine import Parser, UserError, check_new_folder, number, one_line_errors
from evaluate import load_pyplot, perplexity, whole_texts
from runs import read_config, read_rows

T_975 = [
    math.nan,
    12.71,
    4.303,
    3.182,
    2.776,
    2.571,
    2.447,
    2.365,
    2.306,
    2.262,
]  # Student's t, 97.5 %, by degrees of freedom (0 to 9)
COLUMNS = (
    "eval/nll",
    "eval/reward",
    "eval/reward/",
    "eval/kl",
    "perplexity elsewhere",
    "eval/fluent_and_positive",
)  # eval/reward/: every leaf
COUNTS = ("PPO steps", "sampled tokens", "seconds")
COLUMNS += ("eval/distinct", "eval/distinct_2", "eval/response_length", *COUNTS)
SET_HERE = (
    "--steps",
    "--seed",
    "--out",
    "--lr",
    "--kl-coef",
    "--ppo-ratio",
    "--resume",
    "--overwrite",
    "--dry-run",
)  # what is not to be said behind the --


def arms(steps: int) -> dict[str, list[str]]:
    """The flags in which the arms differ. The hybrid keeps train.py's own warm-up, 30 % of the steps for `tiny`: the table counts each arm's PPO steps."""
    return {
        "SFT": ["--ppo-ratio", "0"],
        "PPO": ["--ppo-ratio", "1", "--sft-warmup", "0"],
        "SFT, then PPO": ["--ppo-ratio", "1", "--sft-warmup", str(steps // 2)],
        "hybrid": ["--ppo-ratio", "0.5"],
    }


def summarise(rows: list[dict], batch_size: int) -> dict:
    """A run's metrics.jsonl -> its last evaluation, its first, the curve (step, NLL, reward), PPO steps, sampled tokens and seconds of the steps."""
    evaluations = [
        {name: value for name, value in row.items() if name == "step" or name.startswith("eval/")}
        for row in rows
        if row["phase"] == "eval"
    ]
    lengths = [row["ppo/response_length"] for row in rows if "ppo/response_length" in row]
    return {
        **evaluations[-1],
        "before": evaluations[0],
        "curve": [
            (row["step"], row.get("eval/nll"), row.get("eval/reward")) for row in evaluations
        ],
        "PPO steps": len(lengths),
        "sampled tokens": round(sum(lengths) * batch_size),
        "seconds": sum(row.get("seconds", 0.0) for row in rows),
    }


def interval(values: list[float]) -> tuple[float, float]:
    """Mean and half of its 95 % interval; the half is NaN for one value."""
    n = len(values)
    return statistics.mean(values), T_975[n - 1] * statistics.stdev(values) / math.sqrt(
        n
    ) if n > 1 else math.nan


def utility(run: dict, select: str) -> float:
    """What tuning maximises: a metric by name, or (the default) the reward minus the held-out NLL."""
    if select == "reward-nll":
        return run["eval/reward"] - run["eval/nll"]
    if select not in run:
        raise UserError(
            f"--select {select} is no metric of these runs; they have reward-nll, {', '.join(name for name in run if name.startswith('eval/'))}"
        )
    return run[select]


def columns_in(runs: list[dict]) -> list[str]:
    """COLUMNS that some run has; the leaves of the reward by name, if it has several."""
    names = list(dict.fromkeys(name for run in runs for name in run))
    leaves = [name for name in names if name.startswith("eval/reward/")]
    expanded = {"eval/reward/": leaves if len(leaves) > 1 else []}
    return [name for column in COLUMNS for name in expanded.get(column, [column]) if name in names]


def markdown(results: dict[str, list[dict]]) -> str:
    """Mean and 95 % interval of every column that the runs have; the first row is the model before training, then an arm a row."""
    results = {"before training": [run["before"] for run in results["hybrid"]], **results}
    columns = columns_in([run for runs in results.values() for run in runs])
    lines = [
        "| arm | " + " | ".join(name.removeprefix("eval/") for name in columns) + " |",
        "|---" * (len(columns) + 1) + "|",
    ]
    for arm, runs in results.items():
        cells = []
        for name in columns:
            values = [run[name] for run in runs if name in run]
            if not values:
                cells.append("-")
                continue
            mean, half = interval(values)
            digits = 0 if abs(mean) >= 100 or name in COUNTS else 2
            cells.append(
                f"{mean:,.{digits}f}"
                + ("" if math.isnan(half) or half == 0 else f" ± {half:,.{digits}f}")
            )
        lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def mean_curve(runs: list[dict]) -> list[tuple[float, float]]:
    """(NLL, reward) at every evaluation, the mean over seeds."""
    return [
        tuple(statistics.mean(column) for column in zip(*[point[1:] for point in points]))
        for points in zip(*[run["curve"] for run in runs])
    ]


def nll_at_reward(curve: list[tuple[float, float]], reward: float) -> float | None:
    """The NLL at which a curve of (NLL, reward) first rises to that reward, by linear interpolation; None if it never does."""
    for (nll, low), (next_nll, high) in itertools.pairwise(curve):
        if low < reward <= high:
            return nll + (next_nll - nll) * (reward - low) / (high - low)
    return None


def at_equal_reward(results: dict[str, list[dict]]) -> str:
    """One line: the held-out NLL of PPO's arms where they earn what the hybrid earns at its end."""
    nll, reward = mean_curve(results["hybrid"])[-1]
    passed = {
        arm: nll_at_reward(mean_curve(results[arm]), reward) for arm in ("PPO", "SFT, then PPO")
    }
    others = "; ".join(
        f"{arm}: {'never there' if at is None else f'{at:.2f}'}" for arm, at in passed.items()
    )
    return f"Held-out NLL at the reward with which the hybrid ends ({reward:.2f}): hybrid: {nll:.2f}; {others}."


def pareto(results: dict[str, list[dict]], path: Path) -> None:
    """Reward against held-out NLL along training, the mean over seeds: a large dot where the arm ends, a dot for every seed there, a cross where
    all began (left out where it is far away, as it is for random weights)."""
    pyplot = load_pyplot("compare")
    figure, axis = pyplot.subplots(figsize=(6.4, 4.4), layout="constrained")
    is_near = mean_curve(results["hybrid"])[0][0] < 1.5 * statistics.mean(
        run["eval/nll"] for run in results["SFT"]
    )
    for arm, runs in results.items():
        mean = mean_curve(runs)[0 if is_near else 1 :]
        [line] = axis.plot(*zip(*mean), ".-", markersize=2, linewidth=1.2, label=arm)
        axis.plot(*mean[-1], "o", color=line.get_color(), markersize=7)
        for run in runs:
            axis.plot(
                run["eval/nll"], run["eval/reward"], ".", color=line.get_color(), markersize=5
            )
    if is_near:
        axis.plot(*mean[0], "kx", label="before training")
    axis.set_xlabel("held-out NLL, nats a token (less is better)")
    axis.set_ylabel("reward (more is better)")
    axis.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def is_complete(folder: Path, steps: int) -> bool:
    """Was this run trained and measured to its end? (A reward that raises at the last evaluation leaves a model without it.)"""
    return (folder / "final").is_dir() and any(
        row["step"] == steps and row["phase"] == "eval"
        for row in read_rows(folder / "metrics.jsonl")
    )


def make_folder(out: Path, asked: dict) -> None:
    """A new folder that remembers what was asked for, or the one of the same command, interrupted. Raises UserError for any other."""
    memory, text = out / "command.json", json.dumps(asked, indent=1) + "\n"
    if memory.is_file():
        if memory.read_text() != text:
            raise UserError(
                f"--out {out} holds a comparison with other --steps or flags of train.py ({memory}); choose another folder"
            )
        return
    check_new_folder(str(out))
    out.mkdir()
    memory.write_text(text)


@one_line_errors
def main(argv: list[str]) -> dict:
    """Tune, run, measure, write. Returns what compare.json holds."""
    parser = Parser(__doc__.splitlines()[0])
    count, positive = number(int, 1), number(float, 0, above=True)
    parser.add_argument(
        "--out",
        default="compare",
        help="folder for the runs, compare.md, compare.json and pareto.png",
    )
    parser.add_argument(
        "--seeds",
        type=number(int, 1, 10),
        default=5,
        help="runs of each arm, seeds 1, 2, ...; seed 0 is for tuning",
    )
    parser.add_argument("--steps", type=count, default=600, help="optimiser steps of every run")
    parser.add_argument(
        "--lrs",
        type=positive,
        nargs="+",
        default=[1e-3, 3e-3],
        help="learning rates to tune over; one is not tuned",
    )
    parser.add_argument(
        "--kl-coefs",
        type=number(float, 0),
        nargs="+",
        default=[0.02, 0.1],
        help="KL prices to tune over",
    )
    parser.add_argument(
        "--select",
        default="reward-nll",
        help="what tuning maximises: reward-nll, or a metric such as eval/fluent_and_positive",
    )
    parser.add_argument(
        "--tax",
        nargs="+",
        metavar="SOURCE",
        help="a file, or hub dataset [configuration [split]]: the perplexity of the final models there",
    )
    parser.add_argument("--jobs", type=count, default=2, help="runs at a time")
    ours, theirs = (
        (argv[: argv.index("--")], argv[argv.index("--") + 1 :]) if "--" in argv else (argv, [])
    )
    args = parser.parse_args(ours)
    for flag in theirs:
        if flag.split("=")[0] in SET_HERE:
            raise UserError(
                f"{flag} is not for train.py here: the arms differ in it, or compare has a flag of its own for it"
            )
    load_pyplot("compare")  # what cannot work says so now, not after an hour
    elsewhere = whole_texts(args.tax) if args.tax else []
    out = Path(args.out)
    make_folder(
        out, {"steps": args.steps, "train.py": theirs}
    )  # what every run depends on; seeds, rates and prices have runs of their own
    common = [
        "--steps",
        args.steps,
        "--eval-every",
        max(1, args.steps // 10),
        "--save-every",
        0,
        "--reward",
        "sentiment",
        "--ppo-epochs",
        1,
        "--minibatches",
        1,
        *theirs,
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // args.jobs))}

    def folder_of(arm: str, seed: int, lr: float, kl_coef: float) -> Path:
        return (
            out
            / f"{arm.replace(', ', '-').replace(' ', '-').lower()}-seed{seed}-lr{lr:g}-kl{kl_coef:g}"
        )

    def run(job: tuple[str, int, float, float]) -> dict:
        arm, seed, lr, kl_coef = job
        folder = folder_of(*job)
        if not is_complete(folder, args.steps):
            flags = [
                *common,
                *arms(args.steps)[arm],
                "--seed",
                seed,
                "--lr",
                lr,
                "--kl-coef",
                kl_coef,
                "--out",
                folder,
                "--overwrite",
            ]
            command = [sys.executable, str(Path(__file__).with_name("train.py")), *map(str, flags)]
            done = subprocess.run(command, env=environment, capture_output=True, text=True)
            if done.returncode:
                raise UserError(
                    f"{' '.join(command[1:])} ended with: {(done.stderr.strip().splitlines() or ['no word of why'])[-1]}"
                )
            print(f"done: {folder.name}", flush=True)
        else:
            print(f"found: {folder.name}", flush=True)
        summary = summarise(read_rows(folder / "metrics.jsonl"), read_config(folder)["batch_size"])
        if any(None in point for point in summary["curve"]):
            raise UserError(
                f"{folder} has an evaluation without a reward or a held-out NLL, so there is nothing to compare"
            )
        utility(summary, args.select)  # a metric that is not there says so after the first run
        return summary

    names = list(arms(args.steps))
    with ThreadPoolExecutor(args.jobs) as pool:
        grid = [
            (arm, 0, lr, kl)
            for arm in names
            for lr, kl in itertools.product(
                args.lrs, args.kl_coefs[:1] if arm == "SFT" else args.kl_coefs
            )
        ]
        is_tuned = len(grid) > len(names)
        tuned = list(zip(grid, pool.map(run, grid))) if is_tuned else [(job, None) for job in grid]
        best = {
            arm: max(
                (pair for pair in tuned if pair[0][0] == arm),
                key=lambda pair: utility(pair[1], args.select) if pair[1] else 0.0,
            )[0]
            for arm in names
        }
        jobs = [(arm, seed, *best[arm][2:]) for arm in names for seed in range(1, args.seeds + 1)]
        finished = list(zip(jobs, pool.map(run, jobs)))
    if elsewhere:
        model = read_config(folder_of(*jobs[0]))["model"]
        before = (
            {} if model == "tiny" else {"perplexity elsewhere": perplexity(model, elsewhere)}
        )  # random weights have none worth a number
        for job, summary in finished:
            summary["before"] |= before
            summary["perplexity elsewhere"] = perplexity(str(folder_of(*job) / "final"), elsewhere)
    results = {arm: [summary for job, summary in finished if job[0] == arm] for arm in names}
    report = {
        "command": ["evaluate.py", "compare", *argv],
        "chosen": {arm: {"lr": best[arm][2], "kl_coef": best[arm][3]} for arm in names},
        "tuning": [
            {
                "arm": job[0],
                "lr": job[2],
                "kl_coef": job[3],
                **{k: v for k, v in run.items() if k.startswith("eval/")},
            }
            for job, run in tuned
            if run
        ],
        "runs": results,
    }
    (out / "compare.json").write_text(json.dumps(report, indent=1) + "\n")
    chosen = "; ".join(
        f"{arm}: lr {best[arm][2]:g}" + ("" if arm == "SFT" else f", kl-coef {best[arm][3]:g}")
        for arm in names
    )
    how = f"Tuned on seed 0 by {args.select}" if is_tuned else "Not tuned"
    text = f"{markdown(results)}\n\n{args.steps} steps, {args.seeds} seeds, mean and 95 % interval. {how}: {chosen}.\n{at_equal_reward(results)}\n"
    (out / "compare.md").write_text(text)
    print(text)
    pareto(results, out / "pareto.png")
    return report
