"""Held-out measurements, a verdict on a run's health, and its curves.

`evaluate` says how well the model still writes the data and what the reward thinks of what it writes now. `train.py` calls it every
`--eval-every` steps; it draws from a generator of its own, so that evaluating more or less often never changes the training run.
Left out on purpose: benchmark suites.

    python evaluate.py --health out                                # one line: healthy, or what to suspect and why
    python evaluate.py --plot out                                  # out/curves.png (needs matplotlib)
    python evaluate.py --perplexity out/final --data text.txt      # how well the model predicts a text
    python evaluate.py compare                                     # SFT, PPO, SFT then PPO, hybrid: compare.py
"""

import math
import sys
from pathlib import Path

import torch
import transformers
from tqdm import tqdm

import parallel
from data import (
    Example,
    columns_of,
    decode,
    demonstration_batch,
    encode_prompt,
    encode_target,
    load_examples,
    make_batch,
    review_metrics,
)
from engine import NonFiniteReward, Parser, UserError, one_line_errors, pick_device
from generate import sample
from hybrid import HybridModel, forward_rows
from ppo import kl_estimate
from references import ReferenceMixture, reference_logprobs
from runs import read_rows
from sft import held_out_nll


@torch.no_grad()
def evaluate(
    model: HybridModel,
    tokenizer,
    examples: list[Example],
    *,
    reward,
    reference: HybridModel | ReferenceMixture | None,
    max_length: int,
    max_new_tokens: int,
    temperature: float,
    batch_size: int,
    micro_batch_size: int,
    seed: int,
    is_reviews: bool,
) -> tuple[dict[str, float], list[dict]]:
    """-> metrics named `eval/...` and samples (prompt, response, score, kl).

    `nll` is the mean negative log-likelihood of the target tokens, in nats a token. Responses are sampled as in training, the
    same draw at every evaluation. `reward` and `reference` may be None: their metrics are then absent.
    """
    device = next(model.parameters()).device
    metrics = {}
    shown = [example for example in examples if example.target]
    if shown:
        metrics["nll"] = held_out_nll(
            model, demonstration_batch(tokenizer, shown, max_length), micro_batch_size
        )

    prompts = [
        encode_prompt(tokenizer, example)[-(max_length - max_new_tokens) :] for example in examples
    ]
    generator = torch.Generator(device).manual_seed(seed + parallel.rank())
    sampling = {
        "max_new_tokens": max_new_tokens,
        "eos_token_id": tokenizer.eos_token_id,
        "temperature": temperature,
    }
    responses = []
    for begin in range(0, len(prompts), batch_size):
        part = prompts[begin : begin + batch_size]
        responses += sample(model, part, generator=generator, **sampling).responses
    completions = [decode(tokenizer, response) for response in responses]
    samples = [
        {"prompt": e.prompt, "response": completion} for e, completion in zip(examples, completions)
    ]

    words = [completion.split() for completion in completions]
    pairs = [pair for text in words for pair in zip(text, text[1:])]
    metrics["distinct"] = len(set(completions)) / len(completions)
    metrics["distinct_2"] = len(set(pairs)) / max(len(pairs), 1)
    metrics["response_length"] = sum(len(response) for response in responses) / len(responses)
    if reward is not None:
        with reward.frozen():
            scores = reward(
                [example.prompt for example in examples], completions, **columns_of(examples)
            )  # (B,)
        metrics["reward"] = scores.nanmean()
        metrics |= {
            name: value for name, value in reward.metrics().items() if name.startswith("reward/")
        }
        for row, score in zip(samples, scores.tolist()):
            if math.isfinite(score):  # a judge may have given no answer
                row["score"] = score
    if reference is not None:
        batch = make_batch(tokenizer, prompts, responses, max_length).to(device)
        ours = forward_rows(model, batch, micro_batch_size, temperature).logprobs  # (B, T)
        theirs, _ = reference_logprobs(
            reference, batch, examples, micro_batch_size, temperature
        )  # (B, T)
        kl = kl_estimate(ours, theirs, "k3").sum(1)  # (B,) nats a response
        metrics["kl"] = kl.mean()
        for row, row_kl in zip(samples, kl.tolist()):
            row["kl"] = row_kl
    if is_reviews:
        metrics |= review_metrics([example.prompt for example in examples], completions)
    return {f"eval/{name}": float(value) for name, value in metrics.items()}, samples


