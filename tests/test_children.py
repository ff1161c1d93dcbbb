"""Children end with their parent, whatever ends it: real processes, real signals."""

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import ROOT

from children import Children
from engine import UserError

# Two children that write down their process id and then wait; two more jobs in the queue.
PARENT = """
import os, sys, time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
import children as module
from children import Children
child = "import os, sys, time; open(sys.argv[1], 'w').write(str(os.getpid())); time.sleep(600)"
class Slow(module.subprocess.Popen):
    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        time.sleep(float(os.environ["UNREGISTERED"]))
module.subprocess.Popen = Slow
def run(name):
    command = [sys.executable, "-c", child, name]
    return children.run(command, dict(os.environ), Path(name + ".log"))
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
@pytest.mark.parametrize("unregistered", [0, 2])  # seconds between a start and `running.add`
def test_children_end_with_their_parent(tmp_path, number, unregistered):
    files = [tmp_path / name for name in "abcd"]
    if unregistered:  # the lock lets one child start at a time
        files = files[:1]
    command = [sys.executable, "-c", PARENT, *map(str, files)]
    environment = {**os.environ, "UNREGISTERED": str(unregistered)}
    parent = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL, env=environment)
    try:
        assert wait_until(lambda: all(file.exists() and file.read_text() for file in files[:2]))
        pids = [int(file.read_text()) for file in files[:2]]
        assert all(map(is_running, pids))
    finally:
        parent.send_signal(number)
    parent.send_signal(number)  # an impatient user: the second one must not stop the first
    code = parent.wait(timeout=20)
    # Once the children have ended, the second SIGTERM may end the parent as any process.
    assert code in ((128 + 15, -15) if number == signal.SIGTERM else (-number,))
    assert wait_until(lambda: not any(map(is_running, pids)), seconds=5)
    assert not any(file.exists() for file in files[2:]), "what was in the queue is not begun"


def test_a_second_signal_does_not_stop_the_end_of_the_children(monkeypatch, tmp_path):
    """Signals come at the worst time: while the first child of two has been ended."""
    command = [sys.executable, "-c", "import time; time.sleep(600)"]
    kill = subprocess.Popen.kill

    def kill_and_signal(child):
        kill(child)
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(subprocess.Popen, "kill", kill_and_signal)
    statuses = []

    def run(name):
        with pytest.raises(UserError, match="interrupted"):
            children.run(command, dict(os.environ), tmp_path / name)
        statuses.append(name)

    with pytest.raises(ZeroDivisionError), ThreadPoolExecutor(2) as pool, Children() as children:
        futures = [pool.submit(run, name) for name in "ab"]
        assert wait_until(lambda: len(children.running) == 2)
        raise ZeroDivisionError
    assert sorted(statuses) == ["a", "b"] and all(future.done() for future in futures)


def test_a_command_gives_its_status_a_log_has_its_output_and_handlers_come_back(tmp_path):
    both = (signal.SIGINT, signal.SIGTERM)
    before, log = [signal.getsignal(number) for number in both], tmp_path / "log"
    with Children() as children:
        script = "import os, sys; print(os.environ['WORD'], flush=True); sys.exit('no: é')"
        environment = {**os.environ, "WORD": "yes", "PYTHONIOENCODING": "utf-8"}
        assert children.run([sys.executable, "-c", script], environment, log) == 1
        assert log.read_text(encoding="utf-8") == "yes\nno: é\n"
        for number, handler in zip(both, before):
            assert signal.getsignal(number) != handler
    assert [signal.getsignal(number) for number in both] == before
    children.end()
    with pytest.raises(UserError, match="interrupted"):
        children.run([sys.executable, "-c", ""], dict(os.environ), log)
