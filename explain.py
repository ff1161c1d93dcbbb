"""One rollout token by token: every number that PPO computes for it, and one update on it.

    python explain.py out                        # a table with one line a token
    python explain.py out --html page.html       # the same for all responses, as a page
    python explain.py --batch                    # the picture of a row (README.md) with real ids

A run is shown with its own flags, reference and optimiser, and all numbers are those of
`collect_rollout` and `ppo_step`. The update changes the model in memory alone: nothing is written
but the page. Left out on purpose: GRPO, DPO, distillation (they have no values), dialogues.
"""

import contextlib
import io
import math
import shutil
import sys
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers

import engine
import ppo
import prepare
from checkpoints import STATE, checkpoints, load_checkpoint, newest_checkpoint, read_state
from data import Example
from engine import UserError, number, visible
from explain_page import check_page, write_page
from flags import make_parser, parse_args, read_flags, read_json, spelled
from hybrid import forward_rows
from ppo import Rollout, kl_estimate
from runs import Algorithm, Run
from survey import as_read

PPO = Algorithm(train_on=ppo.collect_rollout, step=ppo.ppo_step)  # `prepare` asks what it needs
# The columns of the table: what each says, and the function and file that compute it
COLUMNS = {
    "logprob": "log pi(token) when it was sampled, in nats [forward_rows, hybrid.py]",
    "ref_logprob": "the same under the reference [reference_logprobs, references.py]",
    "KL": "logprob - ref_logprob, if --kl-estimator is k1 [kl_estimate, ppo.py]",
    "KL k3": "another estimate, never negative [kl_estimate, ppo.py]",
    "reward": "-cost of a nat * KL; at the last token also the score [place_rewards, ppo.py]",
    "value": "the sum of rewards expected from this token on [forward_rows, hybrid.py]",
    "return": "what the value should have been [compute_gae, ppo.py]",
    "advantage": "return - value, whitened: what the update uses [masked_whiten, ppo.py]",
    "ratio": "new pi / old pi of the token, after one update [ppo_step, ppo.py]",
}
FLAGS = ("kl_estimator", "gamma", "lam", "missing_eos_penalty", "whiten_rewards")
HAVE_A_SUM = ("logprob", "ref_logprob", "KL", "KL k3", "reward")


@dataclass
class Row:
    """A response: its tokens, and for each column of the table a number for each token."""

    prompt: str
    score: float  # NaN where the reward gave none: then there are no tokens, nothing is learnt
    tokens: list[str]
    columns: dict[str, list[float]]


# ---------------------------------------------------------------------------------------- the run


def find_run(folder: str | None, step: int | None) -> tuple[Namespace, Path | None]:
    """-> the flags, and the checkpoint: None where there is a model, and no run.

    Raises UserError where there is neither, no such checkpoint, or no PPO with one response a row.
    """
    place, checkpoint = Path(folder or "tiny"), None
    if (place / STATE).is_file() and "ppo_ratio" in read_json(place.parent / "config.json"):
        checkpoint, place = place, place.parent
    config = read_json(place / "config.json") if folder else {"model_type": "tiny"}
    if "ppo_ratio" not in config:
        if "model_type" not in config:
            raise UserError(f"{folder}: expected a run folder of train.py or a model folder")
        if step is not None:
            raise UserError(f"--step {step} is a step of a run, and {place} is a model alone")
        return parse_args(["--model", str(place)]), None
    args = Namespace(**read_flags(place, make_parser()))
    if args.algorithm != "ppo" or args.ppo_ratio == 0 or args.turns > 1:
        raise UserError(
            f"{place} is a run with --algorithm {args.algorithm}, --ppo-ratio {args.ppo_ratio}, "
            f"--turns {args.turns}; expected steps of PPO (it alone has values), one turn"
        )
    newest = newest_checkpoint(place)
    if newest is None:
        raise UserError(f"{place} has no checkpoint yet; expected checkpoint-* or final in it")
    args.resume, args.accept_changes = str(place), True  # what has changed is said, not refused
    if step is None:
        return args, checkpoint or newest
    folders = [path for path in [*checkpoints(place), place / "final"] if (path / STATE).is_file()]
    by_step = {read_state(path, mmap=True)["counters"]["step"]: path for path in folders}
    if step not in by_step:
        steps = ", ".join(map(str, by_step))
        raise UserError(f"--step {step}: {place} has no such checkpoint; it has steps {steps}")
    return args, by_step[step]


