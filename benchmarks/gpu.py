"""Measure the chip and the memory of a GPU, and run benchmarks in processes of their own."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any, NamedTuple, TypeVar

import torch

from benchmarks.measure import Work, best_seconds, matrix_rate, synchronised
from hpc.cli import one_line

T = TypeVar("T")

NO_GPU = "there is no GPU here"


def chip() -> dict[str, Any]:
    """Return the name, memory, libraries, bandwidth and matrix rates of the GPU."""
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
    """Return the copy bandwidth of GPU memory in bytes per second, reads and writes added.

    The best of 5 copies of `size` bytes counts.
    """
    source = torch.ones(size, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * size / best_seconds(synchronised(lambda: target.copy_(source), target.device))


class Peak(NamedTuple):
    """Peak memory in GB: of all tensors, and of the whole GPU with torch's cache and CUDA."""

    tensors: float
    whole: float


def peak(work: Work, device: torch.device) -> Peak:
    """Return the peak memory of the GPU while `work` runs."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    synchronised(work, device)()
    free, total = torch.cuda.mem_get_info(device)
    outside = total - free - torch.cuda.memory_reserved(device)
    reserved = torch.cuda.max_memory_reserved(device)
    return Peak(torch.cuda.max_memory_allocated(device) / 1e9, (reserved + outside) / 1e9)


def in_own_process(work: Callable[..., T], *arguments: object) -> T:
    """Run `work(*arguments)` in a new process and return its result.

    The end of the process frees its memory, its compiled code and a GPU in exclusive mode.
    """
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(work, *arguments).result()


def in_short(error: Exception) -> str:
    """Return the type and the first line of an error."""
    return one_line(f"{type(error).__name__}: {error}".partition("\n")[0])
