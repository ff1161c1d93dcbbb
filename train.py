"""Train any Hugging Face causal LM by alternating supervised fine-tuning and PPO. The whole run is the loop in `run`.

    python train.py                                     # built-in task, tiny model, no download, about a minute on a laptop
    python train.py --model gpt2 --ppo-ratio 0.5        # any hub id or local folder
    torchrun --nproc_per_node=2 train.py                # data parallel (parallel.py)

Every step is one turn: an SFT update on demonstrations, or one of what takes turns with it: a PPO or GRPO rollout with its updates, or a
DPO update (`--schedule gate` and `mix` do both in one). All share one model, one optimiser and one step counter. Left out on purpose: a Trainer, callbacks, config files.
"""

import argparse
import math
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import torch
import transformers
from tqdm import tqdm

import cost
import parallel
from data import (
    BatchStream,
    add_data_flags,
    columns_of,
    data_options,
    demonstration_batch,
    encode_prompt,
    load_examples,
    load_pairs,
    split_examples,
)
from dialogue import ModelUser, scripted_user
from dpo import dpo_step, preference_batch, preference_pairs
from engine import (
    AMP_DTYPES,
    OPTIMIZERS,
    SCHEDULERS,
    Backend,
    NonFiniteReward,
    Parser,
    UserError,
    check_amp,
    compile_lm,
    learning_rate_factor,
    make_scaler,
    number,
    one_line_errors,
    pick_device,
)
from evaluate import evaluate, verdict
from grpo import grpo_step
from hybrid import HybridModel, build_tiny, merge
from ppo import AdaptiveKLController, FixedKLController, collect_rollout, ppo_step
from references import ReferenceMixture, parse_reference
from rewards import build_reward
from runs import (
    MetricLog,
    Stop,
    append_rows,
    forget_after,
    graceful_stop,
    load_checkpoint,
    newest_checkpoint,
    open_run_folder,
    read_config,
    read_rows,
    recover,
    require,
    save_checkpoint,
    write_config,
)
from schedules import SCHEDULES, is_ppo_step  # noqa: F401  (the rule of --ppo-ratio is part of this file's face)
from sft import sft_step
from zero import ZeroBackend

ON_THE_BAR = {"loss": "sft/loss", "reward": "ppo/score", "kl": "ppo/kl"}
ROLLS_OUT = ("ppo", "grpo")  # the algorithms that learn from what the policy samples
MAY_CHANGE = (
    "device",
    "steps",
    "eval_every",
    "eval_size",
    "save_every",
    "keep",
    "log",
)  # what a resumed run may do differently
EVERY_TIME = (
    "resume",
    "overwrite",
    "deepspeed",
    "dry_run",
)  # what is not remembered: said anew, or not, by whoever starts a run or goes on with it
MAX_SKIPPED = 10  # cycles in a row without a finite gradient, after which a run is lost and says so


# ------------------------------------------------------------------------------------------------ the run


