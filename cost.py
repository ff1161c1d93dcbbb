"""Does it fit? The memory of training on each device, from sizes alone, before anything is loaded.

    python train.py --model gpt2 --batch-size 64 --amp bf16 --dry-run   # your run, 1 to 8 devices

With P parameters, L layers of width W, vocabulary V, and T tokens in the rows that pass through the
model together, in bytes:

    program      what this process holds now: Python, torch, transformers, the data. The CPU alone,
                 and Linux alone, where a process can read it
    weights      4 P      float32, under --amp too
    reference    4 P      each frozen copy; pure SFT has none; a teacher has a P of its own
    Adam         8 P      two moments; ZeRO-1 and ZeRO-2 add a float32 copy of the weights and split
                          it all: 12 P / devices
    buckets      4 P      several devices: where DDP sums gradients (ZeRO: 4 x 5e8 bytes at most)
    bf16 copies  2 P      with --amp: autocast's low-precision weights while a model computes
    gradients    4 P      ZeRO-2: 4 P / devices
    activations  k T      kept for the backward pass; k is counted (activations.py), about 85 L W;
                          with --gradient-checkpointing 4 L W T (2 with --amp) and one layer's
    logits       12 V c   c = min(response tokens, 1024): logits, log-softmax and their gradient;
                          or, after them, the gradient of the head beside 4 V c. With a teacher,
                          which says something of every token, 20 V c
    cache        8 L W S  keys and values while S tokens are sampled, the whole share of the batch
                          (4 with --amp); W counts key-value heads
    holes                 half of the small activations, or of the cache. Where `program` is counted

With --lora t of the P parameters are trained: weights 4 t + 4 (P - t), or 2 (P - t) with a base in
bfloat16; Adam, gradients and buckets are of t; a reference is a copy of the adapter, 4 t; autocast
copies what is not in bfloat16; the head has no gradient. On the CPU a copy with the adapter merged
into its weights, 4 P, is held while a folder is saved ("merged"; with a GPU it is in main memory).
A base in bfloat16 adds 4 V W: the largest tensor is copied once more as it is written, and a base
in float32 needs no second copy of it.

Not all are held at once. The backward pass frees activations as it makes gradients, so an update
holds the larger of the two, unless it has several micro-batches: then the gradients of the first
are there when the second begins. The cache is never held with activations.

Holes: glibc takes a block of less than 32 MiB from one heap, and rows of another length need blocks
of another size. In such a heap there is one free block for two that are in use (Knuth, The Art of
Computer Programming 1, 2.5: the fifty-percent rule). Larger blocks go back to the system.

Rows are those of the data: batches are drawn as a run draws them, and short rows share one row of
the model (lm.py). Left out on purpose: the CUDA context and the gaps of its allocator (add 10 to
20 %), a judge, the code of DeepSpeed.
"""

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from transformers import AutoConfig

import lora
import survey
from activations import LLAMA, LLAMA_AMP, FakeModel
from data import BatchStream
from engine import AMP_DTYPES, UserError, first_line, pick_device, trained
from flags import limits_of
from hybrid import LOGIT_CHUNK, build_tiny
from lm import accepts, context_in, load_tokenizer, pack
from plan import data_line, disk_line, size_of
from prepare import Data, load_data, resolve_defaults
from runs import Algorithm

GIB = 2**30
FROM_HEAP = 32 * 2**20  # glibc never takes a larger block from its heap (mallopt(3))
DRAWN = 2000  # rows that are drawn to find a large batch


class Sizes(NamedTuple):
    """Sizes of a model. Widths count the elements of a token's hidden state, and of its keys."""

    parameters: float
    layers: int
    width: int
    kv_width: int
    vocab: int
    context: int = 10**9  # tokens that it can look at together


class Rows(NamedTuple):
    """The largest micro-batch of one kind of step, on one device."""

    columns: int  # tokens that pass through the model together, padding included
    answers: int  # tokens of them that reach the head
    in_parts: bool = False  # does an update have several micro-batches?
    sampled: int = 0  # tokens that the cache holds at the end of sampling


def sizes_of(name: str) -> Sizes:
    """From the config of a folder or hub id. Raises UserError unless it is that of a causal LM."""
    return model_of(name)[0]


