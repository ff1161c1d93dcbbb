"""Does it fit? The memory of training on each device, from sizes alone, before anything is loaded.

    python train.py --model gpt2 --batch-size 64 --amp bf16 --dry-run   # your run, 1 to 8 devices

With P parameters, L layers of width W, vocabulary V, and T tokens in the rows that pass through the
model together, in bytes:

    weights      4 P      float32, under --amp too
    reference    4 P      each frozen copy; pure SFT has none
    gradients    4 P      ZeRO-2: 4 P / devices
    Adam         8 P      two moments; ZeRO-1 and ZeRO-2 add a float32 copy of the weights and split
                          it all: 12 P / devices
    buckets      4 P      several devices: where DDP sums gradients (ZeRO: 4 x 5e8 bytes at most)
    bf16 copies  2 P      with --amp: autocast's low-precision weights while a model computes
    activations  85 L W T kept for the backward pass; 58 L W T with --amp; with
                          --gradient-checkpointing 4 L W T (2 with --amp) and those of one layer
    logits       12 V c   c = min(response tokens, 1024): logits, log-softmax and their gradient
    cache        8 L W S  keys and values while S tokens are sampled, the whole share of the batch
                          (4 with --amp); W counts key-value heads. Never held with activations.

85 and 58 were counted on a Llama block (saved tensors, bytes per token, layer and width); GPT-2's
takes 65 and 37. Left out on purpose: the CUDA context, gaps of the allocator, a judge; add 10 to
20 %.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from transformers import AutoConfig, AutoModelForCausalLM

import survey
from engine import UserError, first_line
from flags import limits_of
from hybrid import TINY_LM, build_tiny
from lm import context_in, load_tokenizer
from plan import disk_line
from prepare import Data, load_data, resolve_defaults
from runs import Algorithm

GIB = 2**30


class Sizes(NamedTuple):
    """Sizes of a model. Widths count the elements of a token's hidden state, and of its keys."""

    parameters: float
    layers: int
    width: int
    kv_width: int
    vocab: int
    context: int = 10**9  # tokens that it can look at together


TINY_WIDTH = TINY_LM["hidden_size"]
TINY = Sizes(
    1e6,
    TINY_LM["num_hidden_layers"],
    TINY_WIDTH,
    TINY_WIDTH,
    TINY_LM["vocab_size"],
    TINY_LM["max_position_embeddings"],
)


def sizes_of(name: str) -> Sizes:
    """From the config of a folder or hub id. Raises UserError unless it is that of a causal LM."""
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
    parameters = sum(p.numel() for p in lm.parameters())
    layers, width = text.num_hidden_layers, text.hidden_size
    return Sizes(parameters, layers, width, kv * head_dim, text.vocab_size, context_in(config))


def memory(
    sizes: Sizes,
    *,
    rows: int,
    sampled: int,
    length: int,
    response: int,
    devices: int = 1,
    zero: int = 0,
    amp: bool = False,
    checkpointing: bool = False,
    references: int = 1,
) -> dict[str, float]:
    """Bytes on each device, by the formula above; "peak" adds what is held at the same time.

    `rows` of `length` tokens pass through the model together, `response` tokens of each are the
    model's own (--micro-batch-size, --max-length, --max-new-tokens). `sampled` rows are sampled
    together: the whole share of the device. `zero`: the stage of ZeRO, 0 is DDP.
    """
    p, layers, width, tokens = sizes.parameters, sizes.layers, sizes.width, rows * length
    adam, buckets = 8 * p, 4 * p
    if zero:
        adam, buckets = 12 * p / devices, min(4 * p, 4 * 5e8)
    if devices == 1:
        buckets = 0
    layer_bytes = (58 if amp else 85) * width * tokens
    activations = layers * layer_bytes
    if checkpointing:
        activations = (2 if amp else 4) * layers * width * tokens + layer_bytes
    held = {
        "weights": 4 * p,
        "reference": 4 * p * references,
        "gradients": 4 * p / (devices if zero == 2 else 1),
        "Adam": adam,
        "buckets": buckets,
        "bf16 copies": 2 * p if amp else 0,
        "activations": activations,
        "logits": 12 * sizes.vocab * min(rows * response, 1024),
        "cache": (4 if amp else 8) * layers * sizes.kv_width * sampled * length,
    }
    held["peak"] = sum(held.values()) - min(held["activations"] + held["logits"], held["cache"])
    return held


