"""What the tests of the doctor look for in its lines."""

from __future__ import annotations

from pathlib import Path


def failures(lines: list[str]) -> list[str]:
    """What fails, without the word."""
    return [line.removeprefix("FAIL  ") for line in lines if line.startswith("FAIL")]


def only_failure(found: tuple[int, list[str]]) -> str:
    """The one line that fails, while the others go on."""
    code, lines = found
    assert code == 1
    (line,) = failures(lines)
    assert lines[-1].startswith("skip  the nodes: "), "and it went on to the end"
    return line


def flip(path: Path) -> None:
    """One bit in the middle of a file is another."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
