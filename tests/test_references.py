"""Several references: the mixture against its definition on full logits, and its identities."""

import argparse
import copy
import json
from types import SimpleNamespace

import pytest
import torch
from conftest import build_lm, ragged_batch
from transformers import AutoConfig, AutoModelForCausalLM

from data import Example, make_batch
from engine import UserError
from flags import make_parser
from hybrid import HybridModel, forward_rows
from references import (
    ReferenceMixture,
    check_flags,
    follow_policy,
    load_references,
    parse_reference,
    reference_logprobs,
    renew_reference,
)
from runs import read_rows
from train import main

SHORT = (
    "--limit 60 --steps 4 --batch-size 4 --max-new-tokens 6 --max-length 40 --eval-size 4 "
    "--device cpu --ppo-ratio 1 --reward length"
)


@pytest.fixture(scope="module")
def setting():
    a, b = HybridModel(build_lm("llama")), HybridModel(build_lm("gpt2", seed=1))
    batch = make_batch(None, *ragged_batch(), max_length=32)
    return a, b, batch, [Example("", "") for _ in range(len(batch))]


def test_the_mixture_is_the_normalised_geometric_mean_of_the_distributions(setting):
    a, b, batch, examples = setting
    mixture = ReferenceMixture({"a": a, "b": b}, {"a": 3.0, "b": 1.0})
    logprobs, named = reference_logprobs(
        mixture, batch, examples, micro_batch_size=3, temperature=0.7
    )
    with torch.no_grad():
        inputs = dict(input_ids=batch.input_ids, attention_mask=batch.attention_mask.long())
        full = [torch.softmax(m.lm(**inputs).logits.double() / 0.7, -1) for m in (a, b)]
    product = full[0] ** 0.75 * full[1] ** 0.25
    expected = (
        (product / product.sum(-1, keepdim=True))
        .log()[:, :-1]
        .gather(2, batch.input_ids[:, 1:, None])
        .squeeze(2)
    )
    mask = batch.response_mask[:, 1:]
    torch.testing.assert_close(logprobs[:, 1:][mask].double(), expected[mask], atol=2e-4, rtol=1e-4)
    for name, model in (("a", a), ("b", b)):
        torch.testing.assert_close(
            named[name], forward_rows(model, batch, 3, 0.7).logprobs, atol=1e-5, rtol=0
        )


def test_a_reference_twice_at_half_weight_is_that_reference_once(setting):
    a, _, batch, examples = setting
    twice = ReferenceMixture({"x": a, "y": copy.deepcopy(a)}, {"x": 0.5, "y": 0.5})
    torch.testing.assert_close(
        reference_logprobs(twice, batch, examples, None)[0],
        forward_rows(a, batch, None).logprobs,
        atol=1e-5,
        rtol=0,
    )


def test_a_record_may_name_its_reference(setting):
    a, b, batch, _ = setting
    mixture = ReferenceMixture({"a": a, "b": b}, {"a": 1.0, "b": 1.0})
    examples = [Example("", "", {"reference": [None, "a", "b"][i % 3]}) for i in range(len(batch))]
    logprobs, named = reference_logprobs(mixture, batch, examples, None)
    both, _ = reference_logprobs(mixture, batch, [Example("", "")] * len(batch), None)
    for i in range(len(batch)):
        assert torch.equal(logprobs[i], [both, named["a"], named["b"]][i % 3][i])
    with pytest.raises(UserError, match="names the reference 'c'; --ref-model names a, b"):
        reference_logprobs(mixture, batch, [Example("", "", {"reference": "c"})] * len(batch), None)


def test_flags_are_read():
    assert parse_reference("out/final") == ("reference", "out/final", 1.0)
    assert parse_reference("calm=a/b:2.5") == ("calm", "a/b", 2.5)
    assert parse_reference("calm=org/model") == ("calm", "org/model", 1.0)


def flags_of(text: str) -> argparse.Namespace:
    """The flags as they are said, with those that references.py reads of a run."""
    run = dict(model="it", ppo_ratio=0.5, max_length=40, amp="no", compile=False)
    return argparse.Namespace(**{**vars(make_parser().parse_args(text.split())), **run})


def test_what_the_flags_name_is_loaded(tiny, tiny_folder):
    model, tokenizer = HybridModel.load(str(tiny_folder))
    assert load_references(flags_of(""), model, tokenizer) is None
    args = flags_of(f"--ref-model {tiny_folder} --ref-ema 0.9")
    one = load_references(args, model, tokenizer)
    assert isinstance(one, HybridModel) and not any(p.requires_grad for p in one.parameters())
    args.ppo_ratio = 0
    assert load_references(args, model, tokenizer) is None, "pure SFT needs no reference"
    two = flags_of(f"--ref-model a={tiny_folder}:3 --ref-model b={tiny_folder}")
    assert load_references(two, model, tokenizer).weights == [0.75, 0.25]
    check_flags(two)
    two.ref_refresh = 2
    with pytest.raises(UserError, match="move one reference, not a mixture"):
        check_flags(two)
    other = HybridModel(copy.deepcopy(tiny[0]))
    with pytest.raises(UserError, match="--ref-ema averages weights"):
        load_references(flags_of(f"--ref-model {tiny_folder} --ref-ema 0.5"), other, tokenizer)
    args.ppo_ratio, args.max_length = 1, 65
    with pytest.raises(UserError, match="has a context of 64 tokens; --max-length is 65"):
        load_references(args, model, tokenizer)


