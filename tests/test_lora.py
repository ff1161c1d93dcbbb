"""LoRA against its equation and against PEFT; a run with it against what a run promises."""

import json
import re
from types import SimpleNamespace

import pytest
import torch
from conftest import ARCHITECTURES, FAST, build_lm, ragged_batch, shaken
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

import cost
import plan
from data import make_batch
from engine import OPTIMIZERS, UserError
from hybrid import HybridModel, forward_rows
from lm import load_lm
from lora import LoRA, LoraModel, add_adapter, is_own
from references import follow_policy
from runs import read_rows
from train import main

IDS = torch.tensor([[5, 9, 33, 2, 60, 17, 8]])
RUN = [*FAST, "--max-length", "40", "--lora", "3", "--lora-alpha", "7", "--lr", "1e-2"]


def new_model(kind: str = "gpt2", **options) -> LoraModel:
    return shaken(LoraModel(build_lm(kind), **dict(rank=3, alpha=7.0, seed=5) | options))


def logits(lm) -> torch.Tensor:
    with torch.no_grad():
        return lm(IDS).logits


# ---- the equation


@pytest.mark.parametrize("is_conv", [False, True])
def test_a_layer_computes_equation_3(is_conv):
    w = torch.tensor([[1.5, -2.0, 0.25], [0.0, 3.0, -1.0]])  # (out 2, in 3)
    bias = torch.tensor([0.5, -7.0])
    base = nn.Linear(3, 2)
    if is_conv:
        base = Conv1D(2, 3)
    base.weight.data, base.bias.data = (w.T if is_conv else w).clone(), bias
    layer = LoRA(base, 4, 7.0, torch.Generator().manual_seed(0))
    assert layer.lora_A.shape == (4, 3) and layer.lora_B.shape == (2, 4)
    assert not layer.lora_B.any() and layer.lora_A.abs().max() <= 3**-0.5
    a = torch.arange(12.0).view(4, 3) - 5.5
    b = torch.tensor([[0.5, 0.0, -1.0, 2.0], [1.0, -3.0, 0.25, 0.0]])
    layer.lora_A.data, layer.lora_B.data = a, b
    x = torch.tensor([[[0.3, -1.0, 2.0]], [[4.0, 0.5, -0.1]]])  # (2, 1, 3)
    expected = torch.stack([w @ row + bias + 7 / 4 * (b @ (a @ row)) for row in x[:, 0]])
    torch.testing.assert_close(layer(x)[:, 0], expected)


def test_the_first_a_is_as_large_as_that_of_a_new_layer_of_torch():
    layer = LoRA(nn.Linear(400, 20), 30, 60.0, torch.Generator().manual_seed(0))
    # uniform within 1 / sqrt(400): the standard deviation is that divided by sqrt(3)
    assert layer.lora_A.std().item() == pytest.approx(0.05 / 3**0.5, rel=0.02)
    assert 0.0499 < layer.lora_A.abs().max() <= 0.05


@pytest.mark.parametrize("kind", [kind for kind in ARCHITECTURES if kind != "mamba"])
def test_it_starts_at_the_base_and_ends_as_a_plain_model(kind):
    lm = build_lm(kind)
    HybridModel(lm)  # drops dropout
    before, heads = logits(lm), [lm.get_input_embeddings(), lm.get_output_embeddings()]
    model = LoraModel(lm, rank=3, alpha=7.0)
    assert torch.equal(logits(lm), before)
    shaken(model)
    changed, merged = logits(lm), model.merged()
    assert (changed - before).abs().max() > 0.01
    torch.testing.assert_close(logits(merged.lm), changed, atol=1e-5, rtol=0)
    assert not [m for m in merged.modules() if isinstance(m, LoRA)]
    assert heads == [lm.get_input_embeddings(), lm.get_output_embeddings()]
    assert torch.equal(logits(lm), changed)  # merging leaves the model as it is


def test_every_linear_layer_of_the_blocks_has_one_and_nothing_else():
    model = new_model("llama")
    adapted = {name for name, m in model.lm.named_modules() if isinstance(m, LoRA)}
    parts = [f"self_attn.{x}_proj" for x in "qkvo"] + [
        f"mlp.{x}_proj" for x in ("gate", "up", "down")
    ]
    assert adapted == {f"model.layers.{i}.{part}" for i in (0, 1) for part in parts}


