"""DeepSpeed's ZeRO-1 and ZeRO-2 with the methods of `engine.Backend` (Rajbhandari, 1910.02054).

The optimiser state, and with stage 2 the gradients too, are split over the processes. DeepSpeed is
an optional package. The user configures it, except for what flags of train.py set.

    torchrun --nproc_per_node=2 train.py --deepspeed examples/zero.json

A checkpoint is as one process would write it. Any number of processes can resume it, with or
without DeepSpeed. Left out on purpose: ZeRO-3. It splits the weights: every sampled token would
gather the whole model from all processes, and all would have to sample equally many tokens.
"""

import json
import math
import os
from pathlib import Path

import torch

import parallel
from engine import UserError

SET_BY_FLAGS = ("optimizer", "scheduler", "gradient_clipping", "gradient_accumulation_steps")
SET_BY_FLAGS += ("train_batch_size", "train_micro_batch_size_per_gpu", "fp16", "bf16")


def read_zero_config(path: str, max_grad_norm: float) -> dict:
    """The user's JSON with what train.py's flags say. Raises UserError for what cannot be used."""
    try:
        config = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as problem:
        raise UserError(f"--deepspeed {path} is no JSON file: {problem}") from None
    section = config.get("zero_optimization") if isinstance(config, dict) else None
    stage = section.get("stage") if isinstance(section, dict) else None
    if stage == 3:
        raise UserError(
            f"--deepspeed {path}: ZeRO-3 splits the weights, and sampling would gather all of them "
            "for every token; use stage 1 or 2"
        )
    if stage not in (1, 2):
        raise UserError(
            f'--deepspeed {path}: expected {{"zero_optimization": {{"stage": 1}}}} or 2, '
            f"found stage {stage!r}"
        )
    for name in SET_BY_FLAGS:
        if name in config:
            raise UserError(
                f"--deepspeed {path}: {name} is set by train.py's flags (--optimizer, "
                "--scheduler, --max-grad-norm, --batch-size, --amp); leave it out"
            )
    return {
        # The optimiser is torch's own, so that DeepSpeed and one process compute the same.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        **config,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": max_grad_norm,
    }


def check_combination(optimizer: torch.optim.Optimizer, amp: str) -> None:
    """Raises UserError for what does not go with --deepspeed."""
    if not isinstance(optimizer, (torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD)):
        raise UserError(
            "--deepspeed flattens the weights, so it goes with --optimizer adamw, adam or sgd only"
        )
    if amp == "fp16":
        raise UserError(
            "--deepspeed goes with --amp bf16 or no; it does not use the loss scaling of float16"
        )
    if parallel.world() == 1:
        raise UserError(
            "--deepspeed splits the optimiser over processes: start with "
            "torchrun --nproc_per_node=2 train.py ... (or more)"
        )


def import_deepspeed(device: torch.device):
    """The package, with fewer messages. Raises UserError where it is not installed."""
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    try:
        import deepspeed
    except ImportError:
        raise UserError("--deepspeed needs the package deepspeed: pip install deepspeed") from None
    deepspeed.utils.logger.setLevel("WARNING")
    return deepspeed


