"""Read Cityscapes with fine annotations: leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip.

Label maps hold raw ids, which are mapped to one of three sets of classes.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_prep.images import map_labels, read_index_map
from data_prep.settings import VOID, CityscapesSettings
from data_prep.sources.files import TREE_HINT, Sample, names_in, refuse_missing
from hpc.cli import UserError

RAW_IDS = (
    "unlabeled", "ego vehicle", "rectification border", "out of roi", "static", "dynamic", "ground",
    "road", "sidewalk", "parking", "rail track", "building", "wall", "fence", "guard rail",
    "bridge", "tunnel", "pole", "polegroup", "traffic light", "traffic sign", "vegetation",
    "terrain", "sky", "person", "rider", "car", "truck", "bus", "caravan", "trailer", "train",
    "motorcycle", "bicycle",
)  # fmt: skip
# number of classes -> the raw ids of these classes; all other ids are void
CLASS_IDS = {
    34: tuple(range(34)),
    30: tuple(range(4, 34)),
    19: (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33),
}
_IMAGE, _LABEL = "_leftImg8bit.png", "_gtFine_labelIds.png"
_REMEDY = (
    "the data set's root must be the folder in which leftImg8bit_trainvaltest.zip and "
    "gtFine_trainvaltest.zip of https://www.cityscapes-dataset.com/downloads were unpacked; "
    f"{TREE_HINT}"
)


def classes(settings: CityscapesSettings) -> tuple[str, ...]:
    """Return the names of the chosen classes, in the order of their raw ids."""
    return tuple(RAW_IDS[raw] for raw in CLASS_IDS[settings.num_classes])


def samples(settings: CityscapesSettings, split: str) -> list[Sample]:
    """Return the images of all cities, with ids CITY/STEM, sorted by id.

    Raises:
        UserError: an image or label map is missing or does not pair.
    """
    images, labels = (Path(settings.root) / kind / split for kind in ("leftImg8bit", "gtFine"))
    cities = _folders(images)
    found = [s for city in cities for s in _of_city(images / city, labels / city)]
    if not found:
        raise UserError(f"{images} holds no CITY/*{_IMAGE}; {_REMEDY}")
    refuse_missing(sorted(_folders(labels) - cities), images, str(labels), _REMEDY)
    return sorted(found, key=lambda sample: sample.id.encode())


def read_label(settings: CityscapesSettings, sample: Sample) -> NDArray[np.uint8]:
    """Return a label map as uint8 [H, W], class index or VOID.

    Raises:
        BadFile: the label map cannot be packed.
    """
    index = {raw_id: number for number, raw_id in enumerate(CLASS_IDS[settings.num_classes])}
    label_of = {raw_id: index.get(raw_id, VOID) for raw_id in (*range(len(RAW_IDS)), VOID)}
    return map_labels(read_index_map(sample.label), label_of, sample.label)


def _of_city(images: Path, labels: Path) -> list[Sample]:
    stems = _stems(images, _IMAGE)
    drawn = _stems(labels, _LABEL)
    refuse_missing(
        sorted(s + _LABEL for s in stems - drawn), labels, f"an image in {images}", _REMEDY
    )
    refuse_missing(
        sorted(s + _IMAGE for s in drawn - stems), images, f"a label map in {labels}", _REMEDY
    )
    return [
        Sample(f"{images.name}/{stem}", images / f"{stem}{_IMAGE}", labels / f"{stem}{_LABEL}")
        for stem in stems
    ]


def _folders(parent: Path) -> set[str]:
    return {name for name in names_in(parent, _REMEDY) if (parent / name).is_dir()}


def _stems(folder: Path, ending: str) -> set[str]:
    names = names_in(folder, _REMEDY)
    return {name.removesuffix(ending) for name in names if name.endswith(ending)}
