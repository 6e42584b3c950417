"""Estimate what the plan of a grid costs. The model is `pipeline.planning.cost_model`, with the
images of the data sets, packed or not, and the step times of the run's own jobs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from statistics import median

from data_prep.settings import DatasetSettings
from data_prep.shards.manifest import SPLITS, Manifest
from data_prep.sources import source_module
from hpc.cli import UserError
from hpc.scheduler.auto import jobs_at_once
from hpc.storage.atomic import read_json
from jobs.spec.cell import Cell, bundles
from jobs.spec.task import Task, read_task
from pipeline.config.grid_file import Grid
from pipeline.planning.cost_model import (
    ASSUMPTIONS,
    Cost,
    Job,
    cells_that_fit,
    cost,
    slower_than_modelled,
    wall_seconds,
)

_UNSEEN = (480, 640)  # height and width of an image that was not looked at yet


class Forecast:
    """The forecast of `grid`. step_seconds: a measured step of its largest job, in place of the
    run's own."""

    def __init__(self, grid: Grid, step_seconds: float | None = None) -> None:
        self._grid = grid
        self._step_seconds = step_seconds
        self._images = {name: images(settings) for name, settings in grid.datasets.items()}

    def fits(self, cells: Sequence[Cell]) -> int:
        """Return how many of `cells`, a bundle, one job can train within memory and time limit."""
        return cells_that_fit(self._job(cells), self._grid.cluster, self._measured)

    def lines(self, tasks: Sequence[Task]) -> Iterator[str]:
        """Return the estimate of `tasks` in lines of text."""
        cluster = self._grid.cluster
        costs = [cost(self._job(task.cells), cluster, self._measured) for task in tasks]
        if not costs:
            return
        if unknown := [name for name, (train, _) in self._images.items() if not train]:
            yield f"estimate: no time, as the images of {', '.join(unknown)} are not known yet"
        else:
            yield from self._time(costs)
        of_gpu = max(one.gpu_bytes for one in costs) / 1e9
        of_node = max(one.node_bytes for one in costs) / 1e9
        gpus = f"{of_gpu:.1f} GB of a GPU, " if cluster.gpus_per_node else ""
        yield f"estimate: memory at most {gpus}{of_node:.0f} GB of a node"
        if cluster.gpus_per_node and of_gpu > cluster.gpu_memory_gb:
            yield (
                f"estimate: that is more than the {cluster.gpu_memory_gb:g} GB of a GPU; more ranks"
                ' a job, mixed precision or cells_per_job = "fit" need less'
            )
        storage, files = sum(one.storage for one in costs), sum(one.files for one in costs)
        yield f"estimate: storage at most {storage / 1e9:.1f} GB in {files:,} files, without shards"
        yield f"estimate: {self._basis}; assumes that {ASSUMPTIONS}"

    def _time(self, costs: Sequence[Cost]) -> Iterator[str]:
        cluster = self._grid.cluster
        at_once = jobs_at_once(cluster)
        ranks = cluster.nodes * cluster.tasks_per_node
        total, longest = sum(one.seconds for one in costs), max(one.seconds for one in costs)
        unit = "GPU" if cluster.gpus_per_node else "rank"
        yield (
            f"estimate: {total * ranks / 3600:,.1f} {unit} hours; {_clock(longest)} for the longest"
            f" job, {_clock(wall_seconds(costs, at_once))} for all with {at_once} at a time on "
            f"{ranks} rank{'s' * (ranks > 1)} each"
        )
        if longest > 60 * cluster.minutes:
            yield (
                f"estimate: the longest job is over the time limit of {cluster.minutes} minutes "
                "and will be requeued to go on"
            )

    def _job(self, cells: Sequence[Cell]) -> Job:
        settings = self._grid.datasets[cells[0].dataset]
        train, sizes = self._images[cells[0].dataset]
        pixels = sum(_pixels(size, cells[0].protocol.eval_size) for size in sizes)
        return Job(cells, train, pixels, len(source_module(settings.source).classes(settings)))

    @cached_property
    def _measured(self) -> float:
        cluster = self._grid.cluster
        if self._step_seconds:
            largest = max(bundles(self._grid.cells).values(), key=len)
            return slower_than_modelled(self._step_seconds, self._job(largest), cluster)
        return median(self._shown) if self._shown else 1.0

    @cached_property
    def _shown(self) -> list[float]:
        """Return the ratio of measured to modelled step time of each job that has reported its
        rate."""
        found = []
        for path in sorted(self._grid.run.progress.glob("*.json")):
            try:
                per_second = read_json(path)["steps_per_second"]
                task = read_task(self._grid.run.task(path.stem), "bundle")
            except (OSError, UserError, KeyError):
                continue
            if per_second > 0 and task.cells[0].dataset in self._grid.datasets:
                job = self._job(task.cells)
                found.append(slower_than_modelled(1 / per_second, job, self._grid.cluster))
        return found

    @property
    def _basis(self) -> str:
        if self._step_seconds:
            return f"from a step of {self._step_seconds:g} s"
        if self._shown:
            jobs = "1 job" if len(self._shown) == 1 else f"{len(self._shown)} jobs"
            return f"from the step times of {jobs} of this run"
        return "not measured (see --step-seconds)"


def images(settings: DatasetSettings) -> tuple[int, list[tuple[int, int]]]:
    """Return the number of training images of a data set and the (height, width) of each validation
    image: from the packed data set, else from its files, else as published. (0, []) if nothing is
    known."""
    try:
        splits = Manifest.load(settings.shards).splits
        return splits["train"].images, [
            size for shard in splits["val"].shards for size in shard.sizes
        ]
    except UserError:
        pass
    source = source_module(settings.source)
    try:
        train, val = (len(source.samples(settings, split)) for split in SPLITS)
    except UserError:
        lists = [getattr(settings, split, split) for split in SPLITS]
        train, val = (settings.published.get(name, 0) for name in lists)
    return train, [_UNSEEN] * val


def _pixels(size: tuple[int, int], short_side: int) -> float:
    scale = short_side / min(size) if short_side else 1.0
    return size[0] * size[1] * scale**2


def _clock(seconds: float) -> str:
    """Return `41 min`, `20.3 h` or `3.2 days`."""
    if seconds < 2 * 3600:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 2 * 86400 else f"{seconds / 86400:.1f} days"
