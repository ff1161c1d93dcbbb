"""What every script here shares and no paper talks about: errors and flags, device, optimisers, micro-batches, the guarded step.

Left out on purpose: anything algorithmic, so that `sft.py` and `ppo.py` can be read without this file: `accumulate` is "backward over
the rows", `apply_gradients` is "optimizer.step()".
"""

import argparse
import math
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Callable

import torch
from torch.nn.parallel import DistributedDataParallel

import parallel


class UserError(ValueError):
    """Something that the user can mend. `train.py` prints it as one line, `error: ...`, and exits with status 2."""


class NonFiniteReward(UserError):
    """A reward that is no finite number. Before training it ends the run; during training it costs one update."""


def first_line(problem: BaseException) -> str:
    """The first line of an exception's message, for an error of one line; its class where it says nothing."""
    return next(iter(str(problem).strip().splitlines()), type(problem).__name__).rstrip(".: ")


def check_new_folder(out: str) -> None:
    """Raises UserError unless `out` can be made: what takes long to compute must not fail when it is saved."""
    path = Path(out)
    if path.exists():
        raise UserError(f"--out {out} already exists; choose another folder")
    if not path.absolute().parent.is_dir():
        raise UserError(f"--out {out}: there is no folder {path.absolute().parent} to put it in")


def one_line_errors(main: Callable):
    """`main`, but a UserError becomes one line on stderr, `error: ...`, and exit status 2."""

    def run(argv: list[str] | None = None):
        try:
            return main(argv)
        except UserError as problem:
            whose = f" in process {parallel.rank()}" if parallel.rank() else ""
            print(f"error{whose}: {' '.join(str(problem).split())}", file=sys.stderr)
            raise SystemExit(2) from None
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            raise SystemExit(130) from None

    return run


class Parser(argparse.ArgumentParser):
    """Prints defaults in --help where there is one and the help does not explain it; a wrong flag is a UserError."""

    def __init__(self, description: str):
        super().__init__(description=description, formatter_class=_DefaultsFormatter)

    def error(self, message: str):
        raise UserError(f"{message} (--help lists the flags)")


class _DefaultsFormatter(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str:
        return (
            action.help
            if action.default in (None, False) or "(default" in action.help
            else super()._get_help_string(action)
        )


def number(kind: type, low: float, high: float = math.inf, above: bool = False):
    """An argparse type: a finite `kind` in low..high (`above`: low itself excluded), or one clear line."""

    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value) or not low <= value <= high or (above and value == low):
            bounds = f"above {low:g}" if above else f"at least {low:g}"
            bounds += f" and at most {high:g}" if high < math.inf else ""
            raise argparse.ArgumentTypeError(
                f"expected {'a whole number' if kind is int else 'a number'} {bounds}, found {text!r}"
            )
        return value

    return parse


def pick_device(name: str = "auto") -> torch.device:
    """`auto` takes CUDA, then Apple's MPS, then the CPU. Raises UserError for a device that this machine lacks."""
    if name == "auto":
        name = (
            "cuda"
            if torch.cuda.is_available()
            else "mps"
            if torch.backends.mps.is_available()
            else "cpu"
        )
    try:
        device = torch.device(name)
        if device.type not in ("cuda", "mps", "cpu"):
            raise RuntimeError("known are auto, cuda, mps and cpu")
        torch.zeros(1, device=device)
    except (
        RuntimeError,
        AssertionError,
    ) as problem:  # torch says "not compiled with CUDA" by an AssertionError
        raise UserError(
            f"--device {name} cannot be used here ({first_line(problem)}); try --device cpu"
        ) from None
    return device


AMP_DTYPES = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def check_amp(amp: str, device: torch.device) -> None:
    """Raises UserError unless the device can multiply matrices in that precision."""
    if AMP_DTYPES[amp] is None:
        return
    try:
        if (
            device.type == "cuda"
            and amp == "bf16"
            and not torch.cuda.is_bf16_supported(including_emulation=False)
        ):
            raise RuntimeError("this GPU has no bfloat16 arithmetic")
        with torch.autocast(device.type, AMP_DTYPES[amp]):
            torch.ones(8, 8, device=device) @ torch.ones(8, 8, device=device)
    except RuntimeError as problem:
        raise UserError(
            f"--amp {amp} cannot be used on {device} ({first_line(problem)}); try --amp no"
        ) from None


def make_scaler(amp: str, device: torch.device) -> torch.amp.GradScaler | None:
    """float16 cannot hold small gradients: they are computed scaled up. The other precisions need no scaler: None."""
    return torch.amp.GradScaler(device.type, init_scale=2.0**12) if amp == "fp16" else None


