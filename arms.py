"""The arms of a comparison: each is a schedule, as flags of train.py, and a row of its table.

    sft          SFT alone                  then@0.25    SFT for that share of the steps, then PPO
    ppo          PPO alone                  turns@0.25   that share of the steps is PPO (the hybrid)
    ramp         from SFT to PPO            mix@0.8      both losses in one update, 0.8 * RL
    gate@0.5     SFT on the prompts whose responses score below 0.5; buffer@0.5: collected first
    NAME=FLAGS   any flags of train.py, such as 'short=--ppo-ratio 0 --steps 100 --lr 1e-4'

`@` may be left out. The SFT warm-up is that of train.py where an arm does not set it. Left out on
purpose: conditions (an arm with a condition is a schedule, schedules.py).

    python compare.py --arms sft then@0.25 turns 'calm=--ppo-ratio 0.5 --kl-target 2'
"""

import math
import re
import shlex
from typing import NamedTuple

from cli import UserError


class Known(NamedTuple):
    """An arm with a name."""

    label: str  # in tables and figures
    flags: str  # {x} is the text after `@`; {warmup} is that share of the steps
    x: str | None = None  # where `@` is left out; None: it cannot be given


ARMS = {
    "sft": Known("SFT", "--ppo-ratio 0"),
    "ppo": Known("PPO", "--ppo-ratio 1 --sft-warmup 0"),
    "then": Known("SFT, then PPO", "--ppo-ratio 1 --sft-warmup {warmup}", "0.5"),
    "turns": Known("hybrid", "--ppo-ratio {x}", "0.5"),
    "ramp": Known("ramp", "--ppo-ratio {x}", "0:1"),
    "gate": Known("gate", "--schedule gate --threshold {x}", "0"),
    "buffer": Known("buffer", "--schedule buffer --threshold {x}", "0"),
    "mix": Known("mix", "--schedule mix --ppo-ratio {x}", "0.5"),
}
DEFAULT = ["sft", "ppo", "then", "turns"]


def exact(value: float) -> str:
    """The shortest text that means this number and no other one: no two share a folder."""
    return f"{value:g}" if float(f"{value:g}") == value else repr(value)


def slug(label: str) -> str:
    """How the folders of an arm begin."""
    return label.replace(", ", "-").replace(" ", "-").replace(":", "-").lower()


def parse_arms(texts: list[str], steps: int) -> dict[str, list[str]]:
    """The words of --arms, for runs of so many steps -> the flags of each arm, by its label.

    Raises UserError for an unknown arm, a wrong number, and two arms that would share a folder.
    """
    arms = {}
    for text in texts:
        label, flags = parse_arm(text, steps)
        if arms.get(label, flags) != flags or slug(label) in map(slug, arms.keys() - {label}):
            raise UserError(f"--arms has two arms called {label}; give each a name of its own")
        arms[label] = flags
    return arms


def parse_arm(text: str, steps: int) -> tuple[str, list[str]]:
    """One arm -> its label and flags. Raises UserError.

    >>> parse_arm("then@0.25", steps=600)
    ('SFT, then PPO@0.25', ['--ppo-ratio', '1', '--sft-warmup', '150'])
    """
    name, is_own, own_flags = text.partition("=")
    name, has_x, x = name.strip().partition("@")
    if is_own:
        return own_arm(name + has_x + x, own_flags)
    if name not in ARMS:
        raise UserError(f"--arms {text}: unknown; expected {', '.join(ARMS)}, or NAME=FLAGS")
    known = ARMS[name]
    if not has_x:
        x = known.x
    elif known.x is None:
        raise UserError(f"--arms {text}: {name} has no number; leave out @{x}")
    else:
        x = plain_number(text, x)
    flags = known.flags.split()
    if "{warmup}" in flags:
        share = float(x) if ":" not in x else math.nan
        if not 0 < share < 1:
            raise UserError(f"--arms {text}: expected a share above 0 and below 1, found {x}")
        warmup = math.floor(share * steps + 1e-9)  # 0.29 * 100 is 28.999...
        flags = [word.format(warmup=warmup) for word in flags]
    label = known.label if x == known.x else f"{known.label}@{x}"
    return label, [word.format(x=x) for word in flags]


def plain_number(text: str, x: str) -> str:
    """A number or a ramp, as every equal one is written. Raises UserError."""
    try:
        return ":".join(exact(float(part) + 0.0) for part in x.split(":"))
    except ValueError:
        raise UserError(f"--arms {text}: expected a number after @, found {x!r}") from None


def own_arm(name: str, flags: str) -> tuple[str, list[str]]:
    """NAME=FLAGS -> label and flags. Raises UserError."""
    if not re.fullmatch(r"\w[\w .,+-]*", name):
        raise UserError(
            f"--arms {name}={flags}: a name has letters, digits, spaces and . , + - _, "
            f"found {name!r}"
        )
    taken = [*ARMS, *(slug(known.label) for known in ARMS.values())]
    if slug(name) in taken:
        raise UserError(f"--arms {name}=...: {name} has a meaning here; choose another name")
    try:
        return name, shlex.split(flags)
    except ValueError as problem:
        raise UserError(f"--arms {name}={flags}: {problem}") from None
