"""A run as one page: verdict and its rules, curves, samples before and after, time, settings.

    python evaluate.py --report out           # out/report.html, for any browser

The page stands alone: it needs no network and no matplotlib (evaluate.py --plot draws the same
curves as a picture file). Left out on purpose: several runs in one page (compare.py).
"""

import math
import statistics
from pathlib import Path

import numpy as np

from checkpoints import read_rows, write_text
from flags import read_json, typed
from health import as_ppo, bad_evaluations, checked_rules, falling_reward, metric_rows, verdict
from page import escape, page, table
from plot import SHADES, bands, panels_of, smooth, title_of

WIDTH, HEIGHT, LEFT, RIGHT, BOTTOM = 760, 190, 56, 16, 22  # of a chart, in units of its picture
MOST_POINTS = 600  # of a line; in longer runs each stands for the least and largest of some steps
DASHES = ["", "7 3", "2 3", "9 3 2 3"]  # lines are told apart without their colours
COLORS = ["#3b76c4", "#c8601a", "#3a8f4d", "#9257b5"]
STYLE = """
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 0 1.5rem; }
.pair p { margin: 0.2rem 0; white-space: pre-wrap; overflow-wrap: anywhere; }
.columns { columns: 15rem; white-space: pre-wrap; overflow-wrap: anywhere; }
.key svg { width: 34px; height: 10px; display: inline; margin: 0 0.4em 0 1em; }
"""


def write_report(out: Path) -> Path:
    """Write the page of the run in a folder. -> `out/report.html`.

    Raises UserError for a folder without readable metrics.
    """
    rows, config = metric_rows(out / "metrics.jsonl"), read_json(out / "config.json")
    samples_file = out / "samples.jsonl"
    samples = read_rows(samples_file) if samples_file.is_file() else []
    title = title_of(rows, out.resolve().name)
    versions = config.pop("versions", {}) | {"commit": config.pop("git_commit", None)}
    made_with = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    words = [word for name, value in config.items() for word in typed(name, value)]
    body = "\n".join(
        [
            f"<h1>{escape(title)}</h1>",
            f"<p>{escape(verdict(rows))}</p>",
            "<h2>Curves</h2>",
            *charts(rows),
            "<h2>The same prompts before and after</h2>",
            samples_part(samples),
            "<h2>The rules of the verdict</h2>",
            rules_part(rows),
            "<h2>Where the time went</h2>",
            time_part(rows),
            "<h2>Settings</h2>",
            f'<p class="columns"><code>{escape(chr(10).join(words))}</code></p>',
            f"<p>Made with {escape(made_with or 'versions that were not recorded')}.</p>",
        ]
    )
    path = out / "report.html"
    write_text(path, page(title, body, STYLE))
    return path


# ---------------------------------------------------------------------------------------- curves


def charts(rows: list[dict]) -> list[str]:
    """A figure for each panel of plot.py that the run has numbers for."""
    spans, last = bands(rows), max(row["step"] for row in rows)
    names = list(dict.fromkeys(span[2] for span in spans))
    shades = [f"{swatch(SHADES[i % len(SHADES)])}{escape(n)}" for i, n in enumerate(names)]
    legend = (
        "faint line: every step; strong line: the same, smoothed; dots: evaluations. "
        f"Shaded: {', '.join(shades)} steps"
    )
    figures = [f'<p class="key">{legend}</p>']
    for label, metrics in panels_of(rows).items():
        points = {m: [(r["step"], r[m]) for r in rows if m in r] for m in metrics}
        keys = [f"{line_key(i)}{escape(name)}" for i, name in enumerate(points)]
        caption = f'<b>{escape(label)}</b> <span class="key">{"".join(keys)}</span>'
        drawn = chart(points, spans, names, last, label)
        figures.append(f"<figure><figcaption>{caption}</figcaption>{drawn}</figure>")
    return figures


def swatch(color: str) -> str:
    return f'<svg viewBox="0 0 34 10"><rect width="34" height="10" fill="{color}"/></svg>'


def line_key(i: int) -> str:
    """What the line of the metric number `i` looks like."""
    return f'<svg viewBox="0 0 34 10"><path d="M0 5H34" {stroke(i)} stroke-width="2.5"/></svg>'


def stroke(i: int) -> str:
    dash = DASHES[i % len(DASHES)]
    return f'fill="none" stroke="{COLORS[i % len(COLORS)]}" stroke-dasharray="{dash}"'


