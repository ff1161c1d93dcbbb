"""SFT alone, PPO alone, SFT then PPO, and the hybrid: with equal code, data, steps and tuning.

    python compare.py --seeds 5 --out compare                                # the built-in task
    python compare.py --out compare-mine -- --model gpt2 --data examples/my_data.jsonl

What follows `--` goes to train.py as it is. Every step of every arm is ONE update on one batch
(`--ppo-epochs 1 --minibatches 1`, unless you give others): equal steps are equal updates on equally
many rows. The table also has what sampling takes: tokens and seconds. Every arm is tuned over the
same learning rates and KL coefficients, on seed 0, which is not reported; --select says by what.

`--tax` adds the perplexity of the model before training and of every final model on a text that the
runs did not train on. The same command continues an interrupted comparison. A complete run is not
repeated, also when seeds, rates or coefficients are added. No train.py goes on after compare.py has
ended, however it ended (children.py).

The table has means and 95 % intervals (Student's t over seeds). compare.json has every number.
pareto.png shows the reward against the held-out NLL along training, a line for each arm: up and to
the left is better. Left out on purpose: a winner.
"""

import itertools
import json
import math
import os
import statistics
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import transformers

from children import Children
from engine import Parser, UserError, check_new_folder, number, one_line_errors
from evaluate import perplexity, whole_texts
from plot import load_pyplot
from runs import read_config, read_rows

# Student's t, 97.5 %, by degrees of freedom (0 to 9)
T_975 = [math.nan, 12.71, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262]
COUNTS = ("PPO steps", "sampled tokens", "seconds")
TABLE_COLUMNS = ("eval/nll", "eval/reward", "eval/reward/", "eval/kl", "perplexity elsewhere")
TABLE_COLUMNS += ("eval/fluent_and_positive", "eval/distinct", "eval/distinct_2")
TABLE_COLUMNS += ("eval/response_length", *COUNTS)  # "eval/reward/" stands for every leaf
SET_HERE = ("--steps", "--seed", "--out", "--lr", "--kl-coef", "--ppo-ratio")
SET_HERE += ("--resume", "--overwrite", "--dry-run")  # flags that may not follow `--`


class Job(NamedTuple):
    """One run of train.py."""

    arm: str
    seed: int
    lr: float
    kl_coef: float

    def folder(self, out: Path) -> Path:
        arm = self.arm.replace(", ", "-").replace(" ", "-").lower()
        return out / f"{arm}-seed{self.seed}-lr{self.lr:g}-kl{self.kl_coef:g}"


