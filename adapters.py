"""Low-rank adapters as PEFT saves them: read, written, added to the weights of their base.

A folder of PEFT holds `adapter_config.json` (which base, r, lora_alpha) and, in
`adapter_model.safetensors`, lora_A and lora_B of each adapted layer. Left out on purpose: adapters
of other kinds, and those that are more than W0 + scale B A (dropout is not saved, so it may be).

    python -m pytest -q tests/test_lora.py        # with PEFT installed, both read the same
"""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from cli import listed

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
BEFORE, AFTER = "base_model.model.", ".weight"  # around the name of a tensor there


def read_adapter(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors in a folder of PEFT, by names such as `transformer.h.0.mlp.c_fc.lora_A`."""
    tensors = load_file(folder / ADAPTER_WEIGHTS)
    return {key.removeprefix(BEFORE).removesuffix(AFTER): x for key, x in tensors.items()}


def write_adapter(folder: Path, lm: nn.Module, tensors: dict[str, torch.Tensor], **config) -> None:
    """The inverse, for PEFT. `config` has r and lora_alpha."""
    layers = sorted({name.rsplit(".lora_", 1)[0] for name in tensors})
    is_conv = any(isinstance(module, Conv1D) for module in lm.modules())
    fixed = dict(peft_type="LORA", task_type="CAUSAL_LM", inference_mode=True, lora_dropout=0.0)
    fixed |= dict(bias="none", target_modules=layers, fan_in_fan_out=is_conv)
    config |= dict(base_model_name_or_path=lm.name_or_path or None, **fixed)
    folder.mkdir(exist_ok=True)
    text = json.dumps(config, indent=2) + "\n"
    (folder / ADAPTER_CONFIG).write_text(text, encoding="utf-8")
    named = {f"{BEFORE}{name}{AFTER}": x.detach().cpu() for name, x in tensors.items()}
    save_file(named, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    shutil.copymode(folder / ADAPTER_CONFIG, folder / ADAPTER_WEIGHTS)


@torch.no_grad()
def add_low_rank(layer: nn.Module, a: torch.Tensor, b: torch.Tensor, scale: float) -> None:
    """The weight of a linear layer becomes W0 + scale b a: a (r, in), b (out, r). GPT-2's Conv1D
    holds its weight transposed."""
    update = scale * (b.float() @ a.float())  # (out, in)
    update = update.T if isinstance(layer, Conv1D) else update
    layer.weight = nn.Parameter(layer.weight + update)


def add_adapter_of(lm: nn.Module, config: dict, tensors: dict[str, torch.Tensor]) -> None:
    """Add what PEFT saved to the weights. Raises ValueError for an adapter of another kind."""
    kind, start = config.get("peft_type"), config.get("init_lora_weights", True)
    if kind != "LORA" or start not in (True, False, "gaussian") or config.get("alpha_pattern"):
        raise ValueError(f"peft_type {kind}, init_lora_weights {start}, or alphas of their own")
    layers = {key.rsplit(".lora_", 1)[0] for key in tensors}
    for layer in sorted(layers):
        a = tensors.pop(f"{layer}.lora_A")  # (r, in)
        b = tensors.pop(f"{layer}.lora_B")  # (out, r)
        root = len(a) ** 0.5 if config.get("use_rslora") else len(a)
        module = lm.get_submodule(layer)
        if not isinstance(module, (nn.Linear, Conv1D)):
            raise ValueError(f"{layer} is no linear layer")
        add_low_rank(module, a, b, config["lora_alpha"] / root)
    if tensors:
        raise ValueError(f"it also holds {listed(tensors)}")
