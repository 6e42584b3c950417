"""What submitit and Slurm do to a job between its submission and its first line."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from hpc.call import ModuleCall
from hpc.profile import ClusterProfile, Resources, read_profile
from hpc.slurm import SlurmQueue
from tests.cluster.probe import seen_by
from tests.cluster.slurm_cluster import PROFILE

PROBE = "tests.cluster.probe"
SLOW_SBATCH = """#!/bin/bash
# answers only when the job has begun to look for its pickle
answer=$({sbatch} "$@") || exit
until grep -qs 'Loading pickle' {logs}/*_0_log.*; do sleep 0.1; done
echo "$answer"
"""


@pytest.fixture
def folder(cluster, tmp_path, monkeypatch) -> Path:
    """A folder that the nodes see, of a user who has turned to this cluster."""
    for key, value in cluster.environ.items():
        monkeypatch.setenv(key, value)
    shared = cluster.runs / tmp_path.name
    shared.mkdir()
    monkeypatch.chdir(shared)
    return shared


def queue_of(folder: Path, **changes) -> SlurmQueue:
    profile = read_profile(str(PROFILE))
    return SlurmQueue(ClusterProfile(**{**profile.model_dump(), **changes}), folder / "logs")


def probe(folder: Path, *arguments: str) -> ModuleCall:
    return ModuleCall(PROBE, (str(folder), *arguments))


def test_a_job_that_starts_before_its_pickle_is_in_place_waits_for_it(cluster, folder, monkeypatch):
    slow = folder / "bin" / "sbatch"
    slow.parent.mkdir()
    slow.write_text(SLOW_SBATCH.format(sbatch=shutil.which("sbatch"), logs=folder / "logs"))
    slow.chmod(0o755)
    monkeypatch.setenv("PATH", str(slow.parent), prepend=":")
    (job,) = queue_of(folder).submit([probe(folder)], Resources(), "early")
    assert cluster.state(job) == "RUNNING", "it started before submit returned"
    assert not seen_by(folder, job)
    cluster.wait_until_gone(job)
    assert len(seen_by(folder, job)) == 1


def test_one_call_is_a_plain_job_and_several_are_an_array(cluster, folder):
    queue = queue_of(folder)
    (single,) = queue.submit([probe(folder)], Resources(), "one")
    several = queue.submit([probe(folder)] * 2, Resources(), "two")
    assert single.isdigit()
    array = several[0].partition("_")[0]
    assert several == [f"{array}_0", f"{array}_1"]
    cluster.wait_until_gone(single, array)
    assert "ArrayTaskId" not in cluster.job(single)
    assert cluster.job(f"{array}_1")["ArrayTaskId"] == "1"
    assert all(len(seen_by(folder, job)) == 1 for job in (single, *several))


def test_the_ranks_of_two_nodes_get_their_cpus(cluster, folder):
    wanted = Resources(nodes=2, tasks_per_node=2, cpus_per_task=3)
    (job,) = queue_of(folder).submit([probe(folder)], wanted, "cpus")
    cluster.wait_until_gone(job)
    ranks = seen_by(folder, job)
    assert [rank["world_size"] for rank in ranks] == [4] * 4
    assert [rank["SLURM_CPUS_PER_TASK"] for rank in ranks] == ["3"] * 4
    assert len({rank["SLURMD_NODENAME"] for rank in ranks}) == 2


def test_two_jobs_that_start_together_on_one_node_do_not_meet_each_other(cluster, folder):
    calls = [probe(folder, "this", "that"), probe(folder, "that", "this")]
    jobs = queue_of(folder, extra={"nodelist": "n1"}).submit(
        calls, Resources(tasks_per_node=2), "neighbours"
    )
    cluster.wait_until_gone(jobs[0].partition("_")[0])
    for job in jobs:
        ranks = seen_by(folder, job)
        assert [rank["SLURMD_NODENAME"] for rank in ranks] == ["n1", "n1"]
        assert [rank["met"] for rank in ranks] == [[1.0, 1.0]] * 2
