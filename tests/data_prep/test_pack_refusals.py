"""An error in a source is reported in one line that names the file and the remedy."""

from __future__ import annotations

import shutil
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from data_prep.pack import pack
from data_prep.shards.manifest import Manifest
from data_prep.shards.reader import SplitReader
from hpc.cli import UserError


def _refusal(rooms) -> str:
    with pytest.raises(UserError) as refused:
        pack("rooms", rooms.settings)
    assert not (rooms.shards / "manifest.json").exists()
    message = str(refused.value)
    assert "\n" not in message
    return message


def test_image_and_label_map_of_different_size(rooms):
    rooms.label("b.png", (70, 29))
    message = _refusal(rooms)
    assert "train/b.png is 30 x 70 but its label map" in message
    assert "trainannot/b.png is 29 x 70" in message


def test_a_label_value_outside_the_classes(rooms):
    rooms.label("b.png", (70, 30), values=(0, 1, 7))
    message = _refusal(rooms)
    assert (
        "trainannot/b.png holds the label value 7, but classes are 0 to 2 and void is 11" in message
    )


def test_255_is_void_only_where_the_data_set_says_so(rooms):
    rooms.label("b.png", (70, 30), values=(0, 255))
    assert "holds the label value 255" in _refusal(rooms)
    rooms.table["void"] = 255
    for stem, size in (("a", (20, 31)), ("b", (70, 30)), ("Ä", (130, 9))):
        rooms.label(f"{stem}.png", size, values=(0, 1, 255))
    rooms.label("v.png", values=(1, 2), split="val")
    assert pack("rooms", rooms.settings).splits["train"].void_pixels > 0


@pytest.mark.parametrize("name", ["a.jpg", "b.png"])
def test_a_truncated_image(rooms, name):
    path = rooms.root / "train" / name
    path.write_bytes(path.read_bytes()[:-200])
    message = _refusal(rooms)
    assert f"train/{name} cannot be read as an image (" in message and "replace" in message


def test_no_image_at_all(rooms):
    (rooms.root / "train" / "b.png").write_bytes(b"")
    assert "b.png cannot be read as an image (no known image format)" in _refusal(rooms)


def test_sixteen_bit_images(rooms):
    deep = np.full((70, 30), 4000, np.uint16)
    Image.fromarray(deep).save(rooms.root / "train" / "b.png")
    assert "train/b.png has more than 8 bits per channel" in _refusal(rooms)


def test_sixteen_bit_rgb_is_refused_although_pillow_reads_it(rooms):
    header = b"\x00\x00\x00\x02\x00\x00\x00\x02\x10\x02\x00\x00\x00"  # 2 x 2, 16 bits, RGB
    rows = (b"\x00" + bytes(range(12))) * 2
    path = rooms.root / "train" / "b.png"
    path.write_bytes(_png(header, rows))
    rooms.label("b.png", (2, 2))
    assert "more than 8 bits per channel (mode RGB;16B)" in _refusal(rooms)


@pytest.mark.parametrize(("mode", "name"), [("RGB", "b.png"), ("I;16", "b.png"), ("1", "b.png")])
def test_a_label_map_that_holds_no_8_bit_indices(rooms, mode, name):
    Image.new(mode, (30, 70)).save(rooms.root / "trainannot" / name)
    message = _refusal(rooms)
    assert f"trainannot/{name} is not a label map: it must have one channel of 8 bits" in message


def test_a_4_bit_grey_label_map_is_refused_since_pillow_scales_it(rooms):
    header = b"\x00\x00\x00\x02\x00\x00\x00\x02\x04\x00\x00\x00\x00"  # 2 x 2, 4 bits, grey
    (rooms.root / "trainannot" / "b.png").write_bytes(_png(header, b"\x00\x01\x00\x12"))
    rooms.image("b.png", (2, 2))
    assert "not mode L;4" in _refusal(rooms)


def test_a_label_map_saved_as_jpeg(rooms):
    (rooms.root / "trainannot" / "b.png").unlink()
    Image.new("L", (30, 70)).save(rooms.root / "trainannot" / "b.jpg")
    assert "JPEG does not keep label values; save label maps as PNG" in _refusal(rooms)


def test_codec_encoded_refuses_an_image_that_is_no_jpeg(rooms):
    rooms.table["codec"] = "encoded"
    assert 'codec = "encoded" requires; set codec = "auto"' in _refusal(rooms)


def test_a_palette_image_is_a_label_map_of_its_indices(rooms):
    path = rooms.root / "trainannot" / "b.png"
    indices = np.asarray(Image.open(path))
    coloured = Image.fromarray(indices, "P")
    coloured.putpalette([200, 10, 10, 0, 0, 0, 9, 9, 9] + [5] * 759)
    coloured.save(path)
    reader = SplitReader(pack("rooms", rooms.settings), "train")
    np.testing.assert_array_equal(reader.label(1), np.where(indices == 11, 255, indices))


