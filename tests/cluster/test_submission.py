"""Submitit and Slurm pass a job unchanged from its submission to its first line."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from hpc.scheduler.cluster_profile import ClusterProfile, Resources, read_profile
from hpc.scheduler.exit_cause import NEVER_SATISFIED, exit_cause
from hpc.scheduler.job import ModuleCall
from hpc.scheduler.slurm import SlurmQueue
from pipeline.submission.batch_scripts import Part, ScriptSite, render
from tests.cluster.probe import seen_by
from tests.cluster.slurm_cluster import PROFILE
from tests.hpc.scheduler.hostile import HANDED_ON, HOSTILE, LAUNCHER

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


def test_a_job_does_not_start_if_one_that_it_needs_was_cancelled(cluster, folder):
    queue, one = queue_of(folder), [probe(folder)]
    needed = queue_of(folder, extra={"hold": True}).submit(one * 2, Resources(), "needed")
    jobs = [queue.submit(one, Resources(), "then", needs=[job])[0] for job in needed]
    (last,) = queue.submit(one, Resources(), "last", after=jobs)
    cluster.answer("scontrol", "release", needed[0])
    queue.cancel(needed[1:])
    cluster.wait_until_gone(last)
    assert [job.why for job in queue.job_states(jobs).values()] == ["COMPLETED", NEVER_SATISFIED]
    assert [len(seen_by(folder, job)) for job in (*jobs, last)] == [1, 0, 1]


def test_the_ranks_of_two_nodes_get_their_cpus(cluster, folder):
    wanted = Resources(nodes=2, tasks_per_node=2, cpus_per_task=3)
    (job,) = queue_of(folder).submit([probe(folder)], wanted, "cpus")
    cluster.wait_until_gone(job)
    ranks = seen_by(folder, job)
    assert [rank["world_size"] for rank in ranks] == [4] * 4
    assert [rank["SLURM_CPUS_PER_TASK"] for rank in ranks] == ["3"] * 4
    assert len({rank["SLURMD_NODENAME"] for rank in ranks}) == 2


@pytest.mark.slow
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


def test_ranks_do_not_compute_on_cpus_if_slurm_granted_gpus(cluster, folder):
    """The cluster's GPUs are files; torch sees none."""
    queue = queue_of(folder)
    wanted = Resources(tasks_per_node=2, gpus_per_node=2)
    (job,) = queue.submit([probe(folder, "this", "that")], wanted, "gpus")
    cluster.wait_until_gone(job)
    assert seen_by(folder, job) == []
    cause, line = exit_cause("", queue.log_files(job))
    assert cause == "error"
    assert re.match(r"error: rank 0 on n\d: the job has GPUs \(SLURM_\w+=[\d,]+\), but torch", line)


def test_nothing_that_a_shell_has_left_over_changes_a_job(cluster, folder, monkeypatch):
    for name, value in HOSTILE.items():
        monkeypatch.setenv(name, value)
    setup = ["export FROM_SETUP=here", f"export PYTHONPATH={cluster.environ['PYTHONPATH']}"]
    queue = queue_of(folder, setup=setup, extra={"export": "NONE"})
    jobs = queue.submit([probe(folder)] * 2, queue.profile.training(), "hostile")
    assert {job.state for job in queue.job_states(jobs).values()} <= {"waiting", "running"}
    cluster.wait_until_gone(jobs[0].partition("_")[0])
    for job in jobs:
        ranks = seen_by(folder, job)
        assert ranks, [log.read_text() for log in queue.log_files(job)]
        assert [(rank["world_size"], rank["FROM_SETUP"]) for rank in ranks] == [(4, "here")] * 4
    found = cluster.job(jobs[0])
    assert (found["Partition"], found["TimeLimit"]) == ("batch", "00:30:00")


def test_nor_one_that_scripts_have_sent(cluster, folder):
    """By `submit.sh`; and by hand, where sbatch hands on what it does not take for its own."""
    python = folder / "python"
    python.write_text(f'#!/bin/bash\nenv >"{folder}/$SLURM_JOB_ID-$SLURM_PROCID"\n')
    python.chmod(0o755)
    profile = read_profile(str(PROFILE)).model_copy(
        update={"python": str(python), "memory_gb": 1.0}
    )
    for name in ("logs", "submitted"):
        (folder / name).mkdir()
    there = ScriptSite(profile, folder, folder, "hostile", "T")
    for name, text in render(there, [Part("train", "train", [("task", "")])]).items():
        (folder / name).write_text(text)
    for words, left_over in ((["submit.sh"], HOSTILE), (["-c", "sbatch train.sbatch"], HANDED_ON)):
        sent = subprocess.run(
            ["bash", *words], cwd=folder, env={**os.environ, **left_over},
            capture_output=True, text=True,
        )  # fmt: skip
        (job,) = re.findall(r"job (\d+)", sent.stdout + sent.stderr)
        cluster.wait_until_gone(job)
        assert cluster.state(job) == "COMPLETED"
        assert cluster.job(job)["Partition"] == "batch"
        ranks = list(folder.glob(f"{job}-*"))
        assert len(ranks) == 4
        for rank in ranks:
            environ = dict(line.partition("=")[::2] for line in rank.read_text().splitlines())
            slurms = {"PMI_SIZE": "4", "PMI_RANK": environ["SLURM_PROCID"]}
            assert {name: environ.get(name) for name in LAUNCHER} == {
                name: slurms.get(name) for name in LAUNCHER
            }