def measure(run, args, folder) -> None:
    """Evaluate a run (runs.py) as it is now and write that down: `run.after`, `run.samples_after`.

    A reward that gives no finite number leaves out the reward; before training it is an error.
    """
    options = dict(
        **run.sampling, reference=run.reference, batch_size=args.batch_size,
        micro_batch_size=args.micro_batch_size, seed=args.seed, is_reviews=args.data == "reviews",
    )  # fmt: skip
    if run.reward is not None:
        run.reward.reference = run.reference
    what = run.model, run.tokenizer, run.held_out
    try:
        run.after, samples = evaluate(*what, reward=run.reward, **options)
    except NonFiniteReward as problem:
        if run.step == 0:
            raise  # nothing is lost yet
        tqdm.write(f"step {run.step}: {problem}; this evaluation goes without the reward")
        run.after, samples = evaluate(*what, reward=None, **options)
    run.samples_after = samples[:3]
    folder.write(run, "eval", run.after)
    folder.write_samples(run, run.samples_after)


def print_evaluation(run) -> None:
    """The last evaluation of a run and its samples."""
    numbers = [f"{name.removeprefix('eval/')} {value:.3f}" for name, value in run.after.items()]
    tqdm.write(f"step {run.step}  {'  '.join(numbers)}")
    for sample in run.samples_after:
        marks = [f"{name} {sample[name]:+.2f}" for name in ("score", "kl") if name in sample]
        text = f"{one_line(sample['prompt'])} >>> {one_line(sample['response'])}"
        tqdm.write(f"    {text}    {'  '.join(marks)}")


def print_summary(run, out: Path) -> None:
    """What changed, in three lines, and the verdict."""
    before, after = run.before, run.after
    parts = []
    if "eval/reward" in after:
        parts.append(f"reward {before['eval/reward']:+.3f} -> {after['eval/reward']:+.3f}")
    if "eval/nll" in after:
        parts.append(f"held-out NLL {before['eval/nll']:.3f} -> {after['eval/nll']:.3f}")
    else:
        parts.append("no target to measure an NLL on")
    if "eval/kl" in after:
        parts.append(f"KL to the reference {after['eval/kl']:.2f} nats a response")
    print(f"{', '.join(parts)}; model in {out / 'final'}")
    for label, samples in (("before", run.samples_before), ("after ", run.samples_after)):
        texts = [one_line(s["prompt"] + " >>> " + s["response"]) for s in samples[:2]]
        print(f"{label}: {' | '.join(texts)}")
    print(verdict(read_rows(out / "metrics.jsonl")))


def one_line(text: str, width: int = 160) -> str:
    text = " ".join(text.split())
    return text if len(text) <= width else text[: width - 3] + "..."


def whole_texts(source: list[str]) -> list[Example]:
    """The records of a file, or of a hub dataset [configuration [split]], with all but their first word to be predicted."""
    if len(source) > 3:
        raise UserError(
            f"expected a file, or a hub dataset [configuration [split]], found {' '.join(source)}"
        )
    found = [
        e
        for e in load_examples(
            source[0], prompt_words=1, **dict(zip(("config", "split"), source[1:]))
        )
        if e.target
    ]
    if not found:
        raise UserError(f"{source[0]} has no text to predict")
    return found


def perplexity(name: str, examples: list[Example]) -> float:
    """exp of the NLL per target token of the model in a folder or on the hub. A record is cut at its context or 1,024 tokens; no EOS is asked for.

    Only models with one tokenizer can be compared. Published numbers read a book in one piece, which gives lower ones.
    """
    model, tokenizer = HybridModel.load(name, "--perplexity")
    model.to(pick_device()).eval()
    rows = [
        (encode_prompt(tokenizer, example), encode_target(tokenizer, example.target)[:-1])
        for example in examples
    ]
    prompts, targets = zip(*[(prompt, target) for prompt, target in rows if target])
    return math.exp(
        held_out_nll(
            model,
            make_batch(tokenizer, prompts, targets, min(1024, model.max_positions)),
            micro_batch_size=8,
        )
    )


# ------------------------------------------------------------------------------------------------ is it healthy?


def _ends(rows: list[dict], key: str) -> tuple[float, float] | None:
    """Means over the first and the last third of the rows that have the key; None where fewer than three do."""
    values = [row[key] for row in rows if key in row]
    third = len(values) // 3
    return (sum(values[:third]) / third, sum(values[-third:]) / third) if third else None


