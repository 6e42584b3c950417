"""The doctor's checks of the nodes. The facts of a real rank are copied to the ranks of two nodes
and broken one at a time: the check concerned fails, and no other."""

from __future__ import annotations

import copy
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from hpc.cli import UserError
from hpc.diagnostics.check import run_checks
from hpc.diagnostics.node_facts import Facts, answer_hellos, free_bytes
from hpc.diagnostics.probe_jobs import ProbeJob, Report
from hpc.distributed import process_group
from hpc.distributed.device import DeviceError
from hpc.distributed.launcher import RankEnv
from hpc.scheduler.cluster_profile import Resources
from hpc.scheduler.job import ModuleCall
from hpc.storage.atomic import read_json, write_json
from jobs import probe
from pipeline.config.grid_file import Grid, read_grid
from pipeline.submission.node_probe import checks_of, inputs
from tests.pipeline.doctor.fake_site import profile_file
from tests.pipeline.doctor.lines import flip
from tests.pipeline.doctor.sick_ranks import (
    Ranks,
    alone,
    damage,
    full_node,
    late,
    lost_rank,
    no_gpu,
    no_interface,
    no_peer,
    old_file,
    one_node,
    slow_disk,
    source,
    unanswered,
    unseen_file,
    version,
    wrong_sum,
)
from tests.pipeline.grids import grid_file

ALONE = RankEnv("single", 0, 1, 0, "n1", "7", "")
CALL, RESOURCES = ModuleCall("jobs.probe"), Resources(nodes=2, tasks_per_node=2)


@pytest.fixture(scope="module")
def grid(tmp_path_factory, streets) -> Grid:
    """Return a grid for two nodes with two ranks each, to which every check applies."""
    folder = tmp_path_factory.mktemp("doctor")
    cluster = profile_file(
        folder, tasks_per_node=2, gpus_per_node=2, gres="", node_local="/tmp", lead_seconds=600,
        network_interface="lo", reduce_nodes=2, reduce_tasks_per_node=2,
    )  # fmt: skip
    return read_grid(grid_file(folder, (f"{folder}/streets", str(streets))), str(cluster))


@pytest.fixture(scope="module")
def one_rank(grid, tmp_path_factory) -> dict[str, Any]:
    """Return the facts of a single rank, whose files a thread answers as the login node does."""
    shards = grid.datasets["streets"].shards
    return told(tmp_path_factory.mktemp("probe"), list(inputs(grid)), shards)


def told(folder: Path, files: list[str], data: str | None) -> dict[str, Any]:
    plan = folder / "plan.json"
    write_json(plan, {"files": files, "data": [data] if data else [], "node_local": str(folder)})
    ended = threading.Event()

    def answer() -> None:
        while not ended.wait(0.01):
            answer_hellos(folder)

    login_node = threading.Thread(target=answer)
    login_node.start()
    try:
        assert probe.main([str(plan), "train"]) == 0
    finally:
        ended.set()
        login_node.join()
    return read_json(folder / "train-0.json")


@pytest.fixture
def examine(grid, one_rank):
    """Return a function that checks four such ranks on n1 and n2, changed by a test, and those of
    `reduce`."""

    def lines(
        change: Callable[[Ranks], None] = lambda ranks: None,
        on: Grid = grid,
        mpi: Callable[[Ranks], None] = lambda ranks: None,
        **report: Any,
    ) -> list[str]:
        ranks, reduced = [], []
        for rank in range(4):
            place = {
                "rank": rank,
                "world_size": 4,
                "local_rank": rank % 2,
                "node": f"n{1 + rank // 2}",
            }
            facts = {**copy.deepcopy(one_rank), **place}
            facts["device"]["name"] = "Tesla V100"
            facts["met"]["sum"] = 10.0
            ranks.append(facts)
            reduced.append({**place, "errors": {}, "world": 4})
        change(ranks)
        mpi(reduced)
        train = Report(ProbeJob("train", CALL, RESOURCES), "7", tuple(ranks), "error: srun: n2: 1")
        reduce = Report(ProbeJob("reduce", CALL, RESOURCES), "8", tuple(reduced))
        reports = {"train": replace(train, **report), "reduce": reduce}
        return [str(result) for result in run_checks(checks_of(on, reports))]

    return lines


def only_failure(lines: list[str]) -> str:
    (line,) = [line.removeprefix("FAIL  ") for line in lines if line.startswith("FAIL")]
    return line


def test_healthy_nodes_pass_every_check(examine):
    lines = examine()
    assert not [line for line in lines if not line.startswith("pass  ")]
    assert "pass  a job on the nodes (4 ranks on n1, n2)" in lines
    assert f"torch {torch.__version__.partition('+')[0]}" in "".join(lines)


