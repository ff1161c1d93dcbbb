"""The language of `--reward`: numbers, names of rewards, + - * and functions, in Python's syntax.

    0.7*rouge_l + 0.3*bleu - 0.1*length(target=40)   a reward may take arguments, which are literals
    clip(ema(sentiment), -3, 3)                      a post-processor takes any expression
    min(sentiment, 0.5 - toxicity)                   so do min, max, mixture and self_play
    my_rewards.py:politeness                         a function of a file of yours

This file knows no reward by name. `parse(text, names, context)` gets the rewards as a table
name -> (make, description); `make(context, **arguments)` returns the reward function
f(prompts, completions, **columns) -> list[float], one float per completion, higher is better.
Left out on purpose: division, powers, conditions, and everything else that Python can do. The
text is read with `ast` and is never evaluated as Python.

    python rewards.py "clip(ema(sentiment), -3, 3)" examples/scored.jsonl
"""

import ast
import difflib
import functools
import inspect
import itertools
import math
import operator
import os
import random
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import parallel
from data import Example, columns_of
from engine import NonFiniteReward, UserError
from leaves import COMPLETION_MESSAGES, call_leaf
from mixture import Mixture, RunningNorm, fit_to_pairs
from reward_files import FileReward, RewardFile, load_function
from self_play import SelfPlay

# ------------------------------------------------------------------ functions of expressions


def clip(low: float, high: float) -> Callable:
    check_numbers(low, high)
    if low > high:
        raise ValueError(f"expected finite numbers, the lower first, found {low!r} and {high!r}")
    return functools.partial(torch.clamp, min=float(low), max=float(high))


def scale(factor: float) -> Callable:
    check_numbers(factor)
    return functools.partial(operator.mul, float(factor))


def tanh() -> Callable:
    return torch.tanh


def whiten() -> Callable:
    return lambda x: RunningNorm()(x)  # a new one for every batch: only its own statistics


def check_numbers(*values: float) -> None:
    """Raises ValueError for a value that is no finite number."""
    for value in values:
        if type(value) not in (int, float) or not math.isfinite(value):
            raise ValueError(f"expected a finite number, found {value!r}")


def first(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.where(a.isnan(), b, a)


def fold(function: Callable, *operands: torch.Tensor) -> torch.Tensor:
    return functools.reduce(function, operands)


OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul}
SIGNS = {ast.UAdd: operator.pos, ast.USub: operator.neg}
# What folds several values into one, two at a time
FOLDS = {"min": torch.minimum, "max": torch.maximum, "first": first}
# name -> make(**literals) -> function of x (B,) -> (B,); only RunningNorm keeps statistics
POST_PROCESSORS = {"clip": clip, "scale": scale, "tanh": tanh, "whiten": whiten, "ema": RunningNorm}
DESCRIPTIONS = {
    "clip": "clip(x, low, high): no less than low, no more than high",
    "scale": "scale(x, factor): times factor",
    "tanh": "tanh(x): squashed into -1..1",
    "whiten": "whiten(x): minus the mean of the batch, over its standard deviation",
    "ema": "ema(x, decay=0.99): the same by running statistics, which checkpoints keep",
    "min": "min(a, b, ...): the smallest: a bound that no other reward can make up for",
    "max": "max(a, b, ...): the largest",
    "first": "first(a, b, ...): the first that has a score, for data of several tasks",
    "self_play": 'self_play(x, opponent="snapshot", every=50, shape="win"): the probability that x '
    "prefers our response to that of an earlier policy",
    "mixture": "mixture(a, b, ...): a weighted sum of the standardised a, b, ... with weights that "
    "are learned",
}

# ------------------------------------------------------------------ a parsed expression


