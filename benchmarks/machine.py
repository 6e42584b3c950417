"""Describe the machine of a measurement, and write measurements as JSON."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.gpu import chip, in_own_process
from benchmarks.measure import copy_bandwidth, matrix_rate


def machine() -> dict[str, Any]:
    """Return the processor, memory, library versions and load of this machine.

    Memory bandwidth and matrix rate, the limits that others are compared with, are measured here.
    """
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "copy_gb_per_s": round(copy_bandwidth() / 1e9, 2),
        "float32_gflop_per_s": round(matrix_rate() / 1e9, 1),
        "load": os.getloadavg()[0],
        **(in_own_process(chip) if torch.cuda.is_available() else {}),
    }


def write_record(
    path: Path, record: Mapping[str, Any], on: Mapping[str, Any] | None = None
) -> None:
    """Write `record` and its machine as JSON; the machine is `on`, or else measured now."""
    path.write_text(json.dumps({"machine": on or machine(), **record}, indent=1) + "\n")


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