def run(args: argparse.Namespace, stop: Stop) -> dict[str, float]:
    """Data in, phases alternate, metrics and checkpoints out. Returns the last evaluation; `stop` ends it after a step."""
    model, tokenizer, train_examples, held_out, reward, reference, user = prepare(args)
    device = next(model.parameters()).device
    optimizer = OPTIMIZERS[args.optimizer](model, args.lr)
    scaler = make_scaler(args.amp, device)
    backend = (
        ZeroBackend(model, optimizer, args.deepspeed, args.max_grad_norm, args.amp)
        if args.deepspeed
        else Backend(model, scaler)
    )
    factor = learning_rate_factor(args.scheduler, args.steps, args.warmup_steps)
    adaptive = args.kl_target is not None
    kl_controller = (
        AdaptiveKLController(args.kl_coef, args.kl_target, args.kl_horizon)
        if adaptive
        else FixedKLController(args.kl_coef)
    )
    sft_stream = BatchStream(
        [example for example in train_examples if example.target], args.batch_size, seed=args.seed
    )
    prompt_stream = BatchStream(
        train_examples, args.batch_size // args.group_size, seed=args.seed + 1
    )
    sizes = dict(
        ppo_ratio=args.ppo_ratio,
        steps=args.steps,
        sft_warmup=args.sft_warmup,
        threshold=args.threshold,
        batch_size=args.batch_size,
    )
    schedule = SCHEDULES[args.schedule](train_examples, **sizes)
    sampling_generator = torch.Generator(
        device
    )  # draws the responses; seeded at every step, for every process its own
    order_generator = torch.Generator().manual_seed(
        args.seed
    )  # orders the rows of PPO's minibatches
    update = dict(
        micro_batch_size=args.micro_batch_size, max_grad_norm=args.max_grad_norm, backend=backend
    )
    sampling = dict(
        max_length=args.max_length, max_new_tokens=args.max_new_tokens, temperature=args.temperature
    )
    stateful = dict(
        optimizer=backend if args.deepspeed else optimizer,
        kl_controller=kl_controller,
        schedule=schedule,
    )
    stateful |= dict(sft_stream=sft_stream, prompt_stream=prompt_stream)
    stateful["pair_stream"] = pair_stream = BatchStream(
        preference_pairs(args, train_examples), args.batch_size, args.seed
    )
    stateful |= {
        name: thing for name, thing in (("reward", reward), ("scaler", scaler)) if thing is not None
    }
    if args.log != "none":
        require(args.log)
    out = Path(args.resume or args.out)
    if args.resume:
        parallel.on_main(recover, out)
    checkpoint = newest_checkpoint(out) if args.resume else None
    if args.resume and not checkpoint and parallel.rank() == 0:
        print(f"{out} has no checkpoint yet: the run starts again")
    counters = dict(step=0, rl_steps=0, skipped=0, before=None, samples_before=None)
    if checkpoint:
        counters, reference = load_checkpoint(
            checkpoint, model, reference, stateful, order_generator
        )
        if counters["step"] >= args.steps:
            raise UserError(
                f"--resume {out}: the run has done its {counters['step']} steps; give more --steps to go on"
            )
    if args.resume:
        parallel.on_main(
            write_config,
            out,
            {**read_config(out), **{name: getattr(args, name) for name in MAY_CHANGE}},
        )
    else:
        parallel.on_main(open_run_folder, out, vars(args), args.overwrite)
    parallel.on_main(
        forget_after, out, counters["step"] if checkpoint else -1
    )  # a run that died before its first checkpoint starts again
    log = MetricLog(out, args.log if parallel.rank() == 0 else "none", vars(args))

    def evaluate_now(step: int) -> tuple[dict, list[dict]]:
        measure = dict(
            **sampling,
            reference=reference,
            batch_size=args.batch_size,
            micro_batch_size=args.micro_batch_size,
        )
        measure |= dict(seed=args.seed, is_reviews=args.data == "reviews")
        if reward is not None:
            reward.reference = reference
        try:
            metrics, samples = evaluate(model, tokenizer, held_out, **measure, reward=reward)
        except NonFiniteReward as problem:
            if step == 0:
                raise  # nothing is lost yet
            tqdm.write(f"step {step}: {problem}; this evaluation goes without the reward")
            metrics, samples = evaluate(model, tokenizer, held_out, **measure, reward=None)
        parallel.on_main(log.write, step, "eval", metrics)
        parallel.on_main(
            append_rows, out / "samples.jsonl", [{"step": step, **sample} for sample in samples[:3]]
        )
        return metrics, samples[:3]

    def save(name: str, step: int) -> None:
        counters = dict(
            step=step,
            rl_steps=rl_steps,
            skipped=skipped,
            before=before,
            samples_before=samples_before,
        )
        states = {
            name: thing.state_dict() for name, thing in stateful.items()
        }  # on every process: ZeRO's is spread over them
        parallel.on_main(
            save_checkpoint,
            out / name,
            model,
            tokenizer,
            reference,
            counters,
            states,
            order_generator,
            args.keep,
        )

    @contextmanager
    def nothing_lost(step: int):
        """A reward that raises in mid-run ends the run, but not before all is saved as it was at `step`; the prompts are drawn again."""
        place = prompt_stream.state_dict()
        try:
            yield
        except NonFiniteReward:
            raise
        except UserError as problem:
            if step == 0:
                raise
            if step == args.steps:
                save("final", step)
                raise UserError(
                    f"{problem}; all steps are done, the model is in {out / 'final'}"
                ) from None
            prompt_stream.load_state_dict(place)
            if not (out / f"checkpoint-{step:06d}").is_dir():
                save(f"checkpoint-{step:06d}", step)
            raise UserError(
                f"{problem}; saved as of step {step}: mend it and go on with --resume {out}"
            ) from None

    def learn_from_reward(step: int, drawn: list) -> dict[str, float]:
        """Sample, score, update: one rollout of PPO or GRPO, on-policy because it is taken here, after the SFT steps before it."""
        sampling_generator.manual_seed(
            (args.seed * 2**20 + step) * 2**10 + parallel.rank()
        )  # room for a million steps on 1,024 processes
        reward.reference = reference
        rollout, metrics = collect_rollout(
            model, reference, tokenizer, drawn, reward, **sampling,
            kl_coef=0.0 if args.algorithm == "grpo" else kl_controller.value, kl_estimator=args.kl_estimator, gamma=args.gamma, lam=args.lam,
            missing_eos_penalty=args.missing_eos_penalty, whiten_rewards=args.whiten_rewards,
            micro_batch_size=args.micro_batch_size, generator=sampling_generator,
            turns=args.turns, user=user, turn_rewards=args.turn_rewards,
        )  # fmt: skip
        metrics |= reward.metrics()
        hard = schedule.look(drawn, reward.total)
        # What is demonstrated below is not learnt from here. Advantages stay as they are: relative to all that was tried.
        shown_now = {id(example) for example in hard}
        rollout.response_mask &= torch.tensor(
            [id(example) not in shown_now for example in drawn], device=device
        )[:, None]
        update_rl = dict(
            **update, ppo_epochs=args.ppo_epochs, minibatches=args.minibatches, temperature=args.temperature,
            cliprange=args.cliprange, target_kl=args.target_kl, generator=order_generator,
        )  # fmt: skip
        sft_weight = schedule.sft_weight(step)
        if sft_weight:
            batch = demonstration_batch(tokenizer, sft_stream.next(), args.max_length).to(device)
            update_rl |= dict(demonstrations=batch, sft_weight=sft_weight)
        if args.algorithm == "grpo":
            metrics |= grpo_step(
                model,
                rollout,
                optimizer,
                **update_rl,
                group_size=args.group_size,
                kl_coef=kl_controller.value,
            )
        else:
            metrics |= ppo_step(
                model,
                rollout,
                optimizer,
                **update_rl,
                cliprange_value=args.cliprange_value,
                vf_coef=args.vf_coef,
            )
        if hard:
            metrics |= sft_step(
                model,
                demonstration_batch(tokenizer, hard, args.max_length).to(device),
                optimizer,
                **update,
            )
        metrics |= {
            **schedule.metrics(),
            "ppo/kl_coef": kl_controller.value,
        }  # grpo pays it in the loss, not in the reward
        if metrics["ppo/unscored"] < 1:
            kl_controller.update(metrics["ppo/kl_k1"], args.batch_size)
        return metrics

    first_step, rl_steps, skipped, before, samples_before = counters.values()
    if not checkpoint:
        before, samples_before = evaluate_now(0)
    shown = {}  # what stands behind the bar: the latest value of each, whichever phase is running
    pace = (
        0.1 if sys.stderr.isatty() else 10
    )  # seconds between two states of the bar: a log file needs few
    with tqdm(
        total=args.steps,
        initial=first_step,
        desc="train",
        dynamic_ncols=True,
        mininterval=pace,
        disable=parallel.rank() > 0,
    ) as bar:
        for step in range(first_step, args.steps):
            started = time.perf_counter()
            lr = args.lr * factor(step)
            for group in optimizer.param_groups:
                group["lr"] = lr
            if schedule.phase(step) == "sft":
                # ---- SFT: learn from demonstrations
                phase = "sft"
                drawn = schedule.demonstrations() or sft_stream.next()
                batch = demonstration_batch(tokenizer, drawn, args.max_length).to(device)
                metrics = sft_step(model, batch, optimizer, **update)
            else:
                if reference is None or (
                    args.ref_refresh and rl_steps and rl_steps % args.ref_refresh == 0
                ):
                    reference = (
                        model.frozen_copy()
                    )  # the policy as PPO first meets it: the KL must not undo what SFT has taught
                if args.algorithm == "dpo":  # ---- DPO: learn from preferences
                    phase, drawn = "dpo", pair_stream.next()
                    batch = preference_batch(
                        tokenizer, reference, drawn, args.max_length, args.micro_batch_size
                    )
                    metrics = dpo_step(model, batch, optimizer, **update, beta=args.beta)
                else:  # ---- PPO or GRPO: learn from the reward
                    phase = args.algorithm
                    try:
                        with nothing_lost(step):
                            drawn = [
                                example
                                for example in prompt_stream.next()
                                for _ in range(args.group_size)
                            ]
                            metrics = learn_from_reward(step, drawn)
                    except NonFiniteReward as problem:  # it never becomes an advantage; counted below like a gradient that is not finite
                        tqdm.write(f"step {step + 1}: {problem}")
                        metrics = {f"{phase}/skipped_steps": 1.0}
                rl_steps += 1
                if args.ref_ema:
                    merge(reference, model, 1 - args.ref_ema)
            # ---- bookkeeping
            metrics |= {"lr": lr, "seconds": time.perf_counter() - started}
            parallel.on_main(log.write, step + 1, phase, metrics)
            shown |= {
                name: f"{metrics[key]:.3f}" for name, key in ON_THE_BAR.items() if key in metrics
            }
            bar.set_postfix(shown, refresh=False)
            bar.update()
            if metrics.get("ppo/unscored") != 1:  # no answer from a judge is no lost gradient
                skipped = 0 if any(name.endswith("/grad_norm") for name in metrics) else skipped + 1
            if any(value for name, value in metrics.items() if name.endswith("/skipped_steps")):
                row = {
                    "step": step + 1,
                    "phase": phase,
                    "prompts": [example.prompt for example in drawn],
                }
                parallel.on_main(append_rows, out / "skipped.jsonl", [row])
                tqdm.write(
                    f"step {step + 1}: {phase} reward or gradient not finite, update skipped; the batch is in {out / 'skipped.jsonl'}"
                )
            if skipped == MAX_SKIPPED:
                skipped = 0  # whoever resumes has ten tries again
                save(
                    f"checkpoint-{step + 1:06d}", step + 1
                )  # the weights are those before the first of them
                raise UserError(
                    f"no finite reward and gradient in {MAX_SKIPPED} steps in a row (now step {step + 1}); the last good weights are in "
                    f"{out / f'checkpoint-{step + 1:06d}'}, the batches in {out / 'skipped.jsonl'}; start a new run from there with --model and a smaller --lr"
                )
            if step + 1 == args.steps or (args.eval_every and (step + 1) % args.eval_every == 0):
                with nothing_lost(step + 1):
                    after, samples_after = evaluate_now(step + 1)
                print_evaluation(step + 1, after, samples_after)
            if step + 1 == args.steps:
                break
            stop.signal = next(
                filter(None, parallel.everybody(stop.signal)), None
            )  # whoever was asked to stop, all do
            if stop.signal or (args.save_every and (step + 1) % args.save_every == 0):
                save(f"checkpoint-{step + 1:06d}", step + 1)
            if stop.signal:
                tqdm.write(
                    f"stopped after step {step + 1}; go on with: python train.py --resume {out}"
                )
                raise SystemExit(128 + stop.signal)
    save("final", args.steps)
    print_summary(out, before, after, samples_before, samples_after)
    print(verdict(read_rows(out / "metrics.jsonl")))
    return after


