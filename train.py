"""Train any Hugging Face causal LM by alternating supervised fine-tuning (SFT) and PPO.

    python train.py                               # built-in task, tiny model, one to two minutes
    python train.py --model gpt2 --ppo-ratio 0.5  # any hub id or local folder
    torchrun --nproc_per_node=2 train.py          # data parallel (parallel.py)

The whole run is the loop in `train`. A step learns from demonstrations or from the reward: one SFT
update, or a rollout and PPO's updates on it (or what --algorithm names). All steps share one model,
one optimiser, one step counter. Left out on purpose: a Trainer, callbacks, configuration files.
"""

from flags import answer_early, parse_args

if __name__ == "__main__":
    answer_early()  # --help and wrong flags, before torch is loaded, which takes seconds

import argparse
import sys
import time

import transformers
from tqdm import tqdm

import cost
import distill
import dpo
import grpo
from data import demonstration_batch
from engine import NonFiniteReward, enter_phase, one_line_errors
from evaluate import measure, print_evaluation, print_summary
from lock import one_writer
from plan import TimeLeft
from ppo import collect_rollout, ppo_step
from prepare import prepare
from references import follow_policy, renew_reference
from runs import Algorithm, ProgressBar, Run, RunFolder, Stop, joined_processes
from schedules import SCHEDULES, leave_out, mixed_in
from schedules import is_ppo_step as is_ppo_step  # importable from here
from sft import sft_step


def train(args: argparse.Namespace, stop: Stop) -> dict[str, float]:
    """The whole run: step, write it down, measure, save. -> the last evaluation."""
    run = prepare(args, ALGORITHMS[args.algorithm])  # every mistake of the user shows here
    folder = RunFolder(args, run)  # with --resume it puts `run` back where it was
    if folder.owes_evaluation(run, args.eval_every):
        measure(run, args, folder)
        print_evaluation(run)
    folder.keep_old_run_if(stop)
    if folder.is_new:
        run.before, run.samples_before = run.after, run.samples_after

    time_left = TimeLeft(args, run, tqdm.write)
    with ProgressBar(args, run) as bar:
        while run.step < args.steps:
            with folder.nothing_lost(run):  # a failure ends the run, saved as of the last step
                started = time.perf_counter()
                phase, metrics = take_step(run, args)
                run.step += 1

                # ---- write it down
                lr = run.optimizer.param_groups[0]["lr"]
                metrics |= {"lr": lr, "seconds": time.perf_counter() - started}
                folder.write(run, phase, metrics)
                bar.show(metrics)
                time_left.saw(phase, metrics["seconds"])
                folder.count_lost_updates(run, phase, metrics)  # ten in a row end the run

                # ---- save, then measure: an evaluation that fails is made up by --resume
                is_last = run.step == args.steps
                if is_last:
                    folder.save(run, "final")
                elif stop.asked() or is_due(run.step, args.save_every):
                    folder.save_step(run)
                if is_last or (is_due(run.step, args.eval_every) and not stop.agreed):
                    measure(run, args, folder)
                    print_evaluation(run)
            if not is_last:
                stop.exit_if_asked(run.step, folder.out)

    print_summary(run, folder.out, args.keep_best)
    return run.after


def is_due(step: int, every: int) -> bool:
    """Is something due after step `step` that happens every `every` steps? 0: never."""
    return every > 0 and step % every == 0


def take_step(run: Run, args: argparse.Namespace) -> tuple[str, dict[str, float]]:
    """One step: learn from demonstrations, or from the reward. -> its name and its metrics."""
    if run.schedule.phase(run.step) == "sft":
        run.drawn = run.schedule.demonstrations() or run.sft_stream.next()
        return "sft", train_on_demonstrations(run, args, run.drawn)
    renew_reference(run, args)
    enter_phase(run.optimizer, args.algorithm, args.rl_lr * run.lr_factor(run.step))
    metrics = {f"{args.algorithm}/skipped_steps": 1.0}  # stays if the reward is not finite
    try:
        metrics = run.algorithm.train_on(run, args)
    except NonFiniteReward as problem:
        tqdm.write(f"step {run.step + 1}: {problem}")
    run.rl_steps += 1
    follow_policy(run, args)
    return args.algorithm, metrics