def table(sizes: Sizes, rows: Callable[[int], tuple[int, int]], **options) -> str:
    """The estimate for 1, 2, 4 and 8 devices, DDP beside ZeRO-2, in GiB.

    `rows(devices)` gives `rows` and `sampled` of `memory`; `options` are its other arguments.
    """
    together, sampled = rows(1)
    held = memory(sizes, rows=together, sampled=sampled, **options)
    items = ", ".join(f"{name} {size / GIB:.3g}" for name, size in held.items())
    lines = [f"{sizes.parameters / 1e6:,.1f} M parameters; one device, GiB: {items}"]
    for devices in (2, 4, 8):
        together, sampled = rows(devices)
        options |= dict(rows=together, sampled=sampled, devices=devices)
        ddp = memory(sizes, zero=0, **options)["peak"] / GIB
        zero = memory(sizes, zero=2, **options)["peak"] / GIB
        lines.append(
            f"{devices} devices, {together} rows at a time on each: "
            f"{ddp:.3g} GiB under DDP, {zero:.3g} GiB under ZeRO-2"
        )
    return "\n".join(lines)


def print_estimate(args, algorithm: Algorithm) -> None:
    """--dry-run: what a run would take, by the config of its model and the rows of its data."""
    sizes = TINY if args.model == "tiny" else sizes_of(args.model)
    if args.optimizer != "adamw":
        print(f"--optimizer {args.optimizer} is counted like adamw")
    data = load_data(args, algorithm)
    micro_batch_size = args.micro_batch_size  # as given: below it depends on the devices
    resolve_defaults(args, algorithm, sizes.context)
    prompt, answer = longest_row(args, data)
    has_rl = args.ppo_ratio != 0
    samples = algorithm.samples and has_rl
    trains_answers = not samples or args.ppo_ratio != 1  # demonstrations or preferences
    response = max(args.max_new_tokens if samples else 1, answer if trains_answers else 1)
    length = min(prompt + response, args.max_length)
    references = max(1, len(args.ref_model or [])) if has_rl else 0
    options = dict(
        length=length, response=response, amp=args.amp != "no",
        checkpointing=args.gradient_checkpointing, references=references,
    )  # fmt: skip

    def rows(devices: int) -> tuple[int, int]:  # in the model together, and sampled together
        share = math.ceil(args.batch_size / devices)
        together = micro_batch_size or math.ceil(share / (args.grad_accum or 1))
        rows_each = 2 if has_rl and not samples else 1  # a preference is two rows
        return min(share, together) * rows_each, share if samples else 0

    sampled = f", {args.max_new_tokens} of them sampled" if samples else ""
    print(f"rows of {length} tokens at most{sampled}; the formula is in cost.py")
    print(table(sizes, rows, **options))
    print(disk_line(args, sizes.parameters))


def longest_row(args, data: Data) -> tuple[int, int]:
    """Print what is cut and how long rows are. -> tokens of the longest prompt, longest answer."""
    if args.model == "tiny":
        texts = [example.prompt + example.target for example in data.train]
        tokenizer = build_tiny(texts, args.seed)[1]
    else:
        tokenizer = load_tokenizer(args.model, "--model")
    limits = limits_of(args)
    lengths = survey.lengths_of(tokenizer, survey.writable(tokenizer, data.train, False, print))
    for pair in survey.spread(data.pairs):
        lengths += survey.lengths_of(tokenizer, list(pair.sides()))
    survey.say_cuts(lengths, **limits, say=print)
    prompts = [min(prompt, limits["max_prompt_length"]) for prompt, _ in lengths]
    answers = []
    for prompt, (_, answer) in zip(prompts, lengths):
        answers.append(min(answer, args.max_length - prompt))
    totals = sorted(prompt + answer for prompt, answer in zip(prompts, answers))
    print(
        f"{len(totals)} rows of the data counted: half have at most {totals[len(totals) // 2]} "
        f"tokens, the longest {totals[-1]}"
    )
    return max(prompts), max(answers)
