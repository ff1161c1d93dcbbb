"""The pure functions of ppo.py against closed forms, enumeration and definitions written the
slow way."""

import math

import numpy as np
import pytest
import torch

from ppo import (
    AdaptiveKLController,
    Scores,
    compute_gae,
    kl_estimate,
    masked_whiten,
    place_rewards,
    ppo_loss,
    spread,
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


def test_the_spread_of_scores_equals_torchs_own():
    generator = torch.Generator().manual_seed(0)
    for n in (2, 3, 17, 64):
        scores = 1e6 + torch.randn(n, generator=generator)
        expected = scores.double().std(unbiased=False).item()
        assert spread(scores.tolist()) == pytest.approx(expected, rel=1e-12)
    alike = torch.full((6,), 87.3).tolist()
    assert math.isnan(spread([3.0])) and spread(alike) == 0