def prepare(args: argparse.Namespace):
    """Whatever can be wrong is wrong here, before the first step. -> model, tokenizer, examples, held-out examples, reward, reference, user."""
    device = parallel.start(pick_device(args.device))
    check_amp(args.amp, device)
    torch.manual_seed(args.seed)
    examples = load_examples(args.data, **data_options(args), seed=args.seed)
    train_examples, held_out = split_examples(examples)
    held_out = held_out[: args.eval_size]
    if args.model == "tiny":
        lm, tokenizer = build_tiny(
            [example.prompt + example.target for example in train_examples], args.seed
        )
        model = HybridModel(lm)
    else:
        model, tokenizer = HybridModel.load(args.model, "--model")
    model.to(device).train()
    model.amp_dtype = AMP_DTYPES[args.amp]
    if args.compile:
        compile_lm(model)
    if args.gradient_checkpointing:
        model.lm.gradient_checkpointing_enable(
            gradient_checkpointing_kwargs={"use_reentrant": False}
        )
    resolve_defaults(args, model)
    if not any(example.target for example in train_examples) and (
        args.ppo_ratio != 1 or args.sft_warmup or args.schedule != "ratio"
    ):
        raise UserError(
            f"--data {args.data} has no target to learn from: only --ppo-ratio 1 can use it"
        )
    if (
        args.turns > 1
        and args.user_model is None
        and not any(example.user_turns for example in train_examples)
    ):
        raise UserError(
            f"--turns {args.turns}: nothing in --data {args.data} says what the user replies; give 'messages' or 'turns', or a --user-model"
        )
    for example in examples:
        if example.messages is not None:
            encode_prompt(tokenizer, example)  # a chat template that refuses a dialogue does so now
    reward = reference = (
        None  # pure SFT loads neither; a reward that is named is measured all the same
    )
    if args.reward is not None:
        context = dict(
            model=model.lm,
            tokenizer=tokenizer,
            device=device,
            documents=[example.prompt for example in train_examples],
        )
        sampling = dict(
            max_length=args.max_length,
            max_new_tokens=args.max_new_tokens,
            temperature=args.temperature,
        )
        context |= dict(
            policy=model, sampling=sampling, examples=examples, seed=args.seed
        )  # for self_play
        if args.mixture_data is not None:
            context["mixture_pairs"] = load_pairs(
                args.mixture_data, encoding=args.encoding, what="--mixture-data"
            )
        reward = build_reward(args.reward, **context)
        if reward.opponent is not None and args.turns > 1 and not args.turn_rewards:
            raise UserError(
                "self_play compares one response with one: with --turns above 1 it needs --turn-rewards"
            )
        if reward.opponent is not None and args.turns > 1 and tokenizer.chat_template:
            raise UserError(
                "self_play with --turns above 1 shows the opponent the plain rendering of a dialogue, but this model has a chat template of its own"
            )
        probe = held_out[:2]  # a reward that cannot work on this data says so now, not at step 100
        with reward.frozen():
            reward(
                [example.prompt for example in probe],
                [example.target for example in probe],
                **columns_of(probe),
            )
    if args.ref_model and args.ppo_ratio != 0:
        references, weights = {}, {}
        for name, path, weight in map(parse_reference, args.ref_model):
            loaded, ref_tokenizer = HybridModel.load(path, "--ref-model")
            if ref_tokenizer.get_vocab() != tokenizer.get_vocab():
                raise UserError(
                    f"--ref-model {path} has another vocabulary than --model {args.model}, so their KL is undefined"
                )
            if args.max_length > loaded.max_positions:
                raise UserError(
                    f"--ref-model {path} has a context of {loaded.max_positions} tokens; --max-length is {args.max_length}"
                )
            if name in references:
                raise UserError(
                    f"--ref-model {name}: expected a name of its own for each, NAME=PATH:WEIGHT"
                )
            loaded.amp_dtype = AMP_DTYPES[
                args.amp
            ]  # the same arithmetic on both sides, or the KL is not 0 where they are equal
            references[name], weights[name] = loaded.frozen_copy().to(device), weight
            if args.compile:
                compile_lm(references[name])
        reference = (
            references[name] if len(references) == 1 else ReferenceMixture(references, weights)
        )
        if args.ref_ema and {n: p.shape for n, p in reference.named_parameters()} != {
            n: p.shape for n, p in model.named_parameters()
        }:
            raise UserError(
                f"--ref-ema averages weights, but --ref-model {path} and --model {args.model} differ in theirs"
            )
        if len(references) > 1:
            reference.check_names(examples)
            if (
                reward is not None
                and reward.opponent is not None
                and reward.opponent.kind == "reference"
            ):
                raise UserError(
                    "self_play against the reference needs one reference: a mixture can be scored, but not sampled from"
                )
    user = scripted_user
    if args.user_model is not None:
        user_model, user_tokenizer = HybridModel.load(args.user_model, "--user-model")
        if args.max_new_tokens >= user_model.max_positions:
            raise UserError(
                f"--user-model {args.user_model} has a context of {user_model.max_positions} tokens, no room for a dialogue and --max-new-tokens {args.max_new_tokens}"
            )
        user = ModelUser(user_model.to(device).eval(), user_tokenizer, args.max_new_tokens)
    return model, tokenizer, train_examples, held_out, reward, reference, user


