"""Schedules side by side: SFT, PPO, SFT then PPO, the hybrid, others. Code, data, tuning are equal.

    python compare.py --seeds 5 --out compare                                # the built-in task
    python compare.py --arms sft then@0.25 turns --out compare-mine -- --data examples/my_data.jsonl
    python compare.py --untuned --out compare-sort -- --data sort

A row of the table is an arm (arms.py): a schedule, or any flags of train.py. What follows `--` goes
to train.py for all arms. Every step is ONE update on one batch (`--ppo-epochs 1 --minibatches 1`,
unless you give others), so equal steps are equal updates on equally many rows (but an update after
a change of phase is shorter, engine.enter_phase). Every arm is tuned over the same learning rates
and KL coefficients, on seed 0, which is not reported; --select says by what. An arm that names --lr
or --kl-coef keeps it.

With `--untuned` nothing is tuned or preset: rates, KL coefficient, passes over a rollout are those
of train.py and of the task, and seeds are 0, 1, ... --steps is 600; with --untuned it is that of
the task or of train.py. The reward is that of the task, else `sentiment`.

The table has means and 95 % intervals (Student's t over seeds) and what a run took. Its last
columns have --metric at the end and at equal updates, sampled tokens and seconds: at the most that
every run which samples has spent, linearly between evaluations; a run that spent less shows its
end. A run read before its end has a learning rate that has not decayed yet (budgets.py).

pareto.png has the metric against the held-out NLL; compare.json has every number. `--tax` adds the
perplexity of the model before training and of every final model on a text that the runs did not
train on, the KL between the two (razor.py) and razor.png. The same command continues an interrupted
comparison. A complete run is not repeated, also when arms, seeds, rates or coefficients are added;
one that failed is. What a run printed is in its log. No train.py goes on after compare.py has
ended, however it ended (children.py). Left out on purpose: a winner.
"""

import itertools
import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import transformers

import arms
import flags
import schedules
from arms import exact
from budgets import metric_of, summarise, utility
from children import Children
from engine import Parser, UserError, check_new_folder, number, one_line_errors
from evaluate import whole_texts
from lock import one_writer
from plot import load_pyplot
from razor import add_tax
from report import write_report
from runs import read_config, read_rows
from schedules import SCHEDULES
from tasks import task_of
from train import ALGORITHMS

# Flags of train.py that neither an arm may have nor what follows `--`
SET_HERE = ("seed", "out", "resume", "overwrite", "dry_run")
# Those that what follows `--` may not have: the arms differ in it, or compare has a flag for it
OF_ARMS = ("steps", "ppo_ratio")
TUNED = ("lr", "kl_coef")  # nor these, unless nothing is tuned


class RunFailed(UserError):
    """A run of train.py that ended with an error."""


class Job(NamedTuple):
    """One run of train.py."""

    arm: str
    seed: int
    lr: float | None  # None: not set here
    kl_coef: float | None

    def folder(self, out: Path) -> Path:
        lr = "" if self.lr is None else f"-lr{exact(self.lr)}"
        kl = "" if self.kl_coef is None else f"-kl{exact(self.kl_coef)}"
        return out / f"{arms.slug(self.arm)}-seed{self.seed}{lr}{kl}"

    def said(self) -> str:
        lr = "" if self.lr is None else f", lr {exact(self.lr)}"
        kl = "" if self.kl_coef is None else f", kl-coef {exact(self.kl_coef)}"
        return f"{self.arm} (seed {self.seed}{lr}{kl})"


class Arm(NamedTuple):
    """One row of the table: its flags of train.py, and what follows from them."""

    words: list[str]  # all but seed, lr, kl_coef, out
    steps: int
    lrs: list[float | None]  # to try
    kl_coefs: list[float | None]


