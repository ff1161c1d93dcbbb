"""What the code promises where it is read: the examples of docstrings, defaults of signatures."""

import doctest
import importlib
import inspect
import re

import pytest
from conftest import ROOT

import distill
import dpo
import generate
import grpo
import hybrid
import ppo
import sft
from data import split_examples
from flags import parse_args
from train import ALGORITHMS

SOURCES = {path.stem: path.read_text(encoding="utf-8") for path in sorted(ROOT.glob("*.py"))}
MODULES = [name for name, text in SOURCES.items() if re.search(r"^ +>>> ", text, re.MULTILINE)]


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_of_docstrings_are_true(name):
    results = doctest.testmod(importlib.import_module(name))
    assert results.attempted and not results.failed


# 2402.03300, section 4.2: "the KL coefficient is 0.04", "a single update" for each exploration.
PAPER = {"grpo": {"kl_coef": 0.04, "ppo_epochs": 1, "minibatches": 1}}
PAPER["distill"] = ALGORITHMS["distill"].defaults


@pytest.mark.parametrize("module", [distill, dpo, generate, grpo, hybrid, ppo, sft])
def test_a_function_called_by_hand_does_what_the_command_does(module):
    """A default in a signature is the default of the flag of that name."""
    flags = vars(parse_args([], ALGORITHMS)) | PAPER.get(module.__name__, {})
    functions = inspect.getmembers(module, inspect.isfunction)
    for _, kind in inspect.getmembers(module, inspect.isclass):
        functions += inspect.getmembers(kind, inspect.isfunction)
    defaults = [
        (name, key, parameter.default)
        for name, function in functions
        if function.__module__ == module.__name__
        for key, parameter in inspect.signature(function).parameters.items()
        if key in flags and parameter.default is not inspect.Parameter.empty
    ]
    assert any(default is not None for *_, default in defaults)
    for name, key, default in defaults:
        if default is not None:
            assert default == flags[key], f"{name}: {key}"


def test_what_no_flag_sets_is_off_unless_it_is_asked_for():
    for function in (dpo.dpo_loss, dpo.dpo_step):
        assert inspect.signature(function).parameters["label_smoothing"].default == 0
    assert inspect.signature(ppo.update_epochs).parameters["sft_weight"].default == 0
    assert inspect.signature(split_examples).parameters["holdout"].default == 0.1
