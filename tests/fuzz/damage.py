"""Damage a file on a disk: functions from its bytes to the damaged bytes."""

from __future__ import annotations

from collections.abc import Callable

from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

Damage = Callable[[bytes], bytes]
_PLACES = st.integers(0, 2**24)
_LENGTHS = st.integers(1, 5000) | st.integers(1, 16)


def flips(place: int, mask: int) -> Damage:
    """One byte is another."""

    def damage(whole: bytes) -> bytes:
        k = place % len(whole)
        return whole[:k] + bytes([whole[k] ^ mask]) + whole[k + 1 :]

    return damage


def zeros(place: int, length: int) -> Damage:
    """A block that never reached the disk."""

    def damage(whole: bytes) -> bytes:
        k = place % len(whole)
        block = whole[k : k + length]
        return whole[:k] + bytes(len(block)) + whole[k + len(block) :]

    return damage


def swaps(place: int, other: int, length: int) -> Damage:
    """Two blocks changed places."""

    def damage(whole: bytes) -> bytes:
        i, j = sorted((place % len(whole), other % len(whole)))
        n = min(length, j - i, len(whole) - j)
        one, two = whole[i : i + n], whole[j : j + n]
        return whole[:i] + two + whole[i + n : j] + one + whole[j + n :]

    return damage


def cuts(place: int) -> Damage:
    """The file ends early."""
    return lambda whole: whole[: place % len(whole)]


def grows(more: bytes) -> Damage:
    """The file goes on after its end."""
    return lambda whole: whole + more


DAMAGES: SearchStrategy[Damage] = st.one_of(
    st.builds(flips, _PLACES, st.integers(1, 255)),
    st.builds(zeros, _PLACES, _LENGTHS),
    st.builds(swaps, _PLACES, _PLACES, _LENGTHS),
    st.builds(cuts, _PLACES),
    st.builds(grows, st.binary(min_size=1, max_size=40)),
)
