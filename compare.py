"""SFT alone, PPO alone, SFT then PPO, and the hybrid: with equal code, data, steps and tuning.

    python compare.py --seeds 5 --out compare                                # the built-in task
    python compare.py --out compare-mine -- --model gpt2 --data examples/my_data.jsonl

What follows `--` goes to train.py. Every step of every arm is ONE update on one batch
(`--ppo-epochs 1 --minibatches 1`, unless you give others): equal steps are equal updates on equally
many rows. The table also has what sampling takes: tokens and seconds. Every arm is tuned over the
same learning rates and KL coefficients, on seed 0, which is not reported; --select says by what.

`--tax` adds the perplexity of the model before training and of every final model on a text that the
runs did not train on. The same command continues an interrupted comparison. A complete run is not
repeated, also when seeds, rates or coefficients are added; one that failed is. What a run printed
is in its log. No train.py goes on after compare.py has ended, however it ended (children.py).

The table has means and 95 % intervals (Student's t over seeds). compare.json has every number.
pareto.png shows the reward against the held-out NLL along training, a line for each arm: up and to
the left is better. Left out on purpose: a winner.
"""

import itertools
import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import transformers

import flags
from children import Children
from engine import Parser, UserError, check_new_folder, number, one_line_errors
from evaluate import perplexity, whole_texts
from lock import one_writer
from plot import load_pyplot
from runs import read_config, read_rows
from schedules import SCHEDULES
from tables import at_equal_reward, markdown, pareto
from train import ALGORITHMS

# Flags of train.py that may not follow `--`
SET_HERE = ("steps", "seed", "out", "lr", "kl_coef", "ppo_ratio", "resume", "overwrite", "dry_run")


class RunFailed(UserError):
    """A run of train.py that ended with an error."""


class Job(NamedTuple):
    """One run of train.py."""

    arm: str
    seed: int
    lr: float
    kl_coef: float

    def folder(self, out: Path) -> Path:
        arm = self.arm.replace(", ", "-").replace(" ", "-").lower()
        return out / f"{arm}-seed{self.seed}-lr{exact(self.lr)}-kl{exact(self.kl_coef)}"


def exact(value: float) -> str:
    """The shortest text that means this number and no other one: no two share a folder."""
    return f"{value:g}" if float(f"{value:g}") == value else repr(value)


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


def command_line(job: Job, args, train_flags: list[str]) -> list[str]:
    """The flags of train.py for this job."""
    words = ["--steps", args.steps, "--eval-every", max(1, args.steps // 10), "--save-every", 0]
    words += ["--reward", "sentiment", "--ppo-epochs", 1, "--minibatches", 1, *train_flags]
    words += [*arms(args.steps)[job.arm], "--seed", job.seed, "--lr", job.lr]
    words += ["--kl-coef", job.kl_coef, "--out", job.folder(Path(args.out)), "--overwrite"]
    return list(map(str, words))


def train_once(job: Job, args, train_flags: list[str], children: Children) -> dict:
    """Run train.py for this job, unless its folder is complete. Returns the summary of the run.

    Raises RunFailed where train.py fails, UserError where there is nothing to compare.
    """
    folder = job.folder(Path(args.out))
    is_new = not is_complete(folder, args.steps)
    if is_new:
        program = [sys.executable, str(Path(__file__).with_name("train.py"))]
        threads = max(1, (os.cpu_count() or 1) // args.jobs)
        # Unbuffered: the last line of the log is the last one that was written.
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"}
        log = Path(f"{folder}.log")  # not inside: train.py replaces the folder
        status = children.run([*program, *command_line(job, args, train_flags)], environment, log)
        if status != 0:
            lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
            reason = f"ended by signal {-status}" if status < 0 else [log.name, *lines][-1]
            what = f"seed {job.seed}, lr {exact(job.lr)}, kl-coef {exact(job.kl_coef)}"
            raise RunFailed(f"{job.arm} ({what}) failed, see {log}: {reason}")
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
    With one learning rate and one KL coefficient nothing is tuned. When a run fails, the others go
    on, and only then UserError is raised. But none starts before one has ended well: a mistake of
    the command stops all of them.
    """
    names, ended, failed = list(arms(args.steps)), [], []

    def run(job: Job) -> dict | None:
        if failed and not ended:
            return None
        try:
            summary = train_once(job, args, train_flags, children)
        except RunFailed as problem:
            failed.append(problem)
            print(problem, flush=True)
            return None
        ended.append(job)
        return summary

    def run_each(jobs: list[Job]) -> list[tuple[Job, dict]]:
        finished = list(zip(jobs, pool.map(run, jobs)))
        if failed:
            more = f" (and {len(failed) - 1} more failed)" if len(failed) > 1 else ""
            raise UserError(f"{failed[0]}{more}")
        return finished

    # The children are the inner context: it ends them before the pool waits for its threads.
    with ThreadPoolExecutor(args.jobs) as pool, Children() as children:
        grid = tuning_grid(args)
        best = {job.arm: job for job in grid}
        tuned = run_each(grid) if len(grid) > len(names) else []
        for arm in names if tuned else ():
            utilities = {job: utility(s, args.select) for job, s in tuned if job.arm == arm}
            best[arm] = max(utilities, key=utilities.get)
        jobs = [best[arm]._replace(seed=seed) for arm in names for seed in range(1, args.seeds + 1)]
        return tuned, best, run_each(jobs)


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
        kl = "" if arm == "SFT" else f", kl-coef {exact(job.kl_coef)}"
        chosen.append(f"{arm}: lr {exact(job.lr)}{kl}")
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
    for name in ("lrs", "kl_coefs"):  # equal numbers are one job; `+ 0.0` makes 0 of -0
        setattr(args, name, list(dict.fromkeys(value + 0.0 for value in getattr(args, name))))
    check_train_flags(args, train_flags)
    return args, train_flags


def check_train_flags(args, train_flags: list[str]) -> None:
    """Raises UserError for a flag that is set here, and for what train.py would refuse."""
    parser = flags.make_parser(ALGORITHMS, SCHEDULES)
    parser.set_defaults(**dict.fromkeys(vars(parser.parse_args([]))))  # None: not given
    given = vars(parser.parse_args(flags.join_metric(train_flags)))  # `--step=5` is --steps too
    for name in SET_HERE:
        if given[name] is not None:
            raise UserError(
                f"{flags.spelled(name)} is not for train.py here: the arms differ in it, "
                "or compare has a flag of its own for it"
            )
    for job in tuning_grid(args):
        flags.parse_args(command_line(job, args, train_flags), ALGORITHMS, SCHEDULES)


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
    with one_writer(args.out):
        tuned, best, finished = run_all(args, train_flags)
        if elsewhere:
            add_tax(finished, Path(args.out), elsewhere)
        return write_report(args, argv, tuned, best, finished)


if __name__ == "__main__":
    main(sys.argv[1:])
