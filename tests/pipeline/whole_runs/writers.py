"""Jobs and commands on a disk of their own that gets full, or read-only, at the very moment when
something is to be written. For a process that may mount: see `tests.tiny_disk`."""

from __future__ import annotations

import shutil
import sys
import traceback
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import submitit
import torch

from hpc.scheduler.auto import open_queue
from hpc.scheduler.job import ModuleCall
from hpc.scheduler.local import LocalQueue, Runner
from hpc.scheduler.local_jobs import LocalJobs
from hpc.storage import checkpoint
from hpc.storage.atomic import file_sha256, read_json
from jobs import pretrain, train
from jobs.spec import counts_file
from jobs.spec.cell import Cell
from jobs.training import cell_trainer, job_run
from pipeline import reduce, report, status, submit
from pipeline.config.grid_file import Grid
from pipeline.scores.results_file import read_results
from pipeline.scores.score_table import rows
from pipeline.submission import submitter
from tests.jobs.small_runs import assert_all_same, grid_of, is_done, results, steps_saved, task_of
from tests.pipeline.grids import finish
from tests.pipeline.scores.simulated import made_up_results
from tests.tiny_disk import Disk


def training(disk: Disk, folder: Path, data: Path) -> None:
    """A job whose disk closes at each of its writers in turn, each time on another start."""
    honest = grid_of(folder / "undisturbed", data, "CE", epochs=1, workers=0)
    assert train.main([str(task_of(honest))]) == 0
    often = 0.0  # minutes between checkpoints: one a step
    grid = grid_of(folder / "run", data, "CE", epochs=1, workers=0, checkpoint_minutes=often)
    task = [str(task_of(grid))]
    for owner, name, nth in (
        (job_run, "claim", 1),
        (checkpoint, "save", 1),
        (checkpoint, "save", 3),
        (train, "save_head", 1),
        (train, "write_counts", 1),
        (counts_file, "write_json", 1),
    ):
        before = load_newest(grid)[0]
        with disk.closed_at(owner, name, nth):
            disk.refused(lambda: train.main(task))
        assert before <= load_newest(grid)[0] == max(steps_saved(grid), default=0)
        assert not is_done(grid)
    assert train.main(task) == 0
    assert_all_same(results(grid.run), results(honest.run))


def load_newest(grid: Grid) -> tuple[int, dict]:
    """The step of the newest checkpoint and its states; all there are load."""
    cells = pretrained(grid) if any(grid.run.tasks.glob("pretrain*")) else grid.cells
    folder = grid.run.checkpoints(cells[0].bundle_key)
    step, states, _, problems = checkpoint.load_latest(folder, [c.signature for c in cells])
    assert problems == []
    return step, states


def deleting(disk: Disk, folder: Path, data: Path) -> None:
    """Of the oldest checkpoint, when there are three; a full disk does not keep from it."""
    often = 0.0
    grid = grid_of(folder / "run", data, "CE", epochs=1, workers=0, checkpoint_minutes=often)
    with disk.closed_at(checkpoint, "remove_folder"):
        disk.refused(lambda: train.main([str(task_of(grid))]))
    assert steps_saved(grid) == [1, 2, 3]
    assert train.main([str(task_of(grid))]) == 0


def heartbeat(disk: Disk, folder: Path, data: Path) -> None:
    """A job whose disk is closed from its first heartbeat to its first checkpoint."""
    honest = grid_of(folder / "undisturbed", data, "CE", epochs=1, workers=0)
    assert train.main([str(task_of(honest))]) == 0
    grid = grid_of(folder / "run", data, "CE", epochs=1, workers=0)
    save = checkpoint.save

    def opening(*arguments: Any) -> None:
        disk.open()
        save(*arguments)

    with (
        mock.patch.object(job_run, "HEARTBEAT_SECONDS", 0.0),
        mock.patch.object(checkpoint, "save", opening),
        disk.closed_at(job_run.JobRun, "heartbeat"),
    ):
        assert train.main([str(task_of(grid))]) == 0
    assert_all_same(results(grid.run), results(honest.run))
    assert read_json(grid.run.progress_of("bundle"))["stage"] == "done"


def failure(disk: Disk, folder: Path, data: Path) -> None:
    """A cell whose loss is not finite, and no room to say so."""
    grid = grid_of(folder / "run", data, "CE", epochs=1, workers=0)
    task = [str(task_of(grid))]

    def broken(logits: torch.Tensor, *_: Any) -> torch.Tensor:
        return logits.sum() * float("nan")

    with mock.patch.object(cell_trainer, "combined_loss", broken):
        with disk.closed_at(job_run.JobRun, "give_up"):
            disk.refused(lambda: train.main(task))
        assert not grid.run.failure(grid.cells[0].signature).exists()
        assert train.main(task) == 0
    assert "nan at step 0" in read_json(grid.run.failure(grid.cells[0].signature))["reason"]


def pretraining(disk: Disk, folder: Path, data: Path) -> None:
    """The backbone and its record."""
    grid = grid_of(folder / "run", data, "CE", epochs=1, workers=0)
    task = [str(task_of(grid, kind="pretrain"))]
    with disk.closed_at(pretrain, "publish_backbone"):
        disk.refused(lambda: pretrain.main(task))
    (trained,) = load_newest(grid)[1].values()
    with disk.closed_at(pretrain, "write_json"):
        disk.refused(lambda: pretrain.main(task))
    assert pretrain.main(task) == 0
    path = grid.run.backbone(grid.cells[0].backbone_key)
    for name, tensor in torch.load(path, weights_only=True).items():
        assert torch.equal(tensor, trained["network"][f"backbone.{name}"]), name
    assert read_json(path.with_suffix(".json"))["sha256"] == file_sha256(path)