@dataclass
class Node:
    """`function` of the values of its operands, for example a sum."""

    function: Callable
    operands: tuple["Node", ...] = ()

    def evaluate(self, values: dict, learn: bool) -> torch.Tensor:
        """`values` (B,) by leaf name; `learn` updates statistics. -> (B,), or () for a number."""
        return self.function(*[operand.evaluate(values, learn) for operand in self.operands])

    def walk(self) -> Iterator["Node"]:
        """This node and all below it; a node comes after its operands."""
        for operand in self.operands:
            yield from operand.walk()
        yield self

    def leaves(self) -> dict[str, Callable]:
        """The reward functions of this node and all below it, by the names that are logged."""
        return {node.name: node.function for node in self.walk() if isinstance(node, Leaf)}


@dataclass
class Leaf(Node):
    """A reward function. `Reward` calls it and gives its values to `evaluate`."""

    name: str = ""

    def evaluate(self, values: dict, learn: bool) -> torch.Tensor:
        return values[self.name]


class RunningNormNode(Node):
    def evaluate(self, values: dict, learn: bool) -> torch.Tensor:
        return self.function(self.operands[0].evaluate(values, learn), learn)


class MixtureNode(Node):
    def evaluate(self, values: dict, learn: bool) -> torch.Tensor:
        rewards = [operand.evaluate(values, learn) for operand in self.operands]
        return self.function(torch.broadcast_tensors(*rewards), learn)

    def scores(self, prompts: list[str], completions: list[str], columns: dict) -> torch.Tensor:
        """(N, K) raw values of the K rewards in the mixture; no statistics are updated."""
        values = {
            name: call_leaf(name, function, prompts, completions, columns)
            for name, function in self.leaves().items()
        }
        zeros = torch.zeros(len(completions))  # (N,) turns a single number into N values
        return torch.stack([x.evaluate(values, False) + zeros for x in self.operands], dim=1)


@dataclass
class SelfPlayNode(Node):
    key: str = ""  # where `Reward` puts the leaves' values of the opponent's responses

    def evaluate(self, values: dict, learn: bool) -> torch.Tensor:
        (base,) = self.operands
        return self.function(base.evaluate(values, learn), base.evaluate(values[self.key], False))


Stateful = RunningNorm | Mixture | SelfPlay | FileReward  # what checkpoints keep the state of


