"""A page of HTML that stands alone: no script or style from the net, readable without colour.

Whatever comes from a run goes through `escape`. Left out on purpose: templates, JavaScript.

    python evaluate.py --report out           # out/report.html
"""

import html

STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1, h2 { line-height: 1.2; } h2 { margin-top: 2.2rem; }
table { border-collapse: collapse; font-size: 0.9rem; }
th, td { text-align: left; vertical-align: top; padding: 0.25rem 0.9rem 0.25rem 0; }
tr + tr td, thead + tbody td { border-top: 1px solid #8884; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; }
pre, code { font-family: ui-monospace, monospace; font-size: 0.9em; white-space: pre-wrap; }
figure { margin: 1.2rem 0; } figcaption { font-size: 0.9rem; }
svg { width: 100%; height: auto; display: block; } svg text { font: 11px system-ui; fill: #888; }
.wide { overflow-x: auto; } .bad { font-weight: 700; }
"""


def escape(value) -> str:
    """Any value as text in HTML, also inside an attribute."""
    return html.escape(str(value))


def page(title: str, body: str, style: str = "") -> str:
    """A whole document. `title` is text, `body` is HTML; `style` is added to STYLE."""
    head = f'<meta charset="utf-8"><title>{escape(title)}</title><style>{STYLE}{style}</style>'
    head += '<meta name="viewport" content="width=device-width, initial-scale=1">'
    return f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head>\n<body>\n{body}\n</body></html>\n'


def table(head: list[str], rows: list[list], numbers: int = 0) -> str:
    """Rows of text; the last `numbers` columns are numbers, and stand on the right."""

    def line(tag: str, cells: list) -> str:
        first = len(head) - numbers
        marked = [' class="n"' if i >= first else "" for i in range(len(cells))]
        return "".join(f"<{tag}{m}>{escape(c)}</{tag}>" for m, c in zip(marked, cells))

    body = "\n".join(f"<tr>{line('td', row)}</tr>" for row in rows)
    head_line = f"<thead><tr>{line('th', head)}</tr></thead>" if any(head) else ""
    return f'<div class="wide"><table>{head_line}<tbody>\n{body}\n</tbody></table></div>'
