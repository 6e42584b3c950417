"""Submit the stages of a grid: pack its data sets, train what is missing, reduce, report.

    python -m pipeline.submit {prep,grid,reduce,report,all} [CONFIG]
    python -m pipeline.submit {...} [CONFIG] --script DIR    batch scripts for sbatch instead

Running `grid` again submits what is missing and resumes what was interrupted. Without CONFIG it is
$LOSSGRID_CONFIG, or ./lossgrid.toml.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from data_prep.shards.manifest import MANIFEST
from hpc.cli import MissingInput, UserError, argument_parser, one_line, run, warn
from hpc.config import user_path
from hpc.scheduler import sbatch_options
from hpc.scheduler.auto import open_queue
from hpc.scheduler.base import Queue
from hpc.scheduler.job import ModuleCall
from hpc.storage.atomic import write_bytes
from hpc.storage.locks import take_lock
from hpc.storage.permissions import private_folder, require_private, restrict_umask
from jobs.spec.counts_file import set_aside_altered
from jobs.spec.task import Task, write_task
from pipeline.config.grid_file import Grid, find_config, profiled, read_grid
from pipeline.planning.forecast import Forecast
from pipeline.planning.plan import Plan, make_plan, split, without_waiting
from pipeline.planning.preflight import check_inputs, check_room, check_sources
from pipeline.submission import stage_jobs
from pipeline.submission.batch_scripts import SUBMIT, Site, parts, render
from pipeline.submission.cell_selection import Choice, to_do, unsent, with_stale
from pipeline.submission.code_version import source_of_code
from pipeline.submission.script_folder import check_folder, write_folder, write_record
from pipeline.submission.wait import wait_for
from pipeline.tracking.display import describe_missing, describe_plan, describe_survey
from pipeline.tracking.outcomes import granted
from pipeline.tracking.stages import GRID, PREP, PROGRAMS, REDUCE, REPORT, STAGES
from pipeline.tracking.stale import set_aside
from pipeline.tracking.submissions import Submission, cancellations, new_token, settle
from pipeline.tracking.survey import Survey, survey

_ALL = "all"
_REMEDY = "set run_dir to a folder of yours"


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
        "--allow-fewer", action="store_true", help="let reduce and report replace more cells"
    )
    parser.add_argument("--profile", action="store_true", help="measure the parts of the jobs")
    parser.add_argument(
        "--retrain", choices=["stale"], help="grid: train cells anew that were made from other data"
    )
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
    choose = with_stale if arguments.retrain else to_do
    reads = arguments.dry_run or scripts is not None
    queue = open_queue(grid.cluster, grid.run.logs, grid.run.queue, read_only=reads)
    stages = stages_of(arguments.stage, grid)
    if arguments.dry_run:
        queue.check()
        state = survey(grid, queue, accounting=True, verify=True)
        forecast = Forecast(grid, arguments.step_seconds)
        plan = plan_of(grid, state, forecast, choose)
        moved = stage_jobs.superseded(state, stages, bool(plan.bundles))
        all_stages = stage_jobs.to_send(state, stages, moved.values())
        describe_plan(grid, state, plan, all_stages, forecast)
        # after the plan: it can be looked at before its data are there
        describe_missing(check(grid, stages, missing_is_fine=True))
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
    again = partial(submit_deferred, grid, queue, cancellations(grid.run), options=options)
    return wait_for(grid, queue, jobs, stages, again)


def stages_of(stage: str, grid: Grid) -> tuple[str, ...]:
    """The stages that a command means: `all` is every one, and `grid` packs first what is not
    packed yet."""
    if stage == _ALL:
        return STAGES
    unpacked = [n for n, d in grid.datasets.items() if not (Path(d.shards) / MANIFEST).exists()]
    if stage == GRID and unpacked:
        print(f"not packed yet, so that comes first: {', '.join(map(one_line, unpacked))}")
        return (PREP, GRID)
    return (stage,)


def check(
    grid: Grid, stages: Sequence[str], missing_is_fine: bool = False, quiet: bool = False
) -> list[MissingInput]:
    """Refuse what cannot work before anything is queued. Raises `UserError`. Files that are not
    there yet are returned if `missing_is_fine`. `quiet`: without warnings about the data sets."""
    require_private(grid.run.root, grid.cluster.group, _REMEDY)
    missing = check_sources(grid) if PREP in stages else []
    if GRID in stages:
        missing += check_inputs(grid, PREP not in stages, quiet)
    if missing and not missing_is_fine:
        raise missing[0]
    return missing


def submit(
    grid: Grid,
    queue: Queue,
    stages: Sequence[str],
    choose: Choice = to_do,
    around: AbstractContextManager[None] | None = None,
    options: Sequence[str] = (),
) -> dict[str, list[str]]:
    """Submit `stages`, each after the one before.

    Args:
        choose: Returns the cells to train, of those that the run directory tells of.
        around: Is entered when all checks have passed, around what is sent.
        options: What reduce and report are called with beside the grid file.

    Returns:
        The job ids by stage. Where the queue has no room for more, the last stages, and perhaps
        some of the grid's tasks, are deferred.
    """
    check(grid, stages)  # a refused submission leaves no run directory
    with one_submission(grid):
        if GRID in stages:
            _set_aside(grid)
        work = _decide(grid, queue, stages, choose)
        if GRID in stages:
            describe_survey(grid, work.state)
        with around or nullcontext():
            jobs = _act(grid, queue, work, options)
    if deferred := [stage for stage in work.stages if stage not in jobs]:
        print(f"held back: {', '.join(deferred)}: {_HELD}")
    return jobs


def submit_deferred(
    grid: Grid,
    queue: Queue,
    cancelled: int,
    stages: Sequence[str],
    options: Sequence[str] = (),
) -> dict[str, list[str]]:
    """Submit what was deferred of `stages`, for a caller that asks again and again. Without room in
    the queue nothing is read but the records, and nothing is written or printed. Refuses if the
    grid was cancelled since it had been `cancelled` so many times."""
    _refuse_cancelled(grid, cancelled)
    if queue.room() == 0:
        return {}
    with one_submission(grid):
        _refuse_cancelled(grid, cancelled)
        work = _decide(grid, queue, stages, unsent)
        # other jobs may end while data sets are still being packed, which the cells wait for
        packing = [PREP] if stage_jobs.packing(work.state) else []
        check(grid, [*packing, *stages], quiet=True)  # `status` warns
        return _act(grid, queue, work, options)


def _refuse_cancelled(grid: Grid, before: int) -> None:
    if cancellations(grid.run) != before:
        raise UserError("the grid was cancelled meanwhile; what was held back is not sent")


@dataclass(frozen=True)
class _Work:
    """What a submission is to do: `stages` in order, and `plan` for the grid. superseded: the
    waiting jobs of stages that are cancelled first, by `pipeline.submission.stage_jobs`."""

    state: Survey
    plan: Plan
    stages: tuple[str, ...]
    superseded: Mapping[str, str]


def _decide(grid: Grid, queue: Queue, stages: Sequence[str], choose: Choice) -> _Work:
    """Look at the run directory and the queue, and check what is to be sent. Changes nothing."""
    of_grid = GRID in stages
    state = survey(grid, queue, accounting=of_grid)
    plan = plan_of(grid, state, choose=choose) if of_grid else Plan((), ())
    check_room(grid, [cell for task in plan.bundles for cell in task.cells])
    gone = stage_jobs.superseded(state, stages, bool(plan.bundles))
    return _Work(state, plan, stage_jobs.to_send(state, stages, gone.values()), gone)


def _act(
    grid: Grid, queue: Queue, work: _Work, options: Sequence[str] = ()
) -> dict[str, list[str]]:
    """Send what was decided. Returns the job ids by stage."""
    state = work.state
    config = _keep_config(grid)
    settle(grid.run, state.recalled)
    record = Submission(grid.run)
    if work.superseded:  # first: a free runner would start them
        record.defer(work.superseded.values(), _HELD)
        queue.cancel(work.superseded)
        names = ", ".join(dict.fromkeys(work.superseded.values()))
        print(f"moved behind the cells of this submission: {names}")
    record.limits(granted(grid.cluster), state.at_most)
    jobs: dict[str, list[str]] = {}
    packing, before = stage_jobs.packing(state), stage_jobs.reducing(state)
    # a report that was deferred is of the reduction that was not
    coming = stage_jobs.results_to_come(state, work.superseded) if GRID in work.stages else []
    for stage in work.stages:
        if stage == PREP and (reused := stage_jobs.prep_to_reuse(state)):
            jobs[stage] = reused
            print(f"prep waits already, as job {reused[0]}; it packs for this submission too")
        elif stage == GRID:
            jobs[stage], all_sent = _send_grid(grid, queue, work, record, packing)
            if not all_sent:
                break
        elif queue.room() == 0:
            break
        else:
            first = {PREP: packing, REDUCE: before, REPORT: []}[stage]
            needs = jobs.get(REDUCE, coming) if stage == REPORT else []
            given = [str(config), *(options if stage != PREP else ())]
            jobs[stage] = _send_stage(grid, queue, stage, given, record, first, needs)
        packing = packing if stage != PREP else list(dict.fromkeys([*packing, *jobs[stage]]))
        before = [*jobs[stage], *before]
    noted = {PREP, GRID, *state.deferred, *work.superseded.values()}
    if later := [stage for stage in work.stages if stage not in jobs and stage not in noted]:
        record.defer(later, _HELD)
    if state.active_jobs or state.stages:
        queue.ensure_runner()  # nobody may have started these since the machine did
    return jobs


def _send_stage(
    grid: Grid,
    queue: Queue,
    stage: str,
    arguments: Sequence[str],
    record: Submission,
    after: Sequence[str],
    needs: Sequence[str],
) -> list[str]:
    by_mpi = stage == REDUCE and queue.starts_mpi
    wanted = grid.cluster.reducing() if by_mpi else grid.cluster.single()
    call = ModuleCall(PROGRAMS[stage], tuple(arguments))
    token = record.sending([stage], needs)
    jobs = queue.submit([call], wanted, stage, after, token, needs)
    record.sent([stage], jobs)
    return jobs


def _send_grid(
    grid: Grid, queue: Queue, work: _Work, record: Submission, packing: Sequence[str]
) -> tuple[list[str], bool]:
    """Submit the tasks that are missing, as many as the queue has room for; they need the jobs
    `packing`. Returns the ids of all jobs that work on the grid now, old and new, and whether all
    tasks were sent."""
    state, plan = work.state, work.plan
    if not plan.bundles:
        return list(state.active_jobs), True
    _set_stale_aside(grid, state, plan)
    now, later = split(plan, queue.room())
    noted = {cell.signature for cell in state.held}
    newly_deferred = [
        t for t in later.bundles if not noted.issuperset(c.signature for c in t.cells)
    ]
    if now.bundles or now.pretrain or newly_deferred:
        held = [*later.pretrain, *newly_deferred] if newly_deferred else []
        record.plan([*now.pretrain, *now.bundles], held, _HELD)
    backbones = dict(state.pretraining)
    jobs = _send(grid, queue, now.pretrain, packing, record)
    for task, job in zip(now.pretrain, jobs, strict=True):
        backbones[task.cells[0].backbone_key] = job
    for backbone, tasks in _by_backbone(now, backbones).items():
        jobs += _send(grid, queue, tasks, [*packing, *backbone], record)
    num_cells = sum(len(task.cells) for task in now.bundles)
    more = f", and {len(now.pretrain)} to pre-train their backbones" if now.pretrain else ""
    print(f"submitted {len(now.bundles)} jobs for {num_cells} cells{more}")
    if later.bundles:
        print(f"held back: {len(later.bundles)} jobs: {_HELD}")
    return [*state.active_jobs, *jobs], not later.bundles


_HELD = "you may have no more jobs in the queue; run it again when there is room"


def write_scripts(
    grid: Grid,
    queue: Queue,
    stages: Sequence[str],
    folder: Path,
    choose: Choice = to_do,
    options: Sequence[str] = (),
) -> None:
    """As `submit`, but into batch scripts in `folder`, which a person sends."""
    check(grid, stages)
    for line in sbatch_options.warnings(grid.cluster):
        warn(line)
    check_folder(folder, grid)  # a refusal leaves no run directory
    with one_submission(grid):
        plan = _plan_of_scripts(grid, queue, choose) if GRID in stages else Plan((), ())
        wanted = parts(stages, plan.pretrain, plan.bundles, queue.max_array_size())
        if not wanted:
            return print("nothing is left to submit, so no script was written")
        _keep_config(grid)
        for place in (grid.run.logs, grid.run.submitted):  # Slurm makes no folder for its logs
            private_folder(place, grid.cluster.group)
        token, tasks = new_token(), [*plan.pretrain, *plan.bundles]
        for task in tasks:
            write_task(task)
        write_record(grid, token, wanted, tasks)
        run = grid.run.root.absolute()
        site = Site(grid.cluster, Path.cwd(), run, grid.name, token, options)
        write_folder(folder, render(site, wanted))
    send = one_line(shlex.quote(str(folder / SUBMIT)))
    return print(f"wrote {len(wanted)} scripts, with {len(tasks)} jobs in arrays; {send} sends all")


def _plan_of_scripts(grid: Grid, queue: Queue, choose: Choice) -> Plan:
    _set_aside(grid)
    state = survey(grid, queue)
    describe_survey(grid, state)
    plan = plan_of(grid, state, choose=choose)
    ready = without_waiting(plan, state.pretraining)
    check_room(grid, [cell for task in ready.bundles for cell in task.cells])
    if left_out := len(plan.bundles) - len(ready.bundles):
        jobs = ", ".join(sorted(set(state.pretraining.values())))
        print(f"{left_out} jobs are left out until {jobs} has trained their backbone")
    _set_stale_aside(grid, state, ready)
    return ready


def _set_aside(grid: Grid) -> None:
    # once for all: a job that starts leaves out what is counted, and must not read all counts
    for line in set_aside_altered(grid.run.counts):
        print(f"warning: {one_line(line)}")


def _set_stale_aside(grid: Grid, state: Survey, plan: Plan) -> None:
    """Move away what the cells of the plan, and their backbones, left that was made from other
    data; only a choice with stale cells has any."""
    files: list[Path] = []
    for task in plan.bundles:
        found = [path for c in task.cells for path in state.stale.files.get(c.signature, ())]
        # the task of the same cells that is done may have the same name, and its last heartbeat
        files += [*found, grid.run.progress_of(task.name)] if found else []
    set_aside(grid.run, files)
    if files:
        print(f"what was made from other data lies in {one_line(str(grid.run.stale))} now")


def plan_of(
    grid: Grid, state: Survey, forecast: Forecast | None = None, choose: Choice = to_do
) -> Plan:
    """The tasks for the cells that are to be submitted."""
    wanted = choose(state)
    needed = {cell.backbone_key for cell in wanted if cell.protocol.weights == "pretrain"}
    ready = {key for key in needed if grid.run.backbone(key).with_suffix(".json").exists()}
    backbones = {*(ready - state.stale.backbones), *state.pretraining}
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
    grid: Grid, queue: Queue, tasks: Sequence[Task], needs: Sequence[str], record: Submission
) -> list[str]:
    if not tasks:
        return []
    calls = [ModuleCall(PROGRAMS[task.kind], (str(write_task(task)),)) for task in tasks]
    names, title = [task.name for task in tasks], f"{grid.name}-{tasks[0].kind}"
    token = record.sending(names, needs)
    jobs = queue.submit(calls, grid.cluster.training(), title, (), token, needs)
    record.sent(names, jobs)
    return jobs


@contextmanager
def one_submission(grid: Grid) -> Iterator[None]:
    """Hold the run directory of a grid for one submission."""
    restrict_umask(grid.cluster.group)
    with one_at_a_time(grid.run.root, grid.cluster.group):
        yield


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
    path = _kept_config(grid)
    write_bytes(path, grid.path.read_bytes())
    return path.absolute()


def _kept_config(grid: Grid) -> Path:
    return grid.run.root / "grid.toml"


if __name__ == "__main__":
    run(main)