class Reward:
    """A parsed expression. A call gives a (B,) float32 tensor, NaN where a judge gave no score.

    After a call `parts` holds the raw values of every leaf. A call also updates the statistics of
    `ema` and `mixture`, but not inside `with reward.frozen():`, which is for measuring.
    """

    def __init__(self, tree: Node, stateful: dict[str, Stateful]):
        self._tree, self._leaves, self._stateful = tree, tree.leaves(), stateful
        self._learn = True
        self.parts: dict[str, torch.Tensor] = {}
        self._logged: dict[str, list[float]] = {}  # by log_metric of functions, in the last call
        self.total = torch.zeros(0)  # (B,) what the last call returned

    def __call__(self, prompts: list[str], completions: list[str], /, **columns) -> torch.Tensor:
        """One float per completion.

        Raises UserError, naming reward and text, where a leaf raises or does not return one finite
        number per completion.
        """
        of_opponent = {}
        for key, play in self._all(SelfPlay).items():
            answers = play.answers(prompts, self._learn)
            # The messages of the completions are ours; the opponent has said something else.
            others = {name: v for name, v in columns.items() if name != COMPLETION_MESSAGES}
            of_opponent[key] = self._ask_leaves(prompts, answers, others)
        self.parts = self._ask_leaves(prompts, completions, columns)
        total = self._tree.evaluate(self.parts | of_opponent, self._learn)
        self.total = total + torch.zeros(len(completions))  # (B,) also for a single number
        if torch.isinf(self.total).any():
            raise NonFiniteReward(f"the reward is too large for a float32: {self.total.tolist()}")
        return self.total

    def try_on(self, examples: list[Example]) -> None:
        """Ask about the targets of two examples, to find mistakes before training. Raises UserError
        as a call does, and where the reward needs a target and none of the examples has one."""
        probe = examples[:2]
        columns = columns_of(probe)
        if not any(columns_of(examples)["target"]):
            del columns["target"]
        with self.frozen():
            total = self([e.prompt for e in probe], [e.target for e in probe], **columns)
            if total.isnan().all():
                parallel.note("the reward has no score for the targets that it was tried on")
            self.check_state()

    def _ask_leaves(
        self, prompts: list[str], completions: list[str], columns: dict[str, list]
    ) -> dict[str, torch.Tensor]:
        """The raw values (B,) of every leaf. Each process scores its share of the texts. An error
        of one process is raised on all."""
        my_prompts, my_completions = parallel.share(prompts), parallel.share(completions)
        my_columns = {name: parallel.share(values) for name, values in columns.items()}
        my_values: dict[str, list[float]] = {name: [] for name in self._leaves}
        of_files = [f for f in self._leaves.values() if isinstance(f, FileReward)]
        problem, logged = None, []
        try:
            if my_completions:
                for name, function in self._leaves.items():
                    values = call_leaf(name, function, my_prompts, my_completions, my_columns)
                    my_values[name] = values.tolist()
            logged = [function.take_logged() for function in of_files]
        except UserError as raised:
            problem = raised
        self._logged = {}
        for raised, of_process in parallel.everybody((problem, logged)):
            if raised is not None:
                raise raised
            for name, value in itertools.chain.from_iterable(of_process):
                self._logged.setdefault(name, []).append(value)
        return {name: torch.tensor(parallel.gather(values)) for name, values in my_values.items()}

    def _all(self, kind: type) -> dict:
        stateful = self._stateful.items()
        return {key: function for key, function in stateful if isinstance(function, kind)}

    @property
    def opponent(self) -> SelfPlay | None:
        """The `self_play` of the expression, if it has one."""
        return next(iter(self._all(SelfPlay).values()), None)

    @contextmanager
    def frozen(self):
        """For measuring: no statistics are updated, and random states and those of a user's classes
        are restored at the end."""
        states = random.getstate(), np.random.get_state(), torch.get_rng_state()
        of_files = {key: f.state_dict() for key, f in self._all(FileReward).items()}
        self._learn = False
        try:
            yield
        finally:
            self._learn = True
            for key, state in of_files.items():
                self._stateful[key].load_state_dict(state)
            random.setstate(states[0])
            np.random.set_state(states[1])
            torch.set_rng_state(states[2])

    def metrics(self) -> dict[str, float]:
        """Of the last call: `reward/<leaf>`, the mean of its raw values, `reward_metric/<name>`,
        what its functions logged, `reward_weight/<name>` of a mixture, `self_play/win_rate`."""
        metrics = {f"reward/{name}": float(values.nanmean()) for name, values in self.parts.items()}
        for name, values in self._logged.items():
            metrics[f"reward_metric/{name}"] = sum(values) / len(values)
        for mixture in self._all(Mixture).values():
            for name, weight in zip(mixture.names, mixture.weights()):
                metrics[f"reward_weight/{name}"] = float(weight)
        if self.opponent is not None:
            metrics["self_play/win_rate"] = self.opponent.win_rate
        return metrics

    def state_dict(self) -> dict[str, dict]:
        return {key: function.state_dict() for key, function in self._stateful.items()}

    def check_state(self) -> None:
        """Raises UserError where a class of the user's has a state that no checkpoint can hold."""
        for function in self._all(FileReward).values():
            function.check_state()

    def load_state_dict(self, state: dict[str, dict]) -> None:
        for key, function in self._stateful.items():
            if key in state:  # a class of the user's may have got a state since
                function.load_state_dict(state[key])


# ------------------------------------------------------------------ the parser


