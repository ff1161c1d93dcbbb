"""explain.py: its columns give the metrics of the training, its page is safe, its errors are one
line, and nothing in the folder of a run changes."""

import hashlib
import math
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
import torch
from conftest import FAST

import explain
import train
from data import batch_of
from explain_page import rollout_page
from ppo import Rollout

UNFRIENDLY = "--kl-coef 0.137 --gamma 0.93 --lam 0.81 --missing-eos-penalty 0.43 --save-every 4"


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    folder = tmp_path_factory.mktemp("explain") / "out"
    train.main([*FAST, "--sft-warmup", "3", *UNFRIENDLY.split(), "--out", str(folder)])
    return folder


def contents(folder) -> dict:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


class Scores:
    """A reward with unfriendly scores; one of the responses gets none."""

    def __init__(self, scores):
        self.total = torch.tensor(scores)

    def __call__(self, prompts, completions, **columns):
        return self.total


@pytest.mark.parametrize(
    "scores, flags",
    [
        ([0.37, -1.91, 2.3, 0.58], {}),
        ([0.37, math.nan, 2.3, 0.58], dict(whiten_rewards=True, kl_estimator="k2")),
    ],
)
def test_the_columns_give_the_metrics_of_the_rollout_and_of_the_update(out, scores, flags):
    args, checkpoint = explain.find_run(str(out), 4)
    run, _ = explain.load_run(args, checkpoint)
    vars(args).update(flags)
    torch.manual_seed(3)
    torch.nn.init.normal_(run.model.value_head.weight, std=0.1)
    run.reward, logits, often = Scores(scores), run.model.logits, torch.zeros(len(run.tokenizer))
    often[run.tokenizer.eos_token_id] = 4.3  # responses of different lengths
    run.model.logits = lambda hidden, temperature=1.0: logits(hidden, temperature) + often
    run.sampling["max_new_tokens"] = 17
    examples = explain.examples_for(run, args, None, 4)
    rollout, logged = explain.sample_rollout(run, args, examples, seed=5)
    ratio, update = explain.update_once(run, args, rollout)
    _, second = explain.update_once(run, args, rollout)
    rows = explain.rows_of(run, args, examples, rollout, ratio)
    found = {name: value for name, value, _ in explain.metrics_of(rows, args)}

    assert len({len(row.tokens) for row in rows}) >= 3 and logged["ppo/kl"] > 0.1
    later = ("ppo/ratio_gap_max", "ppo/approxkl", "ppo/clipfrac")
    expected = logged | update | {name: second[name] for name in later}
    assert second["ppo/approxkl"] > 1e-6 and update["ppo/approxkl"] < 1e-9
    mean_return = found.pop("mean return")
    assert mean_return == pytest.approx(float(rollout.returns[rollout.response_mask].mean()))
    for name, value in found.items():
        assert value == pytest.approx(expected[name], rel=1e-4, abs=1e-6), name
    left_out = {"ppo/reward", "ppo/response_length"} if flags else set()
    every = {"score", "kl", "kl_k1", "var_explained", "policy_loss", "value_loss"}
    every = {f"ppo/{name}" for name in every} | {"ppo/reward", "ppo/response_length", *later}
    assert set(found) == every - left_out


def test_it_shows_a_run_and_changes_nothing_in_it(out, tmp_path, capsys):
    before = contents(out)
    explain.main([str(out), "--rows", "3", "--device", "cpu"])
    printed = capsys.readouterr().out
    assert f"{out / 'final'}: step 6 of 6" in printed and "as the run has it" in printed
    assert "costs 0.137" in printed and "--gamma 0.93, --lam 0.81" in printed
    for name, what in explain.COLUMNS.items():
        function, file = re.search(r"\[(\w+), (\w+\.py)\]", what).groups()
        assert f"def {function}(" in (explain.Path(explain.__file__).parent / file).read_text()
        assert f"{name:11} {what}" in printed
    head, *lines = printed.split("\ntoken ")[1].split("\nsum ")[0].splitlines()
    for line in lines:
        logprob, ref_logprob, kl, _, _, value, returns, *_ = map(float, line[14:].split())
        assert kl == pytest.approx(logprob - ref_logprob, abs=2e-4)
    explain.main([str(out / "checkpoint-000004"), "--prompt", "the plot", "--rows", "2"])
    printed = capsys.readouterr().out
    assert "step 4 of 6" in printed and re.search("response . of 2, .*: the plot >>>", printed)
    explain.main([str(out), "--html", str(tmp_path / "page.html")])
    assert (tmp_path / "page.html").is_file() and contents(out) == before


