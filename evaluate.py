"""Held-out measurements: how well the model still writes the data, and what the reward says.

`train.py` calls `measure` every `--eval-every` steps. `evaluate` (measure_model.py) samples with a
generator of its own, so measuring more often never changes a run. Left out on purpose: benchmark
suites.

    python evaluate.py --health out                           # healthy, or what to suspect and why
    python evaluate.py --report out                           # out/report.html: a run as one page
    python evaluate.py --plot out                             # out/curves.png (needs matplotlib)
    python evaluate.py --perplexity out/final --data text.txt # how well the model predicts a text
    python evaluate.py --model out/final --data test.jsonl --reward rouge_l   # NLL, reward, ...
"""

import math
import sys
from pathlib import Path

import transformers
from tqdm import tqdm

from best import best_line, keep_best
from chat import cut_prompt, encode_demonstration, end_ids, room_for_prompt
from checkpoints import random_state, set_random_state
from data import Example, load_examples, make_batch
from engine import NonFiniteReward, Parser, UserError, one_line_errors, pick_device, visible
from flags import spelled
from health import RULES as RULES  # importable from here
from health import metric_rows, verdict
from hybrid import HybridModel
from measure_model import add_flags, evaluate, measure_model
from measure_model import diversity as diversity  # importable from here
from plot import draw
from run_page import marks, write_report
from runs import read_rows
from sft import held_out_nll
from tasks import task_of


def measure(run, args, folder) -> None:
    """Evaluate a run (runs.py) as it is now and write that down: `run.after`, `run.samples_after`.

    If a score is not finite, the reward is left out; before the first step raises NonFiniteReward.
    In training a reward draws the same random numbers, however often it is measured.
    """
    state = random_state()
    try:
        _measure(run, args, folder)
    finally:
        set_random_state(state)


def _measure(run, args, folder) -> None:
    options = dict(
        **run.sampling, turns=args.turns, user=run.user, turn_rewards=args.turn_rewards,
        prompts=run.held_out_prompts, reference=run.reference, batch_size=args.batch_size,
        micro_batch_size=args.micro_batch_size, seed=args.seed, task=task_of(args.data),
    )  # fmt: skip
    what = run.model, run.tokenizer, run.held_out
    try:
        run.after, samples, _ = evaluate(*what, reward=run.reward, **options)
    except NonFiniteReward as problem:
        if run.step == 0:
            raise  # nothing is lost yet
        tqdm.write(f"step {run.step}: {problem}; this evaluation leaves out the reward")
        run.after, samples, _ = evaluate(*what, reward=None, **options)
    if run.algorithm.measure is not None:
        run.after |= run.algorithm.measure(run, args)
    run.samples_after = samples[:3]
    folder.write_samples(run, run.samples_after)
    folder.write(run, "eval", run.after)  # after the samples: without it --resume measures again
    keep_best(run, args, folder.out)


def print_evaluation(run) -> None:
    """The last evaluation of a run and its samples."""
    numbers = [f"{name.removeprefix('eval/')} {value:.3f}" for name, value in run.after.items()]
    tqdm.write(f"step {run.step}  {'  '.join(numbers)}")
    for row in run.samples_after:
        tqdm.write(f"    {one_line(row)}    {'  '.join(marks(row))}")


def print_summary(run, out: Path, keep_best: str | None = None) -> None:
    """What changed, in three lines, which model is the best by --keep-best, and the verdict."""
    before, after = run.before, run.after
    changes = []
    if "eval/reward" in after:
        changes.append(f"reward {before['eval/reward']:+.3f} -> {after['eval/reward']:+.3f}")
    if "eval/nll" in after:
        changes.append(f"held-out NLL {before['eval/nll']:.3f} -> {after['eval/nll']:.3f}")
    else:
        changes.append("no target to measure an NLL on")
    if "eval/kl" in after:
        whom = "teacher" if run.algorithm.from_teacher else "reference"
        changes.append(f"KL to the {whom} {after['eval/kl']:.2f} nats a response")
    print(f"{', '.join(changes)}; model in {out / 'final'}")
    for label, samples in (("before", run.samples_before), ("after ", run.samples_after)):
        texts = [one_line(row) for row in samples[:2]]
        print(f"{label}: {' | '.join(texts)}")
    if keep_best is not None:
        print(best_line(out, keep_best))
    print(verdict(read_rows(out / "metrics.jsonl")))


