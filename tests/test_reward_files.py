"""Reward functions in a user's own file: TRL's signature, imports, copies, states, errors."""

import json
import os
import sys

import pytest
import torch
from conftest import ROOT

from data import columns_of, load_examples
from engine import UserError
from rewards import build_reward


def write(folder, **files):
    for name, text in files.items():
        (folder / f"{name}.py").write_text(text, encoding="utf-8")
    return folder


def test_functions_of_a_file_in_trls_signature(tmp_path):
    (tmp_path / "my-rewards.py").write_text(
        "import asyncio\n"
        "import numpy as np, torch\n"
        "def politeness(completions, **kwargs):\n"
        "    return [1.0 if 'please' in c else 0 for c in completions]\n"
        "def with_column(prompts, completions, level): return [float(x) for x in level]\n"
        "def as_array(completions, **kwargs): return np.ones(len(completions), dtype=np.float32)\n"
        "def as_tensor(completions, **kwargs): return torch.full((len(completions),), 2)\n"
        "def np_floats(completions, **kwargs): return [np.float32(3)] * len(completions)\n"
        "shorter = lambda prompts, completions, **kw: [-len(c) for c in completions]\n"
        "class Counted:\n"
        "    def __call__(self, completions, **kwargs): return [4] * len(completions)\n"
        "def without_prompts(completions): return [len(c) for c in completions]\n"
        "def mixed(completions): return [torch.tensor([2.5], requires_grad=True), np.int64(-3)]\n"
        "def flags(completions): return [np.bool_(True), torch.tensor(False)]\n"
        "def some(completions, **kwargs): return [None, 1.5]\n"
        "async def later(completions, **kwargs):\n"
        "    await asyncio.sleep(0)\n"
        "    return [float(len(c)) for c in completions]\n"
        "class Client:\n"
        "    async def __call__(self, completions, **kwargs):\n"
        "        loop = asyncio.get_running_loop()\n"
        "        self.loop = getattr(self, 'loop', loop)\n"
        "        assert loop is self.loop, 'a client belongs to one loop'\n"
        "        return [7.0] * len(completions)\n"
    )
    path = f"{tmp_path}/my-rewards.py"
    texts, columns = (["p", "q"], ["please", "now"]), dict(level=[1, 2], unused=[0, 0])
    for name, expected in {
        "politeness": [1, 0],
        "with_column": [1, 2],
        "as_array": [1, 1],
        "as_tensor": [2, 2],
        "np_floats": [3, 3],
        "shorter": [-6, -3],
        "Counted": [4, 4],
        "without_prompts": [6, 3],
        "mixed": [2.5, -3],
        "flags": [1, 0],
        "later": [6, 3],
        "Client": [7, 7],
    }.items():
        reward = build_reward(f"{path}:{name}")
        assert reward(*texts, **columns).tolist() == expected, name
        assert reward(*texts, **columns).tolist() == expected, f"{name}, asked again"
    some = build_reward(f"2*{path}:some")(*texts, **columns)
    assert torch.isnan(some[0]) and some[1] == 3, "None is no score for that row, and for it alone"
    reward = build_reward(f"0.5*{path}:politeness - 2*{path}:with_column + 1")
    assert reward(*texts, **columns).tolist() == [-0.5, -3.0] and list(reward.parts) == [
        "politeness",
        "with_column",
    ]


@pytest.mark.parametrize(
    "body, message",
    [
        (
            "raise KeyError('boom')",
            "reward 'f' raised KeyError: 'boom' (f.py:2); first completion: 'first text'",
        ),
        ("return [1.0]", "list of 2 floats, one per completion; it returned 1 values"),
        ("return 3", "it returned int"),
        ("return None", "it returned NoneType"),
        (
            "return [1.0, float('nan')]",
            "gave nan, not a finite number, for the completion 'second text'",
        ),
        (
            "return [float('inf'), 0]",
            "gave inf, not a finite number, for the completion 'first text'",
        ),
        ("return ['1', 1]", "gave '1'"),
    ],
)
def test_a_function_that_misbehaves_is_named_with_the_text(tmp_path, body, message):
    (tmp_path / "f.py").write_text(f"def f(prompts, completions, **columns):\n    {body}\n")
    with pytest.raises(UserError) as caught:
        build_reward(f"{tmp_path}/f.py:f")(["p", "q"], ["first text", "second text"])
    assert message in str(caught.value)


