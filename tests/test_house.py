"""The house stays small: budgets of lines, imports that point one way, code that a reader follows.

`ruff` checks the format; what it cannot know is checked here.
"""

import ast
import re

import pytest
from conftest import ROOT

# Lines at 100 columns, comments included. A reader feels them: meet them by better structure.
LESSON = {
    "train.py": 190,
    "data.py": 340,
    "hybrid.py": 310,
    "sft.py": 65,
    "ppo.py": 460,
    "rewards.py": 440,
    "generate.py": 130,
}
FILES = {path.name: path.read_text(encoding="utf-8") for path in sorted(ROOT.glob("*.py"))}
TREES = {name: ast.parse(text) for name, text in FILES.items()}
FUNCTIONS = [
    (name, node)
    for name, tree in TREES.items()
    for node in ast.walk(tree)
    if isinstance(node, ast.FunctionDef)
]
BLOCKS = (ast.If, ast.For, ast.While, ast.With, ast.Try)


@pytest.mark.parametrize("name, most", LESSON.items())
def test_the_lesson_keeps_its_budget(name, most):
    assert len(FILES[name].splitlines()) <= most


def test_no_line_is_too_wide():
    for name, text in FILES.items():
        limit = 120 if name == "flags.py" else 100
        wide = [n for n, line in enumerate(text.splitlines(), start=1) if len(line) > limit]
        assert not wide, f"{name}: lines {wide}"


def test_no_function_is_too_long():
    for name, node in FUNCTIONS:
        most = 70 if name in LESSON else 90
        lines = node.end_lineno - node.lineno + 1
        assert lines <= most, f"{name}: {node.name} has {lines} lines"


def depth(node: ast.AST) -> int:
    """How deep blocks stand in each other below `node`; `elif` is not one level more."""
    deepest = 0
    for child in ast.iter_child_nodes(node):
        below = depth(child)
        is_elif = isinstance(node, ast.If) and [child] == node.orelse and isinstance(child, ast.If)
        if isinstance(child, BLOCKS) and not is_elif:
            below += 1
        deepest = max(deepest, below)
    return deepest


def test_no_function_nests_deeper_than_four_blocks():
    for name, node in FUNCTIONS:
        assert depth(node) <= 4, f"{name}: {node.name}"


def test_no_clever_line():
    for name, tree in TREES.items():
        for node in ast.walk(tree):
            where = f"{name}:{getattr(node, 'lineno', 0)}"
            assert not isinstance(node, ast.NamedExpr), f"{where}: an assignment in an expression"
            if isinstance(node, ast.Lambda):
                inner = [below for below in ast.walk(node.body) if isinstance(below, ast.Lambda)]
                assert not inner, f"{where}: a lambda in a lambda"
            if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
                truth = (ast.Compare, ast.BoolOp)
                sides = node.left, node.right
                is_text = any(isinstance(getattr(side, "value", 0), str) for side in sides)
                assert not (is_text and any(isinstance(side, truth) for side in sides)), where
            if isinstance(node, ast.comprehension) and isinstance(node.iter, ast.List):
                assert len(node.iter.elts) != 1, f"{where}: an assignment in a comprehension"


@pytest.mark.parametrize(
    "protocol, home",
    [("_max", "engine.py"), ("/grad_norm", "runs.py"), ("/skipped_steps", "runs.py")],
)
def test_what_the_name_of_a_metric_means_is_said_in_one_file(protocol, home):
    users = [name for name, text in FILES.items() if f'endswith("{protocol}")' in text]
    assert users == [home]


def imports_of(name: str) -> set[str]:
    """The files of this repository that a file imports, wherever in it."""
    modules = set()
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            modules.add(node.module)
    return {f"{module}.py" for module in modules} & set(FILES)


def test_imports_point_one_way():
    left = {name: imports_of(name) for name in FILES}
    while left:
        ready = [name for name, imports in left.items() if not imports & set(left)]
        assert ready, f"these files import each other in a circle: {sorted(left)}"
        for name in ready:
            del left[name]
    users = [name for name in FILES if "train.py" in imports_of(name)]
    assert users == ["compare.py"], (
        "it runs train.py and reads its flags; nobody else imports train"
    )


def test_an_extension_is_named_in_few_places():
    """Whoever deletes one of them deletes an import and an entry in train.py, and its flags in
    flags.py."""
    for name in ("dpo", "grpo", "distill"):
        users = {file for file in FILES if f"{name}.py" in imports_of(file)}
        assert users == {"train.py"}
    entries = re.findall(r'^    "(\w+)": \S*A\w+[(,]', FILES["train.py"], re.MULTILINE)
    assert entries == ["ppo", "grpo", "dpo", "distill"]
