"""Measure the chip and the memory of a GPU, and run benchmarks in processes of their own."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any, TypeVar

import torch

from benchmarks.measure import Work, best_seconds, matrix_rate, waited
from hpc.cli import one_line

T = TypeVar("T")

NO_GPU = "there is no GPU here"


def chip() -> dict[str, Any]:
    """The GPU and its programs."""
    device = torch.device("cuda")
    properties = torch.cuda.get_device_properties(0)
    return {
        "gpu": properties.name,
        "gpu_memory_gb": round(properties.total_memory / 1e9, 1),
        "gpu_capability": f"{properties.major}.{properties.minor}",
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "gpu_copy_gb_per_s": round(copy_bandwidth() / 1e9, 1),
        "gpu_float16_tflop_per_s": round(matrix_rate(torch.float16, device) / 1e12, 1),
        "gpu_float32_tflop_per_s": round(matrix_rate(torch.float32, device) / 1e12, 1),
        "tf32_in_float32_convolutions": torch.backends.cudnn.allow_tf32,
    }


def copy_bandwidth(size: int = 2**30) -> float:
    """Bytes a second that the GPU copies within its memory, those it reads and those it writes
    together: best of five."""
    source = torch.ones(size, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * size / best_seconds(waited(lambda: target.copy_(source), target.device))


def peak_gb(work: Work, device: torch.device) -> float:
    """Memory that tensors take of a GPU at most while `work` runs, with what it held before."""
    torch.cuda.reset_peak_memory_stats(device)
    waited(work, device)()
    return round(torch.cuda.max_memory_allocated(device) / 1e9, 2)


def in_own_process(work: Callable[..., T], *arguments: object) -> T:
    """What `work` returns in a process of its own: its memory and what it compiled go with it, and
    a GPU that has one process at a time is free again."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(work, *arguments).result()


def in_short(error: Exception) -> str:
    """What an error is, in a line."""
    return one_line(f"{type(error).__name__}: {error}".partition("\n")[0])
