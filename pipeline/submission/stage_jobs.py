"""Decide what happens to the jobs of prep, reduce and report that earlier submissions left in the
queue. Pure functions."""

from __future__ import annotations

from collections.abc import Collection, Container, Sequence

from pipeline.tracking.stages import GRID, PREP, REDUCE, REPORT, STAGES
from pipeline.tracking.survey import Survey


def packing(state: Survey) -> list[str]:
    """Return the jobs that pack data sets now or are going to."""
    return _of(state, PREP, "waiting", "running")


def prep_to_reuse(state: Survey) -> list[str]:
    """Return the prep job that serves this submission as well, if there is one: it waits. A running
    job may have read the images before the user corrected them."""
    return _of(state, PREP, "waiting")[-1:]


def reducing(state: Survey) -> list[str]:
    """Return the jobs that reduce now."""
    return _of(state, REDUCE, "running")


def results_to_come(state: Survey, superseded: Container[str]) -> list[str]:
    """Return the jobs that reduce now or are going to, but for those that are cancelled."""
    return [job for job in _of(state, REDUCE, "waiting", "running") if job not in superseded]


def superseded(state: Survey, stages: Sequence[str], new_cells: bool) -> dict[str, str]:
    """Return the waiting jobs of reduce and report that must not run, since this submission trains
    the grid and sends the same stage, or `new_cells` behind the job. Job -> stage."""
    if GRID not in stages:
        return {}
    return {
        job: stage
        for job, stage in state.stages.items()
        if stage in (REDUCE, REPORT)
        and state.jobs[job].state == "waiting"
        and (new_cells or stage in stages)
    }


def to_send(state: Survey, stages: Sequence[str], moved: Collection[str]) -> tuple[str, ...]:
    """Return in order `stages` and, behind the cells of a grid, the stages of superseded jobs,
    `moved`, and those that an earlier submission deferred. A page of new cells needs their results
    too."""
    wanted = {*stages, *moved, *([REDUCE] if REPORT in moved else [])}
    wanted |= {*state.deferred} if GRID in stages else set()
    return tuple(stage for stage in STAGES if stage in wanted)


def _of(state: Survey, stage: str, *states: str) -> list[str]:
    return [
        job for job, name in state.stages.items()
        if name == stage and state.jobs[job].state in states
    ]  # fmt: skip
