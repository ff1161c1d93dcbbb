"""Two machines: two torchrun agents with a process each, on one machine here.

The agents read the commands of docs/speed.md as torchrun does. Agents and processes are forks of
one process that has torch loaded, since a start costs seconds; that is the only difference.
"""

import json
import os
import re
import shlex
import shutil
import signal
import socket
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file
from script import Torchrun, copy_until

from lock import one_writer
from train import main

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="the processes are forks"),
]
SPEED = re.sub(r"\s*\\\n\s*", " ", (ROOT / "docs/speed.md").read_text(encoding="utf-8"))
COMMANDS = re.findall(r"^torchrun --nnodes=2 .+$", SPEED, re.MULTILINE)  # of both machines
FLAGS = """--limit 60 --steps 4 --batch-size 5 --max-new-tokens 6 --eval-size 4 --eval-every 0
--save-every 2 --device cpu --max-length 32 --lr 3e-3 --warmup-steps 0 --micro-batch-size 2
--reward length""".split()


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def two_machines(folders, tmp_path: Path, *flags: list) -> list[Torchrun]:
    """The two commands of the page, each in its folder, with flags of its own after `train.py`."""
    port = free_port()
    machines = []
    for i, command in enumerate(COMMANDS):
        command = command.replace("first-machine", "127.0.0.1").replace("29500", port)
        command = command.replace("--nproc_per_node=8", "--nproc_per_node=1")
        words = shlex.split(command)[1:]
        words = [*words[: words.index("train.py") + 1], *map(str, flags[i])]
        machines.append(Torchrun(words, folders[i], tmp_path / f"log{i}"))
    return machines


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors") | load_file(folder / "value_head.safetensors")


def largest_gap(a: Path, b: Path) -> float:
    a, b = weights(a), weights(b)
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def test_the_page_has_two_commands_that_differ_in_the_number_of_the_machine():
    first, second = COMMANDS
    assert first.count("--node_rank=0") == 1
    assert second == first.replace("--node_rank=0", "--node_rank=1")


def test_machines_without_a_shared_folder_train_as_one_process_does(tiny_folder, tmp_path):
    flags = ["--model", tiny_folder, *FLAGS, "--ppo-ratio", "0", "--out", "out"]
    here = [tmp_path / "first", tmp_path / "second"]
    (status, said), (second, silent) = [
        machine.wait() for machine in two_machines(here, tmp_path, flags, flags)
    ]
    assert (status, second) == (0, 0), said + silent
    assert said.count("verdict:") == 1 and silent == ""
    assert (here[0] / "out/final").is_dir() and list(here[1].iterdir()) == []
    main([*map(str, flags[:-1]), str(tmp_path / "alone")])
    assert largest_gap(here[0] / "out/final", tmp_path / "alone/final") < 1e-5
    assert largest_gap(tmp_path / "alone/checkpoint-000002", tmp_path / "alone/final") > 1e-3


@pytest.fixture(scope="module")
def shared_run(tiny_folder, tmp_path_factory) -> Path:
    """A run with PPO that two machines made in a folder that both see."""
    tmp_path = tmp_path_factory.mktemp("shared")
    flags = ["--model", tiny_folder, *FLAGS, "--ppo-ratio", "0.5", "--out", "out"]
    both = [tmp_path / "both"] * 2
    ends = [machine.wait() for machine in two_machines(both, tmp_path, flags, flags)]
    assert [status for status, _ in ends] == [0, 0], ends
    return both[0] / "out"


def test_machines_go_on_from_a_shared_folder_and_each_is_a_process_like_any(shared_run, tmp_path):
    """Two machines with a process each are one machine with two processes: bit by bit."""
    assert {path.name for path in shared_run.iterdir()} == {
        "config.json", "metrics.jsonl", "samples.jsonl", "checkpoint-000002", "final",
    }  # fmt: skip
    for name in ("machines", "processes"):
        copy_until(shared_run, tmp_path / name / "out", 2)
    both = [tmp_path / "machines"] * 2
    ends = [m.wait() for m in two_machines(both, tmp_path, *[["--resume", "out"]] * 2)]
    words = ["--nproc_per_node=2", f"--master_port={free_port()}", "train.py", "--resume", "out"]
    ends.append(Torchrun(words, tmp_path / "processes", tmp_path / "log").wait())
    assert [status for status, _ in ends] == [0, 0, 0], ends
    for name in ("machines", "processes"):
        assert largest_gap(tmp_path / name / "out/final", shared_run / "final") == 0
    rows = map(json.loads, (shared_run / "metrics.jsonl").read_text().splitlines())
    assert sorted(row["phase"] for row in rows) == ["eval", "eval", "ppo", "ppo", "sft", "sft"]


