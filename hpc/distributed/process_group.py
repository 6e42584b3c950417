"""Start torch's process group for a job, and offer the few collectives that jobs use.

One rank takes the same path, with a process group of size 1.
"""

from __future__ import annotations

import datetime
import os
import socket
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from hpc.cli import UserError, leave, named_wait
from hpc.distributed.device import agreed_device
from hpc.distributed.launcher import RankEnv
from hpc.distributed.timer import Stopwatch
from hpc.storage.atomic import remove_file, write_text

TIMEOUT = datetime.timedelta(minutes=10)  # a rank waits no longer for one that died
COMMUNICATION = "communication"
_POLL_SECONDS = 0.1
_LOOPBACK, _LOOPBACK_INTERFACE = "127.0.0.1", "lo"

T = TypeVar("T")


class Group:
    """All ranks of one job.

    Attributes:
        watch: this rank's stopwatch, which counts collectives as a part.
        common_error: the error that `raise_together` has raised on all ranks.
    """

    def __init__(self, env: RankEnv, device: torch.device) -> None:
        self.env = env
        self.rank = env.rank
        self.world_size = env.world_size
        self.device = device
        self.watch = Stopwatch(device)
        self.common_error: Exception | None = None

    @property
    def is_main(self) -> bool:
        """Return whether this is rank 0, which writes files and log lines."""
        return self.rank == 0

    @property
    def process_group(self) -> dist.ProcessGroup:
        """Return torch's group, for modules that call collectives themselves."""
        assert dist.group.WORLD is not None
        return dist.group.WORLD

    def sum(self, value: Tensor) -> Tensor:
        """Return the sum of `value` over all ranks, on all ranks, detached from the graph."""
        total = value.detach().clone()
        if self.world_size > 1:
            with self.watch.part(COMMUNICATION):
                dist.all_reduce(total)
        return total

    def max(self, value: int) -> int:
        """Return the largest of all ranks' integers, on all ranks: the ranks' agreement."""
        if self.world_size == 1:
            return value
        agreed = torch.tensor(value, dtype=torch.int64)
        with self.watch.part(COMMUNICATION):
            dist.all_reduce(agreed, op=dist.ReduceOp.MAX)
        return int(agreed)

    def broadcast(self, value: Any, source: int = 0) -> Any:
        """Return the picklable `value` of rank `source`, on all ranks."""
        if self.world_size == 1:
            return value
        box = [value]
        with self.watch.part(COMMUNICATION):
            dist.broadcast_object_list(box, src=source)
        return box[0]

    def raise_together(self, error: Exception | None) -> None:
        """Raise the error of one rank on all ranks, or return if none has an error.

        All ranks must call this together. After any other error a rank leaves alone, see
        `process_group`.
        """
        rank = self.max(self.rank + 1 if error is not None else 0)
        if rank:
            self.common_error = self.broadcast(error, source=rank - 1)
            assert self.common_error is not None
            raise self.common_error

    def on_main(self, function: Callable[[], T]) -> T:
        """Call `function` on rank 0; return its result, or raise its `UserError`, on all ranks.

        All ranks must call this together. The result must be picklable.
        """
        result: Any = None
        error = None
        if self.is_main:
            try:
                result = function()
            except UserError as raised:
                error = raised
        self.raise_together(error)
        return cast(T, self.broadcast(result))


@contextmanager
def process_group(env: RankEnv, rendezvous: Path) -> Iterator[Group]:
    """Start torch's process group for this job, and end it with the block.

    Rank 0 listens on a free port, so that two jobs on one node cannot collide.

    A rank that fails alone reports its error and leaves the process at once. Ending the group, or
    the interpreter, would wait for collectives that the others never join. Their next collective
    of gloo fails. One of NCCL waits until the launcher ends its rank.

    Args:
        env: the place of this process in the job.
        rendezvous: a folder that all ranks see; rank 0 writes its address there.

    Raises:
        UserError: the ranks cannot use their devices, or rank 0 does not write its address.
    """
    _use_loopback(env)
    store = _store(env, rendezvous)
    with named_wait(f"all {env.world_size} ranks of this job to meet"):
        device = agreed_device(env, store)
        # gloo beside NCCL: integers that ranks agree on lie in main memory
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(
            backend, store=store, rank=env.rank, world_size=env.world_size, timeout=TIMEOUT
        )
    group = Group(env, device)
    try:
        if env.rank == 0:
            remove_file(_address_file(env, rendezvous))  # all ranks have read it
        yield group
    except BaseException as error:
        if env.world_size > 1 and error is not group.common_error:
            leave(error, f"rank {env.rank} of {env.world_size} on {env.node}")
        # free what the frames hold, such as DDP's hooks, before the group: freed after it, at the
        # end of the process, they sometimes wait forever
        traceback.clear_frames(error.__traceback__)
        with suppress(RuntimeError):  # after some errors of CUDA every later call fails
            dist.destroy_process_group()
        raise
    dist.destroy_process_group()


