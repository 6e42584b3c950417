"""A job that reads a damaged or changed data set ends with one line that names file and sample,
loses nothing, and goes on where it was once the data set is fixed."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from data_prep.pack import pack
from data_prep.settings import parse_dataset
from data_prep.shards.manifest import Manifest
from data_prep.shards.reader import SplitReader
from hpc.cli import run
from jobs import train
from jobs.data.batches import _ORDER, Draw
from jobs.spec.task import Task, write_task
from tests.jobs.cells import a_cell
from tests.jobs.job_processes import jobs

IMAGES, BATCH = 6, 2


class Job:
    """A task over a packed data set of its own."""

    def __init__(self, folder: Path, workers: int = 0) -> None:
        table = {"source": "synthetic", "train": IMAGES, "val": 5, "size": [40, 56]}
        table |= {"shards": str(folder / "streets"), "codec": "raw"}
        self.settings = parse_dataset("streets", table, "grid.toml")
        protocol = {"epochs": 2, "batch_size": BATCH, "resize": (40, 48), "crop": (32, 32)}
        protocol |= {"eval_size": 0, "threads": 1, "workers": workers, "checkpoint_minutes": 0}
        identity = {"data": self.settings.identity()}
        self.cell = a_cell("DLWCE", **protocol).model_copy(update=identity)
        self.task = Task(
            kind="bundle",
            name="task",
            run=str(folder / "run"),
            data=self.settings.shards,
            origin=self.settings.origin(),
            cells=(self.cell,),
        )
        self.file = write_task(self.task)

    def pack(self) -> Manifest:
        return pack("streets", self.settings, processes=1)

    @property
    def head(self) -> dict[str, torch.Tensor]:
        path = self.task.paths.head(self.cell.signature)
        return torch.load(path, weights_only=True)["weights"]

    @property
    def checkpoints(self) -> list[str]:
        return sorted(p.name for p in self.task.paths.checkpoints(self.cell.bundle_key).iterdir())

    def last_of_the_first_epoch(self) -> int:
        """The sample that is read last: two steps are done by then."""
        return int(Draw(self.cell.seed, 0, _ORDER).permutation(IMAGES)[-1])


@pytest.fixture
def outcome(capsys):
    """Exit code and standard error of a job, which must hold no traceback."""

    def of(job: Job) -> tuple[int, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            run(train.main, [str(job.file)])
        said = capsys.readouterr().err
        assert "Traceback" not in said
        return ended.value.code, said

    return of


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The weights of the same job when nothing happens."""
    job = Job(tmp_path_factory.mktemp("undisturbed"))
    job.pack()
    assert train.main([str(job.file)]) == 0
    return job.head


def assert_bit_equal(one, other):
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


def flip(path: Path, position: int) -> None:
    descriptor = os.open(path, os.O_RDWR)
    byte = os.pread(descriptor, 1, position)[0]
    os.pwrite(descriptor, bytes([byte ^ 0x20]), position)
    os.close(descriptor)


