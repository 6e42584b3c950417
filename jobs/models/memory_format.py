"""How the numbers of images, features and weights lie in memory.

On a GPU all channels of a pixel lie together (`torch.channels_last`, NHWC), as its tensor cores
want them; otherwise cuDNN reorders them before and after a convolution. Only memory knows of it:
files hold tensors in the order of their indices.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)


def memory_format(device: torch.device) -> torch.memory_format:
    """That of images and weights on `device`; a processor takes them as they are."""
    return torch.channels_last if device.type == "cuda" else torch.preserve_format


def place(module: M, device: torch.device) -> M:
    """`module` itself, on `device` and laid out as it should be there."""
    return module.to(device=device, memory_format=memory_format(device))  # type: ignore[call-overload]  # torch's stubs lack it


def laid_out(images: Tensor) -> Tensor:
    """float [B, C, H, W], laid out as its device wants it."""
    return images.to(memory_format=memory_format(images.device))


def by_pixel(images: Tensor) -> Tensor:
    """[B, C, H, W] with the channels of a pixel together, copied if they are not."""
    return images.contiguous(memory_format=torch.channels_last)


def alike(x: Tensor, other: Tensor) -> Tensor:
    """`x`, its channels laid out as those of `other`: torch goes by shape alone where an image has
    one pixel."""
    is_last = other.is_contiguous(memory_format=torch.channels_last) and not other.is_contiguous()
    return by_pixel(x) if is_last else x


def in_order(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors in the order of their indices, for a file; not copied if they are."""
    # flattened too: an axis of length one keeps a stride that says how it was laid out
    return {name: t.contiguous().flatten().view(t.shape) for name, t in tensors.items()}
