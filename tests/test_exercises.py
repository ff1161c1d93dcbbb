"""The exercises: every check passes for the repository's functions, fails for the stubs as they are
delivered, and fails for typical mistakes with the line that names the mistake."""

import doctest
import importlib.util
import inspect
import math
import sys
from collections import Counter

import pytest
import torch
from conftest import ROOT

import dpo
import generate
import grpo
import hybrid
import ppo
import reward_model
import rewards

sys.path.insert(0, str(ROOT / "exercises"))

import exercises

# The checks have the name of this file, so they are loaded under another one.
spec = importlib.util.spec_from_file_location("checks", ROOT / "exercises" / "test_exercises.py")
checks = importlib.util.module_from_spec(spec)
spec.loader.exec_module(checks)

STUBS = dict(inspect.getmembers(exercises, inspect.isfunction))


def place_rewards(kl, mask, kl_coef, scores):
    last = torch.where(mask, torch.arange(mask.shape[1]), -1).max(1).values  # (B,)
    return ppo.place_rewards(kl, mask, kl_coef, ppo.Scores(scores, torch.arange(len(mask)), last))


def sample(lm, prompts, max_new_tokens, eos_token_id, temperature=1.0, generator=None):
    options = dict(max_new_tokens=max_new_tokens, eos_token_id=eos_token_id)
    options |= dict(temperature=temperature, generator=generator)
    return generate.generate(hybrid.HybridModel(lm), prompts, **options).responses


SOLUTIONS = {
    "masked_mean": hybrid.masked_mean,
    "kl_k3": lambda new, ref: ppo.kl_estimate(new, ref, "k3"),
    "compute_gae": ppo.compute_gae,
    "clipped_surrogate": lambda *inputs: ppo.clipped_surrogate(*inputs)[0],
    "place_rewards": place_rewards,
    "sample": sample,
    "bleu": rewards.bleu,
    "bradley_terry_loss": reward_model.reward_model_loss,
    "dpo_loss": lambda pc, pr, rc, rr, beta=0.1: dpo.dpo_loss(pc, pr, rc, rr, beta)[0],
    "group_advantages": grpo.group_advantages,
}


def verdict(name, function, monkeypatch) -> str:
    """The line with which the check of one exercise ends; empty if it passes."""
    monkeypatch.setattr(exercises, name, function)
    try:
        getattr(checks, f"test_{name}")()
    except pytest.fail.Exception as failure:
        assert not failure.pytrace and "\n" not in failure.msg and failure.__context__ is None
        return failure.msg
    return ""


@pytest.mark.parametrize("name", SOLUTIONS)
def test_the_function_of_the_repository_passes_its_check(name, monkeypatch):
    assert verdict(name, SOLUTIONS[name], monkeypatch) == ""


def test_every_exercise_has_a_solution_and_a_check():
    assert set(STUBS) == set(SOLUTIONS)
    tests = {name for name in vars(checks) if name.startswith("test_")}
    assert tests == {f"test_{name}" for name in STUBS}


@pytest.mark.parametrize("name", STUBS)
def test_a_stub_says_what_to_do_and_where_its_solution_stands(name, monkeypatch):
    stub = STUBS[name]
    with pytest.raises(NotImplementedError, match="write me"):
        stub(*[None] * len(inspect.signature(stub).parameters))
    assert verdict(name, stub, monkeypatch).startswith("not written yet")
    file, solution = stub.__doc__.strip().splitlines()[-1].split("`")[1].split(": ")
    assert f"def {solution}(" in (ROOT / file).read_text(encoding="utf-8")


def test_the_examples_of_the_stubs_are_true():
    names = dict(vars(exercises), **SOLUTIONS)
    runner, attempted = doctest.DocTestRunner(), 0
    for test in doctest.DocTestFinder().find(exercises, globs=names):
        runner.run(test)
        attempted += len(test.examples) > 0
    assert runner.summarize(verbose=False).failed == 0 and attempted == 9  # all but `sample`


# ---- typical mistakes


def gae_over_columns(rewards, values, mask, gamma=1.0, lam=0.95):
    """The usual recursion, which takes gaps for states of value 0."""
    advantages, last = torch.zeros_like(values), torch.zeros(len(values))
    values, rewards = values * mask, rewards * mask
    for t in reversed(range(values.shape[1])):
        after = values[:, t + 1] if t + 1 < values.shape[1] else 0.0
        last = rewards[:, t] + gamma * after - values[:, t] + gamma * lam * last
        advantages[:, t] = last
    return advantages * mask, (advantages + values) * mask


def gae_that_ends_at_a_gap(rewards, values, mask, gamma=1.0, lam=0.95):
    """What docs/lesson.md types, whose rows have no gaps."""
    advantages = torch.zeros_like(rewards)
    next_value = next_advantage = torch.zeros(len(rewards))
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantages[:, t] = torch.where(mask[:, t], delta + gamma * lam * next_advantage, 0)
        next_value, next_advantage = torch.where(mask[:, t], values[:, t], 0), advantages[:, t]
    return advantages, torch.where(mask, advantages + values, 0)


def gae_of_the_repository_but(**changes):
    def wrong(rewards, values, mask, gamma=1.0, lam=0.95):
        given = dict(gamma=gamma, lam=lam)
        return ppo.compute_gae(rewards, values, mask, **(given | changes))

    return wrong


def surrogate(new, old, advantages, mask, cliprange=0.2, choose=torch.max):
    ratio = (new - old).exp()
    return choose(-advantages * ratio, -advantages * ratio.clamp(1 - cliprange, 1 + cliprange))