BREAKS = {
    late(45): "clocks: the clock of n2 is 4",
    late(-45): "clocks: the clock of n2 is 4",
    version: "software: numpy is 1.26.0 on n2, but ",
    source: "software: own source is 0123456789ab on n2, but ",
    no_interface: "network interface: n2 has no 'lo', only eth0, ib0; set network_interface in",
    unseen_file: "shards and weights from the nodes: n2 cannot read ",
    old_file: "shards and weights from the nodes: n2 has ",
    full_node: "disk of the nodes: n2 has 1.0 kB free in /tmp, not the ",
    no_gpu: "GPUs as torch sees them: torch sees no GPU on rank 3 on n2; install a build of torch",
    no_peer: "network between the ranks: rank 2 on n2: RuntimeError: Unable to find address for: "
    "ib0; the ranks cannot communicate over lo: set network_interface in the profile to one",
    wrong_sum: "network between the ranks: rank 1 on n1 has a sum of 1 instead of 10; the ranks",
    slow_disk: "time to save: a job saves 0.2 GB in about 162880.0 s, at 0 MB a second, which is",
    damage: "content of the shards: val-00000.h5 is damaged (and 1 more)",
    lost_rank: "a job on the nodes: rank 2 of 4 reported nothing (error: srun: n2: 1); see that",
    alone: "a job on the nodes: ranks see a world size of 1, not 4: the variables of srun did",
    one_node: "a job on the nodes: ranks are on n1, not on 2 nodes; look at extra in the profile",
}


@pytest.mark.parametrize("change", BREAKS, ids=lambda change: change.__qualname__)
def test_a_fault_of_the_nodes_fails_its_check_alone(examine, change):
    assert only_failure(examine(change)).startswith(BREAKS[change])


def test_a_requeued_job_is_answered_anew(tmp_path):
    for kind in ("hello", "answer"):
        (tmp_path / f"train-0.{kind}").write_text("1000000000.0")
    clock = told(tmp_path, [], None)["clock"]
    assert clock["sent"] <= clock["login_time"] <= clock["received"] < clock["sent"] + 30


def test_the_direction_of_a_wrong_clock_is_reported(examine):
    assert " s ahead of this node's: at 30 s or more, running jobs look dead; " in only_failure(
        examine(late(45))
    )
    assert " s behind this node's: at 30 s or more, running jobs" in only_failure(
        examine(late(-45))
    )


@pytest.mark.parametrize("seconds", [5, -5])
def test_a_clock_that_is_a_little_wrong_is_a_warning(examine, seconds):
    lines = examine(late(seconds))
    (line,) = [line for line in lines if not line.startswith("pass")]
    assert line.startswith("warn  clocks: the clock of n2 is ")


def test_a_folder_that_the_login_node_does_not_share(examine):
    lines = examine(unanswered)
    failed = [line for line in lines if line.startswith("FAIL")]
    assert failed[0].startswith(
        "FAIL  run directory from the nodes: rank 2 on n2: the folder did not show train-2.answer "
        "within 60 s; the run directory must be on a file system that all nodes share"
    )


def test_mpi_worlds_of_one(examine):
    def apart(ranks: Ranks) -> None:
        for rank in ranks:
            rank["world"] = 1

    line = only_failure(examine(mpi=apart))
    assert line.startswith(
        "MPI of reduce: MPI sees 1 ranks on rank 0 on n1, but 4 started; set mpi"
    )


def test_an_mpi_that_does_not_start(examine):
    def refused(ranks: Ranks) -> None:
        for rank in ranks:
            del rank["world"]
        ranks[1]["errors"]["world"] = "the launcher announced 4 ranks, but MPI sees 1"

    line = only_failure(examine(mpi=refused))
    assert line.startswith(
        "MPI of reduce: rank 1 on n1: the launcher announced 4 ranks, but MPI se"
    )


def test_a_job_that_wrote_no_file_does_not_see_the_run_directory(examine):
    lines = examine(list.clear, has_log=False)
    assert only_failure(lines).startswith(
        "a job on the nodes: the nodes do not see the run directory: job 7 could leave neither log "
        "nor facts there; set run_dir to a folder on a file system that the nodes share"
    )
    assert "skip  clocks: no rank reported" in lines


def test_a_job_whose_python_does_not_start(examine):
    line = only_failure(examine(list.clear, ended="error: bash: no-python: command not found"))
    assert "ended before it reported anything (error: bash: no-python: command not found" in line


