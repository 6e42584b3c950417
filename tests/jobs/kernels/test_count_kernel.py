"""The kernel that counts in one pass, part by part: where a pixel lies, exponentials, bins, and
processors with other registers."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from numba import njit

from jobs import vector_memory
from jobs import vectors as op
from jobs.kernels import count_kernel
from jobs.kernels.count_kernel import add_listed, exp_negative, list_scores, log_of_sum, unpack_bins
from jobs.kernels.fused_counts import axis, count_upsampled
from jobs.metrics.counts import FIXED_POINT
from jobs.vector_memory import load, store
from tests.jobs.kernels.test_fused_counts import an_image


def test_what_numba_keeps_is_of_the_vectors_as_they_are():
    """It looks at the kernel's own file alone: a digest that has changed makes it compile anew."""
    files = [Path(module.__file__) for module in (op, vector_memory)]
    digest = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12]
    assert digest == count_kernel.VECTORS


def test_a_class_that_is_certain_fills_its_sums_to_the_last_place():
    """Each pixel of one class alone adds 1, as much as a score can be."""
    target = torch.zeros(200, 70, dtype=torch.uint8)
    found = count_upsampled(torch.zeros(1, 2, 3), target, 4)
    assert found.class_bins[0].tolist() == [[0, 0, 0]] * 3 + [
        [target.numel(), target.numel(), target.numel() * FIXED_POINT]
    ]


@pytest.mark.parametrize(("places", "pixels"), [(65, 520), (87, 693), (7, 3), (9, 9), (257, 2048)])
def test_a_pixels_position_among_the_logits_is_rounded_once(places, pixels):
    scale = Fraction(float(np.float32(places) / np.float32(pixels)))
    found = axis(places, pixels)
    for x in range(pixels):
        exact = max(scale * (x + Fraction(1, 2)) - Fraction(1, 2), Fraction(0))
        position = Fraction(float(np.float32(float(exact))))
        assert found.first[x] == min(int(position), places - 1)
        if found.first[x] < places - 1:
            assert found.second[x] == found.first[x] + 1
            assert found.far[x] == np.float32(float(position - int(position)))


@njit
def exponentials_and_logarithms(x, s):
    """By the kernel, of as many as fill whole vectors."""
    exps, logs = np.empty_like(x), np.empty_like(s)
    for at in range(0, len(x), op.LANES):
        store(exps, at, exp_negative(load(x, at)))
        store(logs, at, log_of_sum(load(s, at)))
    return exps, logs


def test_exp_and_log_are_a_place_or_two_off_at_most():
    x = -np.linspace(0, 7, 20_000).astype(np.float32)
    s = np.linspace(1, 255, 20_000).astype(np.float32)
    exps, logs = exponentials_and_logarithms(x, s)
    exact = np.exp(x.astype(float))
    assert (np.abs(exps - exact) <= np.spacing(exact.astype(np.float32))).all()
    assert exps[0] == 1 and exps.max() == 1
    exact = np.log(s.astype(float))
    assert (np.abs(logs - exact) <= 2 * np.spacing(exact.astype(np.float32))).all()
    assert logs[0] == 0
    far, one = np.full(op.LANES, -np.inf, np.float32), np.ones(op.LANES, np.float32)
    least, _ = exponentials_and_logarithms(far, one)
    assert (least >= 0).all() and (least < 2.0**-120).all()


@njit
def bin_scores(plane, packed, totals, bins):
    """Scores of one class [1, n] into their bins, as the kernel does it."""
    scores, places = np.empty(400, np.float32), np.empty(400, np.int32)
    listed = 0
    for x in range(0, plane.shape[1], op.LANES):
        unit = op.in_all_lanes(np.float32(1))
        _, listed = list_scores(plane, x, unit, bins, totals, scores, places, listed)
    add_listed(scores, places, listed, bins, np.empty(400, np.int32), packed)


@pytest.mark.parametrize("bins", range(1, 101))
def test_a_bin_begins_where_the_reference_has_it(bins):
    begins = torch.arange(bins + 1) / bins
    around = [torch.nextafter(begins, torch.tensor(end)) for end in (-1.0, 2.0)]
    scores = torch.cat([begins, *around]).clamp(0, 1)
    plane = np.zeros((1, 320), np.float32)
    plane[0, : len(scores)] = scores
    packed, totals = np.zeros(4 * bins, np.int64), np.zeros((1, op.LANES), np.uint32)
    found, tops = np.zeros((1, bins, 3), np.int64), np.zeros((3 * bins, 2), np.int64)
    bin_scores(plane, packed, totals, bins)
    unpack_bins(packed, totals, found, tops)
    assert not tops.any()
    found[0, 0, 0] += len(scores)
    expected = np.zeros((bins, 3), np.int64)
    places = (scores * bins).long().clamp(max=bins - 1)
    np.add.at(expected[:, 0], places, 1)
    np.add.at(expected[:, 2], places, (scores * FIXED_POINT).round().long())
    assert (found[0] == expected).all()
    assert not packed.any() and not totals.any()  # the next scores begin anew


BETWEEN_PAGES = """
import ctypes, mmap
import numpy as np
from numba import njit
from jobs import vectors as op
from jobs.vector_memory import load, permute, store

@njit
def permuted(array, start, places):
    found = np.empty(op.LANES, np.float32)
    store(found, 0, permute(array, start, load(places, 0)))
    return found

memory, page = mmap.mmap(-1, 3 * mmap.PAGESIZE), mmap.PAGESIZE
before, array, behind = (np.frombuffer(memory, np.float32, page // 4, at * page) for at in range(3))
generator = np.random.default_rng(0)
array[:] = generator.random(len(array), np.float32)
for side in (before, behind):  # not to be read
    start, length = ctypes.c_void_p(side.ctypes.data), ctypes.c_size_t(page)
    assert ctypes.CDLL(None).mprotect(start, length, 0) == 0
for _ in range(200):
    steps = np.array([0, *generator.integers(0, 2, op.LANES - 1).cumsum()], np.int32)
    for first in (0, len(array) - 1 - steps[-1]):
        places = steps + np.int32(first)
        assert (permuted(array, first, steps) == array[places]).all()
        assert (permuted(array, 0, places) == array[places]).all()
"""


@pytest.mark.skipif(not op.AVX512, reason="a processor without AVX-512")
def test_neighbours_are_picked_from_one_load_that_reads_nothing_beyond_them():
    """In a process of its own, which the page before the array or behind it would end."""
    subprocess.run([sys.executable, "-c", BETWEEN_PAGES], check=True)


NARROW = """
import sys, numpy as np, torch
from jobs import vectors
from jobs.kernels.fused_counts import count_upsampled
assert not vectors.AVX512
given = np.load(sys.argv[1])
counts = count_upsampled(*(torch.from_numpy(given[name]) for name in ("logits", "target")), 10)
np.savez(sys.argv[2], **counts.as_arrays())
"""


@pytest.mark.skipif(platform.machine() != "x86_64", reason="names an x86 processor")
def test_a_processor_without_wide_registers_counts_the_same(tmp_path):
    logits, target = an_image(21, (22, 40), (173, 319), 3.0)
    given, made = tmp_path / "given.npz", tmp_path / "made.npz"
    np.savez(given, logits=logits.numpy(), target=target.numpy())
    environ = os.environ | {"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": ""}
    subprocess.run([sys.executable, "-c", NARROW, given, made], env=environ, check=True)
    expected = count_upsampled(logits, target, 10).as_arrays()
    with np.load(made) as found:
        assert all((found[name] == counts).all() for name, counts in expected.items())
