"""One of two ranks has no GPU memory left: its job ends at once, says so, and its cells go on in
jobs of half as many."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from hpc.distributed.launcher import read_env
from hpc.scheduler.job import ModuleCall
from jobs import train
from jobs.training.cell_trainer import CellTrainer
from pipeline import retry
from pipeline.submission.submitter import submit
from tests.jobs.job_processes import jobs
from tests.pipeline.fake_queue import FakeQueue
from tests.pipeline.grids import small_grid
from tests.pipeline.stories import cells_of


def main(argv: Sequence[str]) -> int:
    """TASK FILE: train as `jobs.train` does, until rank 1 has too little memory in step 2."""
    task, failed = argv
    os.setsid()  # a session of its own, to find its loader processes
    print(f"session {os.getpid()}", flush=True)
    honest, rank = CellTrainer.step, read_env().rank

    def step(self, inputs, batch, target, number, total):
        if rank == 1 and number == 2:
            Path(failed).touch()
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return honest(self, inputs, batch, target, number, total)

    CellTrainer.step = step
    return train.main([task])


def test_the_job_ends_at_once_and_its_cells_are_halved(tmp_path, streets, monkeypatch, capsys):
    node_disk = tmp_path / "node"
    node_disk.mkdir()
    more = f'kind = "local"\ntasks_per_node = 2\nnode_local = "{node_disk}"'
    packed = (f"{tmp_path}/streets", str(streets))
    loaders = ("threads = 1", "threads = 1\nworkers = 1")
    grid = small_grid(tmp_path, packed, loaders, ('kind = "local"', more))
    queue, logs, failed = FakeQueue(tmp_path), tmp_path / "logs", tmp_path / "failed"
    monkeypatch.setattr(retry, "open_queue", lambda *_, **__: queue)
    monkeypatch.setattr(queue, "log_files", lambda _: sorted(logs.glob("*")))
    submit(grid, queue, ["grid"])
    cells = cells_of(queue, "job1")

    with jobs(logs) as start:
        task = queue.calls["job1"].arguments[0]
        job = start(ModuleCall(__name__, (task, str(failed))), 2)
        assert job.end() == [1, 1]
    assert time.time() - failed.stat().st_mtime < 10
    sessions = [int(pid) for log in job.logs for pid in re.findall(r"(?m)^session (\d+)$", log)]
    assert len(sessions) == 2 and not any(map(lives, sessions))
    places = (*node_disk.rglob("*"), *grid.run.root.rglob(".tmp-*"))
    assert [path for path in places if path.is_file()] == []

    queue.jobs["job1"], queue.why["job1"] = "gone", "failed"
    capsys.readouterr()
    assert retry.main([str(grid.path)]) == 0
    assert capsys.readouterr().out.startswith("4 cells: out of memory: again, at most 2 in a job\n")
    assert [cells_of(queue, job) for job in ("job3", "job4")] == [cells[:2], cells[2:]]


def lives(session: int) -> bool:
    """Return whether a process of a session is left."""
    try:
        os.killpg(session, 0)
    except ProcessLookupError:
        return False
    return True
