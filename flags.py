"""The command line of train.py: every flag, its default, and what a resumed run remembers.

Nothing here needs torch, so --help and a wrong flag are answered at once. An algorithm names the flags that matter to
it in its entry of ALGORITHMS (train.py), a schedule in its `flags`: a flag of another algorithm or schedule is refused.
Left out on purpose: configuration files; defaults that depend on the model (`resolve_defaults` in prepare.py).

    python train.py --help
"""

import argparse
import json
import os
import sys
from pathlib import Path

from cli import Parser, UserError, number, one_line_errors
from files import PROMPT_FIELDS, TARGET_FIELDS
from tasks import task_of

# --resume does not take these from config.json
NOT_REMEMBERED = ("resume", "overwrite", "deepspeed", "dry_run", "accept_changes")
MAY_CHANGE_ON_RESUME = ("device", "steps", "eval_every", "eval_size", "save_every", "keep", "keep_best", "log")

SEVERAL = ("data", "prompts")  # flags with several words
# The optimisers of --optimizer, and their peak learning rate where --lr does not name one: of the built-in model, which
# starts from nothing, and of one that is pretrained. The units differ: Adam's and Muon's update is about lr per weight,
# Adafactor's about lr times the size of the weight, SGD's follows the gradient.
DEFAULT_LR = {
    "adamw": (5e-3, 1e-5),
    "adam": (5e-3, 1e-5),
    "sgd": (2e-1, 1e-3),
    "adafactor": (3e-2, 1e-3),
    "muon": (3e-3, 1e-5),
}
# --rl-lr of the built-in model, as a share of its --lr: at all of it, one seed in five ended at 0.895 fluent.
RL_SHARE = 0.6

# Arguments of `apply_chat_template` that are no arguments of a template
RESERVED = {"conversation", "messages", "add_generation_prompt", "continue_final_message", "tokenize", "chat_template"}
RESERVED |= {"padding", "truncation", "max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask"}
RESERVED |= {"tokenizer_kwargs"}

# Argparse types that many flags have
count, positive, share = number(int, 1), number(float, 0, above=True), number(float, 0, 1)


def default_rates() -> str:
    """The defaults of --lr, as --help says them."""
    rates = [f"{optimizer} {tiny:g} and {other:g}" for optimizer, (tiny, other) in DEFAULT_LR.items()]
    return f"for 'tiny' and for other models, {', '.join(rates)}"


class Sources(argparse.Action):
    """One source as a string, as config.json has always had it; several as a list."""

    def __call__(self, parser, args, values, option=None):
        setattr(args, self.dest, values[0] if len(values) == 1 else values)


