"""The data sets that can be packed: one module a source. Each offers

classes(settings) -> tuple[str, ...]         the names of the classes, by label value
prepare(settings) -> None                    checks that the files are there, or makes them
samples(settings, split) -> list[Sample]     sorted by id (bytes of its UTF-8)
read_label(settings, sample) -> uint8 [H, W]   class index or VOID; raises `BadFile`
"""

from __future__ import annotations

from types import ModuleType

from data_prep.sources import cityscapes, coco, folder, sbd, synthetic, voc

SOURCES: dict[str, ModuleType] = {
    "voc": voc,
    "sbd": sbd,
    "cityscapes": cityscapes,
    "coco": coco,
    "folder": folder,
    "synthetic": synthetic,
}
