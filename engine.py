"""What every script needs and no paper describes: devices, precision, optimisers, updates.

Left out on purpose: anything of an algorithm. So `sft.py` and `ppo.py` can be read without this
file: `accumulate` is "backward over the rows", `apply_gradients` is "optimizer.step()".

    python -m pytest -q tests/test_engine.py
"""

import math
import random
import time
from collections.abc import Callable
from contextlib import nullcontext

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel

import parallel
from cli import (  # noqa: F401  (errors and flags can be had from here too)
    LostUpdates,
    NonFiniteReward,
    Parser,
    UserError,
    check_new_folder,
    first_line,
    number,
    one_line_errors,
    visible,
)


def seed_everything(seed: int) -> None:
    """Seed torch, NumPy and Python's `random`: a reward of the user's own may draw from any."""
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


def pick_device(name: str = "auto") -> torch.device:
    """`auto` takes CUDA, else Apple's MPS, else the CPU. Raises UserError for a missing device."""
    if name == "auto":
        name = "cpu"
        if torch.backends.mps.is_available():
            name = "mps"
        if torch.cuda.is_available():
            name = "cuda"
    try:
        device = torch.device(name)
        if device.type not in ("cuda", "mps", "cpu"):
            raise RuntimeError("known are auto, cuda, mps and cpu")
        torch.zeros(1, device=device)
    # torch raises an AssertionError where it was "not compiled with CUDA"
    except (RuntimeError, AssertionError) as problem:
        raise UserError(
            f"--device {name} cannot be used here ({first_line(problem)}); try --device cpu"
        ) from None
    return device


def seconds_of_product(n: int, dtype: torch.dtype, device, rounds: int) -> float:
    """The best time of some products of two n x n matrices."""
    x, best = torch.ones(n, n, dtype=dtype, device=device), math.inf
    for _ in range(rounds):
        started = time.perf_counter()
        (x @ x)[0, 0].item()  # waits for the device
        best = min(best, time.perf_counter() - started)
    return best


AMP_DTYPES = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def check_amp(amp: str, device: torch.device) -> None:
    """Raises UserError unless the device can multiply matrices in that precision."""
    if AMP_DTYPES[amp] is None:
        return
    try:
        if device.type == "cuda" and amp == "bf16":
            if not torch.cuda.is_bf16_supported(including_emulation=False):
                raise RuntimeError("this GPU has no bfloat16 arithmetic")
        with torch.autocast(device.type, AMP_DTYPES[amp]):
            torch.ones(8, 8, device=device) @ torch.ones(8, 8, device=device)
    except RuntimeError as problem:
        raise UserError(
            f"--amp {amp} cannot be used on {device} ({first_line(problem)}); try --amp no"
        ) from None


def make_scaler(amp: str, device: torch.device) -> torch.amp.GradScaler | None:
    """A GradScaler for fp16, which cannot hold small gradients; None for the other precisions."""
    return torch.amp.GradScaler(device.type, init_scale=2.0**12) if amp == "fp16" else None


def compile_lm(model: torch.nn.Module) -> None:
    """Compile the LM without its head, for any shape of a batch. Raises UserError if that fails."""
    try:
        one_tensor = torch.ones(3, device=model.value_head.weight.device)
        torch.compile(lambda x: x * 2 + 1, dynamic=True)(one_tensor)
    except Exception as problem:  # without a C++ compiler or Triton, errors of many kinds come up
        raise UserError(
            "--compile: torch.compile does not work on this machine "
            f"({first_line(problem)}); leave it out"
        ) from None
    model.lm.base_model.compile(dynamic=True)


