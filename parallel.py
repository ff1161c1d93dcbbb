"""Several processes as one: each holds the whole model and knows the whole batch, and does its share of the rows.

    torchrun --nproc_per_node=2 train.py                       # data parallel on this machine: gloo on the CPU, nccl on GPUs
    torchrun --nproc_per_node=2 train.py --deepspeed zero.json # optimiser state (and gradients) split as well: ZeRO-1, ZeRO-2

Work on rows is shared out in four places: sampling (`generate.py: sample`), scoring (`hybrid.py: forward_rows`), rewards
(`rewards.py: Reward`) and gradients (`engine.py: accumulate`). What each finds is put together again at once, in the order of one process, so
whitening, means, metrics, early stopping and learned statistics see the whole batch on every process, and no algorithm knows how many there are. Everything
that is drawn from a seed is drawn alike, but for the responses: each process samples its own prompts. Rows go round like cards (`x[rank::world]`).

In one process all of this costs nothing. Left out on purpose: splitting the model itself.
"""

import os
import sys

import torch
import torch.distributed as dist


def start(device: torch.device) -> torch.device:
    """Join the processes that torchrun (or deepspeed) started, if it did. -> the device of this process."""
    if "WORLD_SIZE" not in os.environ or int(os.environ["WORLD_SIZE"]) == 1:
        return device
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)  # where nccl puts the objects it carries
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    if rank() > 0:
        sys.stdout = open(
            os.devnull, "w"
        )  # one process speaks for all; errors, on stderr, each for itself
    return device


def finish() -> None:
    """Leave together."""
    if dist.is_initialized():
        dist.destroy_process_group()


def world() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Which of them this is, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def share(rows):
    """The rows (a list or a tensor) that this process works on."""
    return rows[rank() :: world()]


def gather(rows: list) -> list:
    """The inverse: each process brings what it made of its share, all get the whole list in its first order. Tensors must be on the CPU."""
    if world() == 1:
        return rows
    shares = everybody(rows)
    whole: list = [None] * sum(map(len, shares))
    for r, part in enumerate(shares):
        whole[r :: world()] = part
    return whole


def everybody(thing) -> list:
    """-> the list of every process's `thing`, by rank."""
    if world() == 1:
        return [thing]
    things: list = [None] * world()
    dist.all_gather_object(things, thing)
    return things


def on_main(function, *args):
    """Files and other things that must happen once: call it on rank 0 alone; its result, or what it raises, is everybody's."""
    if world() == 1:
        return function(*args)
    outcome = [None, None]
    if rank() == 0:
        try:
            outcome[0] = function(*args)
        except Exception as problem:  # raised below, on every process
            outcome[1] = problem
    dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]
