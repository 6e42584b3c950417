"""The probe job of `pipeline.doctor`: collect facts about the nodes, without training.

    python -m jobs.probe PLAN.json train     start ranks as training does
    python -m jobs.probe PLAN.json reduce    start ranks as the reduction does, over MPI

Each rank writes its facts beside PLAN.json.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_prep.shards.manifest import Manifest
from hpc.cli import argument_parser, run
from hpc.diagnostics.node_facts import (
    Facts,
    bytes_per_second,
    free_bytes,
    meet_login_node,
    network_interfaces,
    sizes,
    versions,
)
from hpc.distributed.launcher import RankEnv, read_env
from hpc.storage.atomic import read_json

if TYPE_CHECKING:
    from hpc.distributed.process_group import Group

PACKAGES = ("torch", "torchvision", "numpy", "h5py", "mpi4py", "submitit", "isal")
SOURCES = tuple(
    Path(__file__).parents[1] / name for name in ("hpc", "data_prep", "jobs", "pipeline")
)
_NUMBERS = 1 << 20  # float32 values that the ranks add up


def main(argv: Sequence[str]) -> int:
    """Write the facts of this rank. Return 1, which ends the job, if it cannot join the others."""
    parser = argument_parser("python -m jobs.probe", __doc__)
    parser.add_argument("request", type=Path, metavar="PLAN.json", help="the facts to collect")
    parser.add_argument("launch", choices=("train", "reduce"))
    arguments = parser.parse_args(argv)
    env = read_env()
    folder = arguments.request.parent
    facts = Facts(folder, arguments.launch, env)
    if arguments.launch == "reduce":
        return 0 if facts.note("world", _mpi_world) else 1
    note_node(read_json(arguments.request), folder, env, facts)
    joined = facts.note("device", lambda: _device(env)) and _meet(env, folder / "rendezvous", facts)
    return 0 if joined else 1


def note_node(request: dict[str, Any], folder: Path, env: RankEnv, facts: Facts) -> None:
    """Note the facts that a rank can find alone.

    Args:
        request: names `files`, folders of data sets (`data`), and the folder `node_local`.
        folder: a folder that the nodes and the login node share.
    """
    if env.local_rank == 0:  # once for each node
        facts.note("clock", lambda: meet_login_node(folder, "train", env.rank))
        facts.note("interfaces", network_interfaces)
        facts.note("versions", lambda: versions(PACKAGES, SOURCES))
        facts.note("files", lambda: sizes(request["files"]))
        if request["node_local"]:
            facts.note("room", lambda: free_bytes(request["node_local"]))
    if env.rank == 0:
        facts.note("bytes_per_second", lambda: bytes_per_second(folder))
    facts.note("damaged", lambda: [line for d in request["data"] for line in _damaged(d, env)])


def _damaged(data: str, env: RankEnv) -> list[str]:
    """Return a line for each damaged sample in this rank's share of the shards of a data set."""
    from data_prep.verify import verify  # loads HDF5, so it comes after the light facts

    manifest = Manifest.load(data)
    shards = [shard for split in manifest.splits.values() for shard in split.shards]
    mine = shards[env.rank :: env.world_size]
    splits = {
        name: replace(split, shards=tuple(shard for shard in split.shards if shard in mine))
        for name, split in manifest.splits.items()
    }
    return verify(replace(manifest, splits=splits), processes=1) if mine else []


def _device(env: RankEnv) -> dict[str, Any]:
    """Return the name of this rank's GPU, or `cpu`, and the number of GPUs it sees."""
    import torch

    from hpc.distributed.device import own_device

    device = own_device(env)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return {
        "name": name,
        "visible": torch.cuda.device_count(),
        "kernels": torch.cuda.get_arch_list(),
    }


def _meet(env: RankEnv, rendezvous: Path, facts: Facts) -> bool:
    """Note the sum of rank + 1 over all ranks, by training's process group, and its seconds.

    Return True if the ranks can join.
    """
    from hpc.distributed.device import DeviceError
    from hpc.distributed.process_group import process_group

    try:
        with process_group(env, rendezvous) as group:
            try:
                met = _sum(group)
            except Exception as error:  # a rank that fails alone leaves the process with the block
                facts.note_error("met", error)
                raise
    except DeviceError as error:
        facts.note_error("device", error)
        return False
    except Exception as error:
        facts.note_error("met", error)
        return False
    return facts.note("met", lambda: met)


def _sum(group: Group) -> dict[str, float]:
    import torch

    mine = torch.full((_NUMBERS,), group.rank + 1.0, device=group.device)
    group.sum(mine)  # connects the ranks
    begin = time.perf_counter()
    total = float(group.sum(mine).mean())
    return {"sum": total, "seconds": time.perf_counter() - begin}


def _mpi_world() -> int:
    """Return the number of MPI ranks, after all have taken part in a collective."""
    from hpc.distributed.mpi import world

    ranks = world()
    together = ranks.gather(ranks.rank)
    return len(ranks.bcast(together) or ())


if __name__ == "__main__":
    run(main)
