"""Turn cells into tasks, one task per job. Pure functions."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from jobs.spec.cell import Cell, bundles
from jobs.spec.task import Task, bundle_task_name
from pipeline.config.grid_file import Grid


@dataclass(frozen=True)
class Plan:
    """The tasks of a submission: backbones to pre-train, and bundles or parts of them to train."""

    pretrain: tuple[Task, ...]
    bundles: tuple[Task, ...]


def make_plan(
    grid: Grid,
    cells: Iterable[Cell],
    steps: Mapping[str, int],
    backbones: Collection[str],
    source: Mapping[str, str],
    fits: Callable[[Sequence[Cell]], int] = len,
    at_most: Mapping[str, int] | None = None,
) -> Plan:
    """Return the tasks that train `cells`.

    A task holds cells of equal bundle and equal step, so that none loses progress for another. The
    profile's `cells_per_job` splits it further.

    Args:
        steps: The step of each cell's newest checkpoint, by signature.
        backbones: The keys of the backbones that are trained or being trained.
        source: The version of the code, for the record.
        fits: Returns how many of some cells one job can train, for `cells_per_job = "fit"`.
        at_most: The maximum number of cells per job after an out-of-memory failure, by signature.
    """
    wanted, limits = list(cells), at_most or {}

    def size(together: Sequence[Cell]) -> int:
        asked = grid.cluster.cells_per_job
        most = fits(together) if asked == "fit" else asked or len(together)
        return max(1, min([most, *(limits.get(c.signature, most) for c in together)]))

    parts = [
        part
        for bundle in bundles(wanted).values()
        for step, together in _by_step(bundle, steps)
        for part in _split(grid, step, together, source, size(together))
    ]
    missing = {
        cell.backbone_key: cell
        for cell in wanted
        if cell.protocol.weights == "pretrain" and cell.backbone_key not in backbones
    }
    pretrain = [_task(grid, "pretrain", [cell], 0, source) for cell in missing.values()]
    return Plan(tuple(pretrain), tuple(parts))


def split(plan: Plan, room: int | None) -> tuple[Plan, Plan]:
    """Return the part of a plan to submit now and the part to defer, if the queue takes only `room`
    more jobs (None: any number). A bundle does not go before its backbone."""
    if room is None or len(plan.pretrain) + len(plan.bundles) <= room:
        return plan, Plan((), ())
    pretrain, later = plan.pretrain[:room], plan.pretrain[room:]
    ready = without_waiting(plan, {task.cells[0].backbone_key for task in later}).bundles
    now = ready[: room - len(pretrain)]
    names = {task.name for task in now}
    rest = tuple(task for task in plan.bundles if task.name not in names)
    return Plan(pretrain, now), Plan(later, rest)


def without_waiting(plan: Plan, backbones: Collection[str]) -> Plan:
    """Return `plan` without the bundles that wait for one of `backbones`, by their keys."""
    bundles = [
        task
        for task in plan.bundles
        if task.cells[0].protocol.weights != "pretrain"
        or task.cells[0].backbone_key not in backbones
    ]
    return Plan(plan.pretrain, tuple(bundles))


def _by_step(cells: list[Cell], steps: Mapping[str, int]) -> list[tuple[int, list[Cell]]]:
    grouped: dict[int, list[Cell]] = {}
    for cell in cells:
        grouped.setdefault(steps.get(cell.signature, 0), []).append(cell)
    return sorted(grouped.items(), reverse=True)


def _split(
    grid: Grid, step: int, cells: list[Cell], source: Mapping[str, str], size: int
) -> Iterator[Task]:
    for first in range(0, len(cells), size):
        yield _task(grid, "bundle", cells[first : first + size], step, source)


def _task(
    grid: Grid,
    kind: Literal["bundle", "pretrain"],
    cells: list[Cell],
    step: int,
    source: Mapping[str, str],
) -> Task:
    # one backbone, one pre-training, whichever cell asked for it first
    pretrain = f"pretrain-{cells[0].backbone_key}"
    name = bundle_task_name(cells, step) if kind == "bundle" else pretrain
    settings = grid.datasets[cells[0].dataset]
    return Task(
        kind=kind,
        name=name,
        run=str(grid.run.root),
        data=settings.shards,
        origin=settings.origin(),
        node_local=grid.cluster.node_local,
        cells=tuple(cells),
        source=dict(source),
    )
