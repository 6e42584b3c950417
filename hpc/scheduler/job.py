"""Define a job: one function of one module, called with strings. Read its error from its logs."""

from __future__ import annotations

import importlib
import signal
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import count, takewhile
from pathlib import Path

from hpc.cli import USER_ERROR_EXIT_CODE, UserError, one_line, protect_output
from hpc.distributed.launcher import read_env
from hpc.distributed.preemption import keep_early_notice

ERROR_PREFIX = "error: "
START_PREFIX = "--- start "
_TAIL_BYTES = 16384
# the launcher's own lines at the end of a log
_LAUNCHER_PREFIXES = ("srun: ", "slurmstepd", "submitit ")


@dataclass(frozen=True)
class ModuleCall:
    """A call of `main(list(arguments))` of the module named `module`.

    submitit pickles this object. It holds only strings, so a job that starts days later runs the
    code of that day. It has no `checkpoint` method: the job's own signal handlers save and requeue.
    """

    module: str
    arguments: tuple[str, ...] = ()

    def __call__(self) -> None:
        """Run the job.

        A `UserError` becomes one line `error: ...` on stderr and exit code 2. A return value other
        than 0 or None becomes the exit code. Other exceptions pass through.
        """
        protect_output()
        _drop_submitit_handlers()
        _mark_start()
        try:
            code = importlib.import_module(self.module).main(list(self.arguments))
        except UserError as error:
            print(f"{ERROR_PREFIX}{one_line(str(error))}", file=sys.stderr, flush=True)
            # submitit lets SystemExit pass, so no traceback follows the line. Slurm shows FAILED,
            # and the missing result tells the local queue the same.
            raise SystemExit(USER_ERROR_EXIT_CODE) from None
        if code:
            raise SystemExit(code)


def _drop_submitit_handlers() -> None:
    # submitit's handlers would ignore SIGTERM, also in every child. There is nothing to save until
    # the job sets its own handlers. USR2 is only recorded, so a job without handlers runs until its
    # time limit.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGCONT, signal.SIG_DFL)
    keep_early_notice()


def _mark_start() -> None:
    """Write a line that separates this start in the log, since a requeued job appends to it."""
    env = read_env()
    if env.start_id:
        rank = f"rank {env.rank} of {env.world_size} on {env.node}"
        line = f"{START_PREFIX}{env.start_id}: {rank}, {time.strftime('%Y-%m-%d %H:%M:%S %z')}"
        print(line, file=sys.stderr, flush=True)


def rank_logs(folder: Path, job_id: str) -> list[Path]:
    """Return the stderr logs that the ranks of a job have left in `folder`, in order of rank.

    submitit names them JOB_RANK_log.err on Slurm and JOB/PID_RANK_log.err on one machine.
    """
    of_slurm = takewhile(Path.exists, (folder / f"{job_id}_{n}_log.err" for n in count()))
    local = (folder / job_id).glob("*_log.err")
    return [*of_slurm, *sorted(local, key=lambda log: int(log.name.split("_")[1]))]


def last_error(logs: Iterable[Path]) -> str | None:
    """Return the line that says why a job failed, from the stderr logs of its ranks.

    It is the last `error: ` line of the first rank that has one, else the last line of the first
    log that is not empty; None if all are empty.
    """
    starts = [[line for line in last_start(log) if not is_launchers(line)] for log in logs]
    errors = [[line for line in lines if line.startswith(ERROR_PREFIX)] for lines in starts]
    return next((lines[-1].strip() for lines in (*errors, *starts) if lines), None)


def last_start(log: Path) -> list[str]:
    """Return the lines of a log since the job's last start, of the last 16 KiB at most."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - _TAIL_BYTES))
            text = file.read().decode(errors="replace")
    except OSError:
        return []
    lines = [line.rstrip() for line in text.splitlines()]
    begins = [number for number, line in enumerate(lines, 1) if line.startswith(START_PREFIX)]
    return [line for line in lines[begins[-1] if begins else 0 :] if line]


def is_launchers(line: str) -> bool:
    """Return True if the launcher, and not the job, wrote a line of a log."""
    return line.startswith(_LAUNCHER_PREFIXES)
