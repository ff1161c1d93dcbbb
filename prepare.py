"""All that a run needs, made and checked before the first step.

`prepare(args, algorithm) -> Run` loads data, policy, reward, reference and user, and resolves the
flags whose default depends on them. Whatever the user got wrong is a UserError here; nothing is
written. Left out on purpose: the folder of the run (runs.py) and what --resume puts back into it.

    python train.py --help
"""

import torch

import parallel
from data import (
    BatchStream,
    Example,
    columns_of,
    data_options,
    encode_prompt,
    load_examples,
    load_pairs,
    split_examples,
)
from dialogue import load_user
from engine import (
    AMP_DTYPES,
    OPTIMIZERS,
    Backend,
    UserError,
    check_amp,
    compile_lm,
    make_scaler,
    pick_device,
)
from flags import resolve_defaults
from hybrid import HybridModel, build_tiny
from ppo import AdaptiveKLController
from references import ReferenceMixture, load_references
from rewards import build_reward
from runs import Algorithm, Run
from schedules import SCHEDULES


def prepare(args, algorithm: Algorithm) -> Run:
    """The state of a run at step 0. Raises UserError for whatever can be wrong."""
    device = parallel.start(pick_device(args.device))
    check_amp(args.amp, device)
    torch.manual_seed(args.seed)
    examples = load_examples(args.data, **data_options(args), seed=args.seed)
    train_examples, held_out = split_examples(examples)
    model, tokenizer = load_policy(args, train_examples, device)
    resolve_defaults(args, algorithm, model.max_positions)
    check_data(args, tokenizer, examples, train_examples)
    run = make_run(args, algorithm, model, tokenizer, train_examples, held_out[: args.eval_size])
    if args.reward is not None:  # pure SFT needs none, but measures one that is named
        run.reward = load_reward(args, run, examples, train_examples)
    run.reference = load_references(args, model, tokenizer)
    if isinstance(run.reference, ReferenceMixture):
        run.reference.check_names(examples)
    run.user = load_user(args, device)
    check_opponent(args, run)
    return run


def load_policy(args, train_examples: list[Example], device) -> tuple[HybridModel, object]:
    """The model that is trained, on its device, and its tokenizer."""
    if args.model == "tiny":
        texts = [example.prompt + example.target for example in train_examples]
        lm, tokenizer = build_tiny(texts, args.seed)
        model = HybridModel(lm)
    else:
        model, tokenizer = HybridModel.load(args.model, "--model")
    model.to(device).train()
    model.amp_dtype = AMP_DTYPES[args.amp]
    if args.compile:
        compile_lm(model)
    if args.gradient_checkpointing:
        options = {"use_reentrant": False}
        model.lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    return model, tokenizer


def check_data(args, tokenizer, examples: list[Example], train_examples: list[Example]) -> None:
    """Raises UserError where the data lack what the flags ask of them."""
    has_sft = args.ppo_ratio != 1 or args.sft_warmup or args.schedule != "ratio"
    if has_sft and not any(example.target for example in train_examples):
        raise UserError(
            f"--data {args.data} has no target to learn from: only --ppo-ratio 1 can use it"
        )
    has_user = args.user_model is not None or any(e.user_turns for e in train_examples)
    if args.turns > 1 and not has_user:
        raise UserError(
            f"--turns {args.turns}: nothing in --data {args.data} says what the user replies; "
            "give 'messages' or 'turns', or a --user-model"
        )
    for example in examples:
        if example.messages is not None:
            encode_prompt(tokenizer, example)  # a template that refuses a dialogue does so now


def make_run(args, algorithm, model, tokenizer, train_examples, held_out) -> Run:
    """Optimiser, streams of examples, schedule and generators around the model."""
    optimizer = OPTIMIZERS[args.optimizer](model, args.lr)
    scaler = make_scaler(args.amp, model.value_head.weight.device)
    if args.deepspeed:
        from zero import ZeroBackend  # an optional package

        backend = ZeroBackend(model, optimizer, args.deepspeed, args.max_grad_norm, args.amp)
    else:
        backend = Backend(model, scaler)
    with_target = [example for example in train_examples if example.target]
    pairs = []
    if algorithm.preference_pairs is not None:
        pairs = algorithm.preference_pairs(args, train_examples)
    prompts_at_once = args.batch_size // args.group_size
    return Run(
        algorithm=algorithm,
        model=model,
        tokenizer=tokenizer,
        held_out=held_out,
        optimizer=optimizer,
        backend=backend,
        scaler=scaler,
        kl_controller=AdaptiveKLController(args.kl_coef, args.kl_target, args.kl_horizon),
        schedule=SCHEDULES[args.schedule](
            train_examples,
            ppo_ratio=args.ppo_ratio,
            steps=args.steps,
            sft_warmup=args.sft_warmup,
            threshold=args.threshold,
            batch_size=args.batch_size,
        ),
        sft_stream=BatchStream(with_target, args.batch_size, seed=args.seed),
        prompt_stream=BatchStream(train_examples, prompts_at_once, seed=args.seed + 1),
        pair_stream=BatchStream(pairs, args.batch_size, args.seed),
        order_generator=torch.Generator().manual_seed(args.seed),
        sampling_generator=torch.Generator(model.value_head.weight.device),
        update=dict(
            micro_batch_size=args.micro_batch_size,
            max_grad_norm=args.max_grad_norm,
            backend=backend,
        ),
        sampling=dict(
            max_length=args.max_length,
            max_new_tokens=args.max_new_tokens,
            temperature=args.temperature,
        ),
    )


def load_reward(args, run: Run, examples: list[Example], train_examples: list[Example]):
    """The reward of --reward, tried on two held-out examples. Raises UserError if it fails."""
    context = dict(
        model=run.model.lm,
        tokenizer=run.tokenizer,
        device=run.device,
        documents=[example.prompt for example in train_examples],
        # for self_play
        reference=lambda: run.reference,
        policy=run.model,
        sampling=run.sampling,
        examples=examples,
        seed=args.seed,
    )
    if args.mixture_data is not None:
        context["mixture_pairs"] = load_pairs(
            args.mixture_data, encoding=args.encoding, what="--mixture-data"
        )
    reward = build_reward(args.reward, **context)
    probe = run.held_out[:2]
    with reward.frozen():
        prompts, targets = [e.prompt for e in probe], [e.target for e in probe]
        reward(prompts, targets, **columns_of(probe))
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
