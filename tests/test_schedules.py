"""What each cycle does: the rules by hand, then whole runs."""

import copy
import json

import pytest
import torch
from conftest import build_lm, ragged_batch
from test_steps import random_rollout

from data import Example, make_batch
from hybrid import HybridModel
from ppo import ppo_step
from runs import read_rows
from schedules import SCHEDULES
from sft import sft_step
from train import main

A, B, C = (Example(name, "t") for name in "abc")
FLAGS = (
    "--limit 120 --batch-size 4 --max-new-tokens 6 --eval-size 4 --device cpu "
    "--save-every 5 --eval-every 0 --ppo-epochs 1"
).split()


def make(kind, **changes):
    return SCHEDULES[kind](
        [A, B, C],
        **dict(ppo_ratio=0.5, steps=10, sft_warmup=2, threshold=0.5, batch_size=2) | changes,
    )


def test_ratio_warms_up_and_then_alternates():
    assert [make("ratio").phase(step) for step in range(6)] == [
        "sft",
        "sft",
        "sft",
        "rl",
        "sft",
        "rl",
    ]
    assert (
        make("ratio").after_rollout([A], torch.tensor([-1.0])) == []
        and make("ratio").sft_weight(5) == 0
    )


def test_gate_demonstrates_the_prompts_whose_responses_all_score_low():
    gate = make("gate")
    assert [gate.phase(step) for step in range(4)] == ["sft", "sft", "rl", "rl"]
    hard = gate.after_rollout(
        [A, A, B, B, C, C], torch.tensor([0.1, 0.4, 0.1, 0.9, float("nan"), 0.0])
    )
    assert hard == [A], "B has one good response, C one that nobody scored"
    assert gate.metrics() == {"schedule/hard": pytest.approx(1 / 3)}


def test_buffer_collects_until_a_batch_is_full_and_survives_a_checkpoint():
    buffer = make("buffer")
    assert (
        buffer.after_rollout([A, B], torch.tensor([0.0, 1.0])) == []
        and buffer.phase(2) == "rl"
        and buffer.demonstrations() is None
    )
    buffer.after_rollout([B, C], torch.tensor([0.0, 0.0]))
    twin = make("buffer")
    twin.load_state_dict(json.loads(json.dumps(buffer.state_dict())))
    for each in (buffer, twin):
        assert (
            each.metrics()["schedule/buffer"] == 3
            and each.phase(3) == "sft"
            and each.demonstrations() == [A, B]
        )
        assert each.phase(4) == "rl" and each.buffer == [C]


def test_mix_weighs_by_the_ratio_and_its_ramp():
    assert make("mix").sft_weight(5) == 0.5 and make("mix").phase(2) == "rl"
    ramp = make("mix", ppo_ratio=(0.1, 0.9))
    assert ramp.sft_weight(2) == pytest.approx(0.9) and ramp.sft_weight(9) == pytest.approx(0.1)


def run(out, *flags):
    main([*FLAGS, *map(str, flags), "--out", str(out)])
    return [row for row in read_rows(out / "metrics.jsonl") if row["phase"] != "eval"]


def test_gate_in_a_run(tmp_path):
    rows = run(
        tmp_path / "all",
        "--schedule",
        "gate",
        "--threshold",
        9,
        "--steps",
        12,
        "--sft-warmup",
        1,
        "--reward",
        "length",
    )
    assert len(rows) == 12 and rows[0]["phase"] == "sft"
    # Every prompt is hard: all get an SFT update, PPO learns from none, and the run goes on.
    for row in rows[1:]:
        assert (
            row["schedule/hard"] == 1
            and row["sft/tokens"] > 0
            and "ppo/grad_norm" not in row
            and row["ppo/kl"] >= 0
        )
    rows = run(
        tmp_path / "none",
        "--schedule",
        "gate",
        "--threshold",
        -9,
        "--steps",
        4,
        "--sft-warmup",
        1,
        "--reward",
        "length",
    )
    assert all("sft/loss" not in row and row["ppo/first_ratio_gap"] < 1e-5 for row in rows[1:])


def test_buffer_in_a_run_that_is_resumed(tmp_path):
    rows = run(
        tmp_path / "run",
        "--schedule",
        "buffer",
        "--threshold",
        9,
        "--steps",
        9,
        "--sft-warmup",
        0,
        "--reward",
        "length",
    )
    assert [row["phase"] for row in rows] == ["ppo", "sft"] * 4 + ["ppo"] and rows[0][
        "schedule/buffer"
    ] == 4


def test_mix_is_one_update_with_both_losses(tmp_path):
    rows = run(
        tmp_path / "run",
        "--schedule",
        "mix",
        "--ppo-ratio",
        "0.2:1",
        "--steps",
        6,
        "--sft-warmup",
        1,
        "--reward",
        "length",
    )
    assert all(row["ppo/sft_loss"] > 0 for row in rows[1:-1]) and "ppo/sft_loss" not in rows[-1]


def test_mixed_gradient_is_the_weighted_sum_of_the_two():
    model = HybridModel(build_lm("llama"))
    rollout = random_rollout(model)
    demonstrations = make_batch(None, *ragged_batch(7, rows=3), max_length=32)

    def moved(step):
        twin = copy.deepcopy(model)
        step(twin, torch.optim.SGD(twin.parameters(), lr=1.0))
        return [b - a for a, b in zip(model.parameters(), twin.parameters())]

    options = dict(ppo_epochs=1, minibatches=1, max_grad_norm=1e9)
    both = moved(
        lambda m, o: ppo_step(
            m,
            rollout,
            o,
            **options,
            demonstrations=demonstrations,
            sft_weight=0.3,
            micro_batch_size=2,
        )
    )
    rl = moved(lambda m, o: ppo_step(m, rollout, o, **options))
    sft = moved(lambda m, o: sft_step(m, demonstrations, o, max_grad_norm=1e9))
    for x, y, z in zip(both, rl, sft):
        torch.testing.assert_close(x, 0.7 * y + 0.3 * z, atol=1e-5, rtol=1e-3)


def test_equal_records_are_two_prompts_and_a_prompt_without_target_is_never_hard():
    gate, twin = make("gate"), Example("a", "t")
    hard = gate.after_rollout(
        [A, A, twin, twin, Example("d", "")], torch.tensor([0.0, 0.0, 1.0, 1.0, 0.0])
    )
    assert len(hard) == 1 and hard[0] is A


def test_a_lost_demonstration_within_a_rollout_step_is_recorded(tmp_path, monkeypatch):
    import train

    def lost(model, batch, optimizer, **options):
        return {"sft/loss": 1.0, "sft/skipped_steps": 1.0}

    monkeypatch.setattr(train, "sft_step", lost)
    run(
        tmp_path / "run",
        "--schedule",
        "gate",
        "--threshold",
        9,
        "--steps",
        2,
        "--sft-warmup",
        0,
        "--reward",
        "length",
    )
    skipped = [
        json.loads(line) for line in (tmp_path / "run" / "skipped.jsonl").read_text().splitlines()
    ]
    assert [row["step"] for row in skipped] == [1, 2] and len(skipped[0]["prompts"]) == 4
