"""Show the logs of a cell's job: the error first, then the last lines of every rank.

    python -m pipeline.logs CELL [CONFIG]

CELL is a name as `status` prints it, or a part of it that no other cell's name has. `prep`,
`pretrain`, `reduce` and `report` show the last job of that stage.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from hpc.cli import UserError, argument_parser, one_line, run
from hpc.scheduler.auto import open_queue
from hpc.scheduler.base import Queue
from hpc.scheduler.exit_cause import error_of, traceback_at
from hpc.scheduler.job import is_launchers, last_start
from pipeline.config.cell_names import one_named
from pipeline.config.grid_file import Grid, find_config, read_grid
from pipeline.tracking.display import unasked_line
from pipeline.tracking.submissions import CANCEL, PREP, PRETRAIN, REDUCE, REPORT, submitted_tasks

_KINDS = (PREP, PRETRAIN, REDUCE, REPORT)
_LINES = 20


def main(argv: Sequence[str]) -> int:
    """Print the logs of the last job of a cell or stage."""
    parser = argument_parser("python -m pipeline.logs", __doc__)
    parser.add_argument("cell", help="a cell, or prep, pretrain, reduce or report")
    parser.add_argument("config", nargs="?", help="the grid file")
    parser.add_argument("--lines", type=int, default=_LINES, metavar="N",
                        help=f"how many lines of each log (default {_LINES})")  # fmt: skip
    parser.add_argument("--all", action="store_true", help="whole logs, earlier starts too")
    parser.add_argument("--cluster", metavar="PROFILE", help="the profile it was submitted with")
    arguments = parser.parse_args(argv)
    if arguments.lines < 1:
        parser.error("--lines must be 1 or more")
    grid = read_grid(find_config(arguments.config), arguments.cluster)
    queue = open_queue(grid.cluster, grid.run.logs, grid.run.queue, read_only=True)
    name, jobs = jobs_of(grid, queue, arguments.cell)
    if queue.unreachable:
        print(unasked_line(queue.unreachable))
    for line in describe(queue, name, jobs, None if arguments.all else arguments.lines):
        print(one_line(line))
    return 0


def jobs_of(grid: Grid, queue: Queue, name: str) -> tuple[str, list[str]]:
    """Return the meaning of `name`, and the jobs that were submitted for it, the last first.

    Raises:
        UserError: `name` means nothing, or no job was submitted for it.
    """
    meant = one_named(grid, name, _KINDS)
    found = submitted_tasks(grid.run, queue)
    tasks = [task for task in found if task.job and task.kind != CANCEL]
    if isinstance(meant, str):
        known, title = [task for task in tasks if task.kind == meant], meant
    else:
        title = meant.name
        known = [t for t in tasks if meant.signature in t.cells and t.kind != PRETRAIN]
    if not known:
        raise UserError(f"{title} has no logs: no job was submitted for it")
    return title, list(dict.fromkeys(task.job for task in reversed(known)))


def describe(queue: Queue, name: str, jobs: Sequence[str], lines: int | None) -> Iterator[str]:
    """Yield the logs of the last of `jobs` that has any: their folder, its error, and the last
    `lines` of each rank (None: all lines of all starts)."""
    logs = {job: found for job in jobs if (found := queue.log_files(job))}
    if not logs:
        yield f"{name}: job {jobs[0]} has written nothing yet"
        return
    job = next(iter(logs))
    if job != jobs[0]:
        yield f"{name}: job {jobs[0]} has written nothing yet; this is the one before"
    yield f"{name}: job {job}, {len(logs[job])} ranks, logs in {logs[job][0].parent}"
    if earlier := [other for other in logs if other != job]:
        yield f"earlier jobs: {', '.join(earlier)}"
    yield from error_first(logs[job])
    seen: dict[tuple[str, ...], str] = {}
    for log in ranks_and_streams(logs[job]):
        text = tuple(whole(log) if lines is None else last_start(log)[-lines:])
        if not text:
            continue
        yield ""
        if text in seen:
            yield f"== {log.name}: as {seen[text]}"
            continue
        seen[text] = log.name
        yield f"== {log.name}"
        yield from text


def error_first(logs: Sequence[Path]) -> Iterator[str]:
    """Yield the error of the first rank that has one, with its traceback. Refusals of ours come
    first, since they say what to do."""
    starts = [last_start(log) for log in logs]
    errors = [(rank, error) for rank, lines in enumerate(starts) if (error := error_of(lines))]
    for rank, error in sorted(errors, key=lambda found: not found[1].startswith("error: "))[:1]:
        yield ""
        yield f"== rank {rank} ended with"
        own = [line for line in starts[rank] if not is_launchers(line)]
        begin = traceback_at(own)
        if error.startswith("error: ") or begin is None:
            yield error
            continue
        end = next((n for n, line in enumerate(own) if n > begin and line == error), len(own))
        yield from own[begin : end + 1]


def ranks_and_streams(logs: Sequence[Path]) -> Iterator[Path]:
    """Yield the logs of standard error and output of each rank."""
    for log in logs:
        yield log
        if log.suffix == ".err":
            yield log.with_suffix(".out")


def whole(log: Path) -> list[str]:
    """Return all lines of a log; none if there is no such file."""
    try:
        return log.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []


if __name__ == "__main__":
    run(main)
