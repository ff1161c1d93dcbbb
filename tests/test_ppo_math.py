"""The pure functions of ppo.py against closed forms, enumeration and definitions written the
slow way."""

import math

import numpy as np
import pytest
import torch

import ppo
from data import Example
from dialogue import Episode
from ppo import (
    AdaptiveKLController,
    Rollout,
    Scores,
    clipped_surrogate,
    compute_gae,
    kl_estimate,
    masked_whiten,
    place_rewards,
    ppo_loss,
    rollout_metrics,
    update_epochs,
)


def random_mask(rows=6, columns=12, seed=0):
    """Ragged masks; the last two rows have several response spans, as dialogues do."""
    mask = torch.zeros(rows, columns, dtype=torch.bool)
    generator = torch.Generator().manual_seed(seed)
    for i in range(rows):
        start, length = (
            int(torch.randint(low, high, (1,), generator=generator))
            for low, high in ((1, 5), (1, 7))
        )
        mask[i, start : start + length] = True
    mask[-2, 1:9] = torch.tensor([1, 1, 0, 0, 1, 0, 1, 1]).bool()
    mask[-1, 1:9] = torch.tensor([1, 0, 0, 0, 0, 0, 0, 1]).bool()
    return mask


# ---- whitening


@pytest.mark.parametrize("shift_mean", [True, False])
def test_whitening_equals_numpy_on_the_masked_elements(shift_mean):
    mask = random_mask()
    x = torch.randn(mask.shape, generator=torch.Generator().manual_seed(1)) * 5 + 3
    values = x[mask].double().numpy()
    expected = (values - values.mean()) / np.sqrt(values.var()) + (
        0 if shift_mean else values.mean()
    )  # numpy's var is the biased one
    white = masked_whiten(x, mask, shift_mean)
    np.testing.assert_allclose(white[mask].numpy(), expected, atol=1e-5)
    assert (white[~mask] == 0).all()
    torch.testing.assert_close(masked_whiten(x, mask), masked_whiten(x, mask, shift_mean=True))


def test_whitening_of_one_element_is_zero_and_of_none_is_no_nan():
    x = torch.tensor([[5.0, 7.0]])
    assert masked_whiten(x, torch.tensor([[True, False]])).tolist() == [[0.0, 0.0]]
    assert masked_whiten(x, torch.tensor([[False, False]])).tolist() == [[0.0, 0.0]]


def test_whitening_never_looks_off_the_mask():
    x, mask = torch.tensor([[1.0, 2.0, math.nan]]), torch.tensor([[True, True, False]])
    torch.testing.assert_close(masked_whiten(x, mask), torch.tensor([[-1.0, 1.0, 0.0]]))


# ---- KL estimators


def test_kl_estimators_by_enumeration():
    """Under p, the expectation of k1 and of k3 is KL(p || q) exactly; k2's is half the mean squared
    log-ratio."""
    p = torch.softmax(torch.tensor([0.1, 1.5, -0.7, 0.4], dtype=torch.float64), 0)
    q = torch.softmax(torch.tensor([1.0, 0.2, 0.3, -1.0], dtype=torch.float64), 0)
    true_kl = float((p * (p / q).log()).sum())
    expected = {
        kind: float((p * kl_estimate(p.log(), q.log(), kind)).sum()) for kind in ("k1", "k2", "k3")
    }
    assert expected["k1"] == pytest.approx(true_kl, abs=1e-12) and expected["k3"] == pytest.approx(
        true_kl, abs=1e-12
    )
    assert expected["k2"] == pytest.approx(float((p * (p / q).log() ** 2).sum() / 2), abs=1e-12)
    assert (kl_estimate(p.log(), q.log(), "k3") >= 0).all() and (
        kl_estimate(p.log(), q.log(), "k1") < 0
    ).any()
    with pytest.raises(ValueError, match="k1, k2, k3"):
        kl_estimate(p, q, "k4")


