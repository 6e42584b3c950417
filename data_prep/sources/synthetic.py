"""Draw street scenes as JPEG and PNG files, to be packed like a real data set."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from data_prep.images import class_indices, map_labels, read_index_map
from data_prep.settings import SyntheticSettings
from data_prep.shards.manifest import SPLITS
from data_prep.sources.files import Sample
from data_prep.sources.scenes import CLASSES, draw_scene
from hpc.cli import UserError
from hpc.storage.atomic import Damaged, read_json, write_json

JPEG_QUALITY = 92
_DRAWING_VERSION = 1  # raise it when a change of the program draws other scenes
_DONE = "scenes.json"


def classes(settings: SyntheticSettings) -> tuple[str, ...]:
    """Return the eight classes of the scenes."""
    return CLASSES


def prepare(settings: SyntheticSettings) -> None:
    """Draw and write all files, unless they exist.

    Raises:
        UserError: a file cannot be written.
    """
    if _is_done(settings):
        return
    root = Path(settings.root)
    try:
        (root / _DONE).unlink(missing_ok=True)
        for split in SPLITS:
            for folder in _folders(settings, split):
                folder.mkdir(parents=True, exist_ok=True)
            for index, sample in enumerate(samples(settings, split)):
                _write(settings, split, index, sample)
    except OSError as error:
        raise UserError(
            f"cannot write images to {root}: {error.strerror}; free space or fix permissions"
        ) from error
    write_json(root / _DONE, _wanted(settings))


def samples(settings: SyntheticSettings, split: str) -> list[Sample]:
    """Return the scenes of `split`, sorted by id."""
    images, labels = _folders(settings, split)
    count = {"train": settings.train, "val": settings.val}[split]
    stems = (f"{split}_{index:06d}" for index in range(count))
    return [Sample(stem, images / f"{stem}.jpg", labels / f"{stem}.png") for stem in stems]


def read_label(settings: SyntheticSettings, sample: Sample) -> NDArray[np.uint8]:
    """Return a label map as uint8 [H, W], class index or VOID.

    Raises:
        BadFile: the label map cannot be packed.
    """
    return map_labels(read_index_map(sample.label), class_indices(len(CLASSES)), sample.label)


def _write(settings: SyntheticSettings, split: str, index: int, sample: Sample) -> None:
    image, label = draw_scene(settings.seed, SPLITS.index(split), index, settings.size)
    Image.fromarray(image).save(sample.image, quality=JPEG_QUALITY)
    Image.fromarray(label).save(sample.label)


def _folders(settings: SyntheticSettings, split: str) -> tuple[Path, Path]:
    return Path(settings.root) / split, Path(settings.root) / f"{split}annot"


def _is_done(settings: SyntheticSettings) -> bool:
    try:
        return read_json(Path(settings.root) / _DONE) == _wanted(settings)
    except (OSError, Damaged):
        return False


def _wanted(settings: SyntheticSettings) -> dict[str, object]:
    drawing = {"seed": settings.seed, "size": list(settings.size), "drawing": _DRAWING_VERSION}
    return {**drawing, "train": settings.train, "val": settings.val}
