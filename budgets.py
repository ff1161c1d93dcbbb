"""What a run of a comparison did, what that took, and its curve, read at a budget.

A budget is a number of updates, of sampled tokens or of seconds of training. Runs differ in what a
step takes, so equal steps are only one of the ways to compare them. A value before the end of a run
is that of a learning rate that has not decayed yet: it says too little of what a run made for that
budget would reach. Left out on purpose: energy, prices.

    python compare.py --arms sft turns --out compare     # the last columns of its table
"""

import itertools
import statistics

from cli import UserError

BUDGETS = ("updates", "sampled tokens", "seconds")
TASK_METRICS = ("eval/right", "eval/fluent_and_positive", "eval/reward")  # the first one there is


def updates_of(row: dict, config: dict) -> int:
    """The optimiser steps of a row of metrics.jsonl.

    Where an RL step learns from fewer rows than --minibatches, it is less than this says.
    """
    phase = row["phase"]
    if phase == "eval":
        return 0
    if phase in ("sft", "dpo"):
        return 1
    # Without `epochs` no update was made. With --schedule gate one on demonstrations may follow.
    updates = round(row.get(f"{phase}/epochs", 0)) * config["minibatches"]
    return updates + ("sft/loss" in row)


def summarise(rows: list[dict], config: dict) -> dict:
    """metrics.jsonl -> the last evaluation, the first, the curve and what the run took.

    A point of the curve is an evaluation, with the step and what was spent until then.
    """
    spent = {"updates": 0, "rollouts": 0, "sampled tokens": 0.0, "seconds": 0.0}
    curve = []
    for row in rows:
        spent["updates"] += updates_of(row, config)
        spent["seconds"] += row.get("seconds", 0.0)
        for name in ("ppo/response_length", "distill/response_length"):
            if name in row:  # a mean over the rollout
                spent["rollouts"] += 1
                spent["sampled tokens"] += row[name] * config["batch_size"]
        if row["phase"] == "eval":
            metrics = {n: value for n, value in row.items() if n == "step" or n.startswith("eval/")}
            curve.append({**metrics, **spent, "sampled tokens": round(spent["sampled tokens"])})
    before = {n: value for n, value in curve[0].items() if n not in spent}
    return {**curve[-1], "before": before, "curve": curve}


def value_of(summary: dict, name: str, flag: str) -> float:
    """A metric at the end of a run. Raises UserError if it has none of that name."""
    if name not in summary:
        metrics = ", ".join(name for name in summary if name.startswith("eval/"))
        more = "reward-nll, " if flag == "--select" else ""
        raise UserError(f"{flag} {name} is no metric of these runs; they have {more}{metrics}")
    return summary[name]


def utility(summary: dict, select: str) -> float:
    """What tuning maximises: a metric, or (the default) the reward minus the held-out NLL."""
    if select == "reward-nll":
        return summary["eval/reward"] - summary["eval/nll"]
    return value_of(summary, select, "--select")


def metric_of(summary: dict, metric: str | None, select: str) -> str:
    """The metric that is compared: that of --metric or --select, or what the task is about."""
    if metric is not None:
        value_of(summary, metric, "--metric")
        return metric
    if select != "reward-nll":
        return select
    return next(name for name in TASK_METRICS if name in summary)


def read_at(curve: list[dict], budget: str, amount: float, metric: str) -> float:
    """The metric where a run has spent `amount`, linearly between evaluations; else at its end."""
    if amount >= curve[-1][budget]:
        return curve[-1][metric]
    for one, other in itertools.pairwise(curve):
        if one[budget] < amount <= other[budget]:
            way = (amount - one[budget]) / (other[budget] - one[budget])
            return one[metric] + way * (other[metric] - one[metric])
    return curve[0][metric]


def add_equal_budgets(results: dict[str, list[dict]], metric: str) -> dict[str, float]:
    """Add "at equal updates" and so on to the summaries. -> the amount of each budget.

    It is the largest one that every run which samples has spent.
    """
    runs = [run for of_arm in results.values() for run in of_arm]
    sampling = [run for run in runs if run["rollouts"]] or runs
    amounts = {budget: min(run[budget] for run in sampling) for budget in BUDGETS}
    amounts = {budget: amount for budget, amount in amounts.items() if amount > 0}
    for run in runs:
        for budget, amount in amounts.items():
            run[f"at equal {budget}"] = read_at(run["curve"], budget, amount, metric)
    return amounts


def mean_curve(runs: list[dict], metric: str) -> list[tuple[float, float]]:
    """(NLL, metric) at every evaluation, the mean over seeds."""
    curve = []
    for points in zip(*[run["curve"] for run in runs]):  # the same evaluation of every run
        means = [statistics.mean(point[n] for point in points) for n in ("eval/nll", metric)]
        curve.append(tuple(means))
    return curve
