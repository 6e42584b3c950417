"""Handle numbers beyond the range of fp16, whose largest is 65504.

A forward pass that overflows is computed again in fp32, because a scale of the loss helps gradients
only. An update whose gradients overflow is skipped. All ranks decide alike: they add up losses and
features, and their gradients are equal after the all-reduce.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from hpc.distributed.process_group import Group
from jobs.models.build import Features


class LossScaler(torch.amp.GradScaler):
    """torch's gradient scaler for one cell, with the history of its overflows.

    The scale starts at 65536, halves with each skipped update, and doubles after 2000 updates in a
    row. Below 1 the cell must stop: it skips 17 updates at most, and one more for each 2000 steps.

    Attributes:
        history: number and last step of the recomputed steps and of the skipped updates; -1 is no
            step. Empty if the scaler is disabled.
    """

    def __init__(self, device: torch.device, enabled: bool) -> None:
        super().__init__(device.type, enabled=enabled)
        none = {"recomputed": 0, "last_recomputed": -1, "skipped": 0, "last_skipped": -1}
        self.history: dict[str, int] = none if enabled else {}
        self._seen: float | None = None  # the last scale on the host
        self._step = -1  # the last step that was read

    def read(self, loss: Tensor, step: int) -> float:
        """Return the value of the scalar `loss` of `step`, and note what the last update did.

        One copy to the host brings loss and scale, so that no update waits for the device.
        """
        value, scale = torch.stack([loss, self.scale(torch.ones_like(loss))]).tolist()
        self._note(scale)
        self._step = step
        return float(value)

    def settle(self) -> None:
        """Note what the last update did, without another loss."""
        self._note(self.get_scale())

    def _note(self, scale: float) -> None:
        if self._seen is not None and scale < self._seen:
            self.count("skipped", self._step)
        self._seen = scale

    def count(self, what: str, step: int) -> None:
        """Add `step` to the history as `recomputed` or `skipped`."""
        self.history[what] += 1
        self.history[f"last_{what}"] = step

    @property
    def fault(self) -> str | None:
        """Return why the cell must stop, or None."""
        if self._seen is None or self._seen >= 1:
            return None
        return (
            "gradients overflow fp16 even at a scale of 1 ({skipped} updates were skipped, the "
            'last one at step {last_skipped}); set precision = "fp32" in [protocol]'
        ).format_map(self.history)

    def state_dict(self) -> dict[str, Any]:
        """Return scale and history; nothing if disabled."""
        self.settle()
        return {**super().state_dict(), **self.history}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state of `state_dict`; one of torch's own scaler has no history."""
        super().load_state_dict(state_dict)
        self.history |= {name: state_dict[name] for name in self.history if name in state_dict}
        self._seen = None


def remember(buffers: Iterable[Tensor]) -> Callable[[], None]:
    """Return a function that gives `buffers` their present values back."""
    before = [(buffer, buffer.clone()) for buffer in buffers]

    def restore() -> None:
        for buffer, value in before:
            buffer.copy_(value)

    return restore


def all_finite(features: Features, group: Group) -> bool:
    """Return whether all `features` of all ranks are finite. All ranks must call it together."""
    # a sum reads them once and allocates nothing; finite halves cannot overflow it
    sums = [one.sum(dtype=torch.float32) for one in _listed(features)]
    return math.isfinite(float(group.sum(torch.stack(sums).sum())))


def in_fp32(features: Features) -> Features:
    """Return `features` in float32."""
    single = [one.float() for one in _listed(features)]
    return single if isinstance(features, list) else single[0]


def _listed(features: Features) -> list[Tensor]:
    return features if isinstance(features, list) else [features]
