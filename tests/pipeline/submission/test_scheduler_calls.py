"""A scheduler that hundreds of users share is asked rarely: one sbatch an array, one squeue a
poll, one scancel, and sacct not at all where files and squeue say enough."""

from __future__ import annotations

import os
import signal
from collections import Counter

import pytest

from hpc.scheduler.auto import open_queue
from pipeline import cancel, status
from pipeline.config.grid_file import Grid
from pipeline.submission import wait
from pipeline.submission.submitter import submit
from pipeline.tracking.submissions import Submission
from pipeline.tracking.survey import survey
from tests.hpc.scheduler.test_slurm import FakeSlurm
from tests.pipeline.grids import finish, small_grid

SEEDS = ("seeds = [0, 1]", f"seeds = {list(range(12))}")
SITE = ('kind = "local"', 'kind = "slurm"\nmax_jobs = 1000')


@pytest.fixture
def slurm(tmp_path, monkeypatch) -> FakeSlurm:
    fake = FakeSlurm(tmp_path / "slurm")
    monkeypatch.setenv("PATH", str(fake.folder / "bin"), prepend=os.pathsep)
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    return fake


@pytest.fixture
def grid(tmp_path, slurm, shards) -> Grid:
    """Twelve bundles of four cells."""
    return small_grid(tmp_path, SEEDS, SITE)


def asked(slurm: FakeSlurm) -> Counter[str]:
    """Return how often each command was called since the last look."""
    path = slurm.folder / "asked"
    if not path.exists():
        return Counter()
    calls = Counter(line.split()[0] for line in path.read_text().splitlines() if line)
    path.unlink()
    return calls


def queued(slurm: FakeSlurm, state: str) -> None:
    slurm.answer("queue", "".join(f"1_{element} {state} None\n" for element in range(12)))


def test_an_array_is_one_sbatch_and_a_poll_one_squeue(grid, slurm, monkeypatch, capsys):
    queue = open_queue(grid.cluster, grid.run.logs, grid.run.queue)
    jobs = submit(grid, queue, ["grid"])
    assert jobs == {"grid": [f"1_{element}" for element in range(12)]}
    sent = asked(slurm)
    assert sent["sbatch"] == 1
    assert sent["sacct"] == sent["sacctmgr"] == 0
    queued(slurm, "RUNNING")

    polls = []

    def poll(*arguments):
        found = survey(*arguments)
        polls.append(asked(slurm))
        if len(polls) == 3:
            finish(grid, grid.cells, "task")
            slurm.answer("queue", "")
        return found

    monkeypatch.setattr(wait, "survey", poll)
    monkeypatch.setattr(queue, "poll_seconds", 0.01)
    assert wait.wait_for(grid, queue, jobs, ("grid",)) == 0
    assert len(polls) > 3
    assert polls[:4] == [Counter(squeue=1)] * 4
    assert not (slurm.folder / "asked").exists()  # and nothing between the polls


def test_status_asks_once(grid, slurm):
    submit(grid, open_queue(grid.cluster, grid.run.logs, grid.run.queue), ["grid"])
    queued(slurm, "PENDING")
    asked(slurm)
    assert status.main([str(grid.path)]) == 0
    assert asked(slurm) == Counter(squeue=1)


def test_after_a_submission_that_died_there_is_one_more_until_the_next(grid, slurm, monkeypatch):
    queue = open_queue(grid.cluster, grid.run.logs, grid.run.queue)
    with monkeypatch.context() as dying:
        dying.setattr(Submission, "submitted", lambda *_: os.kill(os.getpid(), signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            submit(grid, queue, ["grid"])
    mark = slurm.options()["comment"]
    # one answer to both questions: the mark, and a state that is none of an end
    slurm.answer("queue", "".join(f"1_{element} {mark}\n" for element in range(12)))
    asked(slurm)
    assert status.main([str(grid.path)]) == 0
    assert asked(slurm) == Counter(squeue=2)
    assert sorted(submit(grid, queue, ["grid"])["grid"]) == sorted(f"1_{n}" for n in range(12))
    assert asked(slurm)["sbatch"] == 0
    assert status.main([str(grid.path)]) == 0
    assert asked(slurm) == Counter(squeue=1)


def test_cancelling_is_one_scancel(grid, slurm):
    submit(grid, open_queue(grid.cluster, grid.run.logs, grid.run.queue), ["grid"])
    queued(slurm, "RUNNING")
    asked(slurm)
    assert cancel.main([str(grid.path)]) == 0
    assert asked(slurm)["scancel"] == 1