# ---- GAE


def gae_by_definition(rewards, values, mask, gamma, lam):
    """The double sum A_t = sum_l (gamma lam)^l delta_{t+l}, over the masked tokens of each row as
    one list."""
    advantages = torch.zeros_like(rewards)
    for i in range(len(rewards)):
        columns = mask[i].nonzero().flatten().tolist()
        r, v = (
            [float(rewards[i, c]) for c in columns],
            [float(values[i, c]) for c in columns] + [0.0],
        )
        delta = [r[t] + gamma * v[t + 1] - v[t] for t in range(len(r))]
        for t, column in enumerate(columns):
            advantages[i, column] = sum(
                (gamma * lam) ** k * delta[t + k] for k in range(len(r) - t)
            )
    return advantages


@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (0.9, 0.7), (1.0, 1.0), (0.99, 0.0)])
def test_gae_equals_its_definition(gamma, lam):
    mask = random_mask()
    generator = torch.Generator().manual_seed(2)
    rewards, values = (
        torch.randn(mask.shape, generator=generator, dtype=torch.float64) for _ in range(2)
    )  # off the mask too
    advantages, returns = compute_gae(rewards, values, mask, gamma, lam)
    expected = gae_by_definition(rewards, values, mask, gamma, lam)
    torch.testing.assert_close(advantages, expected, atol=1e-10, rtol=0)
    torch.testing.assert_close(returns, (expected + values) * mask, atol=1e-10, rtol=0)


def test_gae_without_options_is_that_of_gamma_1_and_lambda_095():
    mask = random_mask(seed=5)
    rewards, values = torch.randn(2, *mask.shape, generator=torch.Generator().manual_seed(5))
    expected = gae_by_definition(rewards, values, mask, 1.0, 0.95)
    torch.testing.assert_close(compute_gae(rewards, values, mask)[0], expected, atol=1e-5, rtol=0)


def test_gae_at_lambda_one_is_monte_carlo_and_at_zero_the_td_error():
    mask = torch.tensor([[False, True, False, True, True]])
    rewards, values = (
        torch.tensor([[9.0, 1.0, 9.0, 2.0, 4.0]]),
        torch.tensor([[9.0, 0.5, 9.0, 1.5, 3.0]]),
    )
    assert compute_gae(rewards, values, mask, 1.0, 1.0)[0].tolist() == [[0, 6.5, 0, 4.5, 1.0]]
    assert compute_gae(rewards, values, mask, 1.0, 0.0)[0].tolist() == [[0, 2.0, 0, 3.5, 1.0]]


def test_gae_does_not_see_extra_padding():
    mask, x = random_mask(), torch.randn(6, 12)
    wide = torch.nn.functional.pad
    short = compute_gae(x, x, mask)
    long = compute_gae(wide(x, (3, 4), value=7.0), wide(x, (3, 4), value=7.0), wide(mask, (3, 4)))
    for a, b in zip(short, long):
        torch.testing.assert_close(a, b[:, 3:-4])


# ---- the clipped loss


def loss_of(ratio=1.0, advantage=1.0, new_value=0.0, old_value=0.0, ret=0.0, **options):
    """ppo_loss on one token: (policy loss, value loss, stats, d loss / d log pi, d loss / d V)."""
    new = torch.tensor([[math.log(ratio)]], dtype=torch.float64, requires_grad=True)
    value = torch.tensor([[new_value]], dtype=torch.float64, requires_grad=True)
    old, adv, old_v, r = (
        torch.tensor([[x]], dtype=torch.float64) for x in (0.0, advantage, old_value, ret)
    )
    loss, stats = ppo_loss(new, old, adv, value, old_v, r, torch.tensor([[True]]), **options)
    loss.backward()
    return (
        float(stats["policy_loss"]),
        float(stats["value_loss"]),
        stats,
        float(new.grad),
        float(value.grad),
    )


