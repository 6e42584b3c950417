"""Processes that prepare batches and images ahead, in order.

Items lie in slots: shared memory that is made once, before the processes that fill it are forked.
A process then says only that it has filled a slot, through an unnamed socket. So loading needs
neither room in /dev/shm nor a socket in TMPDIR, and the kernel makes no new pages for each item.

Every way in which a process can fail to deliver is a `UserError` in the rank: an error in the
process, its death, and no item for `_PATIENCE`.
"""

from __future__ import annotations

import mmap
import os
import signal
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, suppress
from multiprocessing.connection import Connection, Pipe
from typing import Any, Generic, Protocol, TypeVar, cast

import numpy as np
import torch
from torch import Tensor

from data_prep.shards.reader import Bytes
from hpc.cli import UserError
from hpc.distributed.preemption import ignore_stop_signals
from hpc.distributed.process_group import TIMEOUT
from jobs.data.batches import Batch, EvaluationImages, TrainingBatches

_PREFETCH = 4  # items that a process may be ahead
_IN_USE = 2  # items that the taker may look at: the last, and the one before
_PINNED_AHEAD = 2  # items
# less than the other ranks wait for this one, so that it can still tell them
_PATIENCE = 0.9 * TIMEOUT.total_seconds()
_POLL = 5.0  # seconds
_LAST_MOMENTS = 5.0  # seconds that a killed process may take to end
_NO_RESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)  # Python 3.13 has the name

T = TypeVar("T")


class Source(Protocol[T]):
    """Items by number, each made from its number alone, in new memory or in given memory."""

    def __getitem__(self, index: int, /) -> T: ...

    @property
    def num_bytes(self) -> int:
        """Bytes of the largest item."""

    def view(self, index: int, memory: Bytes, /) -> T:
        """Return the item of `index` as a view of the first bytes of `memory`."""

    def write(self, index: int, into: T, /) -> None:
        """Make `into`, whatever it held, the item of `index`."""


def load_steps(batches: TrainingBatches, start: int, stop: int, workers: int) -> Generator[Batch]:
    """Yield the batches of steps `start` to `stop` - 1, in order, prepared ahead by `workers`
    processes. A batch stays as it is until the next but one is asked for. Raises `UserError`."""
    return _loaded(batches, range(start, stop), workers)


def load_images(
    images: EvaluationImages, indices: range, workers: int
) -> Generator[tuple[Tensor, Tensor]]:
    """Yield the evaluation images of `indices`, in order, as `load_steps` yields batches. Raises
    `UserError`."""
    return _loaded(images, indices, workers)


def _loaded(source: Source[T], indices: range, workers: int) -> Generator[T]:
    workers = min(workers, len(indices))
    items = _from_processes(source, indices, workers) if workers else _here(source, indices)
    with closing(items):
        yield from _pinned(items, len(indices)) if torch.cuda.is_available() else items


def _here(source: Source[T], indices: range) -> Generator[T]:
    for index in indices:
        yield source[index]


def _from_processes(source: Source[T], indices: range, workers: int) -> Generator[T]:
    try:
        slots = _Slots(source, indices, workers * _PREFETCH + _IN_USE)
        processes = _start(_Filler(source, indices, workers, slots))
    except OSError as error:
        raise UserError(
            f"cannot start {workers} loader processes: {error.strerror}; choose fewer workers in "
            "[protocol], or give jobs more memory in [cluster]"
        ) from error
    try:
        for position, index in enumerate(indices):
            process = processes[position % workers]
            process.wait_for(index)
            if position + workers * _PREFETCH < len(indices):
                process.let_go_on()
            yield slots.view(position)
    finally:
        for process in processes:
            process.end()


class _Slots(Generic[T]):
    """Memory for `number` items that this process and those it forks share. Each item is written
    where the item `number` positions before it was."""

    def __init__(self, source: Source[T], indices: Sequence[int], number: int) -> None:
        self._source, self._indices = source, indices
        size = source.num_bytes  # 0 on a rank that has no image of a batch
        # pages that no item reaches are never made, nor set aside
        flags = mmap.MAP_SHARED | mmap.MAP_ANONYMOUS | _NO_RESERVE
        memory = np.frombuffer(mmap.mmap(-1, max(1, number * size), flags=flags), np.uint8)
        self._memory = [memory[k * size : (k + 1) * size] for k in range(number)]

    def view(self, position: int) -> T:
        """Return the item at a position of `indices`, as its slot holds it."""
        memory = self._memory[position % len(self._memory)]
        return self._source.view(self._indices[position], memory)


