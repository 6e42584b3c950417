"""What benchmarks on a GPU have in common: which chip it is, what it cannot go below, memory, and
the clock of its kernels."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any, TypeVar

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.measure import Work, best_seconds, matrix_rate, waited
from hpc.command import one_line

T = TypeVar("T")

NO_GPU = "there is no GPU here"
_CALLS = 20  # of a kernel that is timed


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


def transfer_bandwidth(size: int = 2**28) -> float:
    """Bytes a second from pinned memory to the GPU: best of five."""
    source = torch.ones(size, dtype=torch.uint8).pin_memory()
    target = torch.empty(size, dtype=torch.uint8, device="cuda")
    copy = waited(lambda: target.copy_(source, non_blocking=True), target.device)
    return size / best_seconds(copy)


def peak_gb(work: Work, device: torch.device) -> float:
    """Memory that tensors take of a GPU at most while `work` runs, with what it held before."""
    torch.cuda.reset_peak_memory_stats(device)
    waited(work, device)()
    return round(torch.cuda.max_memory_allocated(device) / 1e9, 2)


def kernel_seconds(work: Work, names: set[str]) -> float:
    """Seconds that kernels of these names take on the GPU itself in a call of `work`: means of 20
    calls."""
    work()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        for _ in range(_CALLS):
            work()
        torch.cuda.synchronize()
    kernels = [one for one in found.key_averages() if one.key in names]
    if not kernels:
        raise RuntimeError(f"none of {names} ran on the GPU")
    return sum(float(one.device_time_total) for one in kernels) * 1e-6 / _CALLS


def in_own_process(work: Callable[..., T], *arguments: object) -> T:
    """What `work` returns in a process of its own: its memory and what it compiled go with it, and
    a GPU that has one process at a time is free again."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(work, *arguments).result()


def in_short(error: Exception) -> str:
    """What an error is, in a line."""
    return one_line(f"{type(error).__name__}: {error}".partition("\n")[0])
