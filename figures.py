"""The two figures of a comparison: what a metric costs in language, and what a distance forgets.

Left out on purpose: a choice of axes (compare.json has every number).

    python compare.py --out compare            # compare/pareto.png, with --tax compare/razor.png
"""

import math
import textwrap
from pathlib import Path

from budgets import mean_curve
from plot import load_pyplot
from tables import interval

WIDE = 2.5  # the axis is logarithmic where its largest value is so many times its smallest one
FAR = 20.0  # the same for a KL
NICE = (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8)  # ticks of a logarithmic axis, times powers of ten
# Where a label may stand, in points from its marker: the first free place is taken.
PLACES = [(0, 7), (10, 0), (0, -7), (-10, 0), (9, 7), (9, -7), (-9, -7), (-9, 7)]
PLACES += [(0, 14), (17, 0), (0, -14), (-17, 0), (15, 12), (15, -12), (-15, -12), (-15, 12)]


def draw_pareto(results: dict, tuned: list[tuple], metric: str, title: str, path: Path) -> None:
    """`metric` against held-out NLL: of each arm the mean over seeds along training, and its end.

    `tuned` has the pairs (job, summary) of tuning: an open marker for each end.
    """
    pyplot = load_pyplot("compare")
    curves = {arm: mean_curve(runs, metric) for arm, runs in results.items()}
    points = [point for curve in curves.values() for point in curve]
    points += [(run["eval/nll"], run[metric]) for _, run in tuned]
    nlls = [nll for nll, _ in points]
    figure, axis = pyplot.subplots(figsize=(8.6, 5.2), layout="constrained")
    labels = draw_arms(axis, results, curves, tuned, metric)
    if max(nlls) > WIDE * min(nlls):
        axis.set_xscale("log")
        nice_ticks(axis.xaxis, nlls)
    low, high = axis.get_ylim()
    axis.set_ylim(low, high + 0.13 * (high - low))  # room for the arrow
    arrow = dict(arrowstyle="->", color="0.35", linewidth=1.5)
    axis.annotate("better", xy=(0.015, 0.985), xytext=(0.1, 0.9), color="0.35", fontsize=10,
                  xycoords="axes fraction", arrowprops=arrow)  # fmt: skip
    axis.set_xlabel("held-out NLL, nats a token (less is better)")
    axis.set_ylabel(f"{metric.removeprefix('eval/')} (more is better)")
    write_title(figure, title)
    axis.grid(alpha=0.2)
    figure.legend(loc="outside right center", fontsize=8, frameon=False)
    figure.draw_without_rendering()  # the layout is known now
    place_labels(axis, labels, points)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def draw_arms(axis, results: dict, curves: dict, tuned: list[tuple], metric: str) -> list[tuple]:
    """The lines and markers of `draw_pareto`. -> the labels, each (x, y, text, color)."""
    labels = []
    colors = {arm: f"C{i % 10}" for i, arm in enumerate(results)}
    for job, run in tuned:
        point, color = (run["eval/nll"], run[metric]), colors[job.arm]
        axis.plot(*point, "o", color=color, markerfacecolor="white", markersize=4, zorder=3)
        if job.kl_coef is not None:
            labels.append((*point, f"{job.kl_coef:g}", color))
    for arm, runs in results.items():
        axis.plot(
            *zip(*curves[arm]), ".-", color=colors[arm], markersize=3, linewidth=0.9, alpha=0.6
        )
        (x, dx), (y, dy) = [interval([run[n] for run in runs]) for n in ("eval/nll", metric)]
        bars = {} if math.isnan(dx) else dict(xerr=dx, yerr=dy)
        axis.errorbar(x, y, **bars, fmt="o", color=colors[arm], markersize=8, label=arm, zorder=4,
                      markeredgecolor="white", elinewidth=1.4, capsize=3)  # fmt: skip
    start = [*curves.values()][-1][0]
    axis.plot(*start, "kx", markersize=8, markeredgewidth=2, label="before training", zorder=5)
    if labels:
        what = "end of a run of tuning,\nwith its KL price"
        axis.plot([], [], "o", color="0.4", markerfacecolor="white", markersize=4, label=what)
    return labels


def draw_razor(results: dict, title: str, path: Path) -> None:
    """Perplexity elsewhere against the KL from the model before training, a point for each run."""
    pyplot = load_pyplot("compare")
    figure, axis = pyplot.subplots(figsize=(7.4, 4.8), layout="constrained")
    names = "KL from the start", "perplexity elsewhere"
    points, starts = [], set()
    for i, (arm, runs) in enumerate(results.items()):
        measured = [run for run in runs if names[0] in run]
        ends = [tuple(run[n] for n in names) for run in measured]
        starts |= {tuple(run["before"][n] for n in names) for run in measured}
        points += ends
        if ends:
            axis.plot(*zip(*ends), "o", color=f"C{i % 10}", alpha=0.8, label=arm,
                      markeredgecolor="white")  # fmt: skip
    axis.plot(*zip(*starts), "kx", markersize=8, markeredgewidth=2, label="before training")
    least = min((x for x, _ in points if x > 0), default=1.0)
    if max(x for x, _ in points) > FAR * least:
        axis.set_xscale("symlog", linthresh=least)  # the start has a KL of 0
    perplexities = [y for _, y in [*points, *starts]]
    if max(perplexities) > WIDE * min(perplexities):
        axis.set_yscale("log")
        nice_ticks(axis.yaxis, perplexities)
    axis.set_xlabel("KL(before || after) on held-out prompts, nats a response")
    axis.set_ylabel("perplexity elsewhere (less is better)")
    write_title(figure, title)
    axis.grid(alpha=0.2)
    figure.legend(loc="outside right center", fontsize=8, frameon=False)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def write_title(figure, title: str) -> None:
    """Above the axes and the legend, in as many lines as it needs."""
    lines = textwrap.wrap(title, int(11 * figure.get_figwidth()))  # characters of this size
    figure.suptitle("\n".join(lines), fontsize=10)


def nice_ticks(axis, values: list[float]) -> None:
    """Plain numbers as the ticks of a logarithmic axis, about six of them."""
    low, high = min(values), max(values)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [n * 10.0**power for power in powers for n in NICE if low <= n * 10.0**power <= high]
    ticks = ticks[:: math.ceil(len(ticks) / 9)]
    axis.set_ticks(ticks, labels=[f"{tick:g}" for tick in ticks])
    axis.set_ticks([], minor=True)


def place_labels(axis, labels: list[tuple], points: list[tuple]) -> None:
    """Write each label (x, y, text, color) where it covers no point and no other label, if it can.

    `points` (x, y) must stay visible.
    """
    frame = axis.get_window_extent()
    kept_free = axis.transData.transform(points)  # (P, 2) pixels
    taken = []
    for x, y, text, color in labels:
        for place in PLACES:
            note = axis.annotate(text, (x, y), place, textcoords="offset points", color=color,
                                 fontsize=6.5, ha="center", va="center")  # fmt: skip
            note.set_in_layout(False)
            box = note.get_window_extent()
            is_inside = frame.x0 < box.x0 and box.x1 < frame.x1 and frame.y0 < box.y0
            hits = box.padded(3).count_contains(kept_free) or box.count_overlaps(taken)
            if is_inside and not hits:
                taken.append(box)
                break
            note.remove()