def test_a_field_that_the_data_lack_is_named_with_those_they_have(tmp_path):
    (tmp_path / "f.py").write_text(
        "def f(completions, target, level=2): return [float(level)] * len(completions)\n"
    )
    reward = build_reward(f"{tmp_path}/f.py:f")
    assert reward(["p"], ["c"], target=["t"]).tolist() == [2.0]
    with pytest.raises(UserError) as caught:
        reward(["p"], ["c"], answer=["4"])
    assert "reward 'f' asks for 'target', and the data have no such field (they have answer)" in (
        str(caught.value)
    )


def test_a_file_that_cannot_be_imported_or_lacks_the_name(tmp_path):
    (tmp_path / "bad.py").write_text("import nothing_of_that_name\n")
    with pytest.raises(UserError, match="importing the file raised ModuleNotFoundError"):
        build_reward(f"{tmp_path}/bad.py:f")
    (tmp_path / "good.py").write_text("x = 1\n")
    with pytest.raises(UserError, match="no function of that name; expected def f"):
        build_reward(f"{tmp_path}/good.py:f")


def test_two_files_may_not_have_rewards_of_one_name(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.py").write_text(
            "def f(completions, **columns): return [1.0] * len(completions)\n"
        )
    with pytest.raises(UserError, match="two different rewards are called 'f'"):
        build_reward(f"{tmp_path}/a.py:f + {tmp_path}/b.py:f")
    assert build_reward(f"{tmp_path}/a.py:f + {tmp_path}/a.py:f")(["p"], ["c"]).item() == 2


# ---- what a function receives


def test_the_column_that_became_the_target_keeps_its_name(tmp_path):
    (tmp_path / "gsm.jsonl").write_text(
        json.dumps({"question": "2+3?", "answer": "2+3=5\n#### 5", "level": 4}) + "\n"
    )
    write(
        tmp_path,
        r="def f(prompts, completions, question, answer, target, level, **kwargs):\n"
        "    assert question == prompts and answer == target\n"
        "    return [10 * n + (a.split('####')[1].strip() in c)\n"
        "            for c, a, n in zip(completions, answer, level)]\n",
    )
    examples = load_examples(str(tmp_path / "gsm.jsonl"))
    reward = build_reward(f"{tmp_path}/r.py:f")
    assert reward([examples[0].prompt], ["it is 5"], **columns_of(examples)).tolist() == [41]


def test_a_column_may_be_called_self(tmp_path):
    write(
        tmp_path,
        r="class Judge:\n"
        "    def __call__(self, completions, **columns):\n"
        "        assert 'self' not in columns and columns['cls'] == ['y']\n"
        "        return [1.5 for _ in completions]\n"
        "def plain(completions, self, **columns): return [float(len(x)) for x in self]\n",
    )
    columns = {"self": ["xyz"], "cls": ["y"], "target": ["t"]}
    expression = f"{tmp_path}/r.py:Judge + {tmp_path}/r.py:plain + exact_match"
    assert build_reward(expression)(["p"], ["t"], **columns).tolist() == [5.5]


MESSAGES = """
def by_argument(prompts, completions, **kwargs):
    return [len(p) + len(c[0]["content"]) for p, c in zip(prompts, completions)]
def by_attribute(prompts, completions, **kwargs):
    assert [p[-1]["role"] for p in prompts] == ["user", "user"]
    return [len(c[-1]["content"]) for c in completions]
by_attribute.wants_messages = True
"""


def test_a_function_may_read_messages(tmp_path):
    path = f"{write(tmp_path, r=MESSAGES)}/r.py"
    history = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    columns = dict(prompt_messages=[history, None])
    reward = build_reward(f"{path}:by_argument(messages=True) + 100*{path}:by_attribute")
    assert reward(["p", "q"], ["abc", "de"], **columns).tolist() == [305, 203]
    assert list(reward.parts) == ["by_argument(messages=True)", "by_attribute"]
    with pytest.raises(UserError, match=r"reads messages.*file.py:function\(messages=True\)"):
        build_reward(f"{path}:by_argument")(["p"], ["abc"])
    for argument in ("top=3", "messages=1", "True", "messages='yes'"):
        with pytest.raises(UserError, match="takes no arguments here but messages=True"):
            build_reward(f"{path}:by_argument({argument})")