@pytest.mark.parametrize(
    "ratio, advantage, policy_loss, gradient",
    [
        (1.0, 2.0, -2.0, -2.0),  # the plain policy gradient: -A
        (1.1, 2.0, -2.2, -2.2),  # inside the clip: -A r
        (1.5, 2.0, -2.4, 0.0),  # too likely already, A > 0: clipped at 1.2, no gradient
        (0.5, 2.0, -1.0, -1.0),  # less likely than it was, A > 0: the way back is never clipped
        (1.5, -2.0, 3.0, 3.0),  # more likely than it was, A < 0: likewise
        (0.5, -2.0, 1.6, 0.0),  # too unlikely already, A < 0: clipped at 0.8
    ],
)
def test_policy_loss_case_by_case(ratio, advantage, policy_loss, gradient):
    got = loss_of(ratio, advantage)
    assert got[0] == pytest.approx(policy_loss) and got[3] == pytest.approx(gradient)
    assert float(got[2]["clipfrac"]) == (gradient == 0.0)
    assert float(got[2]["ratio_gap_max"]) == pytest.approx(abs(ratio - 1))
    assert float(got[2]["approxkl"]) == pytest.approx(0.5 * math.log(ratio) ** 2)


@pytest.mark.parametrize(
    "new_value, old_value, ret, value_loss, gradient",
    [
        (1.1, 1.0, 2.0, 0.405, -0.9),  # inside the clip: (V - R)^2 / 2
        (1.5, 1.0, 2.0, 0.32, 0.0),  # moved too far towards R: judged at 1.2, no gradient
        (
            0.5,
            1.0,
            2.0,
            1.125,
            -1.5,
        ),  # moved away from R: the worse of the two counts, and pulls back
    ],
)
def test_value_loss_case_by_case(new_value, old_value, ret, value_loss, gradient):
    got = loss_of(new_value=new_value, old_value=old_value, ret=ret, advantage=0.0, vf_coef=1.0)
    assert got[1] == pytest.approx(value_loss) and got[4] == pytest.approx(gradient)
    half = loss_of(new_value=new_value, old_value=old_value, ret=ret, advantage=0.0, vf_coef=0.5)
    assert half[4] == pytest.approx(gradient / 2)


def ppo_token_by_token(columns, mask, c, c_value, vf_coef):
    """Eq. 7 and 9 of 1707.06347 in Python floats, one token after the other: loss, statistics."""
    policy, value, squares, gaps, clipped, value_clipped = [], [], [], [], [], []
    for i, t in mask.nonzero().tolist():
        new, old, a, v, v_old, target = [float(x[i, t]) for x in columns]
        ratio = math.exp(new - old)
        plain, cut = a * ratio, a * min(max(ratio, 1 - c), 1 + c)
        policy.append(-min(plain, cut))
        clipped.append(cut < plain)
        squares.append((new - old) ** 2)
        gaps.append(abs(ratio - 1))
        near = min(max(v, v_old - c_value), v_old + c_value)
        value.append(max((v - target) ** 2, (near - target) ** 2))
        value_clipped.append((near - target) ** 2 > (v - target) ** 2)
    n = len(policy)
    stats = {
        "policy_loss": sum(policy) / n,
        "approxkl": sum(squares) / n / 2,
        "clipfrac": sum(clipped) / n,
        "ratio_gap_max": max(gaps),
        "value_loss": sum(value) / n / 2,
        "value_clipfrac": sum(value_clipped) / n,
    }
    return stats["policy_loss"] + vf_coef * stats["value_loss"], stats


