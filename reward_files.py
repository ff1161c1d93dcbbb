"""Reward functions in files of yours, called as TRL's GRPO trainer calls them.

    def f(prompts, completions, **columns) -> list[float]       # None: no score for this row

Every column of the data arrives under its own name, beside `target` and `log_metric(name, value)`,
whose means are logged as `reward_metric/<name>`. A function may take fewer of them, or be async.
Texts are strings; as messages, lists of {role, content}, where the function has the attribute
`wants_messages = True` or the expression says `my.py:f(messages=True)`. A class is called without
arguments to make one; if it has `state_dict` and `load_state_dict`, checkpoints keep its state.
Left out on purpose: `completion_ids`, `trainer_state` and `log_extra` (rewards see text alone).

    python rewards.py "examples/my_rewards.py:politeness" examples/scored.jsonl
"""

import asyncio
import contextlib
import copy
import functools
import importlib.util
import inspect
import io
import os
import sys
import threading
import types
from collections.abc import Callable
from pathlib import Path

import torch

from cli import UserError, first_line

HERE = Path(__file__).resolve().parent
# What the user's own code may raise: anything, `sys.exit()` too. It is named, never hidden.
ANYTHING = (Exception, SystemExit)


class RewardFile:
    """A Python file, executed once. It may import the modules beside it, by `import helpers` or
    `from .helpers import x`; they never stand in for ours, nor ours for them, whatever their names.
    A helper that is called like another module which is loaded already, as json, is not found.
    """

    def __init__(self, file: str):
        self.path = Path(os.path.expanduser(file)).resolve()
        self._modules: dict[str, types.ModuleType] = {}  # those beside it, once imported
        package = types.ModuleType(f"reward_files_{id(self)}")
        package.__path__ = [str(self.path.parent)]
        sys.modules[package.__name__] = package
        name = f"{package.__name__}.{self.path.stem}"
        spec = importlib.util.spec_from_file_location(name, self.path)
        self.module = importlib.util.module_from_spec(spec)
        sys.modules[name] = self.module  # dataclasses look their module up there
        with self.imports():
            spec.loader.exec_module(self.module)

    @contextlib.contextmanager
    def imports(self):
        """While code of the file runs: `import` finds the modules beside it first, and what it
        changes of the process's settings is put back at the end."""
        folder = self.path.parent
        # What `import` may find there; what is beside a file in our own folder is ours.
        beside = set() if folder == HERE else {path.stem for path in folder.iterdir()}
        settings = os.getcwd(), torch.get_default_dtype(), torch.is_grad_enabled()
        ours = {name: sys.modules.pop(name) for name in beside & set(sys.modules) if is_ours(name)}
        before = set(sys.modules)
        sys.modules.update(self._modules)
        sys.path.insert(0, str(folder))
        # Python's cache takes a file of the same size and second for the same file, and one that
        # was mended would run as it was. Nor is anything written into a folder of the user.
        writes_no_bytecode, sys.dont_write_bytecode = sys.dont_write_bytecode, True
        try:
            yield
        finally:
            sys.dont_write_bytecode = writes_no_bytecode
            if str(folder) in sys.path:  # the file may have changed that too
                sys.path.remove(str(folder))
            new = [name for name in sys.modules if name not in before]
            new = [name for name in new if name.partition(".")[0] in beside]
            theirs = [name for name in new if _place_of(name).startswith(f"{folder}{os.sep}")]
            self._modules = {name: sys.modules.pop(name) for name in theirs}
            sys.modules.update(ours)
            os.chdir(settings[0])  # what the file changes here would change the whole run
            torch.set_default_dtype(settings[1])
            torch.set_grad_enabled(settings[2])


def is_ours(name: str) -> bool:
    return _place_of(name) == str(HERE / f"{name}.py")


def _place_of(name: str) -> str:
    """The file of a module that is imported; of a package without one, its folder."""
    spec = getattr(sys.modules[name], "__spec__", None)
    if spec is None:
        return ""
    return spec.origin or next(iter(spec.submodule_search_locations or [""]))


async def _outcome(coroutine) -> tuple:
    """(what it returns, None), or (None, what it raises): sys.exit() would end the loop's thread,
    and nobody would hear of it."""
    try:
        return await coroutine, None
    except ANYTHING as problem:
        return None, problem