def load_run(args: Namespace, checkpoint: Path | None) -> tuple[Run, list[str]]:
    """The run as its checkpoint left it, in memory, and lines that say what it is.

    Raises UserError as `prepare.prepare` does: for a reward file that is gone, for example.
    """
    device = engine.pick_device(args.device)
    engine.check_amp(args.amp, device)
    engine.seed_everything(args.seed)
    if checkpoint is not None:
        prepare.say_remembered(args)
    said = io.StringIO()
    with contextlib.redirect_stdout(said):  # the plan of a training, which is not to come
        run = prepare.assemble(args, PPO, device, checkpoint)
    lines = [f"{args.model} is a model without a run: it has the default flags of train.py"]
    if checkpoint is not None:
        load_checkpoint(checkpoint, run)
        lines = [f"{checkpoint}: step {run.step} of {args.steps}"]
    lines += [line for line in said.getvalue().splitlines() if line.startswith("note: ")]
    flags = [f"{spelled(name)} {getattr(args, name)}" for name in FLAGS]
    lines += [f"reward {args.reward}; one nat of KL costs {run.kl_controller.value:g}"]
    lines += [", ".join(flags)]
    if args.schedule != "ratio":
        lines.append(f"note: the SFT of --schedule {args.schedule} is left out of the update")
    whose = "as the run has it at this step"
    if run.reference is None:
        run.reference = run.model.frozen_copy()
        why = "there is no run" if checkpoint is None else "PPO has not started at this step"
        whose = f"the model itself, so every KL is 0 ({why})"
    return run, [*lines, f"reference: {whose}"]


def examples_for(run: Run, args: Namespace, prompt: str | None, n: int) -> list[Example]:
    """`n` held-out prompts, or `n` times the given one: with the fields of its record if it is held
    out, else as text alone. Raises UserError where the reward needs more, such as a target."""
    if prompt is None:
        return run.held_out_prompts[:n]
    for example in run.held_out_prompts:
        if example.prompt == prompt:
            return [example] * n
    like = run.held_out_prompts[0]
    is_chat = like.is_chat or like.messages is not None
    example = Example(prompt, "", is_chat=is_chat, template_args=args.template_args or {})
    run.reward.try_on([example])
    return [example] * n


# ------------------------------------------------------------------------------ rollout and update


def sample_rollout(run: Run, args: Namespace, examples: list[Example], seed: int):
    """One response to each example, by the flags of the run. -> Rollout, metrics."""
    engine.seed_everything(seed)  # a reward may draw too
    rollout, metrics = ppo.collect_rollout(
        run.model, run.reference, run.tokenizer, examples, run.reward, **run.rollout,
        kl_coef=run.kl_controller.value, generator=run.sampling_generator.manual_seed(seed),
    )  # fmt: skip
    if not rollout.response_mask.any():
        raise UserError("the reward has no score for any of the responses; try another --seed")
    return rollout, metrics


def update_once(run: Run, args: Namespace, rollout: Rollout):
    """One update over all rows, in memory. -> the ratio of new to old policy (B, T), metrics."""
    # At the peak rate: most schedules end at 0, where the ratio of the last checkpoint would be 1.
    engine.enter_phase(run.optimizer, "ppo", args.rl_lr)
    clips = dict(cliprange=args.cliprange, cliprange_value=args.cliprange_value)
    options = dict(temperature=args.temperature, vf_coef=args.vf_coef, **clips, **run.update)
    options |= dict(ppo_epochs=1, minibatches=1)
    metrics = ppo.ppo_step(run.model, rollout, run.optimizer, **options)
    if metrics["ppo/skipped_steps"]:
        raise UserError("the gradient of this rollout is not finite; try another --seed")
    new = forward_rows(run.model, rollout, args.micro_batch_size, args.temperature)
    return torch.exp(new.logprobs - rollout.logprobs), metrics