def resolve_defaults(args: argparse.Namespace, model: HybridModel) -> None:
    """Fill in the flags whose default depends on the model, and check those that must fit it and each other."""
    tiny = args.model == "tiny"
    if args.max_length is None:
        args.max_length = min(256, model.max_positions)
    if args.max_length > model.max_positions:
        raise UserError(
            f"--max-length {args.max_length} is beyond the model's context of {model.max_positions} tokens"
        )
    if args.max_new_tokens >= args.max_length:
        raise UserError(
            f"--max-new-tokens {args.max_new_tokens} leaves no room for a prompt in --max-length {args.max_length}"
        )
    if args.kl_target is not None and (args.kl_coef == 0 or args.kl_horizon < args.batch_size):
        raise UserError(
            f"--kl-target needs a --kl-coef above 0 (it is multiplied) and a --kl-horizon of at least the batch, {args.batch_size}"
        )
    if args.sft_warmup is not None and args.sft_warmup >= args.steps and args.ppo_ratio != 0:
        raise UserError(
            f"--sft-warmup {args.sft_warmup} leaves no PPO step in --steps {args.steps}; for pure SFT say --ppo-ratio 0"
        )
    if args.lr is None:
        args.lr = 3e-3 if tiny else 1e-5
    if args.schedule != "ratio" and args.ppo_ratio == 0:
        raise UserError(
            f"--schedule {args.schedule} without PPO is pure SFT: say --ppo-ratio 0 alone"
        )
    if (
        args.sft_warmup is None
    ):  # a model that has not learnt to write yet has nothing for PPO to improve
        args.sft_warmup = round(0.3 * args.steps) if tiny and args.ppo_ratio not in (0, 1) else 0
    if args.batch_size < parallel.world():
        raise UserError(
            f"--batch-size {args.batch_size} counts all {parallel.world()} processes together; give each at least one row"
        )
    if args.batch_size % args.group_size or (args.algorithm == "grpo" and args.group_size < 2):
        raise UserError(
            f"--group-size {args.group_size}: expected a divisor of --batch-size {args.batch_size}, at least 2 for grpo"
        )
    if args.algorithm not in ROLLS_OUT and (args.schedule != "ratio" or args.turns > 1):
        raise UserError(
            f"--algorithm {args.algorithm} samples nothing, so it goes with --schedule ratio and one turn"
        )
    if args.turns == 1 and (args.turn_rewards or args.user_model):
        raise UserError("--turn-rewards and --user-model are for dialogues: give --turns above 1")
    if args.turns > 1 and args.schedule in ("gate", "buffer"):
        raise UserError("--turns above 1 goes with --schedule ratio or mix")
    if args.turns * args.max_new_tokens >= args.max_length:
        raise UserError(
            f"--turns {args.turns} of --max-new-tokens {args.max_new_tokens} leave no room for a prompt in --max-length {args.max_length}"
        )
    if (args.ref_ema or args.ref_refresh) and len(args.ref_model or []) > 1:
        raise UserError("--ref-ema and --ref-refresh move one reference, not a mixture of several")
    if args.micro_batch_size is None:
        args.micro_batch_size = math.ceil(
            args.batch_size / (parallel.world() * (args.grad_accum or 1))
        )
    if (
        args.reward is None
        and args.ppo_ratio != 0
        and (args.algorithm in ROLLS_OUT or args.data == "reviews")
    ):
        args.reward = "sentiment"
        if args.data != "reviews" and parallel.rank() == 0:
            print("no --reward was given: it is sentiment, praise minus blame by a word list")


