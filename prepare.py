"""All that a run needs, made and checked before the first step.

`prepare(args, algorithm) -> Run` loads data, policy, reward, reference and user, and resolves the
flags whose default depends on them. Whatever the user got wrong is a UserError here; nothing is
written. Left out on purpose: the folder of the run (runs.py) and what --resume puts back into it.

    python train.py --help
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

import dialogue
import fingerprint
import lora
import parallel
import plan
import references
import schedules
import survey
from checkpoints import check_free, newest_checkpoint, read_state, recover
from data import (
    BatchStream,
    Example,
    Pair,
    data_options,
    load_examples,
    load_pairs,
    load_prompts,
    pair_options,
    review_pairs,
    split_examples,
    split_pairs,
    with_all_columns,
)
from dialogue import check_replies, load_user
from engine import (
    AMP_DTYPES,
    OPTIMIZERS,
    Backend,
    UserError,
    check_amp,
    compile_lm,
    learning_rate_factor,
    make_scaler,
    pick_device,
    seed_everything,
)
from fingerprint import used_paths
from flags import (
    DEFAULT_LR,
    NOT_REMEMBERED,
    RL_SHARE,
    limits_of,
    read_config,
    resolve_length,
    spelled,
)
from hints import Hints, check_prompts
from hybrid import HybridModel, build_tiny
from lm import load_tokenizer, release_files
from ppo import AdaptiveKLController
from references import ReferenceMixture, load_references
from rewards import build_reward
from runs import FAILED, Algorithm, Run
from schedules import SCHEDULES
from sources import name_of, without_target
from tasks import REVIEWS, task_of

SAMPLING_FLAGS = ("max_length", "max_new_tokens", "temperature")
ROLLOUT_FLAGS = (  # that collect_rollout (ppo.py) takes as keyword arguments
    *SAMPLING_FLAGS,
    "kl_estimator",
    "gamma",
    "lam",
    "whiten_rewards",
    "missing_eos_penalty",
    "micro_batch_size",
)


def prepare(args, algorithm: Algorithm) -> Run:
    """The state of a run at step 0. Raises UserError for whatever can be wrong."""
    lora.check_flags(args)
    device = parallel.start(pick_device(args.device))
    check_same_flags(args)
    check_amp(args.amp, device)
    seed_everything(args.seed)
    checkpoint = None
    if args.resume is None:
        parallel.on_main(check_free, Path(args.out), args.overwrite, used_paths(args))
    else:
        say_remembered(args)
        checkpoint = find_checkpoint(Path(args.resume))
    return assemble(args, algorithm, device, checkpoint)


def assemble(args, algorithm: Algorithm, device: torch.device, checkpoint: Path | None) -> Run:
    """`prepare` once folder and device are known. Nothing on the disk is changed. The weights are
    those of `checkpoint`, if there is one; `load_checkpoint` puts the rest of its state back."""
    say(plan.device_line(args, device))
    data = load_data(args, algorithm)
    say(plan.data_line(args, data.train, len(data.held_out), len(data.pairs)))
    learns_from = fingerprint.take(args, data)
    start = functools.partial(starting_model, args, data.train)
    model, tokenizer = load_policy(args, start, device, checkpoint)
    learns_from["tokens of the vocabulary"] = fingerprint.of_vocabulary(tokenizer)
    if args.lora is not None:  # a checkpoint does not hold the base
        learns_from["frozen weights of the base"] = fingerprint.of_frozen(model)
    check_same_data(learns_from)
    if checkpoint is not None:
        saved = read_state(checkpoint, mmap=True).get("fingerprint")
        may_be_mended = FAILED in read_config(Path(args.resume))
        fingerprint.check_unchanged(saved, learns_from, args.accept_changes, may_be_mended, say)
    resolve_defaults(args, algorithm, model.max_positions)
    check_data(args, tokenizer, data)
    run = make_run(args, algorithm, model, tokenizer, data)
    run.checkpoint, run.fingerprint = checkpoint, learns_from
    plan.say_run(args, run, data.train, say)
    if args.reward is not None:  # pure SFT needs none, but measures one that is named
        run.reward = load_reward(args, run, data, start)
    run.reference = load_references(args, model, tokenizer)
    if algorithm.from_teacher:
        say(plan.teacher_line(args, run))
    if isinstance(run.reference, ReferenceMixture):
        run.reference.check_names(data.train + data.held_out + data.pairs + data.held_out_pairs)
    run.user = load_user(args, device)
    check_opponent(args, run)
    return run


@dataclass
class Data:
    """What a run learns from, and what it is only measured on. No prompt is in both."""

    train: list[Example]
    held_out: list[Example]
    pairs: list[Pair] = field(default_factory=list)  # of an algorithm that learns from preferences
    held_out_pairs: list[Pair] = field(default_factory=list)

    def prompts(self, of_their_own: bool) -> tuple[list[Example], list[Example]]:
        """(train, held out) prompts of the steps with a reward: all, or those without a target,
        which are those of --prompts and what has none in --data."""
        if not of_their_own:
            return self.train, self.held_out
        return [e for e in self.train if not e.target], [e for e in self.held_out if not e.target]


def load_data(args, algorithm: Algorithm) -> Data:
    """Demonstrations, prompts and preference pairs, split. Without --data they are the built-in
    reviews; with preference pairs of the user's own, the chosen responses."""
    examples, pairs = None, []
    if args.data is not None:
        examples = load_examples(args.data, **data_options(args), seed=args.seed)
    if algorithm.preference_pairs is not None:
        pairs = algorithm.preference_pairs(args)
    if examples is None and pairs:
        say(
            "no --data was given: SFT learns from the chosen responses of --preference-data, and "
            "the evaluation is on its held-out pairs"
        )
        train_pairs, held_out_pairs = split_pairs(pairs)
        train, held_out = [[p.sides()[0] for p in part] for part in (train_pairs, held_out_pairs)]
        return keep_demonstrations(args, Data(train, held_out, train_pairs, held_out_pairs))
    if examples is None:
        args.data = "reviews"
        if args.model != "tiny":
            say("no --data was given: training is on the built-in film reviews")
        examples = load_examples(args.data, **data_options(args), seed=args.seed)
    data = Data(*split_examples(examples))
    if args.prompts is not None:
        add_prompts(data, load_prompts(args.prompts, **data_options(args), what="--prompts"))
    if algorithm.preference_pairs is not None and not pairs:
        data.pairs, data.held_out_pairs = review_pairs(data.train), review_pairs(data.held_out)
    elif pairs:
        data.pairs, data.held_out_pairs = split_pairs(pairs)
        data.pairs = without_prompts_of(data.pairs, data.held_out, "preference pairs")
        data.train = without_prompts_of(data.train, data.held_out_pairs, "examples")
    return keep_demonstrations(args, data)


