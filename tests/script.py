"""Run a script of the repository as `python SCRIPT ...` or `torchrun SCRIPT ...` would, but in
processes that have torch loaded.

Loading torch and transformers takes longer than most commands of the documents. On Linux one server
process loads them, and each command runs in a fork of it, as do the agent of a torchrun and its
processes; elsewhere each is a process of its own.
"""

import multiprocessing
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from conftest import ROOT

PRELOAD = [
    "train",
    "reward_model",
    "transformers.models.llama.modeling_llama",
    "transformers.models.gpt2.modeling_gpt2",
    "torch.distributed.run",
]


def new_process(target, *args) -> multiprocessing.Process:
    """A fork of the server that calls target(*args)."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    return context.Process(target=target, args=args)


def as_main(words: list[str], folder: Path) -> None:
    """The child: words are the script and its arguments; folder has its stdin, stdout, stderr."""
    os.chdir(folder)
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC if number else os.O_RDONLY
        os.dup2(os.open(name, flags, 0o644), number)
    sys.stdin = os.fdopen(0, closefd=False)
    sys.argv, sys.path[0] = words, str(folder)
    runpy.run_path(words[0], run_name="__main__")


def run_script(words: list[str], folder: Path, text: str = "") -> subprocess.CompletedProcess:
    """`python *words` in that folder, with `text` on stdin."""
    if sys.platform != "linux":
        command = [sys.executable, *words]
        return subprocess.run(
            command, cwd=folder, capture_output=True, text=True, input=text, timeout=120
        )
    (folder / "stdin").write_text(text, encoding="utf-8")
    child = new_process(as_main, words, folder)
    child.start()
    child.join(timeout=120)
    if child.is_alive():
        child.kill()
        raise subprocess.TimeoutExpired(words, 120)
    stdout, stderr = [(folder / name).read_text(encoding="utf-8") for name in ("stdout", "stderr")]
    return subprocess.CompletedProcess(words, child.exitcode, stdout, stderr)


def as_torchrun(words: list[str], folder: Path, log: Path, environment: dict) -> None:
    """The child of `Torchrun`: torchrun's own main, but its processes are forks too."""
    from torch.distributed import run
    from torch.distributed.launcher.api import elastic_launch

    def launch(config, entrypoint):
        config.start_method = "fork"
        return elastic_launch(config, entrypoint=as_script)

    os.environ.update(environment)  # the server may be older
    os.chdir(folder)
    for number in (1, 2):
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644), number)
    run.elastic_launch = launch
    run.main(words)


def as_script(unbuffered: str, *words: str) -> None:
    """A process of a torchrun, which would start it as `python -u *words`."""
    torch.set_num_threads(1)
    script = str(ROOT / words[0])
    sys.argv, sys.path[0] = [script, *words[1:]], str(Path(script).parent)
    runpy.run_path(script, run_name="__main__")


class Torchrun:
    """`torchrun *words`, started in a folder; `log` gets what its processes print."""

    def __init__(self, words: list, folder: Path, log: Path):
        folder.mkdir(parents=True, exist_ok=True)
        self.log, words = log, [str(word) for word in words]
        self.process = new_process(as_torchrun, words, folder, log, dict(os.environ))
        self.process.start()

    def wait(self) -> tuple[int, str]:
        """-> (exit status, what it printed). A hang is a failure."""
        self.process.join(timeout=120)
        hangs = self.process.is_alive()
        if hangs:
            self.process.terminate()  # it ends its processes, too
            self.process.join(timeout=40)
        said = self.log.read_text(encoding="utf-8")
        assert not hangs, said
        return self.process.exitcode, said


def copy_until(out: Path, to: Path, step: int) -> Path:
    """The run folder as it was when the process died after a checkpoint."""
    later = [path.name for path in out.glob("checkpoint-*") if int(path.name[11:]) > step]
    shutil.copytree(out, to, ignore=shutil.ignore_patterns("final", *later))
    assert (to / f"checkpoint-{step:06d}").is_dir()
    return to
