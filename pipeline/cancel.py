"""End the jobs of a grid, or the jobs of some cells.

    python -m pipeline.cancel [CONFIG] [--cell NAME]...

Running jobs save before they end, and waiting ones never start. Deferred jobs are not submitted,
not even by a `--wait` that goes on. `python -m pipeline.submit grid` continues where the jobs
stopped.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence, Set

from hpc.cli import argument_parser, one_line, run
from hpc.scheduler.auto import open_queue
from hpc.scheduler.base import Queue
from jobs.spec.cell import Cell
from pipeline.config.cell_names import cells_named
from pipeline.config.grid_file import Grid, find_config, read_grid
from pipeline.submission.submitter import one_at_a_time
from pipeline.tracking.submissions import (
    BUNDLE,
    CANCEL,
    PRETRAIN,
    Submission,
    Submitted,
    submitted_tasks,
)


def main(argv: Sequence[str]) -> int:
    """End all jobs of a grid, or some."""
    parser = argument_parser("python -m pipeline.cancel", __doc__)
    parser.add_argument("config", nargs="?", help="the grid file")
    parser.add_argument("--cell", action="append", default=[], metavar="NAME",
                        help="only the jobs that train it; may be repeated")  # fmt: skip
    parser.add_argument("--cluster", metavar="PROFILE", help="the profile it was submitted with")
    arguments = parser.parse_args(argv)
    grid = read_grid(find_config(arguments.config), arguments.cluster)
    queue = open_queue(grid.cluster, grid.run.logs, grid.run.queue)
    for line in cancel(grid, queue, cells_named(grid, arguments.cell)):
        print(one_line(line))
    return 0


def cancel(grid: Grid, queue: Queue, cells: Sequence[Cell] = ()) -> list[str]:
    """End the jobs that work on the grid, or on `cells`; return lines that say so.

    A record is written first, so that a cancelled cell is known as one, even if Slurm forgets.
    """
    if not grid.run.submitted.exists():
        return ["nothing to cancel: nothing was submitted"]
    with one_at_a_time(grid.run.root, grid.cluster.group):
        signatures = {cell.signature for cell in cells}
        alive, deferred = open_work(grid, queue, signatures)
        if not cells or alive or deferred:
            bundles = [task for task in (*alive, *deferred) if task.kind == BUNDLE]
            Submission(grid.run).cancelled(bundles, whole=not cells)
        jobs = {task.job: task for task in alive}
        queue.cancel(jobs)
    if not jobs and not deferred:
        return ["nothing to cancel: no job waits or runs"]
    lines = [f"cancelled {len(jobs)} jobs{_stages(jobs.values())}"]
    if deferred:
        lines.append(f"no longer deferred: {len(deferred)} jobs")
    others = {cell for task in (*alive, *deferred) for cell in task.cells} - signatures
    if cells and others:
        lines.append(f"with them end {len(others)} other cells, which are in the same jobs")
    lines.append(
        f"running jobs save first; `python -m pipeline.submit grid {grid.command_arguments}` "
        "resumes them"
    )
    return lines


def open_work(
    grid: Grid, queue: Queue, signatures: Set[str] = frozenset()
) -> tuple[list[Submitted], list[Submitted]]:
    """Return the tasks and stages whose jobs wait or run, and the deferred tasks.

    With `signatures`, return only those that train one of these cells.
    """
    found = submitted_tasks(grid.run, queue)
    tasks = [task for task in found if task.kind != CANCEL or not task.job]
    if signatures:
        tasks = [t for t in tasks if t.kind != PRETRAIN and not signatures.isdisjoint(t.cells)]
    jobs = queue.job_states({task.job for task in tasks if task.job})
    alive = {t.job: t for t in tasks if t.job and jobs[t.job].state != "gone"}
    latest = {cell: task for task in tasks for cell in task.cells if task.kind != PRETRAIN}
    deferred = {task.task: task for task in latest.values() if task.deferred}
    return list(alive.values()), list(deferred.values())


def _stages(tasks: Collection[Submitted]) -> str:
    stages = sorted({task.kind for task in tasks if not task.cells})
    return f", {', '.join(stages)} among them" if stages else ""


if __name__ == "__main__":
    run(main)
