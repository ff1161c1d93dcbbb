"""The page of explain.py: tokens in colour, a curve under them, every number without a mouse.

It is one file without a script: the switch is radio buttons and CSS. So nothing that a model wrote
can run, and all of it is escaped. Left out on purpose: a dark mode, the tokens of the prompt.

    python explain.py out --html page.html
"""

import math
from pathlib import Path

from engine import UserError
from page import escape, page

ABOVE, BELOW = "31,119,180", "230,120,20"  # blue and orange, as red, green, blue
STYLE = """
:root { color-scheme: light; }
body { padding-bottom: 9em; background: #fff; color: #111; overflow-wrap: anywhere; }
label { margin-right: 1em; }
.t { display: inline-block; vertical-align: top; white-space: pre-wrap; margin: 0 1px 4px 0;
  border-bottom: 2px solid #999; }
.t:hover, .t:focus { outline: 2px solid #111; }
.t small { display: none; text-align: center; font-size: 11px; line-height: 1.3; padding: 0 3px; }
.tip { display: none; position: fixed; left: 0; right: 0; bottom: 0; padding: .5em 1em;
  background: #fff; border-top: 2px solid #111; white-space: normal; }
.t:hover .tip, .t:focus .tip { display: block; }
.t:hover .tip { z-index: 1; }
svg { width: auto; } svg text { fill: #111; }
details pre { overflow-x: auto; white-space: pre; }
"""
SHOWN = ("advantage", "KL", "reward")  # the columns of the switch, by a radio button for each
SWITCH = """
#by-{name}:checked ~ main .t {{ background: var(--{name}); }}
#by-{name}:checked ~ main .{name} {{ display: block; }}
"""


def check_page(path: Path) -> None:
    """Raises UserError where a page cannot be written, or would replace what is none."""
    if path.suffix != ".html" or not path.parent.is_dir():
        raise UserError(
            f"--html {path}: expected a name that ends in .html, in a folder that exists"
        )


def write_page(path: Path, *content) -> None:
    """Write `rollout_page(*content)`. Raises UserError where that cannot be."""
    try:
        path.write_text(rollout_page(*content), encoding="utf-8", errors="backslashreplace")
    except OSError as problem:
        raise UserError(f"--html {path} cannot be written: {problem.strerror}") from None


def rollout_page(lines: list[str], rows: list, tables: list[list[str]], below: list[str]) -> str:
    """What explain.py prints, for all rows, as HTML. `lines` and `below` are its text before the
    tables and after them."""
    style, buttons, largest = STYLE, "", {}
    for name in SHOWN:
        style += SWITCH.format(name=name)
        checked = "" if buttons else " checked"
        buttons += f'<input type="radio" name="by" id="by-{name}"{checked}>'
        buttons += f'<label for="by-{name}">{name}</label>'
        largest[name] = max(abs(x) for row in rows for x in row.columns[name]) or 1.0
    sections = ""
    for i, (row, table) in enumerate(zip(rows, tables), 1):
        sections += section(f"Response {i} of {len(rows)}", row, table, largest)
    title = "One rollout, token by token"
    body = f"""<h1>{title}</h1>
{text(lines)}
<p>A token has its number below it: blue is above 0, orange below 0, and the largest number of the
page has the strongest colour. Point at a token, or go to it with the tab key: all of its numbers
are then at the bottom.</p>
{buttons}<main>
{sections}
<h2>The metrics of all responses, from these numbers</h2>{text(below)}
</main>"""
    return page(title, body, style)


def text(lines: list[str]) -> str:
    """Lines as they stand in a terminal."""
    return f"<pre>{escape(chr(10).join(lines))}</pre>"


def section(name: str, row, lines: list[str], largest: dict[str, float]) -> str:
    """One response: its tokens, its curve, its table (`lines`), which is folded."""
    head = f"<h2>{name}, score {row.score:+.4f}</h2><p>{escape(row.prompt)} &gt;&gt;&gt;</p>"
    if not row.tokens:
        return f"<section>{head}<p>It has no score: the update leaves it out.</p></section>"
    spans = ""
    for t, token in enumerate(row.tokens):
        style, shown = "", escape(token)
        for name in SHOWN:
            x = row.columns[name][t]
            strength = 0.6 * abs(x) / largest[name]
            style += f"--{name}:rgba({ABOVE if x > 0 else BELOW},{strength:.2f});"
            shown += f'<small class="{name}">{x:+.2f}</small>'
        numbers = ", ".join(f"{name} {values[t]:.4f}" for name, values in row.columns.items())
        shown += f'<span class="tip">token {t + 1}, {escape(token)}: {numbers}</span>'
        spans += f'<span class="t" tabindex="0" style="{style}">{shown}</span>'
    drawn = curve(row.columns["value"], row.columns["return"])
    folded = f"<details><summary>the table</summary>{text(lines)}</details>"
    return f"<section>{head}<div>{spans}</div>{drawn}{folded}</section>\n"


def curve(values: list[float], returns: list[float]) -> str:
    """The return (solid, circles) and the value (dashed, squares) of each token, as SVG."""
    low, high = min(*values, *returns), max(*values, *returns)
    step, left, top, height = min(34.0, max(4.0, 800 / len(values))), 60, 12, 100
    right = left + step * (len(values) - 1)

    def points(numbers: list[float]) -> list[tuple[float, float]]:
        scale = height / ((high - low) or 1.0)
        return [(left + step * i, top + scale * (high - y)) for i, y in enumerate(numbers)]

    drawn = ""
    for y, (_, at) in zip((low, high), points([low, high])):
        drawn += f'<path d="M{left - 6} {at:.1f}H{right + 6:.1f}" stroke="#ccc"/>'
        drawn += f'<text x="{left - 10}" y="{at + 4:.1f}" text-anchor="end">{y:.3f}</text>'
    for i in range(0, len(values), math.ceil(24 / step)):
        x = left + step * i
        drawn += f'<text x="{x:.1f}" y="{top + height + 20}" text-anchor="middle">{i + 1}</text>'
    for numbers, dash in ((returns, "none"), (values, "5 4")):
        path = "L".join(f"{x:.1f} {y:.1f}" for x, y in points(numbers))
        drawn += f'<path d="M{path}" fill="none" stroke="#111" stroke-dasharray="{dash}"/>'
    for x, y in points(returns):
        drawn += f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3"/>'
    for x, y in points(values):
        drawn += f'<path d="M{x - 3:.1f} {y - 3:.1f}h6v6h-6z"/>'
    size = f'width="{right + 20:.0f}" height="{top + height + 30}" font-size="12"'
    label = 'role="img" aria-label="return and value of each token"'
    says = "<div>return (solid, circles) and value (dashed, squares), by number of the token</div>"
    return f'<div class="wide"><svg {size} {label}>{drawn}</svg></div>{says}'
