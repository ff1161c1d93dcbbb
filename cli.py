"""The command line of every script: its flags, and a mistake of the user as one line.

Nothing here needs torch, so a script can answer --help and a wrong flag before torch is loaded,
which takes seconds (`answer_early` in flags.py). Left out on purpose: subcommands, colours.

    python train.py --stepz 3
"""

import argparse
import io
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path


class UserError(ValueError):
    """A mistake that the user can repair. Scripts print one line, `error: ...`, and exit with 2."""


class LostProcess(Exception):
    """Another process of this run has ended, or cannot be reached: printed like a UserError."""


class LostUpdates(UserError):
    """Too many steps in a row without an update."""


class NonFiniteReward(UserError):
    """A score that is not a finite number: an error before the first step, later one lost step."""


def first_line(problem: BaseException) -> str:
    """The first line of an exception's message; the name of its class if the message is empty."""
    lines = str(problem).strip().splitlines() or [type(problem).__name__]
    return lines[0].rstrip(".: ")


def visible(text: str) -> str:
    """The text with every character that does not print (line breaks too) as its escape.

    >>> visible("a\\tb\\x1b[2J")
    'a\\\\tb\\\\x1b[2J'
    """
    printable = []
    for char in text:
        printable.append(char if char.isprintable() else char.encode("unicode_escape").decode())
    return "".join(printable)


def listed(names) -> str:
    """`24 weights (a, b, c, ...)`."""
    first = [*sorted(names)[:3], *(["..."] if len(names) > 3 else [])]
    return f"{len(names)} weight{'s' if len(names) > 1 else ''} ({', '.join(first)})"


def check_new_folder(out: str) -> None:
    """Raises UserError unless `out` can be made: no long computation may fail when it is saved."""
    path = Path(out)
    if path.exists():
        raise UserError(f"--out {out} already exists; choose another folder")
    if not path.absolute().parent.is_dir():
        raise UserError(f"--out {out}: there is no folder {path.absolute().parent} to put it in")


def one_line_errors(main: Callable):
    """`main`, but a UserError becomes one line on stderr, `error: ...`, and exit status 2; so does
    a LostProcess."""

    def run(argv: list[str] | None = None):
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="replace")  # a console may lack a character of a response
        try:
            return main(argv)
        except (UserError, LostProcess) as problem:
            # torchrun says it; parallel.rank() needs torch, and flags are read before it is known.
            rank = os.environ.get("RANK", "0")
            process = "" if rank == "0" else f" in process {rank}"
            print(f"error{process}: {visible(' '.join(str(problem).split()))}", file=sys.stderr)
            raise SystemExit(2) from None
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            raise SystemExit(130) from None

    return run


class Parser(argparse.ArgumentParser):
    """Raises UserError for a wrong flag. --help adds a default that the help text does not say."""

    def __init__(self, description: str):
        super().__init__(description=description, formatter_class=_DefaultsFormatter)

    def error(self, message: str):
        raise UserError(f"{message} (--help lists the flags)")


class _DefaultsFormatter(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str:
        if action.default is None or action.default is False or "(default" in action.help:
            return action.help
        return super()._get_help_string(action)


def bar_pace() -> float:
    """Seconds between two states of a progress bar: a log needs few of them."""
    return 0.1 if sys.stderr.isatty() else 10.0


def number(kind: type, low: float, high: float = math.inf, above: bool = False):
    """An argparse type: a finite int or float in low..high (with `above`, low is excluded)."""

    def parse(text: str):
        try:
            value = kind(text)
            is_finite = math.isfinite(value)
        except (ValueError, OverflowError):  # a whole number may be too large for a float
            value, is_finite = math.nan, False
        if not is_finite or not low <= value <= high or (above and value == low):
            what = "a whole number" if kind is int else "a number"
            bounds = f"above {low:g}" if above else f"at least {low:g}"
            if high < math.inf:
                bounds += f" and at most {high:g}"
            raise argparse.ArgumentTypeError(f"expected {what} {bounds}, found {text!r}")
        return value

    return parse
