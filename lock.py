"""One writer for a run folder: a second process is refused in one line, and the first goes on.

The lock is the operating system's own, on the file `.lock` in the folder. It ends with the process,
however that dies, so a file that a killed process left is no obstacle. Left out on purpose: waiting
for the other process.

    python train.py --out out & python train.py --out out      # the second one is refused
"""

import errno
import os
import re
from contextlib import contextmanager, suppress
from pathlib import Path

from cli import UserError

if os.name == "nt":
    import msvcrt
else:
    import fcntl

LOCK_FILE = ".lock"
OURS = r"(process \d+\n)?"  # what is in it
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # of some network file systems


@contextmanager
def one_writer(out: str):
    """`with one_writer(out):` no other process writes in this folder, which is made if need be.

    Of several processes that torchrun started, the first one holds the lock. Raises UserError
    where another process writes there, and where the folder cannot be made.
    """
    if os.environ.get("RANK", "0") != "0":
        yield
        return
    if not out.strip():
        raise UserError("--out is empty; give it the name of a folder")
    folder = Path(out)
    is_new = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = _open_locked(folder / LOCK_FILE)
    except OSError as problem:
        raise UserError(f"--out {out} cannot be written: {problem.strerror or problem}") from None
    try:
        yield
    finally:
        if os.name == "nt":  # it deletes no open file
            file.close()
        with suppress(OSError):  # on Windows another process may have it open
            (folder / LOCK_FILE).unlink()
        file.close()
        if is_new:
            with suppress(OSError):  # only an empty folder goes: nothing was written
                folder.rmdir()


def _open_locked(path: Path):
    """The lock file, open, with the lock. Raises UserError where another process has it, and for a
    file of that name that no run made, which stays as it is."""
    while True:
        if path.is_symlink():  # it may lead to any file of yours
            raise UserError(f"{path} is a symbolic link, and no lock of a run; move it away")
        file = path.open("a+", encoding="utf-8")
        if not _lock(file):
            file.seek(0)
            holder = file.read().strip() or "another process"
            file.close()
            raise UserError(
                f"{path.parent} is in use: {holder} writes there; wait for its end, or give "
                "another --out"
            )
        # The one that had the lock may have deleted the file while it was opened here.
        if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
            break
        file.close()
    file.seek(0)
    if not re.fullmatch(OURS, file.read(100)):
        file.close()
        raise UserError(f"{path} is no lock of a run: something else is in it; move it away")
    file.truncate(0)
    file.write(f"process {os.getpid()}\n")
    file.flush()
    return file


def _lock(file) -> bool:
    """False: another process has the lock."""
    try:
        if os.name == "nt":
            file.seek(2**30)  # a byte that nobody reads: others could not read a locked one
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError as problem:
        if problem.errno not in NO_LOCKS:
            raise
        print(f"note: no locks in {Path(file.name).parent}: start no second run in this folder")
    return True
