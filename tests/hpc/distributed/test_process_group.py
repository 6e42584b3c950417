"""Ranks find each other and agree under every launcher, and do not wait for a dead rank."""

from __future__ import annotations

import datetime
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from hpc import cli
from hpc.cli import USER_ERROR_EXIT_CODE, UserError
from hpc.distributed import process_group as groups
from hpc.distributed.launcher import RankEnv, read_env
from hpc.distributed.process_group import Group, process_group
from hpc.scheduler.exit_cause import exit_cause

REPOSITORY = Path(__file__).parents[3]
BIN = Path(sys.executable).parent
# ranks are forked from a process that has only imported torch
RANKS = multiprocessing.get_context("forkserver")
RANKS.set_forkserver_preload(["hpc.distributed.process_group"])


def rank_env(rank: int, world_size: int, start_id: str = "start") -> RankEnv:
    return RankEnv("slurm", rank, world_size, rank, "node", "1", start_id)


def work_together(group: Group) -> dict[str, object]:
    """Return the values on which all ranks must agree."""
    mine = torch.tensor([1.5, 10.0 ** (3 * group.rank)], dtype=torch.float64, requires_grad=True)
    total = group.sum(mine)
    pixels = group.sum(torch.tensor(2**53 + group.rank))
    word = group.broadcast({"generation": 7} if group.is_main else None)
    wish = group.max(group.rank % 2)
    assert mine.tolist() == [1.5, 10.0 ** (3 * group.rank)]  # left as it was
    return {
        "sum": total.tolist(),
        "sum has a gradient": total.requires_grad,
        "integers": int(pixels),
        "broadcast": word,
        "max": wish,
        "members": torch.distributed.get_world_size(group.process_group),
    }


def expected(world_size: int) -> dict[str, object]:
    return {
        "sum": [1.5 * world_size, sum(10.0 ** (3 * rank) for rank in range(world_size))],
        "sum has a gradient": False,
        "integers": world_size * 2**53 + sum(range(world_size)),
        "broadcast": {"generation": 7},
        "max": min(1, world_size - 1),
        "members": world_size,
    }


def a_rank(env: RankEnv, rendezvous: Path, results: Path) -> None:
    with process_group(env, rendezvous) as group:
        assert group.broadcast(env.start_id) == env.start_id
        (results / f"{env.start_id}-{env.rank}.json").write_text(json.dumps(work_together(group)))


def start(env: RankEnv, folder: Path, target=a_rank) -> multiprocessing.Process:
    process = RANKS.Process(target=target, args=(env, folder / "rendezvous", folder))
    process.start()
    return process


def answers(folder: Path) -> list[dict[str, object]]:
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]


def codes(processes: list[multiprocessing.Process], seconds: float = 60) -> list[int | None]:
    for process in processes:
        process.join(seconds)
    left = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    return left


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_find_each_other_through_a_file_and_agree(tmp_path, world_size):
    late_main = [*range(1, world_size), 0]
    ranks = [start(rank_env(rank, world_size), tmp_path) for rank in late_main]
    assert codes(ranks) == [0] * world_size
    assert answers(tmp_path) == [expected(world_size)] * world_size


def test_two_jobs_of_one_run_on_one_node_do_not_meet(tmp_path):
    jobs = [rank_env(rank, 2, job) for job in ("job1", "job2") for rank in (0, 1)]
    assert codes([start(env, tmp_path) for env in jobs]) == [0] * 4
    assert answers(tmp_path) == [expected(2)] * 4
    assert not list((tmp_path / "rendezvous").iterdir())  # no address is left


def test_one_rank_has_a_process_group_too(tmp_path):
    with process_group(read_env({}), tmp_path / "rendezvous") as group:
        assert work_together(group) == expected(1)
    assert not (tmp_path / "rendezvous").exists()  # one rank needs no rendezvous
    assert not torch.distributed.is_initialized()


def test_a_group_ends_with_its_job_even_after_an_error(tmp_path):
    with pytest.raises(UserError), process_group(read_env({}), tmp_path):
        raise UserError("data/x is damaged")
    assert not torch.distributed.is_initialized()


def test_an_error_is_reported_though_the_group_cannot_be_ended_after_it(tmp_path, monkeypatch):
    """After an illegal access, say, each later call of CUDA fails; so does the group's end."""
    end = torch.distributed.destroy_process_group

    def fail() -> None:
        end()
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.distributed, "destroy_process_group", fail)
    with pytest.raises(UserError, match="data/x"), process_group(read_env({}), tmp_path):
        raise UserError("data/x is damaged")
    with pytest.raises(RuntimeError, match="illegal"), process_group(read_env({}), tmp_path):
        pass


