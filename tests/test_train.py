"""The whole program: short runs through `main`, what they leave behind, and what a user's
mistakes look like."""

import copy
import json
import math
import random
import re
import shutil
import subprocess
import sys
from fractions import Fraction

import pytest
import torch
from conftest import FAST, ROOT
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GPT2Tokenizer

import prepare
import train
from data import BatchStream, demonstration_batch, load_examples, split_examples
from hybrid import HybridModel
from lm import build_tiny
from sft import sft_step
from train import is_ppo_step, main


def run(tmp_path, *flags, name="run"):
    """A short run; -> (its metrics, the rows of its metrics.jsonl)."""
    metrics = main([*FAST, "--out", str(tmp_path / name), *map(str, flags)])
    return metrics, read_rows(tmp_path / name / "metrics.jsonl")


def read_rows(path):
    def refuse(constant):
        raise ValueError(f"{constant} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def weights(folder):
    return HybridModel.load(str(folder))[0].state_dict()


# ---- the schedule


@pytest.mark.parametrize("ratio", [0, 0.1, 0.25, 0.5, 2 / 3, 0.9, 1])
def test_the_ratio_is_exact_after_every_cycle(ratio):
    done = 0
    for step in range(200):
        done += is_ppo_step(step, ratio)
        assert done == math.floor((step + 1) * Fraction(ratio).limit_denominator(1000))


def test_half_means_sft_first_and_then_in_turn():
    assert [is_ppo_step(step, 0.5) for step in range(6)] == [False, True] * 3


def test_a_ramp_has_its_mean_and_its_ends():
    phases = [is_ppo_step(step, (0.1, 0.9), 1000) for step in range(1000)]
    assert (
        sum(phases) == 500
        and sum(phases[:100]) == pytest.approx(14, abs=1)
        and sum(phases[-100:]) == pytest.approx(86, abs=1)
    )
    assert [is_ppo_step(step, (0.3, 0.3), 50) for step in range(50)] == [
        is_ppo_step(step, 0.3) for step in range(50)
    ]


# ---- whole runs


def test_a_hybrid_run_and_what_it_leaves_behind(tmp_path, capsys):
    metrics, rows = run(tmp_path, "--sft-warmup", 2, "--save-every", 4, "--eval-every", 3)
    assert [(row["step"], row["phase"]) for row in rows] == [
        (0, "eval"), (1, "sft"), (2, "sft"), (3, "sft"), (3, "eval"), (4, "ppo"), (5, "sft"),
        (6, "ppo"), (6, "eval"),
    ]  # fmt: skip
    for row in rows:
        foreign = {"sft": "ppo/", "ppo": "sft/", "eval": "ppo/"}[row["phase"]]
        assert not any(name.startswith(foreign) for name in row), (
            "keys of the absent phase are absent"
        )
    first_ppo = next(row for row in rows if row["phase"] == "ppo")
    assert (
        first_ppo["ppo/kl"] == 0
        and first_ppo["ppo/first_ratio_gap"] < 1e-5
        and first_ppo["ppo/sampler_gap"] < 1e-4
    )
    assert {k: v for k, v in rows[-1].items() if k not in ("step", "phase")} == metrics

    out = tmp_path / "run"
    assert sorted(path.name for path in out.iterdir()) == [
        "checkpoint-000004",
        "config.json",
        "final",
        "metrics.jsonl",
        "samples.jsonl",
    ]
    config = json.loads((out / "config.json").read_text())
    assert (
        config["sft_warmup"] == 2
        and config["lr"] == 5e-3
        and config["max_length"] == 256
        and config["reward"] == "sentiment"
    )
    assert config["versions"]["torch"] == torch.__version__
    samples = read_rows(out / "samples.jsonl")
    assert (
        len(samples) == 9
        and set(samples[0]) == {"step", "prompt", "response", "score"}
        and "kl" in samples[-1]
    )
    for folder in ("checkpoint-000004", "final"):
        lm, report = AutoModelForCausalLM.from_pretrained(out / folder, output_loading_info=True)
        assert not report["missing_keys"] and not report["unexpected_keys"]
        assert AutoTokenizer.from_pretrained(out / folder).eos_token == "<|endoftext|>"
        assert (out / folder / "value_head.safetensors").is_file()
    printed = capsys.readouterr().out
    assert re.search(
        r"reward [+-]\d\.\d+ -> [+-]\d\.\d+, held-out NLL \d\.\d+ -> \d\.\d+, KL to the reference",
        printed,
    )
    assert "\nbefore: " in printed and "\nafter : " in printed


def test_two_runs_with_one_seed_are_equal_bit_by_bit_and_another_seed_is_not(tmp_path):
    (_, first), (_, second), (_, third) = (
        run(tmp_path, "--seed", seed, name=f"{i}") for i, seed in enumerate((0, 0, 1))
    )
    strip = [[{**row, "seconds": 0} for row in rows] for rows in (first, second, third)]
    assert strip[0] == strip[1] != strip[2]
    a, b = weights(tmp_path / "0" / "final"), weights(tmp_path / "1" / "final")
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_evaluating_more_often_changes_nothing(tmp_path):
    """Not even for a reward that draws random numbers."""
    (tmp_path / "noisy.py").write_text(
        "import random\ndef noisy(completions, **columns):\n"
        "    return [random.random() for _ in completions]\n"
    )
    reward = ["--reward", f"{tmp_path}/noisy.py:noisy"]
    random.seed(0)
    run(tmp_path, *reward, name="rarely")
    random.seed(0)
    run(tmp_path, *reward, "--eval-every", 1, name="often")
    a, b = weights(tmp_path / "rarely" / "final"), weights(tmp_path / "often" / "final")
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_ratio_0_is_pure_sft_bit_by_bit_and_loads_neither_reward_nor_reference(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(
        prepare, "build_reward", lambda *a, **k: pytest.fail("no reward at ratio 0")
    )
    monkeypatch.setattr(
        HybridModel, "frozen_copy", lambda self: pytest.fail("no reference at ratio 0")
    )
    metrics, _ = run(tmp_path, "--ppo-ratio", 0, "--ref-model", "nowhere")
    assert "eval/reward" not in metrics and "eval/kl" not in metrics

    torch.manual_seed(0)  # the same, written out: a model, an optimiser, batches, steps
    examples, _ = split_examples(load_examples("reviews", limit=60))
    lm, tokenizer = build_tiny([e.prompt + e.target for e in examples])
    model = HybridModel(lm)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=5e-3, betas=(0.9, 0.95), eps=1e-5, weight_decay=0.0, fused=True
    )
    stream = BatchStream(examples, 4, seed=0)
    for step in range(6):
        optimizer.param_groups[0]["lr"] = 5e-3 * (1 - step / 6)
        sft_step(model, demonstration_batch(tokenizer, stream.next(), 256), optimizer)
    final = weights(tmp_path / "run" / "final")
    assert all(torch.equal(x, final[name]) for name, x in model.state_dict().items())


def test_ratio_1_is_pure_ppo(tmp_path):
    _, rows = run(tmp_path, "--ppo-ratio", 1)
    assert {row["phase"] for row in rows} == {"eval", "ppo"}


@pytest.mark.parametrize("flags", ["--amp bf16", "--amp fp16", "--gradient-checkpointing"])
def test_precision_and_checkpointing_train_on_policy(tmp_path, flags):
    _, rows = run(tmp_path, *flags.split(), "--ppo-ratio", 0.7, "--save-every", 3)
    ppo = [row for row in rows if row["phase"] == "ppo"]
    assert (
        ppo[0]["ppo/kl"] == 0
        and all(row["ppo/first_ratio_gap"] < 1e-5 for row in ppo)
        and ppo[0]["ppo/sampler_gap"] < 0.1
    )
    assert {x.dtype for x in weights(tmp_path / "run" / "final").values()} == {torch.float32}
    shutil.rmtree(tmp_path / "run" / "final")
    main(["--resume", str(tmp_path / "run")])
    again = read_rows(tmp_path / "run" / "metrics.jsonl")
    assert [{**row, "seconds": 0} for row in again] == [{**row, "seconds": 0} for row in rows], (
        "the scaler is resumed too"
    )


def test_a_ramp_runs(tmp_path):
    _, rows = run(tmp_path, "--ppo-ratio", "0:1", "--sft-warmup", 0)
    assert [row["phase"] for row in rows if row["phase"] != "eval"] == [
        "sft",
        "sft",
        "sft",
        "ppo",
        "ppo",
        "ppo",
    ]


def test_a_refreshed_reference_is_at_kl_0_again(tmp_path):
    _, rows = run(tmp_path, "--ppo-ratio", 1, "--ref-refresh", 2, "--reward", "length")
    kls = [row["ppo/kl"] for row in rows if row["phase"] == "ppo"]
    assert kls[0] == kls[2] == kls[4] == 0 and min(kls[1], kls[3], kls[5]) > 0


def test_a_named_reference_is_used_from_the_start(tmp_path, tiny_folder):
    run(
        tmp_path,
        "--model",
        tiny_folder,
        "--lr",
        "1e-2",
        "--ppo-ratio",
        0,
        "--max-length",
        40,
        name="other",
    )
    flags = ["--model", tiny_folder, "--ppo-ratio", 1, "--max-length", 40]
    _, rows = run(tmp_path, *flags, "--ref-model", tmp_path / "other" / "final")
    assert rows[0]["eval/kl"] > 0 and rows[1]["ppo/kl"] > 0


def test_a_local_folder_and_a_users_reward(tmp_path, tiny_folder):
    (tmp_path / "mine.py").write_text(
        "def vowels(completions, **columns):\n"
        "    return [sum(c in 'aeiou' for c in t) / 10 for t in completions]\n"
    )
    metrics, rows = run(
        tmp_path,
        "--model",
        tiny_folder,
        "--reward",
        f"0.5*{tmp_path}/mine.py:vowels + rouge_l + 0.1*perplexity",
        "--kl-target",
        3,
    )
    ppo = [row for row in rows if row["phase"] == "ppo"][-1]
    assert ppo["ppo/score"] == pytest.approx(
        0.5 * ppo["reward/vowels"] + ppo["reward/rouge_l"] + 0.1 * ppo["reward/perplexity"],
        abs=1e-6,
    )
    assert json.loads((tmp_path / "run" / "config.json").read_text())["max_length"] == 64, (
        "the model's context"
    )
    assert ppo["ppo/kl_coef"] < 0.05, "a KL below its target makes the price fall"
    assert "eval/fluent" in metrics


@pytest.mark.parametrize("n", [1, 3])
def test_data_smaller_than_a_batch(tmp_path, n):
    path = tmp_path / "few.jsonl"
    path.write_text(
        "".join(
            json.dumps({"prompt": f"p{i}", "target": f"the answer {i}"}) + "\n" for i in range(n)
        )
    )
    metrics, _ = run(tmp_path, "--data", path)
    assert math.isfinite(metrics["eval/nll"])


def test_dialogues_train_and_sample(tmp_path):
    path = tmp_path / "chat.jsonl"
    turns = [
        {"role": role, "content": f"{role} says {i}"}
        for i in range(3)
        for role in ("user", "assistant")
    ]
    path.write_text(
        (json.dumps({"messages": turns}) + "\n") * 4 + json.dumps({"messages": turns[2:]}) + "\n"
    )
    _, rows = run(tmp_path, "--data", path, "--reward", "rouge_1")
    assert any(row["phase"] == "ppo" for row in rows)


def test_micro_batches_change_memory_not_results(tmp_path):
    flags = ["--ppo-ratio", 0, "--steps", 3, "--reward", "sentiment"]
    _, whole = run(tmp_path, *flags, name="whole")
    _, ones = run(tmp_path, *flags, "--micro-batch-size", 1, name="ones")
    for left, right in zip(whole, ones, strict=True):
        assert {**left, "seconds": 0} == pytest.approx({**right, "seconds": 0}, abs=1e-4)
    a, b = weights(tmp_path / "whole" / "final"), weights(tmp_path / "ones" / "final")
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=1e-4, rtol=0)


