"""bench.py and cost.py: their counts against independent ones; no assertion depends on speed."""

import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, SHARED, build_lm
from torch.utils.flop_counter import FlopCounterMode

import bench
import cost
from activations import FakeModel
from chat import end_ids
from hybrid import HybridModel
from sources import make_reviews
from train import main

SMALL = "--layers 2 --width 64 --vocab 256 --batch 4 --prompt-len 6 --response-len 5".split()
SMALL += ["--rounds", "1", "--device", "cpu"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        "sft",
        "rollout --ragged --against generate",
        "ppo --ragged --amp bf16 --micro-batch-size 2",
        "ppo --lora 3",
    ],
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
    assert rows[0]["candidate"] == "this project" and rows[0]["tokens_per_second"] > 0
    if "lora" not in flags:  # the formula counts an update of all weights
        assert 0 < rows[0]["flop_utilisation"] < 1
    bench.print_steps(rows)
    assert ("this project is" in capsys.readouterr().out) == ("against" in flags)


def test_the_ends_of_a_model_do_not_end_the_responses_of_a_workload():
    """A chat model names ends of its own; the workload counts tokens until EOS."""
    lm = build_lm("llama")
    lm.generation_config.eos_token_id = [bench.EOS, 2]
    assert end_ids(bench.NoText, lm) == [bench.EOS]


