"""A packed data set returns the samples of its source, or names the damaged sample."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zlib
from pathlib import Path

import h5py
import numpy as np
import pytest
from PIL import Image

from data_prep.pack import pack
from data_prep.shards.manifest import Manifest
from data_prep.shards.reader import SplitReader
from hpc.cli import UserError
from hpc.storage.atomic import Damaged


def _source_pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"))


def _source_label(path: Path, void: int) -> np.ndarray:
    values = np.asarray(Image.open(path)).copy()
    values[values == void] = 255
    return values


@pytest.mark.parametrize("codec", ["auto", "raw"])
def test_every_sample_comes_back_as_the_source_has_it(rooms, codec):
    rooms.table["codec"] = codec
    reader = SplitReader(pack("rooms", rooms.settings), "train")

    assert [reader.id(i) for i in range(len(reader))] == ["a", "b", "Ä"]  # bytewise, not by locale
    for i, name in enumerate(("a.jpg", "b.png", "Ä.png")):
        image, label = reader.image(i), reader.label(i)
        np.testing.assert_array_equal(image, _source_pixels(rooms.root / "train" / name))
        stem = Path(name).stem
        source = _source_label(rooms.root / "trainannot" / f"{stem}.png", 11)
        np.testing.assert_array_equal(label, source)
        assert reader.size(i) == label.shape == image.shape[:2]
        assert image.flags.writeable and label.flags.writeable
        assert image.dtype == label.dtype == np.uint8


def test_a_jpeg_keeps_its_own_bytes_and_a_png_is_stored_decoded(rooms):
    pack("rooms", rooms.settings)
    with h5py.File(rooms.shard("train-00000")) as file:
        arena, index = file["pixels"][:].tobytes(), file["index"][:]
        assert file["pixels"].chunks is None and file["labels"].chunks is None
    jpeg, png = index[0], index[1]
    begin, size = int(jpeg["pixels_offset"]), int(jpeg["pixels_size"])
    assert arena[begin : begin + size] == (rooms.root / "train" / "a.jpg").read_bytes()
    begin, size = int(png["pixels_offset"]), int(png["pixels_size"])
    assert arena[begin : begin + size] == _source_pixels(rooms.root / "train" / "b.png").tobytes()


def test_the_index_holds_the_crc_of_each_band_of_64_rows(rooms):
    pack("rooms", rooms.settings)
    with h5py.File(rooms.shard("train-00000")) as file:
        found = file["labels_crc"][:].tolist()
    tall = _source_label(rooms.root / "trainannot" / "Ä.png", 11)  # 130 rows: three bands
    assert found[-3:] == [zlib.crc32(tall[row : row + 64].tobytes()) for row in (0, 64, 128)]
    assert len(found) == 1 + 2 + 3


@pytest.mark.parametrize("codec", ["auto", "raw"])
def test_a_window_of_rows_equals_the_rows_of_the_whole(rooms, codec):
    rooms.table["codec"] = codec
    reader = SplitReader(pack("rooms", rooms.settings), "train")
    for i in range(len(reader)):
        height = reader.size(i)[0]
        for rows in ((0, height), (3, 17), (height - 1, height), (height // 2, height)):
            np.testing.assert_array_equal(reader.image(i, rows), reader.image(i)[slice(*rows)])
            np.testing.assert_array_equal(reader.label(i, rows), reader.label(i)[slice(*rows)])


def test_the_manifest_counts_the_source_s_pixels(rooms):
    rooms.table["shard_mb"] = 1
    pack("rooms", rooms.settings)
    manifest = Manifest.load(rooms.shards)
    labels = [_source_label(p, 11) for p in (rooms.root / "trainannot").iterdir()]
    counts = sum(np.bincount(label.reshape(-1), minlength=256) for label in labels)
    train = manifest.splits["train"]
    assert manifest.classes == ("wall", "floor", "door")
    assert (train.images, manifest.splits["val"].images) == (3, 1)
    assert train.class_pixels == tuple(counts[:3]) and train.void_pixels == counts[255]
    assert train.shards[0].sizes == ((20, 31), (70, 30), (130, 9))


def test_a_flipped_byte_is_found_with_file_and_sample(rooms):
    manifest = pack("rooms", rooms.settings)
    path = rooms.shard("train-00000")
    with h5py.File(path) as file:
        labels = file["labels"].id.get_offset() + int(file["index"][1]["labels_offset"])
        pixels = file["pixels"].id.get_offset() + int(file["index"][0]["pixels_offset"])
    for position in (labels + 65 * 30, pixels + 40):
        with path.open("r+b") as file:
            file.seek(position)
            byte = file.read(1)[0]
            file.seek(position)
            file.write(bytes([byte ^ 1]))

    reader = SplitReader(manifest, "train")
    with pytest.raises(Damaged, match=r"00000-\w+\.h5: label map 'b' is damaged .*rows 64 to 69"):
        reader.label(1)
    with pytest.raises(Damaged, match=r"train-00000-\w+\.h5: image 'a' .*data_prep\.pack"):
        reader.image(0)
    assert reader.label(1, rows=(0, 64)).shape == (64, 30)  # the damage is in the other band
    reader.image(1)


def test_a_shard_cut_short_is_damaged_and_no_crash(rooms):
    manifest = pack("rooms", rooms.settings)
    path = rooms.shard("train-00000")
    reader = SplitReader(manifest, "train")
    reader.label(0)  # opened while whole
    os.truncate(path, 4096)
    with pytest.raises(Damaged, match=r"image 'Ä' is damaged \(the file ends .* bytes early"):
        reader.image(2)
    with pytest.raises(Damaged, match=r"train-00000-\w+\.h5 has 4096 bytes instead of"):
        SplitReader(manifest, "train").image(0)


def test_a_shard_of_another_packing_is_refused(rooms):
    manifest = pack("rooms", rooms.settings)
    rooms.label("a.png", (20, 31), values=(0, 1))
    [other] = pack("rooms", rooms.settings).splits["train"].shards
    [shard] = manifest.splits["train"].shards
    shutil.copy(rooms.shards / other.file, rooms.shards / shard.file)
    with pytest.raises(Damaged, match="not the shard that the manifest describes"):
        SplitReader(manifest, "train").label(0)


def test_a_reader_serves_forked_loader_processes(rooms):
    reader = SplitReader(pack("rooms", rooms.settings), "train")
    expected = reader.label(2)  # opened here, before the fork
    child = os.fork()
    if child == 0:
        os._exit(0 if np.array_equal(reader.label(2), expected) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    with pytest.raises(IndexError):
        reader.image(3)


def test_the_manifest_is_the_same_for_the_same_source_wherever_it_lies(rooms, tmp_path):
    first = pack("rooms", rooms.settings)
    rooms.table["shards"] = str(tmp_path / "elsewhere")
    for file in (rooms.root / "train").iterdir():
        os.utime(file, (1, 1))
    second = pack("renamed", rooms.settings)
    assert second.fingerprint == first.fingerprint == Manifest.load(rooms.shards).fingerprint
    rooms.label("a.png", (20, 31), values=(0, 1))
    assert pack("rooms", rooms.settings).fingerprint != first.fingerprint


def test_a_missing_manifest_names_the_command_that_makes_one(tmp_path):
    with pytest.raises(UserError, match=r"no manifest\.json.*python -m data_prep\.pack"):
        Manifest.load(tmp_path)


def test_a_damaged_manifest_is_refused(rooms):
    pack("rooms", rooms.settings)
    path = rooms.shards / "manifest.json"
    path.write_text(path.read_text().replace('"images"', '"image"').replace("30", "31", 1))
    with pytest.raises(Damaged, match=r"manifest\.json"):
        Manifest.load(rooms.shards)


def test_planning_reads_the_manifest_without_heavy_libraries():
    code = (
        "import sys, data_prep.shards.manifest, data_prep.settings\n"
        "print([m for m in ('torch', 'h5py', 'mpi4py', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