def train_on_demonstrations(run: Run, args: argparse.Namespace, examples) -> dict[str, float]:
    """SFT: one update on these examples."""
    enter_phase(run.optimizer, "sft", args.lr * run.lr_factor(run.step))
    batch = demonstration_batch(run.tokenizer, examples, **run.limits).to(run.device)
    return sft_step(run.model, batch, run.optimizer, **run.update)


def train_on_reward(run: Run, args: argparse.Namespace) -> dict[str, float]:
    """PPO, GRPO: sample responses, score them, update. On-policy, because they are sampled here."""
    algorithm, kl_coef = run.algorithm, run.kl_controller.value
    prompts = run.schedule.prompts(run.prompt_stream.next(), run.step)
    run.drawn = [example for example in prompts for _ in range(args.group_size)]
    rollout, metrics = collect_rollout(
        run.model, run.reference, run.tokenizer, run.drawn, run.reward, **run.rollout,
        kl_coef=0.0 if algorithm.kl_in_loss else kl_coef,
        turns=args.turns, user=run.user, turn_rewards=args.turn_rewards,
        generator=run.generator_of_step(args.seed),
    )  # fmt: skip
    metrics |= run.reward.metrics()

    options = {flag: getattr(args, flag) for flag in algorithm.step_flags}
    options |= dict(**run.update, temperature=args.temperature, generator=run.order_generator)
    if algorithm.kl_in_loss:
        options["kl_coef"] = kl_coef
    hard = run.schedule.after_rollout(run.drawn, run.reward.total)  # --schedule gate
    leave_out(rollout, run.drawn, hard)
    options |= mixed_in(run)  # --schedule mix
    metrics |= algorithm.step(run.model, rollout, run.optimizer, **options)
    if hard:
        metrics |= train_on_demonstrations(run, args, hard)

    metrics |= {**run.schedule.metrics(), "ppo/kl_coef": kl_coef}
    if metrics["ppo/unscored"] < 1:
        run.kl_controller.update(metrics["ppo/kl_k1"], args.batch_size)
    return metrics


UPDATES = ("ppo_epochs", "minibatches", "cliprange", "target_kl")
SAMPLING = ("group_size", "kl_coef", "kl_target", "kl_horizon", "missing_eos_penalty")
ADVANTAGES = ("kl_estimator", "gamma", "lam", "whiten_rewards")
# What --algorithm names. A new one is a file with its step, an import above, and an entry here.
ALGORITHMS = {
    "ppo": Algorithm(
        train_on_reward,
        ppo_step,
        step_flags=(*UPDATES, "cliprange_value", "vf_coef"),
        flags=(*SAMPLING, *ADVANTAGES),
    ),
    "grpo": Algorithm(
        train_on_reward,
        grpo.grpo_step,
        step_flags=(*UPDATES, "group_size"),
        flags=SAMPLING,
        least_group=2,
        kl_in_loss=True,
    ),
    "dpo": dpo.ALGORITHM,
    "distill": distill.ALGORITHM,
}


@one_line_errors
def main(argv: list[str] | None = None) -> dict[str, float]:
    """Run with command-line flags. -> the metrics of the last evaluation.

    A user's mistake is one line, and exit status 2.
    """
    if not sys.stderr.isatty():  # a log needs no bar of the weights that are loaded
        transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    with joined_processes():
        args = parse_args(argv, ALGORITHMS, SCHEDULES)
        if args.dry_run:
            return cost.print_estimate(args, ALGORITHMS[args.algorithm])
        with one_writer(args.resume or args.out), Stop() as stop:
            return train(args, stop)


if __name__ == "__main__":
    main()
