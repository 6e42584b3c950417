"""Read PASCAL VOC 2012 (VOCtrainval_11-May-2012.tar): 20 classes and background.

Label maps are palette images. Their indices are the classes, and 255 (void) the objects' borders.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_prep.images import BadFile, class_indices, map_labels, read_palette_map
from data_prep.settings import VOID, VocSettings
from data_prep.sources.files import TREE_HINT, Sample, listed_samples, names_in, read_list
from hpc.account import expanded
from hpc.cli import UserError
from hpc.config import did_you_mean

CLASSES = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair",
    "cow", "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa",
    "train", "tvmonitor",
)  # fmt: skip
_REMEDY = (
    "the data set's root must be the folder in which VOCtrainval_11-May-2012.tar of "
    f"http://host.robots.ox.ac.uk/pascal/VOC/voc2012 was unpacked; {TREE_HINT}"
)


def classes(settings: VocSettings) -> tuple[str, ...]:
    """Return VOC's classes, background first."""
    return CLASSES


def samples(settings: VocSettings, split: str) -> list[Sample]:
    """Return the samples that the list of `split` names, sorted by id.

    Raises:
        UserError: a list, or a file that it names, is missing.
    """
    chosen = {"train": settings.train, "val": settings.val}[split]
    if chosen.endswith(".txt"):
        path = expanded(chosen).absolute()
        return listed(settings.root, read_list(path, "check its name in the data set"), str(path))
    return official(settings.root, chosen)


def official(root: str, name: str) -> list[Sample]:
    """Return the samples of VOC's own list `name` for segmentation.

    Raises:
        UserError: the list or a file that it names does not exist.
    """
    path = list_path(root, "Segmentation", name)
    known = {file[:-4] for file in names_in(path.parent, _REMEDY) if file.endswith(".txt")}
    if name not in known:
        hint = did_you_mean(name, known)
        raise UserError(f"{path.parent} has no list {name!r}; {hint}, or your own file, NAME.txt")
    return listed(root, read_list(path, _REMEDY), str(path))


def listed(root: str, ids: list[str], named_by: str) -> list[Sample]:
    """Return VOC's samples of `ids`, sorted by id. `named_by` is the list, for messages.

    Raises:
        UserError: a file does not exist.
    """
    images, labels = _home(root) / "JPEGImages", _home(root) / "SegmentationClass"
    return listed_samples(ids, named_by, images, labels, ".png", _REMEDY)


def list_path(root: str, task: str, name: str) -> Path:
    """Return the path of VOC's list `name` for `task` (Segmentation, Main)."""
    return _home(root) / "ImageSets" / task / f"{name}.txt"


def official_ids(root: str, task: str, name: str) -> list[str]:
    """Return the ids of VOC's list `name` for `task` (Segmentation, Main).

    Raises:
        UserError: the list cannot be read.
    """
    return read_list(list_path(root, task, name), _REMEDY)


def read_label(settings: VocSettings, sample: Sample) -> NDArray[np.uint8]:
    """Return a label map as uint8 [H, W], class index or VOID.

    Raises:
        BadFile: the label map cannot be packed.
    """
    return read_palette(sample)


def read_palette(sample: Sample) -> NDArray[np.uint8]:
    """Return one of VOC's own label maps, uint8 [H, W].

    Raises:
        BadFile: the label map cannot be packed, or its palette is not VOC's. Some image editors
            keep the colours and renumber the indices.
    """
    values, palette = read_palette_map(sample.label)
    label = map_labels(values, class_indices(len(CLASSES)), sample.label)
    if palette is not None:
        used = np.flatnonzero(np.bincount(values.reshape(-1)))
        _refuse_other_colours(used.tolist(), palette, sample.label)
    return label


def _refuse_other_colours(used: list[int], palette: NDArray[np.uint8], path: Path) -> None:
    for index in used:
        found = tuple(palette[index].tolist()) if index < len(palette) else None
        # a palette that is a grey ramp says nothing about the indices
        if found not in (expected := _colour(index), (index,) * 3):
            kind = "void" if index == VOID else repr(CLASSES[index])
            raise BadFile(
                f"{path}: palette entry {index} is the colour {found}, not {expected} of VOC's "
                f"{kind}, so its values are not VOC's; restore the original file"
            )


def _colour(index: int) -> tuple[int, ...]:
    """Return VOC's colour of a label: the bits of the index, spread over red, green and blue."""
    bits = ((index >> (3 * place), 7 - place) for place in range(3))
    spread = [[(three >> channel & 1) << to for channel in range(3)] for three, to in bits]
    return tuple(map(sum, zip(*spread, strict=True)))


def _home(root: str) -> Path:
    return Path(root) / "VOCdevkit" / "VOC2012"
