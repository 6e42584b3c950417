"""The doctor's probe jobs are submitted, waited for and ended with it, and leave no files."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from hpc.cli import UserError
from hpc.diagnostics.probe_jobs import ProbeJob, _refuse_stuck, run_probe_jobs
from hpc.scheduler.base import JobState
from hpc.scheduler.cluster_profile import Resources
from hpc.scheduler.job import ModuleCall
from pipeline import doctor
from tests.jobs.job_processes import tree, until
from tests.pipeline.fake_queue import FakeQueue
from tests.pipeline.grids import grid_file
from tests.test_layers import REPOSITORY


def test_a_job_that_would_wait_forever_is_cancelled(tmp_path):
    queue = FakeQueue(tmp_path)
    queue.why["job1"] = "PartitionTimeLimit"
    heard: list[str] = []
    with pytest.raises(UserError, match=r"job job1 would wait forever \(PartitionTimeLimit\); see"):
        run_probe_jobs(
            queue,
            [ProbeJob("train", ModuleCall("jobs.probe"), Resources())],
            tmp_path,
            heard.append,
        )
    assert queue.cancelled == [["job1"]]


def test_a_job_that_waits_for_jobs_of_others_waits_on():
    _refuse_stuck({"job1": JobState("waiting", "QOSGrpNodeLimit")})  # raises nothing
    with pytest.raises(UserError):
        _refuse_stuck({"job1": JobState("waiting", "PartitionNodeLimit")})


TWO_RANKS = ('kind = "local"', 'kind = "local"\ntasks_per_node = 2')


@pytest.mark.slow
def test_on_the_local_queue_a_probe_job_runs_too_and_leaves_nothing(tmp_path, shards, capsys):
    local = grid_file(tmp_path, TWO_RANKS)
    before = tree(tmp_path)
    assert doctor.main([str(local), "--on-nodes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert not [line for line in lines if not line.startswith(("pass", "skip"))]
    for what in ("a job on the nodes (2 ranks on ", "clocks (within ", "content of the shards (ev",
                 "network between the ranks (2 ranks added"):  # fmt: skip
        assert [line for line in lines if line.startswith(f"pass  {what}")], what
    assert "skip  time to save: the local queue has no time limit" in lines
    assert tree(tmp_path) == before


@pytest.mark.slow
def test_ctrl_c_ends_the_job_and_leaves_nothing(tmp_path, shards):
    local = grid_file(tmp_path)
    before = tree(tmp_path)
    command = [sys.executable, "-m", "pipeline.doctor", str(local), "--on-nodes"]
    with (tmp_path.parent / f"{tmp_path.name}.err").open("w+") as said:
        person = subprocess.Popen(command, cwd=REPOSITORY, stderr=said, stdout=subprocess.DEVNULL)
        until(lambda: "is running" in Path(said.name).read_text(), "the job runs")
        person.send_signal(signal.SIGINT)
        assert person.wait(timeout=120) == 130
    assert tree(tmp_path) == before
    words = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout
    assert str(tmp_path) not in words
