"""The real reduction, which stands still at one place while a file says which: a small one is over
before a test could strike.

    python -m tests.cluster.slow_reduction reduce CONFIG ...

is `python -m pipeline.submit` whose reduction does so.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

HALT = "halt-reduction"  # in the run directory: "reading" or "writing"
READING, WRITING = "reading", "writing"


def main(argv: Sequence[str]) -> int:
    """The job: reduce the counts of a grid."""
    from hpc.storage import atomic
    from pipeline import reduce
    from pipeline.config.grid_file import read_grid

    root = read_grid(Path(argv[0])).run.root
    read, fsync = reduce.read_shares, atomic.fsync

    def slow_read(*arguments: Any, **more: Any) -> Any:
        for share in read(*arguments, **more):
            _halt(root, READING)
            yield share

    def slow_fsync(path: Path) -> None:
        _halt(root, WRITING)  # all of results.h5 is in a temporary file, and not published
        fsync(path)

    reduce.read_shares, atomic.fsync = slow_read, slow_fsync
    return reduce.main(argv)


def _halt(root: Path, place: str) -> None:
    from hpc.distributed.launcher import read_env

    if _asked(root) == place:
        (root / f"{place}-{read_env().rank}").touch()
        _wait_while(lambda: _asked(root) == place)


def _asked(root: Path) -> str:
    try:
        return (root / HALT).read_text()
    except FileNotFoundError:
        return ""


def _wait_while(condition: Callable[[], bool]) -> None:
    while condition():
        time.sleep(0.05)


def halted(root: Path, place: str) -> list[int]:
    """The ranks that stand still, or did."""
    return sorted(int(path.name.partition("-")[2]) for path in root.glob(f"{place}-*"))


if __name__ == "__main__":
    from hpc.cli import run
    from pipeline import submit
    from pipeline.tracking.submissions import PROGRAMS

    PROGRAMS["reduce"] = "tests.cluster.slow_reduction"
    run(submit.main)
