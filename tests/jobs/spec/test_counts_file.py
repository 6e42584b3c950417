"""A cell is done when an index names it and the file it points to verifies."""

from __future__ import annotations

import hashlib
import re
import signal
import subprocess
import sys
import zlib
from pathlib import Path

import h5py
import numpy as np
import pytest

from hpc.storage.atomic import Damaged, read_json
from jobs.metrics.counts import NAMES, Counts
from jobs.spec.counts_file import read_counts, read_index, write_counts
from tests.tiny_disk import NO_ROOM, on_tiny_disk

REPOSITORY = Path(__file__).parents[3]
CELLS = [{"signature": "aa", "name": "streets/fcn/CE/0"}, {"signature": "bb", "name": "µ"}]


def some_counts(seed: int) -> Counts:
    generator = np.random.default_rng(seed)
    zeros = Counts.zeros(3, 5).as_arrays()
    return Counts.from_arrays(
        {name: generator.integers(0, 2**60, array.shape) for name, array in zeros.items()}
    )


def stacked(*counts: Counts) -> dict[str, np.ndarray]:
    return {name: np.stack([one.as_arrays()[name] for one in counts]) for name in NAMES}


@pytest.fixture
def written(tmp_path: Path) -> Path:
    """The path of a counts file of two cells."""
    path = tmp_path / "counts/streets-seed0-g1.h5"
    write_counts(path, CELLS, stacked(some_counts(0), some_counts(1)), {"task": "streets-seed0"})
    return path


def test_counts_come_back_to_the_last_bit(written):
    index = read_index(written.with_suffix(".json"))
    assert index.path == written
    assert [index.of_cell(signature) for signature in index.signatures] == CELLS
    assert index.record == {"task": "streets-seed0"}
    assert index.is_whole()
    arrays = read_counts(index)
    assert set(arrays) == set(NAMES)
    for position in (0, 1):
        one = Counts.from_arrays({name: array[position] for name, array in arrays.items()})
        assert one.equals(some_counts(position))


def test_what_is_read_in_one_piece_is_what_hdf5_reads(written):
    index = read_index(written.with_suffix(".json"))
    found = read_counts(index)
    with h5py.File(written) as file:
        by_hdf5 = {name: stored[...] for name, stored in file.items()}
    assert index.arrays.keys() == by_hdf5.keys() == found.keys()
    for name, array in by_hdf5.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)


def test_files_are_read_one_after_the_other_into_the_same_memory(written, tmp_path):
    """As a reduction does: a long one, and then one that fills only half of it."""
    short = tmp_path / "counts/streets-seed1-g1.h5"
    write_counts(short, CELLS[:1], stacked(some_counts(2)), {})
    assert short.stat().st_size < written.stat().st_size
    buffer = bytearray(written.stat().st_size)
    for path, counts in ((written, [some_counts(0), some_counts(1)]), (short, [some_counts(2)])):
        arrays = read_counts(read_index(path.with_suffix(".json")), buffer)
        assert all(np.may_share_memory(array, buffer) for array in arrays.values())
        for name, array in stacked(*counts).items():
            np.testing.assert_array_equal(arrays[name], array)


def test_an_index_has_the_checksums_that_other_programs_compute(written):
    content, data = read_json(written.with_suffix(".json")), written.read_bytes()
    assert content["crc32"] == zlib.crc32(data)
    assert content["sha256"] == hashlib.sha256(data).hexdigest()


def test_equal_counts_are_equal_bytes(written, tmp_path):
    again = tmp_path / "again.h5"
    write_counts(again, CELLS, stacked(some_counts(0), some_counts(1)), {})
    assert again.read_bytes() == written.read_bytes()


def test_any_tool_reads_them(written):
    with h5py.File(written) as file:
        assert file["confusion"].dtype == np.int64
        assert file["confusion"].shape == (2, 3, 3)
        assert file["brier"].shape == (2,)


