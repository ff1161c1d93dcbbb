"""DPO and GRPO, the two forks: closed forms, the papers' gradients, and what they learn."""

import copy
import json
import math
from fractions import Fraction
from types import SimpleNamespace

import pytest
import torch
from conftest import build_lm, ragged_batch

from data import BLAME, PRAISE, Pair, is_fluent_review, make_batch, make_reviews, review_pairs
from dpo import PairBatch, dpo_loss, dpo_step, measure_pairs, preference_batch, preference_pairs
from engine import UserError
from flags import parse_args
from grpo import group_advantages, grpo_loss, grpo_step
from hybrid import HybridModel
from ppo import Rollout, kl_estimate
from references import ReferenceMixture
from runs import read_rows
from train import main


def test_dpo_loss_is_the_formula():
    """-log sigmoid(beta * ((pi_w - ref_w) - (pi_l - ref_l))) in plain doubles; its two limits."""
    numbers = [
        (-3.0, -4.0, -3.5, -3.0),
        (-10.0, -1.0, -2.0, -9.0),
        (-1.0, -1.0, -1.0, -1.0),
        (-700.0, -1.0, -1.0, -700.0),
    ]
    for beta, smoothing in ((0.1, 0.0), (0.5, 0.1)):
        losses, chosen, rejected = dpo_loss(*torch.tensor(numbers).double().T, beta, smoothing)
        for i, (pc, pr, rc, rr) in enumerate(numbers):
            margin = beta * ((pc - rc) - (pr - rr))
            expected = (1 - smoothing) * math.log1p(math.exp(-margin)) + smoothing * (
                math.log1p(math.exp(-abs(margin))) + max(margin, 0)
            )
            assert losses[i].item() == pytest.approx(expected, rel=1e-9)
            assert chosen[i].item() == pytest.approx(beta * (pc - rc)) and rejected[
                i
            ].item() == pytest.approx(beta * (pr - rr))


