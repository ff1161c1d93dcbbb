"""The command line: every flag that is no extension's own, their defaults, and what a resumed run remembers.

An extension has `add_flags(parser)`, and `check_flags(args)`, which raises UserError for flags that contradict each
other. An algorithm names the flags that matter to it in its entry of ALGORITHMS (train.py), a schedule in its `flags`:
a flag of another algorithm or schedule is refused. Left out on purpose: configuration files.

    python train.py --help
"""

import argparse
import math
import sys
from pathlib import Path

import dialogue
import parallel
import references
import schedules
from data import add_data_flags
from engine import AMP_DTYPES, DEFAULT_LR, OPTIMIZERS, SCHEDULERS, Parser, UserError, number
from runs import MAY_CHANGE_ON_RESUME, Algorithm, read_config

EXTENSIONS = (schedules, references, dialogue)
NOT_REMEMBERED = (
    "resume",
    "overwrite",
    "deepspeed",
    "dry_run",
    "accept_changes",
)  # --resume does not take them from config.json


def default_rates() -> str:
    """The defaults of --lr, as --help says them."""
    rates = [
        f"{optimizer} {tiny:g} and {other:g}" for optimizer, (tiny, other) in DEFAULT_LR.items()
    ]
    return f"for 'tiny' and for other models, {', '.join(rates)}"


class Sources(argparse.Action):
    """One source as a string, as config.json has always had it; several as a list."""

    def __call__(self, parser, args, values, option=None):
        setattr(args, self.dest, values[0] if len(values) == 1 else values)