def rows_of(run: Run, args: Namespace, examples: list[Example], rollout: Rollout, ratio):
    """The table of each response. ratio (B, T) -> list[Row]."""
    kl, k3 = [
        kl_estimate(rollout.logprobs, rollout.ref_logprobs, kind)
        for kind in (args.kl_estimator, "k3")
    ]
    numbers = (rollout.logprobs, rollout.ref_logprobs, kl, k3, rollout.rewards, rollout.values)
    columns = dict(zip(COLUMNS, (*numbers, rollout.returns, rollout.advantages, ratio)))
    rows = []
    for i, score in enumerate(run.reward.total.tolist()):
        on = rollout.response_mask[i]  # (T,)
        tokens = [token_text(run.tokenizer, token) for token in rollout.input_ids[i][on].tolist()]
        of_row = {name: tensor[i][on].tolist() for name, tensor in columns.items()}
        rows.append(Row(visible(examples[i].prompt), score, tokens, of_row))
    return rows


def token_text(tokenizer, token: int) -> str:
    """The text of one id; a model may have more ids than its tokenizer has tokens."""
    is_known = tokenizer.convert_ids_to_tokens(token) is not None
    text = as_read(tokenizer, [token]) if is_known else ""
    return visible(text) or f"<id {token}>"


def metrics_of(rows: list[Row], args: Namespace) -> list[tuple[str, float, str]]:
    """What the training would log, from the columns of all rows: name, value, how it follows."""
    scored = [row for row in rows if row.tokens]
    columns = {}  # (1, N) each
    for name in COLUMNS:
        columns[name] = torch.tensor([[x for row in scored for x in row.columns[name]]])
    old, values, returns, advantages, ratio = (
        columns[name] for name in ("logprob", "value", "return", "advantage", "ratio")
    )
    on = torch.ones_like(old, dtype=torch.bool)
    clips = args.cliprange, args.cliprange_value, args.vf_coef
    _, update = ppo.ppo_loss(old, old, advantages, values, values, returns, on, *clips)
    _, second = ppo.clipped_surrogate(old + ratio.log(), old, advantages, on, args.cliprange)
    explained = ppo.explained_variance(values, returns, on)
    k1 = kl_estimate(old, columns["ref_logprob"], "k1")
    n, each = len(scored), "mean of the responses"
    found = {
        "ppo/score": (sum(row.score for row in scored) / n, f"the score, {each}"),
        "ppo/reward": (columns["reward"].sum() / n, f"sum of reward, {each}"),
        "ppo/kl": (columns["KL k3"].sum() / n, f"sum of KL k3, {each}"),
        "ppo/kl_k1": (k1.sum() / n, f"sum of logprob - ref_logprob, {each}"),
        "ppo/response_length": (old.numel() / n, f"tokens, {each}"),
        "mean return": (returns.mean(), "(not logged)"),
        "ppo/var_explained": (explained, "1 - var(return - value) / var(return)"),
        "ppo/policy_loss": (update["policy_loss"], "mean of -advantage: the ratio was 1"),
        "ppo/value_loss": (update["value_loss"], "half of the mean of (value - return)^2"),
    }
    if args.whiten_rewards:
        del found["ppo/reward"]  # it is logged as it is before
    if n < len(rows):
        del found["ppo/response_length"]  # it counts the responses without a score too
    how = {"ratio_gap_max": "largest abs(ratio - 1)", "approxkl": "half of mean (log ratio)^2"}
    how["clipfrac"] = f"tokens that --cliprange {args.cliprange:g} stops"
    found |= {f"ppo/{name}": (second[name], f"next update: {what}") for name, what in how.items()}
    return [(name, float(value), what) for name, (value, what) in found.items()]


# ----------------------------------------------------------------------------------------- as text


def cut(token: str, width: int) -> str:
    """A token in a table, its space visible."""
    return token.replace(" ", "\N{OPEN BOX}")[:width]


def table(row: Row) -> list[str]:
    """The table of a response in lines; the last one has the sums that mean something."""
    widths = {name: max(len(name), 8) for name in COLUMNS}
    lines = [" ".join([f"{'token':14}", *(name.rjust(w) for name, w in widths.items())])]
    for i, token in enumerate(row.tokens):
        cells = [f"{row.columns[name][i]:{w}.4f}" for name, w in widths.items()]
        lines.append(" ".join([f"{cut(token, 14):14}", *cells]))
    sums = [f"{math.fsum(row.columns[name]):{widths[name]}.4f}" for name in HAVE_A_SUM]
    return [*lines, " ".join([f"{'sum':14}", *sums])]


