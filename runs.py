"""A run: its state, its folder, its log, its bar, and how it stops. Nothing here trains.

`Run` is what the loop of train.py reads and changes; `RunFolder` is its way to the disk
(checkpoints.py has the files).

    python train.py --resume out
"""

import importlib
import math
import signal
import sys
import threading
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tqdm import tqdm

import parallel
from best import check_metric
from checkpoints import (  # noqa: F401  (read_rows and checkpoints can be had from here too)
    append_rows,
    checkpoints,
    forget_after,
    load_checkpoint,
    open_run_folder,
    random_state,
    read_rows,
    replace_old_run,
    save_checkpoint,
    set_random_state,
    write_config,
)
from cli import bar_pace
from engine import LostUpdates, UserError
from flags import MAY_CHANGE_ON_RESUME, read_config
from hybrid import HybridModel

FAILED = "ended_by_a_failure"  # in config.json: the code of the reward may be mended
MAX_LOST = 10  # steps in a row without an update, after which the run ends


@dataclass(frozen=True)
class Algorithm:
    """An entry of the table ALGORITHMS in train.py: all that depends on the algorithm."""

    train_on: Callable  # train_on_reward or the like: (run, args) -> metrics, one step of the loop
    step: Callable  # its xxx_step(model, batch, optimizer, **options) -> metrics: the updates
    step_flags: tuple[str, ...] = ()  # flags that `step` takes as keyword arguments
    flags: tuple[str, ...] = ()  # other flags that matter to it, and not to every algorithm
    preference_pairs: Callable | None = None  # (args) -> the pairs that it learns from
    measure: Callable | None = None  # (run, args) -> more metrics of an evaluation, `eval/...`
    least_group: int = 1  # --group-size must be at least this
    kl_in_loss: bool = False  # its loss contains the KL (`step` takes kl_coef), not the reward
    from_teacher: bool = False  # it learns from --teacher; --reward is measured, and not trained on
    defaults: dict = field(default_factory=dict)  # of flags that have others without it
    check_flags: Callable | None = None  # (args): raises UserError for what does not go with it

    @property
    def samples(self) -> bool:
        """Does it learn from responses that are sampled in the run?"""
        return self.preference_pairs is None


@dataclass
class Run:
    """Everything that a step needs or changes. Made by `prepare`, changed by the loop."""

    algorithm: Algorithm
    model: HybridModel
    tokenizer: object
    held_out: list  # examples that are only measured on: the NLL
    held_out_prompts: list  # those that responses are sampled for: the reward
    held_out_pairs: list  # of preferences
    optimizer: torch.optim.Optimizer
    lr_factor: Callable[[int], float]  # step -> the share of the peak learning rate
    backend: object  # computes and applies gradients (engine.py)
    scaler: object  # of fp16, else None
    kl_controller: object
    schedule: object
    sft_stream: object
    prompt_stream: object
    pair_stream: object
    order_generator: torch.Generator  # orders the rows of PPO's minibatches
    sampling_generator: torch.Generator  # draws the responses; seeded at every step
    limits: dict  # max_length and max_prompt_length: how every row is cut
    update: dict  # keyword arguments of every xxx_step
    sampling: dict  # keyword arguments of sampling and of evaluation
    rollout: dict  # keyword arguments of collect_rollout, those of sampling among them
    checkpoint: Path | None = None  # what --resume goes on from
    fingerprint: dict = field(default_factory=dict)  # of what it learns from (fingerprint.py)
    reward: object = None  # None: pure SFT that measures no reward
    reference: object = None  # None until RL first starts
    user: object = None  # who answers in a dialogue
    drawn: list = field(default_factory=list)  # the examples of this step
    step: int = 0  # steps that are done
    rl_steps: int = 0
    skipped: int = 0  # steps in a row without an update
    before: dict | None = None  # the evaluation before training, and its samples
    samples_before: list | None = None
    after: dict | None = None  # the last evaluation, and its samples
    samples_after: list | None = None

    @property
    def device(self) -> torch.device:
        return self.model.value_head.weight.device

    def generator_of_step(self, seed: int) -> torch.Generator:
        """What draws the responses of this step. --seed, step and process have a seed of their own:
        there is room for a million steps on 1,024 processes."""
        return self.sampling_generator.manual_seed(
            (seed * 2**20 + self.step) * 2**10 + parallel.rank()
        )

    def stateful(self) -> dict:
        """Whatever has a state that a checkpoint must keep, by its name in trainer_state.pt."""
        things = {
            "optimizer": self.optimizer,
            "kl_controller": self.kl_controller,
            "schedule": self.schedule,
            "sft_stream": self.sft_stream,
            "prompt_stream": self.prompt_stream,
            "pair_stream": self.pair_stream,
            "reward": self.reward,
            "scaler": self.scaler,
        }
        if hasattr(self.backend, "state_dict"):  # ZeRO: the optimiser's state is spread out
            things["optimizer"] = self.backend
        return {name: thing for name, thing in things.items() if thing is not None}

    def counters(self) -> dict:
        """Other values that a checkpoint stores; they are restored by name."""
        names = ("step", "rl_steps", "skipped", "before", "samples_before")
        return {name: getattr(self, name) for name in names}


