"""Dropout with a counter-based mask, which does not depend on how the batch is spread over ranks.

The mask is a function of (seed, model, step, position in the global batch, layer, element).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor, nn

_MASK = 0xFFFFFFFF


class PositionalDropout(nn.Dropout):
    """`nn.Dropout` with a counter-based mask; call `set_dropout_position` before each step."""

    keys: tuple[tuple[int, int], ...] | None = None  # two 32-bit keys for each image

    def forward(self, input: Tensor) -> Tensor:
        """Drop elements of `input`, float [B, ...], at rate p; scale the others by 1 / (1 - p)."""
        if not self.training or self.p == 0:
            return input
        assert self.keys is not None, "set_dropout_position was not called"
        assert len(self.keys) == len(input), "there must be one position for each image"
        drop = _shared_mask(self.keys, input.shape[1:].numel(), self.p, input.device)
        # keeps the memory format of the input, unlike `torch.where`
        return (input / (1 - self.p)).masked_fill_(drop.view_as(input), 0.0)


@lru_cache(maxsize=2)  # a bundle has two kinds of head with dropout, one layer each
def _shared_mask(
    keys: tuple[tuple[int, int], ...], count: int, rate: float, device: torch.device
) -> Tensor:
    """Return bool [B, count], true for elements that drop.

    All losses of a bundle share the masks of their heads, so callers must not write to them.
    """
    rows = torch.tensor(keys, dtype=torch.int64).reshape(-1, 2).to(device)
    return random_bits(rows, count) < int(rate * 2**32)


def random_bits(keys: Tensor, count: int) -> Tensor:
    """Return uniform 32-bit integers, int64 [B, count]; element e of row b hashes (keys[b], e).

    The hash is the finaliser of MurmurHash3, keyed before each of two rounds.

    Args:
        keys: two 32-bit keys for each row, int64 [B, 2].
        count: elements of a row.
    """
    bits = torch.arange(count, device=keys.device).unsqueeze(0) ^ keys[:, :1]
    bits = _mix(bits * 0x9E3779B1 & _MASK)
    return _mix(bits ^ keys[:, 1:])


def _mix(bits: Tensor) -> Tensor:
    bits = bits ^ (bits >> 16)
    bits = bits * 0x85EBCA6B & _MASK
    bits = bits ^ (bits >> 13)
    bits = bits * 0xC2B2AE35 & _MASK
    return bits ^ (bits >> 16)


def replace_dropout(module: nn.Module) -> None:
    """Replace every `nn.Dropout` inside `module` by `PositionalDropout`."""
    for child in module.modules():
        if isinstance(child, nn.Dropout):
            child.__class__ = PositionalDropout


def set_dropout_position(
    module: nn.Module, seed: int, model: str, step: int, positions: Sequence[int]
) -> None:
    """Key the dropout layers of `module` for one step.

    The loss is not part of the key, so that losses are compared on the same random numbers.

    Args:
        positions: places of this rank's images in the global batch.
    """
    layers = [child for child in module.modules() if isinstance(child, PositionalDropout)]
    for number, layer in enumerate(layers):
        layer.keys = tuple(_key(f"{seed}/{model}/{step}/{place}/{number}") for place in positions)


def _key(text: str) -> tuple[int, int]:
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")