def test_the_turns_of_a_dialogue_arrive_as_messages(tmp_path):
    from dialogue import Episode, score_episodes
    from sources import Example

    write(
        tmp_path,
        r="seen = []\n"
        "def f(prompts, completions, **kwargs):\n"
        "    return [float(10 * len(p) + len(c)) for p, c in zip(prompts, completions)]\n",
    )
    history = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    said = [("assistant", "a1"), ("user", "u2"), ("assistant", "a2")]
    turns = [{"role": role, "content": content} for role, content in said]
    episode = Episode(
        Example("U", "", messages=history), history + turns,
        [5, 6, 7, 8], [False, True, True, True],
        histories=["U", "U A"], responses=["a1", "a2"], replies=["u2"], ends=[1, 3],
        truncated=[False, False],
    )  # fmt: skip
    reward = build_reward(f"{tmp_path}/r.py:f(messages=True)")
    device = torch.device("cpu")
    whole = score_episodes([episode, episode], reward, False, device)
    assert whole.values.tolist() == [23, 23], "two messages before, three after"
    by_turn = score_episodes([episode], reward, True, device)
    assert by_turn.values.tolist() == [21, 41] and by_turn.columns.tolist() == [1, 3]


def test_leaves_get_copies(tmp_path):
    write(
        tmp_path,
        r="def cleaned(completions, target, **kwargs):\n"
        "    for i in range(len(completions)):\n"
        "        completions[i], target[i] = 'x', 'x'\n"
        "    kwargs['references'][0].append('x')\n"
        "    return [0.0] * len(completions)\n",
    )
    columns = dict(target=["a b"], references=[["a c"]])
    reward = build_reward(f"{tmp_path}/r.py:cleaned + rouge_1")
    assert reward(["p"], ["a c"], **columns).tolist() == [1]
    assert columns == dict(target=["a b"], references=[["a c"]])


def test_what_a_function_logs_is_a_metric(tmp_path):
    write(
        tmp_path,
        r="def f(completions, log_metric=None, **kwargs):\n"
        "    for c in completions: log_metric('share of a', c.count('a') / len(c))\n"
        "    return [0.0] * len(completions)\n"
        "def g(completions, **kwargs):\n"
        "    kwargs['log_metric']('n', len(completions))\n"
        "    return [0.0] * len(completions)\n",
    )
    reward = build_reward(f"{tmp_path}/r.py:f + {tmp_path}/r.py:g")
    reward(["p", "q"], ["banana", "abcde"])
    expected = {"reward_metric/share of a": (3 / 6 + 1 / 5) / 2, "reward_metric/n": 2.0}
    assert reward.metrics() == pytest.approx({"reward/f": 0, "reward/g": 0, **expected})
    reward(["p"], ["x"])
    assert reward.metrics()["reward_metric/share of a"] == 0, "of the last call alone"


# ---- files


def test_a_file_is_executed_once(tmp_path, capsys):
    write(
        tmp_path,
        r="print('loading')\nstate = {'n': 0}\n"
        "def f(completions, **kwargs):\n"
        "    state['n'] += len(completions)\n"
        "    return [0.0] * len(completions)\n"
        "def g(completions, **kwargs): return [float(state['n'])] * len(completions)\n",
    )
    path = f"{tmp_path}/r.py"
    reward = build_reward(
        f"{path}:f + {path}:g + 2*{tmp_path}/../{tmp_path.name}/r.py:g - {path}:f"
    )
    assert capsys.readouterr().out.count("loading") == 1
    assert reward(["p"] * 3, ["a"] * 3).tolist() == [9, 9, 9]


