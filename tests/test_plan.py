"""What a run says before it starts, and how long it will take."""

import doctest
from types import SimpleNamespace

import pytest
import torch
from conftest import FAST

import plan
from train import main


def test_the_examples_of_the_file_hold():
    assert doctest.testmod(plan).failed == 0


@pytest.mark.parametrize(
    "optimizer, ppo_ratio, keep, save_every, teacher, expected",
    [
        # weights, two moments, a reference; a teacher is not saved
        ("adamw", 0.5, 2, 100, None, "takes 2.2 GB, up to 3 of them"),
        ("adamw", 0.5, 2, 100, "it", "takes 1.6 GB, up to 3 of them"),
        ("adamw", 0, 3, 100, None, "takes 1.6 GB, up to 4 of them"),
        ("sgd", 0.5, 2, 0, None, "takes 1.6 GB, up to 1 of them"),
    ],
)
def test_the_disk_that_checkpoints_take(optimizer, ppo_ratio, keep, save_every, teacher, expected):
    args = SimpleNamespace(
        optimizer=optimizer, ppo_ratio=ppo_ratio, keep=keep, save_every=save_every, out="out"
    )
    args.teacher = teacher
    assert expected in plan.disk_line(args, 135e6)


def test_examples_and_those_with_a_target_are_counted_apart():
    args = SimpleNamespace(data="a.json", prompts=["b.jsonl", "c.jsonl"])
    train = [SimpleNamespace(target=target) for target in ("t", "", "u", "")]
    assert plan.data_line(args, train[::2], 1, 0) == (
        "data: a.json; prompts: b.jsonl, c.jsonl: 2 examples to train on, 1 held out"
    )
    args.prompts = None
    assert plan.data_line(args, train[:3], 4, 1200) == (
        "data: a.json: 3 examples to train on, 2 of them with a target, 4 held out, "
        "1,200 preference pairs"
    )


def test_the_time_left_is_said_once_both_kinds_of_steps_were_seen():
    phases = ["sft", "ppo"] * 50
    run = SimpleNamespace(schedule=SimpleNamespace(phase=lambda step: phases[step]), step=0)
    said = []
    left = plan.TimeLeft(SimpleNamespace(steps=100), run, said.append)
    seconds = {"sft": iter([90.0, 2.0] + [2.0] * 50), "ppo": iter([70.0, 5.0] + [5.0] * 50)}
    for phase in phases[:20]:
        run.step += 1
        left.saw(phase, next(seconds[phase]))
    # 96 steps are left after the fourth: 48 of 2 and 48 of 5 seconds; the first of a kind is slow
    assert said == ["step 4: about 6 minutes to go, without evaluations"]


def test_a_hint_about_bf16_follows_two_products(monkeypatch):
    cpu = torch.device("cpu")
    seconds = {torch.float32: 6.0, torch.bfloat16: 2.0}
    monkeypatch.setattr(plan, "seconds_of_product", lambda n, dtype, device, rounds: seconds[dtype])
    no, bf16 = [SimpleNamespace(amp=amp, base_dtype="float32") for amp in ("no", "bf16")]
    assert "--amp bf16 multiplies matrices 3.0 times as fast" in plan.precision_hint(no, cpu, 1e8)
    assert plan.precision_hint(no, cpu, 1e6) is None and plan.precision_hint(bf16, cpu, 1e8) is None
    seconds[torch.bfloat16] = 30.0
    assert "5.0 times as slow as float32" in plan.precision_hint(bf16, cpu, 1e8)
    assert plan.precision_hint(no, cpu, 1e8) is None


def test_a_run_says_what_it_will_do_before_it_does_it(tiny_folder, tmp_path, capsys):
    flags = [*FAST, "--model", str(tiny_folder), "--max-length", "48", "--ppo-ratio", "0.5"]
    main([*flags, "--out", str(tmp_path / "out")])
    out = capsys.readouterr().out
    places = [
        out.index(line)
        for line in (
            "device: cpu",
            "no --data was given: training is on the built-in film reviews",
            "data: the built-in film reviews: ",
            f"model: {tiny_folder}, ",
            "training: 3 SFT and 3 PPO steps of 4; reward: sentiment; adamw, lr 1e-05",
            "disk: a checkpoint takes",
            "step 0  nll",
        )
    ]
    assert places == sorted(places)