@pytest.mark.parametrize("cut", [3, 5])  # inside the SFT stretch; between two PPO steps
def test_a_resumed_run_equals_an_uninterrupted_one_bit_by_bit(tmp_path, cut):
    flags = [
        "--steps",
        8,
        "--sft-warmup",
        3,
        "--ppo-ratio",
        0.7,
        "--kl-target",
        2,
        "--micro-batch-size",
        3,
        "--ref-refresh",
        3,
    ]
    flags += ["--reward", "clip(ema(sentiment), -2, 2) + mixture(length, repetition)"]
    run(tmp_path, *flags, name="whole")
    run(tmp_path, *flags, "--save-every", cut, name="cut")
    out = tmp_path / "cut"
    for later in [
        folder for folder in out.glob("checkpoint-*") if folder.name != f"checkpoint-{cut:06d}"
    ] + [out / "final"]:
        shutil.rmtree(later)
    with (out / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "torn')  # a crash in the middle of a line
    main(["--resume", str(out)])
    rows = [
        [
            {k: v for k, v in row.items() if k != "seconds"}
            for row in read_rows(tmp_path / name / "metrics.jsonl")
        ]
        for name in ("whole", "cut")
    ]
    assert rows[0] == rows[1]
    assert (tmp_path / "whole" / "samples.jsonl").read_text() == (out / "samples.jsonl").read_text()
    a, b = weights(tmp_path / "whole" / "final"), weights(out / "final")
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_resumed_run_may_not_contradict_itself(tmp_path, capsys):
    run(tmp_path, "--save-every", 3)
    out = tmp_path / "run"
    assert "--lr 0.1 contradicts the run that is resumed, which has 0.005" in fails(
        capsys, "--resume", out, "--lr", 0.1
    )
    assert "nothing to resume there" in fails(capsys, "--resume", tmp_path / "nowhere")
    before = (out / "config.json").read_text()
    assert "the run has done its 6 steps" in fails(capsys, "--resume", out, "--steps", 3)
    assert (out / "config.json").read_text() == before
    assert "--out elsewhere contradicts" in fails(capsys, "--resume", out, "--out", "elsewhere")
    main(["--resume", str(out), "--steps", "8"])
    assert read_rows(out / "metrics.jsonl")[-1]["step"] == 8


def test_a_flag_may_be_said_again_when_resuming(tmp_path, tiny_folder):
    flags = ["--model", tiny_folder, "--max-length", 40, "--grad-accum", 2, "--ppo-ratio", "0:1"]
    flags += ["--ref-model", f"a={tiny_folder}", "--ref-model", f"b={tiny_folder}:2"]
    run(tmp_path, *flags, "--save-every", 3)
    shutil.rmtree(tmp_path / "run" / "final")
    assert (
        main([*FAST, *map(str, flags), "--resume", str(tmp_path / "run"), "--save-every", "3"])[
            "eval/nll"
        ]
        > 0
    )


def test_a_run_from_before_there_was_rl_lr_goes_on_with_its_one_rate(tmp_path):
    run(tmp_path, "--lr", 0.003, "--sft-warmup", 0, "--ppo-ratio", 0.5, "--scheduler", "constant")
    out = tmp_path / "run"
    config = json.loads((out / "config.json").read_text())
    assert config.pop("rl_lr") == pytest.approx(0.0018)
    (out / "config.json").write_text(json.dumps(config))
    main(["--resume", str(out), "--steps", "8"])
    rows = read_rows(out / "metrics.jsonl")
    assert {row["lr"] for row in rows if row["step"] > 6 and "lr" in row} == {0.003}


@pytest.mark.filterwarnings("ignore:Detected call of")
def test_ten_lost_steps_in_a_row_end_the_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        train, "sft_step", lambda *a, **k: {"sft/loss": math.nan, "sft/skipped_steps": 1.0}
    )
    with pytest.raises(SystemExit) as caught:
        run(tmp_path, "--steps", 20, "--ppo-ratio", 0)
    rows = read_rows(tmp_path / "run" / "metrics.jsonl")
    assert caught.value.code == 2 and rows[-1]["step"] == 10 and "sft/loss" not in rows[-1]
    assert "error: no finite reward and gradient in 10 steps in a row" in capsys.readouterr().err


