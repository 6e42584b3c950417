"""Read a data set in pairs of folders: images and label maps of equal stem, of any size."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_prep.images import SUFFIXES, map_labels, read_index_map
from data_prep.settings import FolderSettings
from data_prep.sources.files import Sample
from hpc.cli import UserError, unreadable

_MAX_SHOWN = 3  # file names in a message


def classes(settings: FolderSettings) -> tuple[str, ...]:
    """Return the class names of the grid file."""
    return settings.classes


def samples(settings: FolderSettings, split: str) -> list[Sample]:
    """Return the pairs of `split`, sorted by id.

    Raises:
        UserError: a folder is missing or empty, or files do not pair.
    """
    names = {
        "train": (settings.train_images, settings.train_labels),
        "val": (settings.val_images, settings.val_labels),
    }[split]
    image_folder, label_folder = (Path(settings.root) / name for name in names)
    if image_folder.resolve() == label_folder.resolve():
        raise UserError(
            f"{image_folder} is the folder of both images and label maps of {split}; move the "
            f"label maps to a folder of their own, and name it in {split}_labels"
        )
    images = _by_stem(image_folder, f"; if one is a label map, move it to {label_folder}")
    labels = _by_stem(label_folder)
    if not images:
        unread = _unread(image_folder, "images as PNG or JPEG")
        raise UserError(f"{image_folder} holds no images ({', '.join(SUFFIXES)}){unread}")
    _refuse_unpaired(images, labels, "label map", label_folder)
    _refuse_unpaired(labels, images, "image", image_folder)
    stems = sorted(images, key=str.encode)
    return [Sample(stem, images[stem], labels[stem]) for stem in stems]


def read_label(settings: FolderSettings, sample: Sample) -> NDArray[np.uint8]:
    """Return a label map as uint8 [H, W], class index or VOID.

    Raises:
        BadFile: the label map cannot be packed.
    """
    values = read_index_map(sample.label)
    remedy = "correct the label map, or the settings classes, labels and void of the data set"
    return map_labels(values, settings.label_of_value(), sample.label, remedy)


def _by_stem(folder: Path, advice: str = "") -> dict[str, Path]:
    try:
        files = sorted(f for f in folder.iterdir() if _is_image(f))
    except OSError as error:
        message = (
            f"cannot read the folder {folder}: {error.strerror}; check root and the folder names "
            "of the data set"
        )
        raise unreadable(error, message) from error
    found: dict[str, Path] = {}
    for file in files:
        if file.stem in found:
            raise UserError(
                f"{found[file.stem]} and {file.name} have the same stem; keep one{advice}"
            )
        found[_checked(file)] = file
    return found


def _is_image(file: Path) -> bool:
    return file.suffix.lower() in SUFFIXES and not file.name.startswith(".")


def _checked(file: Path) -> str:
    try:
        file.stem.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{str(file)!r}: the file name is not UTF-8; rename it") from error
    return file.stem


def _refuse_unpaired(
    have: dict[str, Path], other: dict[str, Path], missing: str, where: Path
) -> None:
    alone = sorted(have.keys() - other.keys(), key=str.encode)
    twins = {unicodedata.normalize("NFC", stem): file for stem, file in other.items()}
    for stem in alone:
        if twin := twins.get(unicodedata.normalize("NFC", stem)):
            raise UserError(
                f"{have[stem]} and {twin} look alike, but their names are two Unicode forms, "
                f"{_form(stem)} and {_form(twin.stem)}; rename one of them (macOS writes NFD)"
            )
    if alone:
        names = ", ".join(have[stem].name for stem in alone[:_MAX_SHOWN])
        more = f" and {len(alone) - _MAX_SHOWN} more" if len(alone) > _MAX_SHOWN else ""
        advice = _unread(where, f"{missing}s as PNG", alone)
        raise UserError(
            f"{names}{more} in {have[alone[0]].parent}: no {missing} of the same stem in {where}"
            + (advice or "; add or remove files so that they pair")
        )


def _unread(folder: Path, remedy: str, stems: Iterable[str] | None = None) -> str:
    """Return the end of a message about files with one of `stems` whose format is not read."""
    files = [f for f in folder.iterdir() if not f.name.startswith(".") and not _is_image(f)]
    wanted = {file.stem for file in files} if stems is None else set(stems)
    unread = sorted(f.name for f in files if f.suffix and f.stem in wanted and f.is_file())
    if not unread:
        return ""
    more = f" and {len(unread) - 1} more are" if len(unread) > 1 else " is"
    return f"; {unread[0]}{more} there, in a format that is not read: save {remedy}"


def _form(stem: str) -> str:
    return next((f for f in ("NFC", "NFD") if unicodedata.is_normalized(f, stem)), "a mixture")