# ------------------------------------------------------------------------------------------------ what a person sees


def print_estimate(args: argparse.Namespace) -> None:
    """--dry-run: what the run would take, from the model's config alone."""
    sizes = cost.TINY if args.model == "tiny" else cost.sizes_of(args.model)
    if args.optimizer != "adamw":
        print(f"--optimizer {args.optimizer} is counted like adamw")
    length = args.max_length or 256
    samples, learns = args.algorithm in ROLLS_OUT and args.ppo_ratio != 0, args.ppo_ratio != 0
    response = (
        args.max_new_tokens if samples and args.ppo_ratio == 1 else length
    )  # a demonstration or a preference may fill its row
    references = max(1, len(args.ref_model or [])) if learns else 0
    options = dict(
        length=length,
        response=response,
        amp=args.amp != "no",
        checkpointing=args.gradient_checkpointing,
        references=references,
    )

    def rows(
        devices: int,
    ) -> tuple[int, int]:  # that pass through the model together, and that are sampled together
        share = math.ceil(args.batch_size / devices)
        together = min(share, args.micro_batch_size or math.ceil(share / (args.grad_accum or 1)))
        return together * (
            1 if samples or not learns else 2
        ), share * samples  # a preference is two rows

    print(
        f"rows of {length} tokens"
        + f", {args.max_new_tokens} of them sampled" * samples
        + "; the formula is in cost.py"
    )
    print(cost.table(sizes, rows, **options))


