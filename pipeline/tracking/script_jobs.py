"""Which jobs the tasks of batch scripts became. Nobody tells us: people run sbatch themselves. But
`submit.sh`, and every element of an array as it starts, leave a note with the array's id, an empty
file `submitted/TOKEN-NAME.ID`."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from hpc.scheduler.base import Queue
from jobs.spec.run_paths import RunPaths
from pipeline.tracking.submissions import Submitted, recall, submissions

_NOTE = re.compile(r"(?P<script>.+)\.(?P<array>[0-9]+)")


def noted_arrays(folder: Path) -> dict[str, list[str]]:
    """The arrays that each script (`TOKEN-NAME`) became, newest first, by the notes in `folder`."""
    found: dict[str, list[str]] = {}
    try:
        names = [path.name for path in folder.iterdir()]
    except OSError:  # there are no submissions, or reading their records says what is wrong
        return {}
    for match in filter(None, map(_NOTE.fullmatch, names)):
        found.setdefault(match["script"], []).append(match["array"])
    return {script: sorted(arrays, key=int, reverse=True) for script, arrays in found.items()}


def sent_tasks(run: RunPaths, queue: Queue) -> Iterator[Submitted]:
    """What all submission records hold, oldest first, with the jobs that only `queue` remembers; a
    task of a script once for each job that it may have become."""
    arrays = noted_arrays(run.submitted)
    for task in recall(submissions(run), queue):
        found = [] if task.job else candidates(task.script, task.element, arrays)
        yield from (replace(task, job=job) for job in reversed(found)) if found else (task,)


def candidates(script: str, element: int, arrays: Mapping[str, Sequence[str]]) -> list[str]:
    """The jobs that may be, or have been, the element of a script, newest first."""
    return [f"{array}_{element}" for array in arrays.get(script, ())]


def job_of(
    jobs: Sequence[str], alive: Callable[[str], bool], logs: Callable[[str], Sequence[Any]]
) -> str:
    """Which of the candidates is meant: the newest that lives, or else that has left logs, or else
    the newest; "" if there is none. An array may have been sent with some of its elements only."""
    return next(filter(alive, jobs), "") or next(filter(logs, jobs), "") or next(iter(jobs), "")