class RunFolder:
    """The folder of a run: opened, written and resumed here. Every process calls; process 0 writes.

    With --resume, `run` is put back where its newest checkpoint left it; `is_new` says that there
    was none. With --overwrite the old run stays until the first evaluation has passed.
    """

    def __init__(self, args, run: Run):
        if args.log != "none":
            require(args.log)
        self.out, self.steps, self.keep = Path(args.resume or args.out), args.steps, args.keep
        self.place = self.out  # where it writes
        self.saved = run.checkpoint  # the folder that holds the run as it is, if any
        self.is_new = run.checkpoint is None
        if not self.is_new:
            load_checkpoint(run.checkpoint, run)
            is_done = run.step == args.steps and self._is_measured(run)
            if run.step > args.steps or is_done:
                raise UserError(
                    f"--resume {self.out}: the run has done its {run.step} steps; "
                    "give more --steps to go on"
                )
            check_metric(run, args)
        if args.resume:
            changed = {name: getattr(args, name) for name in MAY_CHANGE_ON_RESUME}
            config = {**read_config(self.out), **changed}
            parallel.on_main(write_config, self.out, config)
        else:
            self.place = parallel.on_main(open_run_folder, self.out, vars(args))
        # A run that died before its first checkpoint starts again, so nothing of it is kept.
        parallel.on_main(forget_after, self.place, -1 if self.is_new else run.step)
        mirror = args.log if parallel.rank() == 0 else "none"
        self.log = MetricLog(self.out, mirror, vars(args))

    def write(self, run: Run, phase: str, metrics: dict[str, float]) -> None:
        parallel.on_main(self.log.write, self.place, run.step, phase, metrics)

    def write_samples(self, run: Run, samples: list[dict]) -> None:
        rows = [{"step": run.step, **sample} for sample in samples]
        parallel.on_main(append_rows, self.place / "samples.jsonl", rows)

    def save(self, run: Run, name: str) -> None:
        if run.reward is not None:
            run.reward.check_state()
        # On every process: the state of ZeRO's optimiser is spread over them.
        states = {name: thing.state_dict() for name, thing in run.stateful().items()}
        parallel.on_main(save_checkpoint, self.out / name, run, states, self.keep)
        self.saved = self.out / name
        parallel.on_main(self._note_failure, False)

    def step_folder(self, run: Run) -> Path:
        return self.out / f"checkpoint-{run.step:06d}"

    def save_step(self, run: Run) -> None:
        self.save(run, self.step_folder(run).name)

    def owes_evaluation(self, run: Run, every: int) -> bool:
        """Is there no evaluation of this step, though one is due: before the first step, or after
        the step at which the run was saved before its evaluation failed?"""
        is_last = run.step == self.steps  # killed after `final`, before its evaluation
        is_due = self.is_new or is_last or (every > 0 and run.step % every == 0)
        return is_due and not self._is_measured(run)

    def _is_measured(self, run: Run) -> bool:
        return parallel.on_main(self._last_evaluation) == run.step

    def _last_evaluation(self) -> int:
        rows = read_rows(self.place / "metrics.jsonl")
        return max((row["step"] for row in rows if row["phase"] == "eval"), default=-1)

    def keep_old_run_if(self, stop: "Stop") -> None:
        """Raises SystemExit where a signal came before anything of an old run was deleted."""
        if self.place != self.out and stop.asked():
            tqdm.write(f"stopped before the first step; {self.out} still holds the old run")
            raise SystemExit(128 + stop.agreed)

    @contextmanager
    def nothing_lost(self, run: Run):
        """Around a step: whatever fails in it ends the run, saved as of the last whole step, and a
        mended run goes on bit by bit. A second Ctrl-C alone saves nothing: it is to be quick."""
        if self.place != self.out:  # the first evaluation has passed
            parallel.on_main(replace_old_run, self.out)
            self.place = self.out
        head = Snapshot(run)
        try:
            yield
        except LostUpdates:  # it is saved
            parallel.on_main(self._note_failure, True)  # NaN may come from the reward
            raise
        # Whatever it is (a bug in a reward, sys.exit, a full disk), it goes on after the save.
        except (Exception, SystemExit) as problem:
            if parallel.world() > 1 and not isinstance(problem, UserError):
                raise  # the other processes may wait elsewhere, and a save needs them all
            saved = self._save_after_failure(run, head)
            parallel.on_main(self._note_failure, True)
            if isinstance(problem, UserError):
                raise UserError(f"{problem}{saved}") from None
            if isinstance(problem, SystemExit):
                raise UserError(f"something called sys.exit({problem.code!r}){saved}") from None
            tqdm.write(f"{type(problem).__name__}{saved}", file=sys.stderr)
            raise

    def _note_failure(self, failed: bool) -> None:
        """Note in config.json that the run failed; or no longer, once a checkpoint keeps the
        fingerprint of what was mended."""
        config = read_config(self.out)
        if failed != (FAILED in config):
            config.pop(FAILED, None)
            write_config(self.out, {**config, FAILED: True} if failed else config)

    def _save_after_failure(self, run: Run, head: "Snapshot") -> str:
        """Save as of the last whole step. -> what to say of it."""
        go_on = f"mend it and go on with --resume {self.out}"
        if run.step == head.step and head.weights_changed(run):
            return f"; it was in the middle of an update, so the newest checkpoint counts: {go_on}"
        if run.step == head.step:
            head.restore(run)
        if run.step == 0:
            return ""  # nothing to save yet
        is_last = run.step == self.steps
        folder = self.out / "final" if is_last else self.step_folder(run)
        if folder != self.saved:
            self.save(run, folder.name)
        if is_last:
            return f"; all steps are done, the model is in {folder}"
        return f"; saved as of step {run.step}: {go_on}"

    def count_lost_updates(self, run: Run, phase: str, metrics: dict[str, float]) -> None:
        """Write down the batch of a skipped update. MAX_LOST steps in a row without an update end
        the run with LostUpdates; the weights, those before the first of them, are saved."""
        if metrics.get("ppo/unscored") != 1:  # no answer from a judge is no lost gradient
            has_updated = any(name.endswith("/grad_norm") for name in metrics)
            run.skipped = 0 if has_updated else run.skipped + 1
        if skipped_updates(metrics):
            prompts = [example.prompt for example in run.drawn]
            row = {"step": run.step, "phase": phase, "prompts": prompts}
            file = self.out / "skipped.jsonl"
            parallel.on_main(append_rows, file, [row])
            tqdm.write(
                f"step {run.step}: {phase} reward or gradient not finite, update skipped; "
                f"the batch is in {file}"
            )
        if run.skipped == MAX_LOST:
            run.skipped = 0  # a resumed run has ten tries again
            folder = self.step_folder(run)
            self.save_step(run)
            raise LostUpdates(
                f"no finite reward and gradient in {MAX_LOST} steps in a row (now step "
                f"{run.step}); the last good weights are in {folder}, the batches in "
                f"{self.out / 'skipped.jsonl'}; start a new run from there with --model and a "
                "smaller --lr"
            )


