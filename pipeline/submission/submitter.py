"""Submit the jobs that `pipeline.submission.decision` decides on, and record them.

A submission checks its inputs, takes the lock of the run directory, surveys the run, decides, and
submits. `submit_deferred` does the same again for jobs that the queue had no room for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path

from hpc.cli import MissingInput, UserError, one_line
from hpc.scheduler.base import Queue
from hpc.scheduler.job import ModuleCall
from hpc.storage.atomic import write_bytes
from hpc.storage.locks import take_lock
from hpc.storage.permissions import private_folder, require_private, restrict_umask
from jobs.spec.cell import Cell
from jobs.spec.counts_file import set_aside_altered
from jobs.spec.run_paths import RunPaths
from jobs.spec.task import Task, write_task
from pipeline.config.grid_file import Grid
from pipeline.planning.plan import Plan, split
from pipeline.planning.preflight import check_inputs, check_room, check_sources
from pipeline.submission import decision
from pipeline.submission.code_version import source_of_code
from pipeline.submission.decision import Command, Decision, cells_to_submit, plan_of
from pipeline.tracking.display import describe_survey
from pipeline.tracking.outcomes import granted
from pipeline.tracking.snapshot import read_snapshot
from pipeline.tracking.stale import set_aside
from pipeline.tracking.submissions import (
    GRID,
    PREP,
    PROGRAMS,
    REDUCE,
    REPORT,
    Submission,
    cancellations,
    settle,
)
from pipeline.tracking.survey import Survey, survey_of

Choice = Callable[[Survey], Sequence[Cell]]
TO_DO: Choice = partial(cells_to_submit, command="grid")
_REMEDY = "set run_dir to a folder of yours"
_DEFERRED = "you may have no more jobs in the queue; --wait, or `grid` again, submits deferred jobs"


def check(
    grid: Grid, stages: Sequence[str], missing_is_fine: bool = False, quiet: bool = False
) -> list[MissingInput]:
    """Refuse wrong and missing inputs before anything is queued.

    Args:
        missing_is_fine: Return missing files instead of refusing them.
        quiet: Print no warnings about the data sets.

    Raises:
        UserError: An input is wrong, or is missing and `missing_is_fine` is not set.
    """
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
    choose: Choice = TO_DO,
    around: AbstractContextManager[None] | None = None,
    options: Sequence[str] = (),
) -> dict[str, list[str]]:
    """Submit `stages`, each after the one before.

    Args:
        choose: Returns the cells to train.
        around: Is entered around the submission, after all checks have passed.
        options: Arguments of reduce and report beside the grid file.

    Returns:
        The job ids by stage. If the queue has no room, the last stages, and perhaps some tasks of
        the grid, are deferred.
    """
    check(grid, stages)  # a refused submission leaves no run directory
    with one_submission(grid):
        if GRID in stages:
            set_altered_counts_aside(grid)
        work = _decide(grid, queue, stages, choose)
        if GRID in stages:
            describe_survey(grid, work.state)
        with around or nullcontext():
            jobs = _act(grid, queue, work, options)
    if missing := [stage for stage in work.stages if stage not in jobs]:
        print(f"deferred: {', '.join(missing)}: {_DEFERRED}")
    return jobs


def submit_deferred(
    grid: Grid,
    queue: Queue,
    cancelled: int,
    command: Command,
    stages: Sequence[str],
    options: Sequence[str] = (),
) -> dict[str, list[str]]:
    """Submit the deferred jobs of `stages`, for a caller that asks again and again.

    Without room in the queue only the records are read, and nothing is written or printed.

    Args:
        cancelled: How often the grid had been cancelled when the caller began.
        command: Decides which cells are submitted.

    Raises:
        UserError: The grid was cancelled since.
    """
    _refuse_cancelled(grid, cancelled)
    if queue.free_slots() == 0:
        return {}
    with one_submission(grid):
        _refuse_cancelled(grid, cancelled)
        work = _decide(grid, queue, stages, partial(cells_to_submit, command=command))
        # other jobs may end while prep, which the cells need, still packs data sets
        packing = [PREP] if decision.packing(work.state) else []
        check(grid, [*packing, *stages], quiet=True)  # `status` warns
        return _act(grid, queue, work, options)


def _refuse_cancelled(grid: Grid, before: int) -> None:
    if cancellations(grid.run) != before:
        raise UserError("the grid was cancelled meanwhile; deferred jobs are not submitted")


def _decide(grid: Grid, queue: Queue, stages: Sequence[str], choose: Choice) -> Decision:
    """Survey the run and decide; refuse a plan that the disk has no room for."""
    of_grid = GRID in stages
    state = survey_of(read_snapshot(grid, queue, accounting=of_grid))
    plan = plan_of(grid, state, choose(state), source_of_code()) if of_grid else Plan((), ())
    check_room(grid, [cell for task in plan.bundles for cell in task.cells])
    return decision.decide(state, stages, plan)


def _act(
    grid: Grid, queue: Queue, work: Decision, options: Sequence[str] = ()
) -> dict[str, list[str]]:
    """Submit the decided jobs; return the job ids by stage."""
    state = work.state
    config = keep_config(grid)
    settle(grid.run, state.recalled)
    record = Submission(grid.run)
    _cancel_superseded(queue, work, record)
    record.limits(granted(grid.cluster), state.at_most)
    jobs: dict[str, list[str]] = {}
    packing, before = decision.packing(state), decision.reducing(state)
    # a deferred report belongs to the reduction that was deferred with it
    coming = decision.results_to_come(state, work.superseded) if GRID in work.stages else []
    for stage in work.stages:
        if stage == PREP and (reused := decision.prep_to_reuse(state)):
            jobs[stage] = reused
            print(f"prep: job {reused[0]}, which waits already, packs for this submission too")
        elif stage == GRID:
            jobs[stage], all_submitted = _submit_grid(grid, queue, work, record, packing)
            if not all_submitted:
                break
        elif queue.free_slots() == 0:
            break
        else:
            first = {PREP: packing, REDUCE: before, REPORT: []}[stage]
            needs = jobs.get(REDUCE, coming) if stage == REPORT else []
            given = [str(config), *(options if stage != PREP else ())]
            jobs[stage] = _submit_stage(grid, queue, stage, given, record, first, needs)
        packing = packing if stage != PREP else list(dict.fromkeys([*packing, *jobs[stage]]))
        before = [*jobs[stage], *before]
    noted = {PREP, GRID, *state.deferred_stages, *work.superseded.values()}
    if later := [stage for stage in work.stages if stage not in jobs and stage not in noted]:
        record.defer(later, _DEFERRED)
    if state.active_jobs or state.stages:
        queue.ensure_runner()  # nobody may have started these since the machine did
    return jobs


def _cancel_superseded(queue: Queue, work: Decision, record: Submission) -> None:
    """Cancel waiting jobs that this submission submits again; do it first, so that no runner starts
    them."""
    if not work.superseded:
        return
    record.defer(work.superseded.values(), _DEFERRED)
    queue.cancel(work.superseded)
    names = ", ".join(dict.fromkeys(work.superseded.values()))
    print(f"cancelled, to run after the cells of this submission: {names}")


def _submit_stage(
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
    token = record.submitting([stage], needs)
    jobs = queue.submit([call], wanted, stage, after, token, needs)
    record.submitted([stage], jobs)
    return jobs


def _submit_grid(
    grid: Grid, queue: Queue, work: Decision, record: Submission, packing: Sequence[str]
) -> tuple[list[str], bool]:
    """Submit as many missing tasks as the queue has room for; they need the jobs `packing`. Return
    the ids of all jobs that work on the grid now, and whether all tasks were submitted."""
    state, plan = work.state, work.plan
    if not plan.bundles:
        return sorted(state.active_jobs), True
    set_stale_aside(grid, state, plan)
    now, later = split(plan, queue.free_slots())
    noted = {cell.signature for cell in state.deferred}
    new = [t for t in later.bundles if not noted.issuperset(cell.signature for cell in t.cells)]
    if now.bundles or now.pretrain or new:
        deferred = [*later.pretrain, *new] if new else []
        record.plan([*now.pretrain, *now.bundles], deferred, _DEFERRED)
    backbones = dict(state.pretraining)
    jobs = _submit_tasks(grid, queue, now.pretrain, packing, record)
    for task, job in zip(now.pretrain, jobs, strict=True):
        backbones[task.cells[0].backbone_key] = job
    for backbone, tasks in _by_backbone(now, backbones).items():
        jobs += _submit_tasks(grid, queue, tasks, [*packing, *backbone], record)
    num_cells = sum(len(task.cells) for task in now.bundles)
    more = f", and {len(now.pretrain)} to pre-train their backbones" if now.pretrain else ""
    print(f"submitted {len(now.bundles)} jobs for {num_cells} cells{more}")
    if later.bundles:
        print(f"deferred: {len(later.bundles)} jobs: {_DEFERRED}")
    return [*sorted(state.active_jobs), *jobs], not later.bundles


def _submit_tasks(
    grid: Grid, queue: Queue, tasks: Sequence[Task], needs: Sequence[str], record: Submission
) -> list[str]:
    if not tasks:
        return []
    calls = [ModuleCall(PROGRAMS[task.kind], (str(write_task(task)),)) for task in tasks]
    names, title = [task.name for task in tasks], f"{grid.name}-{tasks[0].kind}"
    token = record.submitting(names, needs)
    jobs = queue.submit(calls, grid.cluster.training(), title, (), token, needs)
    record.submitted(names, jobs)
    return jobs


def _by_backbone(plan: Plan, backbones: Mapping[str, str]) -> dict[tuple[str, ...], list[Task]]:
    """Group tasks by the pre-training jobs that they need."""
    grouped: dict[tuple[str, ...], list[Task]] = {}
    for task in plan.bundles:
        cell = task.cells[0]
        pretrain = cell.protocol.weights == "pretrain"
        job = backbones.get(cell.backbone_key) if pretrain else None
        grouped.setdefault((job,) if job else (), []).append(task)
    return grouped


def set_altered_counts_aside(grid: Grid) -> None:
    """Move counts away whose checksums do not match. It is done once for all jobs: a job that
    starts leaves out counted cells without reading their counts."""
    for line in set_aside_altered(grid.run.counts):
        print(f"warning: {one_line(line)}")


def set_stale_aside(grid: Grid, state: Survey, plan: Plan) -> None:
    """Move the stale files of a plan's cells and backbones to RUN/stale. Only `--retrain stale`
    chooses such cells."""
    files: list[Path] = []
    for task in plan.bundles:
        found = [path for c in task.cells for path in state.stale.files.get(c.signature, ())]
        # the finished task of the same cells may have the same name, and its last heartbeat
        files += [*found, grid.run.progress_of(task.name)] if found else []
    set_aside(grid.run, files)
    if files:
        print(f"moved the files of stale cells to {one_line(str(grid.run.stale))}")


@contextmanager
def one_submission(grid: Grid) -> Iterator[None]:
    """Hold the run directory of a grid for one submission."""
    restrict_umask(grid.cluster.group)
    with one_at_a_time(grid.run.root, grid.cluster.group):
        yield


@contextmanager
def one_at_a_time(root: Path, group: str = "") -> Iterator[None]:
    """Hold the lock of a run directory; a second submission waits for the first to end. The run
    directory is private to the user, or to `group`."""
    private_folder(root, group, keep_readable=True, remedy=_REMEDY)
    try:
        lock = RunPaths(root).lock.open("w")
    except OSError as error:
        raise UserError(f"cannot write into {root}: {error.strerror}; {_REMEDY}") from error
    with lock:
        take_lock(lock, wait=True)
        yield


def keep_config(grid: Grid) -> Path:
    """Copy the grid file into the run directory, for jobs that start later; return the copy."""
    path = grid.run.config
    write_bytes(path, grid.path.read_bytes())
    return path.absolute()
