"""The kernel that counts in one pass, part by part: positions of pixels, exponentials, bins, and
CPUs with other registers."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from fractions import Fraction

import numpy as np
import pytest
import torch
from numba import njit

from jobs.kernels.count_kernel import (
    MOST_COLUMNS,
    MOST_ROWS,
    SLOTS,
    add_scores,
    exp_negative,
    log_of_sum,
    unpack,
)
from jobs.kernels.fused_counts import count_upsampled, positions
from jobs.metrics.counts import FIXED_POINT
from tests.jobs.kernels.test_fused_counts import an_image


@pytest.mark.parametrize("size", [(200, 70), (MOST_ROWS + 1, MOST_COLUMNS)])
def test_a_class_that_is_certain_fills_its_sums_to_the_last_place(size):
    """Each pixel of one class alone adds 1, as much as a score can be."""
    target = torch.zeros(size, dtype=torch.uint8)
    found = count_upsampled(torch.zeros(1, 2, 3), target, 4)
    assert found.class_bins[0].tolist() == [[0, 0, 0]] * 3 + [
        [target.numel(), target.numel(), target.numel() * FIXED_POINT]
    ]


@pytest.mark.parametrize(("places", "pixels"), [(65, 520), (87, 693), (7, 3), (9, 9), (257, 2048)])
def test_a_pixels_position_among_the_logits_is_rounded_once(places, pixels):
    scale = Fraction(float(np.float32(places) / np.float32(pixels)))
    found = positions(places, pixels)
    for x in range(pixels):
        exact = max(scale * (x + Fraction(1, 2)) - Fraction(1, 2), Fraction(0))
        assert found[x] == min(np.float32(float(exact)), places - 1)


@njit
def exponentials_and_logarithms(x, s):
    exps, logs = np.empty_like(x), np.empty(s.size)
    for at in range(x.size):
        exps[at], logs[at] = exp_negative(x[at]), log_of_sum(s[at])
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
    far, one = np.full(16, -np.inf, np.float32), np.ones(16, np.float32)
    least, _ = exponentials_and_logarithms(far, one)
    assert (least >= 0).all() and (least < 2.0**-120).all()


@pytest.mark.parametrize("bins", range(1, 101))
def test_a_bin_begins_where_the_reference_has_it(bins):
    begins = torch.arange(bins + 1) / bins
    around = [torch.nextafter(begins, torch.tensor(end)) for end in (-1.0, 2.0)]
    scores = torch.cat([begins, *around]).clamp(0, 1)
    plane, ones = scores.numpy()[None], np.ones(len(scores), np.float32)
    packed, found = np.zeros((1, bins * SLOTS), np.int64), np.zeros((1, bins, 3), np.int64)
    add_scores(plane, ones, np.empty_like(ones), packed)
    unpack(packed, found)
    expected = np.zeros((bins, 3), np.int64)
    places = (scores * bins).long().clamp(max=bins - 1)
    np.add.at(expected[:, 0], places, 1)
    np.add.at(expected[:, 2], places, (scores * FIXED_POINT).round().long())
    assert (found[0] == expected).all()


NARROW = """
import sys, numpy as np, torch
from jobs.kernels.count_kernel import count_tile
from jobs.kernels.fused_counts import count_upsampled
assert "zmm" not in "".join(count_tile.inspect_asm().values())
given = np.load(sys.argv[1])
counts = count_upsampled(*(torch.from_numpy(given[name]) for name in ("logits", "target")), 10)
np.savez(sys.argv[2], **counts.as_arrays())
"""


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() != "x86_64", reason="names an x86 processor")
@pytest.mark.parametrize("cpu", ["haswell", "generic"])
def test_a_cpu_without_wide_registers_or_fused_arithmetic_counts_the_same(cpu, tmp_path):
    logits, target = an_image(21, (22, 40), (173, 319), 3.0)
    given, made = tmp_path / "given.npz", tmp_path / "made.npz"
    np.savez(given, logits=logits.numpy(), target=target.numpy())
    environ = os.environ | {"NUMBA_CPU_NAME": cpu, "NUMBA_CPU_FEATURES": ""}
    subprocess.run([sys.executable, "-c", NARROW, given, made], env=environ, check=True)
    expected = count_upsampled(logits, target, 10).as_arrays()
    with np.load(made) as found:
        assert all((found[name] == counts).all() for name, counts in expected.items())
