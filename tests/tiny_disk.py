"""A disk that is soon full: what a test runs there sees real errors of a real file system."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest import mock

from hpc.cli import UserError

REPOSITORY = Path(__file__).parents[1]
NO_ROOM = r"(No space left on device|File too large)"
MEGABYTE = 1 << 20
_MOUNT = 'mount -t tmpfs -o size="$1" tmpfs "$2" && shift 2 && exec "$@"'


def on_tiny_disk(
    code: str, folder: Path, kilobytes: int = 256, seconds: float = 60
) -> subprocess.CompletedProcess[str]:
    """Run Python code in a process of its own; `sys.argv[1]` is `folder`, on a disk of
    `kilobytes`, which is gone with the process. Where this user may not mount one, no file can
    grow beyond that size instead."""
    python = [sys.executable, "-c", code, str(folder)]
    options: dict[str, Any] = {"cwd": REPOSITORY, "capture_output": True, "text": True}
    options["timeout"] = seconds
    if may_mount():
        mount = ["unshare", "-rm", "sh", "-c", _MOUNT, "sh", f"{kilobytes}k", str(folder)]
        return subprocess.run([*mount, *python], **options)
    # Python does not notice that a .pyc is cut off by this limit, and fails to load it ever after
    options["env"] = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    limit = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (kilobytes << 10, kilobytes << 10))
    return subprocess.run(python, preexec_fn=limit, **options)


@cache
def may_mount() -> bool:
    """Return whether this user can have a disk of their own."""
    try:
        attempt = ["unshare", "-rm", "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
        return subprocess.run(attempt, capture_output=True).returncode == 0
    except FileNotFoundError:
        return False


class Disk:
    """The disk that is mounted at `folder`."""

    def __init__(self, folder: str | Path, mode: str) -> None:
        self.folder = Path(folder)
        self.mode = mode
        self._ballast = self.folder / "others"

    def close(self) -> None:
        """Make every further write fail."""
        if self.mode == "read-only":
            self._remount("ro")
            return
        with self._ballast.open("ab", buffering=0) as file:
            for size in (MEGABYTE, 4096, 1):
                try:
                    while file.write(bytes(size)) == size:
                        pass
                except OSError:
                    continue

    def open(self) -> None:
        """Somebody has made room, or fixed it."""
        if self.mode == "read-only":
            self._remount("rw")
        else:
            self._ballast.write_bytes(b"")

    def _remount(self, option: str) -> None:
        # "ignore": the owner, which mount would repeat, is an option that no remount may name in a
        # user's namespace
        mount = ["mount", "--options-mode", "ignore", "-o", f"remount,{option}", str(self.folder)]
        subprocess.run(mount, check=True, capture_output=True)

    @contextmanager
    def closed_at(self, owner: Any, name: str, nth: int = 1) -> Iterator[None]:
        """The disk closes right before the `nth` call of a function."""
        honest, calls = getattr(owner, name), 0

        def closing(*arguments: Any, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == nth:
                self.close()
            return honest(*arguments, **options)

        with mock.patch.object(owner, name, closing):
            yield
        assert calls >= nth, f"{name} was called {calls} times"

    def refused(self, main: Callable[[], Any]) -> None:
        """The one line with which `main` ends; anything but a `UserError` passes through. Then
        there is room again."""
        try:
            main()
        except UserError as error:
            print(error)
        else:
            raise AssertionError("it went through")
        finally:
            self.open()
        assert not [path for path in self.folder.rglob("*") if path.name.startswith(".tmp-")]