class Snapshot:
    """All that a step changes before its first update, as it is now; the weights are not in it.

    Small things are copied; references and opponents are other models, replaced and never changed,
    so that holding them is enough.
    """

    SMALL = ("kl_controller", "schedule", "sft_stream", "prompt_stream", "pair_stream", "reward")
    HELD = ("step", "rl_steps", "skipped", "reference", "drawn")

    def __init__(self, run: Run):
        self.step = run.step
        self.held = {name: getattr(run, name) for name in self.HELD}
        stateful = run.stateful()
        self.states = {n: _copy(stateful[n].state_dict()) for n in self.SMALL if n in stateful}
        self.order = run.order_generator.get_state()
        self.random = random_state()
        self.versions = weight_versions(run.model)

    def weights_changed(self, run: Run) -> bool:
        return weight_versions(run.model) != self.versions

    def restore(self, run: Run) -> None:
        for name, value in self.held.items():
            setattr(run, name, value)
        for name, state in self.states.items():
            run.stateful()[name].load_state_dict(state)
        run.order_generator.set_state(self.order)
        set_random_state(self.random)


def weight_versions(model: torch.nn.Module) -> list[int]:
    """torch counts every change of a tensor in place, as an optimiser makes them."""
    return [parameter._version for parameter in model.parameters()]


