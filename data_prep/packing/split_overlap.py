"""Find images that are in a training and in a validation set, of one or of two data sets."""

from __future__ import annotations

import filecmp
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Self

from data_prep.settings import DatasetSettings, SbdSettings
from data_prep.shards.manifest import SPLITS, Manifest
from data_prep.sources import source_module
from data_prep.sources.files import Sample
from hpc.cli import UserError

_SHARED_IMAGES = {"voc", "sbd"}  # sources in which equal ids are the same photograph


@dataclass(frozen=True)
class ImageIds:
    """The ids of a data set's images."""

    train: Sequence[str]
    val: Sequence[str]
    leaked: Sequence[str]  # ids in `val` whose content is also in `train`

    @classmethod
    def packed(cls, manifest: Manifest) -> Self:
        """Return those of a packed data set."""
        train, val = (
            [one for shard in manifest.splits[split].shards for one in shard.ids]
            for split in SPLITS
        )
        return cls(train, val, manifest.leaked)

    @classmethod
    def of_source(cls, settings: DatasetSettings) -> Self:
        """Return those of a data set that is not packed yet.

        Only images of equal ids are compared; packing compares all.

        Raises:
            UserError: files are missing or do not pair.
        """
        source = source_module(settings.source)
        train, val = ({s.id: s for s in source.samples(settings, split)} for split in SPLITS)
        leaked = [one for one in val if one in train and _same_image(train[one], val[one])]
        return cls(list(train), list(val), leaked)


Datasets = Mapping[str, DatasetSettings]
ImageIdsByName = Mapping[str, ImageIds]


def overlap_warnings(datasets: Datasets, image_ids: ImageIdsByName) -> list[str]:
    """Return one line for each overlap of training and validation images.

    Overlaps are images in both splits of a data set, and training images of VOC or SBD that another
    data set of these validates on. SBD is compared with VOC itself if VOC is not among the data
    sets and SBD's `voc_root` has VOC's list.

    Args:
        datasets: settings by name.
        image_ids: the images of the data sets to compare, by name.
    """
    return [
        *_within(datasets, image_ids),
        *_between(datasets, image_ids),
        *_with_voc(datasets, image_ids),
    ]


def _same_image(one: Sample, other: Sample) -> bool:
    try:
        return one.image == other.image or filecmp.cmp(one.image, other.image, shallow=False)
    except OSError:
        return False  # packing reports the error


def _within(datasets: Datasets, image_ids: ImageIdsByName) -> Iterator[str]:
    for name, of in image_ids.items():
        by_id = _shared(of.train, of.val) if datasets[name].source in _SHARED_IMAGES else []
        if shared := sorted({*of.leaked, *by_id}, key=str.encode):
            yield (
                f"{len(shared)} of {len(of.val)} validation images of the data set {name!r} "
                f"are training images too, {shared[0]!r} first; its scores are not of unseen "
                "images, so choose lists without common images"
            )


def _between(datasets: Datasets, image_ids: ImageIdsByName) -> Iterator[str]:
    related = [name for name in image_ids if datasets[name].source in _SHARED_IMAGES]
    for trained, validated in permutations(related, 2):
        if shared := _shared(image_ids[trained].train, image_ids[validated].val):
            yield _seen(
                trained, shared, len(image_ids[validated].val), f"the data set {validated!r}"
            )


def _with_voc(datasets: Datasets, image_ids: ImageIdsByName) -> Iterator[str]:
    if any(datasets[name].source == "voc" for name in image_ids):
        return  # `_between` compares it
    for name in image_ids:
        settings = datasets[name]
        if not isinstance(settings, SbdSettings):
            continue
        sbd = source_module("sbd")
        if settings.val != sbd.VOC_VAL:
            try:
                theirs = sbd.voc_val_ids(settings)
            except UserError:  # the source files may be gone once they are packed
                continue
            if shared := _shared(image_ids[name].train, theirs):
                yield _seen(name, shared, len(theirs), "VOC 2012")


def _seen(trained: str, shared: Sequence[str], validated: int, where: str) -> str:
    return (
        f"{len(shared)} of {validated} validation images of {where} are training images of the "
        f"data set {trained!r}, {shared[0]!r} first; do not score models there that were trained "
        "on it (SBD's list train_noval shares none with VOC's validation)"
    )


def _shared(train: Sequence[str], val: Sequence[str]) -> list[str]:
    return sorted(set(train) & set(val), key=str.encode)