class _Filler(Generic[T]):
    """The work of a loader process."""

    def __init__(self, source: Source[T], indices: range, workers: int, slots: _Slots[T]) -> None:
        self._source, self._indices, self.workers, self._slots = source, indices, workers, slots
        self._rank = os.getpid()

    def run(self, worker: int, connection: Connection) -> None:
        """Deliver every item that is this worker's turn."""
        ignore_stop_signals()
        torch.set_num_threads(1)
        for count, position in enumerate(range(worker, len(self._indices), self.workers)):
            if count >= _PREFETCH:
                self._wait_for_the_rank(connection)
            connection.send(self._answer(position))
        self._wait_for_the_rank(connection)  # until then this process's id is no other's

    def _answer(self, position: int) -> UserError | None:
        """Fill the slot of an item. Return the error that prevents it, or None."""
        index = self._indices[position]
        try:
            self._source.write(index, self._slots.view(position))
            return None
        except UserError as error:
            return error
        except Exception as error:
            with suppress(OSError):  # a full disk
                traceback.print_exc()
            what = f"{type(error).__name__}: {error}"
            return UserError(
                f"loader process {os.getpid()} failed at item {index} ({what}); see the "
                "traceback in this rank's log"
            )

    def _wait_for_the_rank(self, connection: Connection) -> None:
        while not connection.poll(_POLL):  # another process may keep the rank's end open
            if os.getppid() != self._rank:
                raise EOFError
        connection.recv_bytes()


class _Process:
    """A loader process, as the rank sees it. It is no child of `multiprocessing`, which would wait
    without a limit for its end when the rank ends."""

    def __init__(self, pid: int, connection: Connection) -> None:
        self._pid, self._connection = pid, connection
        self._exit_code: int | None = None

    def wait_for(self, index: int) -> None:
        """Block until the slot of the item `index`, the process's next one, is filled. Raises
        `UserError`."""
        # in short waits: one that is interrupted by a suspended job counts once
        for _ in range(max(1, round(_PATIENCE / _POLL))):
            if self._connection.poll(min(_POLL, _PATIENCE)):
                if error := self._receive():
                    raise error
                return
        raise UserError(
            f"timed out waiting for loader process {self._pid}: item {index} did not come within "
            f"{_PATIENCE:.0f} s; check the file system that holds the shards, then run grid again"
        )

    def _receive(self) -> UserError | None:
        try:
            # from a fork of this process, and from nobody else
            return cast(UserError | None, self._connection.recv())
        except (EOFError, OSError):  # it is gone
            raise UserError(self._cause_of_death()) from None

    def _cause_of_death(self) -> str:
        code = self._wait()
        if code is None or code >= 0:
            return f"loader process {self._pid} ended with exit code {code}; see this rank's log"
        return (
            f"loader process {self._pid} was killed by signal {-code} ({signal.strsignal(-code)}), "
            "perhaps for want of memory; give jobs more memory in [cluster], or choose fewer "
            "workers in [protocol]"
        )

    def let_go_on(self) -> None:
        """Tell the process that it may fill one more slot."""
        with suppress(OSError):  # if it is gone, whoever takes its next item is told
            self._connection.send_bytes(b"")

    def end(self) -> None:
        """End the process, whatever it does."""
        self._connection.close()
        if self._exit_code is None:
            with suppress(ProcessLookupError):  # see `_wait`
                os.kill(self._pid, signal.SIGKILL)  # until it is waited for, nobody else has its id
            self._wait()

    def _wait(self) -> int | None:
        """Return the exit code of a process that is ending, a signal's as a negative number; None
        if it has not ended after `_LAST_MOMENTS`, as where a file system holds it, or the code is
        lost, as where this process was started with SIGCHLD ignored."""
        deadline = time.monotonic() + _LAST_MOMENTS
        while self._exit_code is None and time.monotonic() < deadline:
            try:
                pid, status = os.waitpid(self._pid, os.WNOHANG)
            except ChildProcessError:
                break
            if pid:
                self._exit_code = os.waitstatus_to_exitcode(status)
            else:
                time.sleep(0.001)
        return self._exit_code


def _start(filler: _Filler[T]) -> list[_Process]:
    started: list[_Process] = []
    ends: list[Connection] = []  # of the rank
    try:
        for worker in range(filler.workers):
            ours, theirs = Pipe()
            ends.append(ours)
            pid = os.fork()
            if pid == 0:
                _in_the_child(ends, lambda: filler.run(worker, theirs))  # noqa: B023
            theirs.close()  # now its end is the end of what it sends
            started.append(_Process(pid, ours))
    except OSError:
        for process in started:
            process.end()
        raise
    return started


def _in_the_child(ends: Sequence[Connection], work: Callable[[], None]) -> None:
    code = 1
    try:
        for end in ends:
            end.close()
        work()
        code = 0
    except (EOFError, BrokenPipeError, ConnectionResetError):  # the rank is gone, or needs no more
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        try:
            sys.stderr.flush()
        finally:  # even if the log's disk is full: beyond here is the code of the rank
            os._exit(code)


def _pinned(items: Iterator[T], number: int) -> Generator[T]:
    """Yield the `number` items in memory that a GPU reads by itself, copied ahead by a thread."""

    def take() -> T:
        item: Any = next(items)
        if isinstance(item, tuple):
            return cast(T, tuple(tensor.pin_memory() for tensor in item))
        return cast(T, item.pin_memory())

    waiting: deque[Future[T]] = deque()
    with ThreadPoolExecutor(1, "pin", _begin_to_pin, (torch.cuda.current_device(),)) as thread:
        try:
            for left in range(number, 0, -1):
                while len(waiting) < min(left, _PINNED_AHEAD):
                    waiting.append(thread.submit(take))
                yield waiting.popleft().result()
        finally:
            thread.shutdown(cancel_futures=True)


def _begin_to_pin(device: int) -> None:
    torch.cuda.set_device(device)
    torch.set_num_threads(1)