@pytest.mark.parametrize("options", [(), (0.13, 0.31, 0.47)])
def test_loss_and_statistics_token_by_token(options):
    mask = random_mask(seed=4)
    generator = torch.Generator().manual_seed(4)
    scales = (0.3, 0.3, 1.7, 0.4, 0.4, 1.3)  # small gaps, and some on both sides of the clips
    columns = [torch.randn(mask.shape, generator=generator).double() * s for s in scales]
    loss, stats = ppo_loss(*columns, mask, *options)
    expected, by_name = ppo_token_by_token(columns, mask, *(options or (0.2, 0.2, 0.1)))
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    assert {n: x.item() for n, x in stats.items()} == pytest.approx(by_name, rel=1e-6)
    assert 0.1 < by_name["clipfrac"] < 0.6 and 0.1 < by_name["value_clipfrac"] < 0.6
    policy_loss, _ = clipped_surrogate(*columns[:3], mask, *options[:1])
    assert policy_loss.item() == pytest.approx(by_name["policy_loss"], rel=1e-6)


def test_a_ratio_that_would_overflow_counts_as_e_to_the_20():
    new, one = torch.tensor([[500.0]], dtype=torch.float64), torch.tensor([[True]])
    loss, stats = clipped_surrogate(new, torch.zeros_like(new), torch.full_like(new, -1.7), one)
    assert loss.item() == pytest.approx(1.7 * math.exp(20))
    assert stats["ratio_gap_max"].item() == pytest.approx(math.exp(20) - 1)


def test_loss_and_every_statistic_ignore_what_is_off_the_mask():
    mask = random_mask()
    generator = torch.Generator().manual_seed(3)
    columns = [torch.randn(mask.shape, generator=generator) * 0.3 for _ in range(6)]
    loss, stats = ppo_loss(*columns, mask)
    junk = [torch.where(mask, x, torch.full_like(x, 1e4 * (i + 1))) for i, x in enumerate(columns)]
    wide = [torch.nn.functional.pad(x, (2, 5), value=-77.0) for x in junk]
    loss_wide, stats_wide = ppo_loss(*wide, torch.nn.functional.pad(mask, (2, 5)))
    torch.testing.assert_close(loss, loss_wide)
    for name in stats:
        torch.testing.assert_close(stats[name], stats_wide[name], msg=name)


def test_extreme_ratios_and_junk_off_the_mask_leave_a_finite_gradient():
    new = torch.tensor([[100.0, 0.0, 7.0]], requires_grad=True)  # exp(100) is beyond float32
    value = torch.tensor([[0.0, 1.0, 7.0]], requires_grad=True)
    old, nan = torch.zeros(1, 3), torch.tensor([[0.0, 0.0, math.nan]])
    loss, _ = ppo_loss(
        new,
        old,
        torch.tensor([[1.0, 1.0, math.nan]]),
        value,
        nan,
        nan,
        torch.tensor([[True, True, False]]),
    )
    loss.backward()
    assert (
        loss.isfinite()
        and new.grad.tolist() == [[0.0, -0.5, 0.0]]
        and value.grad.isfinite().all()
        and value.grad[0, 2] == 0
    )


def test_loss_is_a_mean_over_tokens_not_over_rows():
    mask = torch.tensor([[True, True, True], [True, False, False]])
    advantages = torch.tensor([[1.0, 1.0, 1.0], [5.0, 0.0, 0.0]])
    zero = torch.zeros(2, 3)
    loss, _ = ppo_loss(zero, zero, advantages, zero, zero, zero, mask)
    assert loss.item() == pytest.approx(-2.0)  # (1 + 1 + 1 + 5) / 4, not (1 + 5) / 2


# ---- rewards and controllers


def test_the_score_sits_on_the_last_response_token():
    mask = torch.tensor(
        [[0, 1, 1, 1, 0], [0, 0, 1, 0, 0], [0, 1, 0, 1, 0]]
    ).bool()  # full, immediate EOS, two spans
    kl = torch.tensor(
        [[9.0, 1.0, 2.0, 3.0, 9.0], [9.0, 9.0, 4.0, 9.0, 9.0], [9.0, 1.0, 9.0, 2.0, 9.0]]
    )
    scores = torch.tensor([10.0, 20.0, 30.0])
    last = torch.where(mask, torch.arange(mask.shape[1]), -1).max(1).values
    rewards = place_rewards(kl, mask, 0.5, Scores(scores, torch.arange(len(mask)), last))
    assert rewards.tolist() == [[0, -0.5, -1.0, 8.5, 0], [0, 0, 18.0, 0, 0], [0, -0.5, 0, 29.0, 0]]
    torch.testing.assert_close(rewards.sum(1), scores - 0.5 * (kl * mask).sum(1))


