"""Two gloo processes against one: the same weights, gradients, rollouts and statistics.

Each start has a time limit: a hang is a failure.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from script import Torchrun, copy_until

from train import main

sys.path.insert(0, str(Path(__file__).parent))
import parallel_worker as worker

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="the processes are forks"),
]
TWO = ["--standalone", "--nproc_per_node=2"]
FLAGS = """--limit 120 --steps 8 --batch-size 7 --max-new-tokens 8 --eval-size 6 --save-every 4
--device cpu --sft-warmup 2 --warmup-steps 0 --ppo-ratio 0.6 --micro-batch-size 2
--reward ema(length)""".split()


def start(folder: Path, *command, fails: bool = False) -> str:
    """Two processes with this command. -> what they print, which `folder` keeps."""
    status, said = Torchrun([*TWO, *command], folder, folder / "log").wait()
    assert (status != 0) == fails, said[-3000:]
    return said


def rows(out: Path, phase: str) -> list[dict]:
    return [
        row
        for row in map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
        if row["phase"] == phase
    ]


def close(a: dict, b: dict, atol: float) -> None:
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(
            a[name], b[name], atol=atol, rtol=0, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """What each of the two processes of `parallel_worker.py` saw."""
    folder = tmp_path_factory.mktemp("two")
    start(folder, Path(__file__).parent / "parallel_worker.py", folder)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in (0, 1)]


def test_sft_weights_are_those_of_one_process(two):
    alone = worker.sft_weights()
    for process in two:
        close(process["sft"]["weights"], alone["weights"], atol=1e-5)
        assert process["sft"]["stats"] == pytest.approx(alone["stats"], rel=1e-4)
        assert process["sft"]["head_state"] == alone["head_state"] == 0, (
            "an SFT step does not even touch the value head's moments"
        )


def test_the_weights_of_an_adapter_are_those_of_one_process(two):
    start = worker.with_adapter().state_dict()
    sft = worker.sft_weights(make_model=worker.with_adapter)
    ppo = worker.ppo_weights(two[0]["rollout"], make_model=worker.with_adapter)
    for name, weights in start.items():
        moved = float((sft["weights"][name] - weights).abs().max())
        assert (moved > 5e-4) == ("lora_" in name), name
        assert float((ppo["weights"][name] - weights).abs().max()) > 1e-5, name
    for process in two:
        close(process["lora"]["weights"], sft["weights"], atol=1e-5)
        close(process["ppo_lora"]["weights"], ppo["weights"], atol=1e-6)


def test_ppo_gradients_are_those_of_one_process_on_the_same_rollout(two):
    for name, rollout, minibatches in (("ppo", two[0]["rollout"], 2), ("scarce", None, 3)):
        if rollout is None:
            rollout = worker.ppo.Rollout(**vars(two[0]["rollout"]))
            rollout.response_mask = rollout.response_mask & (torch.arange(7) < 3)[:, None]
        alone = worker.ppo_weights(rollout, minibatches=minibatches)
        moved = max(
            float((alone["weights"][k] - v).abs().max())
            for k, v in worker.new_model().state_dict().items()
        )
        assert moved > 1e-3
        for process in two:
            close(process[name]["weights"], alone["weights"], atol=1e-6)
            assert process[name]["metrics"] == pytest.approx(alone["metrics"], abs=1e-4)


def test_distilled_weights_are_those_of_one_process(two):
    alone, start = worker.distill_weights(), worker.new_model().state_dict()
    moved = max(float((alone["weights"][k] - v).abs().max()) for k, v in start.items())
    assert moved > 5e-4
    for process in two:
        close(process["distill"]["weights"], alone["weights"], atol=1e-6)
        assert process["distill"]["metrics"] == pytest.approx(alone["metrics"], rel=1e-4)


def test_every_process_knows_the_whole_rollout_and_whitens_all_of_it(two):
    first, second = (process["rollout"] for process in two)
    for name in vars(first):
        assert torch.equal(getattr(first, name), getattr(second, name)), name
    assert (
        two[0]["rollout_metrics"] == two[1]["rollout_metrics"]
        and two[0]["reward_state"] == two[1]["reward_state"]
    )
    assert len(first) == 7 and two[0]["gathered"] == two[1]["gathered"] == list("abcdefg")
    advantages = first.advantages[first.response_mask]
    assert abs(float(advantages.mean())) < 1e-5 and float(
        advantages.std(unbiased=False)
    ) == pytest.approx(1, abs=1e-3)
    half = first.advantages[::2][first.response_mask[::2]]
    assert abs(float(half.mean())) > 1e-3, "the halves alone are not white"
    with torch.no_grad():  # what was scored elsewhere is what is scored here
        scores = worker.new_model()(first.input_ids, first.attention_mask, first.response_mask)
    torch.testing.assert_close(scores.logprobs, first.logprobs, atol=1e-5, rtol=0)


def test_the_processes_sample_differently_and_at_their_own_pace(two):
    assert (
        two[0]["ranks_alone"] == two[1]["ranks_alone"]
        and two[0]["ranks_alone"][0] != two[0]["ranks_alone"][1]
    )
    assert two[0]["uneven"] == two[1]["uneven"] == [1, 30] * 3


def test_a_reward_that_fails_on_one_process_fails_on_all(two):
    assert two[0]["failure"] == two[1]["failure"] and "nan" in two[0]["failure"]


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("ddp") / "out"
    printed = start(out.parent, "train.py", *FLAGS, "--out", out)
    assert printed.count("verdict:") == 1 and printed.count("before:") == 1, (
        "one process speaks for all"
    )
    return out


def test_a_run_of_two_processes_leaves_one_folder_and_resumes_bit_by_bit(whole_run, tmp_path):
    steps = [row["step"] for row in rows(whole_run, "sft") + rows(whole_run, "ppo")]
    assert sorted(steps) == list(range(1, 9)) and {path.name for path in whole_run.iterdir()} == {
        "config.json", "metrics.jsonl", "samples.jsonl", "checkpoint-000004", "final",
    }  # fmt: skip
    assert all(
        row["ppo/first_ratio_gap"] < 1e-5 and row["ppo/sampler_gap"] < 1e-4
        for row in rows(whole_run, "ppo")
    )
    resumed = copy_until(whole_run, tmp_path / "again", 4)
    start(tmp_path, "train.py", "--resume", resumed)
    for file in ("model.safetensors", "value_head.safetensors"):
        close(load_file(resumed / "final" / file), load_file(whole_run / "final" / file), atol=0)


def test_one_process_goes_on_where_two_stopped(whole_run, tmp_path):
    resumed = copy_until(whole_run, tmp_path / "alone", 4)
    main(["--resume", str(resumed)])
    assert rows(resumed, "eval")[-1]["step"] == 8


def test_sigterm_to_the_launcher_ends_all_processes_after_the_step_and_the_run_can_go_on(tmp_path):
    endless = "--steps 100000 --eval-every 0 --save-every 0".split()
    words = [*TWO, "train.py", *FLAGS, *endless, "--out", tmp_path / "out"]
    torchrun = Torchrun(words, tmp_path, tmp_path / "log")
    deadline = time.time() + 90
    while not ((tmp_path / "out" / "metrics.jsonl").exists() and rows(tmp_path / "out", "ppo")):
        assert time.time() < deadline and torchrun.process.is_alive(), torchrun.log.read_text()
        time.sleep(0.1)
    os.kill(torchrun.process.pid, signal.SIGTERM)
    status, said = torchrun.wait()
    assert status != 0
    saved = [path.name for path in (tmp_path / "out").glob("checkpoint-*")]
    assert len(saved) == 1, said
    [saved] = saved
    assert int(saved[11:]) >= 1
    one_more = str(int(saved[11:]) + 1)
    main(["--resume", str(tmp_path / "out"), "--steps", one_more])


def test_an_error_on_two_processes_is_a_line_of_each(tmp_path):
    flags = [*FLAGS, "--batch-size", "1", "--out", tmp_path / "out"]
    printed = start(tmp_path, "train.py", *flags, fails=True)
    assert (
        "--batch-size 1 counts all 2 processes together" in printed
        and not (tmp_path / "out").exists()
    )


# ---- DeepSpeed


@pytest.fixture(params=[1, 2])
def zero_json(request, tmp_path, monkeypatch) -> Path:
    pytest.importorskip("deepspeed", reason="deepspeed is an optional package")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    (tmp_path / "zero.json").write_text(json.dumps({"zero_optimization": {"stage": request.param}}))
    return tmp_path / "zero.json"


def test_zero_equals_ddp_and_its_checkpoints_are_plain(whole_run, zero_json, tmp_path):
    flags = ["--deepspeed", zero_json]
    start(tmp_path, "train.py", *FLAGS, *flags, "--out", tmp_path / "zero")
    for file in ("model.safetensors", "value_head.safetensors"):
        close(
            load_file(tmp_path / "zero" / "final" / file),
            load_file(whole_run / "final" / file),
            atol=1e-4,
        )
    zero, ddp = (
        torch.load(out / "final" / "trainer_state.pt", weights_only=True)["stateful"]["optimizer"]
        for out in (tmp_path / "zero", whole_run)
    )
    assert (
        zero["state"].keys() == ddp["state"].keys()
        and zero["param_groups"][0]["params"] == ddp["param_groups"][0]["params"]
    )
    for number, entry in ddp["state"].items():
        close(zero["state"][number], entry, atol=1e-4)
    # DDP goes on from ZeRO's checkpoint, ZeRO from DDP's, and both arrive where the whole run did
    for source, more in ((tmp_path / "zero", []), (whole_run, flags)):
        resumed = copy_until(source, tmp_path / f"resumed{len(more)}", 4)
        start(tmp_path, "train.py", "--resume", resumed, *more)
        close(
            load_file(resumed / "final" / "model.safetensors"),
            load_file(whole_run / "final" / "model.safetensors"),
            atol=1e-4,
        )
