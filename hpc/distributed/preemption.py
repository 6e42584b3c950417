"""Stop a job on a signal: a handler only sets a flag, and ranks agree on it between two steps."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

STOPPED_BY = "stopped by"  # begins a job's line on its stop; `exit_cause` finds it in logs
STOP_SIGNALS = (signal.SIGUSR2, signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """The first stop signal that this process has received, if any."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None

    def __bool__(self) -> bool:
        return self.signal is not None

    def _note(self, number: int, _frame: FrameType | None) -> None:
        # keep the first one: at a time limit, TERM follows USR2
        self.signal = self.signal or signal.Signals(number)


_early = StopRequest()


def keep_early_notice() -> None:
    """Record a SIGUSR2 that arrives before `stop_request` listens: Slurm sends it only once.

    Blocking the signal would not work: threads that libraries have started do not block it.
    """
    _early.signal = None
    signal.signal(signal.SIGUSR2, _early._note)


@contextmanager
def stop_request() -> Iterator[StopRequest]:
    """Yield a request that USR2 (time limit ahead), TERM (preemption, cancel) or INT sets.

    A signal that `keep_early_notice` recorded counts too.
    """
    request = StopRequest()
    before = {number: signal.signal(number, request._note) for number in STOP_SIGNALS}
    if _early:  # read after the handlers are set, so that no signal falls between
        request.signal = _early.signal
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def ignore_stop_signals(_worker: int = 0) -> None:
    """Ignore stop signals in a loader process, which ends when its rank does.

    Slurm and terminals signal every process of a job. A rank whose loader dies cannot save.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
