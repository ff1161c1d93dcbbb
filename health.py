"""Is a run healthy? A verdict in one line, from its metrics.jsonl.

    python evaluate.py --health out           # one line: healthy, or what to suspect and why

Left out on purpose: limits that a user can set, the repair of a damaged file. A rule reports a
metric that is far outside the healthy range in docs/metrics.md.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from engine import UserError
from runs import skipped_updates

MIN_STEPS = 30  # the mean over a third of fewer rows says little


def above(limit: float) -> Callable[[float, float], bool]:
    return lambda first, last: last > limit


def below(limit: float) -> Callable[[float, float], bool]:
    return lambda first, last: last < limit


# (metric, is_bad(mean over the first third of the run, over the last third), what to suspect)
RULES = [
    ("ppo/sampler_gap", above(0.3),
     "sampled and scored log-probabilities differ: a bug, or very low precision"),
    ("ppo/first_ratio_gap", above(1e-3),
     "the first ratio of an update is not 1: rollouts are off-policy, or dropout is on"),
    ("ppo/kl_k1", below(-1),
     "the KL is negative: the sampler does not draw from the scored distribution"),
    ("ppo/kl", above(50),
     "the KL is above 50 nats a response: reward hacking; raise --kl-coef"),
    ("ppo/entropy", lambda first, last: last < 0.2 * first,
     "the entropy collapsed to a fifth: the same answer to everything"),
    ("ppo/clipfrac", above(0.3),
     "more than 0.3 of the tokens are clipped: lower --lr or --ppo-epochs"),
    ("ppo/score_std", below(1e-6),
     "all responses score alike, so there is nothing to learn: does --reward fit the data?"),
    ("ppo/var_explained", below(-1),
     "the value head is worse than a constant: raise --vf-coef"),
    ("ppo/response_length", lambda first, last: not 0.5 * first <= last <= 2 * first,
     "the responses changed their length twofold: the reward likes length or silence"),
    ("ppo/eos_rate", below(0.1),
     "hardly any response ends by itself: raise --max-new-tokens, or EOS is not trained"),
    ("ppo/unscored", above(0.1),
     "more than a tenth of the responses got no score: look at the judge"),
    ("sft/skipped_steps", above(0.01), "SFT updates were skipped: lower --lr"),
    ("ppo/skipped_steps", above(0.01),
     "PPO updates were skipped: lower --lr, or scale the reward"),
    ("dpo/skipped_steps", above(0.01), "DPO updates were skipped: lower --lr"),
    ("distill/kl", lambda first, last: last > max(0.1, first),
     "the KL to the teacher does not fall: --rl-lr too large or too small, or SFT pulls elsewhere"),
    ("distill/eos_rate", below(0.1),
     "hardly any response ends by itself: raise --max-new-tokens, or the teacher never ends"),
    ("distill/skipped_steps", above(0.01), "updates on the teacher were skipped: lower --lr"),
    ("dpo/accuracy", below(0.5),
     "DPO prefers the rejected side: --lr too large, or chosen and rejected are mixed up"),
    ("sft/loss", lambda first, last: last > 1.2 * first,
     "the SFT loss rises: --lr too large, or PPO undoes it; lower --ppo-ratio"),
]  # fmt: skip
TRENDS = ("ppo/score", "ppo/kl", "ppo/entropy", "ppo/clipfrac", "ppo/var_explained")
TRENDS += ("ppo/response_length", "distill/kl", "distill/response_length", "sft/loss")


def metric_rows(path: Path) -> list[dict]:
    """The rows of a metrics.jsonl: in each a step, a phase, and numbers. A last line without its
    line break was cut off by a crash, and is left out.

    Raises UserError, with file and line, for a file that a run did not write like that.
    """
    if not path.is_file():
        raise UserError(f"{path.parent} holds no {path.name}; name the folder of a run")
    lines = path.read_bytes().split(b"\n")[:-1]
    if not lines:
        raise UserError(f"{path} has no complete line yet: no step was recorded")
    rows = []
    for n, line in enumerate(lines, start=1):
        problem = None
        try:
            rows.append(json.loads(line))
            problem = problem_of(rows[-1])
        except (ValueError, RecursionError):
            problem = "is not JSON"
        if problem is not None:
            raise UserError(f"{path}:{n}: the line {problem}; the file is damaged there: remove it")
    return rows


def problem_of(row) -> str | None:
    """What is wrong with a row, as the end of a sentence about its line; None for a good row."""
    if not isinstance(row, dict):
        return f"holds {json.dumps(row)[:40]}, expected an object"
    for name in ("step", "phase"):
        if name not in row:
            return f"has no {name!r}"
    if not isinstance(row["phase"], str):
        return f"has the phase {json.dumps(row['phase'])[:40]}, expected a text"
    for name, value in row.items():
        if name != "phase" and not is_finite_number(value):
            return f"has {name!r}: {json.dumps(value)[:40]}, expected a finite number"
    return None


def is_finite_number(value) -> bool:
    """Of what JSON can hold: no text, no null, no true, no NaN, no whole number beyond floats."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return abs(value) <= sys.float_info.max