def compile_lm(model: torch.nn.Module) -> None:
    """torch.compile the trunk in place, for rows and columns of any number. Raises UserError where this machine cannot compile."""
    try:
        torch.compile(lambda x: x * 2 + 1, dynamic=True)(
            torch.ones(3, device=model.value_head.weight.device)
        )
    except (
        Exception
    ) as problem:  # a missing C++ compiler or Triton shows itself in errors of many kinds
        raise UserError(
            f"--compile: torch.compile does not work on this machine ({first_line(problem)}); leave it out"
        ) from None
    model.lm.base_model.compile(dynamic=True)


class MuonWithAdamW(torch.optim.Optimizer):
    """torch's Muon for the matrices between embedding and head, AdamW for everything else, behind one optimiser's face.

    Muon orthogonalises a matrix's update, which makes no sense for embeddings, heads, norms and biases. `match_rms_adamw` gives
    its updates the size of AdamW's, so that one learning rate fits both.
    """

    def __init__(self, matrices: list, others: list, lr: float, adamw: dict):
        self.parts = [
            torch.optim.Muon(matrices, lr=lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, lr=lr, **adamw),
        ]
        super().__init__([*matrices, *others], {"lr": lr})
        self._share()

    def _share(
        self,
    ) -> None:  # the same dicts, so that a scheduler that sets our learning rates sets theirs
        self.param_groups = [group for part in self.parts for group in part.param_groups]

    def step(self) -> None:
        for part in self.parts:
            part.step()

    def state_dict(self) -> dict:
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state: dict) -> None:
        for part, part_state in zip(self.parts, state["parts"], strict=True):
            part.load_state_dict(part_state)
        self._share()


def _muon(model: torch.nn.Module, lr: float, adamw: dict) -> MuonWithAdamW:
    embeddings = [
        module for module in model.modules() if isinstance(module, torch.nn.Embedding)
    ]  # of positions too
    ends = {
        id(p)
        for module in (*embeddings, model.lm.get_output_embeddings(), model.value_head)
        for p in module.parameters()
    }
    matrices = [p for p in model.parameters() if p.dim() == 2 and id(p) not in ends]
    chosen = {id(p) for p in matrices}
    return MuonWithAdamW(
        matrices, [p for p in model.parameters() if id(p) not in chosen], lr, adamw
    )


# Betas as in GPT-3 (2005.14165, appendix B). Adam's eps 1e-5, not torch's 1e-8: the first steps are far less wild (N+ details, 2403.17031). No weight decay: PPO has its own anchor.
_ADAM = dict(betas=(0.9, 0.95), eps=1e-5, weight_decay=0.0)
OPTIMIZERS = {
    "adamw": lambda model, lr: torch.optim.AdamW(model.parameters(), lr=lr, fused=True, **_ADAM),
    "adam": lambda model, lr: torch.optim.Adam(model.parameters(), lr=lr, fused=True, **_ADAM),
    "sgd": lambda model, lr: torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9),
    "adafactor": lambda model, lr: torch.optim.Adafactor(model.parameters(), lr=lr),
    "muon": lambda model, lr: _muon(model, lr, _ADAM),
}

# progress 0..1 from the end of the warm-up to the end of the run -> share of the peak learning rate
SCHEDULERS = {
    "constant": lambda progress: 1.0,
    "linear": lambda progress: 1 - progress,
    "cosine": lambda progress: 0.5 * (1 + math.cos(math.pi * progress)),
    "wsd": lambda progress: min(
        1.0, (1 - progress) / 0.2
    ),  # warm up, stay, decay over the last fifth
}


def learning_rate_factor(name: str, steps: int, warmup_steps: int) -> Callable[[int], float]:
    """step (from 0) -> share of the peak: rises linearly to 1 over `warmup_steps`, then follows SCHEDULERS[name] to the last step."""

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        return SCHEDULERS[name](min(1.0, (step - warmup_steps) / max(1, steps - warmup_steps)))

    return factor


