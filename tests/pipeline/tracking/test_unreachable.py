"""A grid of a Slurm that cannot be asked from here: what only reads works from files, and what must
submit or cancel is refused."""

from __future__ import annotations

import os
import time

import pytest

from hpc.cli import UserError
from hpc.scheduler.auto import open_queue
from hpc.storage.atomic import read_json, write_json
from pipeline import cancel, logs, retry, status, submit
from tests.hpc.scheduler.test_slurm import FakeSlurm
from tests.pipeline.grids import finish, small_grid

WHY = "there is no sbatch on PATH; use a login node of the cluster"
NOTE = f"note: the queue cannot be asked from here, so states are from files: {WHY}"
SEEDS = ("seeds = [0, 1]", "seeds = [0, 1, 2, 3]")
SITE = ('kind = "local"', 'kind = "slurm"\nmax_jobs = 3')


@pytest.fixture
def path(tmp_path, shards, monkeypatch) -> str:
    """Four bundles of four cells of a grid file: of seed 0 the job runs, of seed 1 it failed, of
    seed 2 it left nothing, and seed 3 was deferred. One cell of seed 1 is done."""
    grid = small_grid(tmp_path, SEEDS, SITE)
    fake = FakeSlurm(tmp_path / "slurm")
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    with monkeypatch.context() as on_the_cluster:
        on_the_cluster.setenv("PATH", str(fake.folder / "bin"), prepend=os.pathsep)
        submit.submit(grid, open_queue(grid.cluster, grid.run.logs, grid.run.queue), ["grid"])
    names = sorted(path.stem for path in grid.run.tasks.glob("*seed[01]*.json"))
    beat = {"stage": "training", "step": 3, "total": 6, "steps_per_second": 1.0}
    write_json(grid.run.progress_of(names[0]), {**beat, "time": time.time()})
    write_json(grid.run.progress_of(names[1]), {**beat, "time": time.time() - 3600})
    (grid.run.logs / "1_1_0_log.err").write_text("error: a shard is damaged\n")
    finish(grid, [cell for cell in grid.cells if cell.seed == 1][:1], "finished")
    monkeypatch.setenv("PATH", "/nowhere")
    return str(grid.path)


def test_states_are_from_files(path, capsys):
    assert status.main([path]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said.count(NOTE) == 1
    assert "small: 16 cells: 1 done, 4 running, 4 waiting, 3 failed, 4 unknown" in said
    assert any("a shard is damaged" in line for line in said)


def test_what_reads_says_so_in_one_line(path, tmp_path, capsys):
    arguments = {
        (submit.main, "grid", path, "--dry-run"): "would submit 2 jobs for 7 cells",
        (submit.main, "reduce", path, "--dry-run"): "stages: reduce",
        (retry.main, path, "--dry-run"): "4 cells: unknown; run retry where the queue answers",
        (logs.main, "fcn_mobilenet_v3_large/DLNWCE/1", path): "error: a shard is damaged",
        (submit.main, "grid", path, "--script", f"{tmp_path}/scripts"): "wrote 1 scripts, with 2 ",
    }
    for (main, *words), expected in arguments.items():
        assert main(words) == 0
        said = capsys.readouterr().out
        assert said.splitlines().count(NOTE) == 1
        assert expected in said


def test_a_submission_that_died_may_have_sent_its_cells(path, tmp_path, capsys):
    grid = small_grid(tmp_path, SEEDS, SITE)
    (record,) = grid.run.submitted.iterdir()
    write_json(record, {"tasks": [{**task, "job": ""} for task in read_json(record)["tasks"]]})
    assert status.main([path]) == 0
    assert "1 done, 4 running, 4 waiting, 7 unknown\n" in capsys.readouterr().out


def test_what_acts_is_refused(path, tmp_path):
    cell = "streets/fcn_mobilenet_v3_large/DLNWCE/2"
    before = sorted(tmp_path.rglob("*"))
    for main, *words in (
        (submit.main, "grid", path),
        (submit.main, "report", path),
        (retry.main, path),
        (cancel.main, path),
    ):
        with pytest.raises(UserError) as refused:
            main(words)
        assert str(refused.value) == WHY
    with pytest.raises(
        UserError, match="was submitted, and the queue cannot be asked from here, job"
    ):
        retry.main([path, "--cell", cell, "--dry-run"])
    assert sorted(tmp_path.rglob("*")) == before
