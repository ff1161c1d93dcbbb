"""bench.py and cost.py: their counts against independent ones; no assertion depends on speed."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import SHARED
from torch.utils.flop_counter import FlopCounterMode

import bench
import cost
from hybrid import HybridModel
from train import main

SMALL = "--layers 2 --width 64 --vocab 256 --batch 4 --prompt-len 6 --response-len 5".split()
SMALL += ["--rounds", "1", "--device", "cpu"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    ["sft", "rollout --ragged --against generate", "ppo --ragged --amp bf16 --micro-batch-size 2"],
)
def test_every_workload_runs_and_reports(capsys, flags):
    rows = bench.main([*flags.split(), *SMALL, "--json"])
    assert json.loads(capsys.readouterr().out) == rows and len(rows) == (
        2 if "against" in flags else 1
    )
    for row in rows:
        assert (
            row["seconds"] > 0
            and row["episodes_per_second"] == pytest.approx(4 / row["seconds"])
            and row["peak_mib"] >= 0
        )
    assert (
        rows[0]["candidate"] == "this project"
        and 0 < rows[0]["flop_utilisation"] < 1
        and rows[0]["tokens_per_second"] > 0
    )
    bench.print_steps(rows)
    assert ("this project is" in capsys.readouterr().out) == ("against" in flags)


@pytest.mark.slow
def test_a_peer_that_is_not_there_or_measures_something_else_is_one_line(capsys):
    for flags, message in (
        (["sft", "--against", "trl"], "trl is measured by ppo"),
        (["ppo", "--against", "trl", "--peer-python", sys.executable], "died"),
    ):
        if (
            "died" in message
            and subprocess.run([sys.executable, "-c", "import trl"], capture_output=True).returncode
            == 0
        ):
            continue
        with pytest.raises(SystemExit):
            bench.main([*flags, *SMALL])
        assert message in capsys.readouterr().err


SIZES = dict(model=None, prompt_len=16, response_len=16, ragged=False, device="cpu")


def test_flops_are_those_that_torch_counts():
    load = SimpleNamespace(**SIZES, layers=3, width=128, vocab=300)
    model = HybridModel(bench.build_lm(load))
    # torch counts its matrix products; fused attention on the CPU it does not see
    model.lm.config._attn_implementation = "eager"
    ids = torch.randint(1, 300, (2, 33))
    mask, response = torch.ones_like(ids).bool(), (torch.arange(33) > 16).expand(2, -1)
    with FlopCounterMode(display=False) as counter:
        model(ids, mask, response)
    ours = bench.step_flops("sft", 3, 128, 300, [17, 17], [16, 16]) / 3
    # Half of the square: torch counts what lies above the diagonal, but nobody needs it.
    attention = 2 * 3 * (4 * 128) * (32 * 33) / 2
    assert counter.get_total_flops() == pytest.approx(ours + attention * 31 / 33, rel=0.01)


def test_ragged_workloads_have_the_lengths_that_they_promise():
    load = SimpleNamespace(batch=500, vocab=100, ragged=True)
    first = bench.make_ids(load, 64, 0)
    lengths = [len(ids) for ids in first]
    assert min(lengths) == 8 and max(lengths) == 64
    assert first == bench.make_ids(load, 64, 0) != bench.make_ids(load, 64, 1)
    load = SimpleNamespace(**{**SIZES, "ragged": True}, layers=1, width=64, vocab=1000)
    lm = bench.build_lm(load)
    with torch.no_grad():
        p_eos = torch.softmax(lm(torch.randint(1, 1000, (8, 32))).logits, -1)[..., 0].mean()
    assert float(p_eos) == pytest.approx(1 / 30, rel=0.1)


# ---- what fits


def test_a_dry_run_prints_the_estimate_writes_nothing_and_never_loads_the_weights(
    tmp_path, tiny_folder, capsys, monkeypatch
):
    (tiny_folder / "model.safetensors").rename(tmp_path / "away")
    try:
        main(
            [
                "--model",
                str(tiny_folder),
                "--dry-run",
                "--out",
                str(tmp_path / "out"),
                "--batch-size",
                "16",
            ]
        )
    finally:
        (tmp_path / "away").rename(tiny_folder / "model.safetensors")
    printed = capsys.readouterr().out
    assert (
        "8 devices, 2 rows at a time on each" in printed
        and "ZeRO-2" in printed
        and not (tmp_path / "out").exists()
    )
    caches = []
    for micro in ("1", "64"):
        main(["--dry-run", "--batch-size", "64", "--micro-batch-size", micro])
        caches.append(capsys.readouterr().out.split("cache ")[1].split(",")[0])
    assert caches[0] == caches[1], (
        "all prompts of a device are sampled together, whatever the micro-batch"
    )
    main(["--dry-run", "--ppo-ratio", "0"])
    printed = capsys.readouterr().out
    assert "reference 0," in printed and "sampled" not in printed


def test_sizes_are_read_from_the_config_alone(shared):
    sizes = cost.sizes_of(str(SHARED / "stories260K"))
    assert (sizes.layers, sizes.width, sizes.kv_width, sizes.vocab) == (
        5,
        64,
        32,
        512,
    ) and 250_000 < sizes.parameters < 300_000


def test_the_estimate_follows_its_formula():
    sizes = cost.Sizes(parameters=1000.0, layers=2, width=10, kv_width=5, vocab=100)
    held = cost.memory(sizes, rows=3, sampled=6, length=20, response=4)
    expected = {
        "weights": 4000,
        "reference": 4000,
        "gradients": 4000,
        "Adam": 8000,
        "buckets": 0,
        "bf16 copies": 0,
    }
    expected |= {"activations": 85 * 2 * 10 * 60, "logits": 12 * 100 * 12, "cache": 8 * 2 * 5 * 120}
    assert held == {**expected, "peak": 20000 + 102000 + 14400}
    assert (
        cost.memory(sizes, rows=3, sampled=3, length=20, response=4, devices=4, zero=2)["Adam"]
        == 3000
    )
    assert (
        cost.memory(sizes, rows=3, sampled=0, length=20, response=4, references=0)["reference"] == 0
    )


def test_the_activations_are_those_that_autograd_keeps():
    """Bytes saved for backward, by torch hooks: 85 per token, layer and width of a Llama block."""
    from conftest import build_lm

    layers, width, tokens = 4, 256, 4 * 64
    shape = dict(
        hidden_size=width, intermediate_size=688, num_hidden_layers=layers, num_key_value_heads=4
    )
    model = HybridModel(build_lm("llama", **shape)).train()
    weights, kept = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = (tensor, tensor.untyped_storage().nbytes())
        return tensor

    ids = torch.randint(3, 60, (4, 65))
    response = (torch.arange(65) > 63).expand(4, -1)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(ids, torch.ones_like(ids).bool(), response)
    saved = sum(size for pointer, (_, size) in kept.items() if pointer not in weights)
    assert saved / (layers * width * tokens) == pytest.approx(85, rel=0.03)
