"""From raw images to the report on a cluster, and the same bits as from one machine."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from data_prep.pack import pack
from hpc.scheduler.job import ModuleCall
from jobs.spec.counts_file import read_index
from pipeline.config.grid_file import Grid, read_grid
from tests.cluster.slurm_cluster import PROFILE, PYTHON, Cluster
from tests.jobs.job_processes import jobs
from tests.jobs.small_runs import assert_all_same, results, task_of
from tests.pipeline.grids import small_grid

WORLD_SIZE = 4  # two ranks on each of two nodes
TORCHRUN = [PYTHON, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", WORLD_SIZE]

pytestmark = pytest.mark.slow


def grid_in(folder: Path) -> Grid:
    """Two models and two losses on a backbone that is pre-trained; nothing is packed yet."""
    folder.mkdir()
    return small_grid(
        folder,
        ("seeds = [0, 1]", "seeds = [0]"),
        ("batch_size = 2", "batch_size = 4"),
        ("train = 6\nval = 3\nsize = [32, 40]", "train = 9\nval = 5\nsize = [40, 56]"),
        ('weights = "none"', 'weights = "pretrain"'),
        more="\n[protocol.pretrain]\nepochs = 3\nbatch_size = 4\n",
    )


@pytest.fixture(scope="module")
def on_one_machine(cluster: Cluster) -> dict:
    """The results of as many ranks on this machine, without Slurm; `torchrun` trains the bundle."""
    grid = grid_in(cluster.runs / "one-machine")
    pack("streets", grid.datasets["streets"], processes=1)
    pretrain = ModuleCall("jobs.pretrain", (str(task_of(grid, grid.cells[:1], "pretrain")),))
    with jobs(cluster.runs / "one-machine-logs") as start:
        assert start(pretrain, WORLD_SIZE).end(seconds=600) == [0] * WORLD_SIZE
    cluster.answer(*TORCHRUN, "-m", "jobs.train", task_of(grid))
    return results(grid.run)


def test_all_runs_from_images_to_the_report(cluster: Cluster, on_one_machine: dict):
    grid = grid_in(cluster.runs / "all")
    command = [PYTHON, "-m", "pipeline.submit", "all", grid.path, "--wait", "--cluster", PROFILE]
    done = cluster.command(*command)
    assert done.returncode == 0, done.stdout + done.stderr
    assert_all_same(results(grid.run), on_one_machine)

    (index,) = map(read_index, grid.run.counts.glob("*.json"))
    (provenance,) = index.record["provenance"]
    assert provenance["world_size"] == WORLD_SIZE
    with (grid.run.report / "table.csv").open() as file:
        rows = [(row["model"], row["loss"]) for row in csv.DictReader(file)]
    assert rows == [(cell.model, cell.loss.name) for cell in read_grid(grid.path).cells]
    assert str(grid.run.report / "index.html") in done.stdout

    jobs = {job["JobName"]: job for job in map(cluster.job, cluster.jobs_of(grid.run.logs))}
    assert [jobs[name]["NumNodes"] for name in ("prep", "small-pretrain", "small-bundle")] == [
        "1", "2", "2",
    ]  # fmt: skip