def test_set_up_lines_that_fail_on_the_nodes(examine):
    said = "line 9: module: command not found"
    line = only_failure(examine(set_up=("Loading mpi", f"/spool/n1/slurm_script: {said}")))
    assert line == f"set-up lines on the nodes: a line prints '{said}'; fix setup in the profile"


def test_software_that_differs_from_the_login_nodes(examine, grid, tmp_path):
    def everywhere(ranks: Ranks) -> None:
        for rank in ranks:
            rank["versions"]["torch"] = "2.7.1"

    line = only_failure(examine(everywhere))
    assert line.startswith("software: torch is 2.7.1 on n1, but ")
    image = {"python": "apptainer exec image.sif python"}
    other = replace(grid, profile={**grid.cluster.model_dump(exclude_unset=True), **image})
    (line,) = [line for line in examine(everywhere, on=other) if not line.startswith("pass")]
    assert line.startswith("warn  software: torch is 2.7.1 on n1, but ")


def test_a_torch_without_kernels_for_the_gpu(examine, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (7, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _device: "Tesla V100")
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_80", "sm_90"])
    env = RankEnv("slurm", 1, 4, 1, "n1", "7", "7-0")
    assert not Facts(tmp_path, "train", env).note("device", lambda: probe._device(env))

    def change(ranks: Ranks) -> None:
        ranks[1] = {**ranks[1], "errors": read_json(tmp_path / "train-1.json")["errors"]}
        del ranks[1]["device"]

    line = only_failure(examine(change))
    assert line.startswith("GPUs as torch sees them: rank 1 on n1: torch ")
    assert "has no kernels for Tesla V100 (sm_70), only sm_80, sm_90; install a build that" in line


def test_ranks_that_share_a_gpu_are_no_fault_of_the_network(tmp_path, monkeypatch):
    def refuse(*_: object) -> None:
        raise DeviceError("ranks 0, 1 on n1 share one GPU")

    monkeypatch.setattr(process_group, "agreed_device", refuse)
    facts = Facts(tmp_path, "train", ALONE)
    assert not probe._meet(ALONE, tmp_path, facts)
    assert read_json(tmp_path / "train-0.json")["errors"] == {
        "device": "ranks 0, 1 on n1 share one GPU"
    }


def test_a_rank_notes_its_error_before_it_leaves_the_group(tmp_path, monkeypatch):
    """Of several ranks, the one that fails alone ends its process there."""

    @contextmanager
    def left_in_haste(*_: object) -> Iterator[None]:
        try:
            yield
        except RuntimeError:
            raise SystemExit(1) from None

    def no_route(_: object) -> None:
        raise RuntimeError("no route to host")

    monkeypatch.setattr(process_group, "process_group", left_in_haste)
    monkeypatch.setattr(probe, "_sum", no_route)
    with pytest.raises(SystemExit):
        probe._meet(ALONE, tmp_path, Facts(tmp_path, "train", ALONE))
    assert read_json(tmp_path / "train-0.json")["errors"] == {
        "met": "RuntimeError: no route to host"
    }


def test_a_torch_that_does_not_load_is_reported_without_gpus_too(examine, grid):
    def change(ranks: Ranks) -> None:
        for rank in ranks:
            del rank["device"], rank["met"]
            rank["errors"]["device"] = "ImportError: libgomp.so.1: cannot open shared object file"

    profile = grid.cluster.model_dump(exclude_unset=True)
    lines = examine(change, on=replace(grid, profile={**profile, "gpus_per_node": 0}))
    failed = [line for line in lines if line.startswith("FAIL")]
    assert failed[0].startswith("FAIL  GPUs as torch sees them: rank 0 on n1: ImportError: libgomp")
    assert failed[1].startswith("FAIL  network between the ranks: rank 0 on n1 ended before it rep")


def test_ranks_read_every_byte_of_the_shards(examine, grid, streets, tmp_path):
    damaged = shutil.copytree(streets, tmp_path / "streets")
    [path] = damaged.glob("train-*.h5")
    flip(path)
    facts = told(tmp_path, [], str(damaged))

    def change(ranks: Ranks) -> None:
        ranks[0]["damaged"] = facts["damaged"]

    line = only_failure(examine(change))
    assert line.startswith(f"content of the shards: {path}")


def test_a_node_local_folder_that_is_none(tmp_path):
    with pytest.raises(UserError, match=r"'\$NO_SUCH_THING' names no folder on "):
        free_bytes("$NO_SUCH_THING")
    with pytest.raises(UserError, match=r"/proc cannot be written to: "):
        free_bytes("/proc/nothing")
    assert free_bytes(f"{tmp_path}/not/made/yet") > 0
    assert not list(tmp_path.iterdir())
