"""Measure the evaluation counts of one image, from logits at stride 8 and a label map.

The counts are the confusion matrix, the histograms of scores by class and of the highest score,
Brier and NLL. Ours counts in one pass (`counting = "fused"`). The peers are plain PyTorch,
torchmetrics, which counts less (no histograms by class, no Brier, no NLL), and our own reference.

The image has 520 x 693 pixels, 21 classes and 10 bins. Its logits are noise, so that all bins are
in use. All use as many threads as there are cores.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.measure import NotMeasured, Result, compare, copy_bandwidth, matrix_rate, time_text
from data_prep.settings import VOID
from jobs.kernels.fused_counts import count_upsampled
from jobs.metrics.reference import count_image
from jobs.models.build import upsample

CLASSES, STRIDED, SIZE, BINS = 21, (65, 87), (520, 693), 10
WHAT = "counts of an image of 520 x 693, 21 classes"
ROUNDS = 15  # the time of two threads varies more than that of one
TORCHMETRICS = "torchmetrics (confusion and calibration error)"


def measure() -> list[Result]:
    """Compare our counts with all peers."""
    threads = os.cpu_count() or 1
    torch.set_num_threads(threads)
    logits, target = an_image()
    more = {
        "our extra memory, MB": _extra_memory("fused"),
        "extra memory of the plain way, MB": _extra_memory("plain"),
        "threads": float(threads),
    }
    peers: dict[str, tuple[Callable[[], object], float]] = {
        "plain PyTorch": (lambda: plain(logits, target), 25.0),
        "our reference": (lambda: _reference(logits, target), 0.0),
    }
    absent: list[Result] = []
    if find_spec("torchmetrics"):
        peers[TORCHMETRICS] = (lambda: _torchmetrics(logits, target), 6.0)
    else:
        absent = [NotMeasured(WHAT, TORCHMETRICS, "torchmetrics is not installed")]
    return [
        *compare(
            WHAT, lambda: count_upsampled(logits, target, BINS, threads), peers,
            rounds=ROUNDS, limit=_limit(logits, target), more=more,
        ),
        *compare(
            f"{WHAT}, on one thread", lambda: count_upsampled(logits, target, BINS, 1),
            {"plain PyTorch on all": (lambda: plain(logits, target), 0.0)}, rounds=3,
        ),
        *absent,
    ]  # fmt: skip


def an_image(
    strided: tuple[int, int] = STRIDED, size: tuple[int, int] = SIZE
) -> tuple[Tensor, Tensor]:
    """Return logits [C, h, w] of noise, and labels uint8 [H, W] of patches, some of them void."""
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(CLASSES, *strided, generator=generator)
    patches = torch.randint(CLASSES + 1, (1, 1, 13, 17), generator=generator)
    patches[patches == CLASSES] = VOID
    return logits, F.interpolate(patches.float(), size)[0, 0].to(torch.uint8)


def plain(logits: Tensor, target: Tensor) -> tuple[Tensor, ...]:
    """Return the counts by plain PyTorch, where each line is an operation on the whole image."""
    size = target.shape[0], target.shape[1]
    upsampled = F.interpolate(logits[None], size, mode="bilinear", align_corners=False)[0]
    keep = target != VOID
    p, label = upsampled.softmax(0)[:, keep], target[keep].long()
    confidence, prediction = p.max(0)
    one_hot = F.one_hot(label, CLASSES).T
    confusion = torch.bincount(label * CLASSES + prediction, minlength=CLASSES**2)
    class_bins = [_histogram(p[c], one_hot[c] == 1) for c in range(CLASSES)]
    top = _histogram(confidence, prediction == label)
    brier = ((p - one_hot) ** 2).sum(dtype=torch.float64)
    nll = F.nll_loss(upsampled.log_softmax(0)[:, keep].T, label, reduction="sum")
    return confusion, torch.stack(class_bins), top, brier, nll


def _histogram(score: Tensor, hit: Tensor) -> Tensor:
    place = (score * BINS).long().clamp(max=BINS - 1)
    parts = (None, hit.double(), score.double())
    return torch.stack([torch.bincount(place, weights, BINS).double() for weights in parts])


def _reference(logits: Tensor, target: Tensor) -> object:
    return count_image(upsample(logits[None], SIZE)[0], target, BINS, VOID)


def _torchmetrics(logits: Tensor, target: Tensor) -> object:
    from torchmetrics.functional.classification import (
        multiclass_calibration_error,
        multiclass_confusion_matrix,
    )

    scores = upsample(logits[None], SIZE).softmax(1)
    label = target[None].long()
    return (
        multiclass_confusion_matrix(scores, label, CLASSES, ignore_index=VOID),
        multiclass_calibration_error(scores, label, CLASSES, BINS, ignore_index=VOID),
    )


def _limit(logits: Tensor, target: Tensor) -> str:
    # 3 to interpolate, 1 to compare, 11 for exp and sum, 2 for score and square, 0 for the bins
    operations = 17 * CLASSES * target.numel()
    read = logits.numel() * 4 + target.numel()
    memory, sums = read / copy_bandwidth(), operations / matrix_rate()
    return (
        f"{read / 1e6:.1f} MB to read: {time_text(memory)}; {operations / 1e6:.0f} M operations "
        f"on float32 at the rate of a matrix product: {time_text(sums)}"
    )


def _extra_memory(which: str) -> float:
    """Return the peak memory in MB that counting adds, measured in a new process."""
    # Freed memory goes back to the system at once; reused pages would not raise the peak.
    environ = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(
        [sys.executable, "-c", _PEAK, which], capture_output=True, text=True, check=True,
        env=environ,
    )  # fmt: skip
    return float(done.stdout)


_PEAK = """
import sys
from pathlib import Path
import torch
from benchmarks import counting
from jobs.kernels.fused_counts import count_upsampled

def held(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1e3 for line in lines if line.startswith(name))

def work(logits, target):
    if sys.argv[1] == "fused":
        count_upsampled(logits, target, counting.BINS, torch.get_num_threads())
    else:
        counting.plain(logits, target)

logits, target = counting.an_image()
work(logits, target[:64, :64].contiguous())  # load and compile everything
Path("/proc/self/clear_refs").write_text("5")  # reset the peak
before = held("VmRSS")
work(logits, target)
print(round(held("VmHWM") - before, 2))
"""
