"""What a model does on examples: the NLL of their targets, and the responses that it samples.

`evaluate` is how train.py measures the held-out examples. `measure_model` is the command below: it
measures a finished model on a file that it was not trained on, with several responses to each
prompt if you like (pass@k). Responses, dialogues too, are sampled and scored by the code that
training samples and scores with. Left out on purpose: benchmark suites.

    python evaluate.py --model out/final --data examples/my_data.jsonl --reward rouge_l
"""

import json
import math
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

import dialogue
import parallel
import survey
from checkpoints import write_text
from cli import bar_pace
from data import (
    Example,
    add_data_flags,
    batch_of,
    data_options,
    demonstration_batch,
    load_examples,
    split_examples,
)
from dialogue import Episode, sample_episodes
from engine import Parser, UserError, number, pick_device
from flags import add_dialogue_flags, limits_of, resolve_length
from hybrid import HybridModel, forward_rows
from ppo import Scores, kl_estimate, score_episodes
from references import ReferenceMixture, reference_logprobs
from rewards import build_reward
from sft import held_out_nll
from tasks import Task, task_of


class Evaluation(NamedTuple):
    """What `evaluate` returns."""

    metrics: dict[str, float]  # named `eval/...`
    samples: list[dict]  # of each episode: prompt as the model reads it, response, score, kl
    episodes: list[Episode]


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
    task: Task | None,
    prompts: list[Example] | None = None,
    turns: int = 1,
    user=None,
    turn_rewards: bool = False,
) -> Evaluation:
    """Measure a model. `nll` is the mean negative log-likelihood of the target tokens of
    `examples`, in nats a token.

    Responses (with `turns` above 1 whole dialogues with `user`) are sampled and scored as in
    training, to `prompts` (None: to the examples), with the same seed at every evaluation. Without
    `reward` or `reference` (None) their metrics are absent.
    """
    metrics = {}
    with_target = [example for example in examples if example.target]
    if with_target:
        room = max_length - turns * max_new_tokens
        batch = demonstration_batch(tokenizer, with_target, max_length, room)
        metrics["nll"] = held_out_nll(model, batch, micro_batch_size)

    # ---- sample
    device = next(model.parameters()).device
    options = dict(
        turns=turns, user=user, max_length=max_length, max_new_tokens=max_new_tokens,
        temperature=temperature,
        generator=torch.Generator(device).manual_seed(seed + parallel.rank()),
    )  # fmt: skip
    asked = examples if prompts is None else prompts
    episodes = []
    # A key-value cache is small beside the activations that a training forward keeps.
    at_once = max(batch_size, 4 * micro_batch_size)
    begins = range(0, len(asked), at_once)
    bar = dict(desc="evaluation", leave=False, delay=3, mininterval=bar_pace())
    for begin in tqdm(begins, **bar, disable=parallel.rank() > 0):
        chunk = asked[begin : begin + at_once]
        episodes += sample_episodes(model, tokenizer, chunk, **options)
    metrics |= diversity([response for episode in episodes for response in episode.responses])
    lengths = [sum(episode.response_mask) for episode in episodes]
    metrics["response_length"] = sum(lengths) / len(lengths)
    if turns > 1:
        metrics["turns"] = sum(len(episode.responses) for episode in episodes) / len(episodes)
    samples = []
    for episode in episodes:
        prompt = survey.as_read(tokenizer, episode.ids[: episode.response_mask.index(True)])
        samples.append({"prompt": prompt, "response": episode.text()})

    # ---- ask the reward
    if reward is not None:
        with reward.frozen():
            scores = score_episodes(episodes, reward, turn_rewards, torch.device("cpu"))
        metrics["reward"] = scores.values.nanmean()
        kinds = "reward/", "reward_metric/"
        metrics |= {n: value for n, value in reward.metrics().items() if n.startswith(kinds)}
        for row, values in zip(samples, finite_scores(scores, len(episodes))):
            if values:  # a judge may have given no answer
                row["score"] = sum(values) / len(values)

    # ---- how far is the policy from the reference?
    if reference is not None:
        rows = [episode.ids for episode in episodes]
        batch = batch_of(tokenizer, rows, [episode.response_mask for episode in episodes])
        batch = batch.to(device)
        logprobs = forward_rows(model, batch, micro_batch_size, temperature).logprobs  # (B, T)
        ref_logprobs, _ = reference_logprobs(
            reference, batch, asked, micro_batch_size, temperature
        )  # (B, T)
        kl = kl_estimate(logprobs, ref_logprobs, "k3").sum(1)  # (B,) nats a response
        metrics["kl"] = kl.mean()
        for row, row_kl in zip(samples, kl.tolist()):
            row["kl"] = row_kl

    if task is not None:
        texts = [episode.text() for episode in episodes]
        metrics |= task.metrics([example.prompt for example in asked], texts)
    metrics = {f"eval/{name}": float(value) for name, value in metrics.items()}
    return Evaluation(metrics, samples, episodes)


