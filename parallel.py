"""Several processes as one: each holds the whole model and works on its share of the rows.

    torchrun --nproc_per_node=2 train.py            # gloo on the CPU, nccl on GPUs
    torchrun --nproc_per_node=2 train.py --deepspeed examples/zero.json

Four places share out rows: sampling (`generate.sample`), log-probabilities (`hybrid.forward_rows`),
rewards (`rewards.Reward`), gradients (`engine.accumulate`). Process r takes rows r, r + world,
r + 2 world, ... Their results are gathered at once, in the order of one process. So whitening,
means, metrics, early stopping and learned statistics see the whole batch on every process, and no
algorithm knows how many processes there are. All random draws are the same on every process, except
the responses: each process samples those of its own prompts.

In one process every function here returns at once. Left out on purpose: splitting the model itself.
"""

import os
import sys
from contextlib import contextmanager

import torch
import torch.distributed as dist
from tqdm import tqdm

from cli import LostProcess, first_line


def join() -> None:
    """Join the processes that torchrun (or deepspeed) started, unless that is done.

    Do it before anything that may fail: torchrun ends the other processes of its own machine, but
    those of another machine would wait for one that never joins for half an hour.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        return
    # Python objects take gloo on GPUs too: it notices at once that another process has ended.
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    if rank() > 0:
        sys.stdout = open(
            os.devnull, "w", encoding="utf-8"
        )  # Only process 0 prints. Every process may print errors.


def start(device: torch.device) -> torch.device:
    """`join`, and -> the device of this process: on every machine, GPUs count from 0."""
    join()
    if world() > 1 and device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    return device


def finish() -> None:
    """Leave the group of processes that `start` joined."""
    if dist.is_initialized():
        dist.destroy_process_group()


def world() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def note(text: str) -> None:
    """Say `note: text` on process 0: on stderr, so that what is printed stays apart, and above a
    progress bar."""
    if rank() == 0:
        tqdm.write(f"note: {text}", file=sys.stderr)


def share(rows):
    """The rows (a list or a tensor) that this process works on."""
    return rows[rank() :: world()]


def gather(rows: list) -> list:
    """The inverse of `share`: all rows, in order, on every process. Tensors must be on the CPU."""
    if world() == 1:
        return rows
    shares = everybody(rows)
    whole: list = [None] * sum(map(len, shares))
    for r, rows_of_r in enumerate(shares):
        whole[r :: world()] = rows_of_r
    return whole


def everybody(thing) -> list:
    """-> a list: the `thing` that each process has, in the order of ranks. Raises LostProcess."""
    if world() == 1:
        return [thing]
    objects: list = [None] * world()
    with _others():
        dist.all_gather_object(objects, thing)
    return objects


def on_main(function, *args):
    """Call a function on process 0 alone, as for writing a file.

    Every process returns its result, or raises the exception that it raised. Raises LostProcess.
    """
    if world() == 1:
        return function(*args)
    outcome = [None, None]
    if rank() == 0:
        try:
            outcome[0] = function(*args)
        except Exception as problem:  # raised below, on every process
            outcome[1] = problem
    with _others():
        dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


@contextmanager
def _others():
    """Around an exchange with the other processes."""
    try:
        yield
    except RuntimeError as problem:
        # gloo: "[a source file] Connection closed by peer [address]. This is typically caused ..."
        reason = first_line(problem).split("] ", 1)[-1].split(". ")[0]
        raise LostProcess(
            f"another process has ended, or cannot be reached ({reason}); its own message says why"
        ) from None
