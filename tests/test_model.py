"""HybridModel against the LM's own full logits, Hugging Face's own loss, itself under padding."""

import copy

import pytest
import torch
from conftest import ARCHITECTURES, build_lm, ragged_batch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import hybrid
import parallel
from data import make_batch
from engine import UserError
from hybrid import HybridModel, forward_rows, masked_mean
from lm import find_logit_transform, load_lm, pack
from sft import sft_loss


def full_logits_scores(lm, batch, temperature=1.0):
    """The definition: the LM's own (B, T, V) logits, shifted by one, masked."""
    lm.eval()
    logits = (
        lm(input_ids=batch.input_ids, attention_mask=batch.attention_mask.long()).logits.double()[
            :, :-1
        ]
        / temperature
    )
    logp = torch.log_softmax(logits, -1)
    mask = batch.response_mask[:, 1:]
    logprobs, entropy = torch.zeros(2, *batch.input_ids.shape, dtype=torch.float64)
    logprobs[:, 1:] = logp.gather(2, batch.input_ids[:, 1:, None]).squeeze(2) * mask
    entropy[:, 1:] = -(logp.exp() * logp).sum(-1) * mask
    return logprobs, entropy


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@torch.no_grad()
def test_forward_equals_the_full_logits_path(architecture):
    lm = build_lm(architecture)
    batch = make_batch(None, *ragged_batch(), max_length=32)
    scores = HybridModel(lm)(
        batch.input_ids, batch.attention_mask, batch.response_mask, temperature=1.5
    )
    logprobs, entropy = full_logits_scores(lm, batch, temperature=1.5)
    assert logprobs.std() > 0.5, "the oracle must be able to tell tokens apart"
    torch.testing.assert_close(scores.logprobs.double(), logprobs, atol=2e-4, rtol=1e-4)
    torch.testing.assert_close(scores.entropy.double(), entropy, atol=2e-4, rtol=1e-4)
    for x in scores:
        assert x.dtype == torch.float32 and (x[~batch.response_mask] == 0).all()


# Read row by row: ALiBi's distances and a recurrent state run through a packed row, and OPT counts
# its positions by the mask.
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_short_rows_share_a_row_of_the_lm_where_the_architecture_can_tell_them_apart(architecture):
    model = HybridModel(build_lm(architecture))
    could_pack = model.can_pack
    assert (
        could_pack == (architecture not in ("bloom", "mamba", "opt", "lfm2", "minimax"))
        or architecture == "falcon"
    )  # whose answer depends on transformers
    lengths = [
        (3, 20),
        (2, 2),
        (1, 4),
        (5, 3),
        (9, 8),
        (1, 1),
    ]  # as rows 6 x 23; without padding 59
    batch = make_batch(
        None,
        [list(range(3, 3 + p)) for p, _ in lengths],
        [list(range(30, 30 + r)) for _, r in lengths],
        max_length=32,
    )
    with torch.no_grad():
        logprobs, _ = full_logits_scores(model.lm, batch)
    read, shapes, gradients = model.lm.base_model.forward, [], []
    weight = model.lm.get_input_embeddings().weight

    def forward(*args, **inputs):
        shapes.append(tuple(inputs["input_ids"].shape))
        return read(*args, **inputs)

    model.lm.base_model.forward = forward
    for packs in (model.can_pack, False):
        model.can_pack = packs
        scores = model(batch.input_ids, batch.attention_mask, batch.response_mask)
        torch.testing.assert_close(scores.logprobs.double(), logprobs, atol=2e-4, rtol=1e-4)
        gradients.append(torch.autograd.grad(scores.logprobs.sum(), weight)[0])
    assert shapes[1] == (6, 22) and (shapes[0][0] < 4 or not could_pack)
    torch.testing.assert_close(*gradients, atol=2e-4, rtol=1e-3)


def test_packing_loses_nothing_overlaps_nowhere_and_fills_well():
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        lengths = torch.randint(
            1, 100, (int(torch.randint(1, 60, (1,), generator=generator)),), generator=generator
        ).tolist()
        bins, begins, width = pack(lengths)
        taken = [(b, begin + i) for b, begin, n in zip(bins, begins, lengths) for i in range(n)]
        assert len(set(taken)) == sum(lengths) and max(
            column for _, column in taken
        ) < width <= max(1.5 * max(lengths), max(lengths))
        assert len(lengths) < 30 or sum(lengths) > 0.85 * (max(bins) + 1) * width


