"""The data sets that can be packed: one module a source. Each offers

classes(settings) -> tuple[str, ...]         the names of the classes, by label value
prepare(settings) -> None                    checks that the files are there, or makes them
samples(settings, split) -> list[Sample]     sorted by id (bytes of its UTF-8)
read_label(settings, sample) -> uint8 [H, W]   class index or VOID; raises `BadFile`
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

SOURCES = ("voc", "sbd", "cityscapes", "coco", "folder", "synthetic")


def source_module(source: str) -> ModuleType:
    """The module of one of `SOURCES`. Loaded when it is asked for: they read pictures, and most
    commands of the login node never do."""
    assert source in SOURCES
    return import_module(f"data_prep.sources.{source}")
