"""What makes a submission safe that dies when sbatch has taken its jobs, and nobody has noted their
ids or moved in place what they are to do: an array carries a mark as its comment, by which squeue
finds it, and its calls lie under that mark before sbatch is asked, where its script takes them."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path

from hpc.cli import USER_ERROR_EXIT_CODE
from hpc.scheduler.job import ModuleCall
from hpc.storage.atomic import new_file

_ELEMENT = "${SLURM_ARRAY_TASK_ID:-0}"
# what submitit calls a job
_JOB = "${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}"


def mark_of(token: str, first: int) -> str:
    """The mark of an array whose first element is call `first` of those sent under `token`: one
    word, of which `token` holds no `+`."""
    return f"{token}+{first}"


def leave_calls(folder: Path, mark: str, calls: Sequence[ModuleCall]) -> None:
    """Write what an array is to do, as submitit pickles it, into submitit's folder."""
    from submitit.core.utils import DelayedSubmission  # only submissions need it

    for element, call in enumerate(calls):
        with new_file(folder / f"{mark}_{element}.pkl") as path:
            DelayedSubmission(call).dump(path)


def take_call(folder: Path, mark: str) -> list[str]:
    """Lines of the array's script: submitit's pickle of the job is there, or becomes a link to the
    call that was left. The job ends with a line that says so if both are gone."""
    where = shlex.quote(str(folder))
    refusal = "error: $pickle is gone, which says what this job does; run grid again"
    return [
        f'call="{mark}_{_ELEMENT}.pkl" pickle={where}/"{_JOB}_submitted.pkl"',
        '[ -e "$pickle" ] || ln -s "$call" "$pickle" 2>/dev/null',
        f'[ -e "$pickle" ] || {{ echo "{refusal}" >&2; exit {USER_ERROR_EXIT_CODE}; }}',
    ]


def marked(rows: Iterable[str], tokens: Iterable[str]) -> dict[str, dict[int, str]]:
    """The jobs sent under some of `tokens`, by the number of their call, from rows of squeue: a
    job's id, and its comment."""
    found: dict[str, dict[int, str]] = {token: {} for token in tokens}
    for row in rows:
        job, _, comment = row.strip().partition(" ")
        token, _, first = comment.partition("+")
        if token in found and first.isdigit():
            found[token][int(first) + int(job.partition("_")[2] or 0)] = job
    return found
