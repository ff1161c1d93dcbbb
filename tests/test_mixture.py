"""Running statistics against numpy; mixture weights against data made from known weights."""

import json

import numpy as np
import pytest
import torch

from data import Pair
from engine import UserError
from mixture import Mixture, RunningNorm
from rewards import build_reward


def test_first_batch_is_standardised_by_itself_and_order_is_irrelevant():
    x = torch.tensor([1.0, 4.0, -2.0, 7.0])
    z = RunningNorm()(x)
    np.testing.assert_allclose(
        z.numpy(), (x.numpy() - x.numpy().mean()) / x.numpy().std(), atol=1e-6
    )
    order = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(RunningNorm()(x[order]), z[order])
    assert RunningNorm()(torch.full((3,), 5.0)).tolist() == [0, 0, 0] and RunningNorm()(
        torch.tensor([5.0])
    ).tolist() == [0]


def test_running_moments_are_the_weighted_ones_of_all_batches():
    norm, decay = RunningNorm(0.9), 0.9
    batches = [
        torch.randn(5, generator=torch.Generator().manual_seed(i)) * (i + 1) + i for i in range(6)
    ]
    for batch in batches:
        z = norm(batch)
    weights = np.array([decay ** (5 - i) for i in range(6)])
    mean = np.average([b.numpy().mean() for b in batches], weights=weights)
    square = np.average([(b.double().numpy() ** 2).mean() for b in batches], weights=weights)
    np.testing.assert_allclose(
        z.numpy(), (batches[-1].numpy() - mean) / np.sqrt(square - mean**2), atol=1e-5
    )


def test_measuring_does_not_learn_and_missing_scores_stay_missing():
    norm = RunningNorm()
    norm(torch.tensor([1.0, 3.0]))
    state = norm.state_dict()
    assert norm(torch.tensor([100.0, 200.0]), learn=False)[0] > 10 and norm.state_dict() == state
    z = RunningNorm()(torch.tensor([1.0, float("nan"), 3.0]))
    assert z[[0, 2]].tolist() == [-1, 1] and z[1].isnan()


def test_post_processors():
    texts = ["p"] * 3, ["a", "a b", "a b c d"]  # length(target=4): 0.25, 0.5, 1
    for expression, expected in {
        "clip(length(target=4), 0.3, 0.6)": [0.3, 0.5, 0.6],
        "scale(length(target=4), -2)": [-0.5, -1, -2],
        "tanh(4*length(target=4))": np.tanh([1, 2, 4]).tolist(),
        "clip(length(target=4), low=0.3, high=0.6) + 1": [1.3, 1.5, 1.6],
        "clip(scale(length(target=4), 2) - 1, -0.4, 0.5)": [-0.4, 0, 0.5],
    }.items():
        assert build_reward(expression)(*texts).tolist() == pytest.approx(expected, abs=1e-6), (
            expression
        )
    white = build_reward("whiten(length(target=4))")(*texts)
    assert white.mean().abs() < 1e-6 and white.std(unbiased=False) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("center, spread", [(0.0, 1e-9), (1e4, 0.125), (-3.0, 1e-6), (7e7, 16.0)])
def test_a_small_spread_is_kept_and_equal_scores_are_0(center, spread):
    x = torch.tensor([center - spread, center + 2 * spread, center + spread, center])
    norm = RunningNorm()
    for _ in range(400):
        z = norm(x)
    double = x.double()
    expected = (double - double.mean()) / double.std(unbiased=False)
    torch.testing.assert_close(z, expected.float(), atol=1e-5, rtol=0)
    same = RunningNorm()
    for _ in range(400):
        z = same(torch.full((7,), center + spread))
    assert z.tolist() == [0.0] * 7, "nothing to tell apart is 0, exactly"


def test_running_moments_are_those_of_the_weighted_samples():
    torch.manual_seed(3)
    batches, norm = [torch.randn(n) * n + 5 for n in (3, 5, 2, 4)], RunningNorm(decay=0.7)
    for batch in batches:
        norm(batch)
    weights = [0.7 ** (3 - i) for i in range(4)]
    samples = torch.cat(batches).double()
    each = torch.cat([torch.full((len(b),), w / len(b)) for w, b in zip(weights, batches)]).double()
    each /= each.sum()
    mean = (each * samples).sum()
    assert norm.mean == pytest.approx(mean.item(), abs=1e-6)
    assert norm.variance == pytest.approx((each * (samples - mean) ** 2).sum().item(), rel=1e-6)


