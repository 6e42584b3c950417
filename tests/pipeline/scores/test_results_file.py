"""results.h5 is read as it was written, or refused."""

from dataclasses import replace

import h5py
import numpy as np
import pytest

from hpc.cli import UserError
from hpc.storage.atomic import Damaged
from pipeline.scores import results_file as results_format
from pipeline.scores.results_file import read_results
from tests.pipeline.scores import simulated


@pytest.fixture(scope="module")
def results():
    return simulated.made_up_results(grid="grüße", notes=["pre-trained here"])


def test_results_come_back_as_they_were_written(tmp_path, results):
    simulated.write_results(tmp_path / "results.h5", results)
    back = read_results(tmp_path / "results.h5")
    assert (back.grid, back.record) == (results.grid, results.record)
    before, after = results.datasets[0], back.datasets[0]
    assert (after.name, after.classes, after.cells) == (before.name, before.classes, before.cells)
    np.testing.assert_array_equal(after.train_class_pixels, before.train_class_pixels)
    assert all(after.counts_of(i).equals(before.counts_of(i)) for i in range(len(before.cells)))


def test_equal_results_are_equal_bytes(tmp_path, results):
    simulated.write_results(tmp_path / "one.h5", results)
    simulated.write_results(tmp_path / "two.h5", read_results(tmp_path / "one.h5"))
    assert (tmp_path / "one.h5").read_bytes() == (tmp_path / "two.h5").read_bytes()


def test_a_grid_of_which_nothing_is_done_yet_can_be_written(tmp_path, results):
    data = results.datasets[0]
    empty = {name: array[:0] for name, array in data.counts.items()}
    missing = [f"camvid/fcn/{'x' * 90}/{i}" for i in range(2000)]  # far beyond HDF5's 64 kB
    simulated.write_results(
        tmp_path / "results.h5",
        replace(
            results,
            record={"missing": missing},
            datasets=[replace(data, cells=[], counts=empty)],
        ),
    )
    back = read_results(tmp_path / "results.h5")
    assert back.record["missing"] == missing
    assert back.datasets[0].counts["confusion"].shape == (0, 11, 11)


def test_any_flipped_byte_is_noticed_before_hdf5_sees_it(tmp_path, results, monkeypatch):
    path = tmp_path / "results.h5"
    simulated.write_results(path, results)
    whole = path.read_bytes()
    monkeypatch.setattr(results_format.h5py, "File", None)
    for place in [*range(1200), *range(1200, len(whole), 301)]:
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(UserError, match=r"results\.h5 (is damaged|was written by another)"):
            read_results(path)


def test_a_file_of_another_version_is_not_called_damaged(tmp_path):
    (tmp_path / "results.h5").write_bytes(b"lossgrid results 1\n" + bytes(2000))
    with pytest.raises(UserError, match="written by another version of this program; run `reduce`"):
        read_results(tmp_path / "results.h5")


def test_any_tool_for_hdf5_reads_the_results(tmp_path, results):
    simulated.write_results(tmp_path / "results.h5", results)
    with h5py.File(tmp_path / "results.h5", "r") as file:
        read = file["0/confusion"][...]
    np.testing.assert_array_equal(read, results.datasets[0].counts["confusion"])


@pytest.mark.parametrize("length", [0, 100, 5000])
def test_a_file_cut_short_is_damaged(tmp_path, results, length):
    path = tmp_path / "results.h5"
    simulated.write_results(path, results)
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(Damaged, match="run `reduce` again"):
        read_results(path)


def test_no_results_yet_is_said_so(tmp_path):
    with pytest.raises(UserError, match="there are no results"):
        read_results(tmp_path / "results.h5")


def test_counts_that_do_not_fit_their_cells_are_refused(tmp_path, results):
    data = results.datasets[0]
    fewer = replace(data, cells=data.cells[1:])
    with pytest.raises(ValueError, match="of 3 cells"):
        simulated.write_results(tmp_path / "results.h5", replace(results, datasets=[fewer]))
    assert list(tmp_path.iterdir()) == []