def flip_in_sample(job: Job, arena: int, split: str, k: int) -> Path:
    """One byte in the middle of a sample: `arena` 0 its image, 1 its label map."""
    [shard] = Manifest.load(job.settings.shards).splits[split].shards
    path = Path(job.settings.shards) / shard.file
    pixels = 40 * 56 * (3, 1)[arena]
    flip(path, shard.arenas[arena][0] + k * pixels + pixels // 2)
    return path


@pytest.mark.parametrize(("workers", "arena"), [(0, 0), (2, 1)])
def test_a_flipped_byte_stops_the_job_and_a_mended_shard_lets_it_resume(
    tmp_path, outcome, undisturbed, workers, arena
):
    job = Job(tmp_path, workers)
    manifest = job.pack()
    last = job.last_of_the_first_epoch()
    path = flip_in_sample(job, arena, "train", last)
    sample = SplitReader(manifest, "train").id(last)
    for beginning in ("starting at step 0", "resuming at step 2"):
        code, said = outcome(job)
        error = said.splitlines()[-1]
        what = ("image", "label map")[arena]
        assert code == 2 and said.count("error: ") == 1 and beginning in said
        assert error.startswith(f"error: {path}: {what} {sample!r} is damaged (checksum of rows 0")
        assert error.endswith(f"delete {path.name} if it is there and run "
                              "`python -m data_prep.pack CONFIG` again")  # fmt: skip
        assert job.checkpoints
    path.unlink()
    assert job.pack() == manifest
    code, said = outcome(job)
    assert code == 0 and "resuming at step 2" in said
    assert_bit_equal(job.head, undisturbed)


def test_damage_to_the_validation_images_costs_no_training(tmp_path, outcome, undisturbed):
    job = Job(tmp_path)
    job.pack()
    path = flip_in_sample(job, 0, "val", 3)
    code, said = outcome(job)
    assert code == 2
    assert said.splitlines()[-1].startswith(f"error: {path}: image 'val_000003' is damaged")
    flip_in_sample(job, 0, "val", 3)
    code, said = outcome(job)
    assert code == 0 and f"resuming at step {2 * IMAGES // BATCH}" in said
    assert_bit_equal(job.head, undisturbed)


@pytest.mark.parametrize("position", [40, 1600, -1])
def test_a_flipped_byte_outside_the_samples_names_all_of_them(tmp_path, outcome, position):
    job = Job(tmp_path)
    job.pack()
    [path] = Path(job.settings.shards).glob("train-*.h5")
    flip(path, position % path.stat().st_size)
    code, said = outcome(job)
    assert code == 2 and said.count("error: ") == 1
    error = said.splitlines()[-1]
    assert error.startswith(f"error: {path} is damaged (outside the bytes of its samples")
    assert "none of them can be read, 'train_000000' to 'train_000005'" in error


@pytest.mark.parametrize("change", [{"seed": 1}, {"shard_mb": 64}])
def test_a_data_set_of_other_settings_is_not_trained_on(tmp_path, outcome, change):
    """Another data set was packed into the folder after the submission."""
    job = Job(tmp_path)
    pack("streets", job.settings.model_copy(update=change), processes=1)
    code, said = outcome(job)
    [(key, value)] = change.items()
    assert code == 2 and said.splitlines()[-1] == (
        f"error: {job.settings.shards} was packed with other settings than [dataset.streets] has "
        f"now ({key} = {value} there, not set here); set shards to another folder, or delete that "
        "one if no grid needs it"
    )
    assert not job.task.paths.checkpoints(job.cell.bundle_key).exists()


def test_a_data_set_whose_images_only_moved_is_trained_on(tmp_path, undisturbed):
    """`pack` then records their new place beside the same shards."""
    job = Job(tmp_path)
    replace(job.pack(), origin={**job.task.origin, "root": "/elsewhere"}).save()
    assert train.main([str(job.file)]) == 0
    assert_bit_equal(job.head, undisturbed)


@pytest.mark.parametrize("split", ["train", "val"])
def test_the_rank_that_reads_it_ends_all_with_its_line(tmp_path, split, undisturbed):
    """Each of two ranks has one of two images of a batch, and every other validation image."""
    job = Job(tmp_path, workers=1)
    manifest = job.pack()
    order = Draw(job.cell.seed, 0, _ORDER).permutation(IMAGES)
    of_rank_1 = int(order[-1]) if split == "train" else 3
    path = flip_in_sample(job, 0, split, of_rank_1)
    sample = SplitReader(manifest, split).id(of_rank_1)
    with jobs(tmp_path / "logs") as start:
        ranks = start(job.file, world_size=2)
        assert ranks.end() == [2, 2]
        for log in ranks.logs:
            assert "Traceback" not in log
            assert f"error: {path}: image {sample!r} is damaged" in log.splitlines()[-1]
        flip_in_sample(job, 0, split, of_rank_1)
        ranks = start(job.file, world_size=2)
        assert ranks.end() == [0, 0]
        done = 2 if split == "train" else 2 * IMAGES // BATCH
        assert f"resuming at step {done}" in ranks.log
    assert job.head.keys() == undisturbed.keys()


def test_a_data_set_that_changed_under_a_half_trained_cell(tmp_path, outcome, undisturbed):
    job = Job(tmp_path)
    manifest = job.pack()
    shard = flip_in_sample(job, 0, "train", job.last_of_the_first_epoch())
    assert outcome(job)[0] == 2
    kept = job.checkpoints

    label = Path(job.settings.shards) / "source/trainannot/train_000000.png"
    before = label.read_bytes()
    Image.new("L", (56, 40)).save(label)
    shard.unlink()
    assert job.pack().fingerprint != manifest.fingerprint
    code, said = outcome(job)
    assert code == 2 and said.splitlines()[-1] == (
        "error: the data set changed under half-trained cells of task; restore it, or submit "
        "grid with --retrain stale to train them anew"
    )
    assert job.checkpoints == kept

    label.write_bytes(before)
    assert job.pack().fingerprint == manifest.fingerprint
    code, said = outcome(job)
    assert code == 0 and "resuming at step 2" in said
    assert_bit_equal(job.head, undisturbed)