@pytest.mark.parametrize(
    ("mode", "name"),
    [("L", "b.png"), ("P", "b.png"), ("RGBA", "b.png"), ("LA", "b.png"), ("CMYK", "b.jpg"),
     ("L", "b.jpg"), ("RGB", "b.bmp"), ("RGB", "b.TIF")],
)  # fmt: skip
def test_other_modes_become_rgb(rooms, mode, name):
    (rooms.root / "train" / "b.png").unlink()
    path = rooms.image(name, (70, 30), mode)
    reader = SplitReader(pack("rooms", rooms.settings), "train")
    np.testing.assert_array_equal(reader.image(1), np.asarray(Image.open(path).convert("RGB")))


def test_a_rotation_in_exif_is_ignored_as_label_maps_do(rooms):
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    path = rooms.image("a.jpg", (20, 31), exif=exif)
    reader = SplitReader(pack("rooms", rooms.settings), "train")
    np.testing.assert_array_equal(reader.image(0), np.asarray(Image.open(path).convert("RGB")))


def test_all_bad_files_are_counted_and_can_be_left_out(rooms, command):
    rooms.label("b.png", (70, 30), values=(9,))
    rooms.label("Ä.png", (130, 8))
    (rooms.root / "train" / "a.jpg").write_bytes(b"no picture")
    rooms.pair("c")
    assert "a.jpg cannot be read" in (message := _refusal(rooms))
    assert message.endswith(
        "(and 2 more bad files); --skip-bad, or skip_bad = true in [dataset.rooms], packs the rest"
    )

    done = command("data_prep.pack", rooms.config(), "--skip-bad")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("left out: ") == 3
    train = Manifest.load(rooms.shards).splits["train"]
    assert [shard.ids for shard in train.shards] == [("c",)]
    assert len(train.left_out) == 3 and "label value 9" in train.left_out[1]
    assert pack("rooms", rooms.settings).splits["train"] == train  # that was agreed to


def test_nothing_left_of_a_split(rooms):
    rooms.label("v.png", (1, 1), split="val")
    with pytest.raises(UserError, match=r"no sample of val is left; .*val/v\.png is 30 x 20"):
        pack("rooms", rooms.settings, skip_bad=True)


def test_a_missing_folder(rooms):
    shutil.rmtree(rooms.root / "valannot")
    assert "valannot: No such file or directory; check root" in _refusal(rooms)


def test_unpaired_files_are_named_and_counted(rooms):
    for stem in "edcfg":
        rooms.image(f"{stem}.png")
    message = _refusal(rooms)
    assert message.startswith("c.png, d.png, e.png and 2 more in ")
    assert "no label map of the same stem in" in message
    rooms.label("only.png", split="val")
    for stem in "edcfg":
        (rooms.root / "train" / f"{stem}.png").unlink()
    assert "only.png" in (message := _refusal(rooms)) and "no image of the same stem" in message


def test_two_images_of_one_stem(rooms):
    rooms.image("b.jpg", (70, 30))
    message = _refusal(rooms)
    assert (
        "b.jpg and b.png have the same stem; keep one; if one is a label map, move it to" in message
    )
    assert message.endswith("/trainannot")


def test_images_and_label_maps_in_one_folder(rooms):
    rooms.table["train_labels"] = "val/../train"
    assert _refusal(rooms) == (
        f"{rooms.root}/train is the folder of both images and label maps of train; move the label "
        "maps to a folder of their own, and name it in train_labels"
    )


def test_label_maps_in_a_format_that_is_not_read(rooms):
    for stem in "ab":
        path = rooms.root / "trainannot" / f"{stem}.png"
        Image.open(path).save(path.with_suffix(".gif"))
        path.unlink()
    assert _refusal(rooms) == (
        f"a.jpg, b.png in {rooms.root}/train: no label map of the same stem in "
        f"{rooms.root}/trainannot; a.gif and 1 more are there, in a format that is not read: save "
        "label maps as PNG"
    )


def test_a_folder_without_images(rooms):
    (rooms.root / "val" / "v.png").rename(rooms.root / "val" / "v.gif")
    message = _refusal(rooms)
    assert "val holds no images (.jpg, " in message
    assert message.endswith(
        "); v.gif is there, in a format that is not read: save images as PNG or JPEG"
    )


def test_a_refusal_is_one_line_and_exit_code_2(rooms, command):
    rooms.label("b.png", (70, 29))
    done = command("data_prep.pack", rooms.config())
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: ")
    assert "Traceback" not in done.stderr


def _png(header: bytes, rows: bytes) -> bytes:
    """Return a PNG file of the given header and filtered rows."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    parts = chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)
