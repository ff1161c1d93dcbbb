"""The table, the sentence and the figure of a comparison, from the summaries of its runs.

A summary is what `compare.summarise` makes of one run. `results` has the summaries of each arm.
Left out on purpose: tests of significance, a winner.

    python compare.py --out compare            # prints the table and writes the figure
"""

import itertools
import math
import statistics
from pathlib import Path

from plot import load_pyplot

# Student's t, 97.5 %, by degrees of freedom (0 to 9)
T_975 = [math.nan, 12.71, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262]
COUNTS = ("PPO steps", "sampled tokens", "seconds")
TABLE_COLUMNS = ("eval/nll", "eval/reward", "eval/reward/", "eval/kl", "perplexity elsewhere")
TABLE_COLUMNS += ("eval/fluent_and_positive", "eval/distinct", "eval/distinct_2")
TABLE_COLUMNS += ("eval/response_length", *COUNTS)  # "eval/reward/" stands for every leaf


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