def make_parser(algorithms: dict | None = None, schedules: dict | None = None) -> Parser:
    """All flags. Where the tables of train.py and schedules.py are not given, any name of either is taken."""
    parser = Parser("Train any Hugging Face causal LM by alternating supervised fine-tuning and PPO.")
    # fmt: off
    add = parser.add_argument_group("model and data").add_argument
    add("--model", default="tiny", help="'tiny' (built here, 1 M parameters), a local folder, or a hub id such as gpt2")
    add("--data", nargs="+", action=Sources, metavar="SOURCE",
        help="files (.jsonl .json .csv .tsv .parquet .txt, also .gz .bz2 .xz .zst), a save_to_disk folder, or a hub "
        "dataset id; or a built-in task: reviews (default), or sort, which brings defaults of its own")
    add("--prompts", nargs="+", action=Sources, metavar="SOURCE",
        help="prompts for the steps with a reward, read like --data; their targets are not trained (default: --data)")
    add("--demonstrations", type=number(int, 0), metavar="N",
        help="only so many training examples keep their target; the reward still sees all (default: all)")
    add_data_flags(parser.add_argument_group("how --data is read"))
    add = parser.add_argument_group("training").add_argument
    add("--algorithm", choices=algorithms, metavar="{ppo,grpo,dpo,distill}", default="ppo",
        help="the algorithm that alternates with SFT (default with --teacher: distill)")
    add("--steps", type=count, default=500, help="steps of the loop, SFT and PPO together")
    add("--batch-size", type=count, default=32,
        help="demonstrations of an SFT step, episodes of a PPO step, pairs of a DPO step; of all processes together")
    add("--micro-batch-size", type=count,
        help="rows per forward and backward on each process; changes memory, not results (default: its whole share)")
    add("--grad-accum", type=count, help="the same, said as the number of parts into which each process cuts its share")
    add("--max-length", type=number(int, 2),
        help="tokens of prompt and response together (default: 1024, or the model's context)")
    add("--lr", type=positive, help=f"peak learning rate (usual with adamw: 1e-6 to 1e-3; default: {default_rates()})")
    add("--rl-lr", type=positive,
        help="the same for the updates of --algorithm, mixed ones too (default: that of --lr; for 'tiny' 0.6 of it)")
    add("--optimizer", choices=tuple(DEFAULT_LR), default="adamw",
        help="torch's own; muon takes the matrices, AdamW the rest")
    add("--scheduler", choices=("constant", "linear", "cosine", "wsd"), default="linear",
        help="learning rate after its warm-up; wsd decays in the last fifth")
    add("--warmup-steps", type=number(int, 0), default=20, help="steps over which the learning rate rises")
    add("--max-grad-norm", type=positive, default=1.0, help="gradient clipping")
    add = parser.add_argument_group("reward and sampling").add_argument
    add("--reward", help="reward expression, such as '0.7*rouge_l + 0.3*bleu' or my.py:function (default: sentiment; "
        "with --teacher it is measured, and not trained on)")
    add("--mixture-data", help="preference pairs (prompt, chosen, rejected) that fit the weights of a mixture(...)")
    add("--max-new-tokens", type=count, default=32, help="length limit of a response, EOS included")
    add("--temperature", type=number(float, 0.01), default=1.0,
        help="divides the logits of policy, old policy and reference (usual: 0.7 to 1)")
    add("--missing-eos-penalty", type=number(float, 0), default=0.0,
        help="subtracted from the score of a response that hit the length limit")
    add_ppo_flags(parser)
    add = parser.add_argument_group("run").add_argument
    add("--out", default="out", help="run folder: config, metrics, samples, checkpoints, final model")
    add("--overwrite", action="store_true", help="replace the run that --out holds")
    add("--resume", metavar="OUT", help="go on from the newest checkpoint of this run folder, with its flags")
    add("--accept-changes", action="store_true",
        help="resume even where data, base model or reward file are not what the run began with")
    add("--eval-every", type=number(int, 0), default=100,
        help="steps between evaluations; 0 only at the start and the end")
    add("--eval-size", type=count, default=256, help="held-out examples per evaluation")
    add("--save-every", type=number(int, 0), default=100, help="steps between checkpoints; 0 only the final model")
    add("--keep", type=count, default=2, help="checkpoints to keep, the newest ones")
    add("--keep-best", metavar="METRIC", help="keep the model in OUT/best: eval/reward, or -eval/nll for the lowest")
    add("--log", choices=("none", "wandb", "tensorboard"), default="none",
        help="where a copy of metrics.jsonl goes as well (optional packages)")
    add("--seed", type=number(int, 0, 2**32 - 2), default=0,
        help="of model, data order, sampling, random and NumPy (for rewards that draw): the same seed, the same run")
    add = parser.add_argument_group("machine").add_argument
    add("--device", default="auto", help="auto, cuda, mps or cpu")
    add("--amp", choices=("no", "bf16", "fp16"), default="no",
        help="compute in bf16 or fp16 (with loss scaling); weights and losses stay float32")
    add("--gradient-checkpointing", action="store_true",
        help="recompute activations in the backward pass: less memory, a third more time")
    add("--compile", action="store_true",
        help="torch.compile the model: slow to start, then faster on a GPU (on the CPU hardly)")
    add("--deepspeed", metavar="JSON",
        help="DeepSpeed configuration with ZeRO stage 1 or 2, under torchrun (optional package)")
    add("--dry-run", action="store_true",
        help="print what the data become and the memory that this run would take on 1 to 8 devices, and exit")
    # fmt: on
    add_extension_flags(parser, schedules)
    return parser


