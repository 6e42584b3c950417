"""Find out facts about the machine of a process, on nodes and, to compare, on the login node.

Each fact is found out on its own, so that one that fails does not hide the others.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from hpc.cli import UserError, one_line
from hpc.distributed.launcher import RankEnv
from hpc.storage.atomic import TEMPORARY_PREFIX, write_json, write_text

HELLO, ANSWER, FACTS = "hello", "answer", "json"
_ANSWER_SECONDS = 60.0  # a network file system may show a new file late
_POLL_SECONDS = 0.05
_TRIAL_BYTES = 32 << 20


class Facts:
    """The facts of one rank, written to disk after each fact."""

    def __init__(self, folder: Path, name: str, env: RankEnv) -> None:
        self._path = folder / f"{name}-{env.rank}.{FACTS}"
        self._known: dict[str, Any] = {
            "rank": env.rank, "world_size": env.world_size, "local_rank": env.local_rank,
            "node": env.node, "errors": {},
        }  # fmt: skip

    def note(self, name: str, look: Callable[[], Any]) -> bool:
        """Record the result of `look`, or the error that it raises. Return True if it succeeded."""
        try:
            self._known[name] = look()
        except (Exception, SystemExit) as error:
            self.note_error(name, error)
            return False
        write_json(self._path, self._known)
        return True

    def note_error(self, name: str, error: BaseException) -> None:
        """Record why a fact could not be found out."""
        kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
        self._known["errors"][name] = one_line(f"{kind}{error}")
        write_json(self._path, self._known)


def versions(packages: Iterable[str], sources: Sequence[Path]) -> dict[str, str]:
    """Return the versions of Python and installed packages, and a hash of the source code.

    Args:
        packages: Names of packages; they are not imported.
        sources: Folders of our source code.
    """
    found = {"python": platform.python_version()}
    for name in packages:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "none"
    return found | {"own source": _source_hash(sources)}


def _source_hash(folders: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for folder in folders:
        for path in sorted(folder.rglob("*.py")):
            digest.update(f"{folder.name}/{path.relative_to(folder)}\0".encode())
            digest.update(path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def network_interfaces() -> list[str]:
    """Return the names of this node's network interfaces."""
    return [name for _, name in socket.if_nameindex()]


def sizes(paths: Iterable[str]) -> dict[str, int]:
    """Return the size of each file in bytes; -1 if this node does not see or may not read it."""
    return {path: Path(path).stat().st_size if os.access(path, os.R_OK) else -1 for path in paths}


def free_bytes(place: str) -> int:
    """Return the free bytes on the disk where folder `place` is, or would be made.

    Args:
        place: An absolute path; its variables are expanded with this node's environment.

    Raises:
        UserError: The path is not absolute, or cannot be written to.
    """
    path = Path(os.path.expandvars(place))
    if "$" in str(path) or not path.is_absolute():
        raise UserError(f"{place!r} names no folder on {socket.gethostname()}")
    existing = next(p for p in (path, *path.parents) if p.exists())
    try:
        with tempfile.TemporaryFile(dir=existing) as file:
            file.write(b"0")
    except OSError as error:
        raise UserError(f"{existing} cannot be written to: {error.strerror}") from error
    return shutil.disk_usage(existing).free


def bytes_per_second(folder: Path) -> float:
    """Measure how fast 32 MiB reach the disk of `folder`, with a temporary file."""
    data = os.urandom(_TRIAL_BYTES)
    with tempfile.NamedTemporaryFile(dir=folder, prefix=TEMPORARY_PREFIX) as file:
        begin = time.perf_counter()
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
        return _TRIAL_BYTES / (time.perf_counter() - begin)


def meet_login_node(folder: Path, name: str, rank: int) -> dict[str, float]:
    """Write a file and wait for the login node's answer to it.

    Returns:
        Seconds since 1970: `sent` and `received`, of the file and the answer on this node's clock,
        and `login_time`, of the answer on the login node's clock.

    Raises:
        UserError: No answer comes within 60 s.
    """
    hello, answer = (folder / f"{name}-{rank}.{kind}" for kind in (HELLO, ANSWER))
    for old in (hello, answer):  # of an earlier start, if the job was requeued
        old.unlink(missing_ok=True)
    sent = time.time()
    write_text(hello, f"{sent!r}")
    deadline = time.monotonic() + _ANSWER_SECONDS
    while time.monotonic() < deadline:
        try:
            login_time = float(answer.read_text(encoding="utf-8"))
            return {"sent": sent, "login_time": login_time, "received": time.time()}
        except FileNotFoundError:
            time.sleep(_POLL_SECONDS)
            list(folder.iterdir())  # makes NFS look again
    raise UserError(f"{folder} did not show {answer.name} within {_ANSWER_SECONDS:.0f} s")


def answer_hellos(folder: Path) -> None:
    """Answer every rank that waits in `meet_login_node`, with this login node's clock."""
    for hello in folder.glob(f"*.{HELLO}"):
        answer = hello.with_suffix(f".{ANSWER}")
        if not answer.exists():
            write_text(answer, f"{time.time()!r}")