def diversity(texts: list[str]) -> dict[str, float]:
    """The share of different texts, and of different word pairs (distinct-2, Li 1510.03055)."""
    pairs = []
    for text in texts:
        words = text.split()
        pairs += zip(words, words[1:])
    distinct = len(set(texts)) / len(texts)
    return {"distinct": distinct, "distinct_2": len(set(pairs)) / max(len(pairs), 1)}


def finite_scores(scores: Scores, n: int) -> list[list[float]]:
    """The finite scores of each of n episodes: one, or with --turn-rewards one for each turn."""
    of_episodes = [[] for _ in range(n)]
    for row, value in zip(scores.rows.tolist(), scores.values.tolist()):
        if math.isfinite(value):
            of_episodes[row].append(value)
    return of_episodes


# -------------------------------------------------------------------------------------- pass@k


def pass_at_k(n: int, c: int, k: int) -> float:
    """The probability that one of k responses passes at least, estimated without bias from n
    responses of which c pass: 1 - C(n - c, k) / C(n, k), k <= n (Chen et al. 2107.03374, eq. 1).

    >>> pass_at_k(n=4, c=1, k=2)  # half of the pairs contain the one that passes
    0.5
    """
    return 1 - math.comb(n - c, k) / math.comb(n, k)


def pass_rates(samples: list[dict], n: int, pass_score: float) -> dict[str, float]:
    """`eval/pass@k` for k = 1, 2, 4, ... up to n, means over prompts; n samples follow each other
    for each prompt. A response passes with a score of at least `pass_score`.

    A prompt with a response that has no score is left out.
    """
    passed = []  # of each prompt, how many responses pass
    for begin in range(0, len(samples), n):
        scores = [row["score"] for row in samples[begin : begin + n] if "score" in row]
        if len(scores) == n:
            passed.append(sum(score >= pass_score for score in scores))
    n_left_out = len(samples) // n - len(passed)
    if n_left_out:
        print(f"note: {n_left_out} prompts have a response without a score: no pass@k for them")
    rates, k = {}, 1
    while passed and k <= n:
        rates[f"eval/pass@{k}"] = sum(pass_at_k(n, c, k) for c in passed) / len(passed)
        k *= 2
    return rates


# ----------------------------------------------------------------------------------- the command


def add_flags(parser: Parser) -> None:
    """The flags that go with `evaluate.py --model`."""
    count = number(int, 1)
    add = parser.add_argument_group("with --model").add_argument
    add("--reward", help="reward expression of train.py, such as rouge_l or my.py:function")
    add("--samples", type=count, default=1, help="responses to each prompt; above 1 with pass@k")
    what = "a response with this score or more passes (default: 1)"
    add("--pass-score", type=number(float, -math.inf), help=what)
    what = "measure only what train.py holds out of --data, for a file that it trained on"
    add("--held-out", action="store_true", help=what)
    add("--json", metavar="FILE", help="write the numbers to this new file too")
    what = "tokens of prompt and response together (default: 1024, or the model's context)"
    add("--max-length", type=number(int, 2), help=what)
    what = "length limit of a response, EOS included"
    add("--max-new-tokens", type=count, default=32, help=what)
    what = "divides the logits; 0 takes the most likely token"
    add("--temperature", type=number(float, 0), default=1.0, help=what)
    add("--batch-size", type=count, default=32, help="rows at a time")
    what = "of sampling: the same seed, the same responses"
    add("--seed", type=number(int, 0, 2**32 - 2), default=0, help=what)
    add("--device", default="auto", help="auto, cuda, mps or cpu")
    add_dialogue_flags(parser)
    add_data_flags(parser.add_argument_group("with --model: how --data is read"))