LOST = "error{}: another process has ended, or cannot be reached ("
NO_FOLDER = "--resume out: nothing to resume there; expected a run folder with a config.json; every"
OTHER_FLAG = "error{}: process 1 has --lr 0.2, process 0 0.003; start torchrun with the same flags"
OTHER_DATA = "error{}: process 1 does not learn from what process 0 learns from: 3 examples instead"
OLD_COPY = (
    "error{}: --resume out: process 1 finds checkpoint-000002 there, and process 0 final; every"
)


REFUSED = {  # what is wrong -> how the line of each machine begins
    "a wrong flag": (LOST, "error in process 1: unrecognized arguments: --stepz 3"),
    "a lock": ("error: out is in use: process ", LOST),
    "no copy": (LOST, f"error in process 1: {NO_FOLDER}"),
    "an old copy": (OLD_COPY, OLD_COPY),
    "another flag": (OTHER_FLAG, OTHER_FLAG),
    "other data": (OTHER_DATA, OTHER_DATA),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_one_machine_lacks_ends_both_with_a_line(case, shared_run, tiny_folder, tmp_path):
    here = [tmp_path / "first", tmp_path / "second"]
    flags = ["--model", tiny_folder, *FLAGS, "--out", "out"]
    both = [flags, flags]
    if case == "a wrong flag":
        both = [flags, [*flags, "--stepz", "3"]]
    if case in ("no copy", "an old copy"):
        both = [["--resume", "out", "--steps", "6"]] * 2
        shutil.copytree(shared_run, here[0] / "out")
    if case == "an old copy":
        copy_until(shared_run, here[1] / "out", 2)
    if case == "another flag":
        both = [flags, [*flags, "--lr", "0.2"]]
    if case == "other data":
        for i in (0, 1):
            here[i].mkdir()
            rows = [json.dumps({"prompt": f"a{n}", "target": " b"}) for n in range(4 - i)]
            (here[i] / "data.jsonl").write_text("\n".join(rows))
        both = [[*flags, "--data", "data.jsonl"]] * 2
    with one_writer(str(here[0] / "out")) if case == "a lock" else nullcontext():
        ends = [machine.wait() for machine in two_machines(here, tmp_path, *both)]
    for (status, said), line, process in zip(ends, REFUSED[case], ("", " in process 1")):
        lines = [text for text in said.splitlines() if text.startswith("error")]
        assert status != 0 and len(lines) == 1, said
        assert lines[0].startswith(line.format(process)), lines


def test_a_signal_to_the_second_machine_stops_both_after_the_step(tiny_folder, tmp_path):
    flags = ["--model", tiny_folder, *FLAGS, "--steps", "100000", "--save-every", "0"]
    machines = two_machines([tmp_path / "first", tmp_path / "second"], tmp_path, flags, flags)
    out = tmp_path / "first/out"
    deadline = time.time() + 90
    while not (out / "metrics.jsonl").exists() or '"step": 2' not in (
        out / "metrics.jsonl"
    ).read_text(encoding="utf-8"):
        assert time.time() < deadline and machines[0].process.is_alive()
        time.sleep(0.05)
    os.kill(machines[1].process.pid, signal.SIGTERM)
    (status, said), (second, also) = [machine.wait() for machine in machines]
    [saved] = out.glob("checkpoint-*")
    assert int(saved.name[11:]) >= 2 and status != 0 and second != 0
    assert said.count(f"stopped after step {int(saved.name[11:])}; go on with") == 1, said
    assert "stopping after this step" in also and "\nerror" not in said + also, said + also
