"""Run a script of the repository as `python SCRIPT ...` would, in a process that has torch loaded.

Loading torch and transformers takes longer than most commands of the documents. On Linux one server
process loads them, and each command runs in a fork of it; elsewhere each is a process of its own.
"""

import multiprocessing
import os
import runpy
import subprocess
import sys
from pathlib import Path

PRELOAD = [
    "train",
    "reward_model",
    "transformers.models.llama.modeling_llama",
    "transformers.models.gpt2.modeling_gpt2",
]


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
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    (folder / "stdin").write_text(text, encoding="utf-8")
    child = context.Process(target=as_main, args=(words, folder))
    child.start()
    child.join(timeout=120)
    if child.is_alive():
        child.kill()
        raise subprocess.TimeoutExpired(words, 120)
    stdout, stderr = [(folder / name).read_text(encoding="utf-8") for name in ("stdout", "stderr")]
    return subprocess.CompletedProcess(words, child.exitcode, stdout, stderr)
