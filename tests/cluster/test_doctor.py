"""The doctor on a real Slurm: a healthy grid passes all of it, and what the nodes alone can tell is
told by the line that is about it."""

from __future__ import annotations

import json
import signal
import subprocess
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cluster.bundle_runs import bundle_grid
from tests.cluster.slurm_cluster import PROFILE, PYTHON, until
from tests.jobs.job_processes import tree

pytestmark = pytest.mark.slow

# so long that a busy machine's disk does not decide
USUAL = {"lead_seconds": 900, "reduce_nodes": 2, "reduce_tasks_per_node": 2}
Lines = tuple[int, list[str]]


def doctor_of(folder: Path, data: str, *options: str, **profile: object) -> list[object]:
    """The command that examines a new grid in `folder`, with keys of the profile that are not as
    usual."""
    grid = bundle_grid(folder, data)
    table = {**tomllib.loads(PROFILE.read_text()), **USUAL, **profile}
    text = "".join(f"{key} = {json.dumps(value)}\n" for key, value in table.items())
    (folder / "profile.toml").write_text(text)
    site = ["--cluster", folder / "profile.toml"]
    return [PYTHON, "-m", "pipeline.doctor", grid.path, *site, *options]


@pytest.fixture
def examine(cluster, streets_on_cluster) -> Callable[..., Lines]:
    """The exit code of the doctor on a grid in `folder`, and its lines. Whatever it finds, it
    leaves nothing behind."""

    def lines(folder: Path, *options: str, **profile: object) -> Lines:
        command = doctor_of(folder, streets_on_cluster, *options, **profile)
        before = tree(folder)
        done = cluster.command(*command)
        assert not done.stderr or "--on-nodes" in options, done.stderr
        assert "Traceback" not in done.stderr
        assert tree(folder) == before
        assert "doctor" not in cluster.answer("squeue", "--noheader", "--format=%j")
        return done.returncode, done.stdout.splitlines()

    return lines


def failed(found: Lines) -> list[str]:
    code, lines = found
    assert code == 1
    return [line.removeprefix("FAIL  ") for line in lines if line.startswith("FAIL")]


def test_a_healthy_grid_passes_on_the_nodes_too(cluster, examine):
    said = ["echo a line of the set-up"]
    folder = cluster.runs / "doctor"
    code, lines = examine(folder, "--on-nodes", node_local="/tmp", setup=said)
    assert code == 0, lines
    assert not [line for line in lines if not line.startswith(("pass  ", "skip  "))]
    passed = [line.removeprefix("pass  ") for line in lines if line.startswith("pass")]
    for what in (
        "partition (batch is up)",
        "MPI type (pmi2)",
        "a training job, as sbatch sees it (using 4 processors on nodes ",
        "a job on the nodes (4 ranks on n",
        "clocks (within ",
        "set-up lines on the nodes (1 lines, no complaint)",
        "shards and weights from the nodes (all 2, ",
        "content of the shards (every byte of streets is as packed)",
        "network between the ranks (4 ranks added 4 MB up in ",
        "MPI of reduce (4 ranks in one world, by pmi2)",
    ):
        assert [line for line in passed if line.startswith(what)], (what, passed)


def test_what_only_the_nodes_know_fails_in_its_own_line(cluster, examine):
    folder = cluster.runs / "doctor-sick"
    wrong = {"network_interface": "ib0", "mpi": "none", "setup": ["module load mpi || true"]}
    lines = failed(examine(folder, "--on-nodes", **wrong))
    assert [line.split(":")[0] for line in lines] == [
        "set-up lines on the nodes",
        "network interface",
        "network between the ranks",
        "MPI of reduce",
    ]
    assert "module: command not found" in lines[0]
    assert lines[1].startswith("network interface: n1 has no 'ib0', only lo, eth0; set network_int")
    assert (
        "Unable to find address for: ib0; the ranks cannot communicate over ib0: set netw"
        in lines[2]
    )
    assert "srun started 4 tasks without MPI" in lines[3]


def test_a_run_directory_that_the_nodes_do_not_see(examine, tmp_path):
    """Every node has a /tmp of its own."""
    lines = failed(examine(tmp_path / "doctor", "--on-nodes"))
    (line,) = lines
    assert line.startswith("a job on the nodes: the nodes do not see the run directory: job ")
    assert line.endswith("; set run_dir to a folder on a file system that the nodes share")


def test_ctrl_c_takes_the_job_out_of_the_queue(cluster, streets_on_cluster):
    folder = cluster.runs / "doctor-left"
    later = {"extra.begin": "now+1hour"}
    command = doctor_of(folder, streets_on_cluster, "--on-nodes", **later)
    before = tree(folder)
    with (cluster.runs / "doctor-left.err").open("w+") as said:
        person = subprocess.Popen(
            list(map(str, command)), cwd=cluster.runs, env=cluster.environ, stderr=said,
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
        )  # fmt: skip
        until(lambda: "is waiting (BeginTime)" in Path(said.name).read_text(), "it waits")
        assert "doctor" in cluster.answer("squeue", "--noheader", "--format=%j")
        person.send_signal(signal.SIGINT)
        assert person.wait(timeout=300) == 130
    assert "doctor" not in cluster.answer("squeue", "--noheader", "--format=%j")
    assert tree(folder) == before


def test_what_slurm_does_not_know(cluster, examine):
    folder = cluster.runs / "doctor-strange"
    strange = {"account": "nobodys", "qos": "golden", "nodes": 9, "minutes": 60}
    lines = failed(examine(folder, **strange))
    for line, begin in zip(lines, [
        "account: account = 'nobodys' is no account of 'root'; ",
        "quality of service: there is no quality of service 'golden'; ",
        "nodes of the partition: nodes = 9, but the partition has 4; set nodes in the profile",
        "a training job, as sbatch sees it: sbatch says: allocation failure: Requested node conf",
    ], strict=True):  # fmt: skip
        assert line.startswith(begin)


def test_a_partition_that_is_not_there_is_one_failure(cluster, examine):
    lines = failed(examine(cluster.runs / "doctor-nowhere", "--on-nodes", partition="bach"))
    (line,) = lines
    assert line.startswith("partition: there is no partition 'bach'; did you mean 'batch'?; set ")
