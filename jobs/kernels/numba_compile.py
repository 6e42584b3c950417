"""Kernels for the CPU: compiled where they are defined, kept for the next process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from numba import njit
from numba import types as numba_types

T = TypeVar("T")

types: Any = numba_types  # it makes its types as it runs


# Python's global lock is not held; x / 0 is infinite instead of an error, whose branch would keep
# loops from becoming vectors
_HOW: dict[str, Any] = {"nogil": True, "error_model": "numpy"}


def compiled(signature: Any) -> Callable[[Callable[..., T]], Callable[..., T]]:
    """Compile a function now, or take what an earlier process has compiled and kept. Where nothing
    can be kept, on a full disk or without a home, or what was is damaged, each process compiles for
    itself. The kernel runs beside other threads of Python."""

    def decorated(function: Callable[..., T]) -> Callable[..., T]:
        try:
            return njit(signature, cache=True, **_HOW)(function)
        except Exception:  # what was kept may be cut short too, and raises what it likes
            return njit(signature, **_HOW)(function)

    return decorated
