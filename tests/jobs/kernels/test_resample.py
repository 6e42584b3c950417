"""The window of a resized image is, byte for byte, that of Pillow's resize of the whole."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data_prep.shards.reader import SplitReader
from jobs.data.batches import Draw, augment, augmented_sample
from jobs.kernels.resample import Span, Window
from jobs.spec.protocol import Protocol

SEEDS = st.integers(0, 2**32 - 1)


@st.composite
def spans(draw, longest=90):
    """Any part of an axis, which was shortened, lengthened or left as it was."""
    length = draw(st.integers(1, longest))
    resized = draw(st.one_of(st.just(length), st.integers(1, 2 * longest)))
    start = draw(st.integers(0, resized - 1))
    return Span(length, resized, start, draw(st.integers(start + 1, resized)), draw(st.booleans()))


def picture(height: int, width: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """An image and a label map of noise; some images are black and white, where sums overflow."""
    chance = np.random.default_rng(seed)
    image = chance.integers(256, size=(height, width, 3), dtype=np.uint8)
    label = chance.integers(256, size=(height, width), dtype=np.uint8)
    return (image if seed % 3 else image // 128 * 255), label


def pillows(pixels: np.ndarray, rows: Span, columns: Span, how: Image.Resampling) -> np.ndarray:
    """The same window of Pillow's whole."""
    whole = Image.fromarray(pixels).resize((columns.resized, rows.resized), how)
    window = np.asarray(whole)[rows.start : rows.stop, columns.start : columns.stop]
    return window[:: -1 if rows.mirrored else 1, :: -1 if columns.mirrored else 1]


def assert_as_pillow(rows: Span, columns: Span, seed: int) -> None:
    image, label = picture(rows.length, columns.length, seed)
    window = Window(rows, columns)
    read = slice(*window.source_rows)
    bilinear = pillows(image, rows, columns, Image.Resampling.BILINEAR)
    nearest = pillows(label, rows, columns, Image.Resampling.NEAREST)
    np.testing.assert_array_equal(window.of_image(image[read]).transpose(1, 2, 0), bilinear)
    np.testing.assert_array_equal(window.of_label(label[read]), nearest)


@settings(max_examples=1500, deadline=None, derandomize=True)
@given(rows=spans(), columns=spans(), seed=SEEDS)
def test_a_window_of_any_resize_is_that_of_pillow(rows, columns, seed):
    assert_as_pillow(rows, columns, seed)


@pytest.mark.parametrize("size", [(1024, 2048), (360, 480), (500, 333), (1200, 310)])
@pytest.mark.parametrize("scale", [0.23, 0.71, 1.0, 1.9])
def test_so_it_is_at_the_sizes_of_real_pictures(size, scale):
    """Rounding errors of positions add up along such axes."""
    height, width = size
    rows = Span(height, round(height * scale), round(height * scale) - 60, round(height * scale))
    columns = Span(width, round(width * scale), round(width * scale) - 50, round(width * scale))
    assert_as_pillow(rows, columns, seed=1)


def test_only_the_rows_that_the_window_depends_on_are_read():
    """All others may be anything, and there are few of them."""
    window = Window(Span(1000, 500, 100, 140), Span(80, 40, 0, 40))
    first, stop = window.source_rows
    assert (first, stop) == (199, 281)  # 200 to 279, and a neighbour on either side


def test_pixels_that_may_not_be_written_to_are_read():
    """As a decoder hands them out."""
    image, _ = picture(20, 30, 1)
    rows, columns = Span(20, 12, 0, 12), Span(30, 18, 3, 9)
    image.setflags(write=False)
    expected = pillows(image, rows, columns, Image.Resampling.BILINEAR)
    found = Window(rows, columns).of_image(image).transpose(1, 2, 0)
    np.testing.assert_array_equal(found, expected)


def test_where_nothing_can_be_kept_each_process_compiles_for_itself(tmp_path):
    """On a full disk, and where neither the program's folder nor a home may be written to."""
    code = (
        "from jobs.kernels.resample import *; "
        "print(Window(Span(9, 5, 0, 5), Span(9, 5, 0, 5)).shape)"
    )
    blocked = tmp_path / "file"
    blocked.touch()
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "NUMBA_CACHE_DIR": str(blocked)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "(5, 5)\n"), done.stderr


@pytest.mark.parametrize("ending", [".nbi", ".nbc"])
def test_a_kept_kernel_that_was_cut_short_is_compiled_anew(tmp_path, ending):
    """numba does not sync what it keeps, so that is what a node that crashes may leave."""
    code = (
        "from jobs.kernels.numba_compile import *\n"
        "@compiled(types.int64(types.int64))\ndef one_more(x):\n"
    )
    (tmp_path / "kernel.py").write_text(f"{code}    return x + 1\nprint(one_more(1))\n")
    kept = tmp_path / "kept"
    line, environ = [sys.executable, str(tmp_path / "kernel.py")], {**os.environ,
            "NUMBA_CACHE_DIR": str(kept), "PYTHONPATH": os.pathsep.join(sys.path)}  # fmt: skip
    for _ in range(2):
        done = subprocess.run(line, env=environ, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout) == (0, "2\n"), done.stderr
        (path,) = kept.rglob(f"*{ending}")
        path.write_bytes(path.read_bytes()[:40])


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    resize=st.tuples(st.integers(1, 80), st.integers(0, 40)),
    crop=st.tuples(st.integers(1, 90), st.integers(1, 90)),
    seed=SEEDS,
)
def test_a_sample_is_what_the_plain_way_makes_of_the_whole_picture(streets, resize, crop, seed):
    reader = SplitReader(streets, "train")
    protocol = Protocol(resize=(resize[0], sum(resize)), crop=crop, flip=0.5)
    for sample in range(3):
        image, label = augmented_sample(reader, sample, protocol, Draw(seed, 0, sample))
        whole = reader.image(sample), reader.label(sample)
        expected_image, expected_label = augment(*whole, protocol, Draw(seed, 0, sample))
        np.testing.assert_array_equal(image.transpose(1, 2, 0), expected_image)
        np.testing.assert_array_equal(label, expected_label)


def test_a_sample_is_the_same_in_arrays_that_held_another(streets):
    """A crop that reaches beyond its picture shows nothing of the other sample."""
    reader = SplitReader(streets, "train")
    protocol = Protocol(resize=(20, 60), crop=(48, 70), flip=0.5)
    used = np.full((3, 48, 70), 7, np.uint8), np.full((48, 70), 7, np.uint8)
    for sample in range(8):
        fresh = augmented_sample(reader, sample, protocol, Draw(1, 0, sample))
        found = augmented_sample(reader, sample, protocol, Draw(1, 0, sample), used)
        assert found[0] is used[0] and found[1] is used[1]
        np.testing.assert_array_equal(found[0], fresh[0])
        np.testing.assert_array_equal(found[1], fresh[1])
