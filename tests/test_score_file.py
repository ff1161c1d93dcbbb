"""`python rewards.py EXPRESSION FILE`: what is read, and what is said about the scores."""

import json
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

from engine import UserError
from rewards import main
from score_file import read_scored, summary

DIALOGUE = [
    {"role": "system", "content": "s"},
    {"role": "user", "content": "q"},
    {"role": "assistant", "content": "the answer"},
]


def save(tmp_path, *records):
    file = tmp_path / "scored.jsonl"
    file.write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    return str(file)


@pytest.mark.parametrize(
    "record, completion, prompt, columns",
    [
        ({"prompt": "p", "completion": "c", "target": "t", "x": 3}, "c", "p", {"x": 3}),
        ({"question": "p", "response": "c", "answer": "t"}, "c", "p", {}),
        ({"instruction": "p", "input": "i", "output": "c"}, "c", "p\n\ni", {"input": "i"}),
        ({"completion": "c", "answers": "a"}, "c", "", {"answers": "a"}),
        ({"prompt": "p", "completion": None, "target": "t"}, "", "p", {}),
        ({"prompt": "p", "completion": None, "response": "c"}, "c", "p", {}),
        ({"query": "p", "completion": [DIALOGUE[2]], "prompt": None}, "the answer", "p", {}),
        ({"messages": DIALOGUE, "x": 3}, "the answer", "System:\ns\n\nUser:\nq\n\n", {"x": 3}),
    ],
)
def test_names_of_fields_are_those_of_data(tmp_path, record, completion, prompt, columns):
    (text,), (example,) = read_scored(save(tmp_path, record))
    assert text == completion and example.prompt.removesuffix("Assistant:\n") == prompt
    has_target = "target" in record or "answer" in record
    expected = columns | ({"target": "t"} if has_target else {})
    assert example.columns == expected


def test_training_data_is_scored_by_its_targets(tmp_path, capsys):
    main(
        [
            "length(target=2)",
            save(tmp_path, {"question": "q", "answer": "a b"}, {"question": "r", "answer": "a"}),
        ]
    )
    said = capsys.readouterr()
    assert [json.loads(line)["total"] for line in said.out.splitlines()] == [1, 0.5]
    assert "note: 2 of 2 records have no completion: their target is scored" in said.err


def test_what_cannot_be_scored_is_named_with_its_line(tmp_path):
    file = save(tmp_path, {"completion": "c"}, {"prompt": "p", "chosen": "a", "rejected": "b"})
    with pytest.raises(UserError, match=r"scored.jsonl:2: no text to score.*has prompt, chosen"):
        read_scored(file)


@pytest.mark.parametrize(
    "value, message",
    [
        (5, "field 'completion' must be a string or messages, found int"),
        (["5"], "field 'completion' must be a string or messages, found list"),
        (DIALOGUE, "field 'completion' holds 3 messages; expected one"),
    ],
)
def test_a_completion_of_another_kind_is_no_text(tmp_path, value, message):
    with pytest.raises(UserError, match=rf"scored.jsonl:1: {message}"):
        read_scored(save(tmp_path, {"completion": value, "target": "5"}))


@pytest.mark.parametrize("target", [5, {"a": 5}, ["5", 6]])
def test_a_target_of_another_kind_is_named(tmp_path, capsys, target):
    with pytest.raises(SystemExit):
        main(["exact_match", save(tmp_path, {"completion": "5", "target": target})])
    assert "a reward compares with a text, or with a list of texts" in capsys.readouterr().err


def test_summary():
    total = torch.tensor([0.25, float("nan"), 0.5, -1.5, 0.25, 3.0])
    lines = summary({"total": total, "x": total * 2}, ["a", "b", "c\n", "d", "a", "e"])
    assert lines == [
        "mean  total 0.5000  x 1.0000",
        "1 of 6 have no score",
        "spread 1.4405 (standard deviation), from -1.5000 to 3.0000; "
        "equal: 40% of the scores are 0.2500",
        "best",
        "  +3.0000  e",
        "  +0.5000  c",
        "worst",
        "  -1.5000  d",
        "  +0.2500  a",
    ]
    assert summary({"total": torch.tensor([2.0, 2.0])}, ["a", "b"])[1:] == [
        "spread 0.0000 (standard deviation), from 2.0000 to 2.0000; "
        "equal: 100% of the scores are 2.0000"
    ]
    assert summary({"total": torch.tensor([float("nan")])}, ["a"])[1:] == ["1 of 1 have no score"]


def test_a_pipe_gets_the_scores_alone_and_may_close(tmp_path, capsys):
    (tmp_path / "r.py").write_text(
        "print('loading')\n"
        "def f(completions, **kwargs):\n"
        "    print('scoring')\n"
        "    return [None, *range(len(completions) - 1)]\n"
    )
    file = save(tmp_path, *[{"completion": f"text {i}"} for i in range(5_000)])
    expression = f"{tmp_path}/r.py:f"
    main([expression, file])
    said = capsys.readouterr()
    rows = [json.loads(line) for line in said.out.splitlines()]
    assert [row["total"] for row in rows] == [None, *range(4_999)]
    assert said.err.startswith("loading\nscoring\nmean  total 2499.0")
    command = [sys.executable, "rewards.py", expression, file]
    options = dict(cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    closed = subprocess.Popen(command, **options)
    assert json.loads(closed.stdout.readline())["completion"] == "text 0"
    closed.stdout.close()
    assert "mean  total" in closed.stderr.read() and closed.wait() == 0
