"""Find out why a job has ended, from the queue's last word and the logs of its ranks.

Neither is enough alone: Slurm soon forgets jobs, accounting may be off, and a lost node writes no
log.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from hpc.distributed.preemption import STOPPED_BY
from hpc.scheduler.base import DEPENDENCY_FAILED
from hpc.scheduler.job import ERROR_PREFIX, is_launchers, last_start

Cause = Literal[
    "node failure",
    "preemption",
    "time limit",
    "killed",
    "out of memory",
    "cancelled",
    "dependency failed",
    "error",
    "unknown",
]


class ExitCause(NamedTuple):
    """The cause of a job's end, and the evidence: a log line, or a remark ("" if there is none)."""

    cause: Cause
    line: str = ""


NEVER_SATISFIED = "DependencyNeverSatisfied"  # squeue's reason
# the last words of squeue, sacct and the local queue
_WORDS: dict[str, Cause] = {
    "NODE_FAIL": "node failure",
    "BOOT_FAIL": "node failure",
    "PREEMPTED": "preemption",
    "TIMEOUT": "time limit",
    "DEADLINE": "time limit",
    "OUT_OF_MEMORY": "out of memory",
    "CANCELLED": "cancelled",
    "cancelled": "cancelled",
    NEVER_SATISFIED: "dependency failed",
    DEPENDENCY_FAILED: "dependency failed",
}
_FAILED = "FAILED"
_WITHOUT_RESULT = "failed"  # of the local queue: a rank left no result
# slurmstepd: error: *** JOB 12 ON n1 CANCELLED AT 2026-01-01T00:00:00 DUE TO TIME LIMIT ***
# Slurm gives no reason for a step that it ended because one of its ranks had failed.
_BY_SLURM: tuple[tuple[Cause, re.Pattern[str]], ...] = (
    ("node failure", re.compile(r"DUE TO NODE FAILURE|^srun: error: Node failure on ")),
    ("preemption", re.compile(r"CANCELLED AT \S+ DUE TO PREEMPTION")),
    ("time limit", re.compile(rf"CANCELLED AT \S+ DUE TO TIME LIMIT|: {STOPPED_BY} SIGUSR2 ")),
    ("cancelled", re.compile(r"\*\*\* JOB \S+ ON \S+ CANCELLED AT \S+ \*\*\*")),
)
_OUT_OF_MEMORY = re.compile(
    r"(^|\]: )([\w.]*(OutOfMemory|Memory)Error)\b"
    r"|(CUDA|HIP)( error:)? out of memory|_STATUS_ALLOC_FAILED\b"
    r"|CUBLAS_STATUS_NOT_INITIALIZED\b"  # no memory for the handle
    r"|Cuda failure (\d+ )?'out of memory'|Failed to CUDA (calloc|host alloc)"  # NCCL
    r"|can't allocate memory|Cannot allocate memory|std::bad_alloc"
    r"|^slurmstepd.*(oom.kill event|exceeded \S* ?memory limit)"
    r"|^srun: error: \S+: tasks? \S+: Out Of Memory"
)
_ERROR_LINE = re.compile(r"^error: |(^|\]: )[\w.]*(Error|Exception)\b")
# the error of a rank whose peer or loader process was killed
_LOST_PEER = re.compile(
    r"Connection (closed|reset|refused)|Broken pipe|connectFullMesh|[Tt]imed out (waiting|after)"
    r"|Socket Timeout|remote process exited|DistNetworkError|DistBackendError"
    r"|loader process \d+ was killed by signal 9 "
)
_STOPPED = re.compile(rf": {STOPPED_BY} SIG(TERM|INT) ")
_RANK_ENDED = re.compile(r"^srun: error: \S+: tasks? \S+: (.*)")
_STEP_ENDED = re.compile(r"\*\*\* STEP \S+ ON \S+ CANCELLED AT ")


def names_error(line: str) -> bool:
    """Return True if a log's line is an error of ours or the end of a traceback."""
    return _ERROR_LINE.search(line) is not None


def exit_cause(word: str, logs: Iterable[Path]) -> ExitCause:
    """Return why a job has ended.

    The first of these signs decides:

    1. an out-of-memory error of one rank, since it explains all others
    2. the queue's word
    3. Slurm's lines about the job
    4. the first rank that ended, if it was killed
    5. an error of a rank, other than a lost peer
    6. a lost peer, or our own line on a stop signal: another rank was killed
    7. srun's line about a rank that ended
    8. a cancelled step
    9. the word FAILED

    Args:
        word: The queue's last word for the job; "" if it has none.
        logs: The stderr logs of the ranks. Only their last start counts, since a requeued job
            appends to them.
    """
    ranks = [last_start(log) for log in logs]
    lines = [line for rank in ranks for line in rank]
    if memory := _first(_OUT_OF_MEMORY, lines):
        return ExitCause("out of memory", memory)
    if word in _WORDS:
        return ExitCause(_WORDS[word])
    for cause, pattern in _BY_SLURM:
        if line := _first(pattern, lines):
            return ExitCause(cause, line)
    return _by_ranks(word, ranks, lines)


def _by_ranks(word: str, ranks: Sequence[list[str]], lines: Sequence[str]) -> ExitCause:
    first_lost = _first(_RANK_ENDED, lines)  # srun lists ranks in the order in which they ended
    if first_lost.endswith(": Killed"):
        return ExitCause("killed", first_lost)
    errors = sorted(filter(None, map(error_of, ranks)), key=_is_no_refusal)
    if own := [error for error in errors if not _LOST_PEER.search(error)]:
        return ExitCause("error", own[0])
    if line := [*errors, _first(_STOPPED, lines)][0]:
        return ExitCause("killed", line)
    if first_lost:
        return ExitCause("error", first_lost)
    if line := _first(_STEP_ENDED, lines):
        return ExitCause("cancelled", line)
    if word == _FAILED:
        said = [line for line in lines if not is_launchers(line)]
        return ExitCause("error", said[-1].strip() if said else "it failed without a word")
    if word == _WITHOUT_RESULT:
        return ExitCause("killed")
    return ExitCause("unknown")


def error_of(lines: Sequence[str]) -> str:
    """Return the line of a rank's log that says why it failed; "" if none does.

    Look for our own `error: ` first, then for the end of the last traceback, then for a last line
    that names an error.
    """
    own = [line for line in lines if not is_launchers(line)]
    refusals = [line for line in own if line.startswith(ERROR_PREFIX)]
    if refusals:
        return refusals[-1]
    begin = traceback_at(own)
    if begin is not None:  # the message may have several lines
        return next((line for line in own[begin + 1 :] if names_error(line)), "")
    return own[-1] if own and names_error(own[-1]) else ""


def traceback_at(lines: Sequence[str]) -> int | None:
    """Return the index of the line where the last traceback of an uncaught exception begins."""
    starts = [i for i, line in enumerate(lines) if "Traceback (most recent call last)" in line]
    ended = [i for i in starts if not (i and lines[i - 1].startswith("Exception ignored in"))]
    return ended[-1] if ended else None


def _is_no_refusal(error: str) -> bool:
    return not error.startswith(ERROR_PREFIX)


def _first(pattern: re.Pattern[str], lines: Iterable[str]) -> str:
    return next((line for line in lines if pattern.search(line)), "")
