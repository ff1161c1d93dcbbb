"""A model is read whole: weights that it does not use, or lacks, are refused, each by name."""

import json
import re
import shutil

import pytest
import torch
from conftest import ARCHITECTURES, FAST, build_lm
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForPreTraining,
    AutoModelForSequenceClassification,
)

import evaluate
import hybrid
import reward_model
import sample
import train
from engine import UserError
from hybrid import HybridModel
from lm import COMPUTED, WITH_REPORT, check_weights, load_lm
from rewards import build_reward

BERT = dict(
    hidden_size=24,
    intermediate_size=36,
    num_hidden_layers=2,
    num_attention_heads=2,
    max_position_embeddings=64,
)


LAYER = re.compile(r"\b(layers|h|layer)\.1\.")  # the second layer, whatever the architecture


def change_weights(folder, change):
    """Rewrite model.safetensors; `change` gets the dict of tensors and returns the new one."""
    path = folder / "model.safetensors"
    weights = {name: tensor.clone() for name, tensor in load_file(path).items()}
    save_file(change(weights), path, metadata={"format": "pt"})


def with_lora(weights):
    """Two more weights for every matrix of the layers, named as PEFT names them."""
    pairs = {}
    for name, tensor in weights.items():
        if tensor.dim() == 2 and name.endswith("weight") and ".1." in name:
            stem = name.removesuffix(".weight")
            pairs[f"{stem}.lora_A.default.weight"] = torch.zeros(2, tensor.shape[-1])
            pairs[f"{stem}.lora_B.default.weight"] = torch.zeros(tensor.shape[0], 2)
    return weights | pairs


def with_third_layer(weights):
    """The second layer a second time, as layer 2, which config.json does not have."""
    more = {LAYER.sub(r"\1.2.", name): tensor.clone() for name, tensor in weights.items()}
    return weights | more


@pytest.fixture
def copy(tiny_folder, tmp_path):
    """-> a function: a copy of the tiny GPT-2 with changed weights."""

    def make(name, change=None):
        folder = tmp_path / name
        shutil.copytree(tiny_folder, folder)
        if change:
            change_weights(folder, change)
        return folder

    return make


@pytest.fixture(scope="module")
def bert(tiny, tmp_path_factory):
    """-> a function: the folder of a random BERT with the head of that class."""

    def make(auto_class, **options):
        folder = tmp_path_factory.mktemp("bert")
        config = AutoConfig.for_model("bert", vocab_size=len(tiny[1]), **BERT, **options)
        torch.manual_seed(5)
        auto_class.from_config(config).save_pretrained(folder)
        tiny[1].save_pretrained(folder)
        return folder

    return make


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_every_architecture_is_read_whole_and_one_weight_more_is_refused(kind, tmp_path):
    build_lm(kind).save_pretrained(tmp_path)

    def check():
        lm, report = AutoModelForCausalLM.from_pretrained(tmp_path, **WITH_REPORT)
        check_weights("--model x", lm, report)

    check()
    change_weights(tmp_path, with_lora)
    with pytest.raises(UserError, match=r"--model x holds \d+ weights \(.*lora_.* of an adapter"):
        check()
    change_weights(tmp_path, lambda w: {n: t for n, t in w.items() if "lora_" not in n})
    check()
    assert any(map(LAYER.search, load_file(tmp_path / "model.safetensors")))
    change_weights(tmp_path, with_third_layer)
    with pytest.raises(UserError, match=r"--model x holds \d+ weights .* does not use: its config"):
        check()


@pytest.mark.parametrize("prefix", ["transformer.", ""])
def test_gpt2_is_read_with_and_without_its_prefix_and_with_the_masks_of_old_files(
    copy, tiny_folder, prefix
):
    def as_on_the_hub(weights):
        more = {f"transformer.h.{i}.attn.bias": torch.ones(1, 1, 64, 64).tril() for i in (0, 1)}
        more |= {f"transformer.h.{i}.attn.masked_bias": torch.tensor(-1e4) for i in (0, 1)}
        old = {name.replace("transformer.", prefix): t for name, t in (weights | more).items()}
        assert f"{prefix}h.1.attn.masked_bias" in old
        return old

    lm, _ = load_lm(str(copy("old", as_on_the_hub)))
    expected, _ = load_lm(str(tiny_folder))
    assert all(map(torch.equal, lm.parameters(), expected.parameters()))


