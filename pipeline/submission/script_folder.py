"""Write the batch scripts of `--script DIR`, in place of older ones and of nothing else."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from hpc.cli import UserError, one_line, warn
from hpc.scheduler import sbatch_options
from hpc.scheduler.base import Queue
from hpc.storage.atomic import TEMPORARY_PREFIX, remove_file, write_bytes
from hpc.storage.permissions import private_folder, require_private
from jobs.spec.task import Task, write_task
from pipeline.config.grid_file import Grid
from pipeline.planning.plan import Plan, without_waiting
from pipeline.planning.preflight import check_room
from pipeline.submission.batch_scripts import (
    MARK,
    SUBMIT,
    Part,
    ScriptSite,
    note_name,
    parts,
    render,
)
from pipeline.submission.code_version import source_of_code
from pipeline.submission.decision import plan_of
from pipeline.submission.submitter import (
    TO_DO,
    Choice,
    check,
    keep_config,
    one_submission,
    set_altered_counts_aside,
    set_stale_aside,
)
from pipeline.tracking.display import describe_survey
from pipeline.tracking.submissions import GRID, Submitted, new_token, record_path, write_tasks
from pipeline.tracking.survey import survey

_OURS = re.compile(r"(prep|pretrain|train|reduce|report)(-[0-9]+)?\.sbatch|submit\.sh")
_ELSEWHERE = "choose another folder for --script"


def write_scripts(
    grid: Grid,
    queue: Queue,
    stages: Sequence[str],
    folder: Path,
    choose: Choice = TO_DO,
    options: Sequence[str] = (),
) -> None:
    """Do as `submit`, but write batch scripts into `folder`, which the user submits."""
    check(grid, stages)
    for line in sbatch_options.warnings(grid.cluster):
        warn(line)
    check_folder(folder, grid)  # a refusal leaves no run directory
    with one_submission(grid):
        plan = _plan(grid, queue, choose) if GRID in stages else Plan((), ())
        wanted = parts(stages, plan.pretrain, plan.bundles, queue.max_array_size())
        if not wanted:
            return print("nothing is left to submit, so no script was written")
        keep_config(grid)
        for place in (grid.run.logs, grid.run.submitted):  # Slurm makes no folder for its logs
            private_folder(place, grid.cluster.group)
        token, tasks = new_token(), [*plan.pretrain, *plan.bundles]
        for task in tasks:
            write_task(task)
        write_record(grid, token, wanted, tasks)
        run = grid.run.root.absolute()
        site = ScriptSite(grid.cluster, Path.cwd(), run, grid.name, token, options)
        write_folder(folder, render(site, wanted))
    send = one_line(shlex.quote(str(folder / SUBMIT)))
    return print(
        f"wrote {len(wanted)} scripts, with {len(tasks)} jobs in arrays; {send} submits all"
    )


def _plan(grid: Grid, queue: Queue, choose: Choice) -> Plan:
    set_altered_counts_aside(grid)
    state = survey(grid, queue)
    describe_survey(grid, state)
    plan = plan_of(grid, state, choose(state), source_of_code())
    ready = without_waiting(plan, state.pretraining)
    check_room(grid, [cell for task in ready.bundles for cell in task.cells])
    if left_out := len(plan.bundles) - len(ready.bundles):
        jobs = ", ".join(sorted(set(state.pretraining.values())))
        print(f"{left_out} jobs are left out until {jobs} has trained their backbone")
    set_stale_aside(grid, state, ready)
    return ready


def check_folder(folder: Path, grid: Grid) -> None:
    """Raise `UserError` unless `folder` can take scripts: it is missing, empty, or holds scripts of
    ours, others cannot write into it, and it is not part of what the grid writes."""
    real = Path(os.path.realpath(folder))
    taken = {"run directory": str(grid.run.root)}
    taken |= {f"shards folder of {name!r}": d.shards for name, d in grid.datasets.items()}
    for what, other in taken.items():
        if real.is_relative_to(os.path.realpath(other)):
            raise UserError(f"{folder} is in the {what}; {_ELSEWHERE}")
    there = next(place for place in (real, *real.parents) if os.path.lexists(place))
    if not there.is_dir():
        raise UserError(f"{there} is not a folder; {_ELSEWHERE}")
    require_private(folder, grid.cluster.group, _ELSEWHERE)
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"cannot write into {there}: Permission denied; {_ELSEWHERE}")
    if there == real:
        _refuse_others(folder)


def _refuse_others(folder: Path) -> None:
    for path in _entries(folder):
        if not (_OURS.fullmatch(path.name) and _is_ours(path)):
            raise UserError(
                f"{folder} holds {path.name!r}, which is not a script of ours; {_ELSEWHERE}"
            )


def _entries(folder: Path) -> list[Path]:
    """Return the files of a folder, without those that a killed writer left."""
    try:
        return sorted(p for p in folder.iterdir() if not p.name.startswith(TEMPORARY_PREFIX))
    except OSError as error:
        raise UserError(f"cannot list {folder}: {error.strerror}; {_ELSEWHERE}") from error


def _is_ours(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.readline() == b"#!/bin/bash\n" and file.readline().startswith(MARK.encode())
    except OSError:
        return False


def write_folder(folder: Path, files: Mapping[str, str]) -> None:
    """Make `folder` hold these scripts and no older ones. Raises `UserError`."""
    for name, text in files.items():
        # as paths are, whose bytes may be no text
        write_bytes(folder / name, text.encode("utf-8", "surrogateescape"))
    for path in _entries(folder):
        if path.name not in files and _OURS.fullmatch(path.name):
            remove_file(path)
    submit = folder / SUBMIT
    submit.chmod(submit.stat().st_mode | 0o100)


def write_record(grid: Grid, token: str, scripts: Sequence[Part], tasks: Sequence[Task]) -> None:
    """Note which tasks are which elements of which script, in place of the ids of jobs."""
    by_name = {task.name: task for task in tasks}
    elements = [
        Submitted.of(by_name[name], script=note_name(token, part), element=element)
        for part in scripts
        for element, (name, _) in enumerate(part.tasks)
    ]
    write_tasks(record_path(grid.run, token), elements)