def decode(lm, prompts, max_new_tokens, eos, temperature=1.0, generator=None, *, left, mask, count):
    """A sampler whose padding, mask and positions are as asked; it needs no EOS: greedy rows."""
    width = max(map(len, prompts))
    ids, real = [], []
    for prompt in prompts:
        pad = [0] * (width - len(prompt))
        ids.append(pad + prompt if left else prompt + pad)
        real.append(pad + [1] * len(prompt) if left else [1] * len(prompt) + pad)
    ids, real = torch.tensor(ids), torch.tensor(real)
    while ids.shape[1] < width + max_new_tokens:
        options = {"attention_mask": real} if mask else {}
        positions = (real.cumsum(1) - 1).clamp(min=0)
        options["position_ids"] = positions if count else torch.arange(ids.shape[1])[None]
        with torch.no_grad():
            token = lm(ids, **options).logits[:, -1].argmax(-1, keepdim=True)
        ids, real = torch.cat([ids, token], 1), torch.cat([real, torch.ones_like(token)], 1)
    return ids[:, width:].tolist()


def sampler(**how):
    return lambda *inputs: decode(*inputs, **how)


def without_clipped_counts(hypothesis, references):
    words, known = hypothesis.split(), references[0].split()
    logs, halvings = [], 0
    for n in range(1, 5):
        grams = list(zip(*(words[i:] for i in range(n))))
        have = Counter(zip(*(known[i:] for i in range(n))))
        matches = sum(gram in have for gram in grams)
        halvings += matches == 0
        logs.append(math.log((matches or 1 / 2**halvings) / len(grams)))
    penalty = min(1, math.exp(1 - len(known) / len(words)))
    return penalty * math.exp(sum(logs) / 4)


def group(scores, size, correction=0, wide=False):
    groups = scores.view(size, -1).T if wide else scores.view(-1, size)
    std = groups.std(1, correction=correction, keepdim=True)
    advantages = (groups - groups.mean(1, keepdim=True)) / std
    return (advantages.T if wide else advantages).flatten()


logsigmoid = torch.nn.functional.logsigmoid
MISTAKES = [
    ("masked_mean", lambda x, mask: x.mean(), "counts padding"),
    ("masked_mean", lambda x, mask: (x * mask).mean(), "divided by B*T"),
    ("masked_mean", lambda x, mask: (x * mask).sum() / mask.sum(), "NaN * 0 is NaN"),
    ("masked_mean", lambda x, mask: x[mask].mean(), "0 / 0"),
    ("kl_k3", lambda new, ref: new - ref, "that is k1"),
    ("kl_k3", lambda new, ref: ppo.kl_estimate(ref, new, "k3"), "changed places"),
    ("kl_k3", lambda new, ref: -ppo.kl_estimate(new, ref, "k3"), "the sign is wrong"),
    ("compute_gae", gae_over_columns, "must skip the columns off the mask"),
    ("compute_gae", gae_that_ends_at_a_gap, "a gap is not the end of the response"),
    ("compute_gae", gae_of_the_repository_but(gamma=1.0), "gamma is missing"),
    ("compute_gae", gae_of_the_repository_but(lam=1.0), "found"),
    ("clipped_surrogate", lambda *x: ppo.masked_mean(-x[2] * (x[0] - x[1]).exp(), x[3]), "no clip"),
    ("clipped_surrogate", lambda *x: -SOLUTIONS["clipped_surrogate"](*x), "the sign is wrong"),
    ("clipped_surrogate", lambda *x: surrogate(*x, choose=torch.min).mean(), "the smaller"),
    ("clipped_surrogate", lambda *x: surrogate(*x).mean(), "counts padding"),
    ("clipped_surrogate", lambda *x: SOLUTIONS["clipped_surrogate"](*x[:4]), "not used"),
    ("clipped_surrogate", lambda *x: SOLUTIONS["clipped_surrogate"](*x).detach(), "no gradient"),
    ("place_rewards", lambda kl, mask, c, s: torch.where(mask, s[:, None] - c * kl, 0), "every"),
    ("place_rewards", lambda kl, mask, c, s: place_rewards(kl, mask, -c, s), "KL raises"),
    ("sample", sampler(left=True, mask=True, count=False), "count the padding"),
    ("sample", sampler(left=True, mask=False, count=False), "tokens see the padding"),
    ("sample", sampler(left=True, mask=False, count=True), "unequal lengths"),
    ("sample", sampler(left=False, mask=False, count=False), "on the right"),
    ("sample", sampler(left=True, mask=True, count=True), "no draws from"),
    ("sample", lambda *x: [r[: r.index(x[3])] if x[3] in r else r for r in sample(*x)], "a part"),
    ("bleu", lambda text, references: rewards.bleu(text, references[:1]), "closest length"),
    ("bleu", lambda text, references: rewards.bleu(text, references, 3), "geometric mean"),
    ("bleu", without_clipped_counts, "clipped counts"),
    ("bradley_terry_loss", lambda c, r: -logsigmoid(r - c).mean(), "changed places"),
    ("bradley_terry_loss", lambda c, r: -torch.sigmoid(c - r).log().mean(), "use logsigmoid"),
    ("dpo_loss", lambda pc, pr, rc, rr, beta=0.1: -logsigmoid(beta * (pc - pr)), "reference"),
    ("dpo_loss", lambda *x: SOLUTIONS["dpo_loss"](*x).mean(), "the shape is ()"),
    ("group_advantages", lambda s, n: group(s, n, correction=1), "unbiased"),
    ("group_advantages", lambda s, n: group(s, n, wide=True), "next to each other"),
    ("group_advantages", group, "found"),  # NaN where all scores are equal
]


@pytest.mark.parametrize("number", range(len(MISTAKES)))
def test_a_typical_mistake_is_named(number, monkeypatch):
    name, function, line = MISTAKES[number]
    assert line in verdict(name, function, monkeypatch)
