"""The counts of all jobs become one file: the same bytes on one rank and on many, with what is
missing named."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from data_prep.pack import pack
from data_prep.shards.manifest import Manifest
from hpc.cli import UserError
from hpc.storage.atomic import write_json
from jobs.spec.cell import Cell
from pipeline import reduce
from pipeline.config.grid_file import Grid, read_grid
from pipeline.scores.results_file import Results, read_results
from tests.pipeline.grids import counts_of, finish, grid_file, pairs

REPOSITORY = Path(__file__).parents[2]
MPIEXEC = Path(sys.executable).parent / "mpiexec"
OPEN_MPI = shutil.which("mpiexec.openmpi") or shutil.which("orterun")
ROOMS = """
[dataset.rooms]
source = "folder"
root = "{packed}/rooms"
shards = "{packed}/rooms/shards"
classes = ["wall", "floor"]
"""


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> Path:
    """The packed data sets of the grid."""
    folder = tmp_path_factory.mktemp("packed")
    pairs(folder / "rooms", "ab")
    path = grid_file(folder, more=ROOMS.format(packed=folder))
    for name, settings in read_grid(path).datasets.items():
        pack(name, settings, processes=1)
    return folder


@pytest.fixture
def grid(tmp_path, packed) -> Grid:
    """Two data sets of 8 and 2 classes, 8 cells each; nothing is trained yet."""
    change = (f'shards = "{tmp_path}/streets"', f'shards = "{packed}/streets"')
    return read_grid(grid_file(tmp_path, change, more=ROOMS.format(packed=packed)))


def notes_of(results: Results) -> list[str]:
    """The notes, without those about classes that the few small images lack."""
    return [note for note in results.record["notes"] if "has no pixel in" not in note]


def cells_of(grid: Grid, dataset: str, seed: int) -> list[Cell]:
    return [cell for cell in grid.cells if (cell.dataset, cell.seed) == (dataset, seed)]


@pytest.fixture
def half_done(grid) -> Grid:
    """A run as it may be: some cells are trained, one job's counts are damaged, and some cells lie
    in two files, since a job that was cut off finished after its successor had begun."""
    finish(grid, cells_of(grid, "streets", 0), "streets-seed0")
    finish(grid, cells_of(grid, "streets", 1)[:2], "streets-seed1")
    finish(grid, cells_of(grid, "streets", 1)[1:3], "streets-seed1-late")
    finish(grid, cells_of(grid, "rooms", 0), "rooms-seed0")
    flip(finish(grid, cells_of(grid, "rooms", 1), "rooms-seed1"))
    return grid


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def reduced(grid: Grid) -> Results:
    assert reduce.main([str(grid.path)]) == 0
    return read_results(grid.run.results)


def on_ranks(
    number: int, grid: Grid, mpiexec: Sequence[str | Path] = (MPIEXEC,)
) -> subprocess.CompletedProcess[str]:
    if not MPIEXEC.exists():
        pytest.skip("no mpiexec beside this Python")
    line = [*mpiexec, "-n", str(number), sys.executable, "-m", "pipeline.reduce", str(grid.path)]
    environ = {k: v for k, v in os.environ.items() if not k.startswith(("PMI", "OMPI"))}
    return subprocess.run(
        line, cwd=REPOSITORY, env=environ, capture_output=True, text=True, timeout=60
    )


def assert_has_counts_of(results: Results, cells: list[Cell], grid: Grid) -> None:
    """The results hold exactly these cells, in this order, each with its own counts."""
    for dataset in results.datasets:
        expected = [cell for cell in cells if cell.dataset == dataset.name]
        assert [cell["signature"] for cell in dataset.cells] == [c.signature for c in expected]
        manifest = Manifest.load(grid.datasets[dataset.name].shards)
        assert dataset.classes == list(manifest.classes)
        for place, cell in enumerate(expected):
            assert dataset.counts_of(place).equals(counts_of(cell, manifest))


def test_all_cells_come_in_the_order_of_the_grid(grid, capsys):
    for dataset in ("streets", "rooms"):
        for seed in (1, 0):
            finish(grid, cells_of(grid, dataset, seed)[::-1], f"{dataset}-{seed}")
    results = reduced(grid)
    assert results.grid == "small"
    assert [dataset.name for dataset in results.datasets] == ["streets", "rooms"]
    assert_has_counts_of(results, list(grid.cells), grid)
    assert results.record["missing"] == notes_of(results) == []
    assert capsys.readouterr().out == f"{grid.run.results}: 16 of 16 cells\n"


def test_a_loss_that_has_other_ramps_on_a_data_set_is_recorded_for_each(grid):
    ramp = "[protocol.per_dataset.rooms]\nnaive_ramp = [0.2, 0.4]\n"
    path = grid.path.with_name("ramps.toml")
    path.write_text(grid.path.read_text() + ramp)
    losses = reduced(read_grid(path)).record["losses"]
    assert [(loss["name"], loss["datasets"]) for loss in losses] == [
        ("CE", ["streets", "rooms"]),
        ("DLNWCE", ["streets"]),
        ("DLNWCE", ["rooms"]),
    ]
    ramps = [[knot["at"] for knot in loss["schedule"]][1:] for loss in losses[1:]]
    assert ramps == [[0.3, 0.9], [0.2, 0.4]]


def test_what_is_not_trained_is_missing_by_name(half_done, capsys):
    results = reduced(half_done)
    missing = [*cells_of(half_done, "streets", 1)[3:], *cells_of(half_done, "rooms", 1)]
    have = [cell for cell in half_done.cells if cell not in missing]
    assert_has_counts_of(results, have, half_done)
    in_order = [cell.name for cell in half_done.cells if cell in missing]
    assert results.record["missing"] == in_order
    lines = capsys.readouterr().out.splitlines()
    assert lines[1:] == [
        f"{half_done.run.results}: 11 of 16 cells",
        *(f"missing: {name}" for name in in_order),
    ]


def test_damaged_counts_are_named_here_and_in_the_results(half_done, capsys):
    (note,) = notes_of(reduced(half_done))
    path = half_done.run.counts_of("rooms-seed1", 1)
    assert note == f"{path} is damaged (its checksum differs); delete it and run grid again"
    assert capsys.readouterr().out.splitlines()[0] == f"warning: {note}"


@pytest.mark.parametrize("number", [1, 2, 3])
def test_on_many_ranks_it_is_the_same_file_to_the_last_byte(half_done, capsys, number):
    reduced(half_done)
    alone, said = half_done.run.results.read_bytes(), capsys.readouterr().out
    half_done.run.results.unlink()
    done = on_ranks(number, half_done)
    assert done.returncode == 0, done.stderr
    assert half_done.run.results.read_bytes() == alone
    assert done.stdout == said


def test_a_rank_that_meets_a_damaged_file_brings_those_behind_it(grid):
    """Of two ranks the second reads b, which is damaged, and d."""
    for cell, name in zip(cells_of(grid, "streets", 0), "abcd", strict=True):
        path = finish(grid, [cell], name)
        if name == "b":
            flip(path)
    reduced(grid)
    alone = grid.run.results.read_bytes()
    grid.run.results.unlink()
    assert on_ranks(2, grid).returncode == 0
    assert grid.run.results.read_bytes() == alone
    first, _, *others = cells_of(grid, "streets", 0)
    assert_has_counts_of(read_results(grid.run.results), [first, *others], grid)


@pytest.mark.skipif(OPEN_MPI is None, reason="no Open MPI beside ours")
def test_under_the_mpiexec_of_another_mpi_it_stops_and_writes_nothing(half_done):
    reduced(half_done)
    before = half_done.run.results.read_bytes()
    finish(half_done, cells_of(half_done, "streets", 1)[3:], "streets-seed1-last")
    done = on_ranks(2, half_done, (OPEN_MPI, "--allow-run-as-root", "--oversubscribe"))
    assert done.returncode == 2
    (error,) = {line for line in done.stderr.splitlines() if line.startswith("error: ")}
    assert "the launcher announced 2 ranks" in error and "belong to different MPIs; use" in error
    assert "Traceback" not in done.stderr and done.stdout == ""
    assert half_done.run.results.read_bytes() == before
    half_done.run.results.unlink()
    on_ranks(2, half_done, (OPEN_MPI, "--allow-run-as-root", "--oversubscribe"))
    assert not half_done.run.results.exists()


def test_reducing_again_takes_up_what_came_since(half_done):
    before = reduced(half_done)
    late = cells_of(half_done, "streets", 1)[3:]
    finish(half_done, late, "streets-seed1-last")
    after = reduced(half_done)
    assert len(after.datasets[0].cells) == len(before.datasets[0].cells) + len(late)


def test_results_of_more_cells_are_not_replaced(grid, tmp_path, packed):
    """An edited protocol names other cells, of which none is trained."""
    finish(grid, cells_of(grid, "streets", 0), "streets-seed0")
    reduced(grid)
    before = grid.run.results.read_bytes()
    change = (f'shards = "{tmp_path}/streets"', f'shards = "{packed}/streets"')
    path = grid_file(
        tmp_path, change, ("epochs = 2", "epochs = 3"), more=ROOMS.format(packed=packed)
    )
    with pytest.raises(UserError, match=r"has 4 finished cells, but would now have 0, .*--a"):
        reduce.main([str(path)])
    assert grid.run.results.read_bytes() == before
    assert reduce.main([str(path), "--allow-fewer"]) == 0
    assert [len(dataset.cells) for dataset in read_results(grid.run.results).datasets] == [0, 0]


def test_damaged_results_can_be_replaced(grid):
    finish(grid, cells_of(grid, "streets", 0), "streets-seed0")
    reduced(grid)
    flip(grid.run.results)
    for path in grid.run.counts.iterdir():
        path.unlink()
    assert [len(dataset.cells) for dataset in reduced(grid).datasets] == [0, 0]


def test_with_nothing_trained_there_are_results_of_nothing(grid, capsys):
    results = reduced(grid)
    assert [len(dataset.cells) for dataset in results.datasets] == [0, 0]
    assert results.datasets[0].counts["confusion"].shape == (0, 8, 8)
    assert len(results.record["missing"]) == 16
    said = capsys.readouterr().out
    assert f"{grid.run.results}: 0 of 16 cells\n" in said
    assert "warning: no cell is finished, so the results are empty; see `python -m pipeline" in said


def test_cells_of_other_grids_are_left_out(grid, tmp_path, packed):
    finish(grid, cells_of(grid, "streets", 0), "streets-seed0")
    change = (f'shards = "{tmp_path}/streets"', f'shards = "{packed}/streets"')
    fewer = read_grid(grid_file(tmp_path, change, ('["CE", "DLNWCE"]', '["CE"]')))
    results = reduced(fewer)
    assert [cell["loss"] for cell in results.datasets[0].cells] == ["CE", "CE"]
    have = [cell for cell in fewer.cells if cell.seed == 0]
    assert_has_counts_of(results, have, fewer)


def repacked(grid: Grid, tmp_path: Path) -> Grid:
    """The grid on a copy of the data set whose classes have other names."""
    source = Path(grid.datasets["streets"].shards)
    shutil.copytree(source, tmp_path / "other")
    manifest = Manifest.load(tmp_path / "other")
    names = tuple(f"other {name}" for name in manifest.classes)
    Manifest(manifest.folder, manifest.name, names, manifest.splits).save()
    text = grid.path.read_text()
    grid.path.write_text(text.replace(f'shards = "{source}"', f'shards = "{tmp_path}/other"'))
    return read_grid(grid.path)


@pytest.mark.parametrize("number", [1, 2])
def test_counts_of_other_data_are_left_out(grid, tmp_path, number):
    finish(grid, cells_of(grid, "streets", 0), "streets-seed0")
    finish(grid, cells_of(grid, "rooms", 0), "rooms-seed0")
    changed = repacked(grid, tmp_path)
    done = on_ranks(number, changed)
    assert done.returncode == 0, done.stderr
    assert "warning: 4 cells are stale (their data set has changed)" in done.stdout
    results = read_results(grid.run.results)
    assert_has_counts_of(results, cells_of(changed, "rooms", 0), changed)


def test_a_change_of_provenance_is_noted_with_the_cell(grid):
    changed = [{"torch": "2.10.0"}, {"torch": "2.11.0"}]
    finish(grid, cells_of(grid, "streets", 0), "streets-seed0", provenance=changed)
    finish(grid, cells_of(grid, "streets", 1), "streets-seed1")
    cells = reduced(grid).datasets[0].cells
    notes = {seed: {n for c in cells if c["seed"] == seed for n in c["notes"]} for seed in (0, 1)}
    assert notes == {0: {"mixed provenance: 2 kinds"}, 1: set()}


def test_a_backbone_that_was_trained_here_is_told_of(tmp_path, packed):
    changes = (
        (f'shards = "{tmp_path}/streets"', f'shards = "{packed}/streets"'),
        ('weights = "none"', 'weights = "pretrain"'),
    )
    grid = read_grid(grid_file(tmp_path, *changes))
    record = {
        "sha256": "0123456789abcdef",
        "model": "fcn_mobilenet_v3_large",
        "dataset": "streets",
        "protocol": {"epochs": 7},
        "seed": 3,
        "scores": {"acc": 0.75, "rec": 0.5},
    }
    write_json(grid.run.backbone(grid.cells[0].backbone_key).with_suffix(".json"), record)
    (note,) = notes_of(reduced(grid))
    assert "was trained on streets itself" in note
    assert "7 epochs, seed 3; its accuracy 0.75, recall 0.50" in note