class Backend:
    """How the gradient of a loss comes about and is applied: plain torch, `GradScaler` for float16, DistributedDataParallel where there
    are several processes. `zero.py` has the one for DeepSpeed."""

    def __init__(self, model: torch.nn.Module, scaler: torch.amp.GradScaler | None = None):
        self.model, self.scaler = model, scaler
        # Unused parameters: an SFT loss does not reach the value head. It keeps no gradient, and so stays as it is.
        self.ddp = (
            DistributedDataParallel(_Loss(model), find_unused_parameters=True)
            if parallel.world() > 1
            else None
        )

    def backward(
        self, loss_fn: Callable, part, weight: torch.Tensor, last: bool
    ) -> dict[str, torch.Tensor]:
        """Add the gradient of weight * loss; processes exchange theirs after the `last` part of a step. -> the stats of `loss_fn`."""
        with nullcontext() if last or self.ddp is None else self.ddp.no_sync():
            loss, stats = (self.ddp or _call)(loss_fn, part)
            loss = (
                loss * weight * parallel.world()
            )  # DistributedDataParallel divides by that number
            (loss if self.scaler is None else self.scaler.scale(loss)).backward()
        return stats

    def step(self, optimizer: torch.optim.Optimizer, max_grad_norm: float) -> float:
        """Clip, step unless the gradient is not finite, forget the gradient. -> its norm before the clip."""
        if self.scaler is not None:
            self.scaler.unscale_(
                optimizer
            )  # before the clip (critical!): the limit is in units of the true gradient
        grad_norm = float(torch.nn.utils.clip_grad_norm_(self.model.parameters(), max_grad_norm))
        if self.scaler is not None:
            self.scaler.step(optimizer)  # skips what is not finite by itself
            self.scaler.update()
        elif math.isfinite(grad_norm):
            optimizer.step()
        optimizer.zero_grad(
            set_to_none=True
        )  # None, not 0: a parameter without gradient is not touched, not even by weight decay
        return grad_norm


def _call(loss_fn: Callable, part):
    return loss_fn(part)


class _Loss(torch.nn.Module):
    """A loss as a module, since DistributedDataParallel wants to see what the backward pass will start from."""

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.model = model

    def forward(self, loss_fn: Callable, part):
        return loss_fn(part)


def accumulate(
    backend: Backend, batch, rows: torch.Tensor, micro_batch_size: int | None, loss_fn
) -> dict[str, float]:
    """Backward of one optimiser step over `rows`, `micro_batch_size` of them at a time on each process (None: all at once).

    `loss_fn(part) -> (loss, stats)` must return means over what `part.weight` counts: response tokens (DPO: pairs). Each part counts by its share of
    them in the whole step, so the gradient is that of ONE mean over all tokens: 1x8 == 8x1 == 4x2 rows == 2 processes, also when
    lengths differ. (A mean of means would overweight the tokens of short rows.) Rows of like length go together, so that few columns
    are padding. Returns the same means of `stats`; a name that ends in `_max` is joined by maximum instead.
    """
    whole_weight = batch.weight(rows)  # scalar: response tokens, or pairs for DPO
    per_process = math.ceil(len(rows) / parallel.world())
    n_parts = math.ceil(
        per_process / (micro_batch_size or per_process)
    )  # the same on every process: they meet at the last one
    if len(rows) > 1 and (n_parts > 1 or parallel.world() > 1):
        rows = rows[batch.lengths()[rows].argsort(stable=True)]
    total: dict[str, float] = {}
    for i, part_rows in enumerate(torch.tensor_split(parallel.share(rows), n_parts)):
        weight = (
            batch.weight(part_rows) / whole_weight
        )  # scalar; 0 for a process that has run out of rows and only keeps step
        part = batch.rows(part_rows if len(part_rows) else rows[:1])
        stats = backend.backward(loss_fn, part, weight, last=i == n_parts - 1)
        _join(
            total,
            {
                name: float(value if name.endswith("_max") else value * weight)
                for name, value in stats.items()
            },
        )
    whole: dict[str, float] = {}
    for each in parallel.everybody(total):
        _join(whole, each)
    return whole


def _join(total: dict[str, float], more: dict[str, float]) -> None:
    for name, value in more.items():
        total[name] = (
            max(total.get(name, -math.inf), value)
            if name.endswith("_max")
            else total.get(name, 0.0) + value
        )


def apply_gradients(
    backend: Backend, optimizer: torch.optim.Optimizer, max_grad_norm: float
) -> dict[str, float]:
    """Clip the gradient, step, and forget the gradient. `grad_norm` is the norm BEFORE the clip.

    A gradient that is not finite never reaches weights or optimiser state: the step is skipped and says so
    (`skipped_steps` 1, no `grad_norm`, which would not be a number).
    """
    grad_norm = backend.step(optimizer, max_grad_norm)
    return (
        {"grad_norm": grad_norm, "skipped_steps": 0.0}
        if math.isfinite(grad_norm)
        else {"skipped_steps": 1.0}
    )


def mean_stats(history: list[dict[str, float]]) -> dict[str, float]:
    """The stats of several updates as one: their means over the updates that were not skipped
    (maxima where a name ends in `_max`), and the number of those skipped."""
    taken = [stats for stats in history if not stats["skipped_steps"]] or history
    means = {}
    for name in taken[0]:
        values = [stats[name] for stats in taken]
        means[name] = max(values) if name.endswith("_max") else sum(values) / len(values)
    means["skipped_steps"] = sum(stats["skipped_steps"] for stats in history)
    return means