def _store(env: RankEnv, rendezvous: Path) -> dist.Store:
    if env.world_size == 1:
        return dist.HashStore()
    if env.master is not None:
        return _torchrun_store(env)
    if env.launcher == "mpi":
        return _mpi_store(env)
    address = _address_file(env, rendezvous)
    if env.rank == 0:
        store = _listen(env)
        write_text(address, f"{_own_address(env)} {store.port}")
        return store
    with named_wait(f"rank 0 to leave its address in {address}"):
        host, port = _wait_for(address).split()
    return _connect(env, host, int(port))


def _address_file(env: RankEnv, rendezvous: Path) -> Path:
    return rendezvous / f"{env.start_id}.addr"


def _torchrun_store(env: RankEnv) -> dist.Store:
    assert env.master is not None
    host, port = env.master
    if env.on_one_node:
        host = _LOOPBACK
    store = _connect(env, host, port, serves=env.rank == 0 and not env.agent_store)
    return dist.PrefixStore(f"lossgrid-{env.start_id}", store)


def _mpi_store(env: RankEnv) -> dist.Store:
    from hpc.distributed.mpi import world  # loads mpi4py

    communicator = world()
    store = _listen(env) if env.rank == 0 else None
    with named_wait("rank 0 to send its address by MPI"):
        place = (_own_address(env), store.port) if store is not None else ("", 0)
        host, port = communicator.bcast(place)
    return store if store is not None else _connect(env, host, port)


def _connect(env: RankEnv, host: str, port: int, serves: bool = False) -> dist.TCPStore:
    with named_wait(f"the store of rank 0 at {host}, port {port}"):
        return dist.TCPStore(host, port, env.world_size, is_master=serves, timeout=TIMEOUT)


def _listen(env: RankEnv) -> dist.TCPStore:
    # rank 0 connects by this name; the store listens on all interfaces
    return dist.TCPStore(
        "localhost", 0, env.world_size, is_master=True, wait_for_workers=False, timeout=TIMEOUT
    )


def _use_loopback(env: RankEnv) -> None:
    """Make gloo connect the ranks of one node over loopback.

    By default it takes the address that the host name resolves to, which may be unreachable.
    """
    if env.on_one_node and env.world_size > 1 and _LOOPBACK_INTERFACE in _interfaces():
        os.environ.setdefault("GLOO_SOCKET_IFNAME", _LOOPBACK_INTERFACE)


def _interfaces() -> list[str]:
    return [name for _, name in socket.if_nameindex()]


def _own_address(env: RankEnv) -> str:
    """Return the address at which the other ranks reach this one.

    This is loopback if all are on this node, else the address of the host name. If the name means
    loopback here, as on Debian, or nothing, return the name: other nodes may resolve it.
    """
    if env.on_one_node:
        return _LOOPBACK
    name = socket.gethostname()
    try:
        address = socket.gethostbyname(name)
    except OSError:
        return name
    return name if address.startswith("127.") else address


def _wait_for(address: Path) -> str:
    deadline = time.monotonic() + TIMEOUT.total_seconds()
    while time.monotonic() < deadline:
        try:
            return address.read_text(encoding="utf-8")
        except FileNotFoundError:
            time.sleep(_POLL_SECONDS)
            if address.parent.exists():
                list(address.parent.iterdir())  # makes NFS refresh its cache
    raise UserError(f"rank 0 did not write its address to {address} within {TIMEOUT}; see its log")
