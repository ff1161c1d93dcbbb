"""Child processes that end when this process ends, so that nobody writes into a folder unseen.

An exception here, Ctrl-C (SIGINT) and SIGTERM end the children. SIGKILL cannot be handled, but on
Linux the kernel then ends them (`man 2 prctl`, PR_SET_PDEATHSIG). On other systems they go on after
a SIGKILL of this process: end them by hand before you repeat the command.
Left out on purpose: children of children. train.py has none but the workers of torch.compile, which
end by themselves when they lose their parent, and a short call of git.

    python compare.py --out compare            # end it as you like: no train.py goes on
"""

import ctypes
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

from engine import UserError

PR_SET_PDEATHSIG = 1  # linux/prctl.h
# Loaded here: between fork and exec a child of a process with threads may load nothing.
LIBC = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None


class Children:
    """`with Children() as children:` run commands, from several threads if you like. When the block
    is left by an exception, SIGTERM or SIGINT included, the children are ended at once.

    A thread that calls `run` must live until it returns: to the kernel it is the parent.
    """

    def __init__(self):
        self.lock = threading.Lock()
        self.running: set[subprocess.Popen] = set()
        self.is_over = False
        self.handlers: dict = {}  # of the two signals, what stood there before

    def __enter__(self) -> "Children":
        if threading.current_thread() is threading.main_thread():  # only it may set handlers
            for number in (signal.SIGINT, signal.SIGTERM):
                self.handlers[number] = signal.signal(number, stop)
        return self

    def __exit__(self, kind, problem, traceback) -> None:
        try:
            if self.handlers:
                ignore_signals()
        finally:
            if kind is not None:
                self.end()
            for number, handler in self.handlers.items():
                signal.signal(number, handler)

    def run(self, command: list[str], environment: dict, log: Path) -> int:
        """Run a command to its end; its output goes to `log`. -> the exit status.

        Raises UserError once the children have been ended.
        """
        with open(log, "wb") as file:
            # The lock: whoever ends the children waits until a child that starts can be found.
            with self.lock:
                if self.is_over:
                    raise UserError("interrupted")
                preparation = None if LIBC is None else end_with(os.getpid())
                outputs = dict(stdout=file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
                child = subprocess.Popen(
                    command, env=environment, preexec_fn=preparation, **outputs
                )
                self.running.add(child)
            status = child.wait()
        with self.lock:
            self.running.remove(child)
            if self.is_over:
                raise UserError("interrupted")
        return status

    def end(self) -> None:
        """End all children, and start no other one."""
        with self.lock:
            self.is_over = True
            for child in self.running:
                child.kill()  # at once: after SIGTERM, train.py would finish its step and save


def ignore_signals() -> None:
    """A second Ctrl-C or SIGTERM must not stop the end of the children halfway."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def stop(number: int, frame) -> None:
    """The first signal leaves `with` blocks by an exception; the others are ignored."""
    ignore_signals()
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise SystemExit(128 + number)


def end_with(parent: int) -> Callable[[], None]:
    """What a child does before it runs its command: ask the kernel to end it with its parent."""

    def ask() -> None:
        if LIBC.prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0) != 0:
            raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
        if os.getppid() != parent:  # it has died before the line above
            os._exit(1)

    return ask
