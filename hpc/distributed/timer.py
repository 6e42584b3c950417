"""Measure the seconds that each part of the work takes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

OTHER = "other"


class Stopwatch:
    """Seconds by part.

    Every moment belongs to exactly one part, the innermost, so that the parts add up to the elapsed
    time. Before `start` nothing is measured and no GPU is waited for.
    """

    def __init__(self, device: torch.device) -> None:
        self.running = False
        self._device = device
        self._part = OTHER
        self._since = 0.0
        self._seconds: dict[str, float] = {}

    def start(self) -> None:
        """Start measuring."""
        self._wait_for_gpu()
        self.running, self._since = True, time.perf_counter()

    def lap(self) -> dict[str, float]:
        """Return the seconds by part since the start or the last lap."""
        self.begin(self._part)
        seconds, self._seconds = self._seconds, {}
        return seconds

    def begin(self, part: str) -> None:
        """Count the time from now on as `part`."""
        if not self.running:
            return
        self._wait_for_gpu()
        now = time.perf_counter()
        self._seconds[self._part] = self._seconds.get(self._part, 0.0) + now - self._since
        self._part, self._since = part, now

    def _wait_for_gpu(self) -> None:
        if self._device.type == "cuda":
            # this stream alone: what NCCL still does on its own belongs to no earlier part
            torch.cuda.current_stream(self._device).synchronize()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count the time inside the block as the part `name`."""
        before = self._part
        self.begin(name)
        try:
            yield
        finally:
            self.begin(before)
