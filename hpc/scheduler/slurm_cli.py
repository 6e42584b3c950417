"""Run Slurm's commands and read their answers."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterable, Sequence
from itertools import groupby

from hpc.account import user_name
from hpc.cli import UserError, one_line
from hpc.scheduler.base import DEFAULT_MAX_ARRAY_SIZE, JobState, QueueUnreachable
from hpc.scheduler.clean_env import slurm_environ
from hpc.scheduler.exit_cause import NEVER_SATISFIED

# Job state codes of squeue(1)
_WAITING = {"PENDING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "RESV_DEL_HOLD", "SPECIAL_EXIT"}
_ENDED = {"BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY",
          "PREEMPTED", "REVOKED", "TIMEOUT"}  # fmt: skip
_TIMEOUT_SECONDS = 60.0
_LATER = "jobs go on; run it again when Slurm answers"
_REFUSAL = re.compile(
    r"Invalid (job|user|account|partition|qos)|denied|operation is presently disabled"
    r"|already (completing|finished)|no longer pending"
)
_IDS_AT_ONCE = 5000  # ids of 20 characters are 100 kB; Linux takes 128 KiB as one argument
_MIN_RANGE = 16  # shorter runs of array elements are cancelled one by one


class SlurmRefused(UserError):
    """Slurm answered, and refused a question or a request."""


def answer(command: Sequence[str], gone_is_fine: bool = False) -> str:
    """Return the standard output of a Slurm command.

    Args:
        command: The command and its arguments.
        gone_is_fine: If the command fails because a job is gone, return its output.

    Raises:
        SlurmRefused: Slurm refuses the request.
        QueueUnreachable: The command is not on PATH, fails, or does not end within 60 s.
    """
    done = _run(command)
    if done.returncode and not (gone_is_fine and "Invalid job id" in done.stderr):
        # the last line is the failure; those before it are its attempts
        said = done.stderr.strip().rpartition("\n")[2].strip()
        said = re.sub(r"^\w+: (fatal|error): ", "", said) or f"exit status {done.returncode}"
        if _REFUSAL.search(said):
            raise SlurmRefused(f"{command[0]} failed: {one_line(said)}")
        raise QueueUnreachable(f"{command[0]} failed: {one_line(said)}; {_LATER}")
    return done.stdout


def ask(*command: str) -> str:
    """Return what a Slurm command that changes nothing prints on standard output and error.

    Raises:
        SlurmRefused: The command fails.
        QueueUnreachable: The command is not on PATH, or does not end within 60 s.
    """
    done = _run(command)
    if done.returncode:
        said = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        raise SlurmRefused(f"{command[0]} says: {one_line('; '.join(said[-2:]))}")
    return done.stdout + done.stderr  # some commands answer on standard error


def not_on_path(name: str) -> QueueUnreachable:
    """Return the error for a Slurm command that is not installed here."""
    return QueueUnreachable(f"there is no {name} on PATH; use a login node of the cluster")


def job_states(ids: Iterable[str]) -> dict[str, JobState]:
    """Return the states of the jobs and arrays that Slurm still knows, by one squeue call.

    More than 5000 ids take several calls.
    """
    command = ["squeue", "--noheader", "--array", "--states=all", "--format=%i %T %r"]
    lines = _ask_of(command, list(ids), gone_is_fine=True)
    rows = (line.split(maxsplit=2) for line in lines if line.strip())
    return {job_id: _job_state(word, *reason) for job_id, word, *reason in rows}


def comments() -> dict[str, str]:
    """Return the comment of each of the user's jobs, by one squeue call."""
    command = ["squeue", "--noheader", "--array", "--states=all", "--me", "--format=%i %k"]
    rows = (line.strip().partition(" ") for line in answer(command).splitlines())
    return {job_id: comment for job_id, _, comment in rows}


def num_queued() -> int:
    """Return how many jobs the user has in the queue; each element of an array counts."""
    return len(answer(["squeue", "--noheader", "--array", "--me", "--format=%i"]).split())


def final_states(ids: Sequence[str]) -> dict[str, str]:
    """Return the state code of those jobs that accounting says have ended, by one sacct call.

    More than 5000 ids take several calls.
    """
    command = ["sacct", "--noheader", "--parsable2", "--allocations", "--format=JobID,State"]
    lines = _ask_of(command, ids)
    rows = (line.split("|") for line in lines if line.count("|") == 1)
    words = {job_id: state.split(maxsplit=1)[0] for job_id, state in rows if state.strip()}
    return {job_id: words[job_id] for job_id in ids if words.get(job_id) in _ENDED}