@pytest.mark.parametrize(
    "architecture, scale, cap",
    [("gemma2", 1, 5), ("granite", 1 / 7, None), ("cohere", 0.0625, None), ("gpt2", 1, None)],
)
def test_logit_transform_is_found(architecture, scale, cap):
    found_scale, found_cap = find_logit_transform(build_lm(architecture))
    assert found_scale == pytest.approx(scale, rel=1e-4) and found_cap == cap


def test_unknown_logit_transform_is_refused():
    lm = build_lm("llama")
    lm.lm_head.register_forward_hook(lambda module, inputs, output: output)  # harmless
    HybridModel(lm)
    original = lm.forward

    def forward(input_ids, attention_mask=None):
        output = original(input_ids=input_ids, attention_mask=attention_mask)
        output.logits = output.logits.abs()
        return output

    lm.forward = forward
    with pytest.raises(UserError, match="neither a factor nor a soft cap"):
        HybridModel(lm)


@pytest.mark.parametrize(
    "claim, break_it",
    [
        ("is not causal", lambda inputs, logits, training: logits + logits.mean(1, keepdim=True)),
        (
            "scores differently in training mode",
            lambda inputs, logits, training: logits * (1 + 0.1 * training),
        ),
        (
            "does not ignore padding on the left",
            lambda inputs, logits, training: logits * logits.shape[1],
        ),
    ],
)
def test_an_architecture_that_breaks_an_assumption_is_refused(claim, break_it):
    """Bidirectional, noisy in training, blind to masks: each would train on wrong numbers."""
    lm = build_lm("llama")
    original = lm.forward

    def forward(input_ids, attention_mask=None, position_ids=None):
        output = original(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids
        )
        output.logits = break_it(input_ids, output.logits, lm.training)
        return output

    lm.forward = forward
    with pytest.raises(UserError, match=claim):
        HybridModel(lm)


def test_sft_loss_and_gradient_equal_hugging_face(model):
    """HF: labels -100 on prompt and padding; the same mean over targets, the same gradients."""
    batch = make_batch(None, *ragged_batch(), max_length=32)
    oracle = copy.deepcopy(model.lm)
    labels = batch.input_ids.masked_fill(~batch.response_mask, -100)
    hf_loss = oracle(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask.long(), labels=labels
    ).loss
    hf_loss.backward()
    loss = sft_loss(
        model(batch.input_ids, batch.attention_mask, batch.response_mask).logprobs,
        batch.response_mask,
    )
    loss.backward()
    torch.testing.assert_close(loss, hf_loss, atol=1e-5, rtol=1e-5)
    for parameter, expected in zip(model.lm.parameters(), oracle.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, expected.grad, atol=1e-5, rtol=1e-3)
    assert model.value_head.weight.grad is None


