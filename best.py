"""The best model of a run: `--keep-best METRIC` keeps it in OUT/best, a plain Hugging Face folder.

METRIC is any metric of an evaluation; a minus before it means that less is better. The last model
is often not the best one: PPO may lose the language, or learn to fool its reward. The folder is no
checkpoint: it lacks the state of the optimiser, so no run is resumed from it. `best.json` in it
says which step it is of, so that the two can never disagree, whenever the process dies.
Left out on purpose: several best models, stopping early.

    python train.py --keep-best eval/reward --out out-best
"""

import json
import math
from dataclasses import replace
from pathlib import Path

import parallel
from checkpoints import new_folder, write_text
from engine import UserError


def keep_best(run, args, out: Path) -> None:
    """After an evaluation (every process calls): write `out/best` if it is the best one so far.

    The evaluation before the first step counts for nothing: it only shows what metrics there are.
    """
    if args.keep_best is None:
        return
    if run.step == 0:
        check_metric(run, args)
    else:
        parallel.on_main(_keep_best, run, args.keep_best, out)


def _keep_best(run, metric: str, out: Path) -> None:
    value = run.after.get(metric.removeprefix("-"), math.nan)
    if not math.isfinite(value):  # absent where the reward was not finite
        return
    record = read_best(out)
    # What was kept by another metric before --resume is replaced.
    if record is None or record["metric"] != metric or is_better(metric, value, record["value"]):
        with new_folder(out / "best") as unfinished:
            run.model.save(unfinished, run.tokenizer)
            record = {"metric": metric, "value": value, "step": run.step}
            write_text(unfinished / "best.json", json.dumps(record) + "\n")


def is_better(metric: str, value: float, best: float) -> bool:
    """Is the value better than the best? Of two equal ones the first is kept.

    >>> is_better("eval/reward", 0.5, 0.4), is_better("-eval/nll", 0.5, 0.4)
    (True, False)
    """
    return value < best if metric.startswith("-") else value > best


def read_best(out: Path) -> dict | None:
    """metric, value and step of the model in `out/best`; None where there is none.

    Raises UserError for a record that cannot be read.
    """
    path = out / "best" / "best.json"
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        return {name: record[name] for name in ("metric", "value", "step")}
    except (ValueError, TypeError, KeyError):
        raise UserError(f"{path} is damaged; move {path.parent} away to go on") from None


def check_metric(run, args) -> None:
    """Raises UserError unless evaluations of this run have the metric of --keep-best."""
    if args.keep_best is None:
        return
    # Those before the first step, and those that need a reference, which may not be there yet
    first = run.before or run.after
    known = list(first)
    if args.ppo_ratio != 0:
        known += ["eval/kl"]
        if run.algorithm.measure is not None:
            a_pair = run.held_out_pairs[:1]
            with_reference = replace(run, reference=run.model, held_out_pairs=a_pair)
            known += run.algorithm.measure(with_reference, args)
    known = list(dict.fromkeys(known))
    if args.keep_best.removeprefix("-") not in known:
        raise UserError(
            f"--keep-best {args.keep_best} is no metric of this run's evaluations; they have "
            f"{', '.join(known)}; a minus before the name keeps the lowest value"
        )


def best_line(out: Path, metric: str) -> str:
    """One line at the end of a run: which step is in `out/best`, and its value."""
    record = read_best(out)
    if record is None:
        return f"no evaluation had a finite {metric.removeprefix('-')}: {out / 'best'} is not there"
    name = record["metric"].removeprefix("-")
    return f"best {name}: {record['value']:.4g} at step {record['step']}; model in {out / 'best'}"