def test_a_value_head_beside_the_model_is_ours(tiny_folder, tmp_path):
    model, tokenizer = HybridModel.load(str(tiny_folder))
    torch.nn.init.normal_(model.value_head.weight)
    model.save(tmp_path, tokenizer)
    assert (tmp_path / "value_head.safetensors").is_file()
    again, _ = HybridModel.load(str(tmp_path))
    assert torch.equal(again.value_head.weight, model.value_head.weight)


def test_what_is_wrong_is_named_and_counted(copy):
    def refused(folder, message):
        with pytest.raises(UserError, match=message) as caught:
            load_lm(str(folder), "--model")
        assert str(folder) in str(caught.value) and "\n" not in str(caught.value)

    refused(copy("lora", with_lora), r"holds 8 weights \(transformer.h.1.attn.c_attn.lora_A")
    # 11 of 12: to transformers c_attn.bias is a mask of old files
    layer = r"\(transformer.h.2.attn.c_attn.weight, transformer.h.2.attn.c_proj.bias, .*, \.\.\.\)"
    refused(copy("layer", with_third_layer), f"holds 11 weights {layer} that GPT2LMHeadModel does")
    head = copy("head", lambda w: w | {"score.weight": torch.zeros(2, 32)})
    refused(head, r"holds 1 weight \(score.weight\) that GPT2LMHeadModel does not use")
    cut = copy("cut", lambda w: {n: t for n, t in w.items() if "ln_f" not in n})
    refused(cut, r"lacks 2 weights \(transformer.ln_f.bias, transformer.ln_f.weight\) of GPT2LM")
    wide = copy("wide", lambda w: w | {"transformer.ln_f.bias": torch.zeros(33)})
    refused(wide, r"has 1 weight \(transformer.ln_f.bias\) of another shape: .* \(33,\) .* \(32,\)")
    named = copy("named", lambda w: {f"base_model.model.{n}": t for n, t in w.items()})
    refused(named, r"of an adapter: merge it into its model")
    adapter = copy("adapter")
    (adapter / "adapter_config.json").write_text("{}")
    refused(adapter, "has an adapter_config.json without base_model_name_or_path")
    (adapter / "config.json").unlink()
    refused(adapter, "has an adapter_config.json without base_model_name_or_path")


@pytest.mark.parametrize(
    "program, flags",
    [
        (train.main, "--model {bad}"),
        (train.main, "--model {good} --ref-model {bad}"),
        (train.main, "--model {good} --turns 2 --user-model {bad}"),
        (train.main, "--reward perplexity('{bad}')"),
        (train.main, "--reward model('{bad}')"),
        (hybrid.main, "merge {good} {bad} --out m"),
        (hybrid.main, "merge {bad} {good} --out m"),
        (sample.main, "{bad} hello"),
        (evaluate.main, "--model {bad} --data reviews --limit 40"),
        (evaluate.main, "--perplexity {bad} --data text.txt"),
        (reward_model.main, "--model {bad} --data prefs.jsonl"),
    ],
)
def test_every_program_refuses_an_adapter_in_one_line(
    program, flags, copy, tiny_folder, tmp_path, monkeypatch, capsys
):
    bad = copy("bad", with_lora)
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"p{i}", "chosen": "a b", "rejected": "c"} for i in range(30)]
    (tmp_path / "prefs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "text.txt").write_text("the plot was warm\nyet the cast felt dull\n")
    words = flags.format(bad=bad, good=tiny_folder).split()
    if program is train.main:
        words += [*FAST, "--max-length", "40", "--out", "run"]
    with pytest.raises(SystemExit) as caught:
        program(words)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert caught.value.code == 2 and len(lines) == 1
    assert f"{bad} holds 8 weights (transformer.h.1.attn.c_attn.lora_A" in lines[0]
    assert not {"run", "m", "reward"} & {path.name for path in tmp_path.iterdir()}


JUDGES = ['cosine_sts("{}")', 'classifier("{}")', 'perplexity("{}")', 'gptscore("{}")']
JUDGES += ['model("{}")', 'bleurt("{}")', 'judge("{}")', 'nli("{}")']


@pytest.mark.parametrize("expression", JUDGES)
def test_every_judge_refuses_an_adapter_and_a_layer_too_many(expression, copy):
    for name, change, message in (
        ("lora", with_lora, "of an adapter"),
        ("layer", with_third_layer, "does not use"),
    ):
        folder = copy(name, change)
        if expression.split("(")[0] in ("classifier", "model", "bleurt", "nli"):
            change_weights(folder, lambda w: w | {"score.weight": torch.zeros(2, 32)})
        with pytest.raises(UserError, match=rf"{name} holds \d+ weights \(.*{message}"):
            build_reward(expression.format(folder))
    folder = copy("config")
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="has an adapter_config.json"):
        build_reward(expression.format(folder))


