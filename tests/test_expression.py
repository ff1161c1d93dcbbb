"""The language of --reward, tried with two toy rewards: it needs no other."""

import ast
from pathlib import PureWindowsPath

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
        ("0*words + 7", [7, 7, 7]),
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
            "cannot read 'bleu'; known are words, letter, clip, scale, tanh, whiten, ema, min, max",
        ),
        ("words.real", "cannot read 'words.real'"),
        ("words(3)", "cannot read 'words(3)': too many positional arguments"),
        ("letter(when='a')", "got an unexpected keyword argument 'when'"),
        ("clip(words, 1)", "missing a required argument: 'high'"),
        ("clip(words, 2, 1)", "expected finite numbers, the lower first, found 2 and 1"),
        ("scale(words, True)", "expected a finite number, found True"),
        ("min(words)", "cannot read 'min(words)'"),
        ("self_play(whiten(words))", "self_play compares two scores, and whiten standardises"),
        ("self_play(1 - min(letter, 2*whiten(words)), every=3)", "self_play compares two scores"),
        ("7", "numbers alone are no reward"),
        ("1 + 2*clip(3, 0, 1)", "numbers alone are no reward"),
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


def test_none_is_no_score_and_nan_is_a_mistake():
    def half(value):
        def reward(prompts, completions, **columns):
            return [value if text == "b" else 2.5 for text in completions]

        return {**NAMES, "half": (without_arguments(reward), "")}

    of_tasks = parse("first(half, 10*half, letter - 7)", half(None), {})
    assert of_tasks([""] * 2, ["a", "b"]).tolist() == [2.5, -7]
    total = parse("half + 1", half(None), {})([""] * 2, ["a", "b"])
    assert total[0] == 3.5 and torch.isnan(total[1])
    with pytest.raises(UserError, match="reward 'half' gave nan, not a finite number"):
        parse("half", half(float("nan")), {})([""] * 2, ["a", "b"])


def test_a_function_that_wants_messages_gets_them():
    seen = []

    def talk(prompts, completions, **columns):
        seen.append((prompts, completions, list(columns)))
        return [1.0] * len(completions)

    talk.wants_messages = True
    reward = parse("talk", {"talk": (without_arguments(talk), "")}, {})
    history = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    reward(["p", "q"], ["a", "b"], prompt_messages=[history, None], level=[1, 2])
    assert seen == [
        (
            [history, [{"role": "user", "content": "q"}]],
            [[{"role": "assistant", "content": text}] for text in "ab"],
            ["level"],
        )
    ]


def stateless(value):
    """What `load_function` returns, for a function that gives every text this value."""
    reward = completion_reward(lambda text: value)
    reward.has_state = False
    return reward


WINDOWS = PureWindowsPath("C:/", "my files (x86)", "new.rewards", "r.py")


@pytest.mark.parametrize(
    "text, file, value",
    [
        (f"{WINDOWS}:fn", str(WINDOWS), 5),
        (f'"{WINDOWS}:fn"', str(WINDOWS), 5),
        (f"words - 2*{WINDOWS}:fn + 1", str(WINDOWS), -7),
        (f"clip('{WINDOWS}:fn', 0, 3)*words", str(WINDOWS), 6),
        (f"words+{WINDOWS.as_posix()}:fn", WINDOWS.as_posix(), 7),
        (r"d:\\my files\\r.py:fn - words", r"d:\\my files\\r.py", 3),
        (r"examples\r.py:fn + words", r"examples\r.py", 7),
        (r"\\server\share\r.py:fn", r"\\server\share\r.py", 5),
        ("0.5*'my files/it is r.py:fn' + words", "my files/it is r.py", 4.5),
        ('max("/a b/r.py:fn", words)', "/a b/r.py", 5),
        ("words - ~/r-1.py:fn", "~/r-1.py", -3),
        ("2*./r.py:fn", "./r.py", 10),
    ],
)
def test_a_path_may_have_a_drive_backslashes_and_spaces(text, file, value, monkeypatch):
    asked = []

    def load(path, name, loaded, wants_messages):
        asked.append((path, name))
        return stateless(5.0)

    monkeypatch.setattr("expression.load_function", load)
    assert parse(text, NAMES, {})([""], ["a banana"]).tolist() == [value]
    assert asked == [(file, "fn")]


def test_two_windows_paths_in_one_expression(monkeypatch):
    values = {r"C:\a b\r.py": 3.0, r"D:\c d\r.py": 4.0}
    monkeypatch.setattr("expression.load_function", lambda path, *_: stateless(values[path]))
    text = r"C:\a b\r.py:f + 10*D:\c d\r.py:g"
    assert parse(text, NAMES, {})([""], ["x"]).tolist() == [43]


def test_a_windows_path_in_an_argument_is_not_read_as_escapes():
    seen = []

    def make(context, lexicon):
        seen.append(lexicon)
        return completion_reward(lambda text: 1.0)

    names = {"lookup": (make, "")}
    parse(r'lookup("C:\new\table.txt")', names, {})
    parse("lookup('a\\tb')", names, {})
    parse('lookup("C:/x/r.py:f")', names, {})
    assert PureWindowsPath(seen[0]) == PureWindowsPath("C:/new/table.txt")
    assert seen[1:] == ["a\tb", "C:/x/r.py:f"]


@pytest.mark.parametrize("name", ["my files/r.py", "a+b (1), it's.py", "caf\u00e9.py"])
def test_a_path_that_stands_alone_needs_no_quotes(name, tmp_path):
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    file.write_text("def fn(prompts, completions):\n    return [2.0 for _ in completions]\n")
    assert parse(f"{file}:fn", NAMES, {})([""], ["x"]).tolist() == [2]
