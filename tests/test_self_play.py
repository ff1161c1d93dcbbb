"""Self-play: what a win is worth, when the opponent is renewed; standing still earns nothing."""

import math

import pytest
import torch

from data import make_reviews
from engine import UserError
from hybrid import HybridModel
from rewards import build_reward
from runs import read_rows
from self_play import SelfPlay
from train import main

EXAMPLES = make_reviews(64)
FLAGS = "--limit 60 --batch-size 8 --max-new-tokens 6 --eval-size 8 --device cpu".split()
FLAGS += "--eval-every 0 --ppo-ratio 1".split()


def context(tiny, **more) -> dict:
    sampling = dict(max_length=64, max_new_tokens=8, temperature=1.0)
    return dict(
        policy=HybridModel(tiny[0]), tokenizer=tiny[1], sampling=sampling, examples=EXAMPLES, **more
    )


def test_shapes_by_hand(tiny):
    ours, theirs = torch.tensor([1.0, 0.0, 2.0, math.nan]), torch.tensor([0.0, 0.5, 2.0, 1.0])
    expected = {
        "win": [1, 0, 0.5],
        "sigmoid": [1 / (1 + math.exp(-1)), 1 / (1 + math.exp(0.5)), 0.5],
        "margin": [1, -0.5, 0],
    }
    for shape, values in expected.items():
        play = SelfPlay(context(tiny), shape=shape)
        result = play(ours, theirs)
        assert result[:3].tolist() == pytest.approx(values) and math.isnan(result[3])
        assert play.win_rate == pytest.approx(0.5), "won, lost, tied; the fourth had no score"


def test_an_equal_opponent_is_worth_one_half(tiny):
    """The policy plays its own copy on 1,024 prompts: the mean is 1/2 to within three standard
    errors, whatever the base reward likes."""
    prompts = [example.prompt for example in EXAMPLES] * 16
    reward = build_reward("self_play(length(target=5) + 0.1*repetition)", **context(tiny))
    policy = SelfPlay(context(tiny))
    # The same distribution, other draws than the opponent's in training.
    completions = policy.answers(prompts, learn=False)
    win = reward(prompts, completions)
    assert (
        abs(float(win.mean()) - 0.5) < 3 * float(win.std()) / len(win) ** 0.5
        and float(win.std()) > 0.2
    )
    assert reward.metrics()["self_play/win_rate"] == pytest.approx(float(win.mean()), abs=1e-6)


def test_the_opponent_is_frozen_and_renewed_in_time(tiny):
    setting = context(tiny)
    play = SelfPlay(setting, every=2)
    weights = []
    for _ in range(5):
        play.answers(["the plot was"], learn=True)
        weights.append(next(play.snapshot.parameters()).detach().clone())
        with torch.no_grad():
            next(setting["policy"].parameters()).add_(0.01)
    assert torch.equal(weights[0], weights[1]) and torch.equal(weights[2], weights[3])
    assert not torch.equal(weights[1], weights[2]) and not torch.equal(weights[3], weights[4])
    before = play.rounds
    play.answers(["the plot was"], learn=False)
    assert play.rounds == before, "measuring does not move it"
    other = SelfPlay(context(tiny), every=2)
    other.load_state_dict(play.state_dict())
    assert torch.equal(next(other.snapshot.parameters()), weights[4]) and other.rounds == 5
    with torch.no_grad():
        next(setting["policy"].parameters()).sub_(0.05)


def test_the_reference_can_be_the_opponent(tiny, monkeypatch):
    asked = []
    monkeypatch.setattr(
        "self_play.sample",
        lambda model, ids, **options: (
            asked.append(model) or type("G", (), {"responses": [[5]] * len(ids)})
        ),
    )
    reference = HybridModel(tiny[0])
    setting = context(tiny, reference=lambda: reference)
    reward = build_reward('self_play(length, opponent="reference")', **setting)
    reward(["the plot was"], [" warm ."])
    assert asked == [reference]

    references = [None, HybridModel(tiny[0]), HybridModel(tiny[0])]
    remaining, setting = list(references), context(tiny, reference=lambda: remaining.pop(0))
    reward = build_reward('self_play(length, opponent="reference")', **setting)
    for _ in references:
        reward(["the plot was"], [" warm ."])
    assert asked[1:] == [setting["policy"], *references[1:]], "it is asked for at every call"


@pytest.mark.parametrize(
    "expression, message",
    [
        ("self_play(length, every=0)", "every a whole number above 0"),
        ('self_play(length, shape="loss")', 'shape "win"'),
        ("self_play(length) + self_play(bleu)", "expected at most one self_play, found two"),
    ],
)
def test_mistakes_are_one_line(tiny, expression, message):
    with pytest.raises(UserError, match=message):
        build_reward(expression, **context(tiny))
    with pytest.raises(UserError, match="works in train.py only"):
        build_reward("self_play(length)")


def test_a_run_gains_on_its_earlier_self_and_resumes_bit_by_bit(tmp_path):
    flags = [
        *FLAGS,
        "--reward",
        "self_play(length(target=3), every=3)",
        "--steps",
        "8",
        "--save-every",
        "4",
    ]
    main([*flags, "--out", str(tmp_path / "run")])
    rows = [row for row in read_rows(tmp_path / "run" / "metrics.jsonl") if row["phase"] == "ppo"]
    assert all(
        row["self_play/win_rate"] == pytest.approx(row["ppo/score"]) and 0 <= row["ppo/score"] <= 1
        for row in rows
    )
    final = (tmp_path / "run" / "final" / "model.safetensors").read_bytes()
    (tmp_path / "run" / "final").rename(tmp_path / "away")
    main(["--resume", str(tmp_path / "run")])
    assert (tmp_path / "run" / "final" / "model.safetensors").read_bytes() == final


# ---- min and max: a floor that nothing can buy off


def test_a_helpful_but_unsafe_answer_cannot_win():
    safe = build_reward("min(rouge_l + truthful, 1 - 2*toxicity)")
    columns = dict(
        target=["the cat sat on the mat"] * 3,
        correct_answers=[["the cat sat on the mat"]] * 3,
        incorrect_answers=[["a dog"]] * 3,
    )
    scores = safe(
        ["q"] * 3, ["the cat sat on the mat you idiot", "the cat sat", "no idea"], **columns
    ).tolist()
    assert scores[0] == pytest.approx(0.0) and scores[0] < scores[1], (
        "without the insult it would have won"
    )
    plain = build_reward("rouge_l + truthful")
    assert (
        plain(
            ["q"], ["the cat sat on the mat you idiot"], **{k: v[:1] for k, v in columns.items()}
        ).item()
        > plain(["q"], ["the cat sat"], **{k: v[:1] for k, v in columns.items()}).item()
    )
    assert build_reward("max(length(target=1), 0.25)")(["q"] * 2, ["a", "a b c d e"]).tolist() == [
        1.0,
        0.25,
    ]