@torch.no_grad()
def test_a_row_alone_equals_the_row_in_a_padded_batch(model):
    prompts, responses = ragged_batch()
    batch = make_batch(None, prompts, responses, max_length=64)
    together = model(batch.input_ids, batch.attention_mask, batch.response_mask)
    for i, (prompt, response) in enumerate(zip(prompts, responses)):
        alone = make_batch(None, [prompt], [response], max_length=64)
        scores = model(alone.input_ids, alone.attention_mask, alone.response_mask)
        width = alone.input_ids.shape[1]
        for x, y in zip(scores, together):
            torch.testing.assert_close(x[0], y[i, :width], atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("filler", [0, 2, 17])
def test_what_the_padding_is_made_of_does_not_matter(model, filler):
    batch = make_batch(None, *ragged_batch(), max_length=32)
    other = batch.input_ids.masked_fill(~batch.attention_mask, filler)
    for x, y in zip(
        model(batch.input_ids, batch.attention_mask, batch.response_mask),
        model(other, batch.attention_mask, batch.response_mask),
    ):
        torch.testing.assert_close(x, y, atol=1e-6, rtol=1e-6)


@torch.no_grad()
def test_values_belong_to_the_state_just_before_the_token(model):
    batch = make_batch(None, [[5, 6]], [[7, 8, 9]], max_length=8)
    values = model(batch.input_ids, batch.attention_mask, batch.response_mask).values
    hidden = model.lm.base_model(input_ids=batch.input_ids).last_hidden_state
    expected = (hidden[0, 1:4] @ model.value_head.weight[0]) + model.value_head.bias
    torch.testing.assert_close(values[0, 2:], expected, atol=1e-5, rtol=1e-5)


def test_chunks_change_memory_and_nothing_else(model, monkeypatch):
    batch = make_batch(None, *ragged_batch(), max_length=32)
    seen = []
    model.lm.get_output_embeddings().register_forward_hook(
        lambda module, inputs, output: seen.append(len(inputs[0]))
    )

    def gradients(chunk):
        monkeypatch.setattr(hybrid, "LOGIT_CHUNK", chunk)
        model.zero_grad()
        scores = model(batch.input_ids, batch.attention_mask, batch.response_mask)
        (scores.logprobs.sum() + scores.values.sum()).backward()
        return [scores.logprobs.detach(), *(p.grad.clone() for p in model.parameters())]

    whole = gradients(10_000)
    assert seen == [int(batch.response_mask.sum())], "only response positions may reach lm_head"
    seen.clear()
    for x, y in zip(whole, gradients(7)):
        torch.testing.assert_close(x, y, atol=1e-5, rtol=1e-4)
    assert max(seen) == 7


def test_no_tensor_of_all_logits_is_kept():
    """Bytes kept for backward: with chunks the vocabulary counts once a chunk, not once a token."""
    lm = build_lm("llama", vocab_size=5000)
    model = HybridModel(lm)
    batch = make_batch(None, [[5]] * 16, [[7] * 60] * 16, max_length=64)
    old, hybrid.LOGIT_CHUNK = hybrid.LOGIT_CHUNK, 64
    kept = []
    try:
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
            model(batch.input_ids, batch.attention_mask, batch.response_mask)
    finally:
        hybrid.LOGIT_CHUNK = old
    assert max(x.numel() for x in kept) <= 5000 * 64, (
        "one tensor of 960 x 5000 logits would be 4.8 M"
    )
    assert not [x for x in kept if 5000 in x.shape and 32 not in x.shape], "they are recomputed"


def test_a_response_in_column_0_is_refused(model):
    response_mask = torch.tensor([[False, True, True], [True, False, True]])
    for rows in ([0, 1], [1]):
        with pytest.raises(ValueError, match="column 0"):
            ids = torch.ones(len(rows), 3)
            model(ids.long(), ids.bool(), response_mask[rows])


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "opt", "falcon", "gpt_neox"])
def test_dropout_is_zero_in_training_too(architecture):
    rates = {
        "gpt2": dict(resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5),
        "llama": dict(attention_dropout=0.5),
        "opt": dict(dropout=0.5, attention_dropout=0.5, layerdrop=0.5),
        "falcon": dict(hidden_dropout=0.5, attention_dropout=0.5),
        "gpt_neox": dict(hidden_dropout=0.5, attention_dropout=0.5),
    }[architecture]
    model = HybridModel(build_lm(architecture, **rates)).train()
    batch = make_batch(None, *ragged_batch(), max_length=32)
    first, second = (
        model(batch.input_ids, batch.attention_mask, batch.response_mask).logprobs for _ in range(2)
    )
    assert torch.equal(first, second)
    assert model.training, "train() mode, since gradient checkpointing needs it"


def test_the_value_head_starts_at_zero():
    model = HybridModel(build_lm("llama"))
    batch = make_batch(None, *ragged_batch(), max_length=32)
    assert not model(batch.input_ids, batch.attention_mask, batch.response_mask).values.any()


def test_a_frozen_copy_does_not_move(model):
    reference = model.frozen_copy()
    before = [p.clone() for p in reference.parameters()]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    assert all(torch.equal(x, y) for x, y in zip(before, reference.parameters()))
    assert not any(p.requires_grad for p in reference.parameters()) and not reference.training


@torch.no_grad()
@pytest.mark.parametrize("size", [None, 1, 3, 8])
def test_rows_in_micro_batches_come_back_in_their_order(model, size):
    batch = make_batch(None, *ragged_batch(), max_length=32)
    inputs = batch.input_ids, batch.attention_mask, batch.response_mask
    for options in ((), (0.7,)):
        scores = forward_rows(model, batch, size, *options)
        for x, expected in zip(scores, model(*inputs, *options), strict=True):
            torch.testing.assert_close(x, expected, atol=1e-4, rtol=1e-4)
    alone = batch.rows(torch.tensor([5]))
    one_row = forward_rows(model, alone, size)
    torch.testing.assert_close(
        one_row.values[0], scores.values[5, : alone.input_ids.shape[1]], atol=1e-4, rtol=1e-4
    )


