"""Compile numba kernels when they are defined, and cache them for the next process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from numba import njit
from numba import types as numba_types

T = TypeVar("T")

types: Any = numba_types  # numba creates its types at run time, so mypy does not know them


# Kernels release Python's global lock. x / 0 is infinite instead of an error, whose branch would
# prevent vectorisation.
_OPTIONS: dict[str, Any] = {"nogil": True, "error_model": "numpy"}


def compiled(signature: Any) -> Callable[[Callable[..., T]], Callable[..., T]]:
    """Return a decorator that compiles a function now, or loads it from numba's cache on disk.

    Without a usable cache (full disk, no home, damaged files) each process compiles for itself.
    The kernel releases Python's global lock.
    """

    def decorated(function: Callable[..., T]) -> Callable[..., T]:
        try:
            return njit(signature, cache=True, **_OPTIONS)(function)
        except Exception:  # a damaged cache raises any exception
            return njit(signature, **_OPTIONS)(function)

    return decorated
