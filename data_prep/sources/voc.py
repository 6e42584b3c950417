"""PASCAL VOC 2012, as VOCtrainval_11-May-2012.tar unpacks: 20 classes and background.

Label maps are palette images whose indices are the classes, and 255 the borders of objects."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_prep.images import class_indices, map_labels, read_index_map
from data_prep.manifest import SPLITS
from data_prep.settings import VocSettings
from data_prep.sources.files import LAYOUTS, listed_samples, names_in, read_list
from data_prep.sources.sample import Sample
from hpc.command import UserError
from hpc.config import did_you_mean

CLASSES = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair",
    "cow", "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa",
    "train", "tvmonitor",
)  # fmt: skip
_REMEDY = (
    "the data set's root must be the folder in which VOCtrainval_11-May-2012.tar of "
    f"http://host.robots.ox.ac.uk/pascal/VOC/voc2012 was unpacked; {LAYOUTS}"
)


def classes(settings: VocSettings) -> tuple[str, ...]:
    """VOC's classes, background first."""
    return CLASSES


def prepare(settings: VocSettings) -> None:
    """Raises `UserError` if the lists or the files they name are not there."""
    for split in SPLITS:
        samples(settings, split)


def samples(settings: VocSettings, split: str) -> list[Sample]:
    """What the list of `split` names, sorted by id. Raises `UserError` as `prepare` does."""
    chosen = {"train": settings.train, "val": settings.val}[split]
    if chosen.endswith(".txt"):
        path = Path(chosen).expanduser().absolute()
        return listed(settings.root, read_list(path, "check its name in the data set"), str(path))
    return official(settings.root, chosen)


def official(root: str, name: str) -> list[Sample]:
    """What VOC's own list `name` for segmentation names. Raises `UserError`."""
    path = list_path(root, "Segmentation", name)
    known = {file[:-4] for file in names_in(path.parent, _REMEDY) if file.endswith(".txt")}
    if name not in known:
        hint = did_you_mean(name, known)
        raise UserError(f"{path.parent} has no list {name!r}; {hint}, or a file of yours, x.txt")
    return listed(root, read_list(path, _REMEDY), str(path))


def listed(root: str, ids: list[str], named_by: str) -> list[Sample]:
    """VOC's images and label maps of `ids`, sorted by id. Raises `UserError`."""
    images, labels = _home(root) / "JPEGImages", _home(root) / "SegmentationClass"
    return listed_samples(ids, named_by, images, labels, ".png", _REMEDY)


def list_path(root: str, task: str, name: str) -> Path:
    """Where VOC's list `name` for `task` (Segmentation, Main) lies."""
    return _home(root) / "ImageSets" / task / f"{name}.txt"


def official_ids(root: str, task: str, name: str) -> list[str]:
    """The ids of VOC's list `name` for `task`. Raises `UserError`."""
    return read_list(list_path(root, task, name), _REMEDY)


def read_label(settings: VocSettings, sample: Sample) -> NDArray[np.uint8]:
    """A label map as uint8 [H, W], class index or VOID. Raises `BadFile`."""
    return read_palette(sample)


def read_palette(sample: Sample) -> NDArray[np.uint8]:
    """One of VOC's own label maps, uint8 [H, W]. Raises `BadFile`."""
    return map_labels(read_index_map(sample.label), class_indices(len(CLASSES)), sample.label)


def _home(root: str) -> Path:
    return Path(root) / "VOCdevkit" / "VOC2012"
