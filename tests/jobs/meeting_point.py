"""Ranks that are threads of one test."""

from __future__ import annotations

import threading
from collections.abc import Callable

from torch import Tensor


class MeetingPoint:
    """Where the ranks of a test, each a thread, add up their tensors in order of rank."""

    def __init__(self, ranks: int) -> None:
        self._parts = [None] * ranks
        self._barrier = threading.Barrier(ranks, timeout=30)

    def global_sum(self, rank: int) -> Callable[[Tensor], Tensor]:
        def add_up(part: Tensor) -> Tensor:
            self._parts[rank] = part.detach().clone()
            self._barrier.wait()
            total = sum(self._parts)
            self._barrier.wait()  # nobody leaves a new part before all have seen the old ones
            return total

        return add_up