def test_ema_remembers_is_frozen_for_measuring_and_is_restored():
    reward = build_reward("ema(length(target=4))")
    first = reward(["p"] * 3, ["a", "a b", "a b c d"])
    torch.testing.assert_close(
        first, build_reward("whiten(length(target=4))")(["p"] * 3, ["a", "a b", "a b c d"])
    )
    state = json.loads(json.dumps(reward.state_dict()))
    with reward.frozen():
        measured = reward(["p"] * 2, ["a b c d", "a b c d"])
    assert reward.state_dict() == state and measured[0] > 1, "judged by what was seen before"
    other = build_reward("ema(length(target=4))")
    other.load_state_dict(state)
    assert other(["p"], ["a b"]).tolist() == reward(["p"], ["a b"]).tolist()


def preferences(weights, n=2000, seed=0, scale=3.0):
    """n pairs judged by sigmoid(scale * w . (z_chosen - z_rejected)).

    The raw rewards have very different scales and offsets."""
    generator = np.random.default_rng(seed)
    z = generator.normal(size=(n, 2, len(weights)))
    margin = scale * (z[:, 0] - z[:, 1]) @ np.array(weights)
    swap = generator.random(n) > 1 / (1 + np.exp(-margin))
    z[swap] = z[swap][:, ::-1]
    raw = torch.tensor(
        z * np.array([1, 50, 0.01])[: len(weights)] + np.array([0, 300, -1])[: len(weights)]
    )
    return raw[:, 0], raw[:, 1]


@pytest.mark.parametrize(
    "weights", [(0.8, 0.1, 0.1), (0.1, 0.8, 0.1), (0.2, 0.3, 0.5), (1 / 3, 1 / 3, 1 / 3)]
)
def test_a_fit_recovers_the_weights_whatever_the_scales(weights):
    mixture = Mixture(["a", "b", "c"])
    accuracy = mixture.fit(*preferences(weights))
    assert mixture.weights().tolist() == pytest.approx(weights, abs=0.06) and accuracy > 0.7
    fixed = mixture.weights().clone()
    mixture([torch.randn(8)] * 3)
    assert torch.equal(mixture.weights(), fixed), "a fitted mixture stays as it is"


def test_separable_preferences_and_a_harmful_reward_stay_finite_and_above_the_floor():
    mixture = Mixture(["a", "b"], floor=0.1)
    chosen = torch.randn(200, 2, generator=torch.Generator().manual_seed(0)).double()
    rejected = chosen + torch.tensor([-1.0, 1.0])  # people want more of a and less of b
    assert mixture.fit(chosen, rejected) == 1.0
    assert mixture.weights()[1] == pytest.approx(
        0.1, abs=0.02
    ) and mixture.weights().sum() == pytest.approx(1)


def test_online_weights_follow_what_is_moving_and_none_dies():
    mixture, generator = Mixture(["moving", "still"], floor=0.05), torch.Generator().manual_seed(0)
    assert mixture.weights().tolist() == [0.5, 0.5]
    for step in range(30):
        noise = torch.randn(2, 64, generator=generator)
        mixture([noise[0] + 0.1 * step, 1000 * noise[1] + 5000])
    moving, still = mixture.weights().tolist()
    assert moving > 0.7 and still >= 0.05 and moving + still == pytest.approx(1)
    for _ in range(300):
        noise = torch.randn(2, 64, generator=generator)
        mixture([noise[0] + 3, 1000 * noise[1] + 5000])
    assert mixture.weights().tolist() == pytest.approx([0.5, 0.5], abs=0.2), (
        "once it stands still, it is as good as the other"
    )


def test_mixture_in_an_expression_is_fitted_logged_and_restored():
    pairs = [
        Pair("p", "w " * (i % 5 + 6), "w " * (i % 5 + 1), {"target": "unrelated"})
        for i in range(40)
    ]  # longer is preferred
    reward = build_reward("mixture(length(target=40), sentiment, floor=0.02)", mixture_pairs=pairs)
    weights = {
        name: value for name, value in reward.metrics().items() if name.startswith("reward_weight/")
    }
    assert (
        weights["reward_weight/length(target=40)"] > 0.9
        and weights["reward_weight/sentiment"] >= 0.02
    )
    again = build_reward("mixture(length(target=40), sentiment, floor=0.02)")
    again.load_state_dict(json.loads(json.dumps(reward.state_dict())))
    texts = (["p"] * 2, ["w w w", "good"])
    assert again(*texts).tolist() == reward(*texts).tolist()
    assert reward(*texts)[0] > reward(*texts)[1]


