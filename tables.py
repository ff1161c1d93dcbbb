"""The table and the sentence of a comparison, from the summaries of its runs.

A summary is what `budgets.summarise` makes of one run. `results` has the summaries of each arm.
Left out on purpose: tests of significance, a winner.

    python compare.py --out compare            # prints the table
"""

import itertools
import math
import statistics

from budgets import mean_curve

# Student's t, 97.5 %, by degrees of freedom (0 to 9)
T_975 = [math.nan, 12.71, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262]
COUNTS = ("updates", "rollouts", "sampled tokens", "seconds")
TABLE_COLUMNS = ("eval/nll", "eval/reward", "eval/reward/", "eval/kl", "perplexity elsewhere")
TABLE_COLUMNS += ("KL from the start", "eval/right", "eval/fluent_and_positive", "eval/distinct")
TABLE_COLUMNS += ("eval/distinct_2", "eval/response_length", *COUNTS)
# "eval/reward/" stands for every leaf.


def interval(values: list[float]) -> tuple[float, float]:
    """The mean and half of its 95 % interval, which is NaN for one value."""
    n = len(values)
    mean = statistics.mean(values)
    if n == 1:
        return mean, math.nan
    return mean, T_975[n - 1] * statistics.stdev(values) / math.sqrt(n)


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


def markdown(results: dict[str, list[dict]], metric: str, amounts: dict[str, float]) -> str:
    """A row for the model before training, a row for each arm, a column for each measurement.

    The last columns have `metric` at the end, and at an equal amount of each budget.
    """
    results = {"before training": [run["before"] for run in [*results.values()][-1]], **results}
    columns = columns_in([run for runs in results.values() for run in runs])
    heads = {name: name.removeprefix("eval/") for name in columns if name != metric}
    heads[metric] = f"{metric.removeprefix('eval/')} at the end"
    for budget, amount in amounts.items():
        heads[f"at equal {budget}"] = f"at {amount:,.{0 if amount >= 10 else 1}f} {budget}"
    lines = [f"| arm | {' | '.join(heads.values())} |", "|---" * (len(heads) + 1) + "|"]
    for arm, runs in results.items():
        cells = []
        for name in heads:
            values = [run[name] for run in runs if name in run]
            cells.append(cell(values, is_count=name in COUNTS))
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    return "\n".join(lines)


def nll_at_reward(curve: list[tuple[float, float]], reward: float) -> float | None:
    """The NLL where a curve of (NLL, reward) first reaches that reward, linearly interpolated."""
    for (nll, low), (next_nll, high) in itertools.pairwise(curve):
        if low < reward <= high:
            return nll + (next_nll - nll) * (reward - low) / (high - low)
    return None


def at_equal_reward(results: dict[str, list[dict]]) -> str:
    """A line: the held-out NLL of the other arms that sample where they have the reward of the
    final hybrid. It is empty where there is no hybrid, or no other one."""
    others = {arm: runs for arm, runs in results.items() if runs[0]["rollouts"] and arm != "hybrid"}
    if "hybrid" not in results or not others:
        return ""
    nll, reward = mean_curve(results["hybrid"], "eval/reward")[-1]
    said = []
    for arm, runs in others.items():
        arm_nll = nll_at_reward(mean_curve(runs, "eval/reward"), reward)
        said.append(f"{arm}: {'never there' if arm_nll is None else f'{arm_nll:.2f}'}")
    return (
        f"Held-out NLL at the reward with which the hybrid ends ({reward:.2f}): "
        f"hybrid: {nll:.2f}; {'; '.join(said)}.\n"
    )
