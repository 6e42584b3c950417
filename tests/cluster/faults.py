"""Strike a running bundle on a cluster, one function per kind of fault: each is a block that is
entered when the fault has had its effect, and heals at its end what does not heal by itself."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

from hpc.storage import checkpoint
from jobs.spec.run_paths import RunPaths
from tests.cluster.slow_training import steps_begun
from tests.cluster.slurm_cluster import Cluster, Process, until
from tests.tiny_disk import Disk

_DISK = "256m"  # of a bundle's checkpoints: five of them, and quickly filled
_STANDS_STILL = 4.0  # seconds without a step, many times what a step takes


@dataclass(frozen=True)
class Victim:
    """A running job, and the one bundle of a run that it trains."""

    cluster: Cluster
    job: str
    run: RunPaths
    bundle: str

    @property
    def starts(self) -> list[list[int]]:
        """The steps that each start of the bundle has begun, oldest start first."""
        return steps_begun(self.run.root, self.bundle)

    @property
    def steps_saved(self) -> list[int]:
        """The steps of its checkpoints, oldest first."""
        found, _ = checkpoint.find(self.run.checkpoints(self.bundle))
        return sorted(saved.step for saved in found)

    @property
    def nodes(self) -> list[str]:
        """The nodes of its job, that of rank 0 first."""
        return self.cluster.nodes_of(self.job)

    def node_of(self, rank: int) -> str:
        """The node that a rank runs on."""
        ranks = {node: self.ranks_on(node) for node in self.nodes}
        return next(node for node, here in ranks.items() if rank in [p.rank for p in here])

    def signal(self, rank: int, number: signal.Signals) -> None:
        """Send a signal to one rank."""
        self.cluster.ranks(self.job)[rank].send(number)

    def wait_until_gone(self) -> None:
        """Until its job is not in the queue any more."""
        self.cluster.wait_until_gone(self.job)

    @contextmanager
    def requeued(self) -> Iterator[None]:
        """Expect that the block makes Slurm requeue the job; wait until it has."""
        before = self.cluster.job(self.job)["Restarts"]
        yield
        until(lambda: self.cluster.job(self.job)["Restarts"] != before, self.what_is_known)

    def wait_for_start_beyond(self, number: int) -> None:
        """Until more than `number` starts have begun a step."""
        until(lambda: len(self.starts) > number, self.what_is_known)

    def is_training(self, seconds: float) -> bool:
        """Return whether it begins a step within so many seconds."""
        before, deadline = self.starts, time.monotonic() + seconds
        while self.starts == before:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.05)
        return True

    def ranks_on(self, node: str) -> list[Process]:
        """Its ranks on a node."""
        return [p for p in self.cluster.processes(self.job, node) if p.rank is not None]

    def what_is_known(self) -> str:
        """Return the state in Slurm and the logs of its job."""
        logs = self.run.logs.glob(f"{self.job}_*_log.err")
        return f"{self.cluster.job(self.job)} " + "".join(log.read_text() for log in sorted(logs))


@contextmanager
def rank_killed(victim: Victim, rank: int) -> Iterator[None]:
    """SIGKILL to one rank; Slurm ends the others, and the job with them."""
    victim.signal(rank, signal.SIGKILL)
    victim.wait_until_gone()
    yield


@contextmanager
def newest_checkpoint_cut_short(victim: Victim, rank: int) -> Iterator[None]:
    """As `rank_killed`; and then the newest checkpoint has lost the second half of an entry."""
    with rank_killed(victim, rank):
        newest = checkpoint.find(victim.run.checkpoints(victim.bundle))[0][0]
        entry = min(newest.path.glob("*.pt"))
        os.truncate(entry, entry.stat().st_size // 2)
        yield


@contextmanager
def node_failed(victim: Victim, rank: int) -> Iterator[None]:
    """The node of a rank loses its power, and stays away until the job trains on others."""
    node, before = victim.node_of(rank), len(victim.starts)
    victim.cluster.fail(node)
    try:
        victim.wait_for_start_beyond(before)
        yield
    finally:
        victim.cluster.revive(node)


@contextmanager
def node_isolated(victim: Victim, rank: int) -> Iterator[list[Process]]:
    """The network of a rank's node is cut, until the job trains on other nodes while the ranks
    there, which are yielded, still run. Then the network is back; returns when they are gone."""
    node, before = victim.node_of(rank), len(victim.starts)
    stale = victim.ranks_on(node)
    victim.cluster.isolate(node)
    try:
        victim.wait_for_start_beyond(before)
        assert all(p.is_alive for p in stale), (
            "the ranks that were cut off did not outlive the requeue"
        )
        yield stale
    finally:
        victim.cluster.revive(node)
    until(lambda: not any(p.is_alive for p in stale), f"all of {stale} ended")


@contextmanager
def link_cut_for_a_while(victim: Victim, rank: int) -> Iterator[None]:
    """The link between a rank's node and another of the job is cut; in the block the job stands
    still. After it the link is back, and the job has begun a further step by itself."""
    node = victim.node_of(rank)
    other = next(name for name in victim.nodes if name != node)
    victim.cluster.cut(node, other)
    try:
        until(lambda: not victim.is_training(_STANDS_STILL), "the job stands still")
        before = victim.starts
        yield
    finally:
        victim.cluster.join(node, other)
    until(lambda: victim.starts != before, victim.what_is_known)


@contextmanager
def link_cut(victim: Victim, rank: int) -> Iterator[None]:
    """Cut the link of a rank until the job stands still, then cancel the job."""
    node = victim.node_of(rank)
    other = next(name for name in victim.nodes if name != node)
    victim.cluster.cut(node, other)
    try:
        until(lambda: not victim.is_training(_STANDS_STILL), "the job stands still")
        victim.cluster.answer("scancel", victim.job)
        victim.wait_until_gone()
        yield
    finally:
        victim.cluster.join(node, other)


def give_disk(run: RunPaths, bundle: str, cluster: Cluster) -> None:
    """A small disk for a bundle's checkpoints, which all nodes see. To be made before its job; it
    is gone with the cluster."""
    run.root.mkdir(exist_ok=True, mode=0o700)
    folder = run.checkpoints(bundle)
    folder.mkdir(parents=True)
    cluster.answer("mount", "-t", "tmpfs", "-o", f"size={_DISK}", "tmpfs", folder)


@contextmanager
def disk_full(victim: Victim, _rank: int) -> Iterator[None]:
    """The disk that `give_disk` made is full until the job has ended."""
    folder = victim.run.checkpoints(victim.bundle)
    assert folder.is_mount(), f"{folder} is no disk of its own"
    assert shutil.disk_usage(folder).free > shutil.disk_usage(folder).total // 5, "it has no room"
    disk = Disk(folder, "full")
    disk.close()
    try:
        # closed again and again, since a checkpoint that is pruned meanwhile makes room for one
        until(lambda: disk.close() or not victim.cluster.left([victim.job]), victim.what_is_known)
        yield
    finally:
        disk.open()


@contextmanager
def controller_away(victim: Victim, rank: int) -> Iterator[None]:
    """Slurm's controller stops, and a rank is told to stop: the job saves, and there is nobody to
    requeue it. The controller is back when the job's ranks have ended."""
    ranks = victim.cluster.ranks(victim.job)
    victim.cluster.do("controller", "stop")
    try:
        ranks[rank].send(signal.SIGUSR2)
        until(lambda: not any(p.is_alive for p in ranks), f"all of {ranks} ended")
    finally:
        victim.cluster.do("controller", "start")
    victim.wait_until_gone()
    yield


