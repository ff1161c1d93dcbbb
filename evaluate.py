"""Held-out measurements: how well the model still writes the data, and what the reward thinks of what it writes now.

Left out on purpose: benchmark suites. Called by `train.py` every `--eval-every` steps; it draws from a generator of its own,
so that evaluating more or less often never changes the training run.
"""

import torch

from data import Example, decode, encode_prompt, encode_target, make_batch, review_metrics
from generate import generate
from hybrid import HybridModel
from ppo import columns_of, kl_estimate, score_rows


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
    micro_batch_size: int,
    seed: int,
    is_reviews: bool,
) -> tuple[dict[str, float], list[dict]]:
    """-> metrics named `eval/...` and samples (prompt, response, score, kl).

    `nll` is the mean negative log-likelihood of the target tokens, in nats a token. Responses are sampled as in training, the
    same draw at every evaluation. `reward` and `reference` may be None: their metrics are then absent.
    """
    device = next(model.parameters()).device
    prompts = [encode_prompt(tokenizer, example) for example in examples]
    targets = [encode_target(tokenizer, example.target) for example in examples]
    batch = make_batch(tokenizer, prompts, targets, max_length).to(device)
    logprobs = score_rows(model, batch, micro_batch_size, temperature=1.0).logprobs  # (B, T)
    metrics = {"nll": -logprobs.sum() / batch.response_mask.sum()}

    prompts = [ids[-(max_length - max_new_tokens) :] for ids in prompts]
    generator = torch.Generator(device).manual_seed(seed)
    sampling = {"max_new_tokens": max_new_tokens, "eos_token_id": tokenizer.eos_token_id, "temperature": temperature}
    responses = []
    for begin in range(0, len(prompts), micro_batch_size):
        part = prompts[begin : begin + micro_batch_size]
        responses += generate(model, part, generator=generator, **sampling).responses
    completions = [decode(tokenizer, response) for response in responses]
    samples = [{"prompt": e.prompt, "response": completion} for e, completion in zip(examples, completions)]

    words = [completion.split() for completion in completions]
    pairs = [pair for text in words for pair in zip(text, text[1:])]
    metrics["distinct"] = len(set(completions)) / len(completions)
    metrics["distinct_2"] = len(set(pairs)) / max(len(pairs), 1)
    metrics["response_length"] = sum(len(response) for response in responses) / len(responses)
    if reward is not None:
        scores = reward([example.prompt for example in examples], completions, **columns_of(examples))  # (B,)
        metrics["reward"] = scores.mean()
        metrics |= {f"reward/{name}": values.mean() for name, values in reward.parts.items()}
        for sample, score in zip(samples, scores.tolist()):
            sample["score"] = score
    if reference is not None:
        batch = make_batch(tokenizer, prompts, responses, max_length).to(device)
        ours, theirs = (score_rows(m, batch, micro_batch_size, temperature).logprobs for m in (model, reference))  # (B, T) each
        kl = kl_estimate(ours, theirs, "k1").sum(1)  # (B,) nats a response
        metrics["kl"] = kl_estimate(ours, theirs, "k3").sum(1).mean()
        for sample, row_kl in zip(samples, kl.tolist()):
            sample["kl"] = row_kl
    if is_reviews:
        metrics |= review_metrics([example.prompt for example in examples], completions)
    return {f"eval/{name}": float(value) for name, value in metrics.items()}, samples
