"""Ranks that are threads of one test."""

from __future__ import annotations

import threading
from collections.abc import Callable

from torch import Tensor


class MeetingPoint:
    """Adds up the tensors of the ranks of a test, which are threads, in order of rank."""

    def __init__(self, ranks: int) -> None:
        self._parts = [None] * ranks
        self._barrier = threading.Barrier(ranks, timeout=30)

    def global_sum(self, rank: int) -> Callable[[Tensor], Tensor]:
        def add_up(part: Tensor) -> Tensor:
            self._parts[rank] = part.detach().clone()
            self._barrier.wait()
            total = sum(self._parts)
            self._barrier.wait()  # no rank writes a new part before all have read the old ones
            return total

        return add_up