def print_evaluation(step: int, metrics: dict[str, float], samples: list[dict]) -> None:
    numbers = "  ".join(
        f"{name.removeprefix('eval/')} {value:.3f}" for name, value in metrics.items()
    )
    tqdm.write(f"step {step}  {numbers}")
    for sample in samples[:3]:
        marks = "  ".join(
            f"{name} {sample[name]:+.2f}" for name in ("score", "kl") if name in sample
        )
        tqdm.write(
            f"    {one_line(sample['prompt'])} >>> {one_line(sample['response'])}    {marks}"
        )


def print_summary(
    out: Path, before: dict, after: dict, samples_before: list[dict], samples_after: list[dict]
) -> None:
    """What changed, in three lines."""
    reward = (
        f"reward {before['eval/reward']:+.3f} -> {after['eval/reward']:+.3f}, "
        if "eval/reward" in after
        else ""
    )
    kl = (
        f", KL to the reference {after['eval/kl']:.2f} nats a response"
        if "eval/kl" in after
        else ""
    )
    nll = (
        f"held-out NLL {before['eval/nll']:.3f} -> {after['eval/nll']:.3f}"
        if "eval/nll" in after
        else "no target to measure an NLL on"
    )
    print(f"{reward}{nll}{kl}; model in {out / 'final'}")
    for label, samples in (("before", samples_before), ("after ", samples_after)):
        print(
            f"{label}: "
            + " | ".join(
                one_line(sample["prompt"] + " >>> " + sample["response"]) for sample in samples[:2]
            )
        )


def one_line(text: str, width: int = 160) -> str:
    text = " ".join(text.split())
    return text if len(text) <= width else text[: width - 3] + "..."


# ------------------------------------------------------------------------------------------------ the flags


