"""The curves of a run as one picture, from its metrics.jsonl: what was learnt, and in which phase.

    python evaluate.py --plot out             # out/curves.png (needs matplotlib)

A panel stands for each of PANELS that the run has numbers for. Left out on purpose: a choice of
panels on the command line (metrics.jsonl is easy to read), several runs in one picture.
"""

from pathlib import Path

import numpy as np

from engine import UserError
from health import leaves_of, metric_rows

SFT_PARTS = ["ppo/sft_loss", "grpo/sft_loss", "distill/sft_loss"]  # of --schedule mix
# Label of the y axis -> metrics. Those of evaluations are drawn with dots.
PANELS = {
    "score": ["ppo/score", "eval/reward"],
    "NLL, nats a token": ["sft/loss", *SFT_PARTS, "eval/nll"],
    "KL, nats a response": ["ppo/kl", "eval/kl"],
    "length, tokens": ["ppo/response_length", "distill/response_length", "eval/response_length"],
    "GRPO: spread of\na group's scores": ["grpo/group_std"],
    "GRPO: KL in the\nloss, nats a token": ["grpo/kl_loss"],
    "KL to the teacher,\nnats a token": ["distill/kl"],
    "DPO: loss, nats a pair": ["dpo/loss"],
    "DPO: pairs ranked\nright, share": ["dpo/accuracy", "eval/preference_accuracy"],
    "DPO: implicit\nreward": ["dpo/chosen_reward", "dpo/rejected_reward"],
    "DPO: margin": ["dpo/margin", "eval/preference_margin"],
}
SMOOTH = 25  # a smoothed value looks at one in so many of the values on each side
SHORT = 50  # a band is short if it is narrower than one in so many of the steps
SHADES = ("#e6eef8", "#fdeeda", "#ece6f3", "#e5f2e5", "#f8e4e4")