def keep_demonstrations(args, data: Data) -> Data:
    """The data with --demonstrations targets to train on, the first ones. A reward still finds the
    others among the columns; with --prompts it asks those alone, and the others are left out.
    Preference pairs stay."""
    if args.demonstrations is None:
        return data
    kept, n = [], 0
    for example in data.train:
        if example.target and n < args.demonstrations:
            n += 1
            kept.append(example)
        elif not example.target:
            kept.append(example)
        elif args.prompts is None:
            kept.append(without_target(example))
    say(f"note: {n} of {len(kept)} training examples have a demonstration")
    return replace(data, train=kept)


def add_prompts(data: Data, prompts: list[Example]) -> None:
    """Prompts of --prompts join the data; no prompt is measured here and trained there."""
    both = with_all_columns([*data.train, *data.held_out, *prompts])
    n_train, n_data = len(data.train), len(data.train) + len(data.held_out)
    train, held_out = split_examples(both[n_data:])
    data.train, data.held_out = both[:n_train], both[n_train:n_data]
    train = without_prompts_of(train, data.held_out, "prompts")
    data.train = [*without_prompts_of(data.train, held_out, "examples"), *train]
    data.held_out = [*data.held_out, *held_out]


def without_prompts_of(records: list, held_out: list, what: str) -> list:
    """The records whose prompt is in none of the held-out ones; all of them if none is left."""
    prompts = {record.prompt for record in held_out}
    kept = [record for record in records if record.prompt not in prompts]
    if kept and len(kept) < len(records):
        n_left = len(records) - len(kept)
        say(f"note: {n_left} {what} are not trained: their prompts are held out")
    return kept or records


