"""Optimisers and schedules against torch's own classes and closed forms."""

import copy
import math
import re

import pytest
import torch
from conftest import REVIEWS, ROOT, build_lm, ragged_batch
from torch.optim import lr_scheduler as torch_schedules

from data import demonstration_batch, make_batch
from engine import (
    OPTIMIZERS,
    SCHEDULERS,
    Backend,
    MuonWithAdamW,
    UserError,
    apply_gradients,
    check_amp,
    compile_lm,
    enter_phase,
    learning_rate_factor,
    make_scaler,
)
from flags import DEFAULT_LR, make_parser
from generate import generate
from hybrid import HybridModel
from prepare import resolve_defaults
from sft import sft_step
from train import ALGORITHMS

ADAM = dict(betas=(0.9, 0.95), eps=1e-5, weight_decay=0.0)
ORACLES = {
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=1e-3, fused=True, **ADAM),
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=1e-3, fused=True, **ADAM),
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=1e-3, momentum=0.9),
    "adafactor": lambda parameters: torch.optim.Adafactor(parameters, lr=1e-3),
}


def train(model, optimizer, steps=4):
    batch = make_batch(None, *ragged_batch(), max_length=32)
    losses = [sft_step(model, batch, optimizer)["sft/loss"] for _ in range(steps)]
    return losses, [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize("name", ORACLES)
def test_an_optimiser_is_torchs_own(name):
    model = HybridModel(build_lm("llama"))
    twin = copy.deepcopy(model)
    _, weights = train(model, OPTIMIZERS[name](model, 1e-3))
    _, expected = train(twin, ORACLES[name](twin.parameters()))
    assert all(torch.equal(x, y) for x, y in zip(weights, expected))


def test_muon_takes_the_matrices_and_adamw_the_rest():
    model = HybridModel(build_lm("llama"))
    names = {id(p): name for name, p in model.named_parameters()}
    optimizer = OPTIMIZERS["muon"](model, 1e-3)
    muon, adamw = (
        {names[id(p)] for g in one.param_groups for p in g["params"]}
        for one in optimizer.optimizers
    )
    assert muon | adamw == set(names.values()) and not muon & adamw
    assert (
        all("_proj" in name for name in muon)
        and {"value_head.weight", "lm.lm_head.weight", "lm.model.embed_tokens.weight"} <= adamw
    )

    twin = copy.deepcopy(model)
    parameters = dict(twin.named_parameters())
    pair = [
        torch.optim.Muon(
            [p for n, p in parameters.items() if n in muon],
            lr=1e-3,
            weight_decay=0.0,
            adjust_lr_fn="match_rms_adamw",
        ),
        torch.optim.AdamW([p for n, p in parameters.items() if n in adamw], lr=1e-3, **ADAM),
    ]

    class Both:
        def step(self):
            [part.step() for part in pair]

        def zero_grad(self, set_to_none):
            [part.zero_grad(set_to_none) for part in pair]

    _, weights = train(model, optimizer)
    _, expected = train(twin, Both())
    assert all(torch.equal(x, y) for x, y in zip(weights, expected))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimiser_learns_follows_the_schedule_and_resumes(name):
    model = HybridModel(build_lm("llama"))
    optimizer = OPTIMIZERS[name](model, 0.1 if name == "sgd" else 3e-3)
    scheduler = torch_schedules.LambdaLR(optimizer, lambda step: 0.5**step)
    losses, _ = train(model, optimizer, 8)
    assert losses[-1] < losses[0]
    scheduler.step()
    inner = getattr(optimizer, "optimizers", [optimizer])
    groups = [group for one in inner for group in one.param_groups]
    assert {g["lr"] for g in groups} == {0.05 if name == "sgd" else 1.5e-3}
    twin = copy.deepcopy(model)
    other = OPTIMIZERS[name](twin, 1.0)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert all(torch.equal(x, y) for x, y in zip(train(model, optimizer)[1], train(twin, other)[1]))
    assert isinstance(optimizer, MuonWithAdamW) == (name == "muon")


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_default_rate_of_an_optimiser_is_its_own(name):
    """--help and the table of the documents say it; a flag replaces it."""
    tiny, other = DEFAULT_LR[name]
    for model, expected in (("tiny", tiny), ("gpt2", other)):
        args = make_parser().parse_args(["--optimizer", name, "--model", model])
        resolve_defaults(args, ALGORITHMS["ppo"], 256)
        assert args.lr == expected
    args = make_parser().parse_args(["--optimizer", name, "--lr", "0.125"])
    resolve_defaults(args, ALGORITHMS["ppo"], 256)
    assert args.lr == 0.125
    assert f"{name} {tiny:g} and {other:g}" in " ".join(make_parser().format_help().split())
    table = (ROOT / "docs" / "flags-and-data.md").read_text(encoding="utf-8")
    row = re.search(rf"^\| [^|]*`{name}`[^|]* \| ([\de.-]+) \| ([\de.-]+) \|$", table, re.MULTILINE)
    assert (float(row[1]), float(row[2])) == (tiny, other)


# Muon has AdamW's rate, and multiplies in bf16: minutes on a CPU that has no such instructions.
@pytest.mark.parametrize("name", sorted(set(OPTIMIZERS) - {"muon"}))
def test_the_built_in_model_learns_at_the_default_rate(name, tiny):
    """Thirty steps with the gradient clipped, as in a run: well below the loss of guessing the
    frequent words, about 4.4."""
    model = HybridModel(copy.deepcopy(tiny[0]))
    optimizer = OPTIMIZERS[name](model, DEFAULT_LR[name][0])
    losses = []
    for step in range(30):
        for group in optimizer.param_groups:
            group["lr"] = DEFAULT_LR[name][0] * min(1, (step + 1) / 10)
        examples = REVIEWS[step * 8 % 240 :][:8]
        batch = demonstration_batch(tiny[1], examples, 64)
        losses.append(sft_step(model, batch, optimizer)["sft/loss"])
    assert losses[0] > 5.9 and sum(losses[-3:]) / 3 < 4.0, losses


def momenta(optimizer) -> dict[str, list]:
    """Clones of first and second moments: {name of the state: one tensor a parameter}."""
    found = {}
    for part in getattr(optimizer, "optimizers", [optimizer]):
        for state in part.state.values():
            for name, value in state.items():
                if torch.is_tensor(value) and value.numel() > 1:
                    found.setdefault(name, []).append(value.clone())
    return found


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("one, other", [("sft", "ppo"), ("grpo", "sft")])
def test_an_update_does_not_go_on_in_the_direction_of_another_phase(name, one, other):
    model = HybridModel(build_lm("llama"))
    optimizer = OPTIMIZERS[name](model, 1e-3)
    enter_phase(optimizer, one, 1e-3)
    train(model, optimizer)
    before = momenta(optimizer)
    first = {"exp_avg", "momentum_buffer"} & before.keys()
    assert all(x.abs().sum() > 0 for moment in first for x in before[moment])
    assert bool(first) == (name != "adafactor"), "only Adafactor has no momentum"

    enter_phase(optimizer, other, 3e-4)
    after = momenta(optimizer)
    assert {group["lr"] for group in optimizer.param_groups} == {3e-4}
    for moment, tensors in after.items():
        for x, old in zip(tensors, before[moment], strict=True):
            assert torch.equal(x, torch.zeros_like(old) if moment in first else old), moment


@pytest.mark.parametrize("phase", ["sft", "ppo"])
def test_within_a_phase_the_momentum_is_kept(phase):
    model = HybridModel(build_lm("llama"))
    optimizer = OPTIMIZERS["adamw"](model, 1e-3)
    enter_phase(optimizer, phase, 1e-3)
    train(model, optimizer)
    before = momenta(optimizer)
    enter_phase(optimizer, phase, 1e-3)
    for moment, tensors in momenta(optimizer).items():
        assert all(map(torch.equal, tensors, before[moment])), moment


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_saved_optimiser_knows_what_its_momentum_is_of(name):
    model = HybridModel(build_lm("llama"))
    optimizer = OPTIMIZERS[name](model, 1e-3)
    enter_phase(optimizer, "sft", 1e-3)
    train(model, optimizer)
    other = OPTIMIZERS[name](model, 1e-3)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    enter_phase(other, "grpo", 1e-3)
    after = momenta(other)
    first = {"exp_avg", "momentum_buffer"} & after.keys()
    assert first and not any(x.any() for moment in first for x in after[moment])


def rates(name, steps=50, warmup=10):
    factor = learning_rate_factor(name, steps, warmup)
    return [factor(step) for step in range(steps)]


def test_schedules_equal_torchs_own():
    def of_torch(make):
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        schedule, values = make(optimizer), []
        for _ in range(40):
            values.append(schedule.get_last_lr()[0])
            optimizer.step()
            schedule.step()
        return values

    linear = of_torch(
        lambda o: torch_schedules.LinearLR(o, start_factor=1.0, end_factor=0.0, total_iters=40)
    )
    cosine = of_torch(lambda o: torch_schedules.CosineAnnealingLR(o, T_max=40))
    constant = of_torch(lambda o: torch_schedules.ConstantLR(o, factor=1.0))
    for name, expected in (("linear", linear), ("cosine", cosine), ("constant", constant)):
        assert rates(name)[10:] == pytest.approx(expected, abs=1e-9), name


def test_schedules_in_closed_form():
    for name in SCHEDULERS:
        assert rates(name)[:10] == pytest.approx([(i + 1) / 10 for i in range(10)]), "warm-up"
        assert (
            learning_rate_factor(name, 50, 0)(0) == 1
            and learning_rate_factor(name, 5, 10)(4) == 0.5
        )
    assert rates("linear")[30] == 0.5 and rates("cosine")[20] == pytest.approx(
        0.5 * (1 + math.cos(math.pi / 4))
    )
    assert rates("wsd")[10:42] == [1.0] * 32 and rates("wsd")[42:] == pytest.approx(
        [1 - i / 8 for i in range(8)]
    )


# ---- precision


@pytest.mark.parametrize("amp, dtype", [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_mixed_precision_computes_low_and_keeps_everything_in_float32(model, amp, dtype):
    batch = make_batch(None, *ragged_batch(), max_length=32)
    exact = model(batch.input_ids, batch.attention_mask, batch.response_mask)
    model.amp_dtype, seen = dtype, []
    head = model.lm.get_output_embeddings()
    handle = head.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    scores = model(batch.input_ids, batch.attention_mask, batch.response_mask)
    assert (
        seen == [dtype]
        and all(x.dtype == torch.float32 for x in scores)
        and {p.dtype for p in model.parameters()} == {torch.float32}
    )
    mask = batch.response_mask
    assert not torch.equal(scores.logprobs, exact.logprobs)
    assert (scores.logprobs - exact.logprobs)[mask].abs().median() < 0.2
    again = model(batch.input_ids, batch.attention_mask, batch.response_mask)
    assert torch.equal(again.logprobs, scores.logprobs), (
        "the ratio of the first update is exactly 1 in low precision too"
    )
    handle.remove()
    generation = generate(
        model,
        [[5, 6]],
        max_new_tokens=4,
        eos_token_id=2,
        generator=torch.Generator().manual_seed(0),
    )
    assert len(generation.responses[0]) >= 1


def test_float16_scales_the_loss_unscales_before_the_clip_and_skips_overflow():
    model = HybridModel(build_lm("llama"))
    batch, device = make_batch(None, *ragged_batch(), max_length=32), torch.device("cpu")
    twin = copy.deepcopy(model)
    scaler = make_scaler("fp16", device)
    assert make_scaler("bf16", device) is make_scaler("no", device) is None
    scaled = sft_step(
        model, batch, torch.optim.SGD(model.parameters(), lr=0.1), backend=Backend(model, scaler)
    )
    plain = sft_step(twin, batch, torch.optim.SGD(twin.parameters(), lr=0.1))
    assert scaled == pytest.approx(plain, rel=1e-4), "the norm is that of the true gradient"
    for x, y in zip(model.parameters(), twin.parameters()):
        torch.testing.assert_close(x, y, atol=1e-5, rtol=1e-4)
    before, scale = copy.deepcopy(model.state_dict()), scaler.get_scale()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, math.inf)
    scaler.scale(torch.ones(1))  # a step has begun
    assert (
        apply_gradients(Backend(model, scaler), optimizer, 1.0) == {"skipped_steps": 1.0}
        and scaler.get_scale() == scale / 2
    )
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())


def test_a_precision_that_the_device_lacks_is_one_line(monkeypatch):
    check_amp("bf16", torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    with pytest.raises(
        UserError,
        match="--amp bf16 cannot be used on cuda "
        ".this GPU has no bfloat16 arithmetic.; try --amp no",
    ):
        check_amp("bf16", torch.device("cuda"))

    def refuse(*args, **kwargs):
        raise RuntimeError("fp16 is not implemented for this device")

    monkeypatch.setattr(torch, "autocast", refuse)
    with pytest.raises(
        UserError, match="--amp fp16 cannot be used on cpu .fp16 is not implemented"
    ):
        check_amp("fp16", torch.device("cpu"))


def test_gradient_checkpointing_recomputes_and_changes_no_gradient():
    model = HybridModel(build_lm("llama")).train()
    twin = copy.deepcopy(model)
    twin.lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    batch = make_batch(None, *ragged_batch(), max_length=32)
    calls = {"plain": 0, "checkpointed": 0}
    for name, one in (("plain", model), ("checkpointed", twin)):
        one.lm.model.layers[0].mlp.register_forward_pre_hook(
            lambda *a, name=name: calls.update({name: calls[name] + 1})
        )
        one(batch.input_ids, batch.attention_mask, batch.response_mask).logprobs.sum().backward()
    assert calls == {"plain": 1, "checkpointed": 2}
    for x, y in zip(model.parameters(), twin.parameters()):
        assert (x.grad is None) == (y.grad is None)
        if x.grad is not None:
            torch.testing.assert_close(x.grad, y.grad)


@pytest.mark.slow
def test_compiling_changes_no_score_and_its_absence_is_one_line(monkeypatch):
    model = HybridModel(build_lm("gpt2"))
    batch = make_batch(None, *ragged_batch(), max_length=32)
    inputs = (batch.input_ids, batch.attention_mask, batch.response_mask)
    plain = model(*inputs)
    plain.logprobs.sum().backward()
    gradient = model.lm.transformer.wte.weight.grad.clone()
    with monkeypatch.context() as broken:
        broken.setattr(
            torch,
            "compile",
            lambda *a, **k: lambda x: (_ for _ in ()).throw(RuntimeError("no C++ compiler")),
        )
        with pytest.raises(
            UserError,
            match="--compile: torch.compile does not work on this machine "
            ".no C.. compiler.; leave it out",
        ):
            compile_lm(model)
    try:
        compile_lm(model)
    except UserError as problem:
        pytest.skip(str(problem))
    model.zero_grad()
    fast = model(*inputs)
    fast.logprobs.sum().backward()
    torch.testing.assert_close(fast.logprobs, plain.logprobs, atol=1e-4, rtol=0)
    torch.testing.assert_close(model.lm.transformer.wte.weight.grad, gradient, atol=1e-3, rtol=1e-3)