class FileReward:
    """A function of a `RewardFile`, as a reward function f(prompts, completions, **columns)."""

    def __init__(self, source: RewardFile, function: Callable, name: str, wants_messages: bool):
        self.source, self.function, self.name = source, function, name
        self.wants_messages = wants_messages or getattr(function, "wants_messages", False)
        self.has_state = hasattr(function, "state_dict") and hasattr(function, "load_state_dict")
        self._logged: list[tuple[str, float]] = []  # by log_metric, since the last `take_logged`
        parameters = list(inspect.signature(function).parameters.values())
        kinds = inspect.Parameter
        by_name = (kinds.POSITIONAL_OR_KEYWORD, kinds.KEYWORD_ONLY)
        self._named = [p.name for p in parameters if p.kind in by_name]
        self._needed = [p.name for p in parameters if p.kind in by_name and p.default is p.empty]
        self._takes_all = any(p.kind == kinds.VAR_KEYWORD for p in parameters)
        # `self` of a method is taken; a column of that name cannot be handed over beside it.
        bound = function if inspect.isroutine(function) else type(function).__call__
        self._hidden = set(inspect.signature(getattr(bound, "__func__", bound)).parameters)
        self._hidden -= {p.name for p in parameters}

    def __call__(self, prompts: list, completions: list, /, **columns):
        """What the function returns; it gets copies, so nobody else sees what it changes."""
        given = copy.deepcopy({**columns, "prompts": prompts, "completions": completions})
        given["log_metric"] = self.log_metric
        missing = [name for name in self._needed if name not in given]
        if missing:
            raise UserError(
                f"reward '{self.name}' asks for '{missing[0]}', and the data have no such field "
                f"(they have {', '.join(columns) or 'none'}); a default, {missing[0]}=None, makes "
                "it optional"
            )
        if self._takes_all:
            given = {name: value for name, value in given.items() if name not in self._hidden}
        else:
            given = {name: value for name, value in given.items() if name in self._named}
        with self.source.imports():
            values = self.function(**given)
            if inspect.iscoroutine(values):
                outcome = asyncio.run_coroutine_threadsafe(_outcome(values), self._loop).result()
                if isinstance(outcome[1], BaseException):
                    raise outcome[1]
                values = outcome[0]
        return values

    @functools.cached_property
    def _loop(self) -> asyncio.AbstractEventLoop:
        """One for all calls, since a client of a server belongs to its loop; in a thread of its
        own, since a notebook has a loop that runs already."""
        loop = asyncio.new_event_loop()
        threading.Thread(target=loop.run_forever, daemon=True).start()
        return loop

    def log_metric(self, name: str, value: float) -> None:
        """For the function: log a number; the mean of all values of a call is kept."""
        self._logged.append((str(name), float(value)))

    def take_logged(self) -> list[tuple[str, float]]:
        """What was logged since the last time: (name, value)."""
        logged, self._logged = self._logged, []
        return logged

    def state_dict(self):
        """A copy of the state of a class that has one. Raises UserError."""
        with self._naming():
            return copy.deepcopy(self.function.state_dict())

    def check_state(self) -> None:
        """Raises UserError for a state that a checkpoint cannot hold. Not for every step: the whole
        state is written and read."""
        state, file = self.state_dict(), io.BytesIO()
        with self._naming():
            torch.save(state, file)
            file.seek(0)
            torch.load(file, weights_only=True)

    @contextlib.contextmanager
    def _naming(self):
        """Whatever goes wrong with the state is named: the user's code, copying, pickle."""
        try:
            yield
        except ANYTHING as problem:
            raise UserError(
                f"reward '{self.name}': its state_dict() is nothing that a checkpoint keeps "
                f"({type(problem).__name__}: {first_line(problem)}); "
                "expected numbers, texts, lists, dicts and tensors"
            ) from None

    def load_state_dict(self, state) -> None:
        self.function.load_state_dict(copy.deepcopy(state))


def load_function(
    file: str, name: str, loaded: dict[Path, RewardFile], wants_messages: bool = False
) -> FileReward:
    """The callable `name` of a Python file; an instance, where it is a class.

    `loaded` keeps the files that were executed already. Raises UserError.
    """
    path, source = Path(os.path.expanduser(file)).resolve(), f"--reward {file}:{name}"
    if not path.is_file():
        raise UserError(f"{source}: there is no file {file} (write spaces around a minus sign)")
    if path not in loaded:
        try:
            loaded[path] = RewardFile(file)
        except ANYTHING as problem:
            message = f"importing the file raised {type(problem).__name__}: {problem}"
            raise UserError(f"{source}: {message}") from problem
    function = getattr(loaded[path].module, name, None)
    if not callable(function):
        raise UserError(
            f"{source}: the file has no function of that name; "
            f"expected def {name}(prompts, completions, **columns) -> list[float]"
        )
    if isinstance(function, type):
        try:
            with loaded[path].imports():
                function = function()
        except ANYTHING as problem:
            message = f"{name}() raised {type(problem).__name__}: {problem}"
            raise UserError(f"{source}: {message}") from problem
        if not callable(function):
            raise UserError(f"{source}: the class has no __call__(self, completions, **columns)")
    try:
        return FileReward(loaded[path], function, name, wants_messages)
    except (ValueError, TypeError) as problem:  # such as max: Python does not know its parameters
        raise UserError(f"{source}: {problem}; expected a function written in Python") from None
