"""Broken image files, or files of another format than their name says, are refused in one line."""

from __future__ import annotations

import io
import struct
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from data_prep import images
from data_prep.images import BadFile
from data_prep.pack import pack
from data_prep.shards.manifest import Manifest
from hpc.cli import UserError
from tests.data_prep.conftest import REPOSITORY
from tests.data_prep.test_pack_refusals import _png


def _refused(rooms) -> str:
    with pytest.raises(UserError) as refused:
        pack("rooms", rooms.settings, processes=1)
    message = str(refused.value)
    assert message.isprintable() and not (rooms.shards / "manifest.json").exists()
    return message


def _header(width: int, height: int) -> bytes:
    return struct.pack(">II", width, height) + b"\x08\x02\x00\x00\x00"  # 8 bits, RGB


@pytest.mark.parametrize(("width", "height"), [(0, 5), (5, 0), (0, 0)])
@pytest.mark.parametrize("where", ["train/b.png", "trainannot/b.png"])
def test_a_png_without_pixels(rooms, where, width, height):
    (rooms.root / where).write_bytes(_png(_header(width, height), b""))
    assert f"{where} cannot be read as an image (" in _refused(rooms)


def test_a_decompression_bomb_is_refused_at_once(rooms):
    bomb = _png(_header(60_000, 60_000), bytes(1000))
    (rooms.root / "train" / "b.png").write_bytes(bomb)
    begin = time.monotonic()
    message = _refused(rooms)
    assert "train/b.png cannot be read as an image (Image size (3600000000 pixels) exce" in message
    assert time.monotonic() - begin < 10


@pytest.mark.parametrize("folder", ["train", "trainannot"])
def test_every_byte_of_a_png_is_checked(rooms, folder):
    """Decoding alone skips the CRCs of the pixels, and the chunks after them."""
    path = rooms.root / folder / "b.png"
    whole = path.read_bytes()
    stuck = []
    end = len(whole) - 12  # the closing chunk holds nothing
    for position in range(8, end, 1 if folder == "trainannot" else 97):
        content = bytearray(whole)
        content[position] ^= 0x10
        try:
            if folder == "train":
                images.decode_rgb(bytes(content), str(path))
            else:
                path.write_bytes(content)
                images.read_index_map(path)
            stuck.append(position)
        except BadFile as error:
            assert str(error).startswith(f"{path} ")
    assert stuck == []


@pytest.mark.parametrize("cut", [5, 12, 13, 200])
def test_a_png_that_ends_early_even_after_its_pixels(rooms, cut):
    path = rooms.root / "trainannot" / "b.png"
    path.write_bytes(path.read_bytes()[:-cut])
    assert "trainannot/b.png cannot be read as an image (" in _refused(rooms)


def test_a_broken_file_is_left_out_by_a_setting_of_the_data_set_too(rooms, command_line):
    for name in ("train/a.jpg", "trainannot/b.png"):
        path = rooms.root / name
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    before = rooms.settings.identity()
    rooms.table["skip_bad"] = True
    assert rooms.settings.identity() == before  # good files make the same data set
    code, said, _ = command_line("data_prep.pack", rooms.config(), "--processes", 1)
    assert code == 0
    listed = [line for line in said.splitlines() if line.startswith("  left out: ")]
    assert len(listed) == 2 and "train/a.jpg" in listed[0] and "trainannot/b.png" in listed[1]
    [shard] = Manifest.load(rooms.shards).splits["train"].shards
    assert shard.ids == ("Ä",)


def test_a_file_in_a_format_that_is_not_asked_for_is_no_image(rooms):
    """The suffix does not matter: Pillow would hand an EPS file to Ghostscript."""
    content = io.BytesIO()
    Image.new("RGB", (30, 70)).save(content, "EPS")
    (rooms.root / "train" / "b.png").write_bytes(content.getvalue())
    assert "b.png cannot be read as an image (no known image format)" in _refused(rooms)


def test_a_4_bit_grey_bmp_which_pillow_would_misread(rooms):
    palette = b"".join(bytes([grey, grey, grey, 0]) for grey in range(16))
    begin = 14 + 40 + len(palette)
    rows = bytes(16) * 70  # 30 nibbles, padded
    sizes = struct.pack("<IiiHHIIiiII", 40, 30, 70, 1, 4, 0, len(rows), 0, 0, 16, 16)
    content = b"BM" + struct.pack("<IHHI", begin + len(rows), 0, 0, begin) + sizes + palette + rows
    for folder in ("train", "trainannot"):
        (rooms.root / folder / "b.png").write_bytes(content)
        assert (
            f"{folder}/b.png is a grey BMP of 4 bits per pixel, which is not supported"
            in _refused(rooms)
        )
        rooms.pair("b", (70, 30))


def test_a_colour_space_that_is_no_rgb(rooms):
    path = rooms.root / "train" / "b.png"
    Image.fromarray(np.zeros((70, 30, 3), np.uint8)).convert("LAB").save(path, "TIFF")
    assert "train/b.png" in (message := _refused(rooms)) and "convert it to 8-bit RGB" in message


def test_too_little_memory_is_no_fault_of_a_file(rooms, monkeypatch):
    convert = Image.Image.convert

    def exhausted(image, mode):
        if image.size == (9, 130):
            raise MemoryError
        return convert(image, mode)

    monkeypatch.setattr("PIL.Image.Image.convert", exhausted)
    with pytest.raises(UserError, match=r"not enough memory to decode .*Ä\.png; run again"):
        pack("rooms", rooms.settings, processes=1, skip_bad=True)
    assert not (rooms.shards / "manifest.json").exists()


def test_pillows_warnings_do_not_reach_the_user(rooms):
    """The image is large, but no bomb, and gives its palette's transparency in bytes."""
    path = rooms.image("b.png", (70, 30), "P", transparency=bytes(256))
    code = (
        "from PIL import Image; Image.MAX_IMAGE_PIXELS = 1500\n"
        "import sys, data_prep.images as images\n"
        "images.decode_rgb(open(sys.argv[1], 'rb').read(), 'b')\n"
    )
    line = [sys.executable, "-c", code, str(path)]
    done = subprocess.run(line, cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
