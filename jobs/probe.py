"""A job that trains nothing: what `pipeline.doctor` starts to hear what the nodes are like.

    python -m jobs.probe PLAN.json train     ranks as training starts them
    python -m jobs.probe PLAN.json reduce    ranks as the reduction starts them, over MPI

Each rank leaves its facts beside the plan."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from data_prep.shards.manifest import Manifest
from hpc.cli import argument_parser, run
from hpc.diagnostics.node_facts import (
    Facts,
    bytes_per_second,
    meet_login_node,
    network_interfaces,
    room,
    sizes,
    versions,
)
from hpc.distributed.launcher import RankEnv, read_env
from hpc.storage.atomic import read_json

PACKAGES = ("torch", "torchvision", "numpy", "h5py", "mpi4py", "submitit", "isal")
SOURCES = tuple(
    Path(__file__).parents[1] / name for name in ("hpc", "data_prep", "jobs", "pipeline")
)
_NUMBERS = 1 << 20  # float32 that ranks add up


def main(argv: Sequence[str]) -> int:
    """Leave what this rank sees; a rank that cannot join the others ends them."""
    parser = argument_parser("python -m jobs.probe", __doc__)
    parser.add_argument("plan", type=Path, help="what to look at")
    parser.add_argument("launch", choices=("train", "reduce"))
    arguments = parser.parse_args(argv)
    env = read_env()
    facts = Facts(arguments.plan.parent, arguments.launch, env)
    if arguments.launch == "reduce":
        return 0 if facts.note("world", _mpi_world) else 1
    plan = read_json(arguments.plan)
    look_around(plan, arguments.plan.parent, env, facts)
    joined = facts.note("device", lambda: _device(env)) and facts.note(
        "met", lambda: _meet(env, arguments.plan.parent / "rendezvous")
    )
    return 0 if joined else 1


def look_around(plan: dict[str, Any], folder: Path, env: RankEnv, facts: Facts) -> None:
    """What a rank can tell alone. `plan` names `files`, data sets' folders (`data`) and
    `node_local`."""
    if env.local_rank == 0:  # one process speaks for a node
        facts.note("clock", lambda: meet_login_node(folder, "train", env.rank))
        facts.note("interfaces", network_interfaces)
        facts.note("versions", lambda: versions(PACKAGES, SOURCES))
        facts.note("files", lambda: sizes(plan["files"]))
        if plan["node_local"]:
            facts.note("room", lambda: room(plan["node_local"]))
    if env.rank == 0:
        facts.note("bytes_per_second", lambda: bytes_per_second(folder))
    facts.note("damaged", lambda: [line for data in plan["data"] for line in _damaged(data, env)])


def _damaged(data: str, env: RankEnv) -> list[str]:
    """What is damaged of a packed data set, in this rank's share of its shards."""
    from data_prep.verify import verify  # HDF5; after the light facts

    manifest = Manifest.load(data)
    shards = [shard for half in manifest.splits.values() for shard in half.shards]
    mine = shards[env.rank :: env.world_size]
    splits = {
        name: replace(half, shards=tuple(shard for shard in half.shards if shard in mine))
        for name, half in manifest.splits.items()
    }
    return verify(replace(manifest, splits=splits), processes=1) if mine else []


def _device(env: RankEnv) -> dict[str, Any]:
    """The GPU of this rank, or `cpu`, and how many it sees."""
    import torch

    from hpc.distributed.process_group import own_device

    device = own_device(env)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return {
        "name": name,
        "visible": torch.cuda.device_count(),
        "kernels": torch.cuda.get_arch_list(),
    }


def _meet(env: RankEnv, rendezvous: Path) -> dict[str, float]:
    """The sum of all ranks' numbers from 1 on, by the group that training uses, and its seconds."""
    import torch

    from hpc.distributed.process_group import process_group

    with process_group(env, rendezvous) as group:
        mine = torch.full((_NUMBERS,), env.rank + 1.0, device=group.device)
        group.sum(mine)  # connects them
        begin = time.perf_counter()
        total = float(group.sum(mine).mean())
        return {"sum": total, "seconds": time.perf_counter() - begin}


def _mpi_world() -> int:
    """How many ranks MPI sees, once they have all met."""
    from hpc.distributed.mpi import world

    ranks = world()
    together = ranks.gather(ranks.rank)
    return len(ranks.bcast(together) or ())


if __name__ == "__main__":
    run(main)
