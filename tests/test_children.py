"""Children end with their parent, whatever ends it: real processes, real signals."""

import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT

from children import Children
from engine import UserError

# Two children that write down their process id and then wait; two more jobs in the queue.
PARENT = """
import os, sys
from concurrent.futures import ThreadPoolExecutor
from children import Children
child = "import os, sys, time; open(sys.argv[1], 'w').write(str(os.getpid())); time.sleep(600)"
def run(name):
    return children.run([sys.executable, "-c", child, name], dict(os.environ))
with ThreadPoolExecutor(2) as pool, Children() as children:
    list(pool.map(run, sys.argv[1:]))
"""


def wait_until(is_true, seconds: float = 60) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if is_true():
            return True
        time.sleep(0.02)
    return False


def is_running(pid: int) -> bool:
    """A zombie, which nobody has waited for, runs no more."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc; SIGKILL is handled on Linux")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_children_end_with_their_parent(tmp_path, number):
    files = [tmp_path / name for name in "abcd"]
    command = [sys.executable, "-c", PARENT, *map(str, files)]
    parent = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
    assert wait_until(lambda: all(file.exists() and file.read_text() for file in files[:2]))
    pids = [int(file.read_text()) for file in files[:2]]
    assert all(map(is_running, pids))
    parent.send_signal(number)
    code = parent.wait(timeout=20)
    assert code == {signal.SIGTERM: 128 + 15}.get(number, -number)
    assert wait_until(lambda: not any(map(is_running, pids)), seconds=5)
    assert not files[2].exists() and not files[3].exists(), "what was in the queue is not begun"


def test_a_command_gives_its_output_and_status_and_handlers_come_back():
    before = signal.getsignal(signal.SIGTERM)
    with Children() as children:
        script = "import os, sys; print(os.environ['WORD']); sys.exit('no: ' + sys.argv[1])"
        done = children.run([sys.executable, "-c", script, "x"], {**os.environ, "WORD": "yes"})
        assert (done.stdout, done.stderr, done.returncode) == ("yes\n", "no: x\n", 1)
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before
    children.end()
    with pytest.raises(UserError, match="interrupted"):
        children.run([sys.executable, "-c", ""], dict(os.environ))
