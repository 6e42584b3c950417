"""A disk that is soon full: what a test runs there sees real errors of a real file system."""

from __future__ import annotations

import resource
import subprocess
import sys
from functools import cache, partial
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
NO_ROOM = r"(No space left on device|File too large)"
_MOUNT = 'mount -t tmpfs -o size="$1" tmpfs "$2" && shift 2 && exec "$@"'


def on_tiny_disk(code: str, folder: Path, kilobytes: int = 256) -> subprocess.CompletedProcess[str]:
    """Run Python code in a process of its own; `sys.argv[1]` is `folder`, on a disk of
    `kilobytes`, which is gone with the process. Where this user may not mount one, no file can
    grow beyond that size instead."""
    python = [sys.executable, "-c", code, str(folder)]
    options = {"cwd": REPOSITORY, "capture_output": True, "text": True, "timeout": 60}
    if _may_mount():
        mount = ["unshare", "-rm", "sh", "-c", _MOUNT, "sh", f"{kilobytes}k", str(folder)]
        return subprocess.run([*mount, *python], **options)
    limit = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (kilobytes << 10, kilobytes << 10))
    return subprocess.run(python, preexec_fn=limit, **options)


@cache
def _may_mount() -> bool:
    try:
        attempt = ["unshare", "-rm", "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
        return subprocess.run(attempt, capture_output=True).returncode == 0
    except FileNotFoundError:
        return False
