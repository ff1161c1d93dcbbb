"""The command line of train.py: what is answered before torch is loaded, and with which names.

The packages that a process loads are those that Python itself reports (`-X importtime`).
"""

import os
import subprocess
import sys

import pytest
from conftest import ROOT

from engine import AMP_DTYPES, OPTIMIZERS, SCHEDULERS, UserError
from flags import DEFAULT_LR, make_parser, parse_args
from schedules import SCHEDULES
from train import ALGORITHMS

SLOW_TO_LOAD = {"torch", "numpy", "transformers", "datasets", "pyarrow", "tqdm"}
REPORT = "import time:"


def answer(words: str, **environment) -> tuple[int, str, str]:
    """`python train.py WORDS` -> its exit status, stdout and stderr. It loads nothing slow."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "train.py", *words.split()],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, **environment},
    )
    lines = done.stderr.splitlines()
    modules = [line.split("|")[-1].strip() for line in lines if line.startswith(REPORT)]
    packages = {module.split(".")[0] for module in modules}
    assert {"flags", "cli"} <= packages and not packages & SLOW_TO_LOAD, packages & SLOW_TO_LOAD
    return done.returncode, done.stdout, "\n".join(x for x in lines if not x.startswith(REPORT))


def test_help_is_answered_before_torch_is_loaded(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys, "argv", ["train.py"])
    status, out, err = answer("--help")
    assert (status, err) == (0, "")
    assert out == make_parser(ALGORITHMS, SCHEDULES).format_help()


@pytest.mark.parametrize(
    "words, error",
    [
        ("--stepz 3", "unrecognized arguments: --stepz 3 (--help lists the flags)"),
        ("--kl-coef -0.5", "argument --kl-coef: expected a number at least 0, found '-0.5' (--hel"),
        (
            "--ppo-ratio 0:1:1",
            "argument --ppo-ratio: expected a number or start:end, found '0:1:1'",
        ),
        ("--beta 0", "argument --beta: expected a number above 0, found '0'"),
        ("--optimizer lion", "argument --optimizer: invalid choice: 'lion'"),
        ("--resume tests", "--resume tests: nothing to resume there; expected a run folder"),
    ],
)
def test_a_wrong_flag_is_answered_before_torch_is_loaded(words, error):
    status, out, err = answer(words)
    assert (status, out) == (2, "") and len(err.splitlines()) == 1
    assert err.startswith(f"error: {error}"), err


def test_under_torchrun_an_error_names_its_process():
    flags = "--save-every -1"
    wrong = "argument --save-every: expected a whole number at least 0, found '-1'"
    assert answer(flags, RANK="0")[2].startswith(f"error: {wrong}")
    assert answer(flags, RANK="3")[2].startswith(f"error in process 3: {wrong}")


def test_the_names_that_are_known_without_torch_are_those_of_the_tables():
    actions = {action.dest: action for action in make_parser()._actions}
    for flag, table in (("algorithm", ALGORITHMS), ("schedule", SCHEDULES)):
        assert actions[flag].metavar == f"{{{','.join(table)}}}"
    for flag, table in (("optimizer", OPTIMIZERS), ("scheduler", SCHEDULERS), ("amp", AMP_DTYPES)):
        assert tuple(actions[flag].choices) == tuple(table)
    assert tuple(DEFAULT_LR) == tuple(OPTIMIZERS)


@pytest.mark.parametrize("flag", ["algorithm", "schedule"])
def test_a_name_is_checked_where_its_table_is_known(flag):
    words = [f"--{flag}", "mine"]
    assert getattr(parse_args(words), flag) == "mine"
    with pytest.raises(
        UserError, match=rf"argument --{flag}: invalid choice: 'mine' \(choose from"
    ):
        parse_args(words, ALGORITHMS, SCHEDULES)
    tables = dict(algorithms={**ALGORITHMS}, schedules={**SCHEDULES})
    tables[f"{flag}s"]["mine"] = next(iter(tables[f"{flag}s"].values()))
    assert getattr(parse_args(words, **tables), flag) == "mine"
