"""Do the tests notice? One small change of the code at a time, and the nearest tests run on it.

A mutant is a file with one change: an operator, a comparison, a number, a True, the bound of a
slice, a min or a max, or a keyword argument that is left out. The rest of its text stays. It is
noticed when a test fails, or runs into the time limit. A survivor is code whose numbers no test
looks at, or the change means the same (a tolerance, a device, a speed).
Left out on purpose: f-strings and `raise` (messages), `if __name__`; a list of known survivors.

    OMP_NUM_THREADS=1 python tests/mutate.py --n 40 --seed 1 --files ppo.py grpo.py
"""

import argparse
import ast
import gc
import importlib
import itertools
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
MERGING = "test_runs.py::test_merging_is_the_average_and_tied_weights_stay_tied"
MERGE_COMMAND = "test_runs.py::test_the_merge_command"
DEVICES = "test_machines.py::test_no_tensor_is_made_where_the_model_is_not"
MIXING = "test_schedules.py::test_mixed_gradient_is_the_weighted_sum_of_the_two"
# The tests of each file, pure functions first: most mutants die within a second. None of them looks
# at the text of the code: a mutant is noticed by what it does.
NEAREST = {
    "ppo.py": [
        "test_ppo_math.py",
        "test_docstrings.py",
        MIXING,
        DEVICES,
        "test_steps.py",
        "test_dialogue.py",
    ],
    "grpo.py": ["test_dpo.py", "test_docstrings.py", DEVICES],
    "distill.py": ["test_distill.py", "test_docstrings.py", DEVICES],
    "dpo.py": ["test_dpo.py", "test_docstrings.py", DEVICES],
    "sft.py": ["test_docstrings.py", DEVICES, "test_steps.py", "test_model.py"],
    "generate.py": ["test_generate.py", "test_docstrings.py", DEVICES],
    "hybrid.py": [
        "test_docstrings.py",
        "test_model.py",
        MERGING,
        MERGE_COMMAND,
        DEVICES,
        "test_generate.py",
    ],
    "data.py": ["test_data.py", "test_docstrings.py", "test_survey.py", "test_chat.py"],
}
# What most tests load, loaded once: each mutant is tested in a fork of this process, which loads
# the files of the repository itself.
PRELOAD = ["datasets", "numpy.testing", "torch", "transformers.integrations.mistral"]
PRELOAD += [f"transformers.models.{name}.modeling_{name}" for name in ("gpt2", "llama")]
SWAPS = {}  # class of the operator -> how it is written, what it becomes
for line in """Add:+:-, Sub:-:+, Mult:*:/, Div:/:*, FloorDiv://:/, Pow:**:*, BitAnd:&:|, Or:or:and,
    And:and:or, Lt:<:<=:>, LtE:<=:<:>=, Gt:>:>=:<, GtE:>=:>:<=, Eq:==:!=, NotEq:!=:==,
    Is:is:is not, IsNot:is not:is, In:in:not in, NotIn:not in:in""".split(","):
    kind, *written = line.strip().split(":")
    SWAPS[getattr(ast, kind)] = written
OTHER_NAME = {"min": "max", "amin": "amax", "minimum": "maximum", "any": "all"}
OTHER_NAME |= {new: old for old, new in OTHER_NAME.items()}


class Mutant(NamedTuple):
    file: str
    begin: int  # the bytes begin..end of the file become `text`
    end: int
    text: str

    def source(self) -> str:
        old = (ROOT / self.file).read_bytes()
        return (old[: self.begin] + self.text.encode() + old[self.end :]).decode()

    def change(self) -> tuple[int, str, str]:
        """-> the number of the first line that differs; this line before and after."""
        old, new = (ROOT / self.file).read_text("utf-8").splitlines(), self.source().splitlines()
        pairs = enumerate(zip(old, new), start=1)
        return next((n, a.strip(), b.strip()) for n, (a, b) in pairs if a != b)


