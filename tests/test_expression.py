"""The language of --reward, tried with two toy rewards: it needs no other."""

import ast

import pytest
import torch
from conftest import ROOT

from engine import UserError
from expression import parse
from leaves import completion_reward, without_arguments


def letter(context, which="a"):
    return completion_reward(lambda text: float(text.count(which)))


NAMES = {
    "words": (without_arguments(completion_reward(lambda text: len(text.split()))), "any: words"),
    "letter": (letter, "any, which=: how often a letter appears"),
}
TEXTS = ["a banana", "b", ""]  # words: 2, 1, 0; a: 4, 0, 0; b: 1, 1, 0


@pytest.mark.parametrize(
    "text, expected",
    [
        ("words", [2, 1, 0]),
        ("letter", [4, 0, 0]),
        ('2*letter("b") - words + 1', [1, 2, 1]),
        ("-(words - 3)*+words", [2, 2, 0]),
        ("7", [7, 7, 7]),
        ("min(words, letter, 3)", [2, 0, 0]),
        ("max(words, letter)", [4, 1, 0]),
        ("clip(scale(letter, 0.5), 0.5, high=1.5)", [1.5, 0.5, 0.5]),
        ("scale(clip(words, 0, 1) - tanh(0), 10)", [10, 10, 0]),
    ],
)
def test_what_an_expression_is_worth(text, expected):
    assert parse(text, NAMES, {})([""] * 3, TEXTS).tolist() == expected


def test_leaves_are_named_as_written_and_asked_once():
    asked = []

    def count(prompts, completions, **columns):
        asked.append(columns)
        return [1.0] * len(completions)

    names = {**NAMES, "count": (without_arguments(count), "")}
    reward = parse("count*count + letter( which = 'b' )", names, {})
    assert reward([""], ["b"], field=["x"]).tolist() == [2]
    assert list(reward.parts) == ["count", 'letter(which="b")'] and asked == [{"field": ["x"]}]


def test_a_maker_gets_the_context():
    def make(context, times=1):
        return completion_reward(lambda text: context["base"] * times)

    reward = parse("made(times=3)", {"made": (make, "")}, {"base": 5.0})
    assert reward([""], [""]).tolist() == [15]


@pytest.mark.parametrize(
    "text, message",
    [
        (
            "bleu",
            "cannot read 'bleu'; known are words, letter, clip, scale, tanh, whiten, ema, min",
        ),
        ("words.real", "cannot read 'words.real'"),
        ("words(3)", "cannot read 'words(3)': too many positional arguments"),
        ("letter(when='a')", "got an unexpected keyword argument 'when'"),
        ("clip(words, 1)", "missing a required argument: 'high'"),
        ("clip(words, 2, 1)", "expected finite numbers, the lower first, found 2 and 1"),
        ("scale(words, True)", "expected a finite number, found True"),
        ("min(words)", "cannot read 'min(words)'"),
        ("min(words, letter, key=1)", "cannot read"),
        ("mixture()", "at least two rewards"),
        ("9" * 400, "is not an expression"),
    ],
)
def test_what_cannot_be_read_is_named(text, message):
    with pytest.raises(UserError) as caught:
        parse(text, NAMES, {})
    assert message in str(caught.value)


def test_the_language_knows_no_reward_by_name():
    imported = set()
    for node in ast.walk(ast.parse((ROOT / "expression.py").read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            imported.add(node.module)
        elif isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
    assert not imported & {"rewards", "measures", "judges"}
    assert parse("ema(words)", NAMES, {})([""] * 2, TEXTS[:2]).isfinite().all()


def test_a_judge_may_abstain_and_others_may_not():
    def nothing(prompts, completions, **columns):
        return [None] * len(completions)

    names = {"nothing": (without_arguments(nothing), "")}
    with pytest.raises(UserError, match="reward 'nothing' gave None, not a finite number"):
        parse("nothing", names, {})([""], [""])
    nothing.may_abstain = True
    assert torch.isnan(parse("nothing + 1", names, {})([""], [""])).all()