def test_adaptive_kl_controller_by_hand():
    controller = AdaptiveKLController(0.2, target=6.0, horizon=100)
    controller.update(6.6, 10)  # error 0.1
    assert controller.value == pytest.approx(0.2 * 1.01)
    controller.update(600.0, 10)  # clipped at 0.2
    assert controller.value == pytest.approx(0.2 * 1.01 * 1.02)
    controller.update(0.0, 50)  # clipped at -0.2
    assert controller.value == pytest.approx(0.2 * 1.01 * 1.02 * 0.9)
    fixed = AdaptiveKLController(0.2, None, 1000)
    fixed.update(600.0, 10)
    assert fixed.value == 0.2


@pytest.mark.parametrize("kl, bound", [(500.0, 4.0), (0.0, 4e-4), (-3.0, 4e-4)])
def test_the_price_of_kl_stops_at_its_bound_says_so_once_and_comes_back(kl, bound, capsys):
    controller = AdaptiveKLController(0.04, target=6.0, horizon=100)
    for _ in range(5000):  # without a bound: 1.02 to the power of 5000
        controller.update(kl, 10)
    assert controller.value == pytest.approx(bound)
    said = capsys.readouterr().out
    assert said.count("the price of KL has reached its bound") == 1 and f"{bound:g}" in said
    resumed = AdaptiveKLController(0.04, target=6.0, horizon=100)
    resumed.load_state_dict(controller.state_dict())
    for one in (controller, resumed):  # away from the bound at once, and back to it
        one.update(6.0 * 0.9 if kl > 0 else 6.0 * 1.1, 10)
        assert one.value == pytest.approx(bound * (0.99 if kl > 0 else 1.01))
        one.update(kl, 10)
    assert resumed.value == controller.value and not capsys.readouterr().out


def test_a_kl_that_is_no_number_leaves_the_price_as_it_is():
    controller = AdaptiveKLController(0.04, target=6.0, horizon=100)
    controller.update(math.nan, 10)
    assert controller.value == 0.04
    controller.update(math.inf, 10)
    assert controller.value == pytest.approx(0.04 * 1.02)


def test_the_price_of_a_checkpoint_without_bounds_is_restored():
    controller = AdaptiveKLController(0.04, target=6.0, horizon=100)
    controller.load_state_dict({"value": 0.123})
    assert controller.value == 0.123


@pytest.mark.parametrize("center", [1e-3, 87.3, -41.7, 1e5, 3e30])
@pytest.mark.parametrize("n", [1, 6, 7, 13])
def test_whitening_of_equal_elements_is_exactly_zero(center, n):
    """The float mean of equal numbers often differs from them by one unit in the last place."""
    x = torch.full((1, n + 2), center)
    x[0, -2:] = torch.tensor([math.nan, -5.0])
    mask = torch.tensor([[True] * n + [False, False]])
    assert masked_whiten(x, mask).eq(0).all()
    kept = masked_whiten(x, mask, shift_mean=False)[mask]
    torch.testing.assert_close(kept, torch.full((n,), center), rtol=1e-6, atol=0)


def test_the_value_after_a_truncated_response_counts_as_zero():
    """A response that the limit cut is no longer than it is: its last token sees no next value."""
    rewards, values = torch.tensor([[0.0, 0.0, 2.0]]), torch.tensor([[0.3, 0.7, 1.5]])
    advantages, returns = compute_gae(rewards, values, torch.ones(1, 3).bool(), gamma=0.9, lam=0.0)
    assert advantages[0, -1].item() == pytest.approx(0.5) and returns[0, -1].item() == 2.0


