"""Measure packing and reading over the number of processes; `benchmarks.growth` plots the result.

Each function returns the seconds of each round, by the number of processes.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.augmenting import PROTOCOL
from benchmarks.pictures import REPOSITORY, large_streets, shard_settings
from data_prep.shards.manifest import Manifest
from jobs.data.batches import TrainingBatches
from jobs.data.loader import load_steps

PROCESSES = (1, 2, 3, 4)
ROUNDS = 3
STEPS = 96  # batches read; so many that starting the processes is a small part
COPIES = 4  # of each packed picture, for the same reason
SHARD_MB = 9  # one large picture and its label map fill a shard


def packing_growth() -> dict[int, tuple[float, ...]]:
    """Return the seconds of `python -m data_prep.pack` by the number of packing processes.

    It packs `COPIES` times 12 PNG pictures of 2048 x 1024 into as many shards.
    """
    with large_streets() as pictures, TemporaryDirectory() as name:
        folder = Path(name)
        for kind in ("png", "labels"):
            for file, copy in product(pictures.files(kind), range(1, COPIES)):
                file.with_stem(f"{file.stem}-{copy}").hardlink_to(file)
        settings = shard_settings(pictures.root, folder / "shards", SHARD_MB).model_dump()
        lines = [f"{key} = {json.dumps(value)}" for key, value in settings.items()]
        (folder / "grid.toml").write_text("\n".join(["[dataset.pictures]", *lines]))
        command = [sys.executable, "-m", "data_prep.pack", str(folder / "grid.toml")]

        def packed(processes: int) -> None:
            shutil.rmtree(folder / "shards", ignore_errors=True)
            many = [*command, "--processes", str(processes)]
            subprocess.run(many, check=True, capture_output=True, cwd=REPOSITORY)
            shards = Manifest.load(folder / "shards").splits["train"].shards
            assert len(shards) == COPIES * len(pictures.reader)

        return _by_processes(packed)


def reading_growth() -> dict[int, tuple[float, ...]]:
    """Return the seconds for `STEPS` batches by the number of loader processes, with their start.

    A batch is 12 crops of 480, read and augmented from pictures of 2048 x 1024.
    """
    with large_streets() as pictures:
        batches = TrainingBatches(pictures.reader, PROTOCOL, seed=0, rank=0, world_size=1)

        def read(workers: int) -> None:
            assert sum(1 for _ in load_steps(batches, 0, STEPS, workers)) == STEPS

        return _by_processes(read)


def _by_processes(work: Callable[[int], None]) -> dict[int, tuple[float, ...]]:
    """Measure each number once in every round, after a call to warm up."""
    work(PROCESSES[-1])
    seconds: dict[int, list[float]] = {number: [] for number in PROCESSES}
    for _ in range(ROUNDS):
        for number in PROCESSES:
            start = time.perf_counter()
            work(number)
            seconds[number].append(time.perf_counter() - start)
    return {number: tuple(found) for number, found in seconds.items()}