# fmt: off
def add_ppo_flags(parser: Parser) -> None:
    """What PPO and GRPO do with a rollout."""
    add = parser.add_argument_group("ppo and grpo").add_argument
    add("--group-size", type=count, default=1,
        help="responses to each prompt, part of --batch-size; grpo needs 2 or more (usual: 4 to 16)")
    add("--kl-coef", type=number(float, 0), default=0.05,
        help="what is subtracted from the reward for one nat of KL (usual: 0.01 to 0.2)")
    add("--kl-target", type=positive, help="adapt kl_coef until a response has this KL (k1), in nats (usual: 1 to 10)")
    add("--kl-horizon", type=positive, default=1000, help="episodes in which kl_coef can change by a factor of 1.2")
    add("--kl-estimator", choices=("k1", "k2", "k3"), default="k1",
        help="ppo: per-token KL in the reward; only k1 also gives the KL's unbiased gradient")
    add("--ppo-epochs", type=count, default=2, help="passes over each rollout (usual: 1 to 4; distill: 1)")
    add("--minibatches", type=count, default=2, help="updates per pass (usual: 1 to 8; distill: 1)")
    add("--cliprange", type=positive, default=0.2, help="the ratio may leave 1 by this much (usual: 0.1 to 0.3)")
    add("--cliprange-value", type=positive, default=0.2,
        help="ppo: a value may move by this much from what it was at sampling")
    add("--vf-coef", type=number(float, 0), default=0.1, help="ppo: weight of the value loss")
    add("--gamma", type=share, default=1.0, help="ppo: discount per token; 1 for text")
    add("--lam", type=share, default=0.95, help="ppo: GAE lambda, 1 unbiased, 0 smallest variance (usual: 0.9 to 1)")
    add("--target-kl", type=positive,
        help="stop the passes over a rollout once approxkl exceeds this (usual: 0.01 to 0.1)")
    add("--whiten-rewards", action="store_true", help="ppo: scale per-token rewards to unit variance")


def add_extension_flags(parser: Parser, schedules: dict | None = None) -> None:
    """The flags of schedules.py, references.py, lora.py, dialogue.py and dpo.py, a group for each."""
    add = parser.add_argument_group("schedule").add_argument
    add("--schedule", choices=schedules, metavar="{ratio,gate,buffer,mix}", default="ratio",
        help="what each step learns from; ratio: by --ppo-ratio; gate, buffer: SFT on prompts that score low; mix: "
        "both losses in one update")
    add("--ppo-ratio", type=ratio, default=0.5,
        help="share of the steps that are PPO (GRPO, DPO): 0 pure SFT, 1 pure PPO, 0.1:0.9 a ramp; with --schedule mix "
        "the weight of RL; gate and buffer do not use it")
    add("--sft-warmup", type=number(int, 0),
        help="SFT steps before the first PPO step (default: 30%% of a mixed run of 'tiny', else 0)")
    add("--threshold", type=number(float, -1e9), default=0.0,
        help="gate, buffer, hints: a prompt whose responses all score below this is hard")
    add("--hints", type=number(float, 0, 1, above=True), metavar="SHARE",
        help="rollouts: a hard prompt comes with this share of its target, less and less until two thirds of the run")
    add = parser.add_argument_group("references").add_argument
    add("--ref-model", action="append", metavar="REF",
        help="reference of the KL penalty, a folder or hub id; or several times NAME=PATH:WEIGHT, for their mixture "
        "(default: the policy when PPO first starts)")
    add("--ref-refresh", type=number(int, 0), default=0, help="renew the reference every N PPO steps; 0 never does")
    add("--ref-ema", type=share, default=0.0,
        help="after every PPO step: reference = x * reference + (1 - x) * policy (usual: 0.99; 0: the reference does "
        "not move)")
    add = parser.add_argument_group("lora").add_argument
    add("--lora", type=count, metavar="RANK",
        help="train low-rank adapters of this rank beside the frozen layers, and the value head (usual: 4 to 64, with "
        "ten times the --lr)")
    add("--lora-alpha", type=positive, help="an adapter counts alpha / rank (default: 2 x rank)")
    add("--base-dtype", choices=("float32", "bf16"), default="float32",
        help="of the frozen base: bf16 halves it, and computes in it; adapters and losses stay float32")
    add_dialogue_flags(parser)
    add = parser.add_argument_group("dpo").add_argument
    add("--preference-data",
        help="prompt, chosen and rejected (default: pairs made from the built-in task); without --data, SFT learns "
        "from the chosen side")
    add("--beta", type=positive, default=0.1,
        help="how close to the reference (usual: 0.05 to 0.5; smaller is less close)")
    add = parser.add_argument_group("distill").add_argument
    add("--teacher", metavar="MODEL",
        help="a folder or hub id with the vocabulary of --model: the RL steps become distill steps, which pull what "
        "the policy writes towards what this model would write")