def make_arm(own: list[str], args, train_flags: list[str]) -> Arm:
    """An arm from its own flags and those of the command. Raises UserError for a wrong flag."""
    given = given_flags(own)
    refuse(given, SET_HERE, "an arm")
    run = flags.parse_args(["--steps", str(args.steps), *train_flags, *own], ALGORITHMS, SCHEDULES)
    schedules.check_flags(run)
    algorithm = ALGORITHMS[run.algorithm]
    used = (*algorithm.step_flags, *algorithm.flags) if run.ppo_ratio != 0 else ()
    task = task_of(run.data or "reviews")
    reward = "sentiment" if task is None else task.reward
    words = ["--steps", run.steps, "--eval-every", max(1, run.steps // 10), "--save-every", 0]
    words += ["--reward", reward]
    if "ppo_epochs" in used and not args.untuned:
        words += ["--ppo-epochs", 1, "--minibatches", 1]
    words = [*map(str, words), *train_flags, *own]
    is_lr_set = args.untuned or given["lr"] is not None
    is_kl_set = args.untuned or given["kl_coef"] is not None or "kl_coef" not in used
    lrs = [None] if is_lr_set else args.lrs
    return Arm(words, run.steps, lrs, [None] if is_kl_set else args.kl_coefs)


def is_complete(folder: Path, steps: int) -> bool:
    """Was this run trained and measured to its end?"""
    # If a reward raises at the last evaluation, there is a final model without that evaluation.
    rows = read_rows(folder / "metrics.jsonl")
    measured = any(row["step"] == steps and row["phase"] == "eval" for row in rows)
    return measured and (folder / "final").is_dir()


def note_command(out: Path, command: dict) -> None:
    """Write down in the folder what every run depends on. What is there may lack arms.

    Raises UserError where the folder holds a comparison with other flags.
    """
    note, old = out / "command.json", command
    if note.is_file():
        old = json.loads(note.read_text(encoding="utf-8"))
        old = {"untuned": False, "arms": {}, **old}  # an older comparison
    known = old["arms"]
    changed = [arm for arm, own in command["arms"].items() if known.get(arm, own) != own]
    what = f"another arm {changed[0]!r}" if changed else None
    if {**old, "arms": {}} != {**command, "arms": {}}:
        what = "other --steps or flags of train.py"
    if what is not None:
        raise UserError(
            f"--out {out} holds a comparison with {what} ({note}); choose another folder"
        )
    command = {**command, "arms": {**known, **command["arms"]}}
    note.write_text(json.dumps(command, indent=1) + "\n", encoding="utf-8")


def command_line(job: Job, args) -> list[str]:
    """The flags of train.py for this job."""
    words = [*args.arms[job.arm].words, "--seed", job.seed]
    if job.lr is not None:
        words += ["--lr", job.lr]
    if job.kl_coef is not None:
        words += ["--kl-coef", job.kl_coef]
    return [*map(str, words), "--out", str(job.folder(Path(args.out))), "--overwrite"]


def train_once(job: Job, args, children: Children) -> dict:
    """Run train.py for this job, unless its folder is complete. Returns the summary of the run.

    Raises RunFailed where train.py fails, UserError where there is nothing to compare.
    """
    folder = job.folder(Path(args.out))
    is_new = not is_complete(folder, args.arms[job.arm].steps)
    if is_new:
        program = [sys.executable, str(Path(__file__).with_name("train.py"))]
        threads = max(1, (os.cpu_count() or 1) // args.jobs)
        # Unbuffered: the last line of the log is the last one that was written.
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"}
        log = Path(f"{folder}.log")  # not inside: train.py replaces the folder
        status = children.run([*program, *command_line(job, args)], environment, log)
        if status != 0:
            lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
            reason = f"ended by signal {-status}" if status < 0 else [log.name, *lines][-1]
            raise RunFailed(f"{job.said()} failed, see {log}: {reason}")
    print(f"{'done' if is_new else 'found'}: {folder.name}", flush=True)
    summary = summarise(read_rows(folder / "metrics.jsonl"), read_config(folder))
    if not all({"eval/nll", "eval/reward"} <= set(point) for point in summary["curve"]):
        raise UserError(
            f"{folder} has an evaluation without a reward or a held-out NLL, "
            "so there is nothing to compare"
        )
    utility(summary, args.select)  # these raise after the first run if there is no such metric
    metric_of(summary, args.metric, args.select)
    return summary


def tuning_grid(args) -> list[Job]:
    """Every learning rate with every KL coefficient that an arm has, on seed 0. SFT has no KL."""
    grid = []
    for name, arm in args.arms.items():
        grid += [Job(name, 0, *rates) for rates in itertools.product(arm.lrs, arm.kl_coefs)]
    return grid


def run_all(args) -> tuple[list, dict[str, Job], list]:
    """Tune, then run every seed, `--jobs` runs at a time.

    Returns the pairs (job, summary) of tuning, the best job of each arm, the pairs of the seeds.
    An arm with one learning rate and one KL coefficient is not tuned. When a run fails, the others
    go on, and only then UserError is raised. But none starts before one has ended well: a mistake
    of the command stops all of them.
    """
    ended, failed = [], []

    def run(job: Job) -> dict | None:
        if failed and not ended:
            return None
        try:
            summary = train_once(job, args, children)
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
        best, grid = {}, {}
        for job in tuning_grid(args):
            best[job.arm] = job
            grid.setdefault(job.arm, []).append(job)
        tuned = run_each([job for jobs in grid.values() if len(jobs) > 1 for job in jobs])
        for arm in {job.arm for job, _ in tuned}:
            utilities = {job: utility(s, args.select) for job, s in tuned if job.arm == arm}
            best[arm] = max(utilities, key=utilities.get)
        seeds = range(args.seeds) if args.untuned else range(1, args.seeds + 1)
        jobs = [job._replace(seed=seed) for job in best.values() for seed in seeds]
        return tuned, best, run_each(jobs)


def parse_args(argv: list[str]):
    """-> the flags of this file, and what follows `--`, for train.py."""
    parser = Parser(__doc__.splitlines()[0])
    add, count, positive = parser.add_argument, number(int, 1), number(float, 0, above=True)
    add("--out", default="compare", help="folder of all runs, compare.md, .json, figures")
    what = f"{', '.join(arms.ARMS)}, some with a number (then@0.25), or NAME=FLAGS"
    add("--arms", nargs="+", metavar="ARM", default=arms.DEFAULT, help=what)
    add("--seeds", type=number(int, 1, 10), default=5, help="runs of each arm: seeds 1, 2, ...")
    add("--steps", type=count, help="steps of every run (default: 600; --untuned: as train.py)")
    add("--lrs", type=positive, nargs="+", help="learning rates to try (default: 1e-3 3e-3)")
    what = "KL coefficients to try (default: 0.02 0.1)"
    add("--kl-coefs", type=number(float, 0), nargs="+", help=what)
    what = "tune nothing, preset nothing: the defaults of train.py and the task; seeds 0, 1, ..."
    add("--untuned", action="store_true", help=what)
    add("--select", default="reward-nll", help="tuning maximises it: reward-nll, or any metric")
    what = (
        "what is compared at equal budgets, such as eval/reward (default: --select, or the task's)"
    )
    add("--metric", help=what)
    what = "text to measure perplexity on: a file, or hub dataset [configuration [split]]"
    add("--tax", nargs="+", metavar="SOURCE", help=what)
    add("--jobs", type=count, default=2, help="runs at a time")
    own, train_flags = argv, []
    if "--" in argv:
        end = argv.index("--")
        own, train_flags = argv[:end], argv[end + 1 :]
    args = parser.parse_args(own)
    if args.untuned and (args.lrs or args.kl_coefs):
        raise UserError("--untuned tries no --lrs and no --kl-coefs; leave out one of the two")
    args.lrs, args.kl_coefs = args.lrs or [1e-3, 3e-3], args.kl_coefs or [0.02, 0.1]
    for name in ("lrs", "kl_coefs"):  # equal numbers are one job; `+ 0.0` makes 0 of -0
        setattr(args, name, list(dict.fromkeys(value + 0.0 for value in getattr(args, name))))
    refused = (*SET_HERE, *OF_ARMS) if args.untuned else (*SET_HERE, *OF_ARMS, *TUNED)
    refuse(given_flags(train_flags), refused, "train.py")
    run = flags.parse_args(train_flags, ALGORITHMS, SCHEDULES)
    if args.steps is None:
        args.steps = run.steps if args.untuned else 600
    args.own = arms.parse_arms(args.arms, args.steps)  # the flags in which the arms differ
    args.arms = {}
    for label, own in args.own.items():
        try:
            args.arms[label] = make_arm(own, args, train_flags)
        except UserError as problem:
            raise UserError(f"--arms {label}: {problem}") from None
    args.rewards, args.rates = {}, {}  # arm -> its reward; the rates that matter to it
    for job in tuning_grid(args):
        of_run = flags.parse_args(command_line(job, args), ALGORITHMS, SCHEDULES)
        args.rewards[job.arm] = of_run.reward
        has_price = "kl_coef" in ALGORITHMS[of_run.algorithm].flags  # of the KL
        args.rates[job.arm] = ("lr", "rl_lr", "kl_coef") if has_price else ("lr", "rl_lr")
    return args, train_flags


def say_different_rewards(rewards: dict[str, str | None]) -> None:
    """One line before training if the arms do not have the same reward."""
    if len(set(rewards.values())) > 1:
        each = "; ".join(f"{arm}: {reward}" for arm, reward in rewards.items())
        print(
            f"note: the arms have different rewards ({each}), so eval/reward is another measure in "
            "each; --metric and --select can name one that all have, such as eval/nll"
        )


def given_flags(words: list[str]) -> dict:
    """The flags of train.py in these words; None: not given. Raises UserError for a wrong one."""
    parser = flags.make_parser(ALGORITHMS, SCHEDULES)
    parser.set_defaults(**dict.fromkeys(vars(parser.parse_args([]))))
    return vars(parser.parse_args(flags.join_metric(words)))  # `--step=5` is --steps too


def refuse(given: dict, names: tuple[str, ...], whose: str) -> None:
    """Raises UserError for a flag that is set here."""
    for name in names:
        if given[name] is not None:
            raise UserError(
                f"{flags.spelled(name)} is not for {whose} here: the arms differ in it, "
                "or compare has a flag of its own for it"
            )


@one_line_errors
def main(argv: list[str] | None = None) -> dict:
    """Tune, run, measure, write. Returns what compare.json holds."""
    argv = sys.argv[1:] if argv is None else argv
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    args, train_flags = parse_args(argv)
    say_different_rewards(args.rewards)
    load_pyplot("compare")  # a missing package or text is an error now, not after an hour
    elsewhere = whole_texts(args.tax) if args.tax else []
    out = Path(args.out)
    if not (out / "command.json").is_file():
        check_new_folder(args.out)
        out.mkdir()
    with one_writer(args.out):
        # Every run depends on these. New arms, seeds, rates or coefficients only add runs.
        command = {"steps": args.steps, "train.py": train_flags, "untuned": args.untuned}
        note_command(out, {**command, "arms": args.own})
        tuned, best, finished = run_all(args)
        if elsewhere:
            add_tax([(job.folder(out), summary) for job, summary in finished], elsewhere)
        return write_report(args, argv, tuned, best, finished)


if __name__ == "__main__":
    main(sys.argv[1:])
