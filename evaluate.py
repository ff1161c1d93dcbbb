"""Held-out measurements: how well the model still writes the data, and what the reward says.

`train.py` calls `measure` every `--eval-every` steps. `evaluate` samples with a generator of its
own, so measuring more often never changes a run. Left out on purpose: benchmark suites.

    python evaluate.py --health out                           # healthy, or what to suspect and why
    python evaluate.py --plot out                             # out/curves.png (needs matplotlib)
    python evaluate.py --perplexity out/final --data text.txt # how well the model predicts a text
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
    cut_prompt,
    decode,
    demonstration_batch,
    encode_prompt,
    encode_target,
    end_ids,
    load_examples,
    make_batch,
    review_metrics,
)
from engine import NonFiniteReward, Parser, UserError, one_line_errors, pick_device
from generate import sample
from health import RULES as RULES  # importable from here
from health import plot, verdict
from hybrid import HybridModel, forward_rows
from ppo import kl_estimate
from references import ReferenceMixture, reference_logprobs
from runs import read_rows
from sft import held_out_nll
from survey import as_read, visible


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
    prompts: list[Example] | None = None,
    max_prompt_length: int | None = None,
) -> tuple[dict[str, float], list[dict]]:
    """-> metrics named `eval/...` and samples (prompt as the model reads it, response, score, kl).

    `nll` is the mean negative log-likelihood of the target tokens of `examples`, in nats a token.
    Responses are sampled as in training, to `prompts` (None: to the examples), with the same seed
    at every evaluation. Without `reward` or `reference` (None) their metrics are absent.
    """
    metrics = {}
    if max_prompt_length is None:
        max_prompt_length = max_length - max_new_tokens
    with_target = [example for example in examples if example.target]
    if with_target:
        batch = demonstration_batch(tokenizer, with_target, max_length, max_prompt_length)
        metrics["nll"] = held_out_nll(model, batch, micro_batch_size)

    # ---- sample
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed + parallel.rank())
    asked = examples if prompts is None else prompts
    prompts = []
    for example in asked:
        ids = encode_prompt(tokenizer, example)
        prompts.append(cut_prompt(tokenizer, example, ids, max_prompt_length))
    ends = end_ids(tokenizer, model.lm)
    options = dict(max_new_tokens=max_new_tokens, temperature=temperature, generator=generator)
    responses = []
    for begin in range(0, len(prompts), batch_size):
        chunk = prompts[begin : begin + batch_size]
        responses += sample(model, chunk, eos_token_id=ends, **options).responses
    completions = [decode(tokenizer, response) for response in responses]
    metrics |= diversity(completions)
    metrics["response_length"] = sum(len(response) for response in responses) / len(responses)
    prompt_texts = [example.prompt for example in asked]
    samples = []
    for ids, completion in zip(prompts, completions):
        samples.append({"prompt": as_read(tokenizer, ids), "response": completion})

    # ---- ask the reward
    if reward is not None:
        with reward.frozen():
            scores = reward(prompt_texts, completions, **columns_of(asked))  # (B,)
        metrics["reward"] = scores.nanmean()
        metrics |= {n: value for n, value in reward.metrics().items() if n.startswith("reward/")}
        for row, score in zip(samples, scores.tolist()):
            if math.isfinite(score):  # a judge may have given no answer
                row["score"] = score

    # ---- how far is the policy from the reference?
    if reference is not None:
        batch = make_batch(tokenizer, prompts, responses, max_length).to(device)
        logprobs = forward_rows(model, batch, micro_batch_size, temperature).logprobs  # (B, T)
        ref_logprobs, _ = reference_logprobs(
            reference, batch, asked, micro_batch_size, temperature
        )  # (B, T)
        kl = kl_estimate(logprobs, ref_logprobs, "k3").sum(1)  # (B,) nats a response
        metrics["kl"] = kl.mean()
        for row, row_kl in zip(samples, kl.tolist()):
            row["kl"] = row_kl

    if is_reviews:
        metrics |= review_metrics(prompt_texts, completions)
    return {f"eval/{name}": float(value) for name, value in metrics.items()}, samples


def diversity(texts: list[str]) -> dict[str, float]:
    """The share of different texts, and of different word pairs (distinct-2, Li 1510.03055)."""
    pairs = []
    for text in texts:
        words = text.split()
        pairs += zip(words, words[1:])
    distinct = len(set(texts)) / len(texts)
    return {"distinct": distinct, "distinct_2": len(set(pairs)) / max(len(pairs), 1)}


def measure(run, args, folder) -> None:
    """Evaluate a run (runs.py) as it is now and write that down: `run.after`, `run.samples_after`.

    If a score is not finite, the reward is left out; before the first step raises NonFiniteReward.
    """
    options = dict(
        **run.sampling, max_prompt_length=run.limits["max_prompt_length"],
        prompts=run.held_out_prompts, reference=run.reference, batch_size=args.batch_size,
        micro_batch_size=args.micro_batch_size, seed=args.seed, is_reviews=args.data == "reviews",
    )  # fmt: skip
    what = run.model, run.tokenizer, run.held_out
    try:
        run.after, samples = evaluate(*what, reward=run.reward, **options)
    except NonFiniteReward as problem:
        if run.step == 0:
            raise  # nothing is lost yet
        tqdm.write(f"step {run.step}: {problem}; this evaluation leaves out the reward")
        run.after, samples = evaluate(*what, reward=None, **options)
    if run.algorithm.measure is not None:
        run.after |= run.algorithm.measure(run, args)
    run.samples_after = samples[:3]
    folder.write(run, "eval", run.after)
    folder.write_samples(run, run.samples_after)


def print_evaluation(run) -> None:
    """The last evaluation of a run and its samples."""
    numbers = [f"{name.removeprefix('eval/')} {value:.3f}" for name, value in run.after.items()]
    tqdm.write(f"step {run.step}  {'  '.join(numbers)}")
    for row in run.samples_after:
        marks = [f"{name} {row[name]:+.2f}" for name in ("score", "kl") if name in row]
        tqdm.write(f"    {one_line(row)}    {'  '.join(marks)}")


def print_summary(run, out: Path) -> None:
    """What changed, in three lines, and the verdict."""
    before, after = run.before, run.after
    changes = []
    if "eval/reward" in after:
        changes.append(f"reward {before['eval/reward']:+.3f} -> {after['eval/reward']:+.3f}")
    if "eval/nll" in after:
        changes.append(f"held-out NLL {before['eval/nll']:.3f} -> {after['eval/nll']:.3f}")
    else:
        changes.append("no target to measure an NLL on")
    if "eval/kl" in after:
        changes.append(f"KL to the reference {after['eval/kl']:.2f} nats a response")
    print(f"{', '.join(changes)}; model in {out / 'final'}")
    for label, samples in (("before", run.samples_before), ("after ", run.samples_after)):
        texts = [one_line(row) for row in samples[:2]]
        print(f"{label}: {' | '.join(texts)}")
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
    prompts, targets = [], []
    for example in examples:
        target = encode_target(tokenizer, example.target)[:-1]  # without EOS
        if target:
            prompts.append(encode_prompt(tokenizer, example))
            targets.append(target)
    batch = make_batch(tokenizer, prompts, targets, min(1024, model.max_positions))
    return math.exp(held_out_nll(model, batch, micro_batch_size=8))


def rows_of(out: str) -> list[dict]:
    """The rows of a run folder's metrics.jsonl. Raises UserError if there are none."""
    rows = read_rows(Path(out) / "metrics.jsonl")
    if not rows:
        raise UserError(f"{out} holds no metrics.jsonl with a complete line")
    return rows


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
    add("--plot", metavar="OUT", help="draw the curves of a run folder to OUT/curves.png")
    add("--perplexity", metavar="MODEL", help="print how well a model predicts the text of --data")
    what = "a file, or hub dataset [configuration [split]]: wikitext wikitext-2-raw-v1 test"
    add("--data", nargs="+", metavar="SOURCE", help=what)
    args = parser.parse_args(argv)
    if args.health is None and args.plot is None and args.perplexity is None:
        raise UserError("say --health OUT, --plot OUT or --perplexity MODEL --data SOURCE")
    if (args.perplexity is None) != (args.data is None):
        raise UserError("--perplexity MODEL and --data SOURCE [CONFIGURATION [SPLIT]] go together")
    if args.perplexity is not None:
        result = perplexity(args.perplexity, whole_texts(args.data))
        print(f"perplexity {result:.2f} a token on {' '.join(args.data)}")
    if args.health is not None:
        print(verdict(rows_of(args.health)))
    if args.plot is not None:
        path = Path(args.plot) / "curves.png"
        plot(rows_of(args.plot), path)
        print(path)


if __name__ == "__main__":
    main(sys.argv[1:])
