"""The report of a run: what stands in it, and that nothing a run wrote can break the page."""

import json
import re
from html.parser import HTMLParser

import pytest

import evaluate
import run_page
from engine import UserError

NASTY = "</p><script>alert('x')</script><b>&amp; \u202e"
VOID = {"meta", "br", "rect", "line", "circle", "path"}  # closed, or never


class Page(HTMLParser):
    """Checks that every tag is closed in order, and collects the text and the tags."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.seen, self.words = [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def write_run(out, rows, samples=(), config=None):
    out.mkdir()
    for name, lines in (("metrics.jsonl", rows), ("samples.jsonl", samples)):
        (out / name).write_text("".join(json.dumps(r) + "\n" for r in lines), encoding="utf-8")
    if config is not None:
        (out / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return out


def some_rows() -> list[dict]:
    rows = [{"step": 0, "phase": "eval", "eval/nll": 6.5, "eval/reward": -0.25}]
    for step in range(1, 41):
        if step <= 12 or step % 2:
            row = {"phase": "sft", "sft/loss": 6 - 0.1 * step, "seconds": 0.5 + 0.01 * step}
        else:
            kl = 80.0 + step  # far above the limit of its rule
            row = {"phase": "ppo", "ppo/score": 0.02 * step, "ppo/kl": kl, "seconds": 2.25}
        rows.append({"step": step, **row})
    return [*rows, {"step": 40, "phase": "eval", "eval/nll": 1.875, "eval/reward": 0.75}]


@pytest.fixture
def run(tmp_path):
    samples = [
        {"step": 0, "prompt": NASTY, "response": "before " + NASTY, "score": -0.5},
        {"step": 0, "prompt": "only at first", "response": "gone", "score": 0.5},
        {"step": 20, "prompt": NASTY, "response": "between", "score": 0.125},
        {"step": 40, "prompt": NASTY, "response": "after", "score": 0.75, "kl": 3.125},
    ]
    config = {"reward": NASTY, "lr": 0.003, "out": None, "strict": False, "overwrite": True}
    config |= {"versions": {"torch": "9.9"}, "git_commit": None}
    return write_run(tmp_path / "a run", some_rows(), samples, config)


def test_the_page_says_what_the_run_did_and_stands_alone(run, capsys):
    evaluate.main(["--report", str(run)])
    path = run / "report.html"
    assert capsys.readouterr().out.strip() == str(path)
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    tags = {tag for tag, _ in page.seen}
    assert not tags & {"script", "base", "link", "img", "iframe"} and "url(" not in text
    assert not any(name in ("src", "href") for _, attrs in page.seen for name in attrs)
    words = " ".join(page.words)
    assert words.count("alert('x')") == 3, "a prompt, a response and a flag, as text"
    assert "Run a run: 26 SFT, 14 PPO steps" in words
    assert "before" in words and "between" not in words and "gone" not in words
    assert "step 40, score +0.75, kl +3.12" in words
    assert "--lr=0.003" in words and "--overwrite" in words and "--strict" not in words
    assert "Made with torch 9.9." in words


def test_the_rules_are_those_of_the_verdict(run):
    rows = some_rows()
    lines = re.findall(r"<tr>(.*?)</tr>", run_page.rules_part(rows))
    cells = [re.findall(r"<td[^>]*>(.*?)</td>", line) for line in lines]
    kl, loss = (next(c for c in cells if c and c[0] == name) for name in ("ppo/kl", "sft/loss"))
    # 14 values, so means over the first four and the last four: steps 14, 16, 18, 20; 34 to 40
    assert kl[1].startswith("SUSPECT") and kl[2:] == ["97", "117"]
    assert loss[1] == "good" and loss[2:] == ["5.55", "2.8"]
    assert [c[0] for c in cells if c and "SUSPECT" in c[1]] == ["ppo/kl"]


def test_a_rule_about_the_whole_run_is_there_too():
    rows = some_rows() + [{"step": 41, "phase": "eval", "eval/nll": 2.5}]
    assert "whole run</td><td>SUSPECT: eval/nll 2.5" in run_page.rules_part(rows)


def test_the_slowest_phase_stands_first_with_its_share():
    lines = re.findall(r"<tr>(.*?)</tr>", run_page.time_part(some_rows()))[1:]
    cells = [re.findall(r"<td[^>]*>(.*?)</td>", line) for line in lines]
    sft = sum(0.5 + 0.01 * s for s in range(1, 41) if s <= 12 or s % 2)
    assert cells[0] == ["PPO", "14", "31.5", f"{31.5 / (31.5 + sft):.0%}", "2.25", "2.25"]
    assert cells[1][:3] == ["SFT", "26", f"{sft:.1f}"] and cells[1][5] == "0.89"


def test_a_point_stands_where_its_axes_say():
    points = {"eval/nll": [(0, 6.0), (30, 2.0), (40, 3.0)]}
    svg = run_page.chart(points, [(0, 40, "SFT")], ["SFT"], 40, "NLL")
    spots = [tuple(map(float, s)) for s in re.findall(r'<circle cx="([^"]+)" cy="([^"]+)"', svg)]
    grid = re.findall(r'y1="([^"]+)".*?\n<text [^>]*>([^<]+)<', svg)
    height = {float(value): float(y) for y, value in grid}
    assert [y for _, y in spots] == pytest.approx([height[6], height[2], height[3]])
    labels = re.findall(r'<text x="([^"]+)"[^>]*middle">([^<]+)<', svg)
    across = {float(step): float(x) for x, step in labels}
    assert [x for x, _ in spots] == pytest.approx([across[0], across[30], across[40]], abs=0.06)


def test_a_long_run_keeps_its_peaks():
    values = [float(i % 7) for i in range(50_000)]
    values[31_003], values[44_444] = 99.0, -50.0
    kept = run_page.thin(values, 600)
    assert len(kept) <= 600 and {31_003, 44_444} <= set(kept) and kept == sorted(set(kept))


def test_runs_with_little_to_show(tmp_path):
    row = {"step": 1, "phase": "sft", "sft/loss": 2.5, "sft/skipped_steps": 0.0}
    out = write_run(tmp_path / "one", [row])
    (out / "samples.jsonl").unlink()
    text = run_page.write_report(out).read_text(encoding="utf-8")
    Page(text)
    assert "No samples were written" in text and "No step was timed" in text
    assert "No metric that a rule looks at" in text and "were not recorded" in text
    with pytest.raises(UserError, match="holds no metrics.jsonl"):
        run_page.write_report(tmp_path / "nothing")