def one_line(row: dict, width: int = 160) -> str:
    """A sample in one line: the end of a long prompt, the beginning of a long response."""
    prompt, response = visible(row["prompt"]), visible(row["response"])
    if len(prompt) > width // 2:
        prompt = "..." + prompt[3 - width // 2 :]
    if len(response) > width:
        response = response[: width - 3] + "..."
    return f"{prompt} >>> {response}"


def whole_texts(source: list[str]) -> list[Example]:
    """The records of a file, or of a hub dataset [configuration [split]], as texts to predict.

    The first word is the prompt, the rest is the target. Raises UserError if there is no text.
    """
    if len(source) > 3:
        raise UserError(
            f"expected a file, or a hub dataset [configuration [split]], found {' '.join(source)}"
        )
    name, *more = source
    options = dict(zip(("config", "split"), more))
    examples = [e for e in load_examples(name, prompt_words=1, **options) if e.target]
    if not examples:
        raise UserError(f"{name} has no text to predict")
    return examples


def perplexity(name: str, examples: list[Example]) -> float:
    """exp of the NLL per target token, for the model in a folder or on the hub.

    A record is truncated to the context of the model, 1,024 tokens at most; EOS is not predicted.
    Only models with the same tokenizer can be compared. Published numbers are lower: there the
    texts are joined, so that each token is predicted from a longer context.
    """
    model, tokenizer = HybridModel.load(name, "--perplexity")
    model.to(pick_device()).eval()
    context, ends = min(1024, model.max_positions), end_ids(tokenizer)
    prompts, targets = [], []
    for example in examples:
        prompt, answer = encode_demonstration(tokenizer, example, ends=ends)
        room = room_for_prompt(context, len(answer))
        prompt = cut_prompt(tokenizer, example, prompt, room)
        if len(answer) > 1:  # without its end
            prompts.append(prompt)
            targets.append(answer[:-1][: context - len(prompt)])
    batch = make_batch(tokenizer, prompts, targets, context)
    return math.exp(held_out_nll(model, batch, micro_batch_size=8))


def check_flags(parser: Parser, args) -> None:
    """Raises UserError where nothing is asked for, or flags do not go together."""
    if not any((args.health, args.report, args.plot, args.perplexity, args.model)):
        raise UserError(
            "say --health OUT, --report OUT, --plot OUT, --perplexity MODEL --data SOURCE, "
            "or --model MODEL --data SOURCE"
        )
    if args.perplexity is not None and args.model is not None:
        raise UserError("--perplexity and --model read --data in two ways; say one of the two")
    if (args.perplexity is None and args.model is None) != (args.data is None):
        raise UserError("--perplexity MODEL (or --model MODEL) and --data SOURCE go together")
    own = ("health", "report", "plot", "perplexity", "data")
    for name, value in vars(args).items():
        if args.model is None and name not in own and value != parser.get_default(name):
            raise UserError(f"{spelled(name)} is for --model MODEL --data SOURCE alone")


@one_line_errors
def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["compare"]:
        raise UserError("the comparison is a command of its own: python compare.py")
    transformers.utils.logging.disable_progress_bar()
    # Here texts are truncated to the context of the model: no warning about long ones.
    transformers.utils.logging.set_verbosity_error()
    parser = Parser(__doc__.splitlines()[0])
    add = parser.add_argument
    add("--health", metavar="OUT", help="print the verdict on a run folder")
    add("--report", metavar="OUT", help="write a run folder as one page, OUT/report.html")
    add("--plot", metavar="OUT", help="draw the curves of a run folder to OUT/curves.png")
    add("--perplexity", metavar="MODEL", help="print how well a model predicts the text of --data")
    what = "print NLL, reward and more of a finished model on --data: a folder or hub id"
    add("--model", help=what)
    what = "as of train.py; with --perplexity a file, or hub dataset [configuration [split]]"
    add("--data", nargs="+", metavar="SOURCE", help=what)
    add_flags(parser)
    args = parser.parse_args(argv)
    check_flags(parser, args)
    if args.model is not None:
        measure_model(args)
    if args.perplexity is not None:
        result = perplexity(args.perplexity, whole_texts(args.data))
        print(f"perplexity {result:.2f} a token on {' '.join(args.data)}")
    if args.health is not None:
        print(verdict(metric_rows(Path(args.health) / "metrics.jsonl")))
    if args.report is not None:
        print(write_report(Path(args.report)))
    if args.plot is not None:
        print(draw(Path(args.plot)))


if __name__ == "__main__":
    main(sys.argv[1:])