def test_a_model_that_reads_a_weight_past_its_layer_is_refused():
    with pytest.raises(
        UserError, match="--lora cannot train a MambaForCausalLM in float32: .*weight"
    ):
        LoraModel(build_lm("mamba"), rank=3, alpha=7.0)
    flat = nn.Module()
    flat.base_model = nn.Sequential(nn.Linear(3, 3))
    with pytest.raises(UserError, match="no linear layer in its blocks"):
        add_adapter(flat, 3, 7.0)


def test_a_base_in_bfloat16_has_an_adapter_in_float32():
    exact, model = new_model("llama"), new_model("llama", base_dtype="bf16")
    for name, parameter in model.named_parameters():
        own = is_own(name)
        assert parameter.requires_grad == own
        assert parameter.dtype == (torch.float32 if own else torch.bfloat16), name
    buffers = dict(exact.named_buffers())
    assert all(x.dtype == buffers[name].dtype for name, x in model.named_buffers())
    assert logits(model.lm).dtype == torch.bfloat16
    scores = model(*rows())
    assert scores.logprobs.dtype == scores.values.dtype == torch.float32
    # bfloat16 has 8 bits
    close = dict(atol=0.1, rtol=0)
    torch.testing.assert_close(scores.logprobs, exact(*rows()).logprobs, **close)
    merged = model.merged().lm
    assert {p.dtype for p in merged.parameters()} == {torch.float32}
    torch.testing.assert_close(logits(merged), logits(model.lm).float(), **close)
    layer, plain = model.lm.model.layers[1].mlp.up_proj, merged.model.layers[1].mlp.up_proj
    expected = layer.base.weight.float() + 7 / 3 * layer.lora_B @ layer.lora_A
    torch.testing.assert_close(plain.weight, expected)


def rows() -> tuple[torch.Tensor, ...]:
    batch = make_batch(None, *ragged_batch(), max_length=32)
    return batch.input_ids, batch.attention_mask, batch.response_mask


# ---- what is trained, what is shared


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_an_update_changes_adapter_and_value_head_and_no_bit_of_the_base(optimizer):
    model = new_model("gpt2").train()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    updates = OPTIMIZERS[optimizer](model, 1e-2)
    taken = {id(p) for group in updates.param_groups for p in group["params"]}
    assert taken == {id(p) for name, p in model.named_parameters() if is_own(name)}
    for _ in range(2):
        scores = model(*rows())
        (scores.logprobs.sum() + (scores.values - 3).square().sum()).backward()
        updates.step()
        updates.zero_grad()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) != is_own(name), name


def test_a_reference_shares_the_base_and_keeps_its_own_adapter():
    model = new_model()
    reference = model.frozen_copy()
    own = [name for name, _ in model.named_parameters() if is_own(name)]
    pairs = zip(model.named_parameters(), reference.parameters(), strict=True)
    for (name, parameter), copied in pairs:
        assert (parameter is copied) == (name not in own) and not copied.requires_grad
    assert list(reference.state_dict()) == own and model.lm is not reference.lm
    batch = make_batch(None, *ragged_batch(), max_length=32)
    before = forward_rows(reference, batch, None).logprobs
    assert torch.equal(before, forward_rows(model, batch, None).logprobs)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        for name in own:
            model.get_parameter(name).add_(0.5)
    assert torch.equal(forward_rows(reference, batch, None).logprobs, before)

    # --ref-ema: the adapter is averaged, the base stays
    base = {n: p.clone() for n, p in model.named_parameters() if n not in own}
    follow_policy(SimpleNamespace(reference=reference, model=model), SimpleNamespace(ref_ema=0.8))
    for name, tensor in reference.state_dict().items():
        torch.testing.assert_close(tensor, state[name] + 0.1)
    assert all(torch.equal(model.get_parameter(name), tensor) for name, tensor in base.items())

    model.load_state_dict(state)
    assert torch.equal(forward_rows(model, batch, None).logprobs, before)
    with pytest.raises(RuntimeError, match="other layers"):
        model.load_state_dict({name: state[name] for name in own[1:]})


# ---- folders