def make_parser(algorithms: dict[str, Algorithm]) -> Parser:
    """All flags. `algorithms` is the table of train.py."""
    parser = Parser(
        "Train any Hugging Face causal LM by alternating supervised fine-tuning and PPO."
    )
    count, positive, share = number(int, 1), number(float, 0, above=True), number(float, 0, 1)
    # fmt: off
    add = parser.add_argument_group("model and data").add_argument
    add("--model", default="tiny", help="'tiny' (built here, 1 M parameters), a local folder, or a hub id such as gpt2")
    add("--data", nargs="+", action=Sources, metavar="SOURCE",
        help="files (.jsonl .json .csv .tsv .parquet .txt, also .gz .bz2 .xz .zst), a save_to_disk folder, or a hub "
        "dataset id (default: reviews, built in)")
    add("--prompts", nargs="+", action=Sources, metavar="SOURCE",
        help="prompts for the steps with a reward, read like --data; their targets are not trained (default: --data)")
    add_data_flags(parser.add_argument_group("how --data is read"))
    add = parser.add_argument_group("training").add_argument
    add("--algorithm", choices=tuple(algorithms), default="ppo", help="the algorithm that alternates with SFT")
    add("--steps", type=count, default=700, help="steps of the loop, SFT and PPO together")
    add("--batch-size", type=count, default=32,
        help="demonstrations of an SFT step, episodes of a PPO step, pairs of a DPO step; of all processes together")
    add("--micro-batch-size", type=count,
        help="rows per forward and backward on each process; changes memory, not results (default: its whole share)")
    add("--grad-accum", type=count, help="the same, said as the number of parts into which each process cuts its share")
    add("--max-length", type=number(int, 2),
        help="tokens of prompt and response together (default: 1024, or the model's context)")
    add("--lr", type=positive, help=f"peak learning rate (usual with adamw: 1e-6 to 1e-3; default: {default_rates()})")
    add("--optimizer", choices=tuple(OPTIMIZERS), default="adamw",
        help="torch's own; muon takes the matrices, AdamW the rest")
    add("--scheduler", choices=tuple(SCHEDULERS), default="linear",
        help="learning rate after its warm-up; wsd decays in the last fifth")
    add("--warmup-steps", type=number(int, 0), default=20, help="steps over which the learning rate rises")
    add("--max-grad-norm", type=positive, default=1.0, help="gradient clipping")
    add = parser.add_argument_group("reward and sampling").add_argument
    add("--reward", help="reward expression, such as '0.7*rouge_l + 0.3*bleu' or my.py:function (default: sentiment)")
    add("--mixture-data", help="preference pairs (prompt, chosen, rejected) that fit the weights of a mixture(...)")
    add("--max-new-tokens", type=count, default=32, help="length limit of a response, EOS included")
    add("--temperature", type=number(float, 0.01), default=1.0,
        help="divides the logits of policy, old policy and reference (usual: 0.7 to 1)")
    add("--missing-eos-penalty", type=number(float, 0), default=0.0,
        help="subtracted from the score of a response that hit the length limit")
    add = parser.add_argument_group("ppo and grpo").add_argument
    add("--group-size", type=count, default=1,
        help="responses to each prompt, part of --batch-size; grpo needs 2 or more (usual: 4 to 16)")
    add("--kl-coef", type=number(float, 0), default=0.05,
        help="what is subtracted from the reward for one nat of KL (usual: 0.01 to 0.2)")
    add("--kl-target", type=positive, help="adapt kl_coef until a response has this KL (k1), in nats (usual: 1 to 10)")
    add("--kl-horizon", type=positive, default=1000, help="episodes in which kl_coef can change by a factor of 1.2")
    add("--kl-estimator", choices=("k1", "k2", "k3"), default="k1",
        help="ppo: per-token KL in the reward; only k1 also gives the KL's unbiased gradient")
    add("--ppo-epochs", type=count, default=2, help="passes over each rollout (usual: 1 to 4)")
    add("--minibatches", type=count, default=2, help="updates per pass (usual: 1 to 8)")
    add("--cliprange", type=positive, default=0.2, help="the ratio may leave 1 by this much (usual: 0.1 to 0.3)")
    add("--cliprange-value", type=positive, default=0.2,
        help="ppo: a value may move by this much from what it was at sampling")
    add("--vf-coef", type=number(float, 0), default=0.1, help="ppo: weight of the value loss")
    add("--gamma", type=share, default=1.0, help="ppo: discount per token; 1 for text")
    add("--lam", type=share, default=0.95, help="ppo: GAE lambda, 1 unbiased, 0 smallest variance (usual: 0.9 to 1)")
    add("--target-kl", type=positive,
        help="stop the passes over a rollout once approxkl exceeds this (usual: 0.01 to 0.1)")
    add("--whiten-rewards", action="store_true", help="ppo: scale per-token rewards to unit variance")
    add = parser.add_argument_group("run").add_argument
    add("--out", default="out", help="run folder: config, metrics, samples, checkpoints, final model")
    add("--overwrite", action="store_true", help="replace the run that --out holds")
    add("--resume", metavar="OUT", help="go on from the newest checkpoint of this run folder, with its flags")
    add("--accept-changes", action="store_true",
        help="resume even where the data, the base model or the reward file is not what the run began with")
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
    add("--amp", choices=tuple(AMP_DTYPES), default="no",
        help="compute in bf16 or fp16 (with loss scaling); weights and losses stay float32")
    add("--gradient-checkpointing", action="store_true",
        help="recompute activations in the backward pass: less memory, a third more time")
    add("--compile", action="store_true",
        help="torch.compile the model: slow to start, then faster on a GPU (on the CPU hardly)")
    add("--deepspeed", metavar="JSON",
        help="DeepSpeed configuration with ZeRO stage 1 or 2, under torchrun (optional package)")
    add("--dry-run", action="store_true", help="print the memory that this run would take on 1 to 8 devices, and exit")
    # fmt: on
    for extension in EXTENSIONS:
        extension.add_flags(parser)
    for algorithm in algorithms.values():
        if algorithm.add_flags is not None:
            algorithm.add_flags(parser)
    return parser


def parse_args(argv: list[str] | None, algorithms: dict[str, Algorithm]) -> argparse.Namespace:
    """The flags of a run; with --resume those of its config.json and what may change."""
    argv = join_metric(sys.argv[1:] if argv is None else argv)
    parser = make_parser(algorithms)
    args = parser.parse_args(argv)
    if args.resume is None:
        check_flags_matter(parser, args, algorithms)
        return args
    if args.overwrite:
        raise UserError("--resume goes on with a run, --overwrite replaces one; say one of the two")
    config = read_config(Path(args.resume))
    remembered = {
        name: config.get(name, value)
        for name, value in vars(args).items()
        if name not in NOT_REMEMBERED
    }
    remembered["out"] = args.resume
    parser.set_defaults(**dict.fromkeys(remembered))  # a flag that is not given again is None
    given = {
        name: value for name, value in vars(parser.parse_args(argv)).items() if value is not None
    }
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