class MuonWithAdamW(torch.optim.Optimizer):
    """torch's Muon for the matrices between embedding and head, torch's AdamW for everything else.

    Muon makes the update of a matrix orthogonal. That has no meaning for embeddings, heads, norms
    and biases. `match_rms_adamw` scales its updates like AdamW's, so one learning rate fits both.
    """

    def __init__(self, matrices: list, others: list, lr: float, adamw: dict):
        self.optimizers = [
            torch.optim.Muon(matrices, lr=lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, lr=lr, **adamw),
        ]
        super().__init__([*matrices, *others], {"lr": lr})
        self._share_groups()

    def _share_groups(self) -> None:
        # The same dicts, not copies: a learning rate that is set here is set in both optimisers.
        muon, adamw = self.optimizers
        self.param_groups = [*muon.param_groups, *adamw.param_groups]

    def step(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()

    def state_dict(self) -> dict:
        return {"parts": [optimizer.state_dict() for optimizer in self.optimizers]}

    def load_state_dict(self, state: dict) -> None:
        for optimizer, saved in zip(self.optimizers, state["parts"], strict=True):
            optimizer.load_state_dict(saved)
        self._share_groups()


# Betas as in GPT-3 (2005.14165, appendix B). Adam's eps is 1e-5, not torch's 1e-8: the first
# updates are much smaller (N+ details, 2403.17031). No weight decay: the KL limits the change.
ADAM = dict(betas=(0.9, 0.95), eps=1e-5, weight_decay=0.0)


def trained(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    """What an optimiser takes: all parameters, or with --lora those that are not frozen."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def muon_with_adamw(model: torch.nn.Module, lr: float) -> MuonWithAdamW:
    """Muon takes all matrices but embeddings (of positions too), the LM head and the value head."""
    ends = [model.lm.get_output_embeddings(), model.value_head]
    ends += [module for module in model.modules() if isinstance(module, torch.nn.Embedding)]
    in_ends = {id(p) for module in ends for p in module.parameters()}
    matrices = [p for p in trained(model) if p.dim() == 2 and id(p) not in in_ends]
    in_matrices = {id(p) for p in matrices}
    others = [p for p in trained(model) if id(p) not in in_matrices]
    return MuonWithAdamW(matrices, others, lr, ADAM)


OPTIMIZERS = {
    "adamw": lambda model, lr: torch.optim.AdamW(trained(model), lr=lr, fused=True, **ADAM),
    "adam": lambda model, lr: torch.optim.Adam(trained(model), lr=lr, fused=True, **ADAM),
    "sgd": lambda model, lr: torch.optim.SGD(trained(model), lr=lr, momentum=0.9),
    "adafactor": lambda model, lr: torch.optim.Adafactor(trained(model), lr=lr),
    "muon": muon_with_adamw,
}

# The share of the peak learning rate, by `progress`: 0 after the warm-up, 1 at the end of the run.
SCHEDULERS = {
    "constant": lambda progress: 1.0,
    "linear": lambda progress: 1 - progress,
    "cosine": lambda progress: 0.5 * (1 + math.cos(math.pi * progress)),
    "wsd": lambda progress: min(1.0, (1 - progress) / 0.2),  # falls over the last fifth
}


def learning_rate_factor(name: str, steps: int, warmup_steps: int) -> Callable[[int], float]:
    """-> a function: step (from 0) -> the share of the peak learning rate.

    It rises linearly to 1 over `warmup_steps`, then follows SCHEDULERS[name] to the last step.
    """

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        return SCHEDULERS[name](min(1.0, (step - warmup_steps) / max(1, steps - warmup_steps)))

    return factor


def enter_phase(optimizer: torch.optim.Optimizer, phase: str, lr: float) -> None:
    """Before the updates of a phase (`sft`, `ppo`, ...): set its learning rate.

    Where another phase came before, the first moments (the momentum) start again from 0, and the
    second moments stay. So Adam's first update after a change is 1 - beta1, a tenth, of what it is
    with full momentum, the second 0.19, and so on. Short first steps keep PPO near the texts that
    it sampled, and in turns an SFT step pulls back less of what PPO has learnt.
    """
    for group in optimizer.param_groups:
        group["lr"] = lr
    before = optimizer.param_groups[0].get("phase", phase)
    optimizer.param_groups[0]["phase"] = phase  # in the optimiser, so that a checkpoint keeps it
    if phase == before:
        return
    for part in getattr(optimizer, "optimizers", [optimizer]):
        for state in part.state.values():
            for name in state.keys() & {"exp_avg", "momentum_buffer"}:
                state[name].zero_()


class Backend:
    """Computes and applies gradients: plain torch, GradScaler for fp16, DDP for several processes.

    `zero.ZeroBackend` has the same two methods for DeepSpeed.
    """

    def __init__(self, model: torch.nn.Module, scaler: torch.amp.GradScaler | None = None):
        self.model, self.scaler, self.loss = model, scaler, _Loss(model)
        if parallel.world() > 1:
            # An SFT loss does not reach the value head: to DDP, an "unused parameter". The head
            # then gets no gradient, and the update leaves it as it is.
            self.loss = DistributedDataParallel(self.loss, find_unused_parameters=True)

    def backward(
        self, loss_fn: Callable, micro_batch, weight: torch.Tensor, last: bool
    ) -> dict[str, torch.Tensor]:
        """Add the gradient of weight * loss. Returns the stats of `loss_fn`.

        The processes exchange gradients at the `last` micro-batch of an update.
        """
        with nullcontext() if last or parallel.world() == 1 else self.loss.no_sync():
            loss, stats = self.loss(loss_fn, micro_batch)
            loss = loss * weight * parallel.world()  # DDP divides by that number
            (loss if self.scaler is None else self.scaler.scale(loss)).backward()
        return stats

    def step(self, optimizer: torch.optim.Optimizer, max_grad_norm: float) -> float:
        """Clip the gradient, update the weights, clear the gradient. Returns the unclipped norm.

        A gradient that is not finite changes no weight.
        """
        if self.scaler is not None:
            # Before the clip (critical!): the limit is in units of the true gradient.
            self.scaler.unscale_(optimizer)
        grad_norm = float(torch.nn.utils.clip_grad_norm_(self.model.parameters(), max_grad_norm))
        if self.scaler is not None:
            self.scaler.step(optimizer)  # by itself it skips a gradient that is not finite
            self.scaler.update()
        elif math.isfinite(grad_norm):
            optimizer.step()
        # None, not 0: a parameter without a gradient is not touched, not even by weight decay.
        optimizer.zero_grad(set_to_none=True)
        return grad_norm


class _Loss(torch.nn.Module):
    """A loss as a module: DDP must see the output from which the backward pass starts."""

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.model = model

    def forward(self, loss_fn: Callable, micro_batch):
        return loss_fn(micro_batch)


def join_stats(weighted: list[tuple[dict, float]], divisor: float = 1.0) -> dict[str, float]:
    """Pairs (stats, weight) -> one dict. Micro-batches, processes and updates are all joined here.

    A stat becomes the sum of value * weight, in this order, divided by `divisor`. Only a stat whose
    name ends in `_max` becomes the maximum of its values, without weight.

    >>> join_stats([({"loss": 1.0, "gap_max": 4.0}, 0.25), ({"loss": 3.0, "gap_max": 2.0}, 0.75)])
    {'loss': 2.5, 'gap_max': 4.0}
    """
    joined: dict[str, float] = {}
    for stats, weight in weighted:
        for name, value in stats.items():
            if name.endswith("_max"):
                joined[name] = max(joined.get(name, -math.inf), float(value))
            else:
                joined[name] = joined.get(name, 0.0) + float(value * weight)
    return {n: value if n.endswith("_max") else value / divisor for n, value in joined.items()}


def accumulate(
    backend: Backend, batch, rows: torch.Tensor, micro_batch_size: int | None, loss_fn
) -> dict[str, float]:
    """The backward pass of one update over `rows` of `batch`, `micro_batch_size` rows at a time.

    Each process takes that many at a time; None takes all. `loss_fn(micro_batch) -> (loss, stats)`
    must return means over what `micro_batch.weight` counts: response tokens, or pairs in DPO. Each
    micro-batch counts by its share of them, so the gradient is that of ONE mean over all tokens of
    the update: 1x8 == 8x1 == 4x2 rows == 2 processes, also when lengths differ. (A mean of means
    would give the tokens of short rows too much weight.) Rows of similar length go together: fewer
    columns are padding. Returns the same means of the stats (`join_stats`).
    """
    whole_weight = batch.weight(rows)  # scalar: response tokens, or pairs for DPO
    per_process = math.ceil(len(rows) / parallel.world())
    # The same number on every process: they wait for each other at the last micro-batch.
    n_micro_batches = math.ceil(per_process / (micro_batch_size or per_process))
    if len(rows) > 1 and (n_micro_batches > 1 or parallel.world() > 1):
        rows = rows[batch.lengths()[rows].argsort(stable=True)]
    total: dict[str, float] = {}
    for i, index in enumerate(torch.tensor_split(parallel.share(rows), n_micro_batches)):
        # A process that has no rows left takes part in the collective call with weight 0.
        weight = batch.weight(index) / whole_weight  # scalar
        micro_batch = batch.rows(index if len(index) else rows[:1])
        stats = backend.backward(loss_fn, micro_batch, weight, last=i == n_micro_batches - 1)
        total = join_stats([(total, 1.0), (stats, weight)])
    return join_stats([(process_total, 1.0) for process_total in parallel.everybody(total)])


def apply_gradients(
    backend: Backend, optimizer: torch.optim.Optimizer, max_grad_norm: float
) -> dict[str, float]:
    """Clip the gradient, update, clear the gradient. `grad_norm` is the norm BEFORE the clip.

    A gradient that is not finite never reaches weights or optimiser state: the update is skipped,
    `skipped_steps` is 1, and there is no `grad_norm`, which would not be a number.
    """
    grad_norm = backend.step(optimizer, max_grad_norm)
    if not math.isfinite(grad_norm):
        return {"skipped_steps": 1.0}
    return {"grad_norm": grad_norm, "skipped_steps": 0.0}
