"""The data sets that can be packed, one module per source. Each module defines

classes(settings) -> tuple[str, ...]           the class names, in the order of their indices
samples(settings, split) -> list[Sample]       sorted by id (as UTF-8 bytes); all files exist
read_label(settings, sample) -> uint8 [H, W]   class index or VOID; raises `BadFile`
prepare(settings) -> None                      only if the source makes its files: make them
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

from data_prep.settings import SOURCES


def source_module(source: str) -> ModuleType:
    """Return the module of one of `SOURCES`.

    It is imported here: the modules read images, which most commands on the login node never do.
    """
    assert source in SOURCES
    return import_module(f"data_prep.sources.{source}")