class Finder(ast.NodeVisitor):
    """All mutants of a file, in `found`."""

    def __init__(self, file: str):
        self.file, self.source, self.found = file, (ROOT / file).read_bytes(), []
        lengths = [len(row) for row in self.source.splitlines(keepends=True)]
        self.starts = [0, *itertools.accumulate(lengths)]
        self.visit(ast.parse(self.source))

    def place(self, node: ast.AST) -> tuple[int, int]:
        """The bytes at which a node begins and ends."""
        begin = self.starts[node.lineno - 1] + node.col_offset
        return begin, self.starts[node.end_lineno - 1] + node.end_col_offset

    def add(self, begin: int, end: int, text: str) -> None:
        self.found.append(Mutant(self.file, begin, end, text))

    def visit(self, node: ast.AST) -> None:
        is_command = isinstance(node, ast.If) and ast.unparse(node.test).startswith("__name__")
        if is_command or isinstance(node, (ast.JoinedStr, ast.Raise)):
            return
        if isinstance(node, (ast.BinOp, ast.AugAssign, ast.BoolOp, ast.Compare)):
            self.operators(node)
        elif isinstance(node, ast.UnaryOp):
            begin = self.place(node)[0]
            self.add(begin, begin + (3 if isinstance(node.op, ast.Not) else 1), "")
        elif isinstance(node, ast.Constant) and isinstance(node.value, (bool, int, float)):
            x = node.value
            other = x * 1.5 if isinstance(x, float) and x else x + 1
            self.add(*self.place(node), repr(not x if isinstance(x, bool) else other))
        elif isinstance(node, ast.Slice):
            for bound in filter(None, (node.lower, node.upper)):
                begin, end = self.place(bound)
                self.add(begin, end, "")
                self.add(end, end, " + 1")
        elif isinstance(node, ast.Call):
            self.call(node)
        self.generic_visit(node)

    def operators(self, node: ast.AST) -> None:
        """An operator has no position of its own: it stands between two operands."""
        if isinstance(node, ast.BoolOp):
            operands, ops = node.values, [node.op] * (len(node.values) - 1)
        elif isinstance(node, ast.Compare):
            operands, ops = [node.left, *node.comparators], node.ops
        else:
            left, right = [v for _, v in ast.iter_fields(node) if isinstance(v, ast.expr)]
            operands, ops = [left, right], [node.op]
        for op, (left, right) in zip(ops, itertools.pairwise(operands)):
            old, *others = SWAPS.get(type(op), [""])
            begin = self.source.find(old.encode(), self.place(left)[1], self.place(right)[0])
            for new in others:
                self.add(begin, begin + len(old), new)

    def call(self, node: ast.Call) -> None:
        """min or max, as a function or as a keyword; a keyword argument that is left out."""
        name = getattr(node.func, "attr", getattr(node.func, "id", ""))
        end = self.place(node.func)[1]
        if name in OTHER_NAME:
            self.add(end - len(name), end, OTHER_NAME[name])
        given = sorted([node.func, *node.args, *node.keywords], key=self.place)
        for before, argument in itertools.pairwise(given):
            if isinstance(argument, ast.keyword) and argument.arg not in (None, "help"):
                begin, end = self.place(argument)
                if argument.arg in OTHER_NAME:
                    self.add(begin, begin + len(argument.arg), OTHER_NAME[argument.arg])
                is_first = before is node.func  # else ", " stands before it and goes too
                self.add(begin if is_first else self.place(before)[1], end, "")


def draw(files: list[str], n: int, seed: int) -> list[Mutant]:
    """n mutants whose syntax tree exists and differs from the code's."""
    mutants = [mutant for file in files for mutant in Finder(file).found]
    trees = {file: ast.dump(ast.parse((ROOT / file).read_bytes())) for file in files}
    random.Random(seed).shuffle(mutants)
    drawn = []
    for mutant in mutants:
        try:
            tree = ast.dump(ast.parse(mutant.source()))
        except SyntaxError:
            continue
        if len(drawn) < n and tree != trees[mutant.file]:
            drawn.append(mutant)
    return drawn


def run_tests(tree: Path, names: list[str], seconds: int = 0) -> int:
    """The exit code of pytest in a fork of this process; negative when the time was up."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    code = 1
    try:
        signal.alarm(seconds)  # 0: never
        os.chdir(tree)
        for stream in (1, 2):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
        tests = [f"tests/{name}" for name in names]
        code = int(pytest.main([*tests, "-m", "not slow", "-x", "-q", "-p", "no:cacheprovider"]))
    finally:
        os._exit(code)


def survives(job: tuple[Path, Mutant, int]) -> bool:
    """Test a mutant in a copy of folder/code that belongs to this process."""
    folder, mutant, seconds = job
    sys.dont_write_bytecode = True  # a file changes more often than its time stamp
    tree = folder / str(os.getpid())
    if not tree.exists():
        shutil.copytree(folder / "code", tree)
    path = tree / mutant.file
    original = path.read_bytes()
    path.write_text(mutant.source(), encoding="utf-8")
    code = run_tests(tree, NEAREST[mutant.file], seconds)
    path.write_bytes(original)
    return code == 0


def time_limits(tree: Path, files: set[str]) -> dict[str, int]:
    """The seconds that the tests of each file may take. Stops where they fail without a change."""
    taken = {}
    for name in sorted({name for file in files for name in NEAREST[file]}):
        started = time.monotonic()
        if run_tests(tree, [name]) != 0:
            sys.exit(f"tests/{name} fails without a change")
        taken[name] = time.monotonic() - started
    return {file: 20 + 3 * int(sum(taken[name] for name in NEAREST[file])) for file in files}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n", type=int, default=40, help="how many mutants")
    parser.add_argument("--seed", type=int, default=0, help="which ones")
    parser.add_argument("--files", nargs="+", choices=NEAREST, default=list(NEAREST))
    parser.add_argument("--jobs", type=int, default=1, help="mutants that are tested at a time")
    args = parser.parse_args()
    mutants = draw(args.files, args.n, args.seed)
    for name in PRELOAD:
        importlib.import_module(name)
    sys.path.pop(0)  # this folder; the tests are those of the copy
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # other plugins only cost time
    gc.freeze()  # a fork that collects garbage would copy all of torch's objects
    noticed, drawn = Counter(), Counter(mutant.file for mutant in mutants)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        without = shutil.ignore_patterns(".*", "out*", "__pycache__")
        shutil.copytree(ROOT, folder / "code", ignore=without)
        limits = time_limits(folder / "code", set(drawn))
        jobs = [(folder, mutant, limits[mutant.file]) for mutant in mutants]
        with multiprocessing.get_context("fork").Pool(args.jobs) as pool:
            for mutant, survived in zip(mutants, pool.imap(survives, jobs)):
                noticed[mutant.file] += not survived
                if survived:
                    line, before, after = mutant.change()
                    print(f"{mutant.file}:{line}\n  - {before}\n  + {after}", flush=True)
    for file, n in sorted(drawn.items()):
        print(f"{file}: {noticed[file]} of {n} noticed")


if __name__ == "__main__":
    main()
