"""A checkpoint that is not what was written is named, and the older one used; the cells end as if
nothing had happened. None left means starting over, said loudly."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from data_prep.shards.manifest import Manifest
from hpc.distributed.preemption import StopRequest
from hpc.storage import checkpoint
from hpc.storage.atomic import Damaged, read_json, write_json
from hpc.storage.checksum import file_crc32
from hpc.storage.fencing import claim
from jobs import train
from jobs.models.build import build_head
from jobs.spec.task import read_task
from jobs.training.backbone import load_backbone
from jobs.training.job_run import JobRun
from pipeline.config.grid_file import Grid
from pipeline.tracking.survey import survey
from tests.hpc.storage.test_checkpoint import cut, flip
from tests.jobs.cells import MODEL
from tests.jobs.job_processes import jobs, until
from tests.jobs.ranks import on_ranks
from tests.jobs.small_runs import (
    STEPS,
    assert_all_same,
    grid_of,
    is_done,
    results,
    steps_saved,
    task_of,
)
from tests.pipeline.fake_queue import FakeQueue

ATTEMPTS = 20


@pytest.fixture(scope="module")
def killed(streets, tmp_path_factory) -> Path:
    """The folder of a run that was killed when it had two checkpoints."""
    folder = tmp_path_factory.mktemp("killed")
    grid = grid_of(folder, streets.folder, "CE", "DLNWCE")
    with jobs(folder / "logs") as start:
        for _ in range(ATTEMPTS):
            job = start(task_of(grid))
            until(lambda: not job.runs or len(steps_saved(grid)) == 2, "two")  # noqa: B023
            job.kill()
            if len(steps_saved(grid)) == 2 and steps_saved(grid)[-1] < STEPS and not is_done(grid):
                return folder
            shutil.rmtree(grid.run.root)
    raise AssertionError(f"not hit in {ATTEMPTS} attempts")


@pytest.fixture
def grid(killed, streets, tmp_path) -> Grid:
    shutil.copytree(killed / "run", tmp_path / "run", ignore=shutil.ignore_patterns(".tmp-*"))
    return grid_of(tmp_path, streets.folder, "CE", "DLNWCE")


def saved(grid: Grid) -> list[checkpoint.Checkpoint]:
    """The checkpoints of the run, newest first."""
    return checkpoint.find(grid.run.checkpoints(grid.cells[0].bundle_key))[0]


def with_fitting_checksum(entry: Path) -> None:
    """Make the index say that the entry is as it is now."""
    index = read_json(entry.parent / "index.json")
    index["entries"][entry.stem] = f"crc32:{file_crc32(entry):08x}"
    write_json(entry.parent / "index.json", index)


def rewritten(entry: Path, **changes: object) -> None:
    state = torch.load(entry, weights_only=True)
    torch.save({**state, **changes}, entry)
    with_fitting_checksum(entry)


def of_another_model(entry: Path) -> None:
    network = build_head("deeplabv3_mobilenet_v3_large", 8, 0, 0.1).state_dict()
    rewritten(entry, network=network, momentum={})


def of_other_classes(entry: Path) -> None:
    rewritten(entry, network=build_head(MODEL, 5, 0, 0.1).state_dict(), momentum={})


def of_a_backbone_that_moves(entry: Path) -> None:
    rewritten(entry, backbone={"features.0.1.running_mean": torch.zeros(16)})


def with_momentum_of_others(entry: Path) -> None:
    rewritten(entry, momentum={0: {"momentum_buffer": torch.zeros(3)}})


def a_list(entry: Path) -> None:
    torch.save([1, 2, 3], entry)
    with_fitting_checksum(entry)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (flip, "is damaged"),
        (of_another_model, "does not match"),
        (of_other_classes, "does not match"),
        (of_a_backbone_that_moves, "does not match"),
        (with_momentum_of_others, "does not match"),
        (a_list, "does not match"),
    ],
)
def test_an_entry_is_named_and_the_older_used(grid, streets, alone, capfd, damage, words):
    newest, older = saved(grid)
    entry = newest.path / f"{grid.cells[0].signature}.pt"
    damage(entry)
    assert survey(grid, FakeQueue(grid.run.root)).count("done") == 0
    assert takes_up(older, grid, streets, alone, capfd, f"{entry} {words}")


def of_the_older(index: Path, grid: Grid) -> None:
    shutil.copy(saved(grid)[1].path / "index.json", index)


def of_another_bundle(index: Path, grid: Grid) -> None:
    """At the same step, by the same generation."""
    scratch = index.parents[3] / "elsewhere"
    newest = saved(grid)[0]
    other = claim(scratch / "claims", ["0123456789abcdef"])
    assert other.number == newest.generation
    checkpoint.save(scratch / "another", newest.step, other, {"0123456789abcdef": {}}, {})
    shutil.copy(scratch / "another" / newest.path.name / "index.json", index)


def another_record(index: Path, grid: Grid) -> None:
    shutil.copy(task_of(grid), index)


def a_folder(index: Path, grid: Grid) -> None:
    index.unlink()
    index.mkdir()


def the_older_renamed(index: Path, grid: Grid) -> None:
    older = saved(grid)[1]
    shutil.rmtree(index.parent)
    shutil.copytree(older.path, index.parent)


def a_file_in_its_place(index: Path, grid: Grid) -> None:
    shutil.rmtree(index.parent)
    index.parent.write_text("not a folder")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda index, _: index.unlink(), "has no index.json"),
        (of_the_older, "index.json does not match"),
        (of_another_bundle, "index.json does not match"),
        (another_record, "index.json does not match"),
        (a_folder, "index.json cannot be read: Is a directory"),
        (the_older_renamed, "index.json does not match"),
        (a_file_in_its_place, "index.json cannot be read: Not a directory"),
    ],
    ids=["missing", "older", "another bundle", "another record", "a folder",
         "renamed", "a file"],
)  # fmt: skip
def test_an_index_is_named_and_the_older_used(grid, streets, alone, capfd, damage, words):
    newest, older = saved(grid)
    damage(newest.path / "index.json", grid)
    found = survey(grid, FakeQueue(grid.run.root))
    assert set(found.steps.values()) == {older.step}
    assert takes_up(older, grid, streets, alone, capfd, str(newest.path), words)


def test_the_end_is_as_if_nothing_had_happened(grid, undisturbed, capfd):
    newest, older = saved(grid)
    of_another_model(newest.path / f"{grid.cells[1].signature}.pt")
    assert goes_on_from(older.step, grid, capfd, str(newest.path))
    assert_all_same(results(grid.run), undisturbed)


def test_none_left_means_starting_over_and_saying_so(grid, undisturbed, capfd):
    newest, older = saved(grid)
    cut(newest.path / f"{grid.cells[0].signature}.pt")
    of_another_model(older.path / f"{grid.cells[1].signature}.pt")
    lines = ["warning: no checkpoint is intact", str(newest.path), str(older.path)]
    assert goes_on_from(0, grid, capfd, *lines)
    assert_all_same(results(grid.run), undisturbed)
    assert saved(grid) == []


def started(grid: Grid, streets, alone) -> tuple:
    task = read_task(task_of(grid))
    backbone = load_backbone(task.cells[0], task.paths, alone)
    inputs = {"data set": streets.fingerprint, "backbone": backbone.sha256}
    job = JobRun(task, alone, StopRequest(), inputs)
    return job, *train.make_trainers(task, streets, backbone, alone)


def takes_up(one: checkpoint.Checkpoint, grid: Grid, streets, alone, capfd, *words: str) -> bool:
    """Start a job up to where it would train. Whether it stands where `one` was saved, bit for bit,
    and its log says so, and `words`."""
    job, frozen, trainers = started(grid, streets, alone)
    capfd.readouterr()
    step, log = job.resume(trainers, frozen), capfd.readouterr().err
    assert all(word in log for word in (f"resuming at step {one.step}\n", *words)), log
    for trainer in trainers:
        path = one.path / f"{trainer.cell.signature}.pt"
        expected, state = torch.load(path, weights_only=True), trainer.state()
        for key, tensor in expected["network"].items():
            assert torch.equal(state["network"][key], tensor), key
        for key, momentum in expected["momentum"].items():
            assert torch.equal(state["momentum"][key]["momentum_buffer"], *momentum.values())
    return step == one.step


def test_what_a_job_passed_over_is_not_one_of_the_two_kept(grid, streets, alone):
    newest, older = saved(grid)
    flip(newest.path / f"{grid.cells[0].signature}.pt")
    job, frozen, trainers = started(grid, streets, alone)
    job.begin(job.resume(trainers, frozen))
    job.save(newest.step + 1, trainers, frozen)
    assert [one.step for one in saved(grid)] == [newest.step + 1, older.step]


def goes_on_from(step: int, grid: Grid, capfd, *words: str) -> bool:
    """Run the job to its end; whether its log says all that."""
    capfd.readouterr()
    assert train.main([str(task_of(grid))]) == 0
    log = capfd.readouterr().err
    start = f"resuming at step {step}\n" if step else "starting at step 0\n"
    assert all(word in log for word in (start, *words)), log
    return True


def test_the_log_says_which_rank_cannot_read_a_checkpoint(grid, streets, alone, capfd):
    job, frozen, _ = started(grid, streets, alone)
    alone.world_size, alone.max = 2, lambda value: value
    alone.broadcast = lambda mine, source: [mine, ["/x cannot be read: Stale file handle"]][source]
    job.resume([], frozen)
    log = capfd.readouterr().err
    assert "warning: /x cannot be read: Stale file handle (on rank 1); passed over\n" in log


def where_rank_1_cannot_read(group, task_path: Path, newest: int) -> dict:
    """Return the step from which each rank resumes, and a weight of its network."""
    task = read_task(task_path)
    honest = checkpoint.Checkpoint.load

    def load(self, entry, fits):
        if self.step == newest:
            raise Damaged(f"{self.path} cannot be read: Stale file handle")
        return honest(self, entry, fits)

    if group.rank == 1:
        checkpoint.Checkpoint.load = load
    backbone = load_backbone(task.cells[0], task.paths, group)
    job = JobRun(task, group, StopRequest(), {})
    trainers = train.make_trainers(task, Manifest.load(task.data), backbone, group)[1]
    step = job.resume(trainers, backbone.module)
    return {"step": step, "weight": next(trainers[0].network.parameters()).detach()}


def test_ranks_go_on_from_a_step_that_all_of_them_can_read(grid, tmp_path):
    newest, older = saved(grid)
    (tmp_path / "ranks").mkdir()
    one, other = on_ranks(
        2, tmp_path / "ranks", where_rank_1_cannot_read, task_of(grid), newest.step
    )
    assert one["step"] == other["step"] == older.step
    assert torch.equal(one["weight"], other["weight"])