@contextmanager
def preempted(victim: Victim, _rank: int) -> Iterator[None]:
    """A job in the preempting partition takes its nodes."""
    with victim.requeued():
        urgent = victim.cluster.urgent(victim.nodes)
        victim.cluster.wait_for_state(urgent, "COMPLETED")
    yield


@contextmanager
def cancelled(victim: Victim, _rank: int) -> Iterator[None]:
    """Its user cancels it."""
    victim.cluster.answer("scancel", victim.job)
    victim.wait_until_gone()
    yield


@contextmanager
def told_of_its_time_limit(victim: Victim, rank: int) -> Iterator[None]:
    """USR2 to one rank."""
    with victim.requeued():
        victim.signal(rank, signal.SIGUSR2)
    yield


@contextmanager
def told_to_end(victim: Victim, rank: int) -> Iterator[None]:
    """TERM to one rank."""
    with victim.requeued():
        victim.signal(rank, signal.SIGTERM)
    yield


Fault = Callable[[Victim, int], AbstractContextManager[object]]

KINDS: dict[str, Fault] = {
    "rank killed": rank_killed,
    "node failed": node_failed,
    "node isolated": node_isolated,
    "link between nodes cut": link_cut,
    "disk full while checkpointing": disk_full,
    "killed, newest checkpoint cut short": newest_checkpoint_cut_short,
    "stopped while the controller is away": controller_away,
    "preempted": preempted,
    "cancelled": cancelled,
    "USR2 to a rank": told_of_its_time_limit,
    "TERM to a rank": told_to_end,
}
