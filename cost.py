"""What fits: the memory that training takes on each device, estimated from sizes alone, before anything is loaded or rented.

    python train.py --model gpt2 --batch-size 64 --amp bf16 --dry-run      # for a run of yours, on 1 to 8 devices; then exits
    python cost.py                                                         # three model sizes, the table of the README

With P parameters, L layers of width W, vocabulary V, and T tokens in the rows that pass through the model together (bytes):

    weights      4 P            float32, under --amp too
    reference    4 P            each frozen copy; pure SFT has none
    gradients    4 P            ZeRO-2: 4 P / devices
    Adam         8 P            two moments; ZeRO-1 and ZeRO-2: (8 P + 4 P for their float32 copy of the weights) / devices
    buckets      4 P            several devices under DDP: where gradients meet (ZeRO: 4 bytes x 5e8 at most)
    bf16 copies  2 P            with --amp: autocast's low-precision weights during a forward and backward
    activations  85 L W T       kept for the backward pass; 58 L W T with --amp; 4 L W T (2 with --amp) with --gradient-checkpointing, plus one layer's
    logits       12 V c         c = min(response tokens, 1024): logits, log-softmax and their gradient, a chunk at a time
    cache        8 L W S        keys and values while sampling S tokens, the whole share of the batch (4 with --amp); W counts key-value heads. Not at the same time as activations

85 and 58 were counted on a Llama block (saved tensors, bytes per token, layer and width); GPT-2's takes 65 and 37. Left out on purpose: what the
CUDA context, the allocator's gaps and a judge take; add 10 to 20 %.
"""

import math
from typing import Callable, NamedTuple

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from engine import UserError, first_line
from lm import TINY_LM

GIB = 2**30


class Sizes(NamedTuple):
    """What the formula asks of a model; widths in elements of one token's hidden state, and of its keys in one layer."""

    parameters: float
    layers: int
    width: int
    kv_width: int
    vocab: int


TINY = Sizes(
    1.0e6,
    TINY_LM["num_hidden_layers"],
    TINY_LM["hidden_size"],
    TINY_LM["hidden_size"],
    TINY_LM["vocab_size"],
)  # --model tiny
# GPT-2 small and XL; Llama 2 7B
KNOWN = {
    "124 M": Sizes(124e6, 12, 768, 768, 50257),
    "1.5 B": Sizes(1.56e9, 48, 1600, 1600, 50257),
    "7 B": Sizes(6.74e9, 32, 4096, 4096, 32000),
}


def sizes_of(name: str) -> Sizes:
    """From a folder's or hub id's config alone. Raises UserError where there is none, or not of a causal LM."""
    try:
        config = AutoConfig.from_pretrained(name)
        with torch.device("meta"):  # shapes without memory
            lm = AutoModelForCausalLM.from_config(config)
        text = config.get_text_config()
        heads = text.num_attention_heads
        kv = getattr(text, "num_key_value_heads", None) or heads
        head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    except (OSError, ValueError, AttributeError, ArithmeticError) as problem:
        raise UserError(
            f"--model {name} has no config that can be read: {first_line(problem)}"
        ) from None
    return Sizes(
        sum(p.numel() for p in lm.parameters()),
        text.num_hidden_layers,
        text.hidden_size,
        kv * head_dim,
        text.vocab_size,
    )