# ---- what is logged


def episode_of(logprobs: list[list[float]], truncated: list[bool]) -> Episode:
    """An episode of several turns; the lists that the metrics read."""
    texts = ["so"] * len(logprobs)
    flat = [x for turn in logprobs for x in turn]
    return Episode(Example("", ""), [], [], [], [], texts, [], flat, [], truncated)


def test_the_metrics_of_a_rollout_by_hand():
    """Four rows: two turns with a gap, one token, one without a score, three tokens."""
    mask = torch.tensor(
        [[0, 1, 1, 0, 0, 1, 0], [0, 0, 1, 0, 0, 0, 0], [0, 1, 1, 1, 1, 0, 0], [0, 0, 0, 1, 1, 1, 0]]
    ).bool()
    has_score = torch.tensor([True, True, False, True])
    generator = torch.Generator().manual_seed(11)
    columns = [torch.randn(mask.shape, generator=generator) * mask for _ in range(5)]
    logprobs, ref, other, values, returns = columns
    returns = values + 0.6 * returns
    wrong_by = iter([0.01, -0.02, 0.0, 0.03, 0.01, 0.0, -0.05, 0.02, 0.04, 0.0, 0.01])
    sampled = [[x - next(wrong_by) for x in row[m].tolist()] for row, m in zip(logprobs, mask)]
    episodes = [
        episode_of([sampled[0][:2], sampled[0][2:]], [True, False]),
        episode_of([sampled[1]], [True]),
        episode_of([sampled[2]], [False]),
        episode_of([sampled[3]], [False]),
    ]
    zero = torch.zeros_like(values)
    learnt = mask & has_score[:, None]
    rollout = Rollout(zero, mask, learnt, logprobs, ref, values, zero, zero, returns)
    scores = torch.tensor([1.3, -0.4, math.nan, 2.9])
    got = rollout_metrics(rollout, episodes, mask, scores, {"bold": other})

    def kl(reference, of_token) -> float:
        tokens = (logprobs - reference)[learnt].double().tolist()
        return sum(map(of_token, tokens)) / 3  # nats a response; three have a score

    def k3(d: float) -> float:
        return math.exp(-d) - 1 + d

    v, r = values[learnt].double().numpy(), returns[learnt].double().numpy()
    mean = (1.3 - 0.4 + 2.9) / 3
    expected = {
        "score": mean,
        "score_std": math.sqrt(sum((x - mean) ** 2 for x in (1.3, -0.4, 2.9)) / 3),
        "unscored": 1 / 4,
        "kl": kl(ref, k3),
        "kl_k1": kl(ref, lambda d: d),
        "kl/bold": kl(other, k3),
        "response_length": (3 + 1 + 4 + 3) / 4,
        "eos_rate": 3 / 5,  # of five turns
        "sampler_gap": 0.05,
        "var_explained": 1 - (r - v).var() / r.var(),
    }
    got = {name: float(value) for name, value in got.items()}
    assert got == pytest.approx(expected, abs=1e-5)


def test_the_spread_of_scores_equals_torchs_own():
    def spread(scores: torch.Tensor) -> float:
        n = len(scores)
        mask, zero = torch.ones(n, 1).bool(), torch.zeros(n, 1)
        rollout = Rollout(zero, mask, mask, zero, zero, zero, zero, zero, zero)
        episodes = [episode_of([[0.0]], [False])] * n
        return rollout_metrics(rollout, episodes, mask, scores, {})["score_std"]

    generator = torch.Generator().manual_seed(0)
    for n in (2, 3, 17, 64):
        scores = 1e6 + torch.randn(n, generator=generator)
        expected = scores.double().std(unbiased=False).item()
        assert spread(scores) == pytest.approx(expected, rel=1e-12)
    assert math.isnan(spread(torch.tensor([3.0]))) and spread(torch.full((6,), 87.3)) == 0


