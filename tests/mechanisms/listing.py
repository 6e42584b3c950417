"""The lists of mechanisms, one file a subject."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]


@dataclass(frozen=True)
class Mechanism:
    """`promise` is kept by the text `old` of `file`; with `new` in its place `test` fails."""

    promise: str
    file: str
    old: str
    new: str
    test: str


def read_lists() -> list[Mechanism]:
    """All mechanisms, in the order of their files."""
    files = sorted(Path(__file__).parent.glob("*.toml"))
    lists = [tomllib.loads(file.read_text(encoding="utf-8"))["mechanism"] for file in files]
    return [Mechanism(**entry) for entries in lists for entry in entries]