def test_a_reference_is_renewed_when_it_is_time_and_follows_by_an_average():
    model = HybridModel(build_lm("llama"))
    run, args = SimpleNamespace(model=model, reference=None, rl_steps=0), flags_of("")
    renewed = []  # (--ref-refresh, RL steps so far) where the reference became another copy
    for every in (0, 2):
        for rl_steps in range(5):
            before, args.ref_refresh, run.rl_steps = run.reference, every, rl_steps
            renew_reference(run, args)
            if run.reference is not before:
                renewed.append((every, rl_steps))
    assert renewed == [(0, 0), (2, 2), (2, 4)]
    head, args.ref_ema = run.reference.value_head.weight, 0.0
    with torch.no_grad():
        model.value_head.weight.add_(1)
    follow_policy(run, args)
    assert not head.any()
    args.ref_ema = 0.75
    follow_policy(run, args)
    assert torch.equal(head, torch.full_like(head, 0.25))


def test_a_run_against_two_references_logs_both_kls_and_starts_at_zero_where_all_are_equal(
    tmp_path, tiny_folder
):
    flags = f"--model {tiny_folder} --ref-model one={tiny_folder}:1 --ref-model two={tiny_folder}:3"
    flags += f" {SHORT} --save-every 2 --lr 1e-2 --out {tmp_path}/run"
    main(flags.split())
    rows = [row for row in read_rows(tmp_path / "run" / "metrics.jsonl") if row["phase"] == "ppo"]
    assert rows[0]["ppo/kl"] == pytest.approx(0, abs=1e-5) and rows[-1]["ppo/kl"] > 0
    for row in rows:
        assert row["ppo/kl/one"] == pytest.approx(row["ppo/kl/two"]) and row[
            "ppo/kl/one"
        ] == pytest.approx(row["ppo/kl"], abs=1e-4)
    main(["--resume", str(tmp_path / "run"), "--steps", "5"])


def test_a_named_reference_of_another_shape_may_be_renewed_and_the_run_resumed(
    tmp_path, tiny, tiny_folder
):
    import shutil

    small = tmp_path / "small"
    shutil.copytree(tiny_folder, small)
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(small, n_layer=1)).save_pretrained(
        small
    )
    flags = f"--model {tiny_folder} --ref-model {small} --ref-refresh 1 {SHORT}"
    flags += f" --save-every 2 --grad-accum 2 --out {tmp_path}/run"
    main(flags.split())
    final = (tmp_path / "run" / "final" / "model.safetensors").read_bytes()
    shutil.rmtree(tmp_path / "run" / "final")
    main(["--resume", str(tmp_path / "run")])
    assert (tmp_path / "run" / "final" / "model.safetensors").read_bytes() == final


def test_a_reference_that_moves_by_an_average(tmp_path):
    """0 never moves it, of 1 nothing is the policy's; 0.5 halves the distance at every step."""
    kls = {}
    for d in ("0", "0.5", "1"):
        flags = SHORT.replace("--steps 4", "--steps 6") + " --save-every 0 --eval-every 0"
        main([*flags.split(), "--ref-ema", d, "--out", str(tmp_path / d)])
        kls[d] = [
            row["ppo/kl"]
            for row in read_rows(tmp_path / d / "metrics.jsonl")
            if row["phase"] == "ppo"
        ]
    assert (
        kls["0"] == kls["1"]
        and kls["0.5"][0] == 0
        and 0 < kls["0.5"][1] < kls["0"][1]
        and kls["0.5"][-1] < kls["0"][-1]
    )


def test_dpo_on_own_data_needs_no_reward_to_be_held_to_two_references(tmp_path, tiny_folder):
    (tmp_path / "d.jsonl").write_text(
        "".join(json.dumps({"prompt": f"q{i}", "target": " yes"}) + "\n" for i in range(9))
    )
    (tmp_path / "p.jsonl").write_text(
        "".join(
            json.dumps({"prompt": f"q{i}", "chosen": " yes", "rejected": " no"}) + "\n"
            for i in range(9)
        )
    )
    flags = f"--algorithm dpo --data {tmp_path}/d.jsonl --preference-data {tmp_path}/p.jsonl"
    flags += f" --model {tiny_folder} --ref-model a={tiny_folder} --ref-model b={tiny_folder}"
    flags += " --max-length 40 --steps 2 --batch-size 4 --ppo-ratio 1 --max-new-tokens 6"
    main(f"{flags} --device cpu --out {tmp_path}/run".split())
    assert [row["phase"] for row in read_rows(tmp_path / "run" / "metrics.jsonl")] == [
        "eval",
        "dpo",
        "dpo",
        "eval",
    ]