def add_data_flags(group) -> None:
    """How a source is read: the flags that train.py, data.py and evaluate.py share."""
    add = group.add_argument
    add("--data-config", help="configuration of a hub dataset, such as wikitext-2-raw-v1")
    add("--data-split", default="train", help="split of a hub dataset; a tenth is held out by hash")
    add("--prompt-field", help=f"field with the prompt (default: {', '.join(PROMPT_FIELDS)})")
    add("--target-field", help=f"field with the target (default: {', '.join(TARGET_FIELDS)})")
    add("--prompt-words", type=count, default=12, help="plain text: the first N words are the prompt")
    add("--encoding", default="utf-8", help="encoding of a local file")
    add("--limit", type=count, help="read at most N records")
    add("--strict", action="store_true",
        help="stop at the first record that cannot be used; else such records are left out")
    add("--raw", action="store_true",
        help="records of prompt and target as plain text, not through the model's chat template")
    add("--template-args", type=json_object, metavar="JSON",
        help="arguments of the chat template, such as '{\"enable_thinking\": false}'")


def add_dialogue_flags(parser: Parser) -> None:
    """Episodes of several turns: the flags that train.py and evaluate.py share."""
    add = parser.add_argument_group("dialogue").add_argument
    add("--turns", type=count, default=1,
        help="responses in an episode: above 1 it is a dialogue, with the user turns of the data or --user-model")
    add("--user-model", help="a folder or hub id of a causal LM that plays the user")
    add("--turn-rewards", action="store_true", help="a score for each response of a dialogue instead of one at its end")
# fmt: on


def ratio(text: str) -> float | tuple[float, float]:
    """An argparse type: `0.5`, or a ramp `0.1:0.9`."""
    numbers = [share(end) for end in text.split(":")]
    if len(numbers) > 2:
        raise argparse.ArgumentTypeError(f"expected a number or start:end, found {text!r}")
    return numbers[0] if len(numbers) == 1 else tuple(numbers)


