"""A job that says how it was started: each rank leaves a JSON file. Given the names of itself and
of another job, its ranks find each other first, while those of the other do so too."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from pathlib import Path

from hpc.distributed.launcher import read_env

_PATIENCE = 60.0  # seconds
_TOLD = ("SLURM_CPUS_PER_TASK", "SLURM_JOB_NUM_NODES", "SLURMD_NODENAME", "FROM_SETUP")


def main(argv: Sequence[str]) -> int:
    """FOLDER [NAME OTHER]: leave what this rank sees in FOLDER/JOB."""
    folder, *meeting = argv
    env = read_env()
    seen = {"world_size": env.world_size} | {key: os.environ.get(key) for key in _TOLD}
    if meeting:
        seen["met"] = meet(Path(folder), *meeting)
    path = Path(folder) / env.job_id / f"{env.rank}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(seen))
    return 0


def meet(folder: Path, name: str, other: str) -> list[float]:
    """Return how often each rank of this job was met, once the other job's ranks meet too."""
    import torch

    from hpc.distributed.process_group import process_group

    env = read_env()
    with process_group(env, folder / "rendezvous") as group:
        digits = [float(rank == group.rank) for rank in range(group.world_size)]
        (folder / f"{name}-meets").touch()
        deadline = time.monotonic() + _PATIENCE
        while not (folder / f"{other}-meets").exists():
            assert time.monotonic() < deadline, f"{other} did not run at the same time"
            time.sleep(0.05)
        return group.sum(torch.tensor(digits)).tolist()


def seen_by(folder: Path, job_id: str) -> list[dict]:
    """Return the records of the ranks of a job, in order."""
    paths = sorted((folder / job_id).glob("*.json"), key=lambda path: int(path.stem))
    return [json.loads(path.read_text()) for path in paths]
