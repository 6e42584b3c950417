"""Faults of submissions and of the queue on a real Slurm: a bundle ends with the same bits all the
same, and nothing is sent twice."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from pipeline.tracking.submissions import submissions
from tests.cluster.bundle_runs import TOTAL, BundleRun
from tests.cluster.diverging_training import LOSS
from tests.cluster.slurm_cluster import Cluster
from tests.cluster.test_interruptions import assert_no_step_was_redone
from tests.jobs.small_runs import assert_all_same

SLOW = "tests.cluster.slow_training"
HOLDS = 'exec {sbatch} --hold "$@"'
HOLDS_AND_KILLS = '{sbatch} --hold "$@" && kill -KILL $PPID'

pytestmark = pytest.mark.slow


def sbatch_that(folder: Path, line: str) -> dict[str, str]:
    """Variables with which `line` is sbatch."""
    path = folder / "bin" / "sbatch"
    path.parent.mkdir()
    path.write_text(f"#!/bin/bash\n{line.format(sbatch=shutil.which('sbatch'))}\n")
    path.chmod(0o755)
    return {"PATH": f"{path.parent}:{os.environ['PATH']}"}


def queued(bundle: BundleRun) -> list[str]:
    """Its jobs that wait or run."""
    rows = bundle.cluster.answer("squeue", "--noheader", "--format=%i %o").splitlines()
    return [row.split()[0] for row in rows if str(bundle.run.root) in row]


def jobs_of(bundle: BundleRun) -> list[str]:
    """All jobs that were ever sent for it, as they are recorded."""
    return [task.job for task in submissions(bundle.run) if task.kind == "bundle"]


def started(cluster: Cluster, command: list[str]) -> subprocess.Popen[str]:
    """A command that goes on beside the test."""
    return subprocess.Popen(
        command, cwd=cluster.runs, env=cluster.environ, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def refused(bundle: BundleRun, module: str, *words: str) -> str:
    """Return the only line of a command that cannot do its work now."""
    done = bundle.cluster.command(*bundle.command(module, *words))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1, done.stderr
    return done.stderr.rstrip()


def test_a_grid_that_is_killed_when_sbatch_has_answered(cluster, new_bundle, expected):
    bundle = new_bundle(pause=0.0, exclude="n[3-4]")
    killing = sbatch_that(bundle.profile.parent, HOLDS_AND_KILLS)
    grid = bundle.command(SLOW, "grid")
    assert cluster.command(*grid, **killing).returncode == -signal.SIGKILL
    (job,) = queued(bundle)
    assert jobs_of(bundle) == [""], "it died before it could note the job"
    assert not (bundle.run.logs / f"{job}_submitted.pkl").exists(), "nor was the job told its work"
    said = cluster.answer(*bundle.command("pipeline.status"))
    assert said.count("JobHeldUser") == 2
    assert "2 waiting" in said
    said = cluster.answer(*grid)
    assert "2 waiting" in said
    assert "submitted" not in said
    assert queued(bundle) == jobs_of(bundle) == [job]
    cluster.answer("scontrol", "release", job)
    assert_all_same(bundle.finish(job), expected)
    assert bundle.starts == [list(range(TOTAL))]


def test_pickles_that_are_gone_and_then_two_grids_at_once(cluster, new_bundle, expected):
    bundle = new_bundle(pause=0.0, exclude="n[3-4]")
    grid = bundle.command(SLOW, "grid")
    cluster.answer(*grid, **sbatch_that(bundle.profile.parent, HOLDS))
    (broken,) = jobs_of(bundle)
    for pickle in bundle.run.logs.glob("*.pkl"):
        pickle.unlink()
    cluster.answer("scontrol", "release", broken)
    cluster.wait_for_state(broken, "FAILED")
    pickle = bundle.run.logs.absolute() / f"{broken}_submitted.pkl"
    line = f"error: {pickle} is gone, which says what this job does; run grid again"
    assert line in cluster.answer(*bundle.command("pipeline.logs", "/CE/")).splitlines()
    assert "2 failed" in cluster.answer(*bundle.command("pipeline.status"))
    said = cluster.answer(*bundle.command(SLOW, "retry"))
    assert f"  2 cells: {line}; for example streets/" in said
    assert said.endswith("nothing to submit again\n")

    both = [started(cluster, grid) for _ in range(2)]
    said = [process.communicate(timeout=600) for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    submitted = ["submitted 1 jobs for 2 cells" in out for out, _ in said]
    assert sorted(submitted) == [False, True], "only one of them has sent it"
    (_, job) = jobs_of(bundle)
    assert_all_same(bundle.finish(job), expected)
    assert Cluster.jobs_of(bundle.run.logs) == [broken, job]
    assert bundle.starts == [list(range(TOTAL))]


def test_a_loss_that_is_not_finite_on_one_of_two_ranks(cluster, new_bundle, expected):
    bundle = new_bundle(exclude="n[3-4]")
    job = bundle.submit("tests.cluster.diverging_training")
    bundle.wait_for_checkpoint()
    (broken, sound) = bundle.grid.cells
    assert broken.loss.name == LOSS
    assert not bundle.run.failure(broken.signature).exists(), "it diverged before it was saved"
    found = bundle.finish(job)
    assert_all_same(found, {sound.name: expected[sound.name]})
    why = f"the loss was nan at step {TOTAL // 2 + 1} of {TOTAL}"
    said = cluster.answer(*bundle.command(SLOW, "retry"))
    assert f"  {broken.name}: {why}; " in said
    assert said.endswith("nothing to submit again\n")
    said = cluster.answer(*bundle.command("pipeline.status"))
    assert "1 done, 1 failed" in said
    assert "the loss was nan at step" in said
    assert "submitted" not in cluster.answer(*bundle.command(SLOW, "grid"))
    assert jobs_of(bundle) == [job]
    assert bundle.starts == [list(range(TOTAL))]


def test_without_accounting_and_then_without_a_controller(cluster, new_bundle, expected):
    bundle = new_bundle(pause=1.5, exclude="n[3-4]")
    cluster.do("accounting", "stop")
    try:
        first = bundle.submit()
        bundle.wait_for_checkpoint()
        assert cluster.command("sacct").returncode != 0
        assert "cancelled 1 jobs" in cluster.answer(*bundle.command("pipeline.cancel"))
        cluster.wait_until_gone(first)
        assert "2 interrupted" in cluster.answer(*bundle.command("pipeline.status"))
        both = [word for cell in bundle.grid.cells for word in ("--cell", cell.name)]
        said = cluster.answer(*bundle.command(SLOW, "retry"), *both)
        assert said.startswith("2 cells: cancelled: again\n")
        job = jobs_of(bundle)[-1]
    finally:
        cluster.do("accounting", "start")
    bundle.wait_for_checkpoint(beyond=max(bundle.steps_saved))
    waiting = started(cluster, bundle.command(SLOW, "grid", "--wait"))
    assert waiting.stdout
    assert "2 running" in waiting.stdout.readline()
    assert waiting.stdout.readline().startswith("small: 2 running; "), "it has seen how far it is"

    cluster.do("controller", "stop")
    try:
        said = cluster.answer(*bundle.command("pipeline.status"))
        assert "2 running" in said, "by its heartbeat"
        (note,) = [line for line in said.splitlines() if line.startswith("note: the queue cannot")]
        assert "squeue failed: " in note
        line = refused(bundle, SLOW, "grid")
        assert line.startswith("error: scontrol failed: ")
        assert "; jobs go on; run it again when Slurm answers" in line
        assert refused(bundle, SLOW, "retry") == line
        bundle.wait_for_checkpoint(beyond=max(bundle.steps_saved))
        assert waiting.stderr
        line = waiting.stderr.readline()
        assert line.startswith("squeue failed: ")
        assert line.endswith("; jobs go on; run it again when Slurm answers; waiting for Slurm\n")
        assert waiting.poll() is None
    finally:
        cluster.do("controller", "start")
    assert "2 running" in cluster.answer(*bundle.command("pipeline.status"))
    assert_all_same(bundle.finish(job), expected)
    said = waiting.communicate(timeout=600)
    assert waiting.returncode == 0, said
    assert set(jobs_of(bundle)) == {first, job}
    assert cluster.state(first) == "CANCELLED", "it rose from the dead"
    assert len(bundle.starts) == 2
    assert_no_step_was_redone(bundle)