def parse(text: str, names: dict[str, tuple[Callable, str]], context: dict) -> Reward:
    """The expression `text` over the rewards `names`; `context` is what their makers receive.

    Preference pairs in `context["mixture_pairs"]` fit the weights of every `mixture`. Raises
    UserError that quotes what it cannot read and lists the known names.
    """
    parser = _Parser(text, names, context)
    tree = parser.tree()
    if "mixture_pairs" in context:
        fit_mixtures(text, tree, context["mixture_pairs"])
    return Reward(tree, parser.stateful)


def fit_mixtures(text: str, tree: Node, pairs: list) -> None:
    """Fit every mixture of the expression `text` to preference pairs. Raises UserError."""
    mixtures = [node for node in tree.walk() if isinstance(node, MixtureNode)]  # inner ones first
    if not mixtures:
        raise UserError(
            f"--mixture-data fits the weights of a mixture(...), and --reward {text!r} has none"
        )
    for mixture in mixtures:
        if any(isinstance(node, SelfPlayNode) for node in mixture.walk()):
            raise UserError(
                f"--reward {text!r}: preference pairs have no opponent, "
                "so --mixture-data does not go with self_play"
            )
        fit_to_pairs(mixture.function, pairs, mixture.scores)


def files_and_texts(text: str) -> tuple[list[str], list[str]]:
    """The files whose code an expression runs, and its texts in quotes, which may name files and
    folders. Nothing is loaded. Raises UserError for a text that is no expression.

    >>> files_and_texts("'my dir/a.py:f' + 0.5*sentiment(lexicon='words.txt')")
    (['my dir/a.py'], ['words.txt'])
    """
    parser = _Parser(text, {}, {})
    nodes = ast.walk(parser.syntax())
    texts = [node.value for node in nodes if isinstance(node, ast.Constant)]
    files = [file for file, _ in parser.files.values()]
    return files, [text for text in texts if isinstance(text, str)]


# FILE.py:function. A path with spaces stands in quotes or begins with a drive, as in C:/my files/
FILE_FUNCTION = re.compile(
    r"""
      "([^"]+\.py):(\w+)"
    | '([^']+\.py):(\w+)'
    | (?<![\w./\\~:"'-]) ([A-Za-z]:[\\/][^:*?"<>|]*?\.py):(\w+)
    | (?<![\w./\\~"'-]) ([\w./\\~-]+\.py):(\w+)
    """,
    re.VERBOSE,
)
WINDOWS_STRING = re.compile(r"""(["'])([A-Za-z]:\\[^"']*)\1""")  # lexicon="C:\new.txt", and so on