def memory(
    sizes: Sizes, *, rows: int, sampled: int, length: int, response: int, devices: int = 1, zero: int = 0, amp: bool = False,
    checkpointing: bool = False, references: int = 1,
) -> dict[str, float]:  # fmt: skip
    """Bytes on each device, by what they hold, by the formula above; "peak" is the sum of what is there at the same time.

    `rows` of `length` tokens, `response` of them the model's own, pass through the model together (--micro-batch-size, --max-length, --max-new-tokens);
    `sampled` rows are sampled together, the whole share of the device.
    """
    p, layers, width, tokens = sizes.parameters, sizes.layers, sizes.width, rows * length
    split = devices if zero else 1
    per_layer = (58 if amp else 85) * width * tokens
    held = {
        "weights": 4 * p,
        "reference": 4 * p * references,
        "gradients": 4 * p / (devices if zero == 2 else 1),
        "Adam": (8 + 4 * bool(zero)) * p / split,
        "buckets": 0 if devices == 1 else min(4 * p, 4 * 5e8) if zero else 4 * p,
        "bf16 copies": 2 * p * amp,
        "activations": (2 if amp else 4) * layers * width * tokens + per_layer
        if checkpointing
        else layers * per_layer,
        "logits": 12 * sizes.vocab * min(rows * response, 1024),
        "cache": (4 if amp else 8) * layers * sizes.kv_width * sampled * length,
    }
    held["peak"] = sum(held.values()) - min(held["activations"] + held["logits"], held["cache"])
    return held


def table(sizes: Sizes, rows: Callable[[int], tuple[int, int]], **options) -> str:
    """The estimate for 1, 2, 4 and 8 devices, DDP beside ZeRO-2, in GiB. `rows`: `rows` and `sampled` of `memory`, for that many devices."""
    held = memory(sizes, **dict(zip(("rows", "sampled"), rows(1))), **options)
    lines = [
        f"{sizes.parameters / 1e6:,.1f} M parameters; one device, GiB: "
        + ", ".join(f"{name} {size / GIB:.3g}" for name, size in held.items())
    ]
    for devices in (2, 4, 8):
        together, sampled = rows(devices)
        ddp, zero = (
            memory(sizes, rows=together, sampled=sampled, devices=devices, zero=stage, **options)[
                "peak"
            ]
            / GIB
            for stage in (0, 2)
        )
        lines.append(
            f"{devices} devices, {together} rows at a time on each: {ddp:.3g} GiB under DDP, {zero:.3g} GiB under ZeRO-2"
        )
    return "\n".join(lines)


def print_estimate(args, samples: bool) -> None:
    """--dry-run: what a run would take, from the model's config alone. `samples`: does it sample?"""
    sizes = TINY if args.model == "tiny" else sizes_of(args.model)
    if args.optimizer != "adamw":
        print(f"--optimizer {args.optimizer} is counted like adamw")
    length = args.max_length or 256
    has_rl = args.ppo_ratio != 0
    samples = samples and has_rl
    # a demonstration or a preference may fill its row
    response = args.max_new_tokens if samples and args.ppo_ratio == 1 else length
    references = max(1, len(args.ref_model or [])) if has_rl else 0
    options = dict(
        length=length, response=response, amp=args.amp != "no",
        checkpointing=args.gradient_checkpointing, references=references,
    )  # fmt: skip

    def rows(devices: int) -> tuple[int, int]:  # in the model together, and sampled together
        share = math.ceil(args.batch_size / devices)
        together = args.micro_batch_size or math.ceil(share / (args.grad_accum or 1))
        rows_each = 2 if has_rl and not samples else 1  # a preference is two rows
        return min(share, together) * rows_each, share if samples else 0

    sampled = f", {args.max_new_tokens} of them sampled" if samples else ""
    print(f"rows of {length} tokens{sampled}; the formula is in cost.py")
    print(table(sizes, rows, **options))


def readme_table() -> str:
    """Peak GiB per device: bf16, gradient checkpointing, 8 rows of 1,024 tokens, 256 of them sampled."""
    options = dict(rows=8, sampled=8, length=1024, response=256, amp=True, checkpointing=True)
    lines = ["| model | one device | 8 devices, DDP | 8 devices, ZeRO-2 |", "|---|---|---|---|"]
    for name, sizes in KNOWN.items():
        peaks = [
            memory(sizes, devices=devices, zero=zero, **options)["peak"] / GIB
            for devices, zero in ((1, 0), (8, 0), (8, 2))
        ]
        lines.append(f"| {name} | " + " | ".join(f"{peak:.1f}" for peak in peaks) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(readme_table())
