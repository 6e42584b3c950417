"""Thousands of jobs on the real controller, held, so that none of them runs: what a scheduler that
hundreds of people share is asked for them, and what status and cancel make of its answers."""

from __future__ import annotations

import json
import shutil
import tomllib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from hpc.scheduler.base import DEFAULT_MAX_ARRAY_SIZE
from pipeline.tracking.submissions import submissions
from tests.cluster.bundle_runs import IMAGES
from tests.cluster.slurm_cluster import PROFILE, PYTHON, Cluster, until
from tests.pipeline.grids import small_grid

pytestmark = pytest.mark.slow

BUNDLES = 2500
_COMMANDS = ("sbatch", "squeue", "scancel", "sacct")
_COUNTING = """#!/bin/sh
echo {name} >>{asked}
exec {real} "$@"
"""


class Site:
    """A user's commands on the cluster, and how often they asked Slurm."""

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        self._cluster, self._asked = cluster, folder / "asked"
        self._path = folder / "bin"
        self._path.mkdir(parents=True)
        for name in _COMMANDS:
            real, wrapper = shutil.which(name), self._path / name
            wrapper.write_text(_COUNTING.format(name=name, asked=self._asked, real=real))
            wrapper.chmod(0o755)

    def run(self, module: str, *words: object) -> tuple[str, Counter[str]]:
        """Return the output of a program that must succeed, and its number of calls of each Slurm
        command."""
        self._asked.write_text("")
        path = f"{self._path}:{self._cluster.environ['PATH']}"
        said = self._cluster.answer(PYTHON, "-m", module, *words, PATH=path)
        return said, Counter(self._asked.read_text().split())


@pytest.fixture
def held_folder(cluster, tmp_path) -> Iterator[Path]:
    """A folder on a disk that has room for the heads and checkpoints of so many cells, which nobody
    writes. Whatever happens, no held job stays for the tests that follow."""
    folder = cluster.runs / tmp_path.name
    folder.mkdir()
    cluster.answer("mount", "-t", "tmpfs", "-o", "size=500G,mode=700", "tmpfs", folder)
    yield folder
    cluster.command("scancel", "--user=root", "--name=held-bundle")
    cluster.answer("umount", folder)


def test_2500_held_jobs_are_three_calls_of_sbatch_one_of_squeue_and_one_of_scancel(
    cluster, held_folder, streets_on_cluster
):
    grid = small_grid(
        held_folder,
        ('name = "small"', 'name = "held"'),
        ("seeds = [0, 1]", f"seeds = {list(range(BUNDLES))}"),
        (', "deeplabv3_mobilenet_v3_large"', ""),
        ('["CE", "DLNWCE"]', '["CE"]'),
        (f'shards = "{held_folder}/streets"', f'shards = "{streets_on_cluster}"'),
        ("train = 6\nval = 3\nsize = [32, 40]", f"train = {IMAGES}\nval = 5\nsize = [40, 56]"),
    )
    profile = held_folder / "profile.toml"
    keys = tomllib.loads(PROFILE.read_text())
    lines = [f"{key} = {json.dumps(value)}\n" for key, value in keys.items()]
    profile.write_text("".join(lines) + "[extra]\nhold = true\n")
    site, arguments = Site(cluster, held_folder), (grid.path, "--cluster", profile)

    said, asked = site.run("pipeline.submit", "grid", *arguments)
    assert f"submitted {BUNDLES} jobs for {BUNDLES} cells" in said
    assert asked == Counter(sbatch=-(-BUNDLES // DEFAULT_MAX_ARRAY_SIZE))
    jobs = {task.job for task in submissions(grid.run)}
    arrays = sorted({job.partition("_")[0] for job in jobs}, key=int)
    assert (len(jobs), len(arrays)) == (BUNDLES, 3)

    def queued() -> list[str]:
        """Return Slurm's own list of these arrays, with the reasons."""
        lines = cluster.answer("squeue", "--noheader", "--array", "--format=%F %i %T %r")
        return [line.partition(" ")[2] for line in lines.splitlines() if line.split()[0] in arrays]

    assert sorted(queued()) == sorted(f"{job} PENDING JobHeldUser" for job in jobs)

    said, asked = site.run("pipeline.status", *arguments, "--state", "waiting")
    assert asked == Counter(squeue=1)
    of_cells = [line.split() for line in said.splitlines() if line.startswith("streets/")]
    assert {words[0] for words in of_cells} == {cell.name for cell in grid.cells}
    assert {tuple(words[1:]) for words in of_cells} == {("waiting", "JobHeldUser")}
    assert f"{BUNDLES} cells: {BUNDLES} waiting" in said

    said, asked = site.run("pipeline.submit", "grid", *arguments)
    assert f"{BUNDLES} cells: {BUNDLES} waiting" in said
    assert asked == Counter(squeue=1), "what waits already is not sent again"

    said, asked = site.run("pipeline.cancel", *arguments)
    assert f"cancelled {BUNDLES} jobs" in said
    assert asked == Counter(squeue=1, scancel=1)
    until(lambda: not queued(), lambda: f"{len(queued())} jobs are left")
    said, _ = site.run("pipeline.status", *arguments)
    assert f"{BUNDLES} cells: {BUNDLES} missing" in said
