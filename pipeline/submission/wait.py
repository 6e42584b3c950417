"""Wait until the jobs of a submission have ended, and report the outcome."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TypeVar

from rich.console import Console
from rich.status import Status
from rich.text import Text

from hpc.cli import USER_ERROR_EXIT_CODE, one_line
from hpc.scheduler.base import Queue, QueueUnreachable
from hpc.scheduler.exit_cause import names_error
from hpc.scheduler.job import last_error
from pipeline.config.grid_file import Grid
from pipeline.tracking.display import counts_line, reason_lines, time_left
from pipeline.tracking.outcomes import not_successful
from pipeline.tracking.submissions import GRID, REPORT
from pipeline.tracking.survey import CellState, Survey, survey

_CLUSTER_POLL_SECONDS = 15.0
_LINE_SECONDS = 30.0  # between lines where there is no terminal

T = TypeVar("T")
Jobs = Mapping[str, Sequence[str]]  # ids by stage


def wait_for(
    grid: Grid,
    queue: Queue,
    jobs: Jobs,
    stages: Sequence[str],
    submit: Callable[[Sequence[str]], Jobs] | None = None,
) -> int:
    """Wait until all `jobs` of `stages` have ended; print the report's table if there is one.

    Args:
        submit: Submits the deferred jobs of some stages; it is called when a job has ended.

    Returns:
        The exit code: 0 if all is done, 1 if cells are missing, 2 if a stage failed.
    """
    progress = _Progress(grid)
    try:
        while _watch(grid, queue, jobs, stages, progress) and submit:
            deferred = [stage for stage in stages if stage == GRID or stage not in jobs]
            jobs = {**jobs, **retry_while_unreachable(partial(submit, deferred))}
    except KeyboardInterrupt:
        words = one_line(grid.command_arguments)
        print(f"the jobs go on; see `python -m pipeline.status {words}`", file=sys.stderr)
        raise
    if error := _stage_error(queue, jobs):
        print(one_line(error), file=sys.stderr)
        return USER_ERROR_EXIT_CODE
    unfinished = _unfinished(grid, queue) if GRID in stages else []
    for line in unfinished:
        print(one_line(line), file=sys.stderr)
    if stopped := _stopped_stage(queue, jobs):
        print(one_line(stopped), file=sys.stderr)
    if REPORT in stages and grid.run.page.exists() and not stopped:
        from pipeline.rendering.terminal import print_report  # reads HDF5, so not for planning

        print_report(grid.run.results, grid.run.page)
    if unfinished:
        return 1
    return USER_ERROR_EXIT_CODE if stopped else 0


def retry_while_unreachable(ask: Callable[[], T]) -> T:
    """Return `ask()`. As long as the queue is unreachable, ask again; jobs go on without it. The
    user is told once."""
    told = False
    while True:
        try:
            return ask()
        except QueueUnreachable as error:
            if not told:
                print(one_line(f"{error}; waiting for Slurm"), file=sys.stderr)
            told = True
            time.sleep(_CLUSTER_POLL_SECONDS)


class _Progress:
    """Shows the progress of a grid: in place on a terminal, else by a line from time to time."""

    def __init__(self, grid: Grid) -> None:
        self._grid = grid
        self._console = Console(file=sys.stdout)
        self._shown_at, self._shown = 0.0, ""

    def status(self) -> Status:
        """Return the status line of a terminal."""
        return Status("waiting", console=self._console)

    def show(self, state: Survey, status: Status) -> None:
        """Show the progress of the grid now."""
        line = _progress_line(self._grid, state)
        status.update(Text(line))  # a plain string would be read as markup
        due = time.monotonic() - self._shown_at > _LINE_SECONDS
        if not self._console.is_terminal and due and line != self._shown:
            print(line, flush=True)
            self._shown_at, self._shown = time.monotonic(), line


def _watch(
    grid: Grid, queue: Queue, jobs: Jobs, stages: Sequence[str], progress: _Progress
) -> bool:
    """Block until every job has ended. Return True early if a job ended and deferred jobs can be
    submitted."""
    ids = {job for of_stage in jobs.values() for job in of_stage}
    missing = any(stage not in jobs for stage in stages)
    seen: set[str] = set()  # alive when we looked before
    with progress.status() as status:
        while True:
            state = retry_while_unreachable(partial(survey, grid, queue, ids))
            alive = {job for job in ids if state.jobs[job].state != "gone"}
            deferred = (
                missing or bool(state.deferred) or (GRID in stages and bool(state.deferred_stages))
            )
            if not alive and not deferred:
                return False
            if deferred and (not alive or seen - alive):
                time.sleep(queue.poll_seconds)  # the room may be taken by other jobs of the user
                return True
            seen = alive
            queue.ensure_runner()
            progress.show(state, status)
            time.sleep(queue.poll_seconds)


def _progress_line(grid: Grid, state: Survey) -> str:
    running = [cell for cell in state.cells if cell.state == "running" and cell.total]
    text = f"{one_line(grid.name)}: {counts_line(state)}"
    if state.pretraining:
        text += "; pre-training"
        far = [p for p in state.training_backbones.values() if p.total]
        if far:
            text += f", {min(p.step / p.total for p in far):.0%}"
    if running:
        slowest = min(running, key=_done_share)
        text += f"; {_done_share(slowest):.0%} of the slowest job"
        if left := time_left(slowest):
            text += f", {left} left"
    return text


def _done_share(cell: CellState) -> float:
    return cell.step / cell.total


def _stage_error(queue: Queue, jobs: Mapping[str, Sequence[str]]) -> str | None:
    """Return the error line of the first stage whose job failed."""
    for stage, ids in jobs.items():
        for job in ids if stage != GRID else ():
            error = last_error(queue.log_files(job))
            if error and names_error(error):
                return f"{stage}: {error}"
    return None


def _stopped_stage(queue: Queue, jobs: Jobs) -> str | None:
    """Return why a stage without an error in its log did not succeed: it was killed, for one."""
    stages = [(stage, job) for stage, ids in jobs.items() if stage != GRID for job in ids]
    ids = [job for _, job in stages]
    known = retry_while_unreachable(partial(queue.job_states, ids)) if ids else {}
    found = ((stage, not_successful(known[job], queue.log_files(job))) for stage, job in stages)
    return next((f"{stage}: {why}" for stage, why in found if why), None)


def _unfinished(grid: Grid, queue: Queue) -> list[str]:
    """Return a line for each reason why cells are not done."""
    cells = retry_while_unreachable(partial(survey, grid, queue)).cells
    return list(reason_lines(cell for cell in cells if cell.state != "done"))
