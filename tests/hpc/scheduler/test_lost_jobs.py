"""Submitters die after sbatch has answered and before job ids are recorded. Slurm's commands are
faked, and the scripts they got are run as on a node."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from hpc.scheduler.auto import open_queue
from hpc.scheduler.base import QueueUnreachable
from hpc.scheduler.cluster_profile import ClusterProfile, Resources
from hpc.scheduler.exit_cause import exit_cause
from hpc.scheduler.job import last_error
from hpc.scheduler.local import LocalQueue
from tests.hpc.scheduler import test_slurm
from tests.hpc.scheduler.test_slurm import FakeSlurm, call, open_slurm

slurm, logs = test_slurm.slurm, test_slurm.logs  # fixtures

DIES = """
from hpc.scheduler.job import ModuleCall
from hpc.scheduler.cluster_profile import ClusterProfile, Resources
from hpc.scheduler.slurm import SlurmQueue
calls = [ModuleCall("slurm_program", (word,)) for word in ("a", "b", "c")]
SlurmQueue(ClusterProfile(), {logs!r}).submit(calls, Resources(), "train", token="t-0")
"""


def die_submitting(slurm: FakeSlurm, logs: Path) -> None:
    """Submit three calls from a process that is killed as soon as sbatch has printed its answer."""
    sbatch = slurm.folder / "bin" / "sbatch"
    sbatch.write_text(sbatch.read_text() + "\nkill -KILL $PPID\n")
    repository = os.pathsep.join([str(Path(__file__).parents[3]), os.environ["PYTHONPATH"]])
    done = subprocess.run(
        [sys.executable, "-c", DIES.format(logs=str(logs))],
        env={**os.environ, "PYTHONPATH": repository},
    )
    assert done.returncode == -signal.SIGKILL


def element(number: int) -> dict[str, str]:
    return {"SLURM_JOB_ID": "1", "SLURM_ARRAY_JOB_ID": "1", "SLURM_ARRAY_TASK_ID": str(number)}


def test_the_jobs_of_a_dead_submission_are_found_and_do_their_work(slurm, logs):
    die_submitting(slurm, logs)
    assert not list(logs.glob("1_*_submitted.pkl")), "submitit has put nothing in place"
    comment = slurm.options()["comment"]
    slurm.answer(
        "queue", f"1_0 {comment}\n1_1 {comment}\n1_2 {comment}\n7 (null)\n8 of a project\n"
    )
    queue = open_slurm(logs)
    assert queue.find_by_token(["t-0", "t-1"]) == {"t-0": {0: "1_0", 1: "1_1", 2: "1_2"}, "t-1": {}}
    for number, word in enumerate("abc"):
        assert slurm.run(1, element(number)) == 0
        assert f"ran with ['{word}']" in (logs / f"1_{number}_0_log.out").read_text()


def test_an_array_that_was_split_is_found_as_one(slurm, logs):
    slurm.answer("max_array_size", "2")
    queue = open_slurm(logs)
    assert queue.submit([call(str(n)) for n in range(3)], Resources(), "long", token="t-0") == [
        "1_0", "1_1", "2",
    ]  # fmt: skip
    first, second = (slurm.options(number)["comment"] for number in (1, 2))
    slurm.answer("queue", f"2 {second}\n1_1 {first}\n1_0 {first}\n")
    assert queue.find_by_token(["t-0"]) == {"t-0": {0: "1_0", 1: "1_1", 2: "2"}}
    assert slurm.run(2, {"SLURM_JOB_ID": "2"}) == 0


def test_a_job_whose_pickles_are_gone_says_so(slurm, logs):
    queue = open_slurm(logs)
    jobs = queue.submit([call(), call()], Resources(), "train", token="t-0")
    for pickle in logs.glob("*.pkl"):
        pickle.unlink()
    batch = subprocess.run(
        ["bash", str(slurm.folder / "script.1")],
        env={**os.environ, **element(1)}, capture_output=True, text=True,
    )  # fmt: skip
    pickle = logs / "1_1_submitted.pkl"
    line = f"error: {pickle} is gone, which says what this job does; run grid again"
    assert (batch.returncode, batch.stderr) == (2, f"{line}\n")
    log = logs / "1_1_0_log.err"  # where Slurm writes what the batch script says
    assert slurm.options()["error"] == str(log).replace("1_1", "%A_%a", 1)
    log.write_text(batch.stderr)
    assert last_error(queue.log_files(jobs[1])) == line
    assert exit_cause("FAILED", queue.log_files(jobs[1])) == ("error", line)


def test_a_comment_that_the_profile_gives_is_kept_and_the_job_does_its_work(slurm, logs):
    queue = open_slurm(logs, extra={"comment": "project 7"})
    queue.submit([call()], Resources(), "train", token="t-0")
    assert slurm.options()["comment"] == "project 7"
    slurm.answer("queue", "1 project 7\n")
    assert queue.find_by_token(["t-0"]) == {"t-0": {}}
    assert slurm.run(1, {"SLURM_JOB_ID": "1"}) == 0


def test_a_silent_controller_is_no_answer(slurm, logs):
    slurm.answer("error", "slurm_load_jobs error: Unable to contact slurm controller\n")
    with pytest.raises(QueueUnreachable, match=r"squeue failed: .* Unable to contact"):
        open_slurm(logs).find_by_token(["t-0"])


def test_jobs_of_the_local_queue_are_found_by_their_token(tmp_path, monkeypatch):
    queue = open_queue(ClusterProfile(kind="local"), tmp_path / "logs", tmp_path / "queue")
    monkeypatch.setattr(LocalQueue, "ensure_runner", lambda _: None)  # they wait
    queue.submit([call()], Resources(), "other", token="t-0")
    jobs = queue.submit([call("a"), call("b")], Resources(), "train", token="t-1")
    assert queue.find_by_token(["t-1", "t-2"]) == {"t-1": dict(enumerate(jobs)), "t-2": {}}
