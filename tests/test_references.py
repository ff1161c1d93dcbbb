"""Several references: the mixture against its definition on full logits, and the identities that it must keep."""

import copy
import json

import pytest
import torch
from conftest import build_lm, ragged_batch
from transformers import AutoConfig, AutoModelForCausalLM

from data import Example, make_batch
from engine import UserError
from hybrid import HybridModel, forward_rows
from references import ReferenceMixture, parse_reference, reference_logprobs
from runs import read_rows
from train import main


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
    with pytest.raises(UserError, match="names the reference 'c'; --ref-model knows a, b"):
        reference_logprobs(mixture, batch, [Example("", "", {"reference": "c"})] * len(batch), None)


def test_flags_are_read():
    assert parse_reference("out/final") == ("reference", "out/final", 1.0) and parse_reference(
        "calm=a/b:2.5"
    ) == ("calm", "a/b", 2.5)
    assert parse_reference("calm=org/model") == ("calm", "org/model", 1.0)


def test_a_run_against_two_references_logs_both_kls_and_starts_at_zero_where_all_are_equal(
    tmp_path, tiny_folder
):
    flags = f"--model {tiny_folder} --limit 60 --steps 4 --batch-size 4 --max-new-tokens 6 --max-length 40 --eval-size 4 --device cpu --ppo-ratio 1 --reward length --lr 1e-2".split()
    main(
        [
            *flags,
            "--ref-model",
            f"one={tiny_folder}:1",
            "--ref-model",
            f"two={tiny_folder}:3",
            "--save-every",
            "2",
            "--out",
            str(tmp_path / "run"),
        ]
    )
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
    flags = f"--model {tiny_folder} --ref-model {small} --ref-refresh 1 --limit 60 --steps 4 --batch-size 4 --max-new-tokens 6 --max-length 40 --eval-size 4 --device cpu".split()
    main(
        [
            *flags,
            "--ppo-ratio",
            "1",
            "--reward",
            "length",
            "--save-every",
            "2",
            "--grad-accum",
            "2",
            "--out",
            str(tmp_path / "run"),
        ]
    )
    final = (tmp_path / "run" / "final" / "model.safetensors").read_bytes()
    shutil.rmtree(tmp_path / "run" / "final")
    main(["--resume", str(tmp_path / "run")])
    assert (tmp_path / "run" / "final" / "model.safetensors").read_bytes() == final


def test_a_reference_that_moves_by_an_average(tmp_path):
    """--ref-ema 0 never moves it; at 0.5 the distance is halved at every step; at 1 nothing of the policy enters."""
    kls = {}
    for d in ("0", "0.5", "1"):
        flags = "--limit 60 --steps 6 --batch-size 4 --max-new-tokens 6 --eval-size 4 --device cpu --ppo-ratio 1 --reward length --save-every 0 --eval-every 0"
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
    flags = f"--algorithm dpo --data {tmp_path}/d.jsonl --preference-data {tmp_path}/p.jsonl --model {tiny_folder} --max-length 40 --steps 2 --batch-size 4"
    flags += f" --ppo-ratio 1 --max-new-tokens 6 --device cpu --ref-model a={tiny_folder} --ref-model b={tiny_folder} --out {tmp_path}/run"
    main(flags.split())
    assert [row["phase"] for row in read_rows(tmp_path / "run" / "metrics.jsonl")] == [
        "eval",
        "dpo",
        "dpo",
        "eval",
    ]
