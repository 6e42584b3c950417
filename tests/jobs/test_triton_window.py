"""The window of a resized image is made on a GPU of the same integers as on the processor. Where
there is none, Triton's interpreter runs the kernel, and its compiler translates it for GPUs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from PIL import Image

from data_prep.settings import VOID
from data_prep.shards import SplitReader
from jobs.batches import TrainingBatches, UnresizedBatch
from jobs.crop_window import Span
from jobs.loaders import load_steps
from jobs.protocol import Protocol
from tests.jobs import interpreted
from tests.jobs.small_runs import assert_all_same, grid_of, results, task_of
from tests.jobs.test_crop_window import SEEDS, picture, pillows, spans
from tests.jobs.translated import as_on


@pytest.fixture(scope="module")
def process():
    with interpreted.interpreter() as process:
        yield process


@pytest.mark.parametrize(
    ("rows", "columns"),
    [
        (Span(90, 20, 3, 19), Span(60, 50, 0, 33)),  # Pillow resizes rows first
        (Span(60, 50, 0, 33), Span(90, 20, 3, 19, mirrored=True)),
        (Span(40, 77, 5, 77), Span(40, 40, 10, 30)),
    ],
)
@pytest.mark.parametrize("seed", [0, 1])  # black and white, and colours
def test_a_window_of_a_resize_is_that_of_pillow(process, rows, columns, seed):
    assert_as_pillow(process, rows, columns, seed, beyond=2)


# what fails is not made smaller: the interpreter is slow
@settings(max_examples=80, deadline=None, derandomize=True, phases=[Phase.generate])
@given(rows=spans(50), columns=spans(50), seed=SEEDS, beyond=st.integers(0, 3))
def test_so_it_is_of_any_resize(process, rows, columns, seed, beyond):
    assert_as_pillow(process, rows, columns, seed, beyond)


def assert_as_pillow(process, rows, columns, seed, beyond):
    """And what a crop shows `beyond` the picture is black and void."""
    image, label = picture(rows.length, columns.length, seed)
    height, width = (span.stop - span.start for span in (rows, columns))
    given = image, label, rows, columns, (height + beyond, width + beyond)
    (found,), (labels,) = process.submit(interpreted.resized, *given).result()
    inside = np.s_[:height, :width]
    bilinear = pillows(image, rows, columns, Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(found.transpose(1, 2, 0)[inside], bilinear)
    nearest = pillows(label, rows, columns, Image.Resampling.NEAREST)
    np.testing.assert_array_equal(labels[inside], nearest)
    assert not found[:, height:].any() and not found[:, :, width:].any()
    assert (labels[height:] == VOID).all() and (labels[:, width:] == VOID).all()


@pytest.mark.parametrize("shares", [(0, 1), (0, 2), (1, 2), (0, 5)])  # rank, ranks
def test_a_batch_is_that_of_the_processor(process, streets, shares):
    """Also of a rank that has no image of it."""
    settings = {"batch_size": 4, "resize": (20, 60), "crop": (48, 52), "flip": 0.5}
    steps, reader = range(5), SplitReader(streets, "train")
    here = TrainingBatches(reader, Protocol(**settings), 0, *shares)
    there = Protocol(**settings, augment_on="gpu")
    found = process.submit(interpreted.batches, streets.folder, there, steps, *shares).result()
    for step, (images, target) in zip(steps, found, strict=True):
        np.testing.assert_array_equal(images, here[step].images.numpy())
        np.testing.assert_array_equal(target, here[step].target.numpy())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
def test_on_a_real_gpu_too(streets):
    settings = {"batch_size": 4, "resize": (20, 60), "crop": (48, 52), "flip": 0.5}
    reader = SplitReader(streets, "train")
    ways = [TrainingBatches(reader, Protocol(**settings, augment_on=where), 0, 0, 1)
            for where in ("cpu", "gpu")]  # fmt: skip
    for here, there in zip(*(load_steps(batches, 0, 12, 1) for batches in ways), strict=True):
        assert isinstance(there, UnresizedBatch)
        made = there.to(torch.device("cuda"))
        assert torch.equal(made.images.cpu(), here.images)
        assert torch.equal(made.target.cpu(), here.target)


@pytest.mark.parametrize("capability", [70, 80, 90])  # V100, A100, H100
def test_it_compiles_for_gpus(streets, capability, tmp_path):
    """Not for each size anew."""
    protocol = Protocol(batch_size=4, resize=(20, 60), crop=(48, 52), augment_on="gpu")
    batches = TrainingBatches(SplitReader(streets, "train"), protocol, 0, 0, 1)
    with as_on(capability, tmp_path) as compiled:
        for step in range(10):
            batches[step].to(torch.device("cpu"))
    assert 1 <= len(compiled) <= 4
    for kernel in compiled:
        assert kernel.asm["cubin"].startswith(b"\x7fELF")
        assert f".target sm_{capability}" in kernel.asm["ptx"]


def test_a_grid_trains_to_the_same_bits(process, streets, tmp_path):
    """With loader processes, which only read; and its cells are the same to whoever asks."""
    found, signatures = [], []
    for where in ("cpu", "gpu"):
        settings = {"epochs": 1, "workers": 2, "augment_on": where}
        grid = grid_of(tmp_path / where, streets.folder, "CE", **settings)
        assert process.submit(interpreted.train, task_of(grid)).result() == 0
        found.append(results(grid.run))
        signatures.append([cell.signature for cell in grid.cells])
    assert_all_same(*found)
    assert signatures[0] == signatures[1]
