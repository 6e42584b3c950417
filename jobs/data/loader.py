"""Loader processes, which prepare batches and images ahead, in order.

Items lie in slots: shared memory that the rank maps once, before it forks the processes that fill
it. A process reports a filled slot through an unnamed socket. So loading needs neither space in
/dev/shm nor a socket in TMPDIR, and the kernel maps no new pages for each item.

If a process fails, dies, or delivers no item within `_ITEM_TIMEOUT`, the rank raises `UserError`.
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

_PREFETCH = 4  # items that one process prepares ahead
_IN_USE = 2  # items that the caller may still read: the last two
_PINNED_AHEAD = 2  # items
# shorter than the time-out of the other ranks, so that this rank can still tell them
_ITEM_TIMEOUT = 0.9 * TIMEOUT.total_seconds()
_POLL = 5.0  # seconds
_KILL_TIMEOUT = 5.0  # seconds that a killed process may take to exit
_NO_RESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)  # Python 3.13 has the name

T = TypeVar("T")


class Source(Protocol[T]):
    """Items by number; an item depends on its number alone."""

    def __getitem__(self, index: int, /) -> T: ...

    @property
    def num_bytes(self) -> int:
        """Return the bytes of the largest item."""

    def view(self, index: int, memory: Bytes, /) -> T:
        """Return the item of `index` as a view of the first bytes of `memory`."""

    def write(self, index: int, into: T, /) -> None:
        """Overwrite `into` with the item of `index`."""


def load_steps(batches: TrainingBatches, start: int, stop: int, workers: int) -> Generator[Batch]:
    """Yield the batches of steps `start` to `stop` - 1, in order.

    A batch stays valid until the caller has asked for two more.

    Args:
        workers: number of loader processes; 0 loads in this process.

    Raises:
        UserError: a loader process failed or could not start.
    """
    return _loaded(batches, range(start, stop), workers)


def load_images(
    images: EvaluationImages, indices: range, workers: int
) -> Generator[tuple[Tensor, Tensor]]:
    """Yield the evaluation images of `indices`, in order; the rest is as in `load_steps`."""
    return _loaded(images, indices, workers)


class Transfer:
    """Copies batches to `device`; to a GPU on a separate stream, parallel to its computation."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self, batch: Batch) -> Batch:
        """Return the batch on the device, ready for the current stream."""
        if self._stream is None:
            return batch.to(self._device)
        with torch.cuda.stream(self._stream):
            moved = batch.to(self._device)
        current = torch.cuda.current_stream(self._device)
        current.wait_stream(self._stream)
        for tensor in (moved.images, moved.target):  # the allocator knows only their own stream
            tensor.record_stream(current)
        return moved


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
    """A ring of `number` items in memory that this process shares with the processes it forks."""

    def __init__(self, source: Source[T], indices: Sequence[int], number: int) -> None:
        self._source, self._indices = source, indices
        size = source.num_bytes  # 0 on a rank without images of a batch
        # no memory is reserved for pages that no item reaches
        flags = mmap.MAP_SHARED | mmap.MAP_ANONYMOUS | _NO_RESERVE
        memory = np.frombuffer(mmap.mmap(-1, max(1, number * size), flags=flags), np.uint8)
        self._memory = [memory[k * size : (k + 1) * size] for k in range(number)]

    def view(self, position: int) -> T:
        """Return a view of the item at a position of `indices` in its slot."""
        memory = self._memory[position % len(self._memory)]
        return self._source.view(self._indices[position], memory)


class _Filler(Generic[T]):
    """The work of a loader process."""

    def __init__(self, source: Source[T], indices: range, workers: int, slots: _Slots[T]) -> None:
        self._source, self._indices, self.workers, self._slots = source, indices, workers, slots
        self._rank_pid = os.getpid()

    def run(self, worker: int, connection: Connection) -> None:
        """Fill the slots of every `workers`-th item, starting at item `worker`."""
        ignore_stop_signals()
        torch.set_num_threads(1)
        for count, position in enumerate(range(worker, len(self._indices), self.workers)):
            if count >= _PREFETCH:
                self._wait_for_the_rank(connection)
            connection.send(self._answer(position))
        # exit only when the rank allows it: until then the rank may kill this process id
        self._wait_for_the_rank(connection)

    def _answer(self, position: int) -> UserError | None:
        """Fill the slot of an item. Return None, or the error that prevented it."""
        index = self._indices[position]
        try:
            self._source.write(index, self._slots.view(position))
            return None
        except UserError as error:
            return error
        except Exception as error:
            with suppress(OSError):  # the log's disk may be full
                traceback.print_exc()
            what = f"{type(error).__name__}: {error}"
            return UserError(
                f"loader process {os.getpid()} failed at item {index} ({what}); see the "
                "traceback in this rank's log"
            )

    def _wait_for_the_rank(self, connection: Connection) -> None:
        # a loader process that was forked later may keep the rank's end open when the rank is dead
        while not connection.poll(_POLL):
            if os.getppid() != self._rank_pid:
                raise EOFError
        connection.recv_bytes()