def say_remembered(args) -> None:
    """What a person should know of the config.json of a run that is resumed."""
    config = read_config(Path(args.resume))
    missing = [name for name in vars(args) if name not in config and name not in NOT_REMEMBERED]
    if missing:
        say(f"note: {args.resume}/config.json lacks {', '.join(missing)}: the defaults are taken")
    code, _ = fingerprint.named_in(args.reward)
    if code:
        say(f"this run executes the code of --reward {', '.join(code)}")


def find_checkpoint(out: Path) -> Path | None:
    """The checkpoint that --resume goes on from, once what a crash left is put in order."""
    parallel.on_main(recover, out)
    checkpoint = newest_checkpoint(out)
    names = parallel.everybody(None if checkpoint is None else checkpoint.name)
    for number, name in enumerate(names):
        if name != names[0]:
            raise UserError(
                f"--resume {out}: process {number} finds {name or 'no checkpoint'} there, and "
                f"process 0 {names[0] or 'none'}; every process must see the run folder, or a copy "
                "of it"
            )
    if checkpoint is None:
        say(f"{out} has no checkpoint yet: the run starts again")
    return checkpoint


def check_same_flags(args) -> None:
    """Raises UserError, on every process, where one was started with other flags: each machine has
    a torchrun of its own. The folder may differ, for process 0 alone writes."""
    flags = parallel.everybody(vars(args))
    for number, others in enumerate(flags):
        for name in sorted(others.keys() - {"out", "resume"}):
            if others[name] != flags[0][name]:
                raise UserError(
                    f"process {number} has {spelled(name)} {others[name]}, process 0 "
                    f"{flags[0][name]}; start torchrun with the same flags on every machine"
                )


def check_same_data(learns_from: dict[str, list]) -> None:
    """Raises UserError, on every process, where one would learn from something else."""
    fingerprints = parallel.everybody(learns_from)
    for number, others in enumerate(fingerprints):
        found = fingerprint.changes(fingerprints[0], others)
        if found:
            raise UserError(
                f"process {number} does not learn from what process 0 learns from: "
                f"{'; '.join(found.values())}; give every machine the same files"
            )


def say(line: str) -> None:
    """Print on process 0: what a person should know before training."""
    if parallel.rank() == 0:
        print(line)


def starting_model(args, train_examples: list[Example]) -> tuple[HybridModel, object]:
    """What --model names, as it is before any training, and its tokenizer."""
    kind, options = HybridModel, {}
    if args.lora is not None:
        kind = lora.LoraModel
        options = dict(rank=args.lora, alpha=args.lora_alpha, seed=args.seed)
        options["base_dtype"] = args.base_dtype
    if args.model != "tiny":
        return kind.load(args.model, "--model", **options)
    texts = [example.prompt + example.target for example in train_examples]
    lm, tokenizer = build_tiny(texts, args.seed)
    return kind(lm, **options), tokenizer


def load_policy(
    args, start: Callable, device, checkpoint: Path | None
) -> tuple[HybridModel, object]:
    """The model that is trained, on its device, and its tokenizer: those of `start()`; of a resumed
    run, both as they were saved, whatever --model and --data have become. With --lora the frozen
    base is that of `start()` again."""
    if checkpoint is None:
        model, tokenizer = start()
    elif args.lora is None:
        model, tokenizer = HybridModel.load(str(checkpoint), "--resume")
    else:
        model, tokenizer = start()[0], load_tokenizer(str(checkpoint), "--resume")
        model.load_own(checkpoint)
    model.to(device).train()
    release_files(model)
    model.amp_dtype = AMP_DTYPES[args.amp]
    if args.compile:
        compile_lm(model)
    if args.gradient_checkpointing:
        options = {"use_reentrant": False}
        model.lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    return model, tokenizer


