"""Lock open files. The kernel releases a lock when the last process that has the file open ends.

Not every file system has locks: Lustre needs the mount option `flock`, NFS a running lock daemon.
"""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import IO

from hpc.cli import UserError, named_wait

# tries to take the lock in another process: exit code 0 on success, 1 if the file is locked
_CONTENDER = (
    "import fcntl, sys\n"
    "try: fcntl.flock(open(sys.argv[1], 'a'), fcntl.LOCK_EX | fcntl.LOCK_NB)\n"
    "except BlockingIOError: sys.exit(1)\n"
)


def take_lock(file: IO[str], kind: int = fcntl.LOCK_EX, wait: bool = False) -> bool:
    """Lock an open file.

    Args:
        file: open for writing for `LOCK_EX`, for reading for `LOCK_SH`, as NFS requires.
        kind: `fcntl.LOCK_EX` or `fcntl.LOCK_SH`.
        wait: whether to wait for a lock that another process holds.

    Returns:
        False if another process holds the lock and `wait` is False, else True.

    Raises:
        UserError: the file system has no locks.
    """
    if _lock(file, kind | fcntl.LOCK_NB):
        return True
    if wait:
        with named_wait(f"the lock {file.name}, which another process holds"):
            _lock(file, kind)
    return wait


def _lock(file: IO[str], operation: int) -> bool:
    try:
        fcntl.flock(file, operation)
    except BlockingIOError:
        return False
    except OSError as error:
        raise _without_locks(Path(str(file.name)).parent, error) from error
    return True


def require_locks(folder: Path) -> str:
    """Test that a lock in `folder` keeps another process out, and return a line that says so.

    Raises:
        UserError: it does not, or the folder cannot be written to or has no locks.
    """
    try:
        with tempfile.NamedTemporaryFile("w", dir=folder, prefix=".lock-") as file:
            take_lock(file.file)
            command = [sys.executable, "-S", "-c", _CONTENDER, file.name]
            contender = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except OSError as error:
        raise UserError(
            f"cannot write into {folder}: {error.strerror}; free space or fix permissions"
        ) from error
    if contender.returncode == 0:
        raise UserError(
            f"two processes could lock one file in {folder} at once, so that two submissions could "
            f"start one job twice; {_REMEDY}"
        )
    if contender.returncode != 1 or contender.stderr:
        raise UserError(f"another process cannot lock a file in {folder}: {contender.stderr}")
    return f"a lock in {folder} keeps another process out"


_REMEDY = (
    "have the file system mounted with file locks (Lustre: `-o flock`; NFS: with a lock daemon), "
    "or choose a folder on another one (run_dir, or node_local in the cluster profile)"
)


def _without_locks(folder: Path, error: OSError) -> UserError:
    reason = os.strerror(error.errno) if error.errno else str(error)
    return UserError(f"cannot lock a file in {folder} ({reason}); {_REMEDY}")