def json_object(text: str) -> dict:
    """An argparse type: a JSON object."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as problem:
        raise argparse.ArgumentTypeError(f"{text!r} is not valid JSON ({problem})") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"expected a JSON object, found {text!r}")
    reserved = sorted(RESERVED & set(value))
    if reserved:
        raise argparse.ArgumentTypeError(f"{', '.join(reserved)} is set by the program itself")
    return value


def pair_options(args) -> dict:
    """The flags of `add_data_flags` that also hold for preferences, arguments of `load_pairs`."""
    return dict(encoding=args.encoding, strict=args.strict, raw=args.raw, template_args=args.template_args)


def data_options(args) -> dict:
    """The flags of `add_data_flags` -> keyword arguments of `load_examples`."""
    fields = dict(prompt_field=args.prompt_field, target_field=args.target_field)
    dataset = dict(config=args.data_config, split=args.data_split, limit=args.limit)
    return dict(**fields, **dataset, **pair_options(args), prompt_words=args.prompt_words)


# ---------------------------------------------------------------------------------- read them


@one_line_errors
def answer_early(argv: list[str] | None = None) -> None:
    """Print --help, or the error of a wrong flag, and exit. It returns where there is neither, and on
    several machines: a process that ends before it has joined leaves those of the others waiting."""
    if os.environ.get("WORLD_SIZE", "1") == os.environ.get("LOCAL_WORLD_SIZE", "1"):
        parse_args(argv)


def parse_args(
    argv: list[str] | None, algorithms: dict | None = None, schedules: dict | None = None
) -> argparse.Namespace:
    """The flags of a run; with --resume those of its config.json and what may change.

    Raises UserError. What depends on the tables of train.py and schedules.py is checked where they are given.
    """
    argv = join_metric(sys.argv[1:] if argv is None else argv)
    parser = make_parser(algorithms, schedules)
    args = set_defaults(parser, argv, algorithms or {})
    if args.resume is None:
        if args.accept_changes:
            raise UserError("--accept-changes is for --resume and does nothing here; leave it out")
        if algorithms is not None and schedules is not None:
            check_flags_matter(parser, args, algorithms, schedules)
        return args
    if args.overwrite:
        raise UserError("--resume goes on with a run, --overwrite replaces one; say one of the two")
    remembered = {n: v for n, v in read_flags(Path(args.resume), parser).items() if n not in NOT_REMEMBERED}
    remembered["out"] = args.resume
    parser.set_defaults(**dict.fromkeys(remembered))  # a flag that is not given again is None
    given = {name: value for name, value in vars(parser.parse_args(argv)).items() if value is not None}
    given = {name: value for name, value in given.items() if name in remembered}
    if "out" in given and Path(given["out"]).resolve() == Path(args.resume).resolve():
        given["out"] = args.resume
    for name, value in given.items():
        if remembered[name] != value and name not in MAY_CHANGE_ON_RESUME:
            raise UserError(
                f"{spelled(name)} {value} contradicts the run that is resumed, which has {remembered[name]}; "
                "leave the flag out"
            )
    return argparse.Namespace(**{**vars(args), **remembered, **given})


def set_defaults(parser: Parser, argv: list[str], algorithms: dict) -> argparse.Namespace:
    """The flags, once a built-in task, a teacher and the algorithm have brought defaults of their own."""
    args = parser.parse_args(argv)
    if args.resume is not None:  # config.json has every flag of the run
        return args
    task = task_of(args.data)
    if task is not None:
        parser.set_defaults(**task.defaults)
    if args.teacher is not None:
        parser.set_defaults(algorithm="distill")
    args = parser.parse_args(argv)
    if args.algorithm in algorithms:
        parser.set_defaults(**algorithms[args.algorithm].defaults)
    return parser.parse_args(argv)


def read_flags(out: Path, parser: Parser) -> dict:
    """The flags of a run by its config.json, each checked as if it had been typed. Raises UserError."""
    config, file = read_config(out), out / "config.json"
    known = vars(parser.parse_args([]))
    said = {name: value for name, value in config.items() if name in known}
    words = []
    for name, value in said.items():
        words += typed(name, value)
    try:
        flags = vars(parser.parse_args(words))
    except UserError as problem:
        raise UserError(f"{file}: {problem}") from None
    for name, value in said.items():
        if flags[name] != value:
            raise UserError(f"{file}: {name} is {value!r}, which {spelled(name)} cannot be")
    if "rl_lr" not in config:  # a run from before there was this flag: one rate for both phases
        flags["rl_lr"] = flags["lr"]
    return flags


def typed(name: str, value) -> list[str]:
    """A flag of config.json as the words of a command line: `lr`, 0.1 -> `--lr=0.1`."""
    if value is None or value is False:
        return []
    if value is True:
        return [spelled(name)]
    if isinstance(value, tuple):  # a ramp
        value = ":".join(str(share) for share in value)
    if isinstance(value, dict):
        value = json.dumps(value)
    if isinstance(value, list) and name == "ref_model":
        return [f"{spelled(name)}={item}" for item in value]
    if isinstance(value, list) and name in SEVERAL:
        return [spelled(name), *map(str, value)]
    return [f"{spelled(name)}={value}"]


def read_json(path: Path) -> dict:
    """The object in a JSON file; empty where there is none."""
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return read if isinstance(read, dict) else {}


def read_config(out: Path) -> dict:
    """The flags of a run. Raises UserError where there is none."""
    config = read_json(out / "config.json")
    if "ppo_ratio" not in config:
        needed = "expected a run folder with a config.json"
        if os.environ.get("RANK", "0") != "0":
            needed += "; every process must see the run folder, or a copy of it"
        raise UserError(f"--resume {out}: nothing to resume there; {needed}")
    if isinstance(config["ppo_ratio"], list):
        config["ppo_ratio"] = tuple(config["ppo_ratio"])
    return config


def join_metric(argv: list[str]) -> list[str]:
    """`--keep-best -eval/nll` -> `--keep-best=-eval/nll`: alone, argparse takes the metric for a flag."""
    joined = []
    for word in argv:
        if joined[-1:] == ["--keep-best"] and word[:1] == "-" != word[1:2]:
            joined[-1] += f"={word}"
        else:
            joined.append(word)
    return joined


def spelled(name: str) -> str:
    """`max_length` -> `--max-length`."""
    return "--" + name.replace("_", "-")


def check_flags_matter(parser: Parser, args: argparse.Namespace, algorithms: dict, schedules: dict) -> None:
    """Raises UserError for a flag of another algorithm or schedule, and for two flags that say one thing."""
    used_by = {name: (*entry.step_flags, *entry.flags) for name, entry in algorithms.items()}
    used_by |= {name: schedule.flags for name, schedule in schedules.items()}
    used_here = {*used_by[args.algorithm], *used_by[args.schedule]}
    if args.hints is not None:
        used_here.add("threshold")
    for flag in dict.fromkeys(flag for flags in used_by.values() for flag in flags):
        if flag not in used_here and getattr(args, flag) != parser.get_default(flag):
            owners = [name for name, flags in used_by.items() if flag in flags]
            raise UserError(f"{spelled(flag)} belongs to {' and '.join(owners)} and does nothing here; leave it out")
    if args.micro_batch_size is not None and args.grad_accum is not None:
        raise UserError("--micro-batch-size and --grad-accum say the same in two ways; give one of them")
    if args.schedule in ("gate", "buffer") and args.ppo_ratio != parser.get_default("ppo_ratio"):
        raise UserError(f"--schedule {args.schedule} follows the scores, not --ppo-ratio; leave that out")


def resolve_length(args: argparse.Namespace, context: int) -> None:
    """Fill in --max-length. Raises UserError unless it fits the model's context and leaves room for a prompt."""
    if args.max_length is None:
        args.max_length = min(1024, context)
    if args.max_length > context:
        raise UserError(f"--max-length {args.max_length} is beyond the model's context of {context} tokens")
    if args.max_new_tokens >= args.max_length:
        raise UserError(
            f"--max-new-tokens {args.max_new_tokens} leaves no room for a prompt in --max-length {args.max_length}"
        )


def limits_of(args) -> dict[str, int]:
    """How every row of a run is cut: the same prompt in every phase."""
    room = args.turns * args.max_new_tokens
    return dict(max_length=args.max_length, max_prompt_length=args.max_length - room)