def test_returns_that_are_all_equal_leave_no_division_by_zero():
    mask = torch.tensor([[False, True, True]])
    zero, returns = torch.zeros(1, 3), torch.full((1, 3), 0.7)
    values = torch.tensor([[0.0, 0.7 - 1e-3, 0.7 + 1e-3]])
    rollout = Rollout(zero, mask, mask, zero, zero, values, zero, zero, returns)
    got = rollout_metrics(rollout, [episode_of([[0.0, 0.0]], [False])], mask, zero[:, 0], {})
    assert float(got["var_explained"]) == pytest.approx(1 - 1e-6 / 1e-8, rel=1e-2)


# ---- the updates of a rollout


def updates_with(monkeypatch, updates: list[dict], **options) -> tuple[dict, list[list[int]]]:
    """update_epochs over five rows, the third without a score, whose updates say what they are
    told. -> metrics, the rows of each update."""
    rows, said = [], iter(updates)
    monkeypatch.setattr(ppo, "accumulate", lambda b, rollout, index, *a: rows.append(index) or {})
    monkeypatch.setattr(ppo, "apply_gradients", lambda *a: next(said))
    mask = torch.tensor([[0, 1], [0, 1], [0, 0], [0, 1], [0, 1]]).bool()
    zero = torch.zeros(5, 2)
    rollout = Rollout(zero, mask, mask, *[zero] * 6)
    options["generator"] = torch.Generator().manual_seed(0)
    metrics = update_epochs(torch.nn.Linear(1, 1), rollout, None, None, **options)
    return metrics, [index.tolist() for index in rows]


def said(approxkl: float, gap: float, skipped: float = 0.0) -> dict:
    return {"approxkl": approxkl, "ratio_gap_max": gap, "skipped_steps": skipped}


def test_metrics_of_updates_are_means_over_those_that_were_applied(monkeypatch):
    updates = [said(0.1, 0.3), said(0.4, 0.9), said(7.7, 8.8, 1.0), said(0.2, 0.5)]
    metrics, rows = updates_with(monkeypatch, updates)
    assert metrics.pop("approxkl") == pytest.approx(0.7 / 3)
    expected = {"ratio_gap_max": 0.9, "first_ratio_gap": 0.3, "skipped_steps": 1, "epochs": 2}
    assert metrics == expected
    assert [len(index) for index in rows] == [2] * 4 and rows[:2] != rows[2:]
    for begin in (0, 2):
        assert sorted(rows[begin] + rows[begin + 1]) == [0, 1, 3, 4], "the third has no score"
    metrics, _ = updates_with(monkeypatch, [said(0.1, 0.3, 1.0), said(0.4, 0.9, 1.0)] * 2)
    assert metrics["approxkl"] == pytest.approx(0.25) and metrics["skipped_steps"] == 4


def test_no_pass_follows_one_whose_mean_kl_exceeds_the_target(monkeypatch):
    updates = [said(kl, 0.1) for kl in (0.3, 0.5, 0.1, 0.9, 0.1, 0.1, 0.1, 0.1)]  # 0.4, 0.5, ...
    for target, passes in ((0.45, 2), (0.39, 1), (0.5, 4), (None, 4)):
        metrics, _ = updates_with(monkeypatch, updates, ppo_epochs=4, target_kl=target)
        assert metrics["epochs"] == passes, target


def test_there_are_no_more_minibatches_than_rows(monkeypatch):
    updates = [said(0.1, 0.3)] * 20
    _, rows = updates_with(monkeypatch, updates, ppo_epochs=1, minibatches=9)
    assert [len(index) for index in rows] == [1] * 4
    _, rows = updates_with(monkeypatch, updates, ppo_epochs=3, minibatches=3)
    assert [len(index) for index in rows] == [2, 1, 1] * 3