def load_pyplot(what: str):
    """matplotlib.pyplot, drawing to files only. Raises UserError where it is not installed."""
    try:
        import matplotlib
    except ImportError:
        raise UserError(f"{what} needs the package matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def draw(out: Path) -> Path:
    """Draw the run in a folder. -> the picture, `out/curves.png`.

    Raises UserError without matplotlib or rows, and for rows without a number to draw.
    """
    load_pyplot("--plot")  # before the rows: it is what is missing most often
    path = out / "curves.png"
    plot(metric_rows(out / "metrics.jsonl"), path, out.resolve().name)
    return path


def plot(rows: list[dict], path: Path, name: str) -> None:
    """Draw the rows of a run called `name`. Raises UserError if no panel has a number."""
    pyplot = load_pyplot("--plot")
    panels = panels_of(rows)
    if not panels:
        raise UserError(f"{name} has no metric that --plot draws")
    size = (9, 0.9 + 1.7 * len(panels))
    figure, grid = pyplot.subplots(
        len(panels), sharex=True, figsize=size, layout="constrained", squeeze=False
    )
    axes, spans = grid[:, 0], bands(rows)
    handles = legend_of_all(pyplot, axes, spans)
    for axis, (label, names) in zip(axes, panels.items()):
        for color, metric in enumerate(names):
            draw_metric(axis, rows, metric, f"C{color}")
        axis.set_ylabel(label, fontsize=8)
        # Beside the panel: a legend inside it hides what is drawn there.
        axis.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    axes[-1].set_xlabel("step")
    figure.suptitle(title_of(rows, name))
    figure.legend(handles=handles, loc="outside lower center", ncols=3, fontsize=8)
    figure.savefig(path, dpi=80)
    pyplot.close(figure)


def panels_of(rows: list[dict]) -> dict[str, list[str]]:
    """PANELS without what the rows lack, and the leaves of the reward if there are several."""
    known = {name for row in rows for name in row}
    panels = {label: [n for n in names if n in known] for label, names in PANELS.items()}
    leaves = leaves_of(rows)
    if len(leaves) > 1:
        panels["leaves of the\nreward, raw"] = leaves
    return {label: names for label, names in panels.items() if names}


def draw_metric(axis, rows: list[dict], metric: str, color: str) -> None:
    """One curve: dots for evaluations; else each step faint, and a smoothed line over them."""
    points = [(row["step"], row[metric]) for row in rows if metric in row]
    steps, values = np.array(points, dtype=float).T  # (n,) each
    if metric.startswith("eval/"):
        axis.plot(steps, values, "o-", color=color, markersize=4, linewidth=1, label=metric)
        return
    axis.plot(steps, values, color=color, alpha=0.35, linewidth=0.8)
    axis.plot(steps, smooth(values), color=color, linewidth=1.6, label=metric, zorder=3)


def smooth(values: np.ndarray) -> np.ndarray:
    """(n,) -> (n,): means over each value and n // SMOOTH others on each side of it.

    At the beginning, where curves are steep, there are fewer on both sides; at the end, where one
    value would look like a trend, there are fewer on the right.

    >>> smooth(np.array([5.0, 1.0, 3.0, 2.0] * 8))[[0, 1, 2, 31]].tolist()
    [5.0, 3.0, 2.0, 2.5]
    """
    n, position = len(values), np.arange(len(values))  # (n,)
    half = np.minimum(position, n // SMOOTH)  # (n,)
    sums = np.concatenate([[0.0], np.cumsum(values)])  # (n + 1,)
    begin, end = position - half, np.minimum(position + half + 1, n)  # (n,) each
    return (sums[end] - sums[begin]) / (end - begin)


def bands(rows: list[dict]) -> list[tuple[float, float, str]]:
    """(begin, end, phase) of consecutive steps of one phase. Short bands that follow each other
    become one, called by all its phases: a picture cannot show phases that alternate every step.

    >>> bands([{"step": s, "phase": "ppo" if s in (4, 6) else "sft"} for s in (1, 2, 3, 4, 5, 6)])
    [(0, 3, 'SFT'), (3, 4, 'PPO'), (4, 5, 'SFT'), (5, 6, 'PPO')]
    """
    steps = [(row["step"], row["phase"]) for row in rows if row["phase"] != "eval"]
    whole = []  # of one phase: [begin, end, phases]
    for step, phase in steps:
        if whole and whole[-1][2] == {phase}:
            whole[-1][1] = step
        else:
            whole.append([step - 1, step, {phase}])
    if not whole:
        return []
    least, joined, was_short = (whole[-1][1] - whole[0][0]) / SHORT, [], False
    for begin, end, phases in whole:
        is_short = end - begin < least
        if is_short and was_short:
            joined[-1] = [joined[-1][0], end, joined[-1][2] | phases]
        else:
            joined.append([begin, end, phases])
        was_short = is_short
    named = []
    for begin, end, phases in joined:
        names = sorted((phase.upper() for phase in phases), reverse=True)
        named.append((begin, end, " and ".join(names)))
    return named


def legend_of_all(pyplot, axes, spans: list[tuple[float, float, str]]) -> list:
    """Shade the phases in every panel. -> what the legend of the figure explains."""
    line = pyplot.Line2D
    handles = [
        line([], [], color="0.3", alpha=0.4, linewidth=0.7, label="faint line: every step"),
        line([], [], color="0.3", linewidth=1.6, label="line: the same, smoothed"),
        line([], [], color="0.3", marker="o", markersize=4, label="dots: evaluations"),
    ]
    for i, phases in enumerate(dict.fromkeys(span[2] for span in spans)):
        shade = SHADES[i % len(SHADES)]
        ranges = [(begin, end - begin) for begin, end, name in spans if name == phases]
        for axis in axes:
            axis.broken_barh(
                ranges, (0, 1), transform=axis.get_xaxis_transform(), color=shade, linewidth=0
            )
        label = f"shaded: {phases} steps"
        handles.append(pyplot.Rectangle((0, 0), 1, 1, color=shade, label=label))
    return handles


def title_of(rows: list[dict], name: str) -> str:
    """The run's name, and how many steps of which phase it has done."""
    phases = [row["phase"] for row in rows if row["phase"] != "eval"]
    counts = [f"{phases.count(phase):,} {phase.upper()}" for phase in dict.fromkeys(phases)]
    return f"Run {name}: {', '.join(counts) or 'no'} steps"
