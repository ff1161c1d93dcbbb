"""How far has a run moved from the model that it began with, and what has it forgotten?

RL's Razor (Shenfeld et al. 2509.04259) finds that forgetting follows one number, whatever the
method: the forward KL of the model before training to the one after it, on the inputs of the new
task. That direction is measured here:

    E over held-out prompts x, responses y ~ start(. | x) of
        sum over tokens t of KL(start(. | x, y_<t) || final(. | x, y_<t))

in nats a response, exact over the whole vocabulary at each token; only prompts and responses are
sampled, once for all runs. Forgetting is the perplexity on another text (`--tax`). Left out on
purpose: the other direction (`eval/kl` has it, to the reference), a curve through the points.

    python compare.py --tax book.txt --out compare-mine -- --model gpt2 --data mine.jsonl
"""

from argparse import Namespace
from pathlib import Path
from typing import NamedTuple

import torch

import survey
from data import Batch, Example, batch_of, data_options, load_examples, split_examples
from dialogue import sample_episodes
from engine import pick_device
from evaluate import perplexity
from hybrid import LOGIT_CHUNK, HybridModel
from runs import read_config

AT_ONCE = 32  # rows that are sampled together
ROWS = 8  # rows of one forward


class Start(NamedTuple):
    """A model before training, and its responses to held-out prompts."""

    model: HybridModel
    responses: Batch
    temperature: float


@torch.no_grad()
def response_kl(start: HybridModel, final: HybridModel, batch: Batch, temperature: float) -> float:
    """KL(start || final) over the vocabulary, summed over the tokens of a response: the mean over
    the rows of the batch, in nats a response. `batch` has responses of `start`."""
    total = 0.0
    for rows in torch.arange(len(batch), device=batch.input_ids.device).split(ROWS):
        part = batch.rows(rows)
        inputs = part.input_ids, part.attention_mask, part.response_mask
        states = [model.states_before(*inputs).split(LOGIT_CHUNK) for model in (start, final)]
        for before, after in zip(*states):  # (n, H) each: never more than (LOGIT_CHUNK, V) logits
            logp = torch.log_softmax(start.logits(before, temperature), dim=-1)  # (n, V)
            logq = torch.log_softmax(final.logits(after, temperature), dim=-1)  # (n, V)
            total += float((logp.exp() * (logp - logq)).sum(-1).double().sum())
    return total / len(batch)


def load_start(config: dict) -> Start:
    """The model that a run (its config.json) began with, and what it answers to held-out prompts.

    The prompts are those of data seed 0, for every run: a hash holds them out, whatever the seed.
    """
    args = Namespace(**config)
    model, tokenizer = HybridModel.load(args.model, "--model")
    model.to(pick_device(args.device)).eval()
    _, held_out = split_examples(load_examples(args.data, **data_options(args), seed=0))
    held_out = survey.writable(tokenizer, held_out, False, _say_nothing)[: args.eval_size]
    generator = torch.Generator(model.value_head.weight.device).manual_seed(0)
    limits = dict(max_length=args.max_length, max_new_tokens=args.max_new_tokens)
    options = dict(**limits, temperature=args.temperature, generator=generator)
    episodes = []
    for begin in range(0, len(held_out), AT_ONCE):
        chunk = held_out[begin : begin + AT_ONCE]
        episodes += sample_episodes(model, tokenizer, chunk, turns=1, **options)
    batch = batch_of(tokenizer, [e.ids for e in episodes], [e.response_mask for e in episodes])
    return Start(model, batch.to(generator.device), args.temperature)


def _say_nothing(line: str) -> None:
    """The run has said what it leaves out."""


def add_tax(finished: list[tuple[Path, dict]], elsewhere: list[Example]) -> None:
    """Add the perplexity elsewhere, before training and after, and the KL from the start to the
    summaries of these run folders. `tiny` has random weights, of which neither says anything; nor
    is there a KL without --data (preferences alone), whose prompts it needs."""
    starts, before = {}, {}
    for folder, summary in finished:
        config = read_config(folder)
        name, final = config["model"], folder / "final"
        summary["perplexity elsewhere"] = perplexity(str(final), elsewhere)
        if name == "tiny" or config["data"] is None:
            continue
        if name not in starts:
            starts[name] = load_start(config)
            before[name] = perplexity(name, elsewhere)
        start = starts[name]
        model, _ = HybridModel.load(str(final))
        model.to(start.responses.input_ids.device).eval()
        kl = response_kl(start.model, model, start.responses, start.temperature)
        summary["KL from the start"] = kl
        summary["before"] |= {"perplexity elsewhere": before[name], "KL from the start": 0.0}
    if not starts:
        print("no razor.png: it needs --data, and a model that does not begin with random weights")