LAUNCHED = """
import json, sys
from pathlib import Path
from hpc.distributed.launcher import read_env
from hpc.distributed.process_group import process_group
from tests.hpc.distributed.test_process_group import work_together
env = read_env()
with process_group(env, Path(sys.argv[1]) / "rendezvous") as group:
    answer = json.dumps(work_together(group))
    (Path(sys.argv[1]) / f"{env.launcher}-{env.rank}.json").write_text(answer)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "command"),
    [
        ("torchrun", [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]),
        ("mpi", [str(BIN / "mpiexec"), "-n", "2", sys.executable]),
    ],
)
def test_launchers_start_ranks_that_agree(tmp_path, launcher, command):
    if launcher == "mpi" and not (BIN / "mpiexec").exists():
        pytest.skip("no mpiexec beside this Python")
    program = tmp_path / "program.py"
    program.write_text(LAUNCHED)
    environ = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, str(program), str(tmp_path)],
        env=environ, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert [path.name for path in sorted(tmp_path.glob("*.json"))] == [
        f"{launcher}-0.json",
        f"{launcher}-1.json",
    ]
    assert answers(tmp_path) == [expected(2)] * 2


def wait_for_a_dead_rank_0(env: RankEnv, rendezvous: Path, results: Path) -> None:
    groups.TIMEOUT = datetime.timedelta(seconds=1)
    began = time.monotonic()
    try:
        a_rank(env, rendezvous, results)
    except (UserError, RuntimeError) as error:
        seconds = time.monotonic() - began
        (results / "told.json").write_text(json.dumps([type(error).__name__, str(error), seconds]))


def test_ranks_do_not_wait_forever_for_a_rank_0_that_never_came(tmp_path):
    assert codes([start(rank_env(1, 2), tmp_path, wait_for_a_dead_rank_0)]) == [0]
    kind, message, seconds = json.loads((tmp_path / "told.json").read_text())
    assert kind == "UserError"
    address = tmp_path / "rendezvous/start.addr"
    assert message == f"rank 0 did not write its address to {address} within 0:00:01; see its log"
    assert seconds < 10


def test_ranks_do_not_wait_forever_for_a_rank_0_that_died(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]  # nobody listens there
        (tmp_path / "rendezvous").mkdir()
        (tmp_path / "rendezvous/start.addr").write_text(f"127.0.0.1 {port}")
        assert codes([start(rank_env(1, 2), tmp_path, wait_for_a_dead_rank_0)]) == [0]
    kind, message, seconds = json.loads((tmp_path / "told.json").read_text())
    assert kind == "DistNetworkError" and str(port) in message
    assert seconds < 30


def die_or_be_told(env: RankEnv, rendezvous: Path, results: Path) -> None:
    with process_group(env, rendezvous) as group:
        torch.distributed.barrier()
        if group.is_main:
            os.kill(os.getpid(), signal.SIGKILL)
        began = time.monotonic()
        try:
            group.max(1)
        except RuntimeError as error:
            told = json.dumps([str(error), time.monotonic() - began])
            (results / f"told-{group.rank}.json").write_text(told)
            raise


def test_when_rank_0_dies_the_others_end_at_their_next_agreement(tmp_path):
    ranks = [start(rank_env(rank, 3), tmp_path, die_or_be_told) for rank in range(3)]
    assert codes(ranks) == [-signal.SIGKILL, 1, 1]
    for rank in (1, 2):
        message, seconds = json.loads((tmp_path / f"told-{rank}.json").read_text())
        assert "onnection" in message  # closed or reset by peer
        assert seconds < 30  # and not only after the time limit of a collective


def in_the_log(env: RankEnv, folder: Path) -> Path:
    """Let the standard error of this process, and of nothing else, go to a file."""
    log = folder / f"{env.rank}.err"
    sys.stderr = log.open("w")
    return log


def wait_for_ever(*_: object) -> None:
    threading.Event().wait()


def fail_alone(env: RankEnv, rendezvous: Path, results: Path) -> None:
    """Rank 1 has no memory left, while the others wait for it.

    Ending the group waits for ever, as NCCL's does for kernels of ranks that will not come. So does
    the end of the interpreter.
    """
    in_the_log(env, results)
    torch.distributed.destroy_process_group = wait_for_ever
    threading.Thread(target=wait_for_ever).start()
    with process_group(env, rendezvous) as group:
        try:
            if group.rank == 1:
                raise FAILURES[(results / "failure").read_text()]
            group.max(1)
        finally:
            (results / f"{env.rank}.cleaned up").touch()


FAILURES = {
    "out of memory": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    "error": UserError("the shard is damaged"),
}


@pytest.mark.parametrize(
    ("cause", "line", "code"),
    [
        ("out of memory", "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate", 1),
        ("error", "error: the shard is damaged", USER_ERROR_EXIT_CODE),
    ],
)
def test_a_rank_that_fails_alone_says_why_and_keeps_no_other_waiting(tmp_path, cause, line, code):
    (tmp_path / "failure").write_text(cause)
    ranks = [start(rank_env(rank, 3), tmp_path, fail_alone) for rank in range(3)]
    assert codes(ranks) == [1, code, 1]
    assert time.time() - (tmp_path / "1.cleaned up").stat().st_mtime < 10
    found = exit_cause("failed", sorted(tmp_path.glob("*.err")))
    assert found.cause == cause and found.line.startswith(line)
    assert len(list(tmp_path.glob("*.cleaned up"))) == 3
    said = (tmp_path / "1.err").read_text()
    if code == 1:
        assert said.startswith("rank 1 of 3 on node failed:\nTraceback (most recent call last):\n")
    else:
        assert said == f"{line}\n"


def fail_together(env: RankEnv, rendezvous: Path, results: Path) -> None:
    """Rank 1 has an error when all ranks ask, or rank 0 when it works for all."""
    for number, error in enumerate((UserError("rank 1's"), UserError("rank 0's"))):
        try:
            with process_group(replace(env, start_id=f"start {number}"), rendezvous) as group:
                assert group.on_main(lambda: [group.rank]) == [0]
                group.raise_together(None)
                if number == 0:
                    group.raise_together(error if group.rank == 1 else None)
                else:
                    group.on_main(partial(raise_, error))
        except UserError as raised:
            assert not torch.distributed.is_initialized()
            (results / f"{env.rank}-{number}.json").write_text(json.dumps(str(raised)))


def raise_(error: Exception) -> None:
    raise error


def test_an_error_that_all_ranks_raise_together_ends_the_group_in_order(tmp_path):
    ranks = [start(rank_env(rank, 2), tmp_path, fail_together) for rank in range(2)]
    assert codes(ranks) == [0, 0]
    assert answers(tmp_path) == ["rank 1's", "rank 0's"] * 2


def test_the_time_limit_of_a_collective_is_minutes():
    assert datetime.timedelta(minutes=2) <= groups.TIMEOUT <= datetime.timedelta(minutes=30)


@pytest.mark.parametrize(
    ("resolved", "address"),
    [("10.1.2.3", "10.1.2.3"), ("127.0.1.1", "n7"), (OSError, "n7")],
)
def test_rank_0_leaves_an_address_that_other_nodes_can_reach(monkeypatch, resolved, address):
    def resolve(name):
        if resolved is OSError:
            raise socket.gaierror("unknown")
        return resolved

    monkeypatch.setattr(socket, "gethostname", lambda: "n7")
    monkeypatch.setattr(socket, "gethostbyname", resolve)
    assert groups._own_address(rank_env(0, 2)) == address


FAR = """
import fcntl, multiprocessing, socket, struct, subprocess, sys
from dataclasses import replace
from pathlib import Path
from tests.hpc.distributed.test_process_group import a_rank, codes, rank_env
folder = Path(sys.argv[1])
socket.sethostname("far")
(folder / "hosts").write_text("127.0.0.1 localhost\\n10.255.255.1 far\\n")
subprocess.run(["mount", "--bind", str(folder / "hosts"), "/etc/hosts"], check=True)
with socket.socket() as any_socket:  # the flags of `lo`: up and running, SIOCSIFFLAGS
    fcntl.ioctl(any_socket, 0x8914, struct.pack("16sH14x", b"lo", 0x41))