def test_a_model_alone_is_its_own_reference_and_says_so(tiny_folder, capsys):
    explain.main([str(tiny_folder), "--rows", "1"])
    printed = capsys.readouterr().out
    assert "a model without a run" in printed and "the model itself, so every KL is 0" in printed


def test_the_picture_has_the_ids_the_masks_and_the_padding(tokenizer):
    prompts, responses = tokenizer([" the plot was", " the"]).input_ids, [[300], [301, 302, 303, 0]]
    rows = [p + r for p, r in zip(prompts, responses)]
    masks = [[False] * len(p) + [True] * len(r) for p, r in zip(prompts, responses)]
    batch = batch_of(tokenizer, rows, masks)
    numbers = torch.where(batch.response_mask, -1.2346, 0)
    rollout = Rollout(*vars(batch).values(), *[numbers] * 6)
    for width in (100, 34):  # all columns side by side, and two at once
        printed = "\n".join(explain.picture(tokenizer, rollout, width))
        assert max(map(len, printed.splitlines())) <= width
        cells = {}
        for line in printed.split("row 1")[0].splitlines():
            name, *found = line.split() or [""]
            cells.setdefault(name, []).extend(found)
        assert cells["input_ids"] == [str(i) for i in batch.input_ids[0].tolist()]
        n, width_of_row = len(rows[0]), batch.input_ids.shape[1]
        assert cells["part"] == ["prompt"] * 3 + ["response"] + ["padding"] * (width_of_row - n)
        assert cells["attention_mask"] == ["1"] * n + ["0"] * (width_of_row - n)
        assert cells["response_mask"] == ["0", "0", "0", "1", "0"]
        assert cells["logprobs"] == ["0"] * 3 + ["-1.235"] + ["0"] * (width_of_row - n)
        assert cells["token"][1] == "\N{OPEN BOX}plot"


# ---- the page


def hand_made() -> tuple:
    tokens = ["</script><b>", " & \"'", "plain"]
    columns = {name: [0.123, -4.5, 0.0] for name in explain.COLUMNS}
    rows = [explain.Row("<i>prompt", 0.25, tokens, columns)]
    rows.append(explain.Row("no score", math.nan, [], {name: [] for name in explain.COLUMNS}))
    tables = [explain.table(row) for row in rows]
    return ["<u>a line"], rows, tables, ["ppo/kl <s>"]


