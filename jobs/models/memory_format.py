"""The memory format of images, features and weights.

On a GPU it is `torch.channels_last` (NHWC), as tensor cores need it; otherwise cuDNN reorders
tensors before and after each convolution. Files hold contiguous tensors on every device.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)


def memory_format(device: torch.device) -> torch.memory_format:
    """Return the format of images and weights on `device`; a CPU keeps the format they have."""
    return torch.channels_last if device.type == "cuda" else torch.preserve_format


def place(module: M, device: torch.device) -> M:
    """Move `module` to `device` in the memory format of that device; return it."""
    return module.to(device=device, memory_format=memory_format(device))  # type: ignore[call-overload]  # torch's stubs lack it


def laid_out(images: Tensor) -> Tensor:
    """Return images [B, C, H, W] in the memory format of their device."""
    return images.to(memory_format=memory_format(images.device))


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
