"""An image file of any bytes is read as its content, or refused in one line that
names it, and soon."""

from __future__ import annotations

import struct
import time
import zlib

import numpy as np
import pytest
from hypothesis import strategies as st

from data_prep.images import BadFile, decode_rgb, read_header, read_index_map
from data_prep.pack import pack
from data_prep.settings import parse_dataset
from data_prep.shards.reader import SplitReader
from tests.fuzz import pictures
from tests.fuzz.cases import fuzzed
from tests.fuzz.damage import DAMAGES, Damage
from tests.fuzz.pictures import Picture

# as in a program, where data_prep.images sees to it
pytestmark = pytest.mark.filterwarnings("ignore:::PIL")
SEEDS = st.integers(0, 2**32 - 1)
PICTURES = st.one_of(
    st.builds(
        lambda seed, kind, interlaced: pictures.png(seed, *kind, interlaced),
        SEEDS,
        st.sampled_from(pictures.PNG_KINDS),
        st.booleans(),
    ),
    st.builds(
        lambda seed, kind: pictures.other(seed, *kind),
        SEEDS,
        st.sampled_from(pictures.OTHER_KINDS),
    ),
)
SIGNATURES = [
    b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0\x00\x10JFIF\x00", b"BM", b"II*\x00", b"MM\x00*",
    b"II+\x00\x08\x00", b"RIFF\x00\x01\x00\x00WEBPVP8L", b"GIF89a", b"%!PS-Adobe-3.0 EPSF-3.0\n",
    b"8BPS\x00\x01", b"P6 ", b"\x89HDF\r\n\x1a\n", b"",
]  # fmt: skip
KINDS = [b"\x08\x02\0\0\0", b"\x08\x00\0\0\0", b"\x08\x03\0\0\1"]
SOON = 10.0  # seconds


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("image") / "name.png"


def decode(path):
    return decode_rgb(path.read_bytes(), str(path))


def read_everything(path):
    """RGB and label map of the file, None where it is refused in one line; what is read has the
    header's size."""
    begin = time.monotonic()
    found = []
    for read in (read_header, decode, read_index_map):
        try:
            found.append(read(path))
        except BadFile as error:
            assert str(path) in str(error) and "\n" not in str(error)
            found.append(None)
    header, rgb, labels = found
    for array, channels in ((rgb, (3,)), (labels, ())):
        if array is not None:
            assert array.dtype == np.uint8 and array.size > 0
            assert header is None or array.shape == (header.height, header.width, *channels)
    assert rgb is None or header is not None
    assert time.monotonic() - begin < SOON
    return rgb, labels


@fuzzed(0.05, picture=PICTURES)
def test_a_whole_file_is_read_as_what_it_holds(path, picture: Picture):
    path.write_bytes(picture.content)
    for array, expected in zip(read_everything(path), (picture.rgb, picture.labels), strict=True):
        if expected is None:
            assert array is None
        else:
            np.testing.assert_array_equal(array, expected)


@fuzzed(0.15, picture=PICTURES, damage=DAMAGES, again=st.none() | DAMAGES)
def test_a_damaged_file_is_refused_or_an_image(path, picture: Picture, damage: Damage, again):
    found = damage(picture.content)
    if again and found:
        found = again(found)
    path.write_bytes(found)
    rgb, labels = read_everything(path)
    if picture.content.startswith(pictures.png_file(b"", b"")[:8]):  # whose every byte is checked
        for array, expected in ((rgb, picture.rgb), (labels, picture.labels)):
            if array is not None:
                np.testing.assert_array_equal(array, expected)


@fuzzed(
    0.05,
    sizes=st.tuples(*[st.integers(0, 20) | st.integers(0, 2**32 - 1)] * 2),
    kind=st.binary(min_size=5, max_size=5) | st.sampled_from(KINDS),
    pixels=st.binary(max_size=200),
)
def test_a_png_of_any_header_is_refused_or_an_image(path, sizes, kind, pixels):
    header = struct.pack(">II", *sizes) + kind
    path.write_bytes(pictures.png_file(header, zlib.compress(pixels)))
    read_everything(path)


@fuzzed(0.03, begin=st.sampled_from(SIGNATURES), rest=st.binary(max_size=300))
def test_any_bytes_are_refused_or_an_image(path, begin, rest):
    path.write_bytes(begin + rest)
    read_everything(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A data set with one good image in each split."""
    root = tmp_path_factory.mktemp("folder")
    for name in ("train", "trainannot", "val", "valannot"):
        (root / name).mkdir()
        (root / name / "good.png").write_bytes(pictures.png(1, 8, pictures.PALETTE, False).content)
    return root


@fuzzed(
    0.02,
    image=PICTURES,
    label=st.builds(pictures.png, SEEDS, st.just(8), st.just(pictures.GREY), st.booleans()),
    damage=st.none() | DAMAGES,
)
def test_packing_leaves_out_what_is_bad_and_packs_the_rest(folder, image, label, damage):
    content = damage(image.content) if damage else image.content
    (folder / "train" / "one.png").write_bytes(content)
    (folder / "trainannot" / "one.png").write_bytes(label.content)
    table = {"source": "folder", "root": str(folder), "shards": str(folder / "shards")}
    classes = [str(number) for number in range(255)]
    settings = parse_dataset("d", {**table, "classes": classes}, "grid.toml")
    manifest = pack("d", settings, skip_bad=True, processes=1)
    train, reader = manifest.splits["train"], SplitReader(manifest, "train")
    if train.left_out:
        [message] = train.left_out
        assert "/one.png" in message and "\n" not in message
    assert reader.id(0) == "good" and len(reader) == 2 - len(train.left_out)
    expected = [pictures.png(1, 8, pictures.PALETTE, False).rgb]
    if len(reader) == 2:
        assert damage or image.rgb is not None
        expected.append(decode_rgb(content, "one"))
        np.testing.assert_array_equal(reader.label(1), label.labels)
    for k, pixels in enumerate(expected):
        np.testing.assert_array_equal(reader.image(k), pixels)
