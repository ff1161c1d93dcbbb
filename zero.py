"""DeepSpeed's ZeRO-1 and ZeRO-2 behind the face of `engine.Backend`: optimiser state, and with stage 2 gradients too, are split over
the processes (Rajbhandari et al. 1910.02054). DeepSpeed is an optional package; its configuration is the user's, but for what is ours to say.

    echo '{"zero_optimization": {"stage": 2}}' > zero.json
    torchrun --nproc_per_node=2 train.py --deepspeed zero.json

Left out on purpose: ZeRO-3. It splits the weights themselves, so every sampled token would gather the whole model from all processes, and
all would have to sample in step, response length by response length. A checkpoint is as one process would write it, and can be resumed by any number of them, with or without DeepSpeed.
"""

import json
import math
import os
from pathlib import Path

import torch

import parallel
from engine import UserError

OURS = (
    "optimizer",
    "scheduler",
    "gradient_clipping",
    "gradient_accumulation_steps",
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "fp16",
    "bf16",
)


def read_zero_config(path: str, max_grad_norm: float) -> dict:
    """The user's JSON, with what train.py's own flags say. Raises UserError for what cannot be, with the flag to use instead."""
    try:
        config = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as problem:
        raise UserError(f"--deepspeed {path} is no JSON file: {problem}") from None
    section = config.get("zero_optimization") if isinstance(config, dict) else None
    stage = section.get("stage") if isinstance(section, dict) else None
    if stage == 3:
        raise UserError(
            f"--deepspeed {path}: ZeRO-3 splits the weights, and sampling would gather all of them for every token; use stage 1 or 2"
        )
    if stage not in (1, 2):
        raise UserError(
            f'--deepspeed {path}: expected {{"zero_optimization": {{"stage": 1}}}} or 2, found stage {stage!r}'
        )
    for name in OURS:
        if name in config:
            raise UserError(
                f"--deepspeed {path}: {name} is said by train.py's flags (--optimizer, --scheduler, --max-grad-norm, --batch-size, --amp); leave it out"
            )
    mine = dict(
        train_micro_batch_size_per_gpu=1,
        gradient_accumulation_steps=1,
        managed_gradient_accumulation=False,
        gradient_clipping=max_grad_norm,
    )
    # The optimiser is torch's own, so that DeepSpeed and one process compute alike.
    return {
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        **config,
        **mine,
    }


