"""Copy shared files to a node's own disk, once per node.

The processes of a node share a checked copy, and the last of them removes it. The next process
deletes copies that killed processes left.

Every copy has a lock file beside it. Each process that uses a copy holds its lock shared. The
kernel releases the lock when the last of them ends, even if it is killed. A copy is unused if its
lock can be taken exclusively.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from hpc.cli import UserError, warn
from hpc.storage.atomic import Damaged, file_sha256
from hpc.storage.locks import take_lock
from hpc.storage.permissions import private_folder

_COMPLETE = "complete"
_SPARE_BYTES = 1 << 28  # space to leave free beside the copy


@dataclass(frozen=True)
class SharedFile:
    """A file's name in its folder, its length in bytes and the SHA-256 of its content."""

    name: str
    bytes: int
    sha256: str


@contextmanager
def cached_copy(
    source: Path,
    files: Sequence[SharedFile],
    identity: str,
    node_local: str,
) -> Iterator[Path]:
    """Yield the folder in which this node finds `files` while the block runs.

    It is a copy on the node's disk. If `node_local` cannot be used or has too little space, warn
    and yield `source` itself.

    Args:
        source: the shared folder of the files.
        files: the files to copy and their checksums.
        identity: names their content; users of equal identities share a copy.
        node_local: a folder on the node; may use its environment variables ($TMPDIR).

    Raises:
        Damaged: a file is missing or not what it should be.
    """
    try:
        own = _own_folder(node_local)
        _sweep(own)
        copy = _Copy(own, identity)
        copy.take(source, files)
    except Damaged:
        raise
    except (OSError, UserError) as error:
        warn(f"{error}; reading from {source}")
        yield source
        return
    try:
        yield copy.folder
    finally:
        copy.give_back()


def _own_folder(node_local: str) -> Path:
    expanded = os.path.expandvars(node_local)
    if "$" in expanded or not Path(expanded).is_absolute():
        raise UserError(f"node_local = {node_local!r} names no folder on {socket.gethostname()}")
    own = Path(expanded) / f"lossgrid-{os.geteuid()}"
    private_folder(own)
    return own


class _Copy:
    """One copy and its lock."""

    def __init__(self, own: Path, identity: str) -> None:
        self.folder = own / identity
        self._lock_path = own / f"{identity}.lock"
        self._lock: IO[str] | None = None

    def take(self, source: Path, files: Sequence[SharedFile]) -> None:
        """Make the copy if there is none, and hold it."""
        while self._lock is None:
            lock = self._lock_path.open("a+")
            try:
                take_lock(lock, fcntl.LOCK_SH, wait=True)  # until another process has copied
                if self._is_whole(lock):
                    self._lock = lock
                elif take_lock(lock) and _is_at(lock, self._lock_path):
                    self._make(source, files)
            finally:
                if self._lock is None:
                    lock.close()

    def _is_whole(self, lock: IO[str]) -> bool:
        return _is_at(lock, self._lock_path) and (self.folder / _COMPLETE).exists()

    def _make(self, source: Path, files: Sequence[SharedFile]) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        wanted = sum(file.bytes for file in files)
        free = shutil.disk_usage(self.folder.parent).free
        if free < wanted + _SPARE_BYTES:
            raise UserError(
                f"{self.folder.parent} on {socket.gethostname()} has {free / 1e9:.1f} GB free, "
                f"not the {wanted / 1e9:.1f} GB of the files"
            )
        try:
            self.folder.mkdir(0o700)
            for file in files:
                _copy_checked(source / file.name, self.folder / file.name, file.sha256)
            (self.folder / _COMPLETE).touch()
        except BaseException:
            shutil.rmtree(self.folder, ignore_errors=True)
            raise

    def give_back(self) -> None:
        """Release the copy, and remove it if no other process uses it."""
        assert self._lock is not None
        with self._lock as lock:
            fcntl.flock(lock, fcntl.LOCK_UN)
            _remove_unused(self.folder, self._lock_path, lock)
        self._lock = None


def _sweep(own: Path) -> None:
    """Remove unused copies, which killed jobs left."""
    for path in own.glob("*.lock"):
        with suppress(FileNotFoundError), path.open("r+") as lock:
            _remove_unused(path.with_suffix(""), path, lock)


def _remove_unused(folder: Path, lock_path: Path, lock: IO[str]) -> None:
    # another process may have removed the lock file, and made it again, before we had the lock
    if take_lock(lock) and _is_at(lock, lock_path):
        shutil.rmtree(folder, ignore_errors=True)
        lock_path.unlink()


def _is_at(file: IO[str], path: Path) -> bool:
    """Return whether the open file is still the one at `path`."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _copy_checked(source: Path, target: Path, sha256: str) -> None:
    try:
        shutil.copyfile(source, target)
    except FileNotFoundError as error:
        raise Damaged(f"{source} cannot be read: {error.strerror}; restore it") from error
    if file_sha256(target) != sha256:
        raise Damaged(f"{source} is damaged (its checksum differs); restore it")
