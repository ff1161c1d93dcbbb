"""One SFT step, one rollout, one PPO step: exact accumulation, on-policy ratios, guarded
updates, honest statistics."""

import copy
import math
import re

import pytest
import torch
from conftest import REVIEWS, ROOT, build_lm, ragged_batch
from test_ppo_math import gae_by_definition

from data import (
    Batch,
    Example,
    columns_of,
    demonstration_batch,
    encode_prompt,
    encode_target,
    make_batch,
)
from engine import Backend, UserError, apply_gradients
from hybrid import HybridModel
from ppo import Rollout, collect_rollout, ppo_step, update_epochs
from rewards import build_reward
from sft import sft_step

SAMPLING = dict(kl_coef=0.1, max_length=64, max_new_tokens=12)


def adamw(model, lr=1e-2):
    return torch.optim.AdamW(model.parameters(), lr=lr, eps=1e-5, weight_decay=0.1)


class CapturedGradients(torch.optim.SGD):
    """Keeps each step's (clipped) gradients and moves nothing."""

    def step(self):
        self.seen = getattr(self, "seen", [])
        self.seen.append(
            [
                None if p.grad is None else p.grad.clone()
                for g in self.param_groups
                for p in g["params"]
            ]
        )


def assert_same_gradients(left, right):
    assert len(left) == len(right)
    for x, y in zip(left, right):
        assert (x is None) == (y is None)
        if x is not None:
            torch.testing.assert_close(x, y, atol=1e-6, rtol=1e-5)


