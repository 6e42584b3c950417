"""Runs a function on the ranks of a gloo process group, each a process of its own."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from hpc.distributed.launcher import RankEnv
from hpc.distributed.process_group import Group

# one process imports torch and the modules under test, and every rank is a fork of it
_PROCESSES = multiprocessing.get_context("forkserver")
_PROCESSES.set_forkserver_preload(["jobs.pretrain", "jobs.train", __name__])
_PATIENCE = 400.0  # seconds


def on_ranks(
    world_size: int, folder: Path, function: Callable[..., Any], *arguments: Any
) -> list[Any]:
    """Return the result of `function(group, *arguments)` on each rank; `folder` must be empty."""
    ranks = [
        _PROCESSES.Process(target=_rank, args=(rank, world_size, folder, function, arguments))
        for rank in range(world_size)
    ]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(_PATIENCE)
    if any(rank.is_alive() for rank in ranks):
        for rank in ranks:
            rank.kill()
    assert [rank.exitcode for rank in ranks] == [0] * world_size
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(world_size)]


def _rank(
    rank: int, world_size: int, folder: Path, function: Callable[..., Any], arguments: tuple
) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), world_size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    env = RankEnv("single", rank, world_size, rank, node="here", job_id="", start_id="")
    torch.save(function(Group(env, torch.device("cpu")), *arguments), folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
