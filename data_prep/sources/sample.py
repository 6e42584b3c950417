"""A sample as it lies in a public data set."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Sample:
    """One picture and its label map, as files.

    Where one file holds the labels of many pictures, `label` is that file, and `annotation` is what
    it says of this one, in the source's own text. It travels with the sample, so that a large file
    is parsed once and not by every process that packs."""

    id: str
    image: Path
    label: Path
    annotation: str = ""