def model_of(name: str, config=None, flag: str = "--model") -> tuple[Sizes, FakeModel]:
    """Sizes, and the model without its weights. `config` is that of a model that is in no folder.

    Raises UserError unless it is that of a causal LM.
    """
    try:
        config = config or AutoConfig.from_pretrained(name)
        model = FakeModel(config)
        text = config.get_text_config()
        heads = text.num_attention_heads
        kv = getattr(text, "num_key_value_heads", None) or heads
        head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    except (OSError, ValueError, AttributeError, ArithmeticError) as problem:
        raise UserError(
            f"{flag} {name} has no config that can be read: {first_line(problem)}"
        ) from None
    layers, width, context = text.num_hidden_layers, text.hidden_size, context_in(config)
    sizes = Sizes(model.parameters(), layers, width, kv * head_dim, text.vocab_size, context)
    return sizes, model


def program() -> float:
    """Bytes that this process holds, which has loaded what a run loads; 0 where no /proc says it
    (macOS, Windows)."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except OSError:
        return 0.0
    return float(pages * os.sysconf("SC_PAGE_SIZE"))


def memory(
    sizes: Sizes,
    rows: Rows,
    kept: list[float],
    *,
    devices: int = 1,
    zero: int = 0,
    amp: bool = False,
    checkpointing: bool = False,
    references: float = 1,
    logits: int = 12,
    program: float = 0.0,
    trained: float | None = None,
    frozen_bytes: int = 4,
) -> dict[str, float]:
    """Bytes on each device, by the formula above; "peak" is what is held at the same time.

    `kept`: bytes for each token of each tensor that is kept for the backward pass. `zero`: the
    stage of ZeRO, 0 is DDP. `references`: their size, in units of the model. `logits`: bytes for
    each logit of a chunk. `program`: of the process; 0 counts neither it nor the holes. `trained`:
    parameters of an adapter, None without one; the others take `frozen_bytes` each.
    """
    p, layers, width, columns = sizes.parameters, sizes.layers, sizes.width, rows.columns
    t = p if trained is None else trained
    adam, buckets = 8 * t, 4 * t
    if zero:
        adam, buckets = 12 * p / devices, min(4 * p, 4 * 5e8)
    if devices == 1:
        buckets = 0
    blocks = [size * columns for size in kept]
    if checkpointing:  # the states between layers, and what one layer keeps while it is repeated
        states = (2 if amp else 4) * width * columns
        blocks = [states] * layers + [size / layers for size in blocks]
    scores = sizes.vocab * min(rows.answers, LOGIT_CHUNK)
    held = {
        "program": program,
        "weights": 4 * t + frozen_bytes * (p - t),
        "reference": 4 * p * references,
        "Adam": adam,
        "buckets": buckets,
        "bf16 copies": 2 * (p if frozen_bytes == 4 else t) if amp else 0,
    }
    always = sum(held.values())
    held["gradients"] = 4 * t / (devices if zero == 2 else 1)
    held["activations"] = sum(blocks)
    held["logits"] = logits * scores
    if trained is None:  # the head is trained
        held["logits"] = max(held["logits"], 4 * scores + 4 * sizes.vocab * width)
    held["cache"] = (4 if amp else 8) * layers * sizes.kv_width * rows.sampled
    held["holes"] = 0.0
    if program:
        small = [size for size in blocks if size < FROM_HEAP]
        held["holes"] = max(sum(small), held["cache"]) / 2
    if trained is not None:
        embeddings = 4 * sizes.vocab * width if frozen_bytes == 2 else 0
        held["merged"] = 4 * p + embeddings if program else 0
    update = held["activations"] + held["logits"]
    if rows.in_parts:
        update += held["gradients"]
    at_most = max(update, held["gradients"], held["cache"], held.get("merged", 0))
    held["peak"] = always + held["holes"] + at_most
    return held


def table(sizes: Sizes, rows: Callable[[int], list[Rows]], kept: list[float], **options) -> str:
    """The estimate for 1, 2, 4 and 8 devices, DDP beside ZeRO-2, in GiB.

    `rows(devices)`: of each kind of step; the one that takes most counts. `kept` and `options` are
    other arguments of `memory`.
    """

    def most(devices: int, zero: int) -> dict[str, float]:
        options.update(devices=devices, zero=zero)
        held = [memory(sizes, of_kind, kept, **options) for of_kind in rows(devices)]
        return max(held, key=lambda sums: sums["peak"])

    held = most(1, 0)
    items = ", ".join(f"{name} {size / GIB:.3g}" for name, size in held.items())
    trained = options.get("trained")
    of_them = "" if trained is None else f", {trained / 1e6:,.3g} M of them trained"
    lines = [f"{sizes.parameters / 1e6:,.1f} M parameters{of_them}; one device, GiB: {items}"]
    for devices in (2, 4, 8):
        ddp, zero = most(devices, 0)["peak"] / GIB, most(devices, 2)["peak"] / GIB
        beside = f", {zero:.3g} under ZeRO-2" if trained is None else ""
        lines.append(f"{devices} devices, each: {ddp:.3g} GiB under DDP{beside}")
    return "\n".join(lines)


def print_estimate(args, algorithm: Algorithm) -> None:
    """--dry-run: what a run would take, by the config of its model and the rows of its data."""
    lora.check_flags(args)
    if args.model != "tiny":
        sizes, model = model_of(args.model)  # before the data: a wrong name shows at once
    if args.optimizer != "adamw":
        print(f"--optimizer {args.optimizer} is counted like adamw")
    data = load_data(args, algorithm)
    print(data_line(args, data.train, len(data.held_out), len(data.pairs)))
    if args.model == "tiny":
        lm, tokenizer = build_tiny([e.prompt + e.target for e in data.train], args.seed)
        sizes, model = model_of("tiny", lm.config)
    else:
        tokenizer = load_tokenizer(args.model, "--model")
    adapter = None
    if args.lora is not None:
        sizes, adapter = with_adapter(sizes, model, args)
    micro_batch_size = args.micro_batch_size  # as given: below it depends on the devices
    resolve_defaults(args, algorithm, sizes.context)
    kinds = kinds_of_steps(args, algorithm, tokenizer, data)
    packs = "position_ids" in accepts(model.lm.base_model)

    def rows(devices: int) -> list[Rows]:
        share = math.ceil(args.batch_size / devices)
        together = micro_batch_size or math.ceil(share / (args.grad_accum or 1))
        found = [largest_rows(kind, share, together, packs) for kind in kinds]
        sampled = max(of_kind.sampled for of_kind in found)  # no kind of step is alone
        return [of_kind._replace(sampled=sampled) for of_kind in found]

    longest = max(sum(row) for kind in kinds for item in kind.items for row in item)
    print(
        f"rows of {longest} tokens at most, {max(r.columns for r in rows(1)):,} tokens at a time; "
        "the formula is in cost.py"
    )
    has_rl = args.ppo_ratio != 0
    on_cpu = pick_device(args.device).type == "cpu"
    options = dict(
        amp=args.amp != "no", checkpointing=args.gradient_checkpointing,
        references=max(1, len(args.ref_model or [])) if has_rl else 0,
    )  # fmt: skip
    if args.teacher is not None:
        teacher, _ = model_of(args.teacher, flag="--teacher")
        options |= dict(references=teacher.parameters / sizes.parameters, logits=20)
    kept = kept_bytes(sizes, model, longest, args.amp)
    options["program"] = program() if on_cpu else 0.0
    if adapter is not None:
        options |= dict(trained=adapter, frozen_bytes=lora.BASE_DTYPES[args.base_dtype].itemsize)
        if has_rl and not args.ref_model and args.teacher is None:
            options["references"] = adapter / sizes.parameters
    print(table(sizes, rows, kept, **options))
    print(disk_line(args, sizes.parameters, adapter))


def with_adapter(sizes: Sizes, model: FakeModel, args) -> tuple[Sizes, int]:
    """Put the adapter of --lora into `model`. -> sizes with it, and how many of them it has."""
    with model.mode:
        lora.add_adapter(model.lm, args.lora, args.lora_alpha, args.base_dtype)
    return sizes._replace(parameters=model.parameters()), size_of(trained(model.lm))


def kept_bytes(sizes: Sizes, model: FakeModel, length: int, amp: str) -> list[float]:
    """`FakeModel.kept`; where it cannot count, what a Llama keeps, and a line that says so."""
    kept = model.kept(length, AMP_DTYPES[amp])
    if kept is None:
        of_llama = LLAMA if amp == "no" else LLAMA_AMP
        print(
            f"{type(model.lm).__name__} chooses shapes by its data, so its activations are taken "
            f"to be {of_llama} bytes a token, layer and element of the hidden state, as a Llama's"
        )
        kept = [4.0 * sizes.width] * round(sizes.layers * of_llama / 4)
    return kept


# ------------------------------------------------------------------------------------- its rows


class Kind(NamedTuple):
    """A kind of step: SFT, episodes of an algorithm that samples, or preference pairs."""

    items: list[list[tuple[int, int]]]  # of each item its rows: tokens of prompt and of answer
    minibatches: int = 1  # updates for one batch
    new_tokens: int = 0  # that are sampled for each row


def kinds_of_steps(args, algorithm: Algorithm, tokenizer, data: Data) -> list[Kind]:
    """What passes through the model in each kind of step. Print what is cut and how long rows are.

    At most survey.MOST rows of the data are counted.
    """
    limits = limits_of(args)
    examples = survey.writable(tokenizer, data.train, False, print)
    demonstrations = survey.lengths_of(tokenizer, examples)
    both = survey.pair_lengths(tokenizer, data.pairs)
    own = demonstrations if args.data is not None else []  # else they are sides of the pairs
    survey.say_cuts(own, **limits, say=print, pairs=both)
    survey.say_unwritten(tokenizer, examples, print)

    def cut(row: tuple[int, int]) -> tuple[int, int]:
        prompt = min(row[0], limits["max_prompt_length"])
        return prompt, min(row[1], limits["max_length"] - prompt)

    rows = [cut(row) for row in demonstrations]
    totals = sorted(sum(row) for row in rows)
    print(
        f"{len(totals)} rows of the data counted: half have at most {totals[len(totals) // 2]} "
        f"tokens, the longest {totals[-1]}"
    )
    has_rl, kinds = args.ppo_ratio != 0, []
    if args.ppo_ratio != 1 or not has_rl:
        kinds.append(Kind([[row] for row in rows if row[1]] or [[rows[0]]]))
    if has_rl and algorithm.samples:
        new_tokens = args.turns * args.max_new_tokens
        episodes = [[(prompt, new_tokens)] for prompt, _ in rows]
        kinds.append(Kind(episodes, args.minibatches, new_tokens))
    elif has_rl:
        kinds.append(Kind([[cut(row) for row in sides] for sides in both]))
    return kinds


def largest_rows(kind: Kind, share: int, together: int, packs: bool) -> Rows:
    """The largest micro-batch among batches of `share` items that are drawn as a run draws them.

    An update takes `together` items at a time, those of similar length, as engine.accumulate does.
    """
    stream = BatchStream(kind.items, share, seed=0)
    in_update = math.ceil(share / kind.minibatches)
    columns, answers, sampled = 0, 0, 0
    for _ in range(math.ceil(DRAWN / share)):
        batch = stream.next()
        prompts = [row[0] for item in batch for row in item]
        if kind.new_tokens:  # every row of the cache is as long as the longest
            sampled = max(sampled, len(prompts) * (max(prompts) + kind.new_tokens))
        update = sorted(batch[:in_update], key=lambda item: max(sum(row) for row in item))
        rows = [row for item in update[-together:] for row in item]
        answers = max(answers, sum(row[1] for row in rows))
        # The last token of a row is predicted and never read.
        columns = max(columns, columns_for([sum(row) - 1 for row in rows], packs))
    return Rows(columns, answers, together < in_update, sampled)


def columns_for(lengths: list[int], packs: bool) -> int:
    """Tokens that the model reads for rows of these lengths: see lm.states_before."""
    columns = len(lengths) * max(lengths)
    if packs and sum(lengths) < 0.9 * columns:
        bins, _, width = pack(lengths)
        columns = (max(bins) + 1) * width
    return columns