def _copy(state):
    """A copy of dicts and lists; tensors in them are the same."""
    if isinstance(state, dict):
        return {name: _copy(value) for name, value in state.items()}
    return [_copy(value) for value in state] if isinstance(state, list) else state


def skipped_updates(metrics: dict[str, float]) -> float:
    """How many updates of a step were skipped because a gradient or a reward was not finite."""
    return sum(value for name, value in metrics.items() if name.endswith("/skipped_steps"))


# ---------------------------------------------------------------------------------- log, bar, stop


class MetricLog:
    """metrics.jsonl is the truth; Weights & Biases or TensorBoard may mirror it, step by step."""

    def __init__(self, out: Path, mirror: str, config: dict):
        self.mirror = mirror
        if mirror == "wandb":  # WANDB_MODE=offline works
            self.wandb = require("wandb").init(project="hybridtrainer", dir=str(out), config=config)
        if mirror == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter

            self.tensorboard = SummaryWriter(str(out / "tensorboard"))

    def write(self, out: Path, step: int, phase: str, metrics: dict[str, float]) -> None:
        """A number that is not finite (the loss of a skipped update) is left out: JSON has none."""
        metrics = {name: value for name, value in metrics.items() if math.isfinite(value)}
        append_rows(out / "metrics.jsonl", [{"step": step, "phase": phase, **metrics}])
        if self.mirror == "wandb":
            self.wandb.log(metrics, step=step)
        if self.mirror == "tensorboard":
            for name, value in metrics.items():
                self.tensorboard.add_scalar(name, value, step)
            self.tensorboard.flush()


def require(package: str):
    """The optional package of `--log`. Raises UserError that says how to install it."""
    try:
        return importlib.import_module(package)
    except ImportError:
        raise UserError(
            f"--log {package} needs the package {package}: pip install {package}"
        ) from None


class ProgressBar:
    """The bar, and behind it the latest SFT loss, score and KL, whichever phase is running."""

    METRICS = {
        "sft/loss": "loss", "ppo/score": "reward", "ppo/kl": "kl", "distill/kl": "kl/token",
    }  # fmt: skip

    def __init__(self, args, run: Run):
        self.values: dict[str, str] = {}
        self.bar = tqdm(
            total=args.steps, initial=run.step, desc="train", dynamic_ncols=True,
            mininterval=bar_pace(), disable=parallel.rank() > 0,
        )  # fmt: skip

    def __enter__(self) -> "ProgressBar":
        return self

    def __exit__(self, *exception) -> None:
        self.bar.close()

    def show(self, metrics: dict[str, float]) -> None:
        """One more step is done."""
        for name, label in self.METRICS.items():
            if name in metrics:
                self.values[label] = f"{metrics[name]:.3f}"
        self.bar.set_postfix(self.values, refresh=False)
        self.bar.update()


@contextmanager
def joined_processes():
    """`with joined_processes():` the processes that torchrun started work as one.

    Enter it before flags are read: where one process is refused, the others learn of its end.
    """
    parallel.join()
    yield
    parallel.finish()


class Stop:
    """`with Stop() as stop:` the first Ctrl-C (SIGINT) or SIGTERM only sets `signal`, so that the
    step is finished and saved; a second one acts at once."""

    def __init__(self):
        self.signal: int | None = None  # what this process got
        self.agreed: int | None = None  # what all processes know of since they last asked
        self.handlers: dict = {}  # what stood there before

    def __enter__(self) -> "Stop":
        if threading.current_thread() is threading.main_thread():  # only it may set handlers
            for number in (signal.SIGINT, signal.SIGTERM):
                self.handlers[number] = signal.signal(number, self.ask)
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def ask(self, number: int, frame) -> None:
        self.signal = number
        self.__exit__()
        tqdm.write("stopping after this step; again to stop now", file=sys.stderr)

    def asked(self) -> bool:
        """If one process got a signal, all of them stop. So every process must ask. A signal that
        comes while they ask counts the next time."""
        signals = [number for number in parallel.everybody(self.signal) if number is not None]
        self.agreed = signals[0] if signals else None
        return self.agreed is not None

    def exit_if_asked(self, step: int, out: Path) -> None:
        """Raises SystemExit, once `asked` was true and the step is saved."""
        if self.agreed is not None:
            tqdm.write(f"stopped after step {step}; go on with: python train.py --resume {out}")
            raise SystemExit(128 + self.agreed)
