"""Pictures that are trained on in one place and validated on in another, counted by their ids."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import permutations

from data_prep.manifest import Manifest
from data_prep.settings import DatasetSettings, SbdSettings
from data_prep.sources import source_module
from hpc.command import UserError

Ids = Mapping[str, Sequence[str]]  # by split
_SAME_PICTURES = {"voc", "sbd"}  # sources whose equal ids are the same photograph


def ids_of(manifest: Manifest) -> dict[str, list[str]]:
    """The ids of a packed data set by split."""
    return {
        split: [one for shard in half.shards for one in shard.ids]
        for split, half in manifest.splits.items()
    }


def overlap_warnings(datasets: Mapping[str, DatasetSettings], ids: Mapping[str, Ids]) -> list[str]:
    """What to know of data sets whose `ids` are given, one line each: pictures in both lists of
    one, and training pictures of VOC or SBD on which another of the two validates, or VOC itself
    where an SBD's `voc_root` still holds its list."""
    return [*_within(ids), *_between(datasets, ids), *_with_voc(datasets, ids)]


def _within(ids: Mapping[str, Ids]) -> Iterator[str]:
    for name, splits in ids.items():
        if shared := _shared(splits["train"], splits["val"]):
            yield (
                f"{len(shared)} of {len(splits['val'])} validation images of the data set {name!r} "
                f"are training images too, {shared[0]!r} first: its scores are not of unseen "
                "images; choose lists that share none"
            )


def _between(datasets: Mapping[str, DatasetSettings], ids: Mapping[str, Ids]) -> Iterator[str]:
    related = [name for name in ids if datasets[name].source in _SAME_PICTURES]
    for trained, validated in permutations(related, 2):
        if shared := _shared(ids[trained]["train"], ids[validated]["val"]):
            yield _seen(trained, shared, len(ids[validated]["val"]), f"the data set {validated!r}")


def _with_voc(datasets: Mapping[str, DatasetSettings], ids: Mapping[str, Ids]) -> Iterator[str]:
    if any(datasets[name].source == "voc" for name in ids):
        return  # it is compared as it is
    for name in ids:
        settings = datasets[name]
        if not isinstance(settings, SbdSettings):
            continue
        sbd = source_module("sbd")
        if settings.val != sbd.VOC_VAL:
            try:
                theirs = sbd.voc_val_ids(settings)
            except UserError:  # shards outlive what they were packed from
                continue
            if shared := _shared(ids[name]["train"], theirs):
                yield _seen(name, shared, len(theirs), "VOC 2012")


def _seen(trained: str, shared: Sequence[str], validated: int, where: str) -> str:
    return (
        f"{len(shared)} of {validated} validation images of {where} are training images of the "
        f"data set {trained!r}, {shared[0]!r} first: what trains on it has seen them, so do not "
        "score it there (SBD's list train_noval shares none with VOC's validation)"
    )


def _shared(train: Sequence[str], val: Sequence[str]) -> list[str]:
    return sorted(set(train) & set(val), key=str.encode)
