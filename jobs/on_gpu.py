"""What a protocol may leave to a GPU beside its networks, tried before training."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from hpc.command import UserError, one_line
from jobs.augment import Unresized
from jobs.batches import UnresizedBatch
from jobs.crop_window import Span, Window
from jobs.evaluate import count
from jobs.protocol import ON_GPU, Protocol

_TWO_PIXELS = Span(2, 2, 0, 2)


def require_gpu(protocol: Protocol, device: torch.device) -> None:
    """Raise `UserError` if the protocol needs a GPU and `device` is none, or Triton does not work
    there: it counts a pixel and resizes a picture, and so has its kernels compiled."""
    if protocol.counting == ON_GPU["counting"]:
        _require('counting = "triton"', 'counting = "fused"', device, _count)
    if protocol.augment_on == ON_GPU["augment_on"]:
        _require('augment_on = "gpu"', 'augment_on = "cpu"', device, _resize)


def _require(
    setting: str, instead: str, device: torch.device, attempt: Callable[[torch.device], object]
) -> None:
    if device.type != "cuda":
        raise UserError(
            f"{setting} needs a GPU, but torch sees none here; set {instead} in [protocol], or ask "
            "for GPUs in the profile"
        )
    try:
        attempt(device)
    except Exception as error:  # Triton, its compiler and the driver raise what they like
        reason = one_line(f"{type(error).__name__}: {error}".partition("\n")[0])
        raise UserError(
            f"{setting} does not work on {torch.cuda.get_device_name(device)} ({reason}); set "
            f"{instead} in [protocol]"
        ) from error


def _count(device: torch.device) -> object:
    pixel = torch.zeros(1, 1, 1, device=device), torch.zeros(1, 1, dtype=torch.uint8)
    return count(*pixel, Protocol(counting="triton"))


def _resize(device: torch.device) -> object:
    picture, label = np.zeros((2, 2, 3), np.uint8), np.zeros((2, 2), np.uint8)
    sample = Unresized(Window(_TWO_PIXELS, _TWO_PIXELS), picture, label)
    return UnresizedBatch.of([sample], (2, 2), range(1)).to(device)
