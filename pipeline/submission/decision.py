"""Decide which cells, jobs and stages a submission submits, without writing or asking the queue.

All but `plan_of` are pure functions of a survey. `plan_of` reads the sizes of the data sets if the
profile has `cells_per_job = "fit"`.

`grid`, `retry`, `--wait`, `--script` and `--dry-run` all decide here, so that they cannot disagree.
"""

from __future__ import annotations

from collections.abc import Collection, Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from jobs.spec.cell import Cell
from pipeline.config.grid_file import Grid
from pipeline.planning.forecast import Forecast
from pipeline.planning.plan import Plan, make_plan
from pipeline.tracking.submissions import GRID, PREP, REDUCE, REPORT, STAGES
from pipeline.tracking.survey import NOT_FINITE, CellState, Survey

Command = Literal["grid", "grid --retrain stale", "retry", "submit --wait", "retry --wait"]
_GRID: frozenset[Command] = frozenset(("grid", "grid --retrain stale"))
_OUT_OF_MEMORY = "out of memory"

# Why a cell is not done -> the commands that submit it. A cause is the exit cause of its last job.
# A cell that ran out of memory goes into a job of half as many cells, as long as it fits.
SUBMITTED_BY: Mapping[str, frozenset[Command]] = {
    "never submitted": _GRID | {"submit --wait"},
    "deferred": _GRID | {"submit --wait", "retry --wait"},
    "no job known": _GRID,
    "node failure": _GRID | {"retry"},
    "preemption": _GRID | {"retry"},
    "time limit": _GRID | {"retry"},
    "killed": _GRID | {"retry"},
    "unknown": _GRID | {"retry"},
    _OUT_OF_MEMORY: _GRID | {"retry"},
    "error": _GRID,
    "cancelled": _GRID,
    "dependency failed": _GRID,
    NOT_FINITE: frozenset(),
    "stale": frozenset(("grid --retrain stale",)),
    "done or on its way": frozenset(),
}


def cells_to_submit(state: Survey, command: Command) -> list[Cell]:
    """Return the cells that `command` submits: deferred ones first, stale ones last, the others in
    the order of the grid."""
    cells = [cell for cell in state.cells if submits(state, command, cell)]
    rank = {"deferred": 0, "stale": 2}
    return [c.cell for c in sorted(cells, key=lambda cell: rank.get(cause(state, cell), 1))]


def submits(state: Survey, command: Command, cell: CellState) -> bool:
    """Return whether `command` submits a cell."""
    why = cause(state, cell)
    return command in SUBMITTED_BY[why] and (why == "deferred" or state.fits_memory(cell.cell))


def cause(state: Survey, cell: CellState) -> str:
    """Return why a cell is not done, as `SUBMITTED_BY` has it."""
    if cell.state == "waiting" and not cell.job:
        return "deferred"
    if cell.state == "stale":
        return "stale"
    if cell.state not in ("missing", "interrupted", "failed") or cell.job in state.active_jobs:
        return "done or on its way"
    if cell.cause:
        return cell.cause
    return "never submitted" if cell.state == "missing" and not cell.job else "no job known"


@dataclass(frozen=True)
class Decision:
    """The work of one submission.

    Attributes:
        state: The survey that it follows from.
        plan: The jobs of the stage `grid`.
        stages: The stages that it submits, in order.
        superseded: The waiting jobs of reduce and report that it cancels first, with their stages.
    """

    state: Survey
    plan: Plan
    stages: tuple[str, ...]
    superseded: Mapping[str, str]


def decide(state: Survey, stages: Sequence[str], plan: Plan) -> Decision:
    """Return what a submission of `stages` does, given the plan of the stage `grid`."""
    superseded_jobs = superseded(state, stages, bool(plan.bundles))
    wanted = stages_to_submit(state, stages, superseded_jobs.values())
    return Decision(state, plan, wanted, superseded_jobs)


def plan_of(
    grid: Grid, state: Survey, cells: Sequence[Cell], source: Mapping[str, str],
    forecast: Forecast | None = None,
) -> Plan:  # fmt: skip
    """Return the jobs that train `cells`. `source`: the version of the code, for the record."""
    backbones = {*state.trained_backbones, *state.pretraining}
    by_size = grid.cluster.cells_per_job == "fit"
    fits = (forecast or Forecast(grid)).fits if by_size else len
    return make_plan(grid, cells, state.steps, backbones, source, fits, state.at_most)


def packing(state: Survey) -> list[str]:
    """Return the jobs that pack data sets now or are going to."""
    return _jobs(state, PREP, "waiting", "running")


def prep_to_reuse(state: Survey) -> list[str]:
    """Return the waiting prep job, which serves this submission as well, if there is one. A running
    job may have read the images before the user corrected them."""
    return _jobs(state, PREP, "waiting")[-1:]


def reducing(state: Survey) -> list[str]:
    """Return the jobs that reduce now."""
    return _jobs(state, REDUCE, "running")


def results_to_come(state: Survey, superseded: Container[str]) -> list[str]:
    """Return the jobs that reduce now or are going to, without the superseded ones."""
    return [job for job in _jobs(state, REDUCE, "waiting", "running") if job not in superseded]


def superseded(state: Survey, stages: Sequence[str], new_cells: bool) -> dict[str, str]:
    """Return the waiting jobs of reduce and report that must not run, with their stages.

    They are superseded if this submission trains cells that they would miss (`new_cells`), or
    submits the same stage itself.
    """
    if GRID not in stages:
        return {}
    return {
        job: stage
        for job, stage in state.stages.items()
        if stage in (REDUCE, REPORT)
        and state.jobs[job].state == "waiting"
        and (new_cells or stage in stages)
    }


def stages_to_submit(
    state: Survey, stages: Sequence[str], moved: Collection[str]
) -> tuple[str, ...]:
    """Return `stages` in order, with those that follow the cells of a grid: the stages of
    superseded jobs (`moved`), and those that an earlier submission deferred. A report of new cells
    needs their results too."""
    wanted = {*stages, *moved, *([REDUCE] if REPORT in moved else [])}
    wanted |= {*state.deferred_stages} if GRID in stages else set()
    return tuple(stage for stage in STAGES if stage in wanted)


def _jobs(state: Survey, stage: str, *states: str) -> list[str]:
    return [
        job for job, name in state.stages.items()
        if name == stage and state.jobs[job].state in states
    ]  # fmt: skip
