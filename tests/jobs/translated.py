"""Translates kernels of Triton for a GPU that is not there, as they are called: where one would be
launched, it is compiled and no more."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest


@contextmanager
def as_on(capability: int, cache: Path) -> Iterator[list[Any]]:
    """The kernels that are compiled in this block, for GPUs of this compute capability (70 is a
    V100's). `cache` is an empty folder."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    class Gpu:
        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", capability, 32)

        def get_current_device(self) -> Any:
            return cache  # kernels are kept by device

        def get_current_stream(self, device: Any) -> int:
            return 0

    compiled: list[Any] = []
    launch = JITFunction.run

    def run(kernel: JITFunction, *arguments: Any, **named: Any) -> None:
        found = launch(kernel, *arguments, **{**named, "warmup": True})
        if found not in compiled:
            compiled.append(found)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(cache))
        patch.setattr(JITFunction, "run", run)
        patch.setattr(driver, "_active", Gpu())
        yield compiled
