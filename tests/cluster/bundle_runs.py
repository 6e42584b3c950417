"""One bundle of two cells on two nodes with a rank each, trained slowly on the cluster; and the
undisturbed run that it must equal."""

from __future__ import annotations

import json
import math
import re
import time
import tomllib
from collections.abc import Iterable, Sequence
from pathlib import Path

from data_prep.pack import pack
from data_prep.settings import parse_dataset
from jobs.spec.cell import bundles
from jobs.spec.run_paths import RunPaths
from jobs.spec.task import Task, write_task
from pipeline.config.grid_file import Grid, read_grid
from pipeline.tracking.snapshot import DEAD_AFTER_SECONDS
from pipeline.tracking.submissions import submissions
from tests.cluster.slow_training import PAUSE, steps_begun
from tests.cluster.slurm_cluster import PROFILE, PYTHON, Cluster, until
from tests.jobs.job_processes import jobs
from tests.jobs.small_runs import is_done, results, steps_saved
from tests.pipeline.grids import grid_file

WORLD_SIZE = 2
BATCH_SIZE = 4
IMAGES = 11
EPOCHS = 20
TOTAL = EPOCHS * (IMAGES // BATCH_SIZE)
CHECKPOINT_SECONDS = 2.0
LIMITS_REACHED = 2  # by the bundle with a time limit, at least
PATIENCE = 600.0  # seconds for an undisturbed run


def pack_streets(folder: Path) -> str:
    """A small data set, packed; its folder."""
    table = {"source": "synthetic", "shards": str(folder), "val": 5, "size": [40, 56]}
    pack("streets", parse_dataset("streets", {**table, "train": IMAGES}, "grid.toml"), processes=1)
    return str(folder)


def bundle_grid(
    folder: Path,
    data: str,
    workers: int = 0,
    seeds: Iterable[int] = (0,),
    losses: Sequence[str] = ("CE", "DLNWCE"),
    epochs: int = EPOCHS,
) -> Grid:
    """A grid of one bundle for each seed that is checkpointed every `CHECKPOINT_SECONDS`. Each rank
    has `workers` loader processes, which take as long to start as it does."""
    folder.mkdir(parents=True)
    path = grid_file(
        folder,
        ("seeds = [0, 1]", f"seeds = {list(seeds)}"),
        (', "deeplabv3_mobilenet_v3_large"', ""),
        ('losses = ["CE", "DLNWCE"]', f"losses = {json.dumps(losses)}"),
        (f'shards = "{folder}/streets"', f'shards = "{data}"'),
        ("train = 6\nval = 3\nsize = [32, 40]", f"train = {IMAGES}\nval = 5\nsize = [40, 56]"),
        ("epochs = 2", f"epochs = {epochs}"),
        ("batch_size = 2", f"batch_size = {BATCH_SIZE}"),
        (
            "threads = 1\n",
            f"threads = 1\nworkers = {workers}\ncheckpoint_minutes = {CHECKPOINT_SECONDS / 60}\n",
        ),
    )
    return read_grid(path)


def write_profile(folder: Path, **changes: object) -> Path:
    """The file of the cluster's profile, with a rank a node and keys that are not as usual."""
    table = {**tomllib.loads(PROFILE.read_text()), "tasks_per_node": 1, **changes}
    path = folder / "profile.toml"
    path.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in table.items()))
    return path


def undisturbed(grid: Grid) -> dict:
    """Train each bundle of a grid without Slurm and without faults, by processes of this machine.
    Return the results."""
    with jobs(grid.path.parent / "logs") as start:
        for key, cells in bundles(grid.cells).items():
            (settings,) = grid.datasets.values()
            task = Task(
                kind="bundle", name=key, run=str(grid.run.root), data=settings.shards,
                origin=settings.origin(), cells=cells,
            )  # fmt: skip
            codes = start(write_task(task), WORLD_SIZE).end(seconds=PATIENCE)
            assert codes == [0] * WORLD_SIZE, f"the undisturbed training of {key} failed"
    return results(grid.run)


