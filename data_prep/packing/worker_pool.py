"""Distribute work over processes, and show progress on the terminal."""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import partial
from typing import TypeVar

from rich.console import Console
from rich.markup import escape
from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn

from hpc.cli import UserError

T = TypeVar("T")
R = TypeVar("R")

_BYTES_PER_PROCESS = 64_000_000  # packing about so much takes as long as starting a process


def sensible_processes(num_bytes: int) -> int:
    """Return how many processes to use for `num_bytes` of work.

    They are at most the cores that this process may run on; Slurm and taskset may allow fewer than
    the node has.
    """
    return min(len(os.sched_getaffinity(0)), 1 + num_bytes // _BYTES_PER_PROCESS)


def in_processes(function: Callable[[T], R], items: Sequence[T], processes: int) -> Iterator[R]:
    """Yield `function(item)` for every item, in order of completion.

    Processes are spawned, since a fork copies the locks of threads and of HDF5.

    Args:
        function: picklable.
        items: picklable.
        processes: number of processes; with 1, this process does the work.

    Raises:
        UserError: a process was killed, or processes cannot be started.
    """
    processes = min(processes, len(items))
    if processes <= 1:
        yield from map(function, items)
        return
    context = multiprocessing.get_context("spawn")
    with _start_of(processes):
        pool = ProcessPoolExecutor(processes, context, _die_with_parent)
    with pool:
        try:
            with _start_of(processes):
                waiting = [pool.submit(function, item) for item in items]
            for done in as_completed(waiting):
                yield done.result()
        except BrokenProcessPool as error:
            raise UserError(
                "a packing process was killed (out of memory?); run again with fewer --processes"
            ) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


@contextmanager
def _start_of(processes: int) -> Iterator[None]:
    try:
        yield
    except OSError as error:  # /dev/shm is not writable, or too many processes
        raise UserError(
            f"cannot start {processes} packing processes: {error.strerror}; make /dev/shm writable "
            "and allow more processes, or pack with --processes 1"
        ) from error


def with_progress(items: Iterator[R], total: int, title: str) -> Iterator[R]:
    """Yield `items`, and show how many of `total` are done.

    This is a bar on a terminal, and else about 20 lines on standard error.
    """
    console = Console(file=sys.stderr)
    if not console.is_terminal:
        for done, item in enumerate(items, 1):
            if done == total or done % max(1, total // 20) == 0:
                console.print(f"{title}: {done} of {total}", markup=False, highlight=False)
            yield item
        return
    columns = (*Progress.get_default_columns(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as bar:
        yield from bar.track(items, total=total, description=escape(title))


def _die_with_parent() -> None:
    # otherwise a worker whose parent was killed waits for work forever
    parent = multiprocessing.parent_process()
    assert parent is not None
    leave = partial(_leave_after, parent.join)
    threading.Thread(target=leave, daemon=True).start()


def _leave_after(parents_end: Callable[[], None]) -> None:
    parents_end()
    os._exit(1)