class ZeroBackend:
    """The same two calls as Backend, and the optimiser's state as if it had never been split."""

    def __init__(
        self,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        path: str,
        max_grad_norm: float,
        amp: str,
    ):
        config = read_zero_config(path, max_grad_norm)
        if not isinstance(optimizer, (torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD)):
            raise UserError(
                "--deepspeed flattens the weights, so it goes with --optimizer adamw, adam or sgd only"
            )
        if amp == "fp16":
            raise UserError(
                "--deepspeed goes with --amp bf16 or no; float16's loss scaling is not wired to it"
            )
        if parallel.world() == 1:
            raise UserError(
                "--deepspeed splits things over processes: start with torchrun --nproc_per_node=2 train.py ... (or more)"
            )
        if next(model.parameters()).device.type == "cpu":
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
        try:
            import deepspeed
        except ImportError:
            raise UserError(
                "--deepspeed needs the package deepspeed: pip install deepspeed"
            ) from None
        deepspeed.utils.logger.setLevel("WARNING")
        # Two groups, so that an SFT step, which does not reach the value head, can leave it and its moments as they are.
        head = {id(p) for p in model.value_head.parameters()}
        [group] = optimizer.param_groups
        everything, group["params"] = (
            group["params"],
            [p for p in group["params"] if id(p) not in head],
        )
        optimizer.add_param_group({**group, "params": [p for p in everything if id(p) in head]})
        self.plain_order = everything  # the order of a plain optimiser's state_dict
        self.groups = [list(g["params"]) for g in optimizer.param_groups]
        self.head_was_reached = False
        model.value_head.weight.register_hook(self._reached)
        optimizer.register_step_pre_hook(self._spare_the_head)
        self.model = model
        try:
            self.engine, self.zero, *_ = deepspeed.initialize(
                model=model, optimizer=optimizer, config=config, dist_init_required=False
            )
        except (
            ValueError,
            TypeError,
            KeyError,
            AssertionError,
        ) as problem:  # so DeepSpeed says what it does not like in a configuration
            raise UserError(
                f"--deepspeed {path} is refused by DeepSpeed: {' '.join(str(problem).split())[:300]}"
            ) from None
        self.optimizer = optimizer

    def _reached(self, gradient: torch.Tensor) -> None:
        self.head_was_reached = True

    def _spare_the_head(self, optimizer: torch.optim.Optimizer, args, kwargs) -> None:
        if not self.head_was_reached:
            for part in self.zero.single_partition_of_fp32_groups[1:]:
                part.grad = (
                    None  # DeepSpeed has put zeros there; with None, torch's optimiser passes it by
                )

    def backward(self, loss_fn, part, weight: torch.Tensor, last: bool) -> dict[str, torch.Tensor]:
        """As Backend.backward; `last` is not asked, DeepSpeed knows in `step` that the gradient is complete."""
        loss, stats = loss_fn(part)
        self.engine.backward(loss * weight * parallel.world())  # DeepSpeed divides by that number
        return stats

    def step(self, optimizer: torch.optim.Optimizer, max_grad_norm: float) -> float:
        """As Backend.step; NaN for a step that was skipped."""
        self.engine.step()  # clips at `gradient_clipping`, and skips what is not finite
        self.head_was_reached = False
        return math.nan if self.zero.overflow else float(self.engine.get_global_grad_norm())

    # -------------------------------------------------------------------------------------------- checkpoints

    def state_dict(self) -> dict:
        """What torch's optimiser would say in one process. All processes must call it: each brings its part."""
        names = [
            key
            for key in self.optimizer.state[self.zero.single_partition_of_fp32_groups[0]]
            if key != "step"
        ]
        state: dict[int, dict] = {}
        for group, part in zip(self.groups, self.zero.single_partition_of_fp32_groups):
            mine = self.optimizer.state[part]
            whole = {
                name: torch.cat(parallel.everybody(mine[name].cpu()))
                for name in names
                if name in mine
            }
            at = 0
            for parameter in group:
                entry = {
                    name: flat[at : at + parameter.numel()].view(parameter.shape).clone()
                    for name, flat in whole.items()
                }
                state[self._number(parameter)] = entry | (
                    {"step": mine["step"].cpu().clone()} if "step" in mine else {}
                )
                at += parameter.numel()
        group = {
            name: value
            for name, value in self.optimizer.param_groups[0].items()
            if name != "params"
        }
        return {
            "state": state,
            "param_groups": [{**group, "params": list(range(len(self.plain_order)))}],
        }

    def load_state_dict(self, saved: dict) -> None:
        """The inverse; the weights must be in the model already."""
        self.zero.refresh_fp32_params()
        for group, part in zip(self.groups, self.zero.single_partition_of_fp32_groups):
            entries = [saved["state"].get(self._number(parameter)) for parameter in group]
            if not all(entries):  # a parameter that was never stepped has none
                continue
            state = self.optimizer.state[part]
            for name, value in entries[0].items():
                if name == "step":
                    state["step"] = value.to(part.device)
                    continue
                flat = torch.cat([entry[name].flatten() for entry in entries])
                flat = torch.nn.functional.pad(
                    flat, (0, part.numel() * parallel.world() - flat.numel())
                )
                state[name] = flat.view(parallel.world(), -1)[parallel.rank()].to(part.device)
        for group in self.optimizer.param_groups:
            group.update(
                {
                    name: value
                    for name, value in saved["param_groups"][0].items()
                    if name != "params"
                }
            )

    def _number(self, parameter: torch.Tensor) -> int:
        return next(i for i, p in enumerate(self.plain_order) if p is parameter)
