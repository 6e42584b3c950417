"""What a job is: one function of one module, called with strings. And how a job's error is read
back from its logs."""

from __future__ import annotations

import importlib
import signal
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from hpc.command import USER_ERROR_EXIT_CODE, UserError, one_line
from hpc.preempt import keep_notice

_ERROR_PREFIX = "error: "
_TAIL_BYTES = 16384
# what the launcher, and not the job, writes at the end of a log
_LAUNCHER_PREFIXES = ("srun: ", "slurmstepd", "submitit ")


@dataclass(frozen=True)
class ModuleCall:
    """Calls `main(list(arguments))` of the module named `module`.

    This is the object submitit pickles: two names, no live objects, so that a job started days
    later runs the code as it is then. It has no `checkpoint` method on purpose: the job's own
    signal handlers replace submitit's, save, and requeue.
    """

    module: str
    arguments: tuple[str, ...] = ()

    def __call__(self) -> None:
        """Run the job. A `UserError` becomes one line `error: ...` on stderr and exit code 2; a
        return value other than 0 or None becomes the exit code; other exceptions pass through.
        """
        _drop_submitit_handlers()
        try:
            code = importlib.import_module(self.module).main(list(self.arguments))
        except UserError as error:
            print(f"{_ERROR_PREFIX}{one_line(str(error))}", file=sys.stderr, flush=True)
            # SystemExit, which submitit lets pass: the process fails with no traceback after the
            # line, Slurm shows FAILED, and the absent result tells the local queue the same
            raise SystemExit(USER_ERROR_EXIT_CODE) from None
        if code:
            raise SystemExit(code)


def _drop_submitit_handlers() -> None:
    # submitit's would ignore SIGTERM, also in every child; until the job sets its own handlers
    # there is nothing to save. A job that sets none may use its time to the end.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGCONT, signal.SIG_DFL)
    keep_notice()


def last_error(logs: Iterable[Path]) -> str | None:
    """The line that says why a job failed, from the stderr logs of its ranks: the last `error: `
    line of the first rank that has one, or else the last line of the first log that has any.
    """
    tails = [_tail(log) for log in logs]
    errors = [[line for line in tail if line.startswith(_ERROR_PREFIX)] for tail in tails]
    return next((lines[-1] for lines in (*errors, *tails) if lines), None)


def _tail(log: Path) -> list[str]:
    """The job's own lines among the last few thousand characters of a log."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - _TAIL_BYTES))
            text = file.read().decode(errors="replace")
    except FileNotFoundError:
        return []
    lines = (line.strip() for line in text.splitlines())
    return [line for line in lines if line and not line.startswith(_LAUNCHER_PREFIXES)]
