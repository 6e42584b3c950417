"""Damage text and records: bits flip, disks lose or zero sectors, users edit. One to
three at a time, and as often near the beginning, where formats keep what matters, as anywhere."""

from __future__ import annotations

import random
from collections.abc import Callable

_TOKENS = (b"\xff" * 8, b"\x7f\xff\xff\xff", b"\x00", b"\n", b"{}", b'"', b"NaN", b"\xef\xbb\xbf")


def flip(chance: random.Random, data: bytearray) -> None:
    data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)


def cut(chance: random.Random, data: bytearray) -> None:
    del data[chance.randrange(len(data)) :]


def lose(chance: random.Random, data: bytearray) -> None:
    start = chance.randrange(len(data))
    del data[start : start + chance.randrange(1, 40)]


def zero(chance: random.Random, data: bytearray) -> None:
    start = chance.randrange(len(data))
    data[start : start + 512] = bytes(len(data[start : start + 512]))


def insert(chance: random.Random, data: bytearray) -> None:
    place = chance.randrange(len(data))
    data[place:place] = chance.choice([*_TOKENS, chance.randbytes(5)])


def overwrite(chance: random.Random, data: bytearray) -> None:
    place, new = chance.randrange(len(data)), chance.choice([*_TOKENS, chance.randbytes(8)])
    data[place : place + len(new)] = new


def append(chance: random.Random, data: bytearray) -> None:
    data += chance.choice([*_TOKENS, bytes(data[: chance.randrange(len(data))])])


KINDS: tuple[Callable[[random.Random, bytearray], None], ...] = (
    flip, cut, lose, zero, insert, overwrite, append
)  # fmt: skip


def damaged(chance: random.Random, content: bytes) -> bytes:
    """`content` after one to three accidents."""
    data = bytearray(content)
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        if not data:
            break
        end = min(len(data), 2000) if chance.random() < 0.5 else len(data)
        head = data[:end]
        chance.choice(KINDS)(chance, head)
        data[:end] = head
    return bytes(data)