def resolve_defaults(args, algorithm: Algorithm, context: int) -> None:
    """Fill in the flags whose default depends on the model; check what must fit it and each other.

    `context` is the number of tokens that the model can look at together. Raises UserError.
    """
    is_tiny, task = args.model == "tiny", task_of(args.data)
    learns_like = task or REVIEWS  # what the built-in model takes for data of the user's own
    resolve_length(args, context)
    if args.lr is None:
        for_tiny, for_others = DEFAULT_LR[args.optimizer]
        args.lr = for_tiny * learns_like.lr if is_tiny else for_others
    if args.rl_lr is None:
        args.rl_lr = args.lr * (RL_SHARE if is_tiny else 1.0)
    if args.sft_warmup is None:
        # A model that has not learnt to write yet has nothing for PPO to improve.
        needs_warmup = is_tiny and args.ppo_ratio not in (0, 1)
        args.sft_warmup = round(learns_like.warmup * args.steps) if needs_warmup else 0
    if args.micro_batch_size is None:
        parts = parallel.world() * (args.grad_accum or 1)
        args.micro_batch_size = math.ceil(args.batch_size / parts)
    if args.kl_target is not None and (args.kl_coef == 0 or args.kl_horizon < args.batch_size):
        raise UserError(
            "--kl-target needs a --kl-coef above 0 (it is multiplied) and a --kl-horizon of at "
            f"least the batch, {args.batch_size}"
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
            f"--schedule {args.schedule} demonstrates the prompts that score badly, and those of "
            "--prompts have no target; leave one of the two out"
        )
    needs_samples = args.schedule != "ratio" or args.turns > 1 or args.hints is not None
    if not algorithm.samples and needs_samples:
        raise UserError(
            f"--algorithm {args.algorithm} samples nothing, so it goes with --schedule ratio, one "
            "turn and no --hints"
        )
    for extension in (schedules, references, dialogue):
        extension.check_flags(args)
    if algorithm.check_flags is not None:
        algorithm.check_flags(args)
    learns_from_reward = algorithm.samples and not algorithm.from_teacher
    wants_reward = args.ppo_ratio != 0 and (learns_from_reward or task is not None)
    if args.reward is None and wants_reward:
        args.reward = "sentiment" if task is None else task.reward
        if task is None:
            say("no --reward was given: it is sentiment, praise minus blame by a word list")


def check_data(args, tokenizer, data: Data) -> None:
    """Leave out what the model cannot read and say what it will not read of the rest.

    Raises UserError where the data lack what the flags ask of them.
    """
    source = name_of(args.data or "given")
    has_sft = args.ppo_ratio != 1 or args.sft_warmup or args.schedule != "ratio"
    if has_sft and not any(example.target for example in data.train):
        raise UserError(
            f"--data {source} has no target to learn from: only --ppo-ratio 1 can use it"
        )
    prompts, held_out_prompts = data.prompts(args.prompts is not None)
    if args.ppo_ratio != 0 and not (prompts and held_out_prompts):
        raise UserError("--prompts needs two different prompts at least: one of them is held out")
    if args.hints is not None:
        n = check_prompts(tokenizer, prompts)
        say(f"note: {n} of {len(prompts)} prompts have a target that --hints can give words of")
    check_replies(args, prompts, source)
    limits = limits_of(args)
    survey.say_shared(data.train, data.held_out, say)
    data.train = survey.writable(tokenizer, data.train, args.strict, say)
    data.held_out = survey.writable(tokenizer, data.held_out, args.strict, say)
    data.pairs, data.held_out_pairs = [
        survey.comparable(tokenizer, pairs, limits, args.strict, say)
        for pairs in (data.pairs, data.held_out_pairs)
    ]
    own = data.train if args.data is not None else []  # else they are sides of the pairs
    survey.say_read(tokenizer, own, limits, say, data.pairs)


