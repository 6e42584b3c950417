"""One of two ranks has no GPU memory left: its job ends at once, says so, and its cells go on in
jobs of half as many."""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from pathlib import Path

import torch

from hpc.scheduler.job import ModuleCall
from jobs.training.cell_trainer import CellTrainer
from pipeline import retry
from pipeline.submission.submitter import submit
from tests.pipeline.fake_queue import FakeQueue
from tests.pipeline.grids import small_grid
from tests.pipeline.stories import cells_of

RANKS = multiprocessing.get_context("forkserver")
RANKS.set_forkserver_preload(["jobs.train", __name__])


def train_as_a_rank(call: ModuleCall, rank: int, log: Path) -> None:
    """Train as one of two ranks of the local queue; rank 1 has too little memory at step 2."""
    os.setsid()  # so that its loader processes are found
    os.dup2(os.open(log, os.O_CREAT | os.O_WRONLY), sys.stderr.fileno())
    place = {"JOB_ID": 1, "NTASKS": 2, "GLOBALID": rank, "LOCALID": rank}
    os.environ.update({f"SUBMITIT_LOCAL_{name}": str(value) for name, value in place.items()})
    os.environ["SUBMITIT_EXECUTOR"] = "local"
    step = CellTrainer.step

    def short_of_memory(self, inputs, batch, target, number, total):
        if rank == 1 and number == 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return step(self, inputs, batch, target, number, total)

    CellTrainer.step = short_of_memory
    call()


def test_the_job_ends_at_once_and_its_cells_are_halved(tmp_path, streets, monkeypatch, capsys):
    node_disk = tmp_path / "node"
    node_disk.mkdir()
    more = f'kind = "local"\ntasks_per_node = 2\nnode_local = "{node_disk}"'
    packed = (f"{tmp_path}/streets", str(streets))
    loaders = ("threads = 1", "threads = 1\nworkers = 1")
    grid = small_grid(tmp_path, packed, loaders, ('kind = "local"', more))
    queue = FakeQueue(tmp_path)
    monkeypatch.setattr(retry, "open_queue", lambda *_, **__: queue)
    monkeypatch.setattr(queue, "log_files", lambda job: sorted(tmp_path.glob(f"{job}-*.err")))
    submit(grid, queue, ["grid"])
    cells = cells_of(queue, "job1")

    logs = [tmp_path / f"job1-{rank}.err" for rank in (0, 1)]
    ranks = [
        RANKS.Process(target=train_as_a_rank, args=(queue.calls["job1"], rank, logs[rank]))
        for rank in (0, 1)
    ]
    for rank in ranks:
        rank.start()
    ranks[1].join(120)
    failed = time.monotonic()
    ranks[0].join(120)
    assert time.monotonic() - failed < 10
    assert [rank.exitcode for rank in ranks] == [1, 1]

    places = (*node_disk.rglob("*"), *grid.run.root.rglob(".tmp-*"))
    assert [path for path in places if path.is_file()] == []
    assert [rank.pid for rank in ranks if lives(rank.pid)] == []
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