def test_dpo_gradient_is_that_of_the_paper():
    """Section 4: -beta * sigmoid(r_l - r_w) * (grad log pi(w) - grad log pi(l))."""
    policy = torch.tensor([[-3.0, -5.0], [-2.0, -1.0]], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([[-4.0, -4.0], [-2.0, -2.5]], dtype=torch.float64)
    losses, chosen, rejected = dpo_loss(
        policy[:, 0], policy[:, 1], reference[:, 0], reference[:, 1], beta=0.3
    )
    losses.sum().backward()
    expected = -0.3 * torch.sigmoid(rejected - chosen)
    torch.testing.assert_close(policy.grad, torch.stack([expected, -expected], dim=1))
    assert not chosen.requires_grad


def test_dpo_loss_equals_trls_where_it_is_installed():
    trl = pytest.importorskip("trl", reason="trl is an optional package")
    if not hasattr(trl.DPOTrainer, "dpo_loss"):
        pytest.skip("this TRL keeps its loss inside compute_loss")
    trainer = trl.DPOTrainer.__new__(trl.DPOTrainer)
    vars(trainer).update(
        beta=0.2,
        label_smoothing=0.1,
        loss_type="sigmoid",
        reference_free=False,
        accelerator=type("A", (), {"device": "cpu"}),
    )
    logps = torch.randn(4, 50)
    for ours, theirs in zip(
        dpo_loss(*logps, beta=0.2, label_smoothing=0.1), trainer.dpo_loss(*logps)
    ):
        torch.testing.assert_close(ours, theirs)


def pair_batch(model, rows: int = 5) -> PairBatch:
    prompts, chosen = ragged_batch(0, rows)
    _, rejected = ragged_batch(1, rows)
    batch = make_batch(None, prompts * 2, chosen + rejected, max_length=32)
    noise = (
        torch.randn(batch.input_ids.shape, generator=torch.Generator().manual_seed(2))
        * batch.response_mask
    )
    with torch.no_grad():
        reference = (
            model(batch.input_ids, batch.attention_mask, batch.response_mask).logprobs + 0.3 * noise
        )
    return PairBatch(**vars(batch), ref_logprobs=reference)


def test_dpo_step_pairs_the_right_rows_whatever_the_micro_batches():
    """The gradient against the loss written out on full rows; pairs must stay together when they
    are split and sorted by length."""
    model = HybridModel(build_lm("llama"))
    batch = pair_batch(model)
    logps = model(batch.input_ids, batch.attention_mask, batch.response_mask).logprobs.sum(1)
    ref = batch.ref_logprobs.sum(1)
    margin = 0.2 * ((logps[:5] - ref[:5]) - (logps[5:] - ref[5:]))
    loss = torch.log1p(torch.exp(-margin)).mean()
    loss.backward()
    expected = [p.grad.clone() for p in model.lm.parameters()]
    model.zero_grad()
    for micro in (None, 1, 2):
        twin = copy.deepcopy(model)
        metrics = dpo_step(
            twin,
            batch,
            torch.optim.SGD(twin.parameters(), lr=1.0),
            beta=0.2,
            micro_batch_size=micro,
            max_grad_norm=1e9,
        )
        assert metrics["dpo/loss"] == pytest.approx(loss.item(), rel=1e-5)
        assert metrics["dpo/accuracy"] == pytest.approx((margin > 0).float().mean().item())
        assert metrics["dpo/margin"] == pytest.approx(
            metrics["dpo/chosen_reward"] - metrics["dpo/rejected_reward"], abs=1e-6
        )
        for before, after, gradient in zip(model.lm.parameters(), twin.lm.parameters(), expected):
            torch.testing.assert_close(before - after, gradient, atol=1e-6, rtol=1e-4)


def test_a_pair_is_two_rows_and_as_long_as_its_longer_one():
    """Lengths of prompt, chosen, rejected: 2, 3, 1; 1, 2, 5; 3, 1, 4."""
    prompts, chosen, rejected = [[5, 6], [5], [5, 6, 7]], [[8] * 3, [8] * 2, [8]], [[9], [9] * 5]
    batch = make_batch(None, prompts * 2, [*chosen, *rejected, [9] * 4], max_length=32)
    reference = torch.arange(6.0)[:, None] * batch.response_mask
    pairs = PairBatch(**vars(batch), ref_logprobs=reference)
    assert len(pairs) == 3 and pairs.lengths().tolist() == [5, 6, 7]
    index = torch.tensor([2, 0])
    assert pairs.weight(index) == 2.0
    part = pairs.rows(index)
    assert part.input_ids[:, 1:5].tolist() == [
        [6, 7, 8, 0],
        [6, 8, 8, 8],
        [6, 7, 9, 9],
        [6, 9, 0, 0],
    ]
    assert part.ref_logprobs.max(1).values.tolist() == [2, 0, 5, 3] and len(part) == 2


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_what_a_step_reports_pair_by_pair(smoothing):
    model = HybridModel(build_lm("llama"))
    batch = pair_batch(model, rows=4)
    batch.ref_logprobs[3] -= 1.3 * batch.response_mask[3]  # surely a win
    with torch.no_grad():
        inputs = batch.input_ids, batch.attention_mask, batch.response_mask
        rewards = (0.7 * (model(*inputs).logprobs - batch.ref_logprobs).sum(1)).tolist()
    chosen, rejected = rewards[:4], rewards[4:]
    losses = []
    for margin in [c - r for c, r in zip(chosen, rejected)]:
        swapped = math.log1p(math.exp(-abs(margin))) + max(margin, 0)
        losses.append((1 - smoothing) * (swapped - margin) + smoothing * swapped)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    options = dict(beta=0.7, micro_batch_size=3)
    if smoothing:
        options["label_smoothing"] = smoothing
    metrics = dpo_step(model, batch, optimizer, **options)
    wins = sum(c > r for c, r in zip(chosen, rejected))
    assert 0 < wins < 4 and metrics["dpo/accuracy"] == pytest.approx(wins / 4)
    assert metrics["dpo/loss"] == pytest.approx(sum(losses) / 4, rel=1e-4)
    assert metrics["dpo/chosen_reward"] == pytest.approx(sum(chosen) / 4, rel=1e-4)
    assert metrics["dpo/rejected_reward"] == pytest.approx(sum(rejected) / 4, rel=1e-4)
    margin = (sum(chosen) - sum(rejected)) / 4
    assert metrics["dpo/margin"] == pytest.approx(margin, rel=1e-4)


PAIRS = [
    Pair("the plot was", " warm .", " dull and flat ."),
    Pair("the music", " was really fresh .", " was weak ."),
    Pair("the cast was quite", " moving and clever .", " boring ."),
    Pair("the ending", " was good .", " was bad and slow ."),
    Pair("the", " story was sharp .", " story was messy ."),
]


def a_policy_and_a_reference(tiny) -> tuple[HybridModel, HybridModel]:
    policy = HybridModel(copy.deepcopy(tiny[0]))
    reference = policy.frozen_copy()
    with torch.no_grad():
        reference.lm.model.norm.weight.add_(torch.linspace(-0.9, 0.7, 192))
    return policy, reference


def test_held_out_pairs_are_measured_one_by_one(tiny):
    """Three batches, the last with one pair; the numbers of a batch of one pair at a time."""
    (policy, reference), tokenizer = a_policy_and_a_reference(tiny), tiny[1]
    margins = []
    for pair in PAIRS:
        pair_alone = preference_batch(tokenizer, reference, [pair], 64)
        step = dpo_step(policy, pair_alone, torch.optim.SGD(policy.parameters(), lr=0.0), beta=0.3)
        margins.append(step["dpo/margin"])
    wins = sum(margin > 0 for margin in margins)
    assert 0 < wins < 5, "otherwise a turned sign does not show"
    run = SimpleNamespace(
        model=policy, reference=reference, tokenizer=tokenizer, held_out_pairs=PAIRS,
        limits={"max_length": 64},
    )  # fmt: skip
    args = SimpleNamespace(batch_size=2, micro_batch_size=3, beta=0.3)
    metrics = measure_pairs(run, args)
    assert metrics["eval/preference_accuracy"] == wins / 5
    assert metrics["eval/preference_margin"] == pytest.approx(sum(margins) / 5, rel=1e-4)
    run.reference, run.held_out_pairs = policy.frozen_copy(), PAIRS
    metrics = measure_pairs(run, args)
    assert metrics["eval/preference_accuracy"] == 0, "equal rewards are no win"
    for change in ({"reference": None}, {"held_out_pairs": []}):
        assert measure_pairs(SimpleNamespace(**{**vars(run), **change}), args) == {}


def test_a_prompt_of_a_length_of_its_own_and_answers_cut_to_what_remains(tiny):
    _, tokenizer = tiny
    pair = Pair("the plot was and the cast was", " warm .", " dull and flat and boring and weak .")
    batch = preference_batch(tokenizer, HybridModel(tiny[0]), [pair], 9, max_prompt_length=4)
    prompt = tokenizer(pair.prompt).input_ids[-4:]
    rows = [ids[real].tolist() for ids, real in zip(batch.input_ids, batch.attention_mask)]
    assert rows[0] == prompt + tokenizer(" warm .").input_ids + [tokenizer.eos_token_id]
    assert rows[1] == prompt + tokenizer(pair.rejected).input_ids[:5]


def test_a_reference_that_is_a_mixture_scores_both_sides(tiny):
    (policy, reference), tokenizer = a_policy_and_a_reference(tiny), tiny[1]
    mixture = ReferenceMixture({"a": policy, "b": reference}, {"a": 1.0, "b": 1.0})
    named = [
        Pair(pair.prompt, pair.chosen, pair.rejected, columns={"reference": name})
        for pair, name in zip(PAIRS, "abaab")
    ]
    batch = preference_batch(tokenizer, mixture, named, 64, micro_batch_size=3)
    for i, name in enumerate("abaababaab"):
        alone = preference_batch(tokenizer, {"a": policy, "b": reference}[name], PAIRS, 64)
        torch.testing.assert_close(batch.ref_logprobs[i], alone.ref_logprobs[i], atol=1e-4, rtol=0)


def test_where_preferences_come_from(tmp_path):
    assert parse_args(["--beta", "0.001"]).beta == 0.001
    with pytest.raises(UserError, match="--beta: expected a number above 0"):
        parse_args(["--beta", "0"])
    path = tmp_path / "p.jsonl"
    rows = [{"prompt": f"q{i}", "chosen": "yes", "rejected": "no"} for i in range(3)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    args = SimpleNamespace(
        preference_data=str(path), data=None, algorithm="dpo", encoding="utf-8", strict=False,
        raw=False, template_args={},
    )  # fmt: skip
    assert [pair.prompt for pair in preference_pairs(args)] == ["q0", "q1", "q2"]
    args.preference_data = str(tmp_path / "none.jsonl")
    with pytest.raises(UserError, match="--preference-data .*none.jsonl"):
        preference_pairs(args)
    args.preference_data = None
    assert preference_pairs(args) == []
    args.data = "reviews"
    assert preference_pairs(args) == []
    args.data = "d.jsonl"
    with pytest.raises(UserError, match="give --preference-data"):
        preference_pairs(args)


def test_preferences_are_encoded_like_demonstrations(tiny):
    lm, tokenizer = tiny
    model = HybridModel(lm)
    batch = preference_batch(
        tokenizer, model, [Pair("the plot was", " warm .", " dull and flat .")], max_length=64
    )
    rows = [ids[mask].tolist() for ids, mask in zip(batch.input_ids, batch.attention_mask)]
    assert rows[0] == tokenizer("the plot was").input_ids + tokenizer(" warm .").input_ids + [
        tokenizer.eos_token_id
    ]
    assert rows[1][-1] == tokenizer.eos_token_id and len(batch) == 1
    metrics = dpo_step(model, batch, torch.optim.SGD(model.parameters(), lr=0.0))
    assert metrics["dpo/loss"] == pytest.approx(math.log(2), abs=1e-5), (
        "policy and reference are equal"
    )
    assert metrics["dpo/accuracy"] == 0, "a tie is no win"


def test_built_in_pairs_differ_in_their_judgement_alone():
    for pair in review_pairs(make_reviews(200)):
        assert is_fluent_review(pair.prompt + pair.chosen) and is_fluent_review(
            pair.prompt + pair.rejected
        )
        assert not set(pair.chosen.split()) & set(BLAME) and not set(pair.rejected.split()) & set(
            PRAISE
        )


@pytest.mark.slow
def test_dpo_learns_the_preference_in_a_whole_run(tmp_path):
    flags = (
        "--algorithm dpo --limit 300 --steps 40 --sft-warmup 10 --batch-size 16 "
        "--eval-size 16 --max-new-tokens 12 --device cpu --save-every 0 --eval-every 0"
    )
    main([*flags.split(), "--out", str(tmp_path / "run")])
    rows = [row for row in read_rows(tmp_path / "run" / "metrics.jsonl") if row["phase"] == "dpo"]
    assert (
        len(rows) == 15
        and rows[0]["dpo/loss"] == pytest.approx(math.log(2), abs=1e-4)
        and rows[-1]["dpo/accuracy"] > 0.9
    )


# ---- GRPO


def test_group_advantages_by_hand():
    scores = torch.tensor([1.0, 2.0, 6.0, 5.0, 5.0, 5.0, 0.0, float("nan"), 2.0])
    std = (14 / 3) ** 0.5
    expected = [-2 / std, -1 / std, 3 / std, 0, 0, 0, -1, 0, 1]
    assert group_advantages(scores, 3).tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("size", [2, 3, 6, 7, 12, 16, 33])
def test_equal_scores_have_no_advantage_at_any_scale(size):
    """The float mean of equal numbers often differs from them by one unit in the last place."""
    generator = torch.Generator().manual_seed(size)
    for scale in (1e-30, 1e-6, 0.1, 1.0, 87.3, 1e3, 1e6, 1e30):
        scores = (torch.randn(500, generator=generator) * scale).repeat_interleave(size)
        assert not group_advantages(scores, size).any(), scale
        scores[::size] = math.nan  # the others of the group still are equal
        assert not group_advantages(scores, size).any(), scale


@pytest.mark.parametrize("center, step", [(87.3, 2.0**-17), (1e-20, 1e-25), (-3e6, 0.25)])
def test_scores_that_differ_a_little_keep_their_advantage(center, step):
    """Against the definition in exact fractions, of the float32 numbers as they are."""
    places = torch.tensor([0.0, 3.0, 1.0, 0.0, 7.0, 2.0, 5.0])
    scores = torch.cat([center + step * places, torch.full((7,), center)])
    exact = [Fraction(score) for score in scores[:7].tolist()]
    mean = sum(exact) / 7
    std = math.sqrt(sum((x - mean) ** 2 for x in exact) / 7)
    expected = [float(x - mean) / std for x in exact] + [0.0] * 7
    assert group_advantages(scores, 7).tolist() == pytest.approx(expected, abs=1e-5)


def test_the_same_scores_of_turns_in_other_columns_have_no_advantage(monkeypatch):
    """0.1 + 0.2 + 0.3 depends on the order of the sum: the order must not follow the columns."""
    generator = torch.Generator().manual_seed(0)
    rewards = torch.zeros(64, 40)
    for row in rewards:
        columns = torch.randperm(40, generator=generator)[:5]
        row[columns] = torch.tensor([10.1, 20.2, 30.3, -0.7, 1e-3])
    assert len(rewards.sum(1).unique()) > 1, "the plain sum must show the fault"
    zero, mask = torch.zeros_like(rewards), torch.ones_like(rewards, dtype=torch.bool)
    rollout = Rollout(zero.long(), mask, mask, zero, zero, zero, rewards, zero, zero)
    seen = []
    monkeypatch.setattr("grpo.update_epochs", lambda model, r, *args, **kw: seen.append(r) or {})
    grpo_step(None, rollout, None, group_size=64)
    assert not seen[0].advantages.any()


def test_a_step_compares_the_sums_of_rows_within_their_group(monkeypatch):
    """Two prompts, three responses each; the second response has no score."""
    mask = torch.tensor(
        [[0, 1, 1, 0], [0] * 4, [0, 0, 1, 0], [0, 1, 1, 1], [0, 1, 0, 1], [0, 1] * 2]
    )
    rewards = torch.zeros(6, 4)
    rewards[:, 3] = torch.tensor([0.7, 0.0, -0.4, 1.1, 2.3, -0.2])
    rewards[:, 1] = torch.tensor([0.5, 0.0, 0.0, -0.3, 0.1, 0.4])
    zero, mask = torch.zeros(6, 4), mask.bool()
    rollout = Rollout(zero.long(), mask | True, mask, zero, zero, zero, rewards, zero, zero)
    seen = []
    monkeypatch.setattr("grpo.update_epochs", lambda m, r, o, f, **kw: seen.append((r, kw)) or {})
    metrics = grpo_step(None, rollout, None, group_size=3)
    grpo_step(None, rollout, None, group_size=3, ppo_epochs=3, minibatches=4, target_kl=0.5)
    sums = [0.8, 2.4, 0.2]  # of the second group; the first has 1.2 and -0.4
    mean = sum(sums) / 3
    std = math.sqrt(sum((x - mean) ** 2 for x in sums) / 3)
    expected = torch.tensor([1.0, 0.0, -1.0, *[(x - mean) / std for x in sums]])[:, None] * mask
    torch.testing.assert_close(seen[0][0].advantages, expected, atol=1e-5, rtol=0)
    assert metrics == {"grpo/group_std": pytest.approx(std)}, "only of the group that is complete"
    assert seen[0][1] == dict(ppo_epochs=1, minibatches=1)
    assert seen[1][1] == dict(ppo_epochs=3, minibatches=4, target_kl=0.5)


def test_grpo_loss_is_the_papers_objective_token_by_token():
    generator = torch.Generator().manual_seed(0)
    new, old, ref = (torch.randn(3, 5, generator=generator) * 0.3 for _ in range(3))
    advantages = torch.tensor([1.3, -0.9, 0.4])[:, None].expand(3, 5)
    mask = torch.tensor([[0, 1, 1, 0, 0], [0, 0, 1, 1, 1], [0, 1, 0, 0, 0]]).bool()
    total = 0.0
    for b in range(3):
        for t in range(5):
            if mask[b, t]:
                ratio = math.exp(new[b, t] - old[b, t])
                clipped = min(max(ratio, 0.8), 1.2)
                a = advantages[b, t].item()
                d = (ref[b, t] - new[b, t]).item()
                total += -min(ratio * a, clipped * a) + 0.04 * (math.exp(d) - d - 1)
    loss, stats = grpo_loss(new, old, ref, advantages, mask)
    assert loss.item() == pytest.approx(total / mask.sum().item(), rel=1e-5)
    policy_loss, other = loss.item() - 0.04 * stats["kl_loss"].item(), 0.7
    loss, _ = grpo_loss(new, old, ref, advantages, mask, kl_coef=other)
    assert loss.item() == pytest.approx(policy_loss + other * stats["kl_loss"].item(), rel=1e-5)
    assert stats["kl_loss"].item() == pytest.approx(
        kl_estimate(new, ref, "k3")[mask].mean().item(), rel=1e-5
    )


def test_grpo_raises_the_better_sibling_and_leaves_the_value_head_alone():
    model = HybridModel(build_lm("llama"))
    batch = make_batch(None, [[5, 6]] * 4, [[7], [8], [9, 10], [11]], max_length=8)
    with torch.no_grad():
        logprobs = model(batch.input_ids, batch.attention_mask, batch.response_mask).logprobs
    scores = torch.tensor([2.0, 0.0, 1.0, 1.0])
    last = batch.response_mask.long().cumsum(1).argmax(1)
    rewards = torch.zeros_like(logprobs).scatter(1, last[:, None], scores[:, None])
    zero = torch.zeros_like(logprobs)
    rollout = Rollout(
        batch.input_ids,
        batch.attention_mask,
        batch.response_mask,
        logprobs,
        logprobs,
        zero,
        rewards,
        zero,
        zero,
    )
    metrics = grpo_step(
        model, rollout, torch.optim.SGD(model.parameters(), lr=0.01), group_size=2, kl_coef=0.0
    )
    with torch.no_grad():
        after = model(batch.input_ids, batch.attention_mask, batch.response_mask).logprobs
    change = (after - logprobs).sum(1)
    assert change[0] > 0 > change[1] and metrics["grpo/group_std"] == pytest.approx(0.5)
    assert model.value_head.weight.abs().max() == 0, "no value is learnt"


@pytest.mark.slow
def test_grpo_runs_in_groups_and_learns(tmp_path):
    flags = (
        "--algorithm grpo --group-size 4 --limit 200 --steps 24 --sft-warmup 6 "
        "--batch-size 16 --eval-size 16 --max-new-tokens 8 --device cpu --save-every 0"
    )
    main(
        [
            *flags.split(),
            "--reward",
            "length(target=3)",
            "--ppo-ratio",
            "1",
            "--out",
            str(tmp_path / "run"),
        ]
    )
    rows = [row for row in read_rows(tmp_path / "run" / "metrics.jsonl") if row["phase"] == "grpo"]
    assert len(rows) == 18 and rows[0]["ppo/kl"] == 0 and rows[0]["grpo/first_ratio_gap"] < 1e-5
    assert (
        sum(r["ppo/score"] for r in rows[-5:]) > sum(r["ppo/score"] for r in rows[:5])
        and "ppo/grad_norm" not in rows[0]
    )


def test_a_pair_has_one_prompt_also_when_it_has_to_be_cut(tiny):
    lm, tokenizer = tiny
    pair = Pair(
        "the plot was and the music was and the cast was",
        " warm .",
        " dull and flat and boring and messy and weak .",
    )
    batch = preference_batch(tokenizer, HybridModel(lm), [pair], max_length=18)
    prompts = [
        ids[real & ~mine].tolist()
        for ids, real, mine in zip(batch.input_ids, batch.attention_mask, batch.response_mask)
    ]
    assert prompts[0] == prompts[1] and 0 < len(prompts[0]) < len(tokenizer(pair.prompt).input_ids)
