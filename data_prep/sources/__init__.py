"""The data sets that can be packed: one module a source. Each offers

classes(settings) -> tuple[str, ...]         the names of the classes, by label value
prepare(settings) -> None                    checks that the files are there, or makes them
samples(settings, split) -> list[Sample]     sorted by id (bytes of its UTF-8)
read_label(settings, path) -> uint8 [H, W]   class index or VOID; raises `BadFile`
"""

from __future__ import annotations

from types import ModuleType

from data_prep.sources import folder, synthetic

SOURCES: dict[str, ModuleType] = {"folder": folder, "synthetic": synthetic}
