"""Write the files that jobs of a fake queue leave: heartbeats, checkpoints, logs, failures."""

from __future__ import annotations

import time
from collections.abc import Sequence
from importlib import import_module

import torch

from hpc.storage import checkpoint
from hpc.storage.atomic import write_json
from hpc.storage.fencing import claim
from jobs.spec.cell import Cell
from jobs.spec.task import read_task
from pipeline.config.grid_file import Grid
from pipeline.planning.plan import Plan
from pipeline.submission.code_version import source_of_code
from pipeline.submission.decision import cells_to_submit, plan_of
from pipeline.tracking.survey import STATES, survey
from tests.pipeline.fake_queue import FakeQueue

OUT_OF_MEMORY = "slurmstepd-n1: error: Detected 1 oom_kill event in StepId=12.0. Some of the step"
NODE_FAILURE = "srun: error: Node failure on n2"


def cells_of(queue: FakeQueue, job: str) -> tuple[Cell, ...]:
    """Return the cells that a job trains."""
    return read_task(queue.calls[job].arguments[0]).cells


def work(queue: FakeQueue) -> None:
    """Run the waiting jobs in this process, in order."""
    for job, call in queue.calls.items():
        if queue.jobs[job] == "waiting":
            queue.jobs[job] = "gone"
            assert not import_module(call.module).main(list(call.arguments))


def words(grid: Grid, queue: FakeQueue) -> dict[str, int]:
    """Return the number of cells in each state that occurs."""
    found = survey(grid, queue)
    return {state: found.count(state) for state in STATES if found.count(state)}


def heartbeat(grid: Grid, queue: FakeQueue, job: str, step: int) -> None:
    """The heartbeat of a job."""
    task = read_task(queue.calls[job].arguments[0])
    record = {"stage": "training", "step": step, "total": 6, "steps_per_second": 0.5,
              "time": time.time(), "generation": 1}  # fmt: skip
    write_json(grid.run.progress_of(task.name), record)


def save(grid: Grid, cells: Sequence[Cell], step: int) -> None:
    """A checkpoint of cells of one bundle."""
    key = cells[0].bundle_key
    mine = claim(grid.run.generations(key), [cell.signature for cell in cells])
    entries = {cell.signature: {"weight": torch.zeros(2)} for cell in cells}
    checkpoint.save(grid.run.checkpoints(key), step, mine, entries, {})


def end(queue: FakeQueue, job: str, *lines: str, word: str = "") -> None:
    """A job is gone; the queue's last word, and what its one rank wrote."""
    queue.jobs[job], queue.why[job] = "gone", word
    queue.log(job).write_text("".join(f"{line}\n" for line in lines))


def diverge(grid: Grid, cell: Cell) -> None:
    """The loss of a cell was not finite."""
    record = {"cell": cell.name, "step": 2, "reason": "the loss was nan at step 2 of 6"}
    write_json(grid.run.failure(cell.signature), record)


def planned(grid: Grid, queue: FakeQueue) -> Plan:
    """Return the jobs that `grid` would submit now."""
    state = survey(grid, queue)
    return plan_of(grid, state, cells_to_submit(state, "grid"), source_of_code())
