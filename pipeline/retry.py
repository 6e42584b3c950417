"""Submit failed and interrupted cells again, depending on the exit cause of their jobs.

    python -m pipeline.retry [CONFIG] [--cell NAME]...

Node failure, preemption, time limit, kill: the cells resume from their last checkpoint. Out of
memory: they go into jobs of half as many cells. Errors, cancelled cells and losses that were not
finite are only reported; `--cell` submits such a cell again.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from hpc.cli import UserError, argument_parser, one_line, run
from hpc.scheduler.auto import open_queue
from jobs.spec.cell import Cell
from jobs.spec.run_paths import RunPaths
from pipeline.config.cell_names import cells_named
from pipeline.config.grid_file import Grid, find_config, read_grid
from pipeline.submission.code_version import source_of_code
from pipeline.submission.decision import cells_to_submit, plan_of, submits
from pipeline.submission.submitter import check, submit, submit_deferred
from pipeline.submission.wait import wait_for
from pipeline.tracking.display import TOO_LARGE, describe_missing, reason_lines, unasked_line
from pipeline.tracking.submissions import GRID, cancellations
from pipeline.tracking.survey import NOT_FINITE, CellState, Survey, survey

_MEMORY = "out of memory"


def main(argv: Sequence[str]) -> int:
    """Submit failed and interrupted cells again."""
    parser = argument_parser("python -m pipeline.retry", __doc__)
    parser.add_argument("config", nargs="?", help="the grid file")
    parser.add_argument("--cell", action="append", default=[], metavar="NAME",
                        help="this cell, whatever its cause; may be repeated")  # fmt: skip
    parser.add_argument("--dry-run", action="store_true", help="show what would be submitted")
    parser.add_argument("--wait", action="store_true", help="stay until the jobs have ended")
    parser.add_argument("--cluster", metavar="PROFILE", help="a cluster profile's name or path")
    arguments = parser.parse_args(argv)
    grid = read_grid(find_config(arguments.config), arguments.cluster)
    dry_run = arguments.dry_run
    queue = open_queue(grid.cluster, grid.run.logs, grid.run.queue, read_only=dry_run)
    named = cells_named(grid, arguments.cell)
    state = survey(grid, queue, accounting=True)
    cells = choose(state, named)
    if state.unreachable:
        print(unasked_line(state.unreachable))
    for line in describe(grid, state, named):
        print(one_line(line))
    if dry_run:
        describe_missing(check(grid, [GRID], missing_is_fine=True))
    if dry_run or not cells:
        num_jobs = len(plan_of(grid, state, cells, source_of_code()).bundles)
        print(f"would submit {num_jobs} jobs" if cells else "nothing to submit again")
        return 0
    again_named = partial(choose, named=named)
    jobs = submit(grid, queue, [GRID], again_named, failure_records_set_aside(grid.run, named))
    if not arguments.wait:
        return 0
    again = partial(submit_deferred, grid, queue, cancellations(grid.run), "retry --wait")
    return wait_for(grid, queue, jobs, (GRID,), again)


def choose(state: Survey, named: Sequence[Cell] = ()) -> list[Cell]:
    """Return the cells to submit again: those `named`, or all that `retry` chooses by itself.

    Raises:
        UserError: A named cell is done or on its way.
    """
    if named:
        states = {cell.cell.signature: cell for cell in state.cells}
        for cell in named:
            _require_stopped(states[cell.signature], state)
        return list(named)
    return cells_to_submit(state, "retry")


@contextmanager
def failure_records_set_aside(run: RunPaths, named: Sequence[Cell]) -> Iterator[None]:
    """Rename the failure records that keep the named cells from training; undo it if the submission
    is refused."""
    renamed: dict[Path, Path] = {}
    try:
        for cell in named:
            record = run.failure(cell.signature)
            if record.exists():
                renamed[record] = record.rename(_free_name(run, cell))
        yield
    except UserError:
        for record, kept in renamed.items():
            kept.rename(record)
        raise


def _free_name(run: RunPaths, cell: Cell) -> Path:
    names = (run.failure(f"{cell.signature}-retried-{number}") for number in itertools.count(1))
    return next(name for name in names if not name.exists())


def _tried(state: Survey) -> list[CellState]:
    """Return the cells whose job ended without finishing them."""
    return [cell for cell in state.cells if cell.cause and cell.state not in ("done", "running")]


def _require_stopped(cell: CellState, state: Survey) -> None:
    name = cell.cell.name
    if cell.state == "done":
        raise UserError(f"{name} is done; there is nothing to try again")
    if cell.state == "stale":
        raise UserError(f"{name} is stale ({cell.why}); submit grid with --retrain stale")
    if cell.job in state.active_jobs or cell.state in ("running", "unknown"):
        what = "is running" if cell.state == "running" else "is waiting"
        if cell.state == "unknown":
            what = "was submitted, and the queue cannot be asked from here"
        if cell.cause == NOT_FINITE:
            what = "has failed, but the other cells of its job still train"
        raise UserError(f"{name} {what}, job {cell.job}; wait for its end, or cancel it first")


def describe(grid: Grid, state: Survey, named: Sequence[Cell] = ()) -> Iterator[str]:
    """Yield a line for each cause, with the number of cells and what happens to them, and one for
    each reason why cells need `--cell`."""
    signatures = {cell.signature for cell in named}
    tried = [c for c in _tried(state) if not named or c.cell.signature in signatures]
    for (cause, again), cells in _by_cause(tried, state).items():
        number = f"{len(cells)} cell{'s' * (len(cells) > 1)}"
        if named or (again and cause != _MEMORY):
            yield f"{number}: {cause}: again"
        elif again:
            sizes = sorted({state.at_most[c.cell.signature] for c in cells
                            if c.cell.signature in state.at_most})  # fmt: skip
            how = (
                f"at most {' or '.join(map(str, sizes))} in a job" if sizes else "with more memory"
            )
            yield f"{number}: {cause}: again, {how}"
        else:
            yield f"{number}: {cause}: not submitted; {_remedy(grid, cause)}"
            yield from (f"  {line}" for line in reason_lines(cells, with_state=False))
    if not named and (unknown := state.count("unknown")):
        yield f"{unknown} cells: unknown; run retry where the queue answers"


def _by_cause(cells: Sequence[CellState], state: Survey) -> dict[tuple[str, bool], list[CellState]]:
    grouped: dict[tuple[str, bool], list[CellState]] = {}
    for cell in cells:
        grouped.setdefault((cell.cause, submits(state, "retry", cell)), []).append(cell)
    return grouped


def _remedy(grid: Grid, cause: str) -> str:
    by_name = f"`python -m pipeline.retry {grid.command_arguments} --cell NAME`"
    return {
        "cancelled": f"`python -m pipeline.submit grid {grid.command_arguments}` submits them",
        _MEMORY: f"they {TOO_LARGE}; then, or with {by_name}, they are tried again",
        NOT_FINITE: f"change their settings, or try the same again with {by_name}",
    }.get(
        cause,
        "correct the error, then "
        f"`python -m pipeline.submit grid {grid.command_arguments}`, or {by_name}",
    )


if __name__ == "__main__":
    run(main)