def pretrained(grid: Grid) -> list[Cell]:
    return [pretrain.pretraining_cell(grid.cells[0])]


def reducing(disk: Disk, folder: Path, data: Path) -> None:
    """The results, over older ones."""
    grid = grid_of(folder / "run", data, "CE", "WCE", epochs=1)
    finish(grid, grid.cells[:1], "first")
    assert reduce.main([str(grid.path)]) == 0
    before = grid.run.results.read_bytes()
    finish(grid, grid.cells[1:], "second")
    with disk.closed_at(reduce.ResultsFile, "write"):
        disk.refused(lambda: reduce.main([str(grid.path)]))
    assert grid.run.results.read_bytes() == before
    assert reduce.main([str(grid.path)]) == 0
    assert len(read_results(grid.run.results).datasets[0].cells) == 2


def reporting(disk: Disk, folder: Path, data: Path) -> None:
    """The files of a report."""
    made_up = made_up_results(seeds=(0,))
    write = partial(report.write_report, made_up, rows(made_up), folder / "report")
    (folder / "report").mkdir(parents=True)
    (folder / "report" / "index.html").write_text("a page of another day")
    for nth in (1, 2, 3, 4, 5, 11):  # each file that the report itself makes, one of the paper's
        with disk.closed_at(report, "write_text", nth):
            disk.refused(write)
    assert [path.name for path in (folder / "report").iterdir()] == ["index.html"]
    assert (folder / "report" / "index.html").read_text() == "a page of another day"
    assert write().page.read_text().rstrip().endswith("</html>")


def submission(disk: Disk, folder: Path, data: Path) -> None:
    """Everything that `submit grid` writes itself, and the jobs of the local queue."""
    grid = grid_of(folder / "run", data, "CE", epochs=1)
    command = ["grid", str(grid.path), "--cluster", "local"]
    with mock.patch.object(LocalQueue, "ensure_runner"):  # nothing is to be trained
        for owner, name in (
            (submitter, "one_at_a_time"),
            (submitter, "write_bytes"),
            (submitter, "write_task"),
            (submitter.Submission, "write"),
            (LocalJobs, "add"),
        ):
            if disk.mode == "read-only" and name != "one_at_a_time":
                continue  # it does not get read-only while the lock is open
            with disk.closed_at(owner, name):
                disk.refused(lambda: submit.main(command))
            assert not list(grid.run.queue.glob("*.json"))
        disk.close()  # those that only read go on
        assert status.main([str(grid.path), "--cluster", "local"]) == 0
        assert submit.main([*command, "--dry-run"]) == 0
        disk.open()
        assert submit.main(command) == 0
    (job,) = grid.run.queue.glob("*.json")
    assert read_json(job)["module"] == "jobs.train"


def local_runner(disk: Disk, folder: Path, data: Path) -> None:
    """The pickle with which the runner starts a job, and the job files."""
    grid = grid_of(folder / "run", data, "CE", epochs=1)
    queue = open_queue(grid.cluster, grid.run.logs, grid.run.queue)
    assert isinstance(queue, LocalQueue)
    with mock.patch.object(LocalQueue, "ensure_runner"):
        (job,) = queue.submit([ModuleCall("this")], grid.cluster.single(), "job")
    if disk.mode == "read-only":  # it does not get so while a runner has its lock open
        disk.close()
        disk.refused(queue.ensure_runner)
        return
    for owner, name in ((LocalJobs, "state"), (submitit.LocalExecutor, "submit")):
        with disk.closed_at(owner, name):
            disk.refused(lambda: run_local_jobs(grid))
    run_local_jobs(grid)
    state = queue.job_states([job])[job].state
    assert state == "gone"  # it never ran, and grid would send it again
    with mock.patch.object(LocalQueue, "ensure_runner"):
        call = ModuleCall("data_prep.pack", (str(grid.path),))
        (again,) = queue.submit([call], grid.cluster.single(), "job")
    run_local_jobs(grid)
    assert read_json(grid.run.queue / f"{again}.ended")["outcome"] == "succeeded"


def run_local_jobs(grid: Grid) -> None:
    with (grid.run.queue / "lock").open("a") as lock:
        Runner(LocalJobs(grid.run.queue), lock).run()


# What is written in the same way as something else is tried on a full disk alone.
READ_ONLY = (deleting, submission, local_runner, training, failure, reducing)
SCENARIOS = {"full": (*READ_ONLY[1:], heartbeat, pretraining, reporting), "read-only": READ_ONLY}


def main(mode: str, shards: str, folder: str) -> None:
    """Run all of a mode, one after the other, each in a folder that is gone after it."""
    disk = Disk(folder, mode)
    for scenario in SCENARIOS[mode]:
        name = scenario.__name__
        print(f"== {name}", flush=True)
        try:
            scenario(disk, disk.folder / name, Path(shards))
            print("went on to the end", flush=True)
        except Exception:
            traceback.print_exc(file=sys.stdout)
            disk.open()
        shutil.rmtree(disk.folder / name, ignore_errors=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