class ZeroBackend:
    """The methods of Backend, and the state of the optimiser as if it were not split."""

    def __init__(
        self,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        path: str,
        max_grad_norm: float,
        amp: str,
    ):
        config = read_zero_config(path, max_grad_norm)
        check_combination(optimizer, amp)
        deepspeed = import_deepspeed(next(model.parameters()).device)
        # Two groups. An SFT update does not reach the value head: the second group, with its
        # moments, must then stay as it is.
        head = {id(p) for p in model.value_head.parameters()}
        [group] = optimizer.param_groups
        self.plain_order = group["params"]  # the order in the state_dict of a plain optimiser
        group["params"] = [p for p in self.plain_order if id(p) not in head]
        in_head = [p for p in self.plain_order if id(p) in head]
        optimizer.add_param_group({**group, "params": in_head})
        self.groups = [list(g["params"]) for g in optimizer.param_groups]
        self.head_was_reached = False
        model.value_head.weight.register_hook(self._reached)
        optimizer.register_step_pre_hook(self._skip_the_head)
        self.model, self.optimizer = model, optimizer
        try:
            self.engine, self.zero, *_ = deepspeed.initialize(
                model=model, optimizer=optimizer, config=config, dist_init_required=False
            )
        # DeepSpeed raises one of these for a configuration that it refuses.
        except (ValueError, TypeError, KeyError, AssertionError) as problem:
            message = " ".join(str(problem).split())[:300]
            raise UserError(f"--deepspeed {path} is refused by DeepSpeed: {message}") from None

    def _reached(self, gradient: torch.Tensor) -> None:
        self.head_was_reached = True

    def _skip_the_head(self, optimizer: torch.optim.Optimizer, args, kwargs) -> None:
        if not self.head_was_reached:
            for flat in self.zero.single_partition_of_fp32_groups[1:]:
                # DeepSpeed has set it to 0. With None, torch's optimiser skips these weights.
                flat.grad = None

    def backward(
        self, loss_fn, micro_batch, weight: torch.Tensor, last: bool
    ) -> dict[str, torch.Tensor]:
        """As Backend.backward. `last` is not used: `step` says when the gradient is complete."""
        loss, stats = loss_fn(micro_batch)
        self.engine.backward(loss * weight * parallel.world())  # DeepSpeed divides by that number
        return stats

    def step(self, optimizer: torch.optim.Optimizer, max_grad_norm: float) -> float:
        """As Backend.step; NaN for an update that was skipped."""
        self.engine.step()  # clips at `gradient_clipping`, skips a gradient that is not finite
        self.head_was_reached = False
        return math.nan if self.zero.overflow else float(self.engine.get_global_grad_norm())

    def state_dict(self) -> dict:
        """What torch's optimiser would return in one process. Every process must call it."""
        flats = self.zero.single_partition_of_fp32_groups  # this process's share of each group
        names = [name for name in self.optimizer.state[flats[0]] if name != "step"]
        state: dict[int, dict] = {}
        for group, flat in zip(self.groups, flats):
            own = self.optimizer.state[flat]
            whole = {n: torch.cat(parallel.everybody(own[n].cpu())) for n in names if n in own}
            start = 0
            for parameter in group:
                end = start + parameter.numel()
                entry = {n: x[start:end].view(parameter.shape).clone() for n, x in whole.items()}
                if "step" in own:
                    entry["step"] = own["step"].cpu().clone()
                state[self._number(parameter)] = entry
                start = end
        options = _without_params(self.optimizer.param_groups[0])
        numbers = list(range(len(self.plain_order)))
        return {"state": state, "param_groups": [{**options, "params": numbers}]}

    def load_state_dict(self, saved: dict) -> None:
        """The inverse; the weights must be in the model already."""
        self.zero.refresh_fp32_params()
        for group, flat in zip(self.groups, self.zero.single_partition_of_fp32_groups):
            entries = [saved["state"].get(self._number(parameter)) for parameter in group]
            if not all(entries):  # a parameter that was never updated has none
                continue
            state = self.optimizer.state[flat]
            for name, value in entries[0].items():
                if name == "step":
                    state["step"] = value.to(flat.device)
                    continue
                whole = torch.cat([entry[name].flatten() for entry in entries])
                padding = flat.numel() * parallel.world() - whole.numel()
                whole = torch.nn.functional.pad(whole, (0, padding))
                shares = whole.view(parallel.world(), -1)
                state[name] = shares[parallel.rank()].to(flat.device)
        for group in self.optimizer.param_groups:
            group.update(_without_params(saved["param_groups"][0]))

    def _number(self, parameter: torch.Tensor) -> int:
        return next(i for i, p in enumerate(self.plain_order) if p is parameter)


def _without_params(group: dict) -> dict:
    return {name: value for name, value in group.items() if name != "params"}