def arms(steps: int) -> dict[str, list[str]]:
    """The flags in which the arms differ. The hybrid keeps the SFT warm-up of train.py."""
    return {
        "SFT": ["--ppo-ratio", "0"],
        "PPO": ["--ppo-ratio", "1", "--sft-warmup", "0"],
        "SFT, then PPO": ["--ppo-ratio", "1", "--sft-warmup", str(steps // 2)],
        "hybrid": ["--ppo-ratio", "0.5"],
    }


def summarise(rows: list[dict], batch_size: int) -> dict:
    """metrics.jsonl -> the last evaluation, the first, the curve (step, NLL, reward), COUNTS."""
    evaluations = []
    for row in rows:
        if row["phase"] == "eval":
            metrics = {n: value for n, value in row.items() if n == "step" or n.startswith("eval/")}
            evaluations.append(metrics)
    lengths = [row["ppo/response_length"] for row in rows if "ppo/response_length" in row]
    return {
        **evaluations[-1],
        "before": evaluations[0],
        "curve": [(e["step"], e.get("eval/nll"), e.get("eval/reward")) for e in evaluations],
        "PPO steps": len(lengths),
        "sampled tokens": round(sum(lengths) * batch_size),
        "seconds": sum(row.get("seconds", 0.0) for row in rows),
    }


def interval(values: list[float]) -> tuple[float, float]:
    """The mean and half of its 95 % interval, which is NaN for one value."""
    n = len(values)
    mean = statistics.mean(values)
    if n == 1:
        return mean, math.nan
    return mean, T_975[n - 1] * statistics.stdev(values) / math.sqrt(n)


def utility(summary: dict, select: str) -> float:
    """What tuning maximises: a metric, or (the default) the reward minus the held-out NLL."""
    if select == "reward-nll":
        return summary["eval/reward"] - summary["eval/nll"]
    if select not in summary:
        metrics = ", ".join(name for name in summary if name.startswith("eval/"))
        raise UserError(
            f"--select {select} is no metric of these runs; they have reward-nll, {metrics}"
        )
    return summary[select]


def columns_in(summaries: list[dict]) -> list[str]:
    """TABLE_COLUMNS that some run has; the leaves of the reward by name, if there are several."""
    names = list(dict.fromkeys(name for summary in summaries for name in summary))
    columns = []
    for column in TABLE_COLUMNS:
        if column == "eval/reward/":
            leaves = [name for name in names if name.startswith(column)]
            columns += leaves if len(leaves) > 1 else []
        elif column in names:
            columns.append(column)
    return columns


def cell(values: list[float], is_count: bool) -> str:
    """One cell of the table: mean ± half of the 95 % interval."""
    if not values:
        return "-"
    mean, half = interval(values)
    digits = 0 if is_count or abs(mean) >= 100 else 2
    text = f"{mean:,.{digits}f}"
    if math.isnan(half) or half == 0:
        return text
    return f"{text} ± {half:,.{digits}f}"


def markdown(results: dict[str, list[dict]]) -> str:
    """A row for the model before training, a row for each arm, a column for each measurement."""
    results = {"before training": [run["before"] for run in results["hybrid"]], **results}
    columns = columns_in([run for runs in results.values() for run in runs])
    head = [name.removeprefix("eval/") for name in columns]
    lines = [f"| arm | {' | '.join(head)} |", "|---" * (len(columns) + 1) + "|"]
    for arm, runs in results.items():
        cells = []
        for name in columns:
            values = [run[name] for run in runs if name in run]
            cells.append(cell(values, is_count=name in COUNTS))
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    return "\n".join(lines)


def mean_curve(runs: list[dict]) -> list[tuple[float, float]]:
    """(NLL, reward) at every evaluation, the mean over seeds."""
    curve = []
    for points in zip(*[run["curve"] for run in runs]):  # the same evaluation of every run
        _, nll, reward = zip(*points)
        curve.append((statistics.mean(nll), statistics.mean(reward)))
    return curve


def nll_at_reward(curve: list[tuple[float, float]], reward: float) -> float | None:
    """The NLL where a curve of (NLL, reward) first reaches that reward, linearly interpolated."""
    for (nll, low), (next_nll, high) in itertools.pairwise(curve):
        if low < reward <= high:
            return nll + (next_nll - nll) * (reward - low) / (high - low)
    return None


def at_equal_reward(results: dict[str, list[dict]]) -> str:
    """One line: the held-out NLL of the PPO arms where they have the reward of the final hybrid."""
    nll, reward = mean_curve(results["hybrid"])[-1]
    others = []
    for arm in ("PPO", "SFT, then PPO"):
        arm_nll = nll_at_reward(mean_curve(results[arm]), reward)
        others.append(f"{arm}: {'never there' if arm_nll is None else f'{arm_nll:.2f}'}")
    return (
        f"Held-out NLL at the reward with which the hybrid ends ({reward:.2f}): "
        f"hybrid: {nll:.2f}; {'; '.join(others)}."
    )


def pareto(results: dict[str, list[dict]], path: Path) -> None:
    """Reward against held-out NLL along training, the mean over seeds.

    A large dot is the end of an arm, a small dot the end of one seed, a cross the model before
    training. The cross is left out where it is far away, as it is for random weights.
    """
    pyplot = load_pyplot("compare")
    figure, axis = pyplot.subplots(figsize=(6.4, 4.4), layout="constrained")
    sft_nll = statistics.mean(run["eval/nll"] for run in results["SFT"])
    is_near = mean_curve(results["hybrid"])[0][0] < 1.5 * sft_nll
    for arm, runs in results.items():
        curve = mean_curve(runs)[0 if is_near else 1 :]
        [line] = axis.plot(*zip(*curve), ".-", markersize=2, linewidth=1.2, label=arm)
        color = line.get_color()
        axis.plot(*curve[-1], "o", color=color, markersize=7)
        for run in runs:
            axis.plot(run["eval/nll"], run["eval/reward"], ".", color=color, markersize=5)
    if is_near:
        axis.plot(*curve[0], "kx", label="before training")
    axis.set_xlabel("held-out NLL, nats a token (less is better)")
    axis.set_ylabel("reward (more is better)")
    axis.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def is_complete(folder: Path, steps: int) -> bool:
    """Was this run trained and measured to its end?"""
    # If a reward raises at the last evaluation, there is a final model without that evaluation.
    rows = read_rows(folder / "metrics.jsonl")
    measured = any(row["step"] == steps and row["phase"] == "eval" for row in rows)
    return measured and (folder / "final").is_dir()


def make_folder(out: Path, command: dict) -> None:
    """Make the folder with a note of the command. Raises UserError for another note."""
    note, text = out / "command.json", json.dumps(command, indent=1) + "\n"
    if not note.is_file():
        check_new_folder(str(out))
        out.mkdir()
        note.write_text(text, encoding="utf-8")
    elif note.read_text(encoding="utf-8") != text:
        raise UserError(
            f"--out {out} holds a comparison with other --steps or flags of train.py ({note}); "
            "choose another folder"
        )


def train_once(job: Job, args, train_flags: list[str], children: Children) -> dict:
    """Run train.py for this job, unless its folder is complete. Returns the summary of the run."""
    folder = job.folder(Path(args.out))
    is_new = not is_complete(folder, args.steps)
    if is_new:
        flags = ["--steps", args.steps, "--eval-every", max(1, args.steps // 10)]
        flags += ["--save-every", 0, "--reward", "sentiment", "--ppo-epochs", 1, "--minibatches", 1]
        flags += [*train_flags, *arms(args.steps)[job.arm], "--seed", job.seed, "--lr", job.lr]
        flags += ["--kl-coef", job.kl_coef, "--out", folder, "--overwrite"]
        command = [sys.executable, str(Path(__file__).with_name("train.py")), *map(str, flags)]
        threads = max(1, (os.cpu_count() or 1) // args.jobs)
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        done = children.run(command, environment)
        if done.returncode:
            lines = done.stderr.strip().splitlines() or ["no error message"]
            raise UserError(f"{' '.join(command[1:])} ended with: {lines[-1]}")
    print(f"{'done' if is_new else 'found'}: {folder.name}", flush=True)
    summary = summarise(read_rows(folder / "metrics.jsonl"), read_config(folder)["batch_size"])
    if any(None in point for point in summary["curve"]):
        raise UserError(
            f"{folder} has an evaluation without a reward or a held-out NLL, "
            "so there is nothing to compare"
        )
    utility(summary, args.select)  # raises after the first run if there is no such metric
    return summary


def tuning_grid(args) -> list[Job]:
    """Every learning rate with every KL coefficient, for each arm, on seed 0. SFT has no KL."""
    grid = []
    for arm in arms(args.steps):
        kl_coefs = args.kl_coefs[:1] if arm == "SFT" else args.kl_coefs
        grid += [Job(arm, 0, lr, kl) for lr, kl in itertools.product(args.lrs, kl_coefs)]
    return grid


def run_all(args, train_flags: list[str]) -> tuple[list, dict[str, Job], list]:
    """Tune, then run every seed, `--jobs` runs at a time.

    Returns the pairs (job, summary) of tuning, the best job of each arm, the pairs of the seeds.
    With one learning rate and one KL coefficient nothing is tuned.
    """
    names = list(arms(args.steps))

    def run(job: Job) -> dict:
        return train_once(job, args, train_flags, children)

    # The children are the inner context: it ends them before the pool waits for its threads.
    with ThreadPoolExecutor(args.jobs) as pool, Children() as children:
        grid = tuning_grid(args)
        best = {job.arm: job for job in grid}
        tuned = []
        if len(grid) > len(names):
            tuned = list(zip(grid, pool.map(run, grid)))
            for arm in names:
                utilities = {job: utility(s, args.select) for job, s in tuned if job.arm == arm}
                best[arm] = max(utilities, key=utilities.get)
        jobs = [best[arm]._replace(seed=seed) for arm in names for seed in range(1, args.seeds + 1)]
        finished = list(zip(jobs, pool.map(run, jobs)))
    return tuned, best, finished


def add_tax(finished: list, out: Path, elsewhere: list) -> None:
    """Add the perplexity on another text, before training and after, to the summaries."""
    before = {}
    model = read_config(finished[0][0].folder(out))["model"]
    if model != "tiny":  # the perplexity of random weights says nothing
        before["perplexity elsewhere"] = perplexity(model, elsewhere)
    for job, summary in finished:
        summary["before"] |= before
        final = str(job.folder(out) / "final")
        summary["perplexity elsewhere"] = perplexity(final, elsewhere)


def write_report(args, argv: list[str], tuned: list, best: dict[str, Job], finished: list) -> dict:
    """Write compare.json, compare.md and pareto.png, print the table. Returns the JSON."""
    out = Path(args.out)
    results = {arm: [summary for job, summary in finished if job.arm == arm] for arm in best}
    tuning = []
    for job, summary in tuned:
        metrics = {name: value for name, value in summary.items() if name.startswith("eval/")}
        tuning.append({"arm": job.arm, "lr": job.lr, "kl_coef": job.kl_coef, **metrics})
    report = {
        "command": ["compare.py", *argv],
        "chosen": {arm: {"lr": job.lr, "kl_coef": job.kl_coef} for arm, job in best.items()},
        "tuning": tuning,
        "runs": results,
    }
    (out / "compare.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    chosen = []
    for arm, job in best.items():
        kl = "" if arm == "SFT" else f", kl-coef {job.kl_coef:g}"
        chosen.append(f"{arm}: lr {job.lr:g}{kl}")
    how = f"Tuned on seed 0 by {args.select}" if tuned else "Not tuned"
    text = (
        f"{markdown(results)}\n\n{args.steps} steps, {args.seeds} seeds, mean and 95 % interval. "
        f"{how}: {'; '.join(chosen)}.\n{at_equal_reward(results)}\n"
    )
    (out / "compare.md").write_text(text, encoding="utf-8")
    print(text)
    pareto(results, out / "pareto.png")
    return report


def parse_args(argv: list[str]):
    """-> the flags of this file, and what follows `--`, for train.py."""
    parser = Parser(__doc__.splitlines()[0])
    add, count, positive = parser.add_argument, number(int, 1), number(float, 0, above=True)
    add("--out", default="compare", help="folder of all runs, compare.md, .json, pareto.png")
    add("--seeds", type=number(int, 1, 10), default=5, help="runs of each arm: seeds 1, 2, ...")
    add("--steps", type=count, default=600, help="steps of every run")
    add("--lrs", type=positive, nargs="+", default=[1e-3, 3e-3], help="learning rates to try")
    add("--kl-coefs", type=number(float, 0), nargs="+", default=[0.02, 0.1], help="KL coefficients")
    add("--select", default="reward-nll", help="tuning maximises it: reward-nll, or any metric")
    what = "text to measure perplexity on: a file, or hub dataset [configuration [split]]"
    add("--tax", nargs="+", metavar="SOURCE", help=what)
    add("--jobs", type=count, default=2, help="runs at a time")
    own, train_flags = argv, []
    if "--" in argv:
        end = argv.index("--")
        own, train_flags = argv[:end], argv[end + 1 :]
    args = parser.parse_args(own)
    for flag in train_flags:
        if flag.split("=")[0] in SET_HERE:
            raise UserError(
                f"{flag} is not for train.py here: the arms differ in it, "
                "or compare has a flag of its own for it"
            )
    return args, train_flags


@one_line_errors
def main(argv: list[str] | None = None) -> dict:
    """Tune, run, measure, write. Returns what compare.json holds."""
    argv = sys.argv[1:] if argv is None else argv
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    args, train_flags = parse_args(argv)
    load_pyplot("compare")  # a missing package or text is an error now, not after an hour
    elsewhere = whole_texts(args.tax) if args.tax else []
    # Every run depends on these two. New seeds, rates or coefficients only add runs.
    make_folder(Path(args.out), {"steps": args.steps, "train.py": train_flags})
    tuned, best, finished = run_all(args, train_flags)
    if elsewhere:
        add_tax(finished, Path(args.out), elsewhere)
    return write_report(args, argv, tuned, best, finished)


if __name__ == "__main__":
    main(sys.argv[1:])
