"""A sample as it lies in a public data set."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Sample:
    """One picture and its label map, as files."""

    id: str
    image: Path
    label: Path