def test_real_model_on_real_stories(tmp_path, shared):
    metrics, rows = run(
        tmp_path,
        "--model",
        shared / "stories260K",
        "--data",
        shared / "tinystories" / "tinystories_sample.txt",
        "--max-new-tokens",
        24,
    )
    assert rows[0]["eval/nll"] < 1.8, (
        "a pretrained model: anything near log 512 = 6.2 means wrong tokens"
    )
    assert abs(metrics["eval/nll"] - rows[0]["eval/nll"]) < 0.1


def test_random_gpt2_with_the_real_gpt2_tokenizer(tmp_path, shared):
    folder = tmp_path / "gpt2"
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(
        AutoConfig.for_model("gpt2", n_embd=16, n_layer=1, n_head=2)
    ).save_pretrained(folder)
    GPT2Tokenizer.from_pretrained(shared / "gpt2_tokenizer").save_pretrained(folder)
    text = (shared / "reviews_rt" / "rt-polarity.pos").read_bytes()
    (tmp_path / "reviews.txt").write_bytes(text)
    _, rows = run(
        tmp_path, "--model", folder, "--data", tmp_path / "reviews.txt", "--encoding", "latin-1"
    )
    assert rows[0]["eval/nll"] == pytest.approx(math.log(50257), abs=0.1)
    assert AutoTokenizer.from_pretrained(tmp_path / "run" / "final").pad_token_id is None