def max_array_size() -> int:
    """Return how many jobs an array may have, as `scontrol show config` says."""
    found = re.search(r"MaxArraySize\s*=\s*(\d+)", answer(["scontrol", "show", "config"]))
    return max(1, int(found.group(1))) if found else DEFAULT_MAX_ARRAY_SIZE


def submit_limit(account: str, qos: str) -> int | None:
    """Return how many jobs the user may have in the queue; None if accounting sets no limit.

    It is the smallest limit of the user's associations (of `account`, if given) and the QOS.
    """
    user = [f"user={user_name(os.getuid())}", *([f"account={account}"] if account else [])]
    questions = [["assoc", "where", *user, "format=MaxSubmitJobs"]]
    if qos:
        questions.append(["qos", "where", f"name={qos}", "format=MaxSubmitPU"])
    found = []
    for question in questions:
        try:
            said = answer(["sacctmgr", "--noheader", "--parsable2", "show", *question])
        except (QueueUnreachable, SlurmRefused):  # no accounting, no limit
            continue
        found += [int(word) for word in said.split() if word.isdigit()]
    return min(found, default=None)


def cancel(ids: Iterable[str]) -> None:
    """End jobs by one scancel call; ignore those that are gone."""
    answer(["scancel", "--quiet", *_as_ranges(ids)], gone_is_fine=True)


def requeue(job_id: str) -> bool:
    """Put a running job back into the queue under the same id.

    Slurm then sends it SIGTERM and, some seconds later, SIGKILL. A job that is being preempted is
    running until its grace time is over.

    Args:
        job_id: `ARRAY_TASK` for an element of an array. Do not pass SLURM_JOB_ID: for one element
            it equals the array's id, and Slurm would requeue every element.

    Returns:
        False, with nothing done, if Slurm is ending the job already: requeueing would revive a
        cancelled job.

    Raises:
        SlurmRefused: Slurm refuses.
        QueueUnreachable: Slurm does not answer.
    """
    if answer(["squeue", "--noheader", "--format=%T", f"--jobs={job_id}"]).strip() != "RUNNING":
        return False
    answer(["scontrol", "requeue", job_id])
    return True


def _ask_of(command: Sequence[str], ids: Sequence[str], gone_is_fine: bool = False) -> list[str]:
    """Return the lines that a command prints about jobs."""
    portions = (ids[at : at + _IDS_AT_ONCE] for at in range(0, len(ids), _IDS_AT_ONCE))
    answers = (answer([*command, f"--jobs={','.join(some)}"], gone_is_fine) for some in portions)
    return [line for text in answers for line in text.splitlines()]


def _as_ranges(ids: Iterable[str]) -> list[str]:
    """Write long runs of an array's elements as `7_[0-999]`.

    scancel may ask the controller once for each of its arguments.
    """
    words: list[str] = []
    plain: list[str] = []
    elements: dict[str, list[int]] = {}
    for job_id in ids:
        array, _, element = job_id.partition("_")
        if element.isdecimal():
            elements.setdefault(array, []).append(int(element))
        else:
            plain.append(job_id)
    for array, numbers in elements.items():
        # the difference is equal for numbers that follow each other
        for _, group in groupby(enumerate(sorted(numbers)), lambda pair: pair[1] - pair[0]):
            row = [number for _, number in group]
            if len(row) < _MIN_RANGE:
                words += [f"{array}_{number}" for number in row]
            else:
                words.append(f"{array}_[{row[0]}-{row[-1]}]")
    return words + plain


def _job_state(word: str, reason: str = "None") -> JobState:
    if word in _WAITING:
        return JobState("waiting", "" if reason == "None" else reason)
    if word in _ENDED:  # squeue shows ended jobs for some minutes
        return JobState("gone", reason if reason == NEVER_SATISFIED else word)
    return JobState("running")  # COMPLETING too: it still has processes


def _run(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            command, capture_output=True, text=True, timeout=_TIMEOUT_SECONDS, env=slurm_environ()
        )
    except FileNotFoundError as error:
        raise not_on_path(command[0]) from error
    except (OSError, subprocess.TimeoutExpired) as error:
        raise QueueUnreachable(f"{command[0]} does not answer: {error}; {_LATER}") from error