@pytest.fixture
def saved(tiny, tmp_path):
    """(base, adapted model, its folder), of a kind."""

    def save(kind: str):
        build_lm(kind, vocab_size=len(tiny[1])).save_pretrained(tmp_path / "base")
        tiny[1].save_pretrained(tmp_path / "base")
        options = dict(rank=3, alpha=7.0, seed=5)
        model, tokenizer = LoraModel.load(str(tmp_path / "base"), **options)
        shaken(model).save(tmp_path / "final", tokenizer)
        return tmp_path / "base", model, tmp_path / "final"

    return save


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_the_folder_is_a_plain_model_and_its_adapter_one_of_peft(kind, saved):
    base, model, final = saved(kind)
    plain, report = AutoModelForCausalLM.from_pretrained(final, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    expected, close = logits(model.lm), dict(atol=1e-5, rtol=0)
    torch.testing.assert_close(logits(plain), expected, **close)
    config = json.loads((final / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["peft_type"]) == (3, 7.0, "LORA")
    assert config["base_model_name_or_path"] == str(base)
    assert config["fan_in_fan_out"] == (kind == "gpt2")
    tensors = load_file(final / "adapter" / "adapter_model.safetensors")
    assert {name[:17] for name in tensors} == {"base_model.model."}
    # the adapter alone, as --model takes it
    again, _ = load_lm(str(final / "adapter"), "--model")
    torch.testing.assert_close(logits(again), expected, **close)
    assert (logits(again) - logits(load_lm(str(base))[0])).abs().max() > 0.1


def test_an_adapter_of_another_kind_or_without_its_base_is_one_line(saved):
    base, _, final = saved("llama")
    folder = final / "adapter"
    config = json.loads((folder / "adapter_config.json").read_text())

    def refused(message: str, **changes) -> None:
        (folder / "adapter_config.json").write_text(json.dumps(config | changes))
        with pytest.raises(UserError, match=message) as caught:
            load_lm(str(folder), "--model")
        assert str(caught.value).startswith(f"--model {folder}") and "\n" not in str(caught.value)

    refused("without base_model_name_or_path", base_model_name_or_path=None)
    gone = str(base / "gone")
    refused(f"its base {gone}: expected a Hugging Face", base_model_name_or_path=gone)
    refused("the adapter is its own base", base_model_name_or_path=str(folder))
    refused(r"is no plain LoRA adapter of .* \(peft_type IA3", peft_type="IA3")
    refused("init_lora_weights pissa", init_lora_weights="pissa")
    refused("alphas of their own", alpha_pattern={"q_proj": 3})
    tensors = load_file(folder / "adapter_model.safetensors")
    name = "base_model.model.model.layers.0.mlp.up_proj"

    def with_more(more: dict) -> None:
        copied = {name: tensor.clone() for name, tensor in (tensors | more).items()}
        save_file(copied, folder / "adapter_model.safetensors", {"format": "pt"})

    with_more({f"{name}.lora_magnitude_vector.weight": torch.ones(48)})
    refused("it also holds 1 weight .*lora_magnitude_vector")
    with_more({f"{name}.lora_A.weight": torch.ones(3, 5)})
    refused("does not fit .*base: ")
    with_more({n.replace("layers.0", "layers.7"): x for n, x in tensors.items()})
    refused("is no plain LoRA adapter")
    (folder / "adapter_model.safetensors").unlink()
    refused("is no plain LoRA adapter of .*No such file")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gpt2", "llama", "gpt_neox"])
def test_peft_reads_our_adapter_and_we_read_its(kind, saved, tmp_path):
    peft = pytest.importorskip("peft")
    base, model, final = saved(kind)
    close = dict(atol=1e-5, rtol=0)

    def new_base():
        return AutoModelForCausalLM.from_pretrained(base)

    theirs = peft.PeftModel.from_pretrained(new_base(), final / "adapter").eval()
    torch.testing.assert_close(logits(theirs), logits(model.lm), **close)
    layers = {"gpt2": ["c_attn", "c_proj"], "llama": ["q_proj", "down_proj"]}
    layers["gpt_neox"] = ["query_key_value", "dense"]
    for use_rslora in (False, True):
        config = peft.LoraConfig(
            task_type="CAUSAL_LM", target_modules=layers[kind], r=3, lora_alpha=7,
            rank_pattern={layers[kind][0]: 5}, use_rslora=use_rslora,
        )  # fmt: skip
        theirs = shaken(peft.get_peft_model(new_base(), config)).eval()
        theirs.save_pretrained(tmp_path / "theirs")
        ours, _ = load_lm(str(tmp_path / "theirs"))
        torch.testing.assert_close(logits(ours), logits(theirs), **close)
        assert (logits(ours) - logits(new_base())).abs().max() > 0.1


# ---- a run


def own_files(folder) -> dict:
    names = ("adapter/adapter_model.safetensors", "value_head.safetensors", "model.safetensors")
    return {name: (folder / name).read_bytes() for name in names}


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        "--model tiny --ref-ema 0.9",
        "--model {gpt2} --base-dtype bf16 --optimizer muon --reward self_play(length,every=2)",
        "--model {gpt2} --base-dtype bf16 --amp bf16 --optimizer adafactor",
        "--model {gpt2} --algorithm grpo --group-size 2 --schedule mix --gradient-checkpointing",
    ],
)
def test_a_resumed_run_is_the_uninterrupted_one_bit_by_bit(flags, tiny_folder, tmp_path):
    flags = [*RUN, *flags.format(gpt2=tiny_folder).split(), "--scheduler", "constant"]
    flags += ["--sft-warmup", "2"]
    main([*flags, "--steps", "8", "--out", str(tmp_path / "whole")])
    main([*flags, "--steps", "4", "--out", str(tmp_path / "half")])
    state = torch.load(tmp_path / "half" / "final" / "trainer_state.pt", weights_only=True)
    assert state["reference"] and all(map(is_own, state["reference"]))  # the base is not in it
    assert ".base.weight" not in str(state["stateful"])  # nor in an opponent
    main(["--resume", str(tmp_path / "half"), "--steps", "8"])
    assert own_files(tmp_path / "half" / "final") == own_files(tmp_path / "whole" / "final")
    for row in read_rows(tmp_path / "whole" / "metrics.jsonl"):
        if "ppo/kl" in row:
            assert row["ppo/kl"] == 0  # the first one: policy and reference are equal
            break
    else:
        pytest.fail("no PPO step")