# ---- mistakes


def fails(capsys, *flags) -> str:
    """Runs `main`, expects exit status 2 and one line on stderr, returns it."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        main([str(flag) for flag in flags])
    err = capsys.readouterr().err
    assert caught.value.code == 2 and err.startswith("error: ") and err.count("\n") == 1, err
    return err


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--modle gpt2", "unrecognized arguments: --modle gpt2"),
        ("--steps 0", "argument --steps: expected a whole number at least 1, found '0'"),
        ("--steps many", "expected a whole number at least 1, found 'many'"),
        ("--ppo-ratio 1.5", "expected a number at least 0 and at most 1, found '1.5'"),
        ("--ppo-ratio 0:2", "at most 1, found '2'"),
        ("--ppo-ratio 0:0.5:1", "expected a number or start:end"),
        ("--lr nan", "expected a number above 0, found 'nan'"),
        ("--lr inf", "found 'inf'"),
        ("--kl-coef -0.1", "at least 0, found '-0.1'"),
        ("--temperature 0", "at least 0.01, found '0'"),
        ("--kl-target 6 --kl-coef 0", "--kl-target needs a --kl-coef above 0"),
        ("--kl-target 6 --kl-horizon 5", "a --kl-horizon of at least the batch"),
        ("--sft-warmup 9 --steps 9", "leaves no PPO step"),
        ("--device meta", "known are auto, cuda, mps and cpu"),
        ("--seed 99999999999999999999", "and at most"),
        ("--kl-estimator k9", "invalid choice: 'k9'"),
        ("--device cuda:77", "--device cuda:77 cannot be used here"),
        ("--device abacus", "--device abacus cannot be used here"),
        ("--model no/such-model", "could not be fetched from the Hugging Face hub"),
        ("--model ./nowhere", "expected a Hugging Face model folder with a config.json"),
        ("--data nowhere.csv", "nowhere.csv does not exist"),
        ("--reward foo", "cannot read 'foo'; known are bleu"),
        ("--max-length 1000", "--max-length 1000 is beyond the model's context of 256 tokens"),
        ("--max-length 16 --max-new-tokens 16", "leaves no room for a prompt"),
        ("--ref-model ./nowhere", "error: --ref-model ./nowhere: expected"),
    ],
)
def test_a_mistake_is_one_line(tmp_path, capsys, flags, message):
    assert message in fails(capsys, "--out", tmp_path / "run", "--limit", 20, *flags.split())
    assert not (tmp_path / "run").exists(), (
        "nothing is written before everything is known to be right"
    )


def test_a_run_is_not_written_over(tmp_path, capsys):
    run(tmp_path, "--steps", 1)
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert "already holds a run" in fails(capsys, *FAST, "--out", tmp_path / "run")
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == before
    run(tmp_path, "--steps", 2, "--overwrite")
    (tmp_path / "file").write_text("x")
    assert "cannot be written" in fails(capsys, *FAST, "--out", tmp_path / "file")


def test_models_that_do_not_fit_together(tmp_path, capsys, tiny_folder, tiny):
    def refused(*flags):
        return fails(capsys, "--out", tmp_path / "x", *FAST, *flags)

    def folder(name, **changes):
        path = tmp_path / name
        lm = AutoModelForCausalLM.from_pretrained(tiny_folder)
        if "vocab" in changes:
            lm.resize_token_embeddings(changes["vocab"])
        lm.save_pretrained(path)
        tokenizer = copy.deepcopy(tiny[1])
        if "no_eos" in changes:
            tokenizer.eos_token = None
        if "no_tokenizer" not in changes:
            tokenizer.save_pretrained(path)
        return path

    assert "embeds only 100" in refused("--model", folder("a", vocab=100))
    assert "has no EOS token" in refused("--model", folder("b", no_eos=True))
    assert "has no tokenizer" in refused("--model", folder("c", no_tokenizer=True))
    cut = folder("d")
    (cut / "model.safetensors").write_bytes((cut / "model.safetensors").read_bytes()[:1000])
    assert "cannot be read as a causal LM" in refused("--model", cut)
    vit = tmp_path / "vit"
    AutoConfig.for_model("vit").save_pretrained(vit)
    assert "cannot be read as a causal LM" in refused("--model", vit)
    assert "another vocabulary" in refused("--ref-model", tiny_folder)


@pytest.mark.slow
def test_the_command_line_itself(tmp_path):
    """Exit status and streams as a shell sees them."""
    done = subprocess.run(
        [sys.executable, "train.py", "--steps", "-3"], cwd=ROOT, capture_output=True, text=True
    )
    assert (
        (done.returncode, done.stdout) == (2, "")
        and done.stderr.startswith("error: argument --steps")
        and done.stderr.count("\n") == 1
    )
