"""Held-out measurements: how well the model still writes the data, and what the reward thinks of what it writes now.

Left out on purpose: benchmark suites. Called by `train.py` every `--eval-every` steps; it draws from a generator of its own,
so that evaluating more or less often never changes the training run.
"""

import torch

from data import Example, columns_of, decode, demonstration_batch, encode_prompt, make_batch, review_metrics
from generate import generate
from hybrid import HybridModel, score_rows
from ppo import kl_estimate
from sft import sft_loss


@torch.no_grad()
def evaluate(
    model: HybridModel,
    tokenizer,
    examples: list[Example],
    *,
    reward,
    reference: HybridModel | None,
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
    batch = demonstration_batch(tokenizer, examples, max_length).to(device)
    metrics = {"nll": sft_loss(score_rows(model, batch, micro_batch_size).logprobs, batch.response_mask)}

    prompts = [encode_prompt(tokenizer, example)[-(max_length - max_new_tokens) :] for example in examples]
    generator = torch.Generator(device).manual_seed(seed)
    sampling = {"max_new_tokens": max_new_tokens, "eos_token_id": tokenizer.eos_token_id, "temperature": temperature}
    responses = []
    for begin in range(0, len(prompts), batch_size):
        part = prompts[begin : begin + batch_size]
        responses += generate(model, part, generator=generator, **sampling).responses
    completions = [decode(tokenizer, response) for response in responses]
    samples = [{"prompt": e.prompt, "response": completion} for e, completion in zip(examples, completions)]

    words = [completion.split() for completion in completions]
    pairs = [pair for text in words for pair in zip(text, text[1:])]
    metrics["distinct"] = len(set(completions)) / len(completions)
    metrics["distinct_2"] = len(set(pairs)) / max(len(pairs), 1)
    metrics["response_length"] = sum(len(response) for response in responses) / len(responses)
    if reward is not None:
        with reward.frozen():
            scores = reward([example.prompt for example in examples], completions, **columns_of(examples))  # (B,)
        metrics["reward"] = scores.nanmean()
        metrics |= {name: value for name, value in reward.metrics().items() if name.startswith("reward/")}
        for sample, score in zip(samples, scores.tolist()):
            sample["score"] = score
    if reference is not None:
        batch = make_batch(tokenizer, prompts, responses, max_length).to(device)
        ours, theirs = (score_rows(m, batch, micro_batch_size, temperature).logprobs for m in (model, reference))  # (B, T) each
        kl = kl_estimate(ours, theirs, "k3").sum(1)  # (B,) nats a response
        metrics["kl"] = kl.mean()
        for sample, row_kl in zip(samples, kl.tolist()):
            sample["kl"] = row_kl
    if is_reviews:
        metrics |= review_metrics([example.prompt for example in examples], completions)
    return {f"eval/{name}": float(value) for name, value in metrics.items()}, samples
