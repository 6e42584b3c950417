"""Submit the stages of a grid: pack its data sets, train what is missing, reduce, report.

    python -m pipeline.submit {prep,grid,reduce,report,all} [CONFIG]
    python -m pipeline.submit {...} [CONFIG] --script DIR    batch scripts for sbatch instead

Running `grid` again submits missing cells and resumes interrupted ones. CONFIG is $LOSSGRID_CONFIG,
or ./lossgrid.toml, if it is not given.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from data_prep.shards.manifest import MANIFEST
from hpc.cli import argument_parser, one_line, run
from hpc.config import user_path
from hpc.scheduler.auto import open_queue
from hpc.scheduler.base import Queue
from pipeline.config.grid_file import Grid, find_config, profiled, read_grid
from pipeline.planning.forecast import Forecast
from pipeline.submission.code_version import source_of_code
from pipeline.submission.decision import Command, cells_to_submit, decide, plan_of
from pipeline.submission.script_folder import check_folder, write_scripts
from pipeline.submission.submitter import Choice, check, submit, submit_deferred
from pipeline.submission.wait import wait_for
from pipeline.tracking.display import describe_missing, describe_plan
from pipeline.tracking.submissions import GRID, PREP, STAGES, cancellations
from pipeline.tracking.survey import survey

_ALL = "all"


def main(argv: Sequence[str]) -> int:
    """Submit one stage, or all, of a grid file."""
    parser = argument_parser("python -m pipeline.submit", __doc__)
    parser.add_argument("stage", choices=(*STAGES, _ALL))
    parser.add_argument("config", nargs="?", help="the grid file")
    parser.add_argument("--dry-run", action="store_true", help="show what would be submitted")
    parser.add_argument("--wait", action="store_true", help="stay until the jobs have ended")
    parser.add_argument("--script", metavar="DIR", help="write scripts to submit by hand instead")
    parser.add_argument("--cluster", metavar="PROFILE", help="a cluster profile's name or path")
    parser.add_argument(
        "--allow-fewer",
        action="store_true",
        help="let a result with fewer cells replace one with more",
    )
    parser.add_argument("--profile", action="store_true", help="measure the parts of the jobs")
    parser.add_argument("--retrain", choices=["stale"], help="grid: train stale cells again")
    parser.add_argument(
        "--step-seconds", type=float, metavar="S", help="for estimates: a step of the largest job"
    )
    arguments = parser.parse_args(argv)
    if arguments.step_seconds is not None and not 0 < arguments.step_seconds < 1e6:
        parser.error("--step-seconds must be a number of seconds above 0")
    if arguments.retrain and arguments.stage != GRID:
        parser.error("--retrain goes with the stage grid: which cells are stale shows after prep")
    if arguments.script is not None and arguments.wait:
        parser.error("--wait: scripts start no jobs that one could wait for")
    scripts = None if arguments.script is None else user_path(arguments.script, "--script")
    grid = read_grid(find_config(arguments.config), arguments.cluster)
    if arguments.profile:
        grid = profiled(grid)
    command: Command = "grid --retrain stale" if arguments.retrain else "grid"
    choose = partial(cells_to_submit, command=command)
    reads = arguments.dry_run or scripts is not None
    queue = open_queue(grid.cluster, grid.run.logs, grid.run.queue, read_only=reads)
    stages = stages_of(arguments.stage, grid)
    if arguments.dry_run:
        dry_run(grid, queue, stages, choose, Forecast(grid, arguments.step_seconds))
        if scripts:
            check_folder(scripts, grid)
        return 0
    options = ("--allow-fewer",) if arguments.allow_fewer else ()
    if scripts:
        write_scripts(grid, queue, stages, scripts, choose, options)
        return 0
    jobs = submit(grid, queue, stages, choose, options=options)
    if not arguments.wait:
        return 0
    cancelled = cancellations(grid.run)
    again = partial(submit_deferred, grid, queue, cancelled, "submit --wait", options=options)
    return wait_for(grid, queue, jobs, stages, again)


def stages_of(stage: str, grid: Grid) -> tuple[str, ...]:
    """Return the stages of a command: all for `all`; `grid` packs first what is not packed yet."""
    if stage == _ALL:
        return STAGES
    unpacked = [n for n, d in grid.datasets.items() if not (Path(d.shards) / MANIFEST).exists()]
    if stage == GRID and unpacked:
        print(f"not packed yet, so that comes first: {', '.join(map(one_line, unpacked))}")
        return (PREP, GRID)
    return (stage,)


def dry_run(
    grid: Grid, queue: Queue, stages: Sequence[str], choose: Choice, forecast: Forecast
) -> None:
    """Print what a submission would do and cost. Write nothing."""
    queue.check()
    state = survey(grid, queue, accounting=True, verify=True)
    plan = plan_of(grid, state, choose(state), source_of_code(), forecast)
    describe_plan(grid, state, plan, decide(state, stages, plan).stages, forecast)
    # after the plan: the user can look at it before the data are there
    describe_missing(check(grid, stages, missing_is_fine=True))


if __name__ == "__main__":
    run(main)