class BundleRun:
    """The bundle on the cluster: submitted by `grid`, slow until `hurry`."""

    def __init__(
        self,
        cluster: Cluster,
        folder: Path,
        data: str,
        pause: float = 0.5,
        workers: int = 0,
        slow_starts: int | None = None,
        **profile: object,
    ) -> None:
        """Seconds of a pause in every step, loader processes, how many starts pause if not all, and
        keys of the profile that are not as usual."""
        self.cluster = cluster
        self.grid = bundle_grid(folder, data, workers)
        self.run: RunPaths = self.grid.run
        self.key = self.grid.cells[0].bundle_key
        self._pause = pause
        self._pauses = f"{pause}" if slow_starts is None else f"{pause} {slow_starts}"
        self.profile = write_profile(folder, **profile)

    def command(self, module: str, *words: str) -> list[str]:
        """A command about this grid: a module, and what comes before the grid file."""
        about = [str(self.grid.path), "--cluster", str(self.profile)]
        return [PYTHON, "-m", module, *words, *about]

    def submit(self, program: str = "tests.cluster.slow_training") -> str:
        """Submit what is missing of the grid, as `program` does; the job's id."""
        self.run.root.mkdir(exist_ok=True, mode=0o700)
        (self.run.root / PAUSE).write_text(self._pauses)
        said = self.cluster.answer(*self.command(program, "grid"))
        assert "submitted 1 jobs for 2 cells" in said
        return list(submissions(self.run))[-1].job

    def submit_again(self) -> str:
        """As `submit`, once a job that ended without a word counts as dead."""
        (beat,) = self.run.progress.glob("*.json")
        until(lambda: time.time() - beat.stat().st_mtime > DEAD_AFTER_SECONDS, self.log)
        return self.submit()

    def hurry(self) -> None:
        """No more pauses."""
        (self.run.root / PAUSE).unlink(missing_ok=True)

    @property
    def steps_saved(self) -> list[int]:
        return steps_saved(self.grid)

    @property
    def times_started(self) -> int:
        """Return the number of starts of the job, those stopped before their first step too."""
        return len(re.findall("^--- start .*: rank 0 of ", self.log(), re.M))

    @property
    def starts(self) -> list[list[int]]:
        """The steps that each start has begun, of those that began any."""
        return steps_begun(self.run.root, self.key)

    def wait_for_checkpoint(self, beyond: int = 0) -> None:
        """Until a checkpoint of a later step is there, and the bundle is still being trained."""
        until(lambda: max(self.steps_saved, default=0) > beyond, self.log)
        assert not is_done(self.grid), "the bundle ended before it was struck"

    def finish(self, job: str) -> dict:
        """The results, once the job has left the queue."""
        self.hurry()
        self.cluster.wait_until_gone(job)
        assert is_done(self.grid), self.log()
        return results(self.run)

    def log(self) -> str:
        """Return the output of rank 0 of all jobs and starts, in order of jobs."""
        logs = sorted(
            self.run.logs.glob("*_0_log.err"), key=lambda log: int(log.name.split("_")[0])
        )
        return "".join(log.read_text() for log in logs)

    @property
    def resumed_at(self) -> list[int]:
        """The step at which each start began, from what it said."""
        return [
            int(n) for n in re.findall(r"(?:resuming|starting) at step (\d+)$", self.log(), re.M)
        ]

    @property
    def stopped_after(self) -> list[int]:
        """The step after which each announced stop came, from what was said."""
        return [int(n) for n in re.findall(r"stopped by .* after step (\d+) of", self.log())]

    def assert_resumed_once(self, most_redone: int) -> None:
        """It was started twice, the second time above step 0, and did at most so many steps
        twice."""
        (first, second) = self.starts
        resumed = second[0]
        assert self.resumed_at == [0, resumed]
        assert resumed > 0
        assert first == list(range(len(first)))
        assert second == list(range(resumed, TOTAL))
        assert len(first) - resumed <= most_redone

    def most_redone(self) -> int:
        """Return the number of steps that can begin between two checkpoints, since each takes at
        least its pause."""
        return math.ceil(CHECKPOINT_SECONDS / self._pause)