assert socket.gethostbyname(socket.gethostname()) == "10.255.255.1"
ranks = []
for number in (0, 1):
    arguments = (replace(rank_env(number, 2), on_one_node=True), folder / "rendezvous", folder)
    ranks.append(multiprocessing.get_context("fork").Process(target=a_rank, args=arguments))
    ranks[-1].start()
sys.exit(int(codes(ranks) != [0, 0]))
"""


def test_ranks_of_one_node_meet_without_a_network(tmp_path):
    """Run in a network namespace that has only loopback."""
    own = ["unshare", "-rmnu"]
    if subprocess.run([*own, "mount", "-t", "tmpfs", "tmpfs", "/mnt"]).returncode:
        pytest.skip("this user may not have a network of their own")
    line = [*own, sys.executable, "-c", FAR, str(tmp_path)]
    done = subprocess.run(line, cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert answers(tmp_path) == [expected(2)] * 2


@pytest.mark.parametrize("missing", ["address", "store", "ranks"])
def test_a_waiting_rank_reports_its_wait(tmp_path, monkeypatch, capsys, missing):
    monkeypatch.setattr(groups, "TIMEOUT", datetime.timedelta(seconds=1))
    monkeypatch.setattr(cli, "SLOW_SECONDS", 0.1)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]  # nobody listens there
        if missing == "store":
            (tmp_path / "start.addr").write_text(f"127.0.0.1 {port}")
        env = rank_env(int(missing != "ranks"), 2)
        with pytest.raises((UserError, RuntimeError)), process_group(env, tmp_path):
            pass
    (said,) = [line for line in capsys.readouterr().err.splitlines() if "waiting for" in line]
    what = {
        "address": f"rank 0 to leave its address in {tmp_path / 'start.addr'}",
        "store": f"the store of rank 0 at 127.0.0.1, port {port}",
        "ranks": "all 2 ranks of this job to meet",
    }
    assert said == f"waiting for {what[missing]}, 0 s so far"
