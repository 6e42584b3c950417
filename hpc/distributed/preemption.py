"""Stopping: signals set a flag, and the ranks agree on it at a step's edge. No work is done inside
a handler."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

STOP_SIGNALS = (signal.SIGUSR2, signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """Which stop signal has come, if any."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None

    def __bool__(self) -> bool:
        return self.signal is not None

    def _note(self, number: int, _frame: FrameType | None) -> None:
        # the first one counts: a time limit's USR2 is followed by TERM
        self.signal = self.signal or signal.Signals(number)


_early = StopRequest()


def keep_notice() -> None:
    """Until the job listens, keep a time limit's notice for it, which comes once. Blocking the
    signal would not do: libraries have threads by then that do not block it. One that no job
    listens for changes nothing."""
    _early.signal = None
    signal.signal(signal.SIGUSR2, _early._note)


@contextmanager
def stop_request() -> Iterator[StopRequest]:
    """Listen for USR2 (time limit ahead), TERM (preemption, cancel) and INT inside the block.
    Replaces submitit's handlers, which act on rank 0 alone. What `keep_notice` kept counts too."""
    request = StopRequest()
    request.signal = _early.signal
    before = {number: signal.signal(number, request._note) for number in STOP_SIGNALS}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def leave_signals_to_the_rank(_worker: int = 0) -> None:
    """For loader processes. Slurm and terminals signal every process of a job; a loader that died
    of it would take the rank with it, before it has saved. Loaders end when their rank does."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