def make_run(args, algorithm, model, tokenizer, data: Data) -> Run:
    """Optimiser, streams of examples, schedule and generators around the model."""
    optimizer = OPTIMIZERS[args.optimizer](model, args.lr)
    scaler = make_scaler(args.amp, model.value_head.weight.device)
    if args.deepspeed:
        from zero import ZeroBackend  # an optional package

        backend = ZeroBackend(model, optimizer, args.deepspeed, args.max_grad_norm, args.amp)
    else:
        backend = Backend(model, scaler)
    with_target = [example for example in data.train if example.target]
    prompts, held_out_prompts = data.prompts(args.prompts is not None)
    prompts_at_once = args.batch_size // args.group_size
    return Run(
        algorithm=algorithm,
        model=model,
        tokenizer=tokenizer,
        held_out=data.held_out[: args.eval_size],
        held_out_prompts=held_out_prompts[: args.eval_size],
        held_out_pairs=data.held_out_pairs[: args.eval_size],
        optimizer=optimizer,
        lr_factor=learning_rate_factor(args.scheduler, args.steps, args.warmup_steps),
        backend=backend,
        scaler=scaler,
        kl_controller=AdaptiveKLController(args.kl_coef, args.kl_target, args.kl_horizon),
        schedule=make_schedule(args, prompts),
        sft_stream=BatchStream(with_target, args.batch_size, seed=args.seed),
        prompt_stream=BatchStream(prompts, prompts_at_once, seed=args.seed + 1),
        pair_stream=BatchStream(data.pairs, args.batch_size, args.seed),
        order_generator=torch.Generator().manual_seed(args.seed),
        sampling_generator=torch.Generator(model.value_head.weight.device),
        limits=limits_of(args),
        update=dict(
            micro_batch_size=args.micro_batch_size,
            max_grad_norm=args.max_grad_norm,
            backend=backend,
        ),
        sampling={flag: getattr(args, flag) for flag in SAMPLING_FLAGS},
        rollout={flag: getattr(args, flag) for flag in ROLLOUT_FLAGS},
    )


def make_schedule(args, prompts: list[Example]):
    """The schedule that --schedule names, or the one of --hints."""
    options = dict(
        ppo_ratio=args.ppo_ratio,
        steps=args.steps,
        sft_warmup=args.sft_warmup,
        threshold=args.threshold,
        batch_size=args.batch_size,
    )
    if args.hints is not None:
        return Hints(prompts, hints=args.hints, **options)
    return SCHEDULES[args.schedule](prompts, **options)


def load_reward(args, run: Run, data: Data, start: Callable):
    """The reward of --reward, tried on two held-out examples. Raises UserError if it fails."""
    context = dict(
        model=run.model.lm,
        tokenizer=run.tokenizer,
        device=run.device,
        documents=[example.prompt for example in data.train],
        # for self_play
        reference=lambda: run.reference,
        policy=run.model,
        sampling=run.sampling,
        examples=data.train + data.held_out,
        seed=args.seed,
    )
    if run.checkpoint is not None:  # run.model has been trained; a reward may ask the first one
        context["starting_model"] = start
    if args.mixture_data is not None:
        context["mixture_pairs"] = load_pairs(
            args.mixture_data, what="--mixture-data", **pair_options(args)
        )
    reward = build_reward(args.reward, **context)
    reward.try_on(run.held_out_prompts)
    return reward


def check_opponent(args, run: Run) -> None:
    """Raises UserError where self_play has nobody to play against."""
    opponent = None if run.reward is None else run.reward.opponent
    if opponent is None:
        return
    if args.turns > 1 and not args.turn_rewards:
        raise UserError(
            "self_play compares one response with one: with --turns above 1 it needs --turn-rewards"
        )
    if args.turns > 1 and run.tokenizer.chat_template:
        raise UserError(
            "self_play with --turns above 1 shows the opponent the plain rendering of a dialogue, "
            "but this model has a chat template of its own"
        )
    if opponent.kind == "reference" and isinstance(run.reference, ReferenceMixture):
        raise UserError(
            "self_play against the reference needs one reference: "
            "a mixture can be scored, but not sampled from"
        )