def chart(points: dict, spans: list, names: list[str], last: int, label: str) -> str:
    """metric -> [(step, value)], as one SVG: phases shaded, an axis on both sides."""
    values = [value for line in points.values() for _, value in line]
    low, high = min(values), max(values)
    if high == low:
        low, high = low - 0.5, high + 0.5

    def x(step: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * step / max(last, 1)

    def y(value: float) -> float:
        return 8 + (HEIGHT - BOTTOM - 16) * (high - value) / (high - low)

    parts = []
    for begin, end, name in spans:
        color, wide = SHADES[names.index(name) % len(SHADES)], x(end) - x(begin)
        box = f'x="{x(begin):.1f}" y="2" width="{wide:.1f}" height="{HEIGHT - BOTTOM - 4}"'
        parts.append(f'<rect {box} fill="{color}" fill-opacity="0.6"/>')
    for tick in ticks(low, high):
        at = f'x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"'
        parts.append(f'<line {at} stroke="#8885"/>')
        text = f'x="{LEFT - 6}" y="{y(tick) + 4:.1f}" text-anchor="end"'
        parts.append(f"<text {text}>{tick:,.6g}</text>")
    for tick in ticks(0, last):
        text = f'x="{x(tick):.1f}" y="{HEIGHT - 6}" text-anchor="middle"'
        parts.append(f"<text {text}>{tick:,.6g}</text>")
    for i, (name, line) in enumerate(points.items()):
        xs, ys = [x(step) for step, _ in line], [y(value) for _, value in line]
        if name.startswith("eval/"):
            dots = "".join(f'<circle cx="{a:.1f}" cy="{b:.1f}" r="3"/>' for a, b in zip(xs, ys))
            parts.append(f'<g fill="{COLORS[i % len(COLORS)]}">{dots}</g>{path(xs, ys, i, 1)}')
        else:
            parts.append(f'<g opacity="0.4">{path(xs, ys, i, 0.8)}</g>')
            parts.append(path(xs, smooth(np.array(ys)).tolist(), i, 2))
    inner = "\n".join(parts)
    view = f'viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)} by step"'
    return f"<svg {view}>\n{inner}\n</svg>"


def path(xs: list[float], ys: list[float], i: int, width: float) -> str:
    """A line through the points; of very many, the highest and the lowest of each few steps."""
    kept = thin(ys, MOST_POINTS)
    d = "L".join(f"{xs[k]:.1f} {ys[k]:.1f}" for k in kept)
    return f'<path d="M{d}" {stroke(i)} stroke-width="{width}"/>'


def thin(values: list[float], most: int) -> list[int]:
    """Which of the values to draw: all, or the least and the largest of each few neighbours.

    >>> thin([5.0, 1.0, 9.0, 2.0, 3.0, 3.0], most=4)
    [1, 2, 3, 4]
    """
    n = len(values)
    if n <= most:
        return list(range(n))
    kept, size = set(), math.ceil(2 * n / most)
    for begin in range(0, n, size):
        group = range(begin, min(begin + size, n))
        kept |= {min(group, key=values.__getitem__), max(group, key=values.__getitem__)}
    return sorted(kept)


def ticks(low: float, high: float) -> list[float]:
    """Round numbers from low to high, three to six of them.

    >>> ticks(-0.013, 0.73)
    [0.0, 0.2, 0.4, 0.6]
    """
    rough = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(rough))
    step = min((power * k for k in (1, 2, 5, 10)), key=lambda s: abs(s - rough))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(k * step, 12) for k in range(first, last + 1)]


# ---------------------------------------------------------------------------- samples, rules, time


def samples_part(samples: list[dict]) -> str:
    """The first and the last response to each prompt that was measured at both ends."""
    if not samples:
        return "<p>No samples were written.</p>"
    first, last = samples[0]["step"], samples[-1]["step"]
    before = {row["prompt"]: row for row in samples if row["step"] == first}
    parts = []
    for row in samples:
        if row["step"] == last and row["prompt"] in before:
            old = before[row["prompt"]]
            parts.append(f'<p><b>{escape(row["prompt"])}</b></p><div class="pair">')
            parts += [
                f"<p>{escape(r['response'])}<br><small>{note(r)}</small></p>" for r in (old, row)
            ]
            parts.append("</div>")
    head = f'<div class="pair"><p>after {first:,} steps</p><p>after {last:,} steps</p></div>'
    return head + "\n".join(parts)


def marks(row: dict) -> list[str]:
    """What was measured of a sample: `score +0.75`, `kl +3.12`."""
    return [f"{name} {row[name]:+.2f}" for name in ("score", "kl") if name in row]


def note(row: dict) -> str:
    """The step of a sample, and what was measured of it."""
    return escape(", ".join([f"step {row['step']:,}", *marks(row)]))


def rules_part(rows: list[dict]) -> str:
    """Each rule that has numbers: means over the first and the last third, and what it says."""
    rows, lines = [as_ppo(row) for row in rows], []
    for rule in checked_rules(rows):
        said = f"SUSPECT: {rule.text}" if rule.is_broken else "good"
        lines.append([rule.name, said, f"{rule.first:.3g}", f"{rule.last:.3g}"])
    for suspicion in falling_reward(rows) + bad_evaluations(rows):
        lines.append(["whole run", f"SUSPECT: {suspicion}", "", ""])
    if not lines:
        return "<p>No metric that a rule looks at has three values yet.</p>"
    return table(["metric", "", "first third", "last third"], lines, numbers=2)


def time_part(rows: list[dict]) -> str:
    """Seconds of each phase, the slowest phase first; evaluations and saving are not counted."""
    seconds = {}
    for row in rows:
        if "seconds" in row:
            seconds.setdefault(row["phase"].upper(), []).append(row["seconds"])
    if not seconds:
        return "<p>No step was timed.</p>"
    total = sum(map(sum, seconds.values()))
    lines = []
    for phase, each in sorted(seconds.items(), key=lambda item: -sum(item[1])):
        median, share = statistics.median(each), sum(each) / total
        cells = [
            f"{len(each):,}",
            f"{sum(each):,.1f}",
            f"{share:.0%}",
            f"{median:.3g}",
            f"{max(each):.3g}",
        ]
        lines.append([phase, *cells])
    head = ["phase", "steps", "seconds", "share", "median of a step", "slowest step"]
    return table(head, lines, numbers=5)
