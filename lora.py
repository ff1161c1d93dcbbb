"""Low-rank adapters: two thin matrices are trained beside each frozen one (2106.09685, eq. 3).

    h = W0 x + (alpha / r) B A x           W0 (out, in) is frozen, A (r, in) and B (out, r) are not

Every linear layer in a block of the LM gets one, never the embeddings or `lm_head`. B is zero, so
training starts at the base. A is uniform within 1 / sqrt(in), as PEFT and torch draw a layer: then
A x has the same size in a model of any width, and a learning rate for PEFT is one for here.

The reference of the KL is the same base with a copy of the adapter: no second model in memory. A
saved folder holds the merged model, and `adapter/` for PEFT and for --resume, which reads the base
from --model. Left out on purpose: quantised bases, dropout, a choice of layers, embeddings.

    python train.py --model gpt2 --data examples/my_data.jsonl --reward rouge_l --lora 8 --lr 1e-4
"""

import copy
import math
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from torch.nn.functional import linear
from transformers.pytorch_utils import Conv1D

from adapters import add_low_rank, read_adapter, write_adapter
from engine import UserError, first_line
from hybrid import VALUE_HEAD, HybridModel
from lm import eight_tokens

FOLDER = "adapter"  # in a saved folder
BASE_DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16}


class LoRA(nn.Module):
    """A frozen layer and its adapter. It has no `weight`: code that reads the weight of a layer
    instead of calling it fails, and does not leave the adapter out in silence."""

    def __init__(self, base: nn.Module, rank: int, alpha: float, generator: torch.Generator):
        super().__init__()
        self.base, self.scale, weight = base, alpha / rank, base.weight
        n_out, n_in = weight.T.shape if isinstance(base, Conv1D) else weight.shape
        a = torch.empty(rank, n_in)
        nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=generator)
        self.lora_A = nn.Parameter(a.to(weight.device))
        self.lora_B = nn.Parameter(torch.zeros(n_out, rank, device=weight.device))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (..., in) -> (..., out), in the type of the base; --amp alone rounds A and B."""
        h = self.base(x)
        low_rank = linear(linear(x.to(self.lora_A.dtype), self.lora_A), self.lora_B)
        return (h + self.scale * low_rank).to(h.dtype)


def add_adapter(lm: nn.Module, rank: int, alpha: float, base_dtype="float32", seed: int = 0):
    """Freeze `lm`, and put a LoRA around each linear layer in its blocks, in place.

    Blocks are what lies in an nn.ModuleList of `lm.base_model`. Raises UserError where no linear
    layer is in one.
    """
    lm.requires_grad_(False)
    for parameter in lm.parameters():  # no buffers: rotary frequencies need float32
        parameter.data = parameter.data.to(BASE_DTYPES[base_dtype])
    modules = dict(lm.base_model.named_modules())
    blocks = tuple(f"{name}." for name, m in modules.items() if isinstance(m, nn.ModuleList))
    linears = {n: m for n, m in modules.items() if isinstance(m, (nn.Linear, Conv1D))}
    linears = {name: layer for name, layer in linears.items() if name.startswith(blocks)}
    if not linears:
        raise UserError(f"--lora: {type(lm).__name__} has no linear layer in its blocks")
    generator = torch.Generator().manual_seed(seed)
    for name, layer in linears.items():
        lm.base_model.set_submodule(name, LoRA(layer, rank, alpha, generator))


def is_own(name: str) -> bool:
    """Is this parameter of a LoraModel trained, and not of the base?"""
    return "lora_" in name or name.startswith("value_head.")


class LoraModel(HybridModel):
    """It trains an adapter and the value head. Copies share the frozen base, and `state_dict` is
    without it. Raises UserError for an LM that fails with an adapter."""

    def __init__(self, lm: nn.Module, rank: int, alpha: float, base_dtype="float32", seed=0):
        super().__init__(lm)  # tries the plain model, in float32
        self.rank, self.alpha = rank, alpha
        add_adapter(lm, rank, alpha, base_dtype, seed)
        try:
            self.hidden_states(eight_tokens(lm))
        except (AttributeError, RuntimeError) as problem:
            kind, reason = type(lm).__name__, first_line(problem)
            raise UserError(f"--lora cannot train a {kind} in {base_dtype}: {reason}") from None

    def frozen_copy(self) -> "LoraModel":
        shared = {id(p): p for name, p in self.named_parameters() if not is_own(name)}
        return copy.deepcopy(self, shared).requires_grad_(False).eval()

    def state_dict(self, *args, **options) -> dict:
        whole = super().state_dict(*args, **options)
        return {name: tensor for name, tensor in whole.items() if is_own(name)}

    def load_state_dict(self, state: dict) -> None:
        """Raises RuntimeError for a state that is not that of this adapter."""
        if state.keys() != self.state_dict().keys():
            raise RuntimeError("the adapter is of other layers")
        super().load_state_dict(state, strict=False)

    @torch.no_grad()
    def merged(self) -> HybridModel:
        """A copy without adapters: their product is in the weights, float32, in main memory."""
        plain = {id(p): nn.Parameter(p.float().cpu()) for p in self.parameters()}
        copied = copy.deepcopy(self, plain)
        plain.clear()  # else each weight would stay beside the merged one
        for name, layer in list(copied.lm.named_modules()):
            if isinstance(layer, LoRA):
                add_low_rank(layer.base, layer.lora_A, layer.lora_B, layer.scale)
                copied.lm.set_submodule(name, layer.base)
        return copied

    def save(self, folder: str | Path, tokenizer) -> None:
        """The merged model like any other, and in `adapter/` what PEFT would save."""
        HybridModel.save(self.merged(), folder, tokenizer)
        weights = {name: p for name, p in self.lm.named_parameters() if is_own(name)}
        write_adapter(Path(folder) / FOLDER, self.lm, weights, r=self.rank, lora_alpha=self.alpha)

    def load_own(self, checkpoint: Path) -> None:
        """Adapter and value head as saved. Raises UserError where they do not fit this base."""
        try:
            state = {f"lm.{n}": tensor for n, tensor in read_adapter(checkpoint / FOLDER).items()}
            state |= {f"value_head.{n}": x for n, x in load_file(checkpoint / VALUE_HEAD).items()}
            self.load_state_dict(state)
        except (OSError, SafetensorError, RuntimeError) as problem:
            why = f"does not fit its base, --model ({first_line(problem)}); give that back"
            raise UserError(f"--resume: the adapter in {checkpoint} {why}") from None


def check_flags(args) -> None:
    """Fill in --lora-alpha. Raises UserError for what does not go with --lora, or needs it."""
    if args.lora is None:
        if args.lora_alpha is not None or args.base_dtype != "float32":
            raise UserError("--lora-alpha and --base-dtype are for --lora; leave them out")
        return
    args.lora_alpha = args.lora_alpha or 2.0 * args.lora
    if args.deepspeed:
        raise UserError("--lora leaves --deepspeed little to split; leave one of the two out")
    if args.amp == "fp16" and args.base_dtype == "bf16":
        raise UserError("--amp fp16 does not go with --base-dtype bf16; give --amp bf16 or no")
    if args.ref_ema and args.ref_model:
        raise UserError("--ref-ema with --lora averages two adapters; leave --ref-model out")