def test_a_process_without_rows_gets_the_scores_of_the_others(monkeypatch):
    """As the second of two processes sees it, where the first has all rows."""
    model, gathered = HybridModel(build_lm("llama")), []
    batch = make_batch(None, *ragged_batch(rows=3), max_length=32)
    expected = forward_rows(model, batch, 2)
    monkeypatch.setattr(parallel, "world", lambda: 2)
    monkeypatch.setattr(parallel, "share", lambda rows: rows)
    monkeypatch.setattr(parallel, "gather", lambda rows: gathered.extend(rows) or rows)
    forward_rows(model, batch, 2)
    monkeypatch.setattr(parallel, "share", lambda rows: rows[:0])
    monkeypatch.setattr(parallel, "gather", lambda rows: rows + gathered)
    for x, y in zip(forward_rows(model, batch, 2), expected, strict=True):
        torch.testing.assert_close(x, y)


def test_a_precision_is_used_where_it_is_asked_for_and_scores_stay_float32(model):
    batch = make_batch(None, *ragged_batch(rows=3), max_length=32)
    inputs = batch.input_ids, batch.attention_mask, batch.response_mask
    x, seen = torch.ones(2, 2), []
    model.lm.get_output_embeddings().register_forward_hook(
        lambda module, inputs, output: seen.append(output.dtype)
    )
    for dtype in (torch.float32, torch.bfloat16):
        model.amp_dtype = None if dtype == torch.float32 else dtype
        with model.autocast():
            assert (x @ x).dtype == dtype
        assert all(score.dtype == torch.float32 for score in model(*inputs))
    assert seen == [torch.float32, torch.bfloat16]


def test_saved_folder_is_a_plain_hugging_face_folder(tiny, tmp_path):
    model, tokenizer = HybridModel(copy.deepcopy(tiny[0])), tiny[1]
    torch.nn.init.normal_(model.value_head.weight)
    model.save(tmp_path, tokenizer)
    lm, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ids = tokenizer("the plot was", return_tensors="pt").input_ids
    assert torch.equal(lm.eval()(ids).logits, model.lm.eval()(ids).logits)
    assert AutoTokenizer.from_pretrained(tmp_path)("the plot was").input_ids == ids[0].tolist()
    again, _ = HybridModel.load(str(tmp_path))
    assert all(
        torch.equal(x, y) for x, y in zip(model.parameters(), again.parameters(), strict=True)
    )


def test_two_models_are_merged_in_equal_parts_into_a_folder_that_has_to_be_named(
    tiny_folder, tmp_path, capsys
):
    merge = ["merge", str(tiny_folder), str(tiny_folder)]
    hybrid.main([*merge, "--out", str(tmp_path / "merged")])
    assert f"0.5 x {tiny_folder} + 0.5 x {tiny_folder}" in capsys.readouterr().out
    # Weights of equal shapes, read by another number of heads
    config = AutoConfig.from_pretrained(tiny_folder, n_head=4)
    other = HybridModel(AutoModelForCausalLM.from_config(config))
    other.save(tmp_path / "four", AutoTokenizer.from_pretrained(tiny_folder))
    with pytest.raises(SystemExit):
        hybrid.main([*merge[:2], str(tmp_path / "four"), "--out", str(tmp_path / "m")])
    assert "n_head is 2 in one, 4 in the other" in capsys.readouterr().err
    with pytest.raises(SystemExit) as caught:
        hybrid.main(merge)
    assert caught.value.code == 2 and "--out" in capsys.readouterr().err


def test_weights_are_loaded_as_float32_even_if_saved_in_half(tiny, tmp_path):
    copy.deepcopy(tiny[0]).half().save_pretrained(tmp_path)
    tiny[1].save_pretrained(tmp_path)
    lm, _ = load_lm(str(tmp_path))
    assert {p.dtype for p in lm.parameters()} == {torch.float32}


def test_masked_mean_ignores_whatever_is_off_the_mask():
    x = torch.tensor([[1.0, float("nan")], [3.0, float("inf")]])
    mask = torch.tensor([[True, False], [True, False]])
    assert masked_mean(x, mask) == 2 and masked_mean(x, torch.zeros_like(mask)) == 0
    assert masked_mean(torch.tensor([7.25, -3.0]), torch.tensor([True, False])) == 7.25


def test_a_loss_that_does_not_ask_for_the_entropy_does_not_pay_for_it(model):
    batch = make_batch(None, *ragged_batch(), max_length=32)
    inputs = (batch.input_ids, batch.attention_mask, batch.response_mask)
    full, lean = model(*inputs), model(*inputs, entropy=False)
    assert torch.equal(full.logprobs, lean.logprobs) and torch.equal(full.values, lean.values)
    assert full.entropy[batch.response_mask].min() > 0 and not lean.entropy.any()
