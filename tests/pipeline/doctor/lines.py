"""Read the lines of the doctor, and damage a file."""

from __future__ import annotations

from pathlib import Path


def failures(lines: list[str]) -> list[str]:
    """Return the FAIL lines without that word."""
    return [line.removeprefix("FAIL  ") for line in lines if line.startswith("FAIL")]


def only_failure(found: tuple[int, list[str]]) -> str:
    """Return the only FAIL line; check that other checks passed."""
    code, lines = found
    assert code == 1
    (line,) = failures(lines)
    assert lines[-1].startswith("skip  the nodes: "), "and it went on to the end"
    return line


def flip(path: Path) -> None:
    """Flip one bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