def random_rollout(model, seed=0) -> Rollout:
    """A rollout with responses of unequal length and old log-probs that differ from the model's, so
    that nothing is trivial."""
    batch = make_batch(None, *ragged_batch(seed), max_length=32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        logprobs = model(batch.input_ids, batch.attention_mask, batch.response_mask).logprobs

    def noise(scale):
        return torch.randn(logprobs.shape, generator=generator) * scale * batch.response_mask

    return Rollout(
        batch.input_ids,
        batch.attention_mask,
        batch.response_mask,
        logprobs + noise(0.2),
        logprobs,
        *(noise(1.0) for _ in range(4)),
    )


@pytest.fixture
def tiny_model(tiny):
    return HybridModel(copy.deepcopy(tiny[0])).train()


def rollout_of(model, tokenizer, reward=None, reference=None, seed=0, n=16, **options):
    """-> rollout, metrics, and what the reward got and said: one (completion, score) a row."""
    reward, seen = reward or build_reward("sentiment"), []

    def recorded(prompts, completions, **columns):
        scores = reward(prompts, completions, **columns)
        seen.extend(zip(completions, scores.tolist()))
        return scores

    generator = torch.Generator().manual_seed(seed)
    options = {**SAMPLING, **options}
    reference = reference or model.frozen_copy()
    return *collect_rollout(
        model, reference, tokenizer, REVIEWS[:n], recorded, generator=generator, **options
    ), seen


# ---- accumulation: 1x8 == 8x1 == 4x2


@pytest.mark.parametrize("micro_batch_size", [1, 2, 3, 8])
def test_sft_gradient_does_not_depend_on_micro_batches(model, micro_batch_size):
    batch = make_batch(None, *ragged_batch(), max_length=32)
    gradients, stats = [], []
    for size in (None, micro_batch_size):
        optimizer = CapturedGradients(model.parameters(), lr=0.1)
        stats.append(
            sft_step(model, batch, optimizer, micro_batch_size=size, max_grad_norm=math.inf)
        )
        gradients += optimizer.seen
    assert_same_gradients(*gradients)
    assert stats[0] == pytest.approx(stats[1], abs=1e-5)


@pytest.mark.parametrize("micro_batch_size", [1, 2, 3, 8])
def test_ppo_gradient_does_not_depend_on_micro_batches(model, micro_batch_size):
    rollout = random_rollout(model)
    gradients, stats = [], []
    for size in (None, micro_batch_size):
        optimizer = CapturedGradients(model.parameters(), lr=0.1)
        options = dict(
            ppo_epochs=1,
            minibatches=2,
            max_grad_norm=math.inf,
            generator=torch.Generator().manual_seed(0),
        )
        stats.append(ppo_step(model, rollout, optimizer, micro_batch_size=size, **options))
        gradients.append(optimizer.seen)
    for left, right in zip(*gradients, strict=True):
        assert_same_gradients(left, right)
    assert stats[0] == pytest.approx(stats[1], abs=1e-5)


def test_a_loss_over_responses_is_weighed_by_responses_as_the_page_of_forks_says(model):
    text = (ROOT / "docs" / "extensions.md").read_text(encoding="utf-8")
    over_tokens = random_rollout(model)
    names = dict(Rollout=Rollout, rollout=over_tokens, advantages=over_tokens.advantages)
    exec(re.search(r"```python\n(class Responses.*?)```", text, re.DOTALL).group(1), names)

    def loss_fn(rows):
        mask = rows.response_mask
        new = model(rows.input_ids, rows.attention_mask, mask).logprobs
        log_ratio = ((new - rows.logprobs) * mask).sum(1) / mask.sum(1)
        loss = -(log_ratio.exp() * rows.advantages.sum(1)).mean()
        return loss, {"policy_loss": loss.detach()}

    def gradients(rollout, micro_batch_size):
        optimizer = CapturedGradients(model.parameters(), lr=0.1)
        options = dict(ppo_epochs=1, minibatches=1, max_grad_norm=math.inf)
        options["micro_batch_size"] = micro_batch_size
        update_epochs(model, rollout, optimizer, loss_fn, **options)
        return optimizer.seen[0]

    over_responses = names["rollout"]
    assert_same_gradients(gradients(over_responses, None), gradients(over_responses, 3))
    with pytest.raises(AssertionError):
        assert_same_gradients(gradients(over_tokens, None), gradients(over_tokens, 3))


def test_every_row_is_used_once_an_epoch_and_minibatches_are_even(model):
    rollout = random_rollout(model)
    seen = []
    original = Batch.rows
    Batch.rows = lambda self, index: seen.append(index.tolist()) or original(self, index)
    try:
        ppo_step(
            model,
            rollout,
            CapturedGradients(model.parameters(), lr=0.1),
            ppo_epochs=3,
            minibatches=3,
        )
    finally:
        Batch.rows = original
    assert [len(rows) for rows in seen] == [3, 3, 2] * 3
    epochs = [sum(seen[i : i + 3], []) for i in (0, 3, 6)]
    assert all(sorted(epoch) == list(range(8)) for epoch in epochs) and epochs[0] != epochs[1]


# ---- SFT


def test_sft_trains_eos_and_target_and_nothing_else(tokenizer, tiny_model):
    """pad == eos here, as in GPT-2: the EOS of every complete target is in the mask, the padding is
    not."""
    examples = [
        Example("the plot was", " dull ."),
        Example("the music", " was really fresh and the cast was warm ."),
    ]
    batch = demonstration_batch(tokenizer, examples, max_length=64)
    for row, mask, example in zip(batch.input_ids, batch.response_mask, examples):
        assert (
            row[mask].tolist() == encode_target(tokenizer, example.target)
            and row[mask][-1] == tokenizer.eos_token_id
        )
        assert row[: mask.nonzero()[0, 0]].tolist() == encode_prompt(tokenizer, example)


def test_sft_leaves_the_value_head_alone(tokenizer, tiny_model):
    torch.nn.init.normal_(tiny_model.value_head.weight)
    before = copy.deepcopy(tiny_model.state_dict())
    optimizer = adamw(tiny_model)
    sft_step(tiny_model, demonstration_batch(tokenizer, REVIEWS[:8], 64), optimizer)
    after = tiny_model.state_dict()
    assert torch.equal(before["value_head.weight"], after["value_head.weight"]), (
        "not even by weight decay"
    )
    assert not torch.equal(before["lm.model.norm.weight"], after["lm.model.norm.weight"])
    assert tiny_model.value_head.weight not in optimizer.state


def test_sft_learns_one_batch_by_heart(tokenizer, tiny_model):
    batch, optimizer = demonstration_batch(tokenizer, REVIEWS[:4], 64), adamw(tiny_model, lr=3e-3)
    losses = [sft_step(tiny_model, batch, optimizer)["sft/loss"] for _ in range(60)]
    assert losses[0] == pytest.approx(math.log(len(tokenizer)), abs=0.3) and losses[-1] < 0.1


# ---- the rollout


def test_kl_is_zero_at_the_first_ppo_step_and_the_ratio_is_one(tokenizer, tiny_model):
    optimizer = adamw(tiny_model)
    for cycle in range(3):  # SFT before every rollout, as in train.py
        sft_step(tiny_model, demonstration_batch(tokenizer, REVIEWS[:8], 64), optimizer)
        rollout, metrics, _ = rollout_of(
            tiny_model, tokenizer, seed=cycle, temperature=0.7, micro_batch_size=5
        )
        assert metrics["ppo/kl"] == metrics["ppo/kl_k1"] == 0.0, (
            "the reference is the policy as it is now"
        )
        assert metrics["ppo/sampler_gap"] < 1e-4
        stats = ppo_step(tiny_model, rollout, optimizer, minibatches=2, temperature=0.7)
        assert stats["ppo/first_ratio_gap"] < 1e-5 and stats["ppo/ratio_gap_max"] > 1e-3


def test_a_rollout_from_before_an_sft_step_is_caught(tokenizer, tiny_model):
    """What H1 forbids: the ratio says so."""
    optimizer = adamw(tiny_model)
    rollout, _, _ = rollout_of(tiny_model, tokenizer)
    sft_step(tiny_model, demonstration_batch(tokenizer, REVIEWS[:8], 64), optimizer)
    assert ppo_step(tiny_model, rollout, optimizer)["ppo/first_ratio_gap"] > 1e-3


def moved_copy(model):
    """A reference that differs from the policy, so that the KL is not 0."""
    reference = model.frozen_copy()
    with torch.no_grad():
        reference.lm.model.norm.weight.add_(0.3)
    return reference


def test_a_rollout_is_what_its_columns_say(tokenizer, tiny_model):
    torch.nn.init.normal_(tiny_model.value_head.weight, std=0.1)
    reference = moved_copy(tiny_model)
    reward = build_reward("length(target=8)")
    rollout, metrics, samples = rollout_of(
        tiny_model, tokenizer, reward, reference, missing_eos_penalty=0.5, max_new_tokens=5
    )
    mask = rollout.response_mask
    ended = torch.tensor(
        [int(row[m][-1]) == tokenizer.eos_token_id for row, m in zip(rollout.input_ids, mask)]
    )
    scores = torch.tensor([score for _, score in samples])
    assert not ended.all(), "with 5 tokens most responses are cut, and pay for it"
    kl = (rollout.logprobs - rollout.ref_logprobs) * mask
    torch.testing.assert_close(
        rollout.rewards.sum(1), scores - 0.5 * ~ended - 0.1 * kl.sum(1), atol=1e-5, rtol=0
    )
    assert metrics["ppo/score"] == pytest.approx(float(scores.mean()), abs=1e-6)
    assert metrics["ppo/reward"] == pytest.approx(float(rollout.rewards.sum(1).mean()), abs=1e-5)
    assert (
        metrics["ppo/kl_k1"] == pytest.approx(float(kl.sum(1).mean()), abs=1e-4)
        and metrics["ppo/kl"] >= 0
    )
    assert metrics["ppo/eos_rate"] == pytest.approx(float(ended.float().mean()))
    assert rollout.advantages[mask].mean().abs() < 1e-5 and rollout.advantages[mask].std(
        unbiased=False
    ) == pytest.approx(1, abs=1e-3)
    for (completion, _), row, m in zip(samples, rollout.input_ids, mask):
        assert completion == tokenizer.decode(row[m], skip_special_tokens=True)


UNFRIENDLY = dict(
    kl_coef=0.3, temperature=0.7, gamma=0.9, lam=0.6, kl_estimator="k2", missing_eos_penalty=0.4
)


@pytest.mark.parametrize("options", [{}, UNFRIENDLY, {**UNFRIENDLY, "whiten_rewards": True}])
def test_rewards_and_advantages_follow_from_the_other_columns(tokenizer, tiny_model, options):
    """In Python floats, row by row, from what the rollout holds and what the reward has said."""
    torch.nn.init.normal_(tiny_model.value_head.weight, std=0.3)
    reference = moved_copy(tiny_model)
    reward = build_reward("length(target=3)")
    rollout, metrics, samples = rollout_of(
        tiny_model, tokenizer, reward, reference, n=7, max_new_tokens=5, **options
    )
    mask, ids = rollout.response_mask, rollout.input_ids
    coefficient = options.get("kl_coef", SAMPLING["kl_coef"])
    rewards = torch.zeros_like(rollout.rewards)
    for i, (_, score) in enumerate(samples):
        columns = mask[i].nonzero().flatten().tolist()
        for t in columns:
            d = float(rollout.logprobs[i, t] - rollout.ref_logprobs[i, t])
            rewards[i, t] = -coefficient * (d * d / 2 if options else d)
        cut = int(ids[i, columns[-1]]) != tokenizer.eos_token_id
        rewards[i, columns[-1]] += score - cut * options.get("missing_eos_penalty", 0)
    assert metrics["ppo/reward"] == pytest.approx(float(rewards.sum(1).mean()), abs=1e-4)
    assert metrics["ppo/kl_coef"] == coefficient and "ppo/turns" not in metrics
    if "whiten_rewards" in options:  # of unit variance; the mean stays
        mean, std = rewards[mask].mean(), rewards[mask].std(unbiased=False)
        rewards[mask] = (rewards[mask] - mean) / std + mean
    torch.testing.assert_close(rollout.rewards, rewards, atol=1e-4, rtol=0)
    gamma, lam = options.get("gamma", 1.0), options.get("lam", 0.95)
    advantages = gae_by_definition(rewards, rollout.values, mask, gamma, lam)
    expected = (advantages + rollout.values) * mask
    torch.testing.assert_close(rollout.returns, expected, atol=1e-4, rtol=0)
    white = (advantages - advantages[mask].mean()) / advantages[mask].std(unbiased=False)
    torch.testing.assert_close(rollout.advantages, white * mask, atol=1e-3, rtol=0)
    temperature = options.get("temperature", 1.0)
    with torch.no_grad():
        scores = tiny_model(ids, rollout.attention_mask, mask, temperature)
    torch.testing.assert_close(rollout.logprobs, scores.logprobs, atol=1e-4, rtol=0)
    assert metrics["ppo/entropy"] == pytest.approx(float(scores.entropy[mask].mean()), abs=1e-4)
    assert metrics["ppo/sampler_gap"] < 1e-4


def test_a_row_scores_the_same_in_any_company(tokenizer, tiny_model):
    rollout, metrics, _ = rollout_of(tiny_model, tokenizer)
    again, metrics_again, _ = rollout_of(tiny_model, tokenizer, micro_batch_size=3)
    torch.testing.assert_close(rollout.logprobs, again.logprobs, atol=1e-5, rtol=0)
    assert metrics == pytest.approx(metrics_again, abs=1e-4)


def test_token_ids_are_never_read_back_from_text(tokenizer, tiny_model):
    """A random model emits ids that do not survive decode and encode; the rollout must hold the
    sampled ones."""
    rollout, metrics, samples = rollout_of(tiny_model, tokenizer)
    rows = [row[mask].tolist() for row, mask in zip(rollout.input_ids, rollout.response_mask)]
    round_trip = [
        tokenizer(completion, add_special_tokens=False).input_ids for completion, _ in samples
    ]
    assert any(ids[: len(row)] != row[: len(ids)] for ids, row in zip(round_trip, rows)), (
        "otherwise this test shows nothing"
    )
    assert metrics["ppo/sampler_gap"] < 1e-4


def test_an_immediate_eos_is_an_empty_response_with_a_score(tokenizer, tiny_model):
    with torch.no_grad():  # a model that says nothing: EOS (id 0) wins everywhere
        tiny_model.lm.model.norm.weight.zero_()
        tiny_model.lm.lm_head = torch.nn.Linear(192, len(tokenizer))
        tiny_model.lm.lm_head.bias.copy_(torch.eye(len(tokenizer))[0] * 50)
    rollout, metrics, samples = rollout_of(tiny_model, tokenizer)
    assert {completion for completion, _ in samples} == {""} and metrics["ppo/response_length"] == 1
    assert (
        rollout.response_mask.sum(1).tolist() == [1] * 16
        and torch.isfinite(rollout.advantages).all()
    )
    stats = ppo_step(tiny_model, rollout, adamw(tiny_model))
    assert stats["ppo/skipped_steps"] == 0


def test_prompts_lose_their_oldest_tokens_when_there_is_no_room(tokenizer, tiny_model):
    rollout, _, _ = rollout_of(tiny_model, tokenizer, max_length=6, max_new_tokens=4)
    for row, mask, example in zip(rollout.input_ids, rollout.response_mask, REVIEWS):
        prompt = row[: int(mask.nonzero()[0, 0])].tolist()
        assert prompt == encode_prompt(tokenizer, example)[-2:]


def test_a_response_without_a_score_teaches_nothing(tokenizer, tiny_model):
    """What a judge could not grade is taken off the mask: the gradient is that of the rollout
    without those rows."""

    def reward(prompts, completions, **columns):
        return torch.tensor([math.nan if i % 3 == 0 else 0.1 * i for i in range(len(completions))])

    torch.nn.init.normal_(tiny_model.value_head.weight, std=0.1)
    rollout, metrics, _ = rollout_of(tiny_model, tokenizer, reward, n=9)
    assert metrics["ppo/unscored"] == pytest.approx(1 / 3) and metrics[
        "ppo/score"
    ] == pytest.approx((0.1 + 0.2 + 0.4 + 0.5 + 0.7 + 0.8) / 6)
    kept = rollout.rows(torch.tensor([1, 2, 4, 5, 7, 8]))
    gradients = []
    for rows in (rollout, kept):
        optimizer = CapturedGradients(tiny_model.parameters(), lr=0.1)
        ppo_step(tiny_model, rows, optimizer, ppo_epochs=1, minibatches=1, max_grad_norm=math.inf)
        gradients += optimizer.seen
    assert_same_gradients(*gradients)
    nothing, metrics, _ = rollout_of(
        tiny_model, tokenizer, lambda *a, **k: torch.full((16,), math.nan)
    )
    stats = ppo_step(
        tiny_model,
        nothing,
        CapturedGradients(tiny_model.parameters(), lr=0.1),
        ppo_epochs=1,
        minibatches=1,
    )
    assert metrics["ppo/unscored"] == 1 and stats == {"ppo/skipped_steps": 0}


def test_columns_reach_the_reward_by_name():
    examples = [Example("a", "b", {"topic": "x"}), Example("c", "d", {"level": 3})]
    assert columns_of(examples) == {"topic": ["x", None], "level": [None, 3], "target": ["b", "d"]}


# ---- the update


@pytest.mark.slow
def test_ppo_learns_to_praise(tokenizer, tiny_model):
    """The whole chain has the right sign: the probability of a rewarded token rises."""

    def reward(prompts, completions, **columns):
        return torch.tensor([1.0 * ("warm" in text) for text in completions])

    reference, optimizer = tiny_model.frozen_copy(), adamw(tiny_model, lr=3e-3)
    for _ in range(10):
        sft_step(tiny_model, demonstration_batch(tokenizer, REVIEWS[:32], 64), optimizer)
    scores = []
    for cycle in range(25):
        rollout, metrics, _ = rollout_of(
            tiny_model, tokenizer, reward, reference, seed=cycle, n=32, kl_coef=0.0
        )
        ppo_step(tiny_model, rollout, optimizer, ppo_epochs=2, minibatches=2)
        scores.append(metrics["ppo/score"])
    assert sum(scores[-5:]) / 5 > sum(scores[:5]) / 5 + 0.3, scores


def test_target_kl_stops_the_epochs(model):
    rollout = random_rollout(model)
    free = ppo_step(
        copy.deepcopy(model), rollout, CapturedGradients(model.parameters(), lr=0.1), ppo_epochs=4
    )
    tight = ppo_step(
        copy.deepcopy(model),
        rollout,
        CapturedGradients(model.parameters(), lr=0.1),
        ppo_epochs=4,
        target_kl=1e-6,
    )
    assert free["ppo/epochs"] == 4 and tight["ppo/epochs"] == 1


def test_the_norm_is_that_before_the_clip(model):
    batch = make_batch(None, *ragged_batch(), max_length=32)
    norms = []
    for limit in (math.inf, 0.01):
        optimizer = CapturedGradients(model.parameters(), lr=0.1)
        norms.append(sft_step(model, batch, optimizer, max_grad_norm=limit)["sft/grad_norm"])
        clipped = torch.stack([g.norm() for g in optimizer.seen[0] if g is not None]).norm()
        assert clipped == pytest.approx(min(norms[0], limit), rel=1e-3)
    assert norms[0] == pytest.approx(norms[1]) and norms[0] > 0.01


def test_a_gradient_that_is_not_finite_never_reaches_the_weights(model):
    optimizer = adamw(model)
    batch = make_batch(None, *ragged_batch(), max_length=32)
    sft_step(model, batch, optimizer)
    weights, state = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    for bad in (math.nan, math.inf):
        next(model.parameters()).grad = torch.full_like(next(model.parameters()), bad)
        assert apply_gradients(Backend(model), optimizer, 1.0) == {"skipped_steps": 1.0}
    assert all(torch.equal(x, weights[name]) for name, x in model.state_dict().items())
    assert str(optimizer.state_dict()) == str(state) and next(model.parameters()).grad is None


def test_a_nan_reward_is_named_before_any_update(tokenizer, tiny_model, tmp_path):
    (tmp_path / "bad.py").write_text(
        "def nan(prompts, completions, **kw):\n    return [float('nan')] * len(completions)\n"
    )
    with pytest.raises(UserError, match="reward 'nan' gave nan"):
        rollout_of(tiny_model, tokenizer, build_reward(f"{tmp_path}/bad.py:nan"))


def test_one_optimiser_counts_the_steps_of_both_phases(tokenizer, tiny_model):
    optimizer = adamw(tiny_model)
    sft_step(tiny_model, demonstration_batch(tokenizer, REVIEWS[:8], 64), optimizer)
    rollout, _, _ = rollout_of(tiny_model, tokenizer)
    ppo_step(tiny_model, rollout, optimizer, ppo_epochs=2, minibatches=3)
    sft_step(tiny_model, demonstration_batch(tokenizer, REVIEWS[:8], 64), optimizer)
    steps = {name: int(optimizer.state[p]["step"]) for name, p in tiny_model.named_parameters()}
    assert steps.pop("value_head.weight") == steps.pop("value_head.bias") == 6
    assert set(steps.values()) == {8}


def test_a_reference_may_be_another_model_and_keeps_still(tokenizer, tiny_model):
    reference = HybridModel(build_lm("gpt2", seed=5, vocab_size=len(tokenizer))).frozen_copy()
    before = copy.deepcopy(reference.state_dict())
    rollout, metrics, _ = rollout_of(tiny_model, tokenizer, reference=reference)
    ppo_step(tiny_model, rollout, adamw(tiny_model))
    assert metrics["ppo/kl"] > 0.1 and all(
        torch.equal(x, before[name]) for name, x in reference.state_dict().items()
    )