def ratio(text: str) -> float | tuple[float, float]:
    """`0.5`, or a ramp `0.1:0.9`."""
    parts = [number(float, 0, 1)(part) for part in text.split(":")]
    if len(parts) > 2:
        raise argparse.ArgumentTypeError(f"expected a number or start:end, found {text!r}")
    return parts[0] if len(parts) == 1 else tuple(parts)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__.splitlines()[0])
    count, positive, share = number(int, 1), number(float, 0, above=True), number(float, 0, 1)
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model",
        default="tiny",
        help="'tiny' (built here, 1 M parameters), a local folder, or a hub id such as gpt2",
    )
    group.add_argument(
        "--ref-model",
        action="append",
        metavar="REF",
        help="reference of the KL penalty, a folder or hub id; or several times NAME=PATH:WEIGHT, for their mixture (default: the policy when PPO first starts)",
    )
    group.add_argument(
        "--ref-refresh",
        type=number(int, 0),
        default=0,
        help="renew the reference every N PPO steps; 0 never does",
    )
    group.add_argument(
        "--ref-ema",
        type=number(float, 0, 1),
        default=0.0,
        help="after every PPO step the reference becomes this much of itself and the rest of the policy (0.99); 0 never moves it",
    )
    group = parser.add_argument_group("data")
    group.add_argument(
        "--data",
        default="reviews",
        help="'reviews' (built in), a .jsonl .json .csv .parquet .txt file, or a hub dataset id",
    )
    add_data_flags(group)
    group.add_argument(
        "--max-length",
        type=number(int, 2),
        help="tokens of prompt and response together (default: 256, or the model's context)",
    )
    group = parser.add_argument_group("schedule and optimiser")
    group.add_argument(
        "--algorithm",
        choices=("ppo", "grpo", "dpo"),
        default="ppo",
        help="what takes turns with SFT",
    )
    group.add_argument(
        "--schedule",
        choices=tuple(SCHEDULES),
        default="ratio",
        help="whose turn it is; ratio: by --ppo-ratio; gate, buffer: SFT on prompts that score low; mix: both losses in one update",
    )
    group.add_argument(
        "--threshold",
        type=number(float, -1e9),
        default=0.0,
        help="gate, buffer: a prompt whose responses all score below this is hard",
    )
    group.add_argument(
        "--steps", type=count, default=700, help="optimiser cycles, SFT and PPO together"
    )
    group.add_argument(
        "--ppo-ratio",
        type=ratio,
        default=0.5,
        help="share of cycles that are PPO (GRPO, DPO): 0 pure SFT, 1 none, 0.1:0.9 a ramp; weight of RL in --schedule mix; gate and buffer go without",
    )
    group.add_argument(
        "--sft-warmup",
        type=number(int, 0),
        help="SFT cycles before the first PPO one (default: 30%% of a mixed run of 'tiny', else 0)",
    )
    group.add_argument(
        "--batch-size",
        type=count,
        default=32,
        help="demonstrations of an SFT step, episodes of a PPO step, pairs of a DPO step, of all processes together",
    )
    group.add_argument(
        "--micro-batch-size",
        type=count,
        help="rows per forward and backward on each process; changes memory, not results (default: its share of the batch)",
    )
    group.add_argument(
        "--grad-accum",
        type=count,
        help="the same, said as the number of parts, or a few less, that each process cuts its share of the batch into",
    )
    group.add_argument(
        "--lr",
        type=positive,
        help="peak learning rate (default: 3e-3 for 'tiny', else 1e-5; 1e-6 to 1e-3)",
    )
    group.add_argument(
        "--optimizer",
        choices=tuple(OPTIMIZERS),
        default="adamw",
        help="torch's own; muon takes the matrices, AdamW the rest",
    )
    group.add_argument(
        "--scheduler",
        choices=tuple(SCHEDULERS),
        default="linear",
        help="learning rate after the warm-up; wsd decays in the last fifth",
    )
    group.add_argument(
        "--warmup-steps",
        type=number(int, 0),
        default=20,
        help="steps over which the learning rate rises",
    )
    group.add_argument("--max-grad-norm", type=positive, default=1.0, help="gradient clipping")
    group = parser.add_argument_group("ppo")
    group.add_argument(
        "--reward",
        help="reward expression, such as '0.7*rouge_l + 0.3*bleu' or my.py:function (default: sentiment)",
    )
    group.add_argument(
        "--group-size",
        type=count,
        default=1,
        help="responses to each prompt; grpo compares them (4 to 16), and they are part of --batch-size",
    )
    group.add_argument(
        "--preference-data", help="dpo: preference pairs (default: made from the built-in task)"
    )
    group.add_argument(
        "--beta",
        type=positive,
        default=0.1,
        help="dpo: how close to the reference (0.05 to 0.5; smaller is freer)",
    )
    group.add_argument(
        "--mixture-data",
        help="preference pairs (prompt, chosen, rejected) that fit the weights of a mixture(...) reward",
    )
    group.add_argument(
        "--max-new-tokens", type=count, default=32, help="length limit of a response, EOS included"
    )
    group.add_argument(
        "--turns",
        type=count,
        default=1,
        help="responses in an episode: above 1 it is a dialogue, with the user turns of the data or --user-model",
    )
    group.add_argument("--user-model", help="a folder or hub id of a causal LM that plays the user")
    group.add_argument(
        "--turn-rewards",
        action="store_true",
        help="a score for each response of a dialogue instead of one at its end",
    )
    group.add_argument(
        "--temperature",
        type=number(float, 0.01),
        default=1.0,
        help="divides the logits of policy, old policy and reference (0.7 to 1)",
    )
    group.add_argument(
        "--kl-coef",
        type=number(float, 0),
        default=0.05,
        help="price of one nat of KL, in units of reward (0.01 to 0.2)",
    )
    group.add_argument(
        "--kl-target",
        type=positive,
        help="adapt the price until a response has this KL, in nats (1 to 10)",
    )
    group.add_argument(
        "--kl-horizon",
        type=positive,
        default=1000,
        help="episodes in which the price can change by a factor of 1.2",
    )
    group.add_argument(
        "--kl-estimator",
        choices=("k1", "k2", "k3"),
        default="k1",
        help="ppo: per-token KL in the reward; only k1 also gives the KL's unbiased gradient",
    )
    group.add_argument(
        "--ppo-epochs", type=count, default=2, help="passes over each rollout (1 to 4)"
    )
    group.add_argument(
        "--minibatches", type=count, default=2, help="optimiser steps per pass (1 to 8)"
    )
    group.add_argument(
        "--cliprange",
        type=positive,
        default=0.2,
        help="the ratio may leave 1 by this much (0.1 to 0.3)",
    )
    group.add_argument(
        "--cliprange-value",
        type=positive,
        default=0.2,
        help="ppo: a value may leave its old self by this much",
    )
    group.add_argument(
        "--vf-coef", type=number(float, 0), default=0.1, help="ppo: weight of the value loss"
    )
    group.add_argument(
        "--gamma", type=share, default=1.0, help="ppo: discount per token; 1 for text"
    )
    group.add_argument(
        "--lam",
        type=share,
        default=0.95,
        help="ppo: GAE lambda, 1 unbiased, 0 smallest variance (0.9 to 1)",
    )
    group.add_argument(
        "--target-kl",
        type=positive,
        help="stop the passes over a rollout once approxkl exceeds this (0.01 to 0.1)",
    )
    group.add_argument(
        "--whiten-rewards",
        action="store_true",
        help="ppo: scale per-token rewards to unit variance",
    )
    group.add_argument(
        "--missing-eos-penalty",
        type=number(float, 0),
        default=0.0,
        help="taken off the score of a response that hit the length limit",
    )
    group = parser.add_argument_group("run")
    group.add_argument(
        "--out",
        default="out",
        help="run folder: config, metrics, samples, checkpoints, final model",
    )
    group.add_argument("--overwrite", action="store_true", help="replace the run that --out holds")
    group.add_argument(
        "--resume",
        metavar="OUT",
        help="go on from the newest checkpoint of this run folder, with its flags",
    )
    group.add_argument(
        "--eval-every",
        type=number(int, 0),
        default=100,
        help="steps between evaluations; 0 only at the start and the end",
    )
    group.add_argument(
        "--eval-size", type=count, default=256, help="held-out examples per evaluation"
    )
    group.add_argument(
        "--save-every",
        type=number(int, 0),
        default=100,
        help="steps between checkpoints; 0 only the final model",
    )
    group.add_argument("--keep", type=count, default=2, help="checkpoints to keep, the newest ones")
    group.add_argument(
        "--log",
        choices=("none", "wandb", "tensorboard"),
        default="none",
        help="mirror of metrics.jsonl (optional packages)",
    )
    group.add_argument(
        "--seed",
        type=number(int, 0, 2**32 - 2),
        default=0,
        help="of model, data order and sampling: the same seed, the same run",
    )
    group.add_argument(
        "--amp",
        choices=tuple(AMP_DTYPES),
        default="no",
        help="compute in bf16 or fp16 (with loss scaling); weights and losses stay float32",
    )
    group.add_argument(
        "--gradient-checkpointing",
        action="store_true",
        help="recompute activations in the backward pass: less memory, a third more time",
    )
    group.add_argument(
        "--compile",
        action="store_true",
        help="torch.compile the model: slow to start, then faster on a GPU (on the CPU hardly)",
    )
    group.add_argument(
        "--deepspeed",
        metavar="JSON",
        help="DeepSpeed configuration with ZeRO stage 1 or 2, under torchrun (optional package)",
    )
    group.add_argument(
        "--dry-run",
        action="store_true",
        help="print the memory that this run would take on 1 to 8 devices, and exit",
    )
    group.add_argument("--device", default="auto", help="auto, cuda, mps or cpu")
    args = parser.parse_args(argv)
    if args.resume is None:
        check_flags_matter(parser, args)
        return args
    if args.overwrite:
        raise UserError("--resume goes on with a run, --overwrite replaces one; say one of the two")
    config = read_config(Path(args.resume))
    remembered = {
        name: config.get(name, default)
        for name, default in vars(args).items()
        if name not in EVERY_TIME
    }
    remembered["out"] = args.resume
    parser.set_defaults(**dict.fromkeys(remembered))  # what is not said again is None
    said = {
        name: value
        for name, value in vars(parser.parse_args(argv)).items()
        if name in remembered and value is not None
    }
    if "out" in said and Path(said["out"]).resolve() == Path(args.resume).resolve():
        said["out"] = args.resume
    for name, value in said.items():
        if remembered[name] != value and name not in MAY_CHANGE:
            raise UserError(
                f"--{name.replace('_', '-')} {value} contradicts the run that is resumed, which has {remembered[name]}; leave the flag out"
            )
    return argparse.Namespace(**{**vars(args), **remembered, **said})