class Tags(HTMLParser):
    """Raises AssertionError where tags do not close in order; keeps what a browser would read."""

    def __init__(self):
        super().__init__()
        self.open, self.seen, self.text = [], [], ""

    def handle_starttag(self, tag, attributes):
        self.seen.append((tag, dict(attributes)))
        if tag not in ("meta", "input"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_the_page_is_one_safe_file_that_needs_no_mouse_and_no_colour():
    html = rollout_page(*hand_made())
    tags = Tags()
    tags.feed(html)
    assert not tags.open
    names = {tag for tag, _ in tags.seen}
    assert not names & {"script", "b", "i", "u", "s", "link", "img", "iframe"}
    assert not re.search(r"https?:|url\(|@import|src=|\son\w+=", html)
    for written in ("</script><b>", " & \"'", "<i>prompt", "<u>a line", "ppo/kl <s>"):
        assert written in tags.text
    focusable = [attributes for _, attributes in tags.seen if attributes.get("class") == "t"]
    assert [attributes["tabindex"] for attributes in focusable] == ["0"] * 3
    assert "advantage -4.5000, ratio -4.5000" in tags.text and "-4.50" in tags.text
    strongest, orange = focusable[1]["style"].split(";")[0], "230,120,20"
    assert strongest == f"--advantage:rgba({orange},0.60)"
    assert [a["id"] for tag, a in tags.seen if tag == "input"] == [
        "by-advantage", "by-KL", "by-reward"
    ]  # fmt: skip
    assert "the update leaves it out" in tags.text
    assert ".t:hover .tip, .t:focus .tip { display: block; }" in html


def browser() -> str | None:
    names = ("chromium", "chromium-browser", "google-chrome", "chrome", "chromium-headless-shell")
    return os.environ.get("CHROME") or next(filter(None, map(shutil.which, names)), None)


PROBE = """<script>
const token = document.querySelector(".t"), colour = () => getComputedStyle(token).backgroundColor;
const found = [document.documentElement.scrollWidth <= innerWidth, colour()];
document.getElementById("by-reward").click(); found.push(colour()); token.focus();
found.push(document.activeElement === token); document.title = found.join("|");
</script>"""


@pytest.mark.skipif(browser() is None, reason="needs Chromium or Chrome; CHROME may name it")
def test_a_browser_shows_the_page_at_any_width_and_switches_its_colours(tmp_path):
    lines, rows, tables, below = hand_made()
    rows[0].columns["reward"] = [-4.5, 0.1, 0.0]
    (tmp_path / "page.html").write_text(rollout_page(lines, rows, tables, below) + PROBE)
    flags = "--headless --no-sandbox --disable-gpu --window-size=360,700 --dump-dom".split()
    command = [browser(), *flags, (tmp_path / "page.html").as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    title = re.search(r"<title>(.*?)</title>", done.stdout).group(1)
    assert title == "true|rgba(31, 119, 180, 0.02)|rgba(230, 120, 20, 0.6)|true", done.stderr


# ---- mistakes


@pytest.mark.parametrize(
    "words, said",
    [
        (["nowhere"], "expected a run folder of train.py or a model folder"),
        (["OUT", "--step", "5"], "no such checkpoint; it has steps 4, 6"),
        (["TINY", "--step", "5"], "is a model alone"),
        (["OUT", "--batch", "--html", "x.html"], "say one of the two"),
        (["OUT", "--html", "x.txt"], "expected a name that ends in .html"),
        (["OUT", "--html", "nowhere/x.html"], "in a folder that exists"),
        (["DPO"], "--algorithm dpo"),
        (["SFT"], "--ppo-ratio 0"),
        (["GONE"], "gone.py"),
        (["TARGET", "--prompt", "x y z"], "the data has no target"),
        (["EMPTY"], "has no checkpoint yet"),
    ],
)
def test_a_mistake_is_one_line(words, said, out, tiny_folder, tmp_path, capsys):
    config = (out / "config.json").read_text()
    changed = {
        "DPO": ('"algorithm": "ppo"', '"algorithm": "dpo"'),
        "SFT": ('"ppo_ratio": 0.5', '"ppo_ratio": 0.0'),
        "GONE": ('"reward": "sentiment"', '"reward": "gone.py:f"'),
        "TARGET": ('"reward": "sentiment"', '"reward": "rouge_l"'),
        "EMPTY": ("", ""),
    }
    places = {"OUT": out, "TINY": tiny_folder}
    if words[0] in changed:
        places[words[0]] = tmp_path / "run"
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "config.json").write_text(config.replace(*changed[words[0]]))
        if words[0] != "EMPTY":
            (tmp_path / "run" / "final").symlink_to(out / "final")
    with pytest.raises(SystemExit) as stopped:
        explain.main([str(places.get(word, word)) for word in words])
    error = capsys.readouterr().err.splitlines()[-1]
    assert stopped.value.code == 2 and error.startswith("error: ") and said in error