# (key, is it sick, given the means of its first and last third?, what to suspect)
RULES = [
    (
        "ppo/sampler_gap",
        lambda first, last: last > 0.3,
        "sampled and scored log-probabilities differ: a bug, or very low precision",
    ),
    (
        "ppo/first_ratio_gap",
        lambda first, last: last > 1e-3,
        "the first ratio of an update is not 1: rollouts are off-policy, or dropout is on",
    ),
    (
        "ppo/kl_k1",
        lambda first, last: last < -1,
        "the KL is negative: the sampler does not draw from the scored distribution",
    ),
    (
        "ppo/kl",
        lambda first, last: last > 50,
        "the KL is above 50 nats a response: reward hacking; raise --kl-coef",
    ),
    (
        "ppo/entropy",
        lambda first, last: last < 0.2 * first,
        "the entropy collapsed to a fifth: the same answer to everything",
    ),
    (
        "ppo/clipfrac",
        lambda first, last: last > 0.3,
        "more than 0.3 of the tokens are clipped: lower --lr or --ppo-epochs",
    ),
    (
        "ppo/score_std",
        lambda first, last: last < 1e-6,
        "all responses score alike, so there is nothing to learn: does --reward fit the data?",
    ),
    (
        "ppo/var_explained",
        lambda first, last: last < -1,
        "the value head is worse than a constant: raise --vf-coef",
    ),
    (
        "ppo/response_length",
        lambda first, last: not 0.5 < last / first < 2,
        "the responses changed their length twofold: the reward likes length or silence",
    ),
    (
        "ppo/eos_rate",
        lambda first, last: last < 0.1,
        "hardly any response ends by itself: raise --max-new-tokens, or EOS is not trained",
    ),
    (
        "ppo/unscored",
        lambda first, last: last > 0.1,
        "more than a tenth of the responses got no score: look at the judge",
    ),
    ("sft/skipped_steps", lambda first, last: last > 0.01, "SFT updates were skipped: lower --lr"),
    (
        "ppo/skipped_steps",
        lambda first, last: last > 0.01,
        "PPO updates were skipped: lower --lr, or scale the reward",
    ),
    ("dpo/skipped_steps", lambda first, last: last > 0.01, "DPO updates were skipped: lower --lr"),
    (
        "dpo/accuracy",
        lambda first, last: last < 0.5,
        "DPO prefers the rejected side: --lr too large, or chosen and rejected are mixed up",
    ),
    (
        "sft/loss",
        lambda first, last: last > 1.2 * first,
        "the SFT loss rises: --lr too large, or PPO undoes it; lower --ppo-ratio",
    ),
]
FALLING = "every part of the reward falls: --lr too large, or --kl-coef too high"
SHOWN = (
    "ppo/score",
    "ppo/kl",
    "ppo/entropy",
    "ppo/clipfrac",
    "ppo/var_explained",
    "ppo/response_length",
    "sft/loss",
)


def _as_ppo(row: dict) -> dict:
    """The row with the metrics of its phase named as PPO's: the same rules for every algorithm that samples."""
    prefix = row["phase"] + "/"
    if row["phase"] in ("sft", "dpo", "eval"):
        return row
    return {
        "ppo/" + name.removeprefix(prefix) if name.startswith(prefix) else name: value
        for name, value in row.items()
    }


def verdict(rows: list[dict]) -> str:
    """One line on the rows of a metrics.jsonl: `verdict: healthy` or what to suspect, by RULES, then first third -> last third."""
    if not rows:
        return "verdict: nothing was recorded"
    rows = [_as_ppo(row) for row in rows]
    suspicions = [
        f"{key} {ends[1]:.3g}: {text}"
        for key, sick, text in RULES
        if (ends := _ends(rows, key)) and sick(*ends)
    ]
    # The leaves are raw; the total may be standardised (ema, whiten, mixture), and then it has no trend of its own.
    leaves = {key for row in rows for key in row if key.startswith("reward/")}
    falls = [
        last < first - 0.05 * abs(first) - 1e-9
        for first, last in filter(None, (_ends(rows, key) for key in sorted(leaves)))
    ]
    if falls and all(falls):
        suspicions.append(FALLING)
    evaluations = [row for row in rows if row["phase"] == "eval"]
    nll = [row["eval/nll"] for row in evaluations if "eval/nll" in row]
    if nll and nll[-1] > min(nll) + 0.5:
        suspicions.append(
            f"eval/nll {nll[-1]:.3g}, {nll[-1] - min(nll):.2g} above its best: PPO forgets the language; raise --kl-coef, lower --ppo-ratio"
        )
    if evaluations and evaluations[-1].get("eval/distinct", 1.0) < 0.5:
        suspicions.append(
            f"eval/distinct {evaluations[-1]['eval/distinct']:.3g}: more than half of the responses are repeats"
        )
    skipped = sum(
        value for row in rows for name, value in row.items() if name.endswith("/skipped_steps")
    )
    trends = [
        f"{key} {ends[0]:.3g} -> {ends[1]:.3g}" for key in SHOWN if (ends := _ends(rows, key))
    ]
    return f"verdict: {'suspect ' + '; '.join(suspicions) if suspicions else 'healthy'} ({', '.join([*trends, f'skipped updates {skipped:.0f}'])})"