@pytest.mark.slow
def test_a_peer_that_is_not_there_or_measures_something_else_is_one_line(capsys):
    for flags, message in (
        (["sft", "--against", "trl"], "trl is measured by ppo"),
        (["rollout", "--lora", "2", "--against", "generate"], "--lora is measured in whole steps"),
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
        "examples to train on" in printed
        and "8 devices, each: " in printed
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
    assert "reference 0," in printed and "cache 0," in printed


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
    rows, kept = cost.Rows(columns=60, answers=12, sampled=120), [300.0, 17.0]
    held = cost.memory(sizes, rows, kept)
    expected = {
        "program": 0,
        "weights": 4000,
        "reference": 4000,
        "Adam": 8000,
        "buckets": 0,
        "bf16 copies": 0,
        "gradients": 4000,
    }
    # 12 tokens: 12 V c = 14400 for the scores; 4 V c + 4 V W = 8800 is less
    expected |= {"activations": 317 * 60, "logits": 14400, "cache": 8 * 2 * 5 * 120, "holes": 0}
    assert held == {**expected, "peak": 16000 + 317 * 60 + 14400}
    # the gradients of one micro-batch wait for those of the next
    parts = cost.memory(sizes, rows._replace(in_parts=True), kept)
    assert parts["peak"] == held["peak"] + 4000
    few = cost.memory(sizes, rows._replace(columns=1, answers=1, sampled=0), kept)
    assert few["logits"] == 400 + 4000 and few["peak"] == 16000 + 317 + 4400
    assert cost.memory(sizes, rows, kept, devices=4, zero=2)["Adam"] == 3000
    assert cost.memory(sizes, rows, kept, references=0)["reference"] == 0
    taught = cost.memory(sizes, rows, kept, references=2.5, logits=20)
    assert taught["reference"] == 10000 and taught["logits"] == 24000
    # without a head: the gradients or the cache are what is largest
    alone = sizes._replace(vocab=0)
    assert cost.memory(alone, cost.Rows(1, 1), kept)["peak"] == 16000 + 4000
    assert cost.memory(alone, cost.Rows(1, 1, sampled=500), kept)["peak"] == 16000 + 40000
    # a process: of two tensors one is below 32 MiB, and half of it is a hole
    columns = 2**20
    held = cost.memory(sizes, cost.Rows(columns, 1), [40.0, 31.0], program=7.0)
    assert held["program"] == 7 and held["holes"] == 31 * columns / 2
    assert held["peak"] == 16007 + 71 * columns + held["logits"] + held["holes"]
    repeated = cost.memory(sizes, rows, kept, checkpointing=True)
    assert repeated["activations"] == 4 * 10 * 60 * 2 + 317 * 60 / 2


def test_the_rows_of_an_estimate_are_those_of_the_largest_micro_batch():
    # Eight equal rows of 9 + 4 tokens, of which the model reads 12.
    equal = cost.Kind([[(9, 4)]] * 8)
    assert cost.largest_rows(equal, 8, 8, True) == cost.Rows(8 * 12, 8 * 4)
    assert cost.largest_rows(equal, 8, 3, True) == cost.Rows(3 * 12, 3 * 4, in_parts=True)
    # One long row and seven short ones: packed they are two rows, padded they are eight.
    ragged = cost.Kind([[(90, 11)]] + [[(9, 2)]] * 7)
    assert cost.largest_rows(ragged, 8, 8, True).columns == 2 * 100
    assert cost.largest_rows(ragged, 8, 8, False).columns == 8 * 100
    assert cost.largest_rows(ragged, 8, 1, True) == cost.Rows(100, 11, in_parts=True)
    # Episodes: two updates a pass, half of the batch each; the cache holds the whole batch.
    episodes = cost.Kind([[(9, 6)]] * 8, minibatches=2, new_tokens=6)
    assert cost.largest_rows(episodes, 8, 8, True) == cost.Rows(4 * 14, 24, False, 8 * 15)
    pairs = cost.Kind([[(9, 4), (9, 2)]] * 6)  # two rows each
    assert cost.largest_rows(pairs, 3, 3, False) == cost.Rows(6 * 12, 3 * 6)


@pytest.mark.parametrize("amp", [None, torch.bfloat16])
@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gemma2", "bloom"])
def test_the_activations_are_those_that_autograd_keeps(model_type, amp):
    """Counted without data, against what a real forward of packed rows keeps, by torch hooks."""
    lm = build_lm(model_type)
    model = HybridModel(lm).train()
    counted = FakeModel(lm.config)
    assert counted.parameters() == sum(p.numel() for p in lm.parameters())
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def saved(rows: int) -> int:
        kept = {}

        def keep(tensor):
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = (tensor, storage.nbytes())
            return tensor

        inputs = {"input_ids": torch.randint(3, 60, (rows, 31))}
        if model.can_pack:  # two texts in a row
            inputs["position_ids"] = torch.cat([torch.arange(15), torch.arange(16)]).repeat(rows, 1)
        hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
        with hooks, torch.autocast("cpu", amp, enabled=amp is not None):
            lm.base_model(**inputs, use_cache=False)
        return sum(size for pointer, (_, size) in kept.items() if pointer not in weights)

    real = (saved(7) - saved(4)) / 3 / 31
    assert sum(counted.kept(31, amp)) == pytest.approx(real, rel=0.02)


def test_a_mixture_of_experts_is_estimated_and_that_is_said(tmp_path, capsys):
    sizes, model = cost.model_of("", build_lm("minimax").config)
    kept = cost.kept_bytes(sizes, model, 20, "no")
    assert sum(kept) == pytest.approx(85 * 2 * 32, rel=0.02)
    assert "taken to be 85 bytes a token" in capsys.readouterr().out


def test_what_a_dry_run_says_is_what_the_run_takes(tmp_path):
    """Peak memory of a real run in a process of its own, where a third of it is activations."""
    if not Path("/proc/self/status").is_file():
        pytest.skip("no /proc here that knows the peak of a process")
    reviews = [example.prompt + example.target for example in make_reviews(600)]
    lines = []
    for i in range(0, len(reviews), 12):
        lines.append(json.dumps({"prompt": "the", "target": " " + " ".join(reviews[i : i + 12])}))
    (tmp_path / "long.jsonl").write_text("\n".join(lines) + "\n")
    flags = f"--ppo-ratio 0 --batch-size 24 --steps 2 --data {tmp_path / 'long.jsonl'} --out "
    flags += f"{tmp_path / 'out'} --eval-size 1 --eval-every 0 --save-every 0 --max-new-tokens 2"
    code = "import sys, train; train.main([*sys.argv[1:], '--dry-run']); train.main(sys.argv[1:]); "
    code += "print(open('/proc/self/status').read())"
    argv = [sys.executable, "-c", code, *flags.split(), "--device", "cpu"]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = float(re.search(r"peak ([\d.]+)$", done.stdout, re.MULTILINE)[1])
    program = float(re.search(r"program ([\d.]+),", done.stdout)[1])
    measured = int(re.search(r"VmHWM:\s+(\d+) kB", done.stdout)[1]) / 2**20
    assert said == pytest.approx(measured, rel=0.35)
    assert measured > 1.5 * program  # else the check above would be of the process alone
