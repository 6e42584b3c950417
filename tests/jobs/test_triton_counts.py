"""Counting on a GPU gives the bits of counting on the processor. Where there is none, Triton's
interpreter runs the kernel, and its compiler translates it for GPUs."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from jobs.counts_file import read_index
from jobs.fused_counts import count_upsampled
from tests.jobs import interpreted
from tests.jobs.small_runs import assert_all_same, grid_of, results, task_of
from tests.jobs.test_fused_counts import CASES, SHAPES, VOID, an_image
from tests.jobs.translated import as_on


@pytest.fixture(scope="module")
def process():
    with interpreted.interpreter() as process:
        yield process


@pytest.fixture(scope="module")
def on_gpu(process):
    """Counts as the GPU's kernel does."""

    def count(logits, target, bins, block=None):
        given = logits.numpy(), target.numpy(), bins, block
        return process.submit(interpreted.count, *given).result()

    return count


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "-".join(map(str, shape)))
def test_its_counts_are_those_of_the_processor_to_the_bit(on_gpu, shape):
    *image, bins = shape
    logits, target = an_image(*image)
    assert on_gpu(logits, target, bins).equals(count_upsampled(logits, target, bins))


# what fails is not made smaller: the interpreter is slow
@settings(max_examples=40, deadline=None, derandomize=True, phases=[Phase.generate])
@given(
    classes=st.integers(1, 6),
    size=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    pixels=st.tuples(st.integers(1, 30), st.integers(1, 30)),
    scale=st.sampled_from([1e-3, 1.0, 30.0, 1e30]),
    bins=st.integers(1, 100),
    seed=st.integers(0, 2**32 - 1),
)
def test_so_they_are_for_any_sizes(on_gpu, classes, size, pixels, scale, bins, seed):
    logits, target = an_image(classes, size, pixels, scale, seed)
    assert on_gpu(logits, target, bins).equals(count_upsampled(logits, target, bins))


@pytest.mark.parametrize(("block", "pixels"), [(32, (11, 21)), (4096, (41, 101))])
def test_any_number_of_pixels_may_be_counted_at_once(on_gpu, block, pixels):
    """The largest is one whose scores, all of one class, just fit into a part of an integer."""
    for classes in (1, 3):
        logits, target = an_image(classes, (5, 7), pixels, 3.0, void=0)
        assert on_gpu(logits, target, 10, block).equals(count_upsampled(logits, target, 10))


def test_where_classes_tie_the_lowest_is_the_prediction(on_gpu):
    logits, target = an_image(3, (5, 7), (40, 56), 3.0, void=0)
    confusion = on_gpu(torch.cat([logits, logits, logits]), target, 10).confusion
    assert not confusion[:, 3:].any() and confusion.sum() == target.numel()


def test_logits_as_far_apart_as_float32_has_them(on_gpu):
    logits = torch.tensor([[[3e38]], [[-3e38]]])
    target = torch.tensor([[0, 1, VOID]], dtype=torch.uint8)
    assert on_gpu(logits, target, 10).equals(count_upsampled(logits, target, 10))


def test_half_precision_logits_are_counted_in_float32(on_gpu):
    logits, target = an_image(5, (5, 7), (40, 56), 3.0)
    half = logits.half()
    assert on_gpu(half, target, 10).equals(count_upsampled(half, target, 10))


def test_what_the_processor_refuses_is_refused(on_gpu):
    logits, target = an_image(5, (5, 7), (40, 56), 3.0)
    with pytest.raises(ValueError, match="label 5 is neither one of 5 classes nor void"):
        on_gpu(logits, torch.where(target == 3, 5, target).to(torch.uint8), 10)
    logits[2, 3, 4] = np.nan
    with pytest.raises(ValueError, match="nan or infinity"):
        on_gpu(logits, target, 10)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_on_a_real_gpu_too(case):
    from jobs.triton_counts import count_on_gpu

    *image, bins, seed = case
    logits, target = an_image(*image, seed)
    found = count_on_gpu(logits.cuda(), target, bins)
    assert found.equals(count_upsampled(logits, target, bins))


@pytest.mark.parametrize("capability", [70, 80, 90])  # V100, A100, H100
def test_it_compiles_for_gpus_and_rounds_there_as_it_says(capability, tmp_path):
    """Division and fused multiply-add are rounded once, small numbers stay, and the compiler merges
    no product with a sum: of float64, that would be the only one."""
    from jobs.triton_counts import count_on_gpu

    with as_on(capability, tmp_path) as compiled:
        for classes, bins in ((1, 1), (21, 10), (255, 100)):
            for pixels in ((40, 56), (1, 1)):  # one kernel for all sizes of images
                count_on_gpu(*an_image(classes, (5, 7), pixels, 3.0), bins)
    assert len(compiled) == 3
    for kernel in compiled:
        code = kernel.asm["ptx"]
        assert kernel.asm["cubin"].startswith(b"\x7fELF")
        assert f".target sm_{capability}" in code
        assert "fma.rn.f32" in code and "div.rn.f32" in code and "mul.rn.f64" in code
        assert re.findall(r"\S+\.(?:approx|full|ftz)\S*|fma\S*f64", code) == []


def test_a_grid_is_counted_so_and_is_another(process, streets, tmp_path):
    """Its cells' signatures say how they were counted, and nothing else differs."""
    found, signatures = {}, {}
    for counting in ("fused", "triton"):
        folder = tmp_path / counting
        grid = grid_of(folder, streets.folder, "CE", "DLNWCE", epochs=1, counting=counting)
        train = process.submit(interpreted.train, task_of(grid))
        assert train.result() == 0
        found[counting] = results(grid.run)
        (path,) = grid.run.counts.glob("*.json")
        signatures[counting] = set(read_index(path).signatures)
        assert signatures[counting] == {cell.signature for cell in grid.cells}
    assert signatures["fused"].isdisjoint(signatures["triton"])
    assert_all_same(found["fused"], found["triton"])