def test_without_its_index_a_file_counts_for_nothing(tmp_path, written):
    folder = tmp_path / "counts"
    assert sorted(path.name for path in folder.iterdir()) == [
        "streets-seed0-g1.h5",
        "streets-seed0-g1.json",
    ]
    with pytest.raises(FileNotFoundError):
        read_index(folder / "streets-seed0-g2.json")


def test_a_file_cut_short_is_seen_without_reading_it(written):
    index = read_index(written.with_suffix(".json"))
    written.write_bytes(written.read_bytes()[:-1])
    assert not index.is_whole()
    with pytest.raises(
        Damaged, match=rf"{re.escape(str(written))} is missing or cut short; run grid"
    ):
        read_counts(index)


def test_a_missing_file_is_not_whole(written):
    index = read_index(written.with_suffix(".json"))
    written.unlink()
    assert not index.is_whole()
    with pytest.raises(
        Damaged, match=r"is missing or cut short; run grid again to train its cells"
    ):
        read_counts(index)


@pytest.mark.parametrize("place", [0.0, 0.5, 0.99])
def test_a_flipped_bit_anywhere_is_seen_when_it_is_read(written, place):
    content = bytearray(written.read_bytes())
    content[int(place * len(content))] ^= 1
    written.write_bytes(content)
    index = read_index(written.with_suffix(".json"))
    assert index.is_whole()
    with pytest.raises(Damaged, match=rf"{re.escape(str(written))} is damaged"):
        read_counts(index)


def test_a_damaged_index_is_named(written):
    path = written.with_suffix(".json")
    path.write_text(path.read_text().replace('"aa"', '"ab"'))
    with pytest.raises(Damaged, match=rf"{re.escape(str(path))} is damaged"):
        read_index(path)


KILLED = """
import os, signal, sys
from pathlib import Path
import numpy as np
from jobs.spec import counts_file
def die(*arguments):
    os.kill(os.getpid(), signal.SIGKILL)
counts_file.write_json = die
counts_file.write_counts(Path(sys.argv[1]), [{"signature": "aa"}], {"x": np.zeros((1, 9))}, {})
"""


def test_a_job_killed_before_the_index_leaves_no_cell_done(tmp_path):
    path = tmp_path / "counts/t-g1.h5"
    done = subprocess.run([sys.executable, "-c", KILLED, str(path)], cwd=REPOSITORY)
    assert done.returncode == -signal.SIGKILL
    assert [p.name for p in path.parent.iterdir()] == ["t-g1.h5"]
    write_counts(path, CELLS, stacked(some_counts(0), some_counts(1)), {})  # its next start
    assert read_counts(read_index(path.with_suffix(".json")))["nll"].shape == (2,)


FULL = """
import sys
from pathlib import Path
import numpy as np
from hpc.cli import UserError
from jobs.spec.counts_file import read_counts, read_index, write_counts
disk = Path(sys.argv[1])
arrays = {"confusion": np.ones((1, 5_000), np.int64), "nll": np.ones(1, np.int64)}
for free in range(0, 80, 4):
    (disk / "others").write_bytes(bytes((248 - free) << 10))
    path = disk / "t-g1.h5"
    try:
        write_counts(path, [{"signature": "aa"}], arrays, {})
        print(sorted(read_counts(read_index(path.with_suffix(".json")))))
    except UserError as error:
        print(error)
        assert not path.with_suffix(".json").exists()
    for file in disk.iterdir():
        assert not file.name.startswith(".tmp")
        file.unlink()
"""


def test_a_disk_that_gets_full_gives_one_line_wherever_the_writer_is(tmp_path):
    """HDF5 by itself would take the process down."""
    done = on_tiny_disk(FULL, tmp_path, kilobytes=256)
    assert done.returncode == 0, done.stderr
    assert len(lines := done.stdout.splitlines()) == 20
    start = re.escape(f"cannot write {tmp_path}/t-g1.")
    refusal = re.compile(rf"{start}(h5|json): {NO_ROOM}; free space or fix permissions, run again")
    assert all(refusal.fullmatch(line) for line in lines if line != "['confusion', 'nll']")
    assert lines[-1] == "['confusion', 'nll']"  # there was room for it
