"""Batch scripts do the same work as `grid` does, from images to the report, and the same resuming;
in folders with odd names, under an open umask, sent from one folder and run in another."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hpc.storage import checkpoint
from pipeline.config.grid_file import Grid, read_grid
from pipeline.submission.submitter import submit
from tests.hpc.scheduler.hostile import HOSTILE
from tests.jobs.small_runs import assert_all_same, results
from tests.pipeline.fake_queue import FakeQueue
from tests.pipeline.stories import work
from tests.pipeline.submission.slurm_scripts import Site, options

REPOSITORY = Path(__file__).parents[3]
GRID = """
name = {name}
seeds = [0, 1]
models = ["fcn_mobilenet_v3_large"]
losses = ["CE", "DLNWCE"]
run_dir = "run"
[dataset.streets]
source = "synthetic"
shards = "shards"
train = 12
val = 3
size = [40, 56]
[protocol]
epochs = 2
batch_size = 2
resize = [40, 56]
crop = [40, 40]
eval_size = 0
weights = "pretrain"
threads = 1
checkpoint_minutes = 0.003
[protocol.pretrain]
epochs = 1
batch_size = 2
[cluster]
kind = "{kind}"
"""
NAME = "$(touch x) `touch x`; touch x ' \""
FOLDER = "a b'c\"$(touch x)"
PREP, PRETRAIN, TRAIN, REDUCE, REPORT = range(41, 46)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("scripts")


@pytest.fixture(scope="module")
def site(place) -> Site:
    return Site(place / "login node")


def command(site: Site, folder: Path, module: str, *words: object) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", module, *map(str, words)], cwd=folder,
        env={**os.environ, "PATH": site.path, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True, text=True, timeout=300, preexec_fn=lambda: os.umask(0),
    )  # fmt: skip


def grid_in(folder: Path, kind: str) -> Path:
    folder.mkdir()
    (folder / "grid.toml").write_text(GRID.format(name=json.dumps(NAME), kind=kind))
    return folder


@pytest.fixture(scope="module")
def by_queue(place) -> dict:
    """The results of the same jobs from a queue, without scripts."""
    folder = grid_in(place / "plain", "local")
    grid, queue = open_grid(folder), FakeQueue(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        submit(grid, queue, ["prep", "grid"])
        work(queue)
    return results(grid.run)


def open_grid(folder: Path) -> Grid:
    before = Path.cwd()
    os.chdir(folder)
    try:
        return read_grid("grid.toml")
    finally:
        os.chdir(before)


def first_checkpoint(grid: Grid) -> bool:
    keys = {cell.bundle_key for cell in grid.cells}
    return any(checkpoint.find(grid.run.checkpoints(key))[0] for key in keys)


def kill_after_its_first_checkpoint(site: Site, grid: Grid) -> None:
    """Element 0 of the array, with no notice."""
    with site.start(TRAIN, 0) as job:
        while not first_checkpoint(grid):
            assert job.poll() is None, "it ended before it was to be killed"
            time.sleep(0.01)
        os.killpg(job.pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def sent(place, site) -> Path:
    """The folder of a run whose scripts `submit.sh` has sent."""
    folder = grid_in(place / FOLDER, "slurm")
    written = command(site, folder, "pipeline.submit", "all", "grid.toml", "--script", "the\nDIR")
    assert written.returncode == 0, written.stderr
    sent = subprocess.run(
        [folder / "the\nDIR" / "submit.sh"], cwd="/", capture_output=True, text=True,
        env={**os.environ, **HOSTILE, "SLURM_CONF": "/site/slurm.conf", "PATH": site.path},
    )  # fmt: skip
    assert sent.returncode == 0, sent.stderr
    assert "warning: SBATCH_PARTITION of this shell is not used; jobs get" in sent.stderr
    return folder


@pytest.fixture(scope="module")
def by_scripts(sent, site) -> Path:
    """The folder of a run that scripts have brought to its end; its first job was killed half-way,
    and its script sent again."""
    grid = open_grid(sent)
    assert site.run(PREP) == 0
    assert site.run(PRETRAIN, 0) == 0
    kill_after_its_first_checkpoint(site, grid)
    shown = command(site, sent, "pipeline.status", "grid.toml").stdout
    assert "4 cells: 2 running, 2 missing" in shown  # its heart beat a moment ago
    for element in (0, 1):
        assert site.run(TRAIN, element) == 0
    for job in (REDUCE, REPORT):
        assert site.run(job) == 0
    return sent


def test_submit_sends_each_script_after_those_before_it(sent, site):
    assert site.asked() == [
        "--parsable --kill-on-invalid-dep=yes prep.sbatch",
        "--parsable --kill-on-invalid-dep=yes --dependency=afterok:41 pretrain.sbatch",
        "--parsable --kill-on-invalid-dep=yes --dependency=afterok:42_0 train.sbatch",
        "--parsable --kill-on-invalid-dep=yes --dependency=afterany:43 reduce.sbatch",
        "--parsable --kill-on-invalid-dep=yes --dependency=afterok:44 report.sbatch",
    ]


def test_sbatch_sees_nothing_that_the_shell_had_left_over(sent, site):
    assert site.variables() & HOSTILE.keys() == set()
    assert {"SLURM_CONF", "PATH"} <= site.variables()


def test_a_script_that_is_not_an_element_of_its_array_says_what_to_do(sent, site):
    with site.start(TRAIN) as job:
        _, said = job.communicate(timeout=60)
        assert job.returncode and b"run this script with sbatch" in said
    with site.start(TRAIN, 7) as job:
        _, said = job.communicate(timeout=60)
        assert job.returncode and b"the script has no such task" in said


def test_only_jobs_that_listen_are_told_of_the_time_limit(sent, site):
    said = [options(site.script(job)).get("signal") for job in range(PREP, REPORT + 1)]
    assert said == [None, "USR2@120", "USR2@120", None, None]


@pytest.mark.slow
def test_the_results_are_those_of_the_queue_bit_by_bit(by_scripts, by_queue):
    run = open_grid(by_scripts).run
    assert_all_same(results(run), by_queue)
    assert (run.report / "index.html").exists()


@pytest.mark.slow
def test_the_killed_job_went_on_from_its_checkpoint(by_scripts):
    log = (open_grid(by_scripts).run.logs / f"{TRAIN}_0_0_log.err").read_text()
    assert "starting at step 0\n" in log
    assert "resuming at step " in log and "resuming at step 0\n" not in log


@pytest.mark.slow
def test_a_finished_script_that_is_sent_again_does_nothing(by_scripts, site):
    run = open_grid(by_scripts).run
    before = {path: path.stat().st_mtime_ns for path in run.counts.iterdir()}
    assert site.run(TRAIN, 1) == 0
    assert {path: path.stat().st_mtime_ns for path in run.counts.iterdir()} == before
    log = (run.logs / f"{TRAIN}_1_0_log.err").read_text()
    assert log.endswith("2 cells are done already; there is nothing to do\n")


@pytest.mark.slow
def test_what_is_done_gets_no_script(by_scripts, site):
    done = command(site, by_scripts, "pipeline.submit", "grid", "grid.toml", "--script", "more")
    assert done.stdout.endswith("nothing is left to submit, so no script was written\n")
    assert not (by_scripts / "more").exists()


@pytest.mark.slow
def test_nothing_in_a_name_was_run_and_nobody_else_may_write(by_scripts, site, place):
    assert not [path for path in place.rglob("*") if path.name == "x"]
    for path in (by_scripts / "the\nDIR").iterdir():
        assert subprocess.run(["bash", "-n", path]).returncode == 0
    written = [*(by_scripts / "run").rglob("*"), *(by_scripts / "the\nDIR").rglob("*")]
    assert not [path for path in written if path.lstat().st_mode & 0o022]


@pytest.mark.slow
def test_a_task_that_is_refused_says_so_in_one_line_and_fails(by_scripts, site):
    run = open_grid(by_scripts).run
    script = site.script(99)
    script.write_text(site.script(TRAIN).read_text().replace("streets-seed1", "streets-seed9"))
    assert site.run(99, 1) == 2
    log = (run.logs / "99_1_0_log.err").read_text()
    assert log.startswith("error: cannot read the task ") and log.count("\n") == 1