def test_a_run_says_how_much_it_trains_and_begins_at_the_base(tiny_folder, tmp_path, capsys):
    main([*RUN, "--model", str(tiny_folder), "--reward", "length", "--out", str(tmp_path / "run")])
    said = capsys.readouterr().out
    total = sum(p.numel() for p in load_lm(str(tiny_folder))[0].parameters())
    # c_attn 32 -> 96, c_proj 32 -> 32, c_fc 32 -> 128, c_proj 128 -> 32; and the value head
    adapter = 2 * 3 * (128 + 64 + 160 + 160)
    numbers = f"{(adapter + 33) / 1e6:.2f} M of {(total + adapter + 33) / 1e6:,.1f} M"
    assert f"LoRA of rank 3: {numbers} parameters are trained, base in float32" in said
    final = tmp_path / "run" / "final"
    tensors = load_file(final / "adapter" / "adapter_model.safetensors")
    assert sum(x.numel() for x in tensors.values()) == adapter
    base, trained = (
        load_file(tiny_folder / "model.safetensors"),
        load_file(final / "model.safetensors"),
    )
    changed = {name for name in base if not torch.equal(base[name], trained[name])}
    assert changed == {n for n in base if re.search(r"\.(c_attn|c_proj|c_fc)\.weight$", n)}
    assert json.loads((tmp_path / "run" / "config.json").read_text())["lora_alpha"] == 7


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        "--algorithm dpo",
        "--teacher {gpt2}",
        "--schedule gate --reward length --threshold 0.3",
        "--schedule buffer --reward length --threshold 0.3",
        "--ref-model a={gpt2}:2 --ref-model b={gpt2} --grad-accum 2 --ref-refresh 0",
        "--ref-model {gpt2} --ref-refresh 1 --turns 2 --user-model {gpt2} --turn-rewards",
        "--hints 0.5 --reward self_play(length,opponent='reference')",
    ],
)
def test_every_kind_of_step_trains_an_adapter(flags, tiny_folder, tmp_path):
    words = flags.format(gpt2=tiny_folder).split()
    flags = [*RUN, "--model", str(tiny_folder), "--max-length", "60", "--save-every", "3", *words]
    main([*flags, "--out", str(tmp_path / "run")])
    tensors = load_file(tmp_path / "run" / "final" / "adapter" / "adapter_model.safetensors")
    assert all(x.any() for name, x in tensors.items() if "lora_B" in name)
    (tmp_path / "run" / "final").rename(tmp_path / "whole")
    main(["--resume", str(tmp_path / "run")])  # from step 3
    assert own_files(tmp_path / "run" / "final") == own_files(tmp_path / "whole")