def load_pyplot(what: str):
    """matplotlib.pyplot, drawing to files alone. Raises UserError where the package is missing."""
    try:
        import matplotlib
    except ImportError:
        raise UserError(f"{what} needs the package matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def plot(rows: list[dict], path: Path) -> None:
    """Curves of a run as a PNG: reward and NLL with the PPO stretches shaded, KL, length, and the leaves of the reward, if it has several."""
    pyplot = load_pyplot("--plot")
    leaves = sorted({key for row in rows for key in row if key.startswith("reward/")})
    panels = {
        "reward": ["ppo/score", "eval/reward"],
        "NLL": ["sft/loss", "eval/nll"],
        "KL, nats a response": ["ppo/kl", "eval/kl"],
    }
    panels |= {"length, tokens": ["ppo/response_length", "eval/response_length"]} | (
        {"reward, by leaf": leaves} if len(leaves) > 1 else {}
    )
    figure, axes = pyplot.subplots(
        len(panels), 1, sharex=True, figsize=(8, 1.8 * len(panels)), layout="constrained"
    )
    for axis, (title, keys) in zip(axes, panels.items()):
        for key in keys:
            points = [(row["step"], row[key]) for row in rows if key in row]
            if points:
                axis.plot(
                    *zip(*points),
                    "o-" if key.startswith("eval/") else "-",
                    markersize=3,
                    linewidth=1,
                    label=key,
                )
        for row in rows:
            if row["phase"] not in ("sft", "eval") and axis in axes[:2]:
                axis.axvspan(row["step"] - 1, row["step"], color="0.92", linewidth=0)
        axis.set_ylabel(title)
        if axis.lines:
            axis.legend(fontsize=7)
    axes[-1].set_xlabel("step (shaded: PPO, or what takes its place)")
    figure.savefig(path, dpi=80)
    pyplot.close(figure)


def rows_of(out: str) -> list[dict]:
    rows = read_rows(Path(out) / "metrics.jsonl")
    if not rows:
        raise UserError(f"{out} holds no metrics.jsonl with a complete line")
    return rows


@one_line_errors
def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()  # texts are cut at the model's context here, whatever their length
    if argv[:1] == ["compare"]:
        from compare import (
            main as compare_main,
        )  # here, since it measures with the functions of this file

        return compare_main(argv[1:])
    parser = Parser(__doc__.splitlines()[0])
    parser.add_argument("--health", metavar="OUT", help="print the verdict on a run folder")
    parser.add_argument(
        "--plot", metavar="OUT", help="draw the curves of a run folder to OUT/curves.png"
    )
    parser.add_argument(
        "--perplexity",
        metavar="MODEL",
        help="print how well a folder or hub id predicts the text of --data, per token",
    )
    parser.add_argument(
        "--data",
        nargs="+",
        metavar="SOURCE",
        help="a file, or hub dataset [configuration [split]], such as wikitext wikitext-2-raw-v1 test",
    )
    args = parser.parse_args(argv)
    if args.health is None and args.plot is None and args.perplexity is None:
        raise UserError("say --health OUT, --plot OUT or --perplexity MODEL --data SOURCE")
    if (args.perplexity is None) != (args.data is None):
        raise UserError("--perplexity MODEL and --data SOURCE [CONFIGURATION [SPLIT]] go together")
    if args.perplexity is not None:
        print(
            f"perplexity {perplexity(args.perplexity, whole_texts(args.data)):.2f} a token on {' '.join(args.data)}"
        )
    if args.health is not None:
        print(verdict(rows_of(args.health)))
    if args.plot is not None:
        plot(rows_of(args.plot), Path(args.plot) / "curves.png")
        print(Path(args.plot) / "curves.png")


if __name__ == "__main__":
    main(sys.argv[1:])
