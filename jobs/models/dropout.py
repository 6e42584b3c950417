"""Dropout whose mask is a function of (seed, model, step, position in the global batch, layer,
element): however the batch is spread over ranks and whatever else runs, the same element drops."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor, nn

_MASK = 0xFFFFFFFF


class PositionalDropout(nn.Dropout):
    """`nn.Dropout` with a counter-based mask. `set_dropout_position` must be called before each
    training step."""

    keys: tuple[tuple[int, int], ...] | None = None  # two 32-bit keys an image

    def forward(self, input: Tensor) -> Tensor:
        """float [B, ...] -> the same, with elements dropped at rate p and the others scaled by
        1 / (1 - p)."""
        if not self.training or self.p == 0:
            return input
        assert self.keys is not None, "set_dropout_position was not called"
        assert len(self.keys) == len(input), "one position an image"
        drop = _shared_mask(self.keys, input.shape[1:].numel(), self.p, input.device)
        # laid out as the input is, which `torch.where` is not
        return (input / (1 - self.p)).masked_fill_(drop.view_as(input), 0.0)


@lru_cache(maxsize=2)  # a bundle has two kinds of head with dropout, one layer each
def _shared_mask(
    keys: tuple[tuple[int, int], ...], count: int, rate: float, device: torch.device
) -> Tensor:
    """Return bool [B, count], true where an element drops. Heads of one kind have the same mask,
    whatever their loss. It is drawn once for all of them, so callers must not write to it."""
    rows = torch.tensor(keys, dtype=torch.int64).reshape(-1, 2).to(device)
    return random_bits(rows, count) < int(rate * 2**32)


def random_bits(keys: Tensor, count: int) -> Tensor:
    """Uniform 32-bit integers as int64 [B, count]: element e of row b is a hash of (keys[b], e).
    The finaliser of MurmurHash3, keyed before each of its two rounds."""
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
    """Make every `nn.Dropout` inside `module` one of ours."""
    for child in module.modules():
        if isinstance(child, nn.Dropout):
            child.__class__ = PositionalDropout


def set_dropout_position(
    module: nn.Module, seed: int, model: str, step: int, positions: Sequence[int]
) -> None:
    """Key the dropout layers of `module` for one step. `positions` are the places of this rank's
    images in the global batch. The loss is no part of the key: losses are compared on common
    random numbers."""
    layers = [child for child in module.modules() if isinstance(child, PositionalDropout)]
    for number, layer in enumerate(layers):
        layer.keys = tuple(_key(f"{seed}/{model}/{step}/{place}/{number}") for place in positions)


def _key(text: str) -> tuple[int, int]:
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")