def test_a_changed_or_missing_base_is_refused_in_one_line(saved, tmp_path, capsys):
    base, _, final = saved("llama")
    flags = [*RUN, "--model", str(base), "--ppo-ratio", "0", "--steps", "2"]
    main([*flags, "--out", str(tmp_path / "run")])

    def refused(message: str, *more: str) -> None:
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            main(["--resume", str(tmp_path / "run"), "--steps", "4", *more])
        lines = [s for s in capsys.readouterr().err.splitlines() if s.startswith("error: ")]
        assert caught.value.code == 2 and len(lines) == 1 and re.search(message, lines[0])

    weights = load_file(base / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"] *= 1.01
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    refused("frozen weights of the base have changed; give it back")
    main(["--resume", str(tmp_path / "run"), "--steps", "4", "--accept-changes"])
    adapter = tmp_path / "run" / "final" / "adapter"
    adapter.rename(tmp_path / "adapter")
    refused("the adapter in .*final does not fit its base", "--accept-changes")
    (tmp_path / "adapter").rename(adapter)
    build_lm("llama", vocab_size=512, num_hidden_layers=3).save_pretrained(base)
    refused("does not fit its base, --model .*other layers", "--accept-changes")
    base.rename(tmp_path / "gone")
    refused(f"--model {base}: expected a Hugging Face model folder")


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--lora-alpha 3", "--lora-alpha and --base-dtype are for --lora"),
        ("--base-dtype bf16", "--lora-alpha and --base-dtype are for --lora"),
        ("--lora 3 --deepspeed examples/zero.json", "--lora leaves --deepspeed little to split"),
        ("--lora 3 --base-dtype bf16 --amp fp16", "--amp fp16 does not go with --base-dtype bf16"),
        ("--lora 3 --ref-ema 0.9 --ref-model out/final", "averages two adapters"),
        ("--lora 0", "--lora"),
    ],
)
@pytest.mark.parametrize("more", [[], ["--dry-run"]])
def test_flags_that_do_not_go_together_are_one_line(flags, message, more, tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        main([*FAST, *flags.split(), *more, "--out", str(tmp_path / "run")])
    error = capsys.readouterr().err
    assert caught.value.code == 2 and message in error and error.count("error: ") == 1
    assert not (tmp_path / "run").exists()


# ---- what it costs


def test_the_memory_of_an_adapter_follows_its_formula():
    sizes = cost.Sizes(parameters=1000.0, layers=2, width=10, kv_width=5, vocab=100)
    rows, kept = cost.Rows(columns=60, answers=1), [30.0]
    of_adapter = dict(trained=30, references=0.03)
    held = cost.memory(sizes, rows, kept, **of_adapter)
    expected = {"weights": 4000, "reference": 120, "Adam": 240, "gradients": 120, "merged": 0}
    assert {name: held[name] for name in expected} == expected
    assert held["logits"] == 1200  # the head has no gradient: without LoRA 400 + 4000
    assert held["peak"] == 4360 + 1800 + 1200
    half = cost.memory(sizes, rows, kept, frozen_bytes=2, amp=True, devices=2, **of_adapter)
    assert half["weights"] == 120 + 2 * 970 and half["bf16 copies"] == 60
    assert half["buckets"] == 120
    held = cost.memory(sizes, rows, kept, program=7.0, **of_adapter)
    assert held["merged"] == 4000  # on the CPU, while a folder is saved
    assert held["peak"] == 7 + 4360 + held["holes"] + 4000
    held = cost.memory(sizes, rows, kept, program=7.0, frozen_bytes=2, **of_adapter)
    assert held["merged"] == 4000 + 4000  # the second is 4 V W


def test_a_dry_run_counts_the_adapter(tiny_folder, capsys):
    flags = [*FAST, "--model", str(tiny_folder), "--max-length", "40", "--dry-run"]
    said = []
    for more in ([], ["--lora", "3"], ["--lora", "3", "--base-dtype", "bf16"]):
        main([*flags, *more])
        said.append(capsys.readouterr().out)
    plain, adapted, half = said
    assert "under ZeRO-2" in plain and "M of them trained" not in plain
    assert ", 0.00307 M of them trained; one device" in adapted and "ZeRO" not in adapted

    def gib(text: str, name: str) -> float:
        return float(re.search(rf" {name} ([\d.e-]+)", text)[1])

    assert gib(half, "weights") == pytest.approx(gib(adapted, "weights") / 2, rel=0.15)
    assert gib(adapted, "reference") < gib(plain, "reference") / 10
    assert gib(adapted, "Adam") == pytest.approx(2 * gib(adapted, "gradients"), rel=0.01)
    assert gib(half, "activations") < gib(adapted, "activations")


def test_a_checkpoint_holds_the_merged_weights_and_little_else():
    args = SimpleNamespace(optimizer="adamw", ppo_ratio=0.5, keep=2, save_every=100, out="out")
    args.teacher = None
    # 1 GB of weights; adapter, two moments and a reference are 0.01 GB each, and one is in P
    assert "takes 1 GB" in plan.disk_line(args, 250e6, 2.5e6)
    assert "takes 1.3 GB" in plan.disk_line(args, 250e6, 25e6)
