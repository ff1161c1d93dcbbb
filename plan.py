"""What a run is going to do, said before it does it: device, data, model, reward, time and disk.

Every line is something that a person may want to change before hours have passed. Nothing here
changes the run. Left out on purpose: a report that can be switched off line by line.

    python train.py --steps 10 --out out-short
"""

from collections.abc import Callable, Iterable

import torch

from chat import dialogue_of
from engine import seconds_of_product, trained
from lora import BASE_DTYPES
from runs import Run
from sources import name_of
from tasks import task_of

GB = 1e9
WORTH_A_HINT = 2e7  # parameters; below, the arithmetic is not what takes the time


def size_of(parameters: Iterable[torch.Tensor]) -> int:
    """How many numbers they hold together."""
    return sum(parameter.numel() for parameter in parameters)


def device_line(args, device: torch.device) -> str:
    """Where the run computes, and how precisely."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    if device.type == "cpu":
        name = f"cpu, {torch.get_num_threads()} threads"
    precision = "float32" if args.amp == "no" else f"{args.amp}, weights in float32"
    if args.base_dtype == "bf16":
        precision = "bf16, weights of the adapter in float32"
    return f"device: {name}; precision: {precision}"


def data_line(args, train: list, n_held_out: int, n_pairs: int) -> str:
    """What is learnt from, with counts. `train` are the examples."""
    source = name_of(args.data or "the pairs")
    task = task_of(args.data)
    if task is not None:
        source = task.said
    pairs = f", {n_pairs:,} preference pairs" if n_pairs else ""
    if args.prompts is not None:
        source += f"; prompts: {name_of(args.prompts)}"
    n_targets = sum(bool(example.target) for example in train)
    targets = f", {n_targets:,} of them with a target" if n_targets < len(train) else ""
    known = f"{len(train):,} examples to train on{targets}, {n_held_out:,} held out{pairs}"
    return f"data: {source}: {known}"


def model_line(args, run: Run, examples: list) -> str:
    """What is trained, and whether its chat template writes the data."""
    n = size_of(run.model.lm.parameters())
    written = [e for e in examples if dialogue_of(run.tokenizer, e) is not None]
    template = f"its chat template writes {len(written):,} of {len(examples):,} examples"
    if not written:
        template = "no chat template is used"
    context = min(run.model.max_positions, args.max_length)
    return f"model: {args.model}, {n / 1e6:,.1f} M parameters, rows of {context} tokens; {template}"


def training_line(args, run: Run) -> str:
    """How it is trained: steps, reward, learning rate."""
    phases = [run.schedule.phase(step) for step in range(args.steps)]
    n_sft = phases.count("sft")
    steps = f"{n_sft} SFT and {args.steps - n_sft} {args.algorithm.upper()} steps"
    if args.schedule != "ratio":
        steps += f" (--schedule {args.schedule})"
    reward = f"reward: {args.reward}" if args.reward is not None else "no reward"
    if args.reward is not None and run.algorithm.from_teacher:
        reward = f"measured, not trained on: {args.reward}"
    rate = f"lr {args.lr:g}"
    if args.rl_lr != args.lr:
        rate += f" for SFT and {args.rl_lr:g} for {args.algorithm.upper()}"
    rate += f", {args.scheduler} after {args.warmup_steps} steps"
    return f"training: {steps} of {args.batch_size}; {reward}; {args.optimizer}, {rate}"


def teacher_line(args, run: Run) -> str:
    """Who teaches, and in how many steps."""
    n = size_of(run.reference.lm.parameters())
    phases = [run.schedule.phase(step) for step in range(args.steps)]
    return f"teacher: {args.teacher}, {n / 1e6:,.1f} M parameters, in {phases.count('rl')} steps"


def lora_line(args, parameters: int, n_trained: int) -> str:
    """How much of the model is trained."""
    base = str(BASE_DTYPES[args.base_dtype]).removeprefix("torch.")
    of_all = f"{n_trained / 1e6:,.2f} M of {parameters / 1e6:,.1f} M parameters are trained"
    return f"LoRA of rank {args.lora}: {of_all}, base in {base}"


def disk_line(args, parameters: float, n_trained: float | None = None) -> str:
    """What checkpoints take: weights, Adam's two moments, and a reference, 4 bytes each. With
    --lora the weights are merged, and the others are of the `n_trained` parameters, as is one copy
    for PEFT."""
    has_copy = args.ppo_ratio != 0 and args.teacher is None  # a teacher is in its own folder
    copies = 1 + (1 if has_copy else 0)
    copies += {"adamw": 2, "adam": 2, "muon": 2}.get(args.optimizer, 1)
    others = parameters if n_trained is None else n_trained
    each = 4 * (parameters + others * (copies - 1)) / GB
    kept = 1 + (args.keep if args.save_every else 0)
    return f"disk: a checkpoint takes {each:,.2g} GB, up to {kept} of them are in {args.out}"


def say_run(args, run: Run, examples: list, say: Callable) -> None:
    """The lines that need the model: what is trained, how, and what it takes."""
    parameters, n_trained = size_of(run.model.parameters()), size_of(trained(run.model))
    say(model_line(args, run, examples))
    if args.lora is not None:
        say(lora_line(args, parameters, n_trained))
    say(training_line(args, run))
    say(disk_line(args, parameters, n_trained))
    hint = precision_hint(args, run.device, parameters)
    if hint is not None:
        say(hint)


def precision_hint(args, device: torch.device, parameters: float) -> str | None:
    """What two matrix products say about --amp bf16 on this machine; None: nothing to change."""
    if parameters < WORTH_A_HINT or args.amp == "fp16":
        return None
    n = 256 if device.type == "cpu" else 2048
    float32, bf16 = [
        seconds_of_product(n, dtype, device, rounds=3) for dtype in (torch.float32, torch.bfloat16)
    ]
    speedup = float32 / bf16
    if args.amp == "no" and speedup > 1.5:
        return f"hint: --amp bf16 multiplies matrices {speedup:.1f} times as fast here"
    if "bf16" in (args.amp, args.base_dtype) and speedup < 0.8:
        return f"hint: bf16 is slow here, {1 / speedup:.1f} times as slow as float32"
    return None


class TimeLeft:
    """How long the rest takes, once a step of each kind was seen. The first of a kind is slow."""

    def __init__(self, args, run: Run, say: Callable):
        self.run, self.say = run, say
        phases = [run.schedule.phase(step) for step in range(args.steps)]
        self.kinds = ["sft" if phase == "sft" else "rl" for phase in phases]  # of each step
        self.planned = set(self.kinds)  # a buffer may bring others
        self.seconds: dict[str, list[float]] = {kind: [] for kind in self.planned}

    def saw(self, phase: str, seconds: float) -> None:
        """A step was done. Says the estimate once: at the second step of the last kind to come."""
        seen = self.seconds.setdefault("sft" if phase == "sft" else "rl", [])
        seen.append(seconds)
        if len(seen) != 2 or any(len(self.seconds[k]) < 2 for k in self.planned):
            return
        left = sum(min(self.seconds[kind]) for kind in self.kinds[self.run.step :])
        if left > 1:
            self.say(f"step {self.run.step}: about {in_words(left)} to go, without evaluations")


def in_words(seconds: float) -> str:
    """
    >>> in_words(75), in_words(7500)
    ('75 seconds', '125 minutes')
    """
    if seconds < 120:
        return f"{seconds:.0f} seconds"
    if seconds < 3 * 3600:
        return f"{seconds / 60:.0f} minutes"
    return f"{seconds / 3600:.1f} hours"
