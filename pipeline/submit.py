"""Submit the stages of a grid: pack its data sets, train what is missing, reduce, report.

    python -m pipeline.submit {prep,grid,reduce,report,all} [CONFIG]
    python -m pipeline.submit {...} [CONFIG] --script DIR    batch scripts for sbatch instead

Running `grid` again submits what is missing and resumes what was interrupted. Without CONFIG it is
$LOSSGRID_CONFIG, or ./lossgrid.toml.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from data_prep.manifest import MANIFEST
from hpc import sbatch
from hpc.atomic import write_bytes
from hpc.call import ModuleCall
from hpc.command import MissingInput, UserError, argument_parser, one_line, run, warn
from hpc.config import user_path
from hpc.locks import take_lock
from hpc.private import private_folder, require_private, restrict_umask
from hpc.profile import Resources
from hpc.queue import Queue, open_queue
from jobs.counts_file import set_aside_altered
from jobs.task import Task, write_task
from pipeline.checks import check_inputs, check_room, check_sources
from pipeline.choice import Choice, to_do, unsent
from pipeline.ended import granted
from pipeline.forecast import Forecast
from pipeline.grid import Grid, find_config, profiled, read_grid
from pipeline.plan import Plan, make_plan, split, without_waiting
from pipeline.records import Submission, cancellations, new_token, settle
from pipeline.script_folder import check_folder, write_folder, write_record
from pipeline.scripts import SUBMIT, Site, parts, render
from pipeline.show import describe_missing, describe_plan, describe_survey
from pipeline.source import source_of_code
from pipeline.state import Survey, survey
from pipeline.wait import wait_for

STAGES = ("prep", "grid", "reduce", "report", "all")
_REMEDY = "set run_dir to a folder of yours"
_PROGRAMS = {"bundle": "jobs.train", "pretrain": "jobs.pretrain"}


def main(argv: Sequence[str]) -> int:
    """Submit one stage, or all, of a grid file."""
    parser = argument_parser("python -m pipeline.submit", __doc__)
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("config", nargs="?", help="the grid file")
    parser.add_argument("--dry-run", action="store_true", help="show what would be submitted")
    parser.add_argument("--wait", action="store_true", help="stay until the jobs have ended")
    parser.add_argument("--script", metavar="DIR", help="write scripts to submit by hand instead")
    parser.add_argument("--cluster", metavar="PROFILE", help="a cluster profile's name or path")
    parser.add_argument("--profile", action="store_true", help="measure the parts of the jobs")
    parser.add_argument(
        "--step-seconds", type=float, metavar="S", help="for estimates: a step of the largest job"
    )
    arguments = parser.parse_args(argv)
    if arguments.step_seconds is not None and not 0 < arguments.step_seconds < 1e6:
        parser.error("--step-seconds must be a number of seconds above 0")
    if arguments.script is not None and arguments.wait:
        parser.error("--wait: scripts start no jobs that one could wait for")
    scripts = None if arguments.script is None else user_path(arguments.script, "--script")
    grid = read_grid(find_config(arguments.config), arguments.cluster)
    if arguments.profile:
        grid = profiled(grid)
    reads = arguments.dry_run or scripts is not None
    queue = open_queue(grid.cluster, grid.run.logs, grid.run.queue, read_only=reads)
    stages = stages_of(arguments.stage, grid)
    if arguments.dry_run:
        queue.check()
        state = survey(grid, queue, accounting=True, verify=True)
        forecast = Forecast(grid, arguments.step_seconds)
        describe_plan(grid, state, plan_of(grid, state, forecast), stages, forecast)
        # after the plan: it can be looked at before its data are there
        describe_missing(check(grid, stages, missing_is_fine=True))
        if scripts:
            check_folder(scripts, grid)
        return 0
    if scripts:
        write_scripts(grid, queue, stages, scripts)
        return 0
    jobs = submit(grid, queue, stages)
    if not arguments.wait:
        return 0
    again = partial(submit, grid, queue, choose=unsent, cancelled=cancellations(grid.run))
    return wait_for(grid, queue, jobs, stages, again)


def stages_of(stage: str, grid: Grid) -> tuple[str, ...]:
    """The stages that a command means: `all` is every one, and `grid` packs first what is not
    packed yet."""
    if stage == "all":
        return STAGES[:-1]
    unpacked = [n for n, d in grid.datasets.items() if not (Path(d.shards) / MANIFEST).exists()]
    if stage == "grid" and unpacked:
        print(f"not packed yet, so that comes first: {', '.join(map(one_line, unpacked))}")
        return ("prep", "grid")
    return (stage,)


def check(grid: Grid, stages: Sequence[str], missing_is_fine: bool = False) -> list[MissingInput]:
    """Refuse what cannot work before anything is queued. Raises `UserError`. Files that are not
    there yet are returned if `missing_is_fine`."""
    require_private(grid.run.root, grid.cluster.group, _REMEDY)
    missing = check_sources(grid) if "prep" in stages else []
    if "grid" in stages:
        missing += check_inputs(grid, packed="prep" not in stages)
    if missing and not missing_is_fine:
        raise missing[0]
    return missing


def submit(
    grid: Grid,
    queue: Queue,
    stages: Sequence[str],
    choose: Choice = to_do,
    cancelled: int | None = None,
) -> dict[str, list[str]]:
    """Submit `stages`, each after the one before. Returns the job ids by stage. Where the queue has
    no room for more, the stages that are not there, and perhaps some of a grid's tasks, are held
    back. Refuses if the grid was cancelled since it had been `cancelled` so many times."""
    check(grid, stages)  # a refused submission leaves no run directory
    with submission(grid) as config:
        if cancelled is not None and cancellations(grid.run) != cancelled:
            raise UserError("the grid was cancelled meanwhile; what was held back is not sent")
        record = Submission(grid.run)
        jobs: dict[str, list[str]] = {}
        after: list[str] = []
        for stage in stages:
            if stage == "grid":
                jobs[stage], all_sent = submit_grid(grid, queue, after, record, choose)
                after = [*jobs[stage], *after]
                if not all_sent:
                    break
                continue
            if queue.room() == 0:
                break
            call = ModuleCall(_STAGE_PROGRAMS[stage], (str(config),))
            wanted, token = _resources(grid, queue, stage), record.sending([stage])
            jobs[stage] = queue.submit([call], wanted, stage, after, token)
            record.sent([stage], jobs[stage])
            after = jobs[stage]
    if held := [stage for stage in stages if stage not in jobs]:
        print(f"held back: {', '.join(held)}: {_HELD}")
    return jobs


_STAGE_PROGRAMS = {
    "prep": "data_prep.pack",
    "reduce": "pipeline.reduce",
    "report": "pipeline.report",
}


def _resources(grid: Grid, queue: Queue, stage: str) -> Resources:
    by_mpi = stage == "reduce" and queue.starts_mpi
    return grid.cluster.reducing() if by_mpi else grid.cluster.single()


def submit_grid(
    grid: Grid, queue: Queue, after: Sequence[str], record: Submission, choose: Choice = to_do
) -> tuple[list[str], bool]:
    """Submit the tasks that are missing, as many as the queue has room for. Returns the ids of all
    jobs that work on the grid now, old and new, and whether all tasks were sent."""
    _set_aside(grid)
    state = survey(grid, queue, accounting=True)
    settle(grid.run, state.recalled)
    plan = plan_of(grid, state, choose=choose)
    record.limits(granted(grid.cluster), state.at_most)
    check_room(grid, [cell for task in plan.bundles for cell in task.cells])
    describe_survey(grid, state)
    if not plan.bundles:
        return list(state.active_jobs), True
    now, held = split(plan, queue.room())
    record.plan([*now.pretrain, *now.bundles], [*held.pretrain, *held.bundles], _HELD)
    backbones = dict(state.pretraining)
    jobs = _send(grid, queue, now.pretrain, after, record)
    for task, job in zip(now.pretrain, jobs, strict=True):
        backbones[task.cells[0].backbone_key] = job
    for needs, tasks in _by_backbone(now, backbones).items():
        jobs += _send(grid, queue, tasks, [*after, *needs], record)
    num_cells = sum(len(task.cells) for task in now.bundles)
    more = f", and {len(now.pretrain)} to pre-train their backbones" if now.pretrain else ""
    print(f"submitted {len(now.bundles)} jobs for {num_cells} cells{more}")
    if held.bundles:
        print(f"held back: {len(held.bundles)} jobs: {_HELD}")
    return [*state.active_jobs, *jobs], not held.bundles


_HELD = "you may have no more jobs in the queue; run it again when there is room"


def write_scripts(grid: Grid, queue: Queue, stages: Sequence[str], folder: Path) -> None:
    """As `submit`, but into batch scripts in `folder`, which a person sends."""
    check(grid, stages)
    for line in sbatch.warnings(grid.cluster):
        warn(line)
    check_folder(folder, grid)  # a refusal leaves no run directory
    with submission(grid):
        for place in (grid.run.logs, grid.run.submitted):  # Slurm makes no folder for its logs
            private_folder(place, grid.cluster.group)
        plan = _plan_of_scripts(grid, queue) if "grid" in stages else Plan((), ())
        wanted = parts(stages, plan.pretrain, plan.bundles, queue.max_array_size())
        if not wanted:
            return print("nothing is left to submit, so no script was written")
        token, tasks = new_token(), [*plan.pretrain, *plan.bundles]
        for task in tasks:
            write_task(task)
        write_record(grid, token, wanted, tasks)
        site = Site(grid.cluster, Path.cwd(), grid.run.root.absolute(), grid.name, token)
        write_folder(folder, render(site, wanted))
    send = one_line(shlex.quote(str(folder / SUBMIT)))
    return print(f"wrote {len(wanted)} scripts, with {len(tasks)} jobs in arrays; {send} sends all")


def _plan_of_scripts(grid: Grid, queue: Queue) -> Plan:
    _set_aside(grid)
    state = survey(grid, queue)
    describe_survey(grid, state)
    plan = plan_of(grid, state)
    ready = without_waiting(plan, state.pretraining)
    check_room(grid, [cell for task in ready.bundles for cell in task.cells])
    if left_out := len(plan.bundles) - len(ready.bundles):
        jobs = ", ".join(sorted(set(state.pretraining.values())))
        print(f"{left_out} jobs are left out until {jobs} has trained their backbone")
    return ready


def _set_aside(grid: Grid) -> None:
    # once for all: a job that starts leaves out what is counted, and must not read all counts
    for line in set_aside_altered(grid.run.counts):
        print(f"warning: {one_line(line)}")


def plan_of(
    grid: Grid, state: Survey, forecast: Forecast | None = None, choose: Choice = to_do
) -> Plan:
    """The tasks for the cells that are to be submitted."""
    wanted = choose(state)
    needed = {cell.backbone_key for cell in wanted if cell.protocol.weights == "pretrain"}
    ready = {key for key in needed if grid.run.backbone(key).with_suffix(".json").exists()}
    backbones = {*ready, *state.pretraining}
    fits = (forecast or Forecast(grid)).fits
    return make_plan(grid, wanted, state.steps, backbones, source_of_code(), fits, state.at_most)


def _by_backbone(plan: Plan, backbones: dict[str, str]) -> dict[tuple[str, ...], list[Task]]:
    """Tasks by the pre-training jobs they wait for."""
    grouped: dict[tuple[str, ...], list[Task]] = {}
    for task in plan.bundles:
        cell = task.cells[0]
        pretrain = cell.protocol.weights == "pretrain"
        job = backbones.get(cell.backbone_key) if pretrain else None
        grouped.setdefault((job,) if job else (), []).append(task)
    return grouped


def _send(
    grid: Grid, queue: Queue, tasks: Sequence[Task], after: Sequence[str], record: Submission
) -> list[str]:
    if not tasks:
        return []
    calls = [ModuleCall(_PROGRAMS[task.kind], (str(write_task(task)),)) for task in tasks]
    names, title = [task.name for task in tasks], f"{grid.name}-{tasks[0].kind}"
    token = record.sending(names)
    jobs = queue.submit(calls, grid.cluster.training(), title, after, token)
    record.sent(names, jobs)
    return jobs


@contextmanager
def submission(grid: Grid) -> Iterator[Path]:
    """What writes into the run directory of a grid to submit it. Yields the copy of its file."""
    restrict_umask(grid.cluster.group)
    with one_at_a_time(grid.run.root, grid.cluster.group):
        yield _keep_config(grid)


@contextmanager
def one_at_a_time(root: Path, group: str = "") -> Iterator[None]:
    """Two submissions of one run at the same moment: the second waits for the first to end. The
    run directory is private to the user, or to `group`."""
    private_folder(root, group, keep_readable=True, remedy=_REMEDY)
    try:
        lock = (root / "submit.lock").open("w")
    except OSError as error:
        raise UserError(f"cannot write into {root}: {error.strerror}; {_REMEDY}") from error
    with lock:
        take_lock(lock, wait=True)
        yield


def _keep_config(grid: Grid) -> Path:
    """A copy of the grid file in the run directory: jobs that start later see what was
    submitted."""
    path = grid.run.root / "grid.toml"
    write_bytes(path, grid.path.read_bytes())
    return path.absolute()


if __name__ == "__main__":
    run(main)