class _Parser:
    """Python's syntax tree -> a tree of `Node`s; `build` has a small method for each kind."""

    def __init__(self, expression: str, names: dict[str, tuple[Callable, str]], context: dict):
        self.expression, self.names, self.context = expression, names, context
        self.files: dict[str, tuple[str, str]] = {}  # placeholder -> (file, function)
        self.sources: dict[str, str] = {}  # leaf -> file, to find two functions of one name
        self.loaded: dict[Path, RewardFile] = {}  # the files that were executed
        self.functions: dict[tuple[str, str, bool], FileReward] = {}  # (file, name, messages) -> it
        self.stateful: dict[str, Stateful] = {}

    def tree(self) -> Node:
        try:
            tree = self.build(self.syntax())
        except (RecursionError, OverflowError) as problem:  # too deep, or too large a number
            raise self.no_expression(problem) from None
        if not tree.leaves():
            raise self.error(f"numbers alone are no reward; {self.known()}")
        return tree

    def syntax(self) -> ast.expr:
        """Python's tree of the text. Nothing is looked up, loaded or called yet."""
        # A path is no Python expression: a placeholder replaces it until `restore`.
        source = FILE_FUNCTION.sub(self.placeholder, self.without_files(self.expression.strip()))
        # Python would read the \n of C:\new.txt as the end of a line.
        source = WINDOWS_STRING.sub(lambda match: match[0].replace("\\", r"\\"), source)
        try:
            return ast.parse(source, mode="eval").body
        except (SyntaxError, ValueError, RecursionError, MemoryError, OverflowError) as problem:
            raise self.no_expression(problem) from None

    def without_files(self, text: str) -> str:
        """The text with a placeholder for each file that exists, whatever is in its name: of all
        that could be its path, the longest. Quotes around it go too."""
        source, begin = "", 0  # what is done, and where the rest begins
        for match in re.finditer(r"\.py:(\w+)", text):
            for start in range(begin, match.start()):
                file = text[start : match.start() + len(".py")]
                if os.path.isfile(os.path.expanduser(file)):
                    before, end = text[begin:start], match.end()
                    if before[-1:] in ("'", '"') and text[end : end + 1] == before[-1:]:
                        before, end = before[:-1], end + 1
                    source, begin = source + before + self.keep(file, match[1]), end
                    break
        return source + text[begin:]

    def no_expression(self, problem: BaseException) -> UserError:
        reason = getattr(problem, "msg", problem)
        message = f"--reward {self.expression[:200]!r} is not an expression: {reason}"
        return UserError(f"{message}; {self.known()}")

    def build(self, node: ast.expr) -> Node:
        if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
            operands = self.build(node.left), self.build(node.right)
            return Node(OPERATORS[type(node.op)], operands)
        if isinstance(node, ast.UnaryOp) and type(node.op) in SIGNS:
            return Node(SIGNS[type(node.op)], (self.build(node.operand),))
        if isinstance(node, ast.Constant):
            return self.number(node)
        if isinstance(node, ast.Name):
            return self.name(node)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            return self.call(node, node.func.id)
        raise self.unreadable(node)

    def number(self, node: ast.Constant) -> Node:
        if type(node.value) not in (int, float) or not math.isfinite(node.value):
            raise self.unreadable(node)
        return Node(functools.partial(torch.tensor, float(node.value)))

    def name(self, node: ast.Name) -> Node:
        if node.id in self.files:
            return self.file_function(node.id)
        if node.id in self.names:
            return self.reward(node, node.id)
        raise self.unreadable(node)

    def file_function(self, placeholder: str, messages: bool = False) -> Leaf:
        file, name = self.files[placeholder]
        path = os.path.realpath(os.path.expanduser(file))
        key = path, name, messages
        shown = f"{name}(messages=True)" if messages else name
        if key not in self.functions:
            self.functions[key] = load_function(file, name, self.loaded, messages)
            if self.functions[key].has_state:
                self.remember(shown, self.functions[key])
        return self.leaf(shown, self.functions[key], source=path)

    def call(self, node: ast.Call, name: str) -> Node:
        if name in self.files:
            arguments = {k.arg: getattr(k.value, "value", None) for k in node.keywords}
            wants_messages = arguments.get("messages")
            if node.args or len(arguments) != 1 or not isinstance(wants_messages, bool):
                raise self.error(
                    f"cannot read {self.text(node)!r}; a function of a file takes no arguments "
                    "here but messages=True, for texts as messages"
                )
            return self.file_function(name, wants_messages)
        if name in self.names:
            return self.reward(node, name)
        if name in POST_PROCESSORS and node.args:
            return self.post_processor(node, name)
        if name in FOLDS and len(node.args) > 1 and not node.keywords:
            return Node(functools.partial(fold, FOLDS[name]), self.operands(node))
        if name == "self_play" and node.args:
            return self.self_play(node)
        if name == "mixture":
            return self.mixture(node)
        raise self.unreadable(node)

    def operands(self, node: ast.Call) -> tuple[Node, ...]:
        return tuple(self.build(argument) for argument in node.args)

    def reward(self, node: ast.Name | ast.Call, name: str) -> Leaf:
        make, _ = self.names[name]
        return self.leaf(self.text(node), self.construct(node, make, self.context))

    def leaf(self, name: str, function: Callable, source: str = "") -> Leaf:
        if self.sources.setdefault(name, source) != source:
            raise self.error(f"two different rewards are called {name!r}; rename one")
        return Leaf(function, name=name)

    def post_processor(self, node: ast.Call, name: str) -> Node:
        operand = self.build(node.args[0])
        process = self.construct(node, POST_PROCESSORS[name], skip=1)
        if not isinstance(process, RunningNorm):
            return Node(process, (operand,))
        self.remember(self.text(node), process)
        return RunningNormNode(process, (operand,))

    def self_play(self, node: ast.Call) -> Node:
        base = self.build(node.args[0])
        if any(isinstance(function, SelfPlay) for function in self.stateful.values()):
            raise self.error("expected at most one self_play, found two")
        inner = [below.func.id for below in ast.walk(node.args[0]) if isinstance(below, ast.Call)]
        if "whiten" in inner:
            raise self.error(
                "self_play compares two scores, and whiten standardises those of each side apart, "
                "so that neither could win; write whiten(self_play(...)), or ema inside"
            )
        play = self.construct(node, SelfPlay, self.context, skip=1)
        return SelfPlayNode(play, (base,), self.remember(self.text(node), play))

    def mixture(self, node: ast.Call) -> Node:
        operands = self.operands(node)
        names = [self.text(argument) for argument in node.args]
        mixture = self.construct(node, Mixture, names, skip=len(names))
        self.remember(self.text(node), mixture)
        return MixtureNode(mixture, operands)

    def construct(self, node: ast.Name | ast.Call, make: Callable, *first, skip: int = 0):
        """make(*first, the literals of the call but the first `skip`).

        Raises UserError for arguments that are no literals, or that `make` does not take.
        """
        positional, named = [], []
        if isinstance(node, ast.Call):
            positional, named = node.args[skip:], node.keywords
        try:
            arguments = [*first, *(self.literal(argument) for argument in positional)]
            keywords = {keyword.arg: self.literal(keyword.value) for keyword in named}
            inspect.signature(make).bind(*arguments, **keywords)
            return make(*arguments, **keywords)
        except UserError:
            raise
        except (ValueError, TypeError, AttributeError) as problem:
            raise self.error(f"cannot read {self.text(node)!r}: {problem}") from None

    def remember(self, key: str, function: Stateful) -> str:
        """Keep a function that has a state. -> its key in checkpoints."""
        if key in self.stateful:
            key = f"{key} #{len(self.stateful)}"
        self.stateful[key] = function
        return key

    def literal(self, node: ast.expr):
        if isinstance(node, ast.Name) and node.id in self.files:  # a text that is a path
            return self.restore(node.id)
        try:
            value = ast.literal_eval(node)
        except ValueError:
            what = f"{self.text(node)!r} is no number, no text and no list of them"
            raise ValueError(what) from None
        return self.restore(value) if isinstance(value, str) else value

    def text(self, node: ast.expr) -> str:
        """The node as the user wrote it, except for spaces and quotes."""
        return self.restore(ast.unparse(node).replace("'", '"'))

    def placeholder(self, match: re.Match) -> str:
        return self.keep(*[group for group in match.groups() if group is not None])

    def keep(self, file: str, function: str) -> str:
        """-> the placeholder of a file's function."""
        name = f"_file{len(self.files)}_"
        self.files[name] = file, function
        return name

    def restore(self, text: str) -> str:
        """Put `file.py:function` back where a placeholder stands for it."""
        for placeholder, (file, function) in self.files.items():
            text = text.replace(placeholder, f"{file}:{function}")
        return text

    def error(self, message: str) -> UserError:
        return UserError(f"--reward {self.expression!r}: {message}")

    def unreadable(self, node: ast.expr) -> UserError:
        similar = difflib.get_close_matches(self.text(node), [*self.names, *DESCRIPTIONS], n=1)
        hint = f"; did you mean {similar[0]}?" if similar else ""
        return self.error(f"cannot read {self.text(node)!r}; {self.known()}{hint}")

    def known(self) -> str:
        return f"known are {', '.join([*self.names, *DESCRIPTIONS])}, and file.py:function"