def check_flags_matter(
    parser: Parser, args: argparse.Namespace, algorithms: dict[str, Algorithm]
) -> None:
    """Raises UserError for a flag of another algorithm or schedule, and for two flags that say one thing."""
    used_by = {name: (*entry.step_flags, *entry.flags) for name, entry in algorithms.items()}
    used_by |= {name: schedule.flags for name, schedule in schedules.SCHEDULES.items()}
    used_here = {*used_by[args.algorithm], *used_by[args.schedule]}
    for flag in dict.fromkeys(flag for flags in used_by.values() for flag in flags):
        if flag not in used_here and getattr(args, flag) != parser.get_default(flag):
            owners = [name for name, flags in used_by.items() if flag in flags]
            raise UserError(
                f"{spelled(flag)} belongs to {' and '.join(owners)} and does nothing here; leave it out"
            )
    if args.micro_batch_size is not None and args.grad_accum is not None:
        raise UserError(
            "--micro-batch-size and --grad-accum say the same in two ways; give one of them"
        )
    if args.schedule in ("gate", "buffer") and args.ppo_ratio != parser.get_default("ppo_ratio"):
        raise UserError(
            f"--schedule {args.schedule} follows the scores, not --ppo-ratio; leave that out"
        )


def resolve_length(args: argparse.Namespace, context: int) -> None:
    """Fill in --max-length. Raises UserError unless it fits the model's context and leaves room for a prompt."""
    if args.max_length is None:
        args.max_length = min(1024, context)
    if args.max_length > context:
        raise UserError(
            f"--max-length {args.max_length} is beyond the model's context of {context} tokens"
        )
    if args.max_new_tokens >= args.max_length:
        raise UserError(
            f"--max-new-tokens {args.max_new_tokens} leaves no room for a prompt in --max-length {args.max_length}"
        )


def limits_of(args) -> dict[str, int]:
    """How every row of a run is cut: the same prompt in every phase."""
    room = args.turns * args.max_new_tokens
    return dict(max_length=args.max_length, max_prompt_length=args.max_length - room)


def resolve_defaults(args: argparse.Namespace, algorithm: Algorithm, context: int) -> None:
    """Fill in the flags whose default depends on the model, and check those that must fit it and each other.

    `context` is the number of tokens that the model can look at together.
    """
    is_tiny = args.model == "tiny"
    resolve_length(args, context)
    if args.lr is None:
        for_tiny, for_others = DEFAULT_LR[args.optimizer]
        args.lr = for_tiny if is_tiny else for_others
    if (
        args.sft_warmup is None
    ):  # a model that has not learnt to write yet has nothing for PPO to improve
        args.sft_warmup = round(0.3 * args.steps) if is_tiny and args.ppo_ratio not in (0, 1) else 0
    if args.micro_batch_size is None:
        args.micro_batch_size = math.ceil(
            args.batch_size / (parallel.world() * (args.grad_accum or 1))
        )
    if args.kl_target is not None and (args.kl_coef == 0 or args.kl_horizon < args.batch_size):
        raise UserError(
            "--kl-target needs a --kl-coef above 0 (it is multiplied) and a --kl-horizon of at least the batch, "
            f"{args.batch_size}"
        )
    if args.batch_size < parallel.world():
        raise UserError(
            f"--batch-size {args.batch_size} counts all {parallel.world()} processes together; "
            "give each at least one row"
        )
    if args.group_size < algorithm.least_group:
        raise UserError(
            f"--algorithm {args.algorithm} compares responses to one prompt: "
            f"give --group-size {algorithm.least_group} or more, such as 4"
        )
    if args.batch_size % args.group_size:
        raise UserError(
            f"--group-size {args.group_size}: expected a divisor of --batch-size {args.batch_size}"
        )
    if args.prompts is not None and (args.ppo_ratio == 0 or not algorithm.samples):
        raise UserError(
            "--prompts are for steps that sample responses, and this run has none; leave it out"
        )
    if args.prompts is not None and args.schedule in ("gate", "buffer"):
        raise UserError(
            f"--schedule {args.schedule} demonstrates the prompts that score badly, and those of --prompts have no "
            "target; leave one of the two out"
        )
    if not algorithm.samples and (args.schedule != "ratio" or args.turns > 1):
        raise UserError(
            f"--algorithm {args.algorithm} samples nothing, so it goes with --schedule ratio and one turn"
        )
    for extension in EXTENSIONS:
        extension.check_flags(args)
    if (
        args.reward is None
        and args.ppo_ratio != 0
        and (algorithm.samples or args.data == "reviews")
    ):
        args.reward = "sentiment"
        if args.data != "reviews" and parallel.rank() == 0:
            print("no --reward was given: it is sentiment, praise minus blame by a word list")