def test_helpers_beside_a_file_are_its_own(tmp_path):
    """Two folders with helpers of one name, and one that is called like a file of ours."""
    names = "import helpers\nfrom .helpers import K\nimport sample\n"
    body = (
        f"{names}"
        "def NAME(completions, **kwargs):\n"
        "    import late, judges\n"
        "    assert helpers.K == K and not hasattr(judges, 'JUDGES')\n"
        "    return [K + sample.K + late.K + judges.K] * len(completions)\n"
    )
    expected = 0.0
    for i, name in enumerate(["one", "two"], start=1):
        folder = tmp_path / name
        (folder / "judges").mkdir(parents=True)
        (folder / "judges/__init__.py").write_text("from judges.inner import K\n")
        (folder / "judges/inner.py").write_text(f"K = {1000 * i}\n")
        constants = dict(helpers=i, sample=10 * i, late=100 * i)
        write(folder, **{stem: f"K = {value}.0\n" for stem, value in constants.items()})
        write(folder, r=body.replace("NAME", name))
        expected += 1111 * i
    before, path = set(sys.modules), list(sys.path)
    reward = build_reward(f"{tmp_path}/one/r.py:one + {tmp_path}/two/r.py:two")
    for _ in range(2):
        assert reward(["p"], ["c"]).tolist() == [expected]
    import judges
    import sample

    assert judges.JUDGES and sample.main and sys.path == path
    left = {name for name in set(sys.modules) - before if not name.startswith("reward_files_")}
    assert not left & {"helpers", "late", "judges.inner"}


def test_a_file_in_our_own_folder_imports_ours():
    from reward_files import RewardFile

    module = RewardFile(str(ROOT / "examples" / "my_rewards.py")).module
    assert module.politeness(["p"], ["please"]) == [1]
    assert sys.modules["rewards"].build_reward is build_reward


@pytest.mark.parametrize("ending", ["sys.exit(3)", "raise SystemExit('no GPU')", "f(completions)"])
def test_whatever_ends_a_function_is_named(tmp_path, ending):
    write(tmp_path, r=f"import sys\ndef f(completions, **kwargs):\n    {ending}\n")
    error = "RecursionError" if ending == "f(completions)" else "SystemExit: (3|no GPU)"
    with pytest.raises(UserError, match=rf"reward 'f' raised {error}"):
        build_reward(f"{tmp_path}/r.py:f")(["p"], ["c"])


@pytest.mark.parametrize("ending", ["sys.exit(3)", "raise ValueError('v')"])
def test_whatever_ends_an_async_function_is_named(tmp_path, ending):
    write(tmp_path, r=f"import sys\nasync def f(completions, **kwargs):\n    {ending}\n")
    reward = build_reward(f"{tmp_path}/r.py:f")
    for _ in range(2):
        with pytest.raises(UserError, match="reward 'f' raised (SystemExit: 3|ValueError: v)"):
            reward(["p"], ["c"])


def test_a_function_without_known_parameters_is_named(tmp_path):
    write(tmp_path, r="f = max\n")
    with pytest.raises(UserError, match=r"r.py:f: .*expected a function written in Python"):
        build_reward(f"{tmp_path}/r.py:f")


def test_a_class_that_cannot_be_called_is_named(tmp_path):
    write(tmp_path, r="class Judge:\n    def score(self): return 1\n")
    with pytest.raises(UserError, match="the class has no __call__"):
        build_reward(f"{tmp_path}/r.py:Judge")


def test_what_a_file_changes_of_the_process_is_put_back(tmp_path):
    change = (
        "os.chdir(FOLDER); torch.set_default_dtype(torch.float64); torch.set_grad_enabled(False)"
    ).replace("FOLDER", repr(str(tmp_path)))
    write(
        tmp_path,
        r=f"import os, torch\n{change}\n"
        f"def f(completions, **kwargs):\n    {change}\n    return [1.0] * len(completions)\n",
    )
    before = os.getcwd()
    build_reward(f"{tmp_path}/r.py:f")(["p"], ["c"])
    assert os.getcwd() == before and torch.is_grad_enabled()
    assert torch.get_default_dtype() == torch.float32


def test_a_file_that_exits_is_named(tmp_path):
    write(tmp_path, r="import sys\nsys.exit('bye')\n")
    with pytest.raises(UserError, match="importing the file raised SystemExit: bye"):
        build_reward(f"{tmp_path}/r.py:f")


@pytest.mark.parametrize("folder", ["a b", "a+b - c", "it's", '"quoted"', "a*b (1)"])
@pytest.mark.parametrize("form", ["{}:fn", "2*{}:fn - length", "length-{}:fn", "clip({}:fn, 0, 9)"])
def test_a_path_may_hold_anything(tmp_path, folder, form):
    (tmp_path / folder).mkdir()
    write(tmp_path / folder, r="def fn(completions): return [2.0 for _ in completions]\n")
    expected = {"{}:fn": 2, "2*{}:fn - length": 4, "length-{}:fn": -2, "clip({}:fn, 0, 9)": 2}[form]
    expression = form.format(f"{tmp_path}/{folder}/r.py")
    assert build_reward(expression)(["p"], [""]).tolist() == [expected]