def measure_model(args) -> dict[str, float]:
    """Measure --model on --data, print a line for each number, write --json. -> the numbers.

    Raises UserError for whatever the user got wrong, before anything is sampled.
    """
    check_flags(args)
    device = parallel.start(pick_device(args.device))
    source = args.data[0] if len(args.data) == 1 else args.data
    examples = load_examples(source, **data_options(args), seed=args.seed)
    model, tokenizer = HybridModel.load(args.model, "--model")
    model.to(device).eval()
    resolve_length(args, model.max_positions)
    dialogue.check_turns(args)
    dialogue.check_replies(args, examples, " ".join(args.data))
    examples = readable(args, tokenizer, examples)
    reward = None if args.reward is None else load_reward(args, model, tokenizer, examples)
    user = dialogue.load_user(args, device)
    temperature = args.temperature
    if temperature > 0:
        temperature = max(temperature, 1e-3)  # below that, rounding errors decide

    metrics, samples, episodes = evaluate(
        model, tokenizer, examples, reward=reward, reference=None, max_length=args.max_length,
        max_new_tokens=args.max_new_tokens, batch_size=args.batch_size, seed=args.seed,
        temperature=temperature,
        micro_batch_size=args.batch_size, task=task_of(source),
        prompts=[example for example in examples for _ in range(args.samples)],
        turns=args.turns, user=user, turn_rewards=args.turn_rewards,
    )  # fmt: skip
    truncated = [hit_the_limit for episode in episodes for hit_the_limit in episode.truncated]
    metrics["eval/eos_rate"] = 1 - sum(truncated) / len(truncated)
    if args.samples > 1 or args.pass_score is not None:
        pass_score = 1.0 if args.pass_score is None else args.pass_score
        metrics |= pass_rates(samples, args.samples, pass_score)
    metrics = {name: value for name, value in metrics.items() if math.isfinite(value)}
    for name, value in metrics.items():
        print(f"{name} {value:.6g}")
    if args.json is not None:
        parallel.on_main(write_text, Path(args.json), json.dumps(metrics, indent=1) + "\n")
    parallel.finish()
    return metrics


def check_flags(args) -> None:
    """Raises UserError for flags that do not go together, and for a --json that cannot be made."""
    if args.reward is None and (args.samples > 1 or args.pass_score is not None):
        raise UserError("--samples and --pass-score are for pass@k, which needs a --reward")
    if args.samples > 1 and args.temperature == 0:
        raise UserError(
            f"--temperature 0 gives {args.samples} equal responses to a prompt; "
            "give a temperature above 0, or leave out --samples"
        )
    path = Path(args.json or "new.json")
    if path.exists():
        raise UserError(f"--json {path} already exists; choose another name")
    if not path.absolute().parent.is_dir():
        raise UserError(f"--json {path}: there is no folder {path.absolute().parent} to put it in")


def readable(args, tokenizer, examples: list[Example]) -> list[Example]:
    """The examples that are measured. What is left out, cut or not written is said."""
    name, n = " ".join(args.data), len(examples)
    if args.held_out:
        train, examples = split_examples(examples)
        survey.say_shared(train, examples, print)
        print(f"measured: {len(examples)} of the {n} examples of {name}, those that are held out")
    else:
        print(f"measured: all {n} examples of {name}; the model should not have trained on them")
    examples = survey.writable(tokenizer, examples, args.strict, print)
    survey.say_read(tokenizer, examples, limits_of(args), print)
    return examples


def load_reward(args, model: HybridModel, tokenizer, examples: list[Example]):
    """The reward of --reward, tried on two examples. Raises UserError if it fails."""
    reward = build_reward(
        args.reward,
        model=model.lm,
        tokenizer=tokenizer,
        device=model.value_head.weight.device,
        documents=[example.prompt for example in examples],
    )
    if reward.state_dict():
        print(
            "note: ema, mixture and your own classes start here without the state that a run gave "
            "them: compare their raw parts"
        )
    reward.try_on(examples)
    return reward
