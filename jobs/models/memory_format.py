"""The memory format of weights and features.

A convolution gives its result the format of its weights. Tensor cores need `torch.channels_last`
(NHWC); otherwise cuDNN reorders half precision before and after each convolution. fp32 on a GPU is
contiguous (NCHW). Files hold contiguous tensors on every device.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)


# fp32 uses no tensor cores, since TF32 is off. Not measured yet: `make gpu` compares both formats.
# A change raises `ROUNDING` in `jobs/training/job_run.py`.
FP32_ON_GPU = torch.contiguous_format


def memory_format(device: torch.device, precision: str) -> torch.memory_format:
    """Return the format of weights on `device`; a CPU keeps the format they have.

    `precision` is the protocol's. Evaluation in fp32 keeps the format of training. With
    deterministic algorithms torch computes dilated convolutions of contiguous tensors without
    cuDNN, slowly.
    """
    if device.type != "cuda":
        return torch.preserve_format
    if precision == "fp32" and not torch.are_deterministic_algorithms_enabled():
        return FP32_ON_GPU
    return torch.channels_last


def place(module: M, device: torch.device, precision: str) -> M:
    """Move `module` to `device` in the memory format of device and precision; return it."""
    wanted = memory_format(device, precision)
    return module.to(device=device, memory_format=wanted)  # type: ignore[call-overload]  # torch's stubs lack it


def by_pixel(images: Tensor) -> Tensor:
    """Return images [B, C, H, W] as channels-last; a copy only if they are not."""
    return images.contiguous(memory_format=torch.channels_last)


def alike(x: Tensor, other: Tensor) -> Tensor:
    """Return `x` in the memory format of `other`.

    The strides of an image of one pixel fit both formats; it counts as contiguous.
    """
    is_last = other.is_contiguous(memory_format=torch.channels_last) and not other.is_contiguous()
    return by_pixel(x) if is_last else x


def for_file(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors contiguous and in main memory, so that a file loads without a GPU.

    A tensor that is so already is not copied. On a GPU only one tensor at a time has a copy.
    """
    # flattened too, because an axis of length 1 keeps the stride of its former format
    return {name: t.contiguous().flatten().view(t.shape).cpu() for name, t in tensors.items()}