def test_a_fit_asks_what_is_in_the_mixture_and_nothing_else(capsys):
    pairs = [Pair(f"q{i}", "good good", "bad", {}) for i in range(6)]
    for expression in (
        "rouge_l + mixture(sentiment, length)",
        "mixture(sentiment, length) + rouge_l",
    ):  # the pairs have no target
        assert (
            build_reward(expression, mixture_pairs=pairs)(["q"], ["good"], target=["good"])
            .isfinite()
            .all()
        )
        assert "agrees with 100% of the 6 preference pairs" in capsys.readouterr().out
    with pytest.raises(UserError, match="fits the weights of a mixture"):
        build_reward("sentiment", mixture_pairs=pairs)


@pytest.mark.parametrize(
    "part", ["length(target=40)", "ema(length(target=40))", "whiten(length(target=40))"]
)
def test_a_fit_standardises_both_sides_of_a_pair_together(part):
    pairs = [Pair("p", "w " * (i % 5 + 6), "w " * (i % 5 + 1)) for i in range(40)]
    reward = build_reward(f"mixture({part}, sentiment, floor=0.02)", mixture_pairs=pairs)
    assert reward.metrics()[f"reward_weight/{part}"] > 0.9


def test_the_inner_one_of_two_mixtures_is_fitted_first(capsys):
    pairs = [Pair("q", "good " * (i % 4 + 2), "bad " * (i % 3 + 1)) for i in range(12)]
    expression = "mixture(mixture(sentiment, repetition), length(target=9)) - length"
    reward = build_reward(expression, mixture_pairs=pairs)
    assert capsys.readouterr().out.count("of the 12 preference pairs") == 2
    assert list(reward.state_dict()) == [
        "mixture(sentiment, repetition)",
        "mixture(mixture(sentiment, repetition), length(target=9))",
    ]
    assert all(state["fitted"] for state in reward.state_dict().values())


def test_pairs_without_scores_are_refused(tmp_path):
    """A judge may leave some texts without a grade, here one of each pair."""
    (tmp_path / "half.py").write_text(
        "def half(completions, **columns):\n"
        "    return [None if 'bad' in text else 0.5 for text in completions]\n"
    )
    pairs = [Pair("q", "good", "bad"), Pair("q", "bad .", "good .")]
    with pytest.raises(UserError, match="no preference pair has a score from each of .*half"):
        build_reward(f"mixture({tmp_path}/half.py:half, length)", mixture_pairs=pairs)


def test_a_number_may_stand_in_a_mixture():
    assert build_reward("mixture(sentiment, 2)")(["q"] * 2, ["good", "bad"]).isfinite().all()


def test_two_equal_terms_have_a_memory_each():
    reward, other = (
        build_reward("ema(sentiment)*ema(sentiment)"),
        build_reward("ema(sentiment)*ema(sentiment)"),
    )
    reward(["p"] * 2, ["good", "bad"])
    other.load_state_dict(json.loads(json.dumps(reward.state_dict())))
    texts = (["p"] * 2, ["good good", "bad"])
    assert reward(*texts).tolist() == other(*texts).tolist() and len(reward.state_dict()) == 2


@pytest.mark.parametrize(
    "expression, part",
    [
        ("clip(bleu, 'a', 'b')", "clip"),
        ("clip(bleu, 3, -3)", "lower first"),
        ("scale(bleu, 'a')", "scale"),
        ("-" * 3000 + "bleu", "not an expression"),
        ("mixture(bleu)", "at least two"),
        ("mixture(bleu, rouge_l, floor=0.6)", "floor"),
        ("ema()", "cannot read"),
        ("ema(bleu, decay=2)", "decay"),
        ("clip(bleu)", "clip"),
        ("clip(bleu, rouge_l, 1)", "clip"),
    ],
)
def test_wrong_post_processors_are_named(expression, part):
    with pytest.raises(UserError) as caught:
        build_reward(expression)
    assert part in str(caught.value)