def picture(tokenizer, rollout: Rollout, width: int) -> list[str]:
    """The rows of a batch as README.md draws one; lines of at most `width` characters."""
    lines, at_once = [], max(1, (width - 14) // 10)
    for i, on in enumerate(rollout.response_mask.tolist()):
        ids, real = rollout.input_ids[i].tolist(), rollout.attention_mask[i].tolist()
        parts = [("response" if r else "prompt") if a else "padding" for a, r in zip(real, on)]
        cells = {"column": range(len(ids)), "part": parts}
        cells["token"] = [cut(token_text(tokenizer, token), 9) for token in ids]
        cells |= {"input_ids": ids, "attention_mask": map(int, real), "response_mask": map(int, on)}
        for name in ("logprobs", "values", "rewards"):
            numbers = zip(getattr(rollout, name)[i].tolist(), on)
            cells[name] = [f"{x:.3f}" if is_on else "0" for x, is_on in numbers]
        texts = {name: [f"{x!s:>10}" for x in values] for name, values in cells.items()}
        for begin in range(0, len(ids), at_once):
            lines += ["", f"row {i}" + (", further" if begin else "")]
            for name, cells in texts.items():
                lines.append(f"{name:14}{''.join(cells[begin : begin + at_once])}")
    return lines


@engine.one_line_errors
def main(argv: list[str] | None = None) -> None:
    parser = engine.Parser(__doc__.splitlines()[0])
    add = parser.add_argument
    what = "a run of train.py, its checkpoint, or a model (default: the untrained built-in one)"
    add("folder", nargs="?", help=what)
    add("--prompt", metavar="TEXT", help="sample for this prompt (default: held-out prompts)")
    add("--seed", type=number(int, 0, 2**63 - 1), default=0, help="another one, other responses")
    add("--step", type=number(int, 0), help="the checkpoint of this step (default: the newest)")
    what = "responses; advantages are whitened over them (default: 8, or 3 with --batch)"
    add("--rows", type=number(int, 1), help=what)
    add("--html", metavar="FILE", type=Path, help="write all responses as a page")
    add("--batch", action="store_true", help="the picture of a row with the ids of a batch")
    add("--device", default="auto", help="auto, cuda, mps or cpu")
    given = parser.parse_args(argv)
    if given.batch and given.html is not None:
        raise UserError("--batch prints a picture, --html writes a page; say one of the two")
    if given.html is not None:
        check_page(given.html)
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    args, checkpoint = find_run(given.folder, given.step)
    args.device, args.compile, args.deepspeed = given.device, False, None
    with contextlib.redirect_stdout(sys.stderr):  # what a reward prints is no table
        run, lines = load_run(args, checkpoint)
        examples = examples_for(run, args, given.prompt, given.rows or (3 if given.batch else 8))
        rollout, _ = sample_rollout(run, args, examples, given.seed)
    n_tokens = int(rollout.response_mask.sum())
    lines.append(f"{len(rollout)} responses of {n_tokens} tokens, sampled with seed {given.seed}")
    if given.batch:
        width = shutil.get_terminal_size((100, 24)).columns
        return print("\n".join([*lines, *picture(run.tokenizer, rollout, width)]))
    ratio, _ = update_once(run, args, rollout)
    lines.append(f"one update over all of these tokens, at the peak of --rl-lr {args.rl_lr:g}")
    rows = rows_of(run, args, examples, rollout, ratio)
    lines += ["", *[f"{name:11} {what}" for name, what in COLUMNS.items()]]
    below = [f"{name:20} {x:8.4f}  {how}" for name, x, how in metrics_of(rows, args)]
    if given.html is not None:
        write_page(given.html, lines, rows, [table(row) for row in rows], below)
        return print(f"{len(rows)} responses are in {given.html}; open it in a browser")
    first = next(i for i, row in enumerate(rows) if row.tokens)
    head = f"response {first + 1} of {len(rows)}, score {rows[first].score:+.4f}"
    lines += ["", f"{head}: {rows[first].prompt} >>>", *table(rows[first])]
    print("\n".join([*lines, "", f"from these columns, over all {len(rows)} responses:", *below]))


if __name__ == "__main__":
    main(sys.argv[1:])