def as_ppo(row: dict) -> dict:
    """The row, its metrics `<phase>/...` renamed to `ppo/...`, so that RULES apply to it.

    A row of GRPO has `ppo/...` for its rollout, as PPO has, and `grpo/...` for its updates. A new
    algorithm that samples writes the same. Rows of SFT, DPO, distillation and evaluations stay as
    they are: a student may change its length, and its entropy, to those of its teacher.
    """
    if row["phase"] in ("sft", "dpo", "distill", "eval"):
        return row
    prefix = row["phase"] + "/"
    renamed = {}
    for name, value in row.items():
        if name.startswith(prefix):
            name = "ppo/" + name.removeprefix(prefix)
        renamed[name] = value
    return renamed


def ends_of(rows: list[dict], name: str) -> tuple[float, float] | None:
    """Means over the first and the last third of the rows with this metric; None for < 3 rows."""
    values = [row[name] for row in rows if name in row]
    third = len(values) // 3
    return (sum(values[:third]) / third, sum(values[-third:]) / third) if third else None


def leaves_of(rows: list[dict]) -> list[str]:
    """The names `reward/...` of the leaves of the reward, sorted."""
    return sorted({name for row in rows for name in row if name.startswith("reward/")})


class Checked(NamedTuple):
    """One of RULES, with the numbers that it looked at."""

    name: str
    first: float  # mean over the first third of the rows with this metric
    last: float
    is_broken: bool
    text: str


def checked_rules(rows: list[dict]) -> list[Checked]:
    """RULES, without those whose metric the rows do not have."""
    checked = []
    for name, is_bad, text in RULES:
        ends = ends_of(rows, name)
        if ends is not None:
            checked.append(Checked(name, *ends, is_bad(*ends), text))
    return checked


def broken_rules(rows: list[dict]) -> list[str]:
    """A sentence for each of RULES that a metric of the rows breaks."""
    checked = checked_rules(rows)
    return [f"{rule.name} {rule.last:.3g}: {rule.text}" for rule in checked if rule.is_broken]


def falling_reward(rows: list[dict]) -> list[str]:
    """Does every leaf of the reward fall? A list with a sentence if so."""
    # Not the total: ema, whiten and mixture standardise it, so it may have no trend.
    ends = [ends_of(rows, name) for name in leaves_of(rows)]
    falls = [pair[1] < pair[0] - 0.05 * abs(pair[0]) - 1e-9 for pair in ends if pair is not None]
    if falls and all(falls):
        return ["every part of the reward falls: --lr too large, or --kl-coef too high"]
    return []


def bad_evaluations(rows: list[dict]) -> list[str]:
    """Is the held-out NLL far above its best, what a built-in task measures far below, or does the
    model repeat itself? Sentences if so."""
    suspicions = []
    evaluations = [row for row in rows if row["phase"] == "eval"]
    nll = [row["eval/nll"] for row in evaluations if "eval/nll" in row]
    is_taught = any(row["phase"] == "distill" for row in rows)  # then as its teacher has it
    if nll and not is_taught and nll[-1] > min(nll) + 0.5:
        suspicions.append(
            f"eval/nll {nll[-1]:.3g}, {nll[-1] - min(nll):.2g} above its best: "
            "PPO forgets the language; raise --kl-coef, lower --ppo-ratio"
        )
    for name in ("eval/fluent", "eval/right"):
        shares = [row[name] for row in evaluations if name in row]
        if shares and shares[-1] < max(shares) - 0.2:
            suspicions.append(
                f"{name} {shares[-1]:.3g}, {max(shares) - shares[-1]:.2g} below its best: what SFT "
                "taught is lost; raise --kl-coef, lower --rl-lr"
            )
    distinct = evaluations[-1].get("eval/distinct", 1.0) if evaluations else 1.0
    if distinct < 0.5:
        suspicions += [f"eval/distinct {distinct:.3g}: more than half of the responses are repeats"]
    return suspicions


def summary_of(rows: list[dict]) -> str:
    """The trends of a run in brackets: first third -> last third."""
    trends = []
    for name in TRENDS:
        ends = ends_of(rows, name)
        if ends is not None:
            trends.append(f"{name} {ends[0]:.3g} -> {ends[1]:.3g}")
    skipped = sum(skipped_updates(row) for row in rows)
    return f"({', '.join([*trends, f'skipped updates {skipped:.0f}'])})"


def verdict(rows: list[dict]) -> str:
    """One line on the rows of a metrics.jsonl: healthy or what to suspect, then the trends."""
    if not rows:
        return "verdict: nothing was recorded"
    rows = [as_ppo(row) for row in rows]
    steps = sum(row["phase"] != "eval" for row in rows)
    suspicions = broken_rules(rows) + falling_reward(rows) + bad_evaluations(rows)
    answer = f"suspect {'; '.join(suspicions)}" if suspicions else "healthy"
    if steps < MIN_STEPS:
        answer = f"too short to tell (steps: {steps}; a verdict needs {MIN_STEPS})"
    return f"verdict: {answer} {summary_of(rows)}"