class _Process:
    """A loader process, as the rank sees it.

    It is not from `multiprocessing`, which would wait for its exit without a limit.
    """

    def __init__(self, pid: int, connection: Connection) -> None:
        self._pid, self._connection = pid, connection
        self._exit_code: int | None = None

    def wait_for(self, index: int) -> None:
        """Block until the process has filled the slot of item `index`. Raises `UserError`."""
        # short waits, so that the time of a suspended job counts only once
        for _ in range(max(1, round(_ITEM_TIMEOUT / _POLL))):
            if self._connection.poll(min(_POLL, _ITEM_TIMEOUT)):
                if error := self._receive():
                    raise error
                return
        raise UserError(
            f"timed out waiting for loader process {self._pid}: no item {index} within "
            f"{_ITEM_TIMEOUT:.0f} s; check the file system that holds the shards, then run grid "
            "again"
        )

    def _receive(self) -> UserError | None:
        try:
            # unpickling is safe, because only a fork of this process can send
            return cast(UserError | None, self._connection.recv())
        except (EOFError, OSError):  # the process has exited
            raise UserError(self._cause_of_death()) from None

    def _cause_of_death(self) -> str:
        code = self._wait()
        if code is None or code >= 0:
            known = "(exit code unknown)" if code is None else f"with exit code {code}"
            return f"loader process {self._pid} ended {known}; see this rank's log"
        return (
            f"loader process {self._pid} was killed by signal {-code} ({signal.strsignal(-code)}), "
            "perhaps out of memory; give jobs more memory in [cluster], or choose fewer "
            "workers in [protocol]"
        )

    def let_go_on(self) -> None:
        """Allow the process to fill one more slot."""
        with suppress(OSError):  # `wait_for` reports a process that has exited
            self._connection.send_bytes(b"")

    def end(self) -> None:
        """Kill the process."""
        self._connection.close()
        if self._exit_code is None:
            with suppress(ProcessLookupError):  # see `_wait`
                os.kill(self._pid, signal.SIGKILL)  # its id is not reused before waitpid
            self._wait()

    def _wait(self) -> int | None:
        """Return the exit code of a process that is about to exit; -N after signal N.

        Return None if it has not exited after `_KILL_TIMEOUT`, because a file system may block it.
        Return None if the code is lost, because this process may ignore SIGCHLD.
        """
        deadline = time.monotonic() + _KILL_TIMEOUT
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
    ends: list[Connection] = []  # those of the rank
    try:
        for worker in range(filler.workers):
            ours, theirs = Pipe()
            ends.append(ours)
            pid = os.fork()
            if pid == 0:
                # B023: the child never returns from this call, so `worker` and `theirs` stay
                _in_the_child(ends, lambda: filler.run(worker, theirs))  # noqa: B023
            theirs.close()  # so that its exit closes the connection
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
    except (EOFError, BrokenPipeError, ConnectionResetError):  # the rank has exited or is done
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        try:
            sys.stderr.flush()
        finally:  # the child must never run the rank's code, even if the log's disk is full
            os._exit(code)


def _pinned(items: Iterator[T], number: int) -> Generator[T]:
    """Yield the `number` items in pinned memory; a thread copies them ahead."""

    def take() -> T:
        item: Any = next(items)
        if isinstance(item, tuple):
            return cast(T, tuple(tensor.pin_memory() for tensor in item))
        return cast(T, item.pin_memory())

    waiting: deque[Future[T]] = deque()
    device = torch.cuda.current_device()
    with ThreadPoolExecutor(1, "pin", torch.cuda.set_device, (device,)) as thread:
        try:
            for left in range(number, 0, -1):
                while len(waiting) < min(left, _PINNED_AHEAD):
                    waiting.append(thread.submit(take))
                yield waiting.popleft().result()
        finally:
            thread.shutdown(cancel_futures=True)
