"""What benchmarks on a GPU have in common: which chip it is, what it cannot go below, and clocks
that wait for it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.measure import Work

NO_GPU = "there is no GPU here"
_CALLS = 20  # of a kernel that is timed


def waited(work: Work, device: torch.device) -> Work:
    """`work`, until `device` has done it."""
    if device.type != "cuda":
        return work

    def whole() -> None:
        work()
        torch.cuda.synchronize(device)

    return whole


def chip() -> dict[str, Any]:
    """The GPU and its programs."""
    properties = torch.cuda.get_device_properties(0)
    return {
        "gpu": properties.name,
        "gpu_memory_gb": round(properties.total_memory / 1e9, 1),
        "gpu_capability": f"{properties.major}.{properties.minor}",
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "gpu_copy_gb_per_s": round(copy_bandwidth() / 1e9, 1),
        "gpu_float16_tflop_per_s": round(matrix_rate(torch.float16) / 1e12, 1),
        "gpu_float32_tflop_per_s": round(matrix_rate(torch.float32) / 1e12, 1),
    }


def matrix_rate(dtype: torch.dtype, device: torch.device | None = None) -> float:
    """Floating-point operations a second of a matrix product: best of five."""
    device = device or torch.device("cuda")
    size = 8192 if device.type == "cuda" else 256
    one = torch.ones(size, size, dtype=dtype, device=device)
    return 2 * size**3 / _best(lambda: one @ one, device)


def copy_bandwidth(size: int = 2**30) -> float:
    """Bytes a second that the GPU copies within its memory, those it reads and those it writes
    together: best of five."""
    source = torch.ones(size, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * size / _best(lambda: target.copy_(source), source.device)


def transfer_bandwidth(size: int = 2**28) -> float:
    """Bytes a second from pinned memory to the GPU: best of five."""
    source = torch.ones(size, dtype=torch.uint8).pin_memory()
    target = torch.empty(size, dtype=torch.uint8, device="cuda")
    return size / _best(lambda: target.copy_(source, non_blocking=True), target.device)


def peak_gb(work: Work, device: torch.device) -> float:
    """Memory that tensors take of a GPU at most while `work` runs; 0 on a processor."""
    if device.type != "cuda":
        work()
        return 0.0
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


def _best(work: Callable[[], object], device: torch.device) -> float:
    whole, seconds = waited(work, device), []
    for _ in range(6):
        start = time.perf_counter()
        whole()
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])