# What belongs to some algorithms or schedules alone
OWNERS = {"threshold": ("gate", "buffer")}
OWNERS |= dict.fromkeys(("beta", "preference_data"), ("dpo",))
OWNERS |= dict.fromkeys(
    ("kl_estimator", "cliprange_value", "vf_coef", "gamma", "lam", "whiten_rewards"), ("ppo",)
)
OWNERS |= dict.fromkeys(
    (
        "group_size",
        "kl_coef",
        "kl_target",
        "kl_horizon",
        "ppo_epochs",
        "minibatches",
        "cliprange",
        "target_kl",
        "missing_eos_penalty",
    ),
    ROLLS_OUT,
)


def check_flags_matter(parser: Parser, args: argparse.Namespace) -> None:
    """A flag that does nothing in this run is refused."""
    for name, owners in OWNERS.items():
        if getattr(args, name) != parser.get_default(name) and not {
            args.algorithm,
            args.schedule,
        } & set(owners):
            raise UserError(
                f"--{name.replace('_', '-')} belongs to {' and '.join(owners)} and does nothing here; leave it out"
            )
    if args.micro_batch_size is not None and args.grad_accum is not None:
        raise UserError(
            "--micro-batch-size and --grad-accum say the same in two ways; give one of them"
        )
    if args.schedule in ("gate", "buffer") and args.ppo_ratio != parser.get_default("ppo_ratio"):
        raise UserError(
            f"--schedule {args.schedule} follows the scores, not --ppo-ratio; leave that out"
        )


@one_line_errors
def main(argv: list[str] | None = None) -> dict[str, float]:
    """Run with command-line flags; returns the metrics of the last evaluation. A user's mistake exits with status 2 and one line."""
    transformers.utils.logging.disable_progress_bar()  # one bar is enough: ours
    transformers.utils.logging.set_verbosity_error()
    args = parse_args(argv)
    if args.dry_run:
        return print_estimate(args)
    with graceful_stop() as stop:
        metrics = run(args, stop)
    parallel.finish()
    return metrics


if __name__ == "__main__":
    main()