@pytest.mark.parametrize(
    "auto_class",
    [AutoModelForMaskedLM, AutoModelForPreTraining, AutoModelForSequenceClassification],
)
def test_embeddings_come_from_a_body_whatever_its_head_was(bert, auto_class):
    """A masked LM has a head, and no pooler; both are nothing to an embedding."""
    folder = bert(auto_class)
    reward = build_reward(f'cosine_sts("{folder}")')
    [score] = reward(["p"], ["the plot was warm"], target=["the plot was warm"])
    assert score == pytest.approx(1, abs=1e-5)
    change_weights(folder, lambda w: {n.replace(".layer.1.", ".layer.7."): w[n] for n in w})
    with pytest.raises(UserError, match=r"lacks 16 weights \(encoder.layer.1.attention"):
        build_reward(f'cosine_sts("{folder}")')


def test_a_classifier_needs_its_own_head_and_may_have_another_too(bert):
    folder = bert(AutoModelForSequenceClassification, num_labels=2)
    change_weights(folder, lambda w: w | {"cls.predictions.bias": torch.zeros(7)})
    [score] = build_reward(f'classifier("{folder}")')(["p"], ["the plot was warm"])
    assert 0 < score < 1
    change_weights(folder, lambda w: w | {"encoder.layer.2.output.dense.bias": torch.zeros(24)})
    with pytest.raises(UserError, match=r"holds 1 weight \(encoder.layer.2.output.dense.bias\)"):
        build_reward(f'classifier("{folder}")')
    masked = bert(AutoModelForMaskedLM)
    with pytest.raises(UserError, match=r"lacks 4 weights \(bert.pooler.dense.bias, .* for this"):
        build_reward(f'classifier("{masked}")')


def test_a_reward_model_may_have_a_new_head_and_no_new_body(bert, copy, tiny_folder):
    def load(folder):
        return reward_model.load_backbone(str(folder), [], seed=0)[0]

    body = load(tiny_folder).base_model.state_dict()
    expected = AutoModelForCausalLM.from_pretrained(tiny_folder).base_model.state_dict()
    assert body.keys() == expected.keys() and all(torch.equal(body[n], expected[n]) for n in body)
    assert load(bert(AutoModelForMaskedLM)).config.num_labels == 1  # head and pooler are new
    assert load(bert(AutoModelForSequenceClassification, num_labels=5)).config.num_labels == 1
    cut = copy("cut", lambda w: {n: t for n, t in w.items() if ".h.1." not in n})
    with pytest.raises(UserError, match=r"--model .*cut lacks 12 weights \(transformer.h.1.attn"):
        load(cut)
    wide = copy("wide", lambda w: w | {"transformer.ln_f.bias": torch.zeros(33)})
    with pytest.raises(UserError, match=r"of another shape: .* \(33,\) in the files, \(32,\)"):
        load(wide)
    with pytest.raises(UserError, match=r"holds 11 weights .* that GPT2ForSequenceClass"):
        load(copy("layer", with_third_layer))


def test_the_masks_of_old_files_are_told_from_weights_with_a_similar_name():
    old = ["h.0.attn.bias", "transformer.h.11.attn.attention.masked_bias", "x.rotary_emb.inv_freq"]
    assert all(map(COMPUTED.search, [*old, "attention.bias", "embeddings.position_ids"]))
    weights = ["h.2.c_attn.bias", "attention.query.bias", "attn.bias.lora_A", "inv_freq_scale"]
    assert not any(map(COMPUTED.search, weights))