# ---- classes with a state

COUNTER = """
class Counter:
    def __init__(self): self.n = 0
    def __call__(self, completions, **kwargs):
        self.n += len(completions)
        return [float(self.n)] * len(completions)
    def state_dict(self): return {"n": self.n, "seen": BAD}
    def load_state_dict(self, state): self.n = state["n"]
"""


def test_a_state_is_saved_and_is_frozen_for_measuring(tmp_path):
    path = f"{write(tmp_path, r=COUNTER.replace('BAD', '[1.5]'))}/r.py"
    reward = build_reward(f"{path}:Counter + 0*ema(length)")
    assert reward(["p"] * 2, ["a b"] * 2).tolist() == [2, 2]
    with reward.frozen():
        reward(["p"], ["a b"])
    assert reward(["p"], ["a b"]).tolist() == [3]
    state = reward.state_dict()
    assert state["Counter"] == {"n": 3, "seen": [1.5]} and len(state) == 2
    other = build_reward(f"{path}:Counter + 0*ema(length)")
    other.load_state_dict(state)
    assert other(["p"], ["a b"]).tolist() == [4]


def test_a_state_that_no_checkpoint_keeps_is_refused_before_training(tmp_path):
    path = f"{write(tmp_path, r=COUNTER.replace('BAD', 'Counter'))}/r.py"
    (tmp_path / "d.jsonl").write_text(json.dumps({"prompt": "p", "target": "t"}) + "\n")
    with pytest.raises(UserError, match="state_dict.. is nothing that a checkpoint keeps"):
        build_reward(f"{path}:Counter").try_on(load_examples(str(tmp_path / "d.jsonl")))


@pytest.mark.parametrize("state", ["__import__('threading').Lock()", "1 / 0"])
def test_a_state_that_cannot_be_taken_is_named(tmp_path, state):
    path = f"{write(tmp_path, r=COUNTER.replace('BAD', state))}/r.py"
    with pytest.raises(
        UserError, match=r"'Counter': its state_dict\(\) .* \((Type|ZeroDivision)Error"
    ):
        build_reward(f"{path}:Counter").state_dict()


@pytest.mark.slow
def test_a_run_with_a_class_is_resumed_with_its_state(tmp_path):
    from train import main

    path = f"{write(tmp_path, r=COUNTER.replace('BAD', '0'))}/r.py"
    flags = "--limit 40 --ppo-ratio 1 --batch-size 4 --eval-size 4 --max-new-tokens 4".split()
    flags += "--eval-every 3 --save-every 3 --device cpu".split()

    def run(out, steps):
        main([*flags, "--steps", str(steps), "--reward", f"0.01*{path}:Counter", "--out", str(out)])

    run(tmp_path / "whole", 6)
    run(tmp_path / "parts", 3)
    main(["--resume", str(tmp_path / "parts"), "--steps", "6"])
    whole, parts = [
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").open()]
        for name in ("whole", "parts")
    ]
    scores = [
        [row["reward/Counter"] for row in rows if row["phase"] == "ppo"] for rows in (whole, parts)
    ]
    assert scores[0] == scores[1] == [4.0 * (i + 1) for i in range(6)]


@pytest.mark.parametrize("mended", ["r", "helper"])
def test_a_file_that_was_mended_within_a_second_runs_as_it_is(tmp_path, monkeypatch, mended):
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    write(tmp_path, helper="FACTOR = 3\n")
    write(tmp_path, r="import helper\ndef f(completions): return [5 + helper.FACTOR]\n")
    for file in ("r.py", "helper.py"):
        os.utime(tmp_path / file, (1_700_000_000, 1_700_000_000))
    assert build_reward(f"{tmp_path}/r.py:f")(["p"], ["t"]).tolist() == [8]
    path = tmp_path / f"{mended}.py"
    path.write_text(path.read_text().replace("5", "7").replace("= 3", "= 4"))  # as long as before
    os.utime(path, (1_700_000_000, 1_700_000_000))
    expected = {"r": 10, "helper": 9}[mended]
    assert build_reward(f"{tmp_path}/r.py:f")(["p"], ["t"]).tolist() == [expected]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["helper.py", "r.py"]
    assert sys.dont_write_bytecode is False
