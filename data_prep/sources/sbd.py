"""Read the Semantic Boundaries Dataset: VOC's classes on 11 355 of VOC's images.

Objects are drawn to their edges, so there is no void.
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_prep.images import BadFile, class_indices, map_labels, read_bytes
from data_prep.settings import SbdSettings
from data_prep.shards.manifest import SPLITS
from data_prep.sources import voc
from data_prep.sources.files import TREE_HINT, Sample, listed_samples, names_in, read_list
from hpc.account import expanded
from hpc.cli import UserError
from hpc.config import did_you_mean

VOC_VAL = "voc_val"  # in place of a list: VOC's validation images
_NOVAL = "train_noval"
_REMEDY = (
    "the data set's root must be the folder in which benchmark.tgz of "
    f"http://home.bharathh.info/pubs/codes/SBD/download.html was unpacked; {TREE_HINT}"
)


def classes(settings: SbdSettings) -> tuple[str, ...]:
    """Return VOC's classes, background first."""
    return voc.CLASSES


def samples(settings: SbdSettings, split: str) -> list[Sample]:
    """Return the samples that the list of `split` names, sorted by id.

    Raises:
        UserError: a list, or a file that it names, is missing, or `voc_root` is wrong.
    """
    voc_val_ids(settings)  # refuse a wrong voc_root now, not when overlaps are counted
    chosen = {"train": settings.train, "val": settings.val}[split]
    if split == "val" and chosen == VOC_VAL:
        return voc.official(_voc_root(settings, chosen), "val")
    home = _home(settings)
    ids = _listed_ids(settings, chosen)
    named_by = f"the list {chosen!r}"
    return listed_samples(ids, named_by, home / "img", home / "cls", ".mat", _REMEDY)


def read_label(settings: SbdSettings, sample: Sample) -> NDArray[np.uint8]:
    """Return a label map as uint8 [H, W], class index or VOID.

    Raises:
        BadFile: the label map cannot be packed.
    """
    if sample.label.suffix == ".png":
        return voc.read_palette(sample)
    values = _segmentation(sample.label)
    return map_labels(values, class_indices(len(voc.CLASSES), void=None), sample.label)


def voc_val_ids(settings: SbdSettings) -> list[str]:
    """Return the ids of VOC's validation list for segmentation; none if `voc_root` is not set.

    Raises:
        UserError: `voc_root` has no such list.
    """
    return voc.official_ids(settings.voc_root, "Segmentation", "val") if settings.voc_root else []


def _listed_ids(settings: SbdSettings, name: str) -> list[str]:
    if name.endswith(".txt"):
        return read_list(expanded(name).absolute(), "check its name in the data set")
    home = _home(settings)
    lists = {file[:-4] for file in names_in(home, _REMEDY) if file.endswith(".txt")}
    if name in lists:
        return read_list(home / f"{name}.txt", _REMEDY)
    if name != _NOVAL:
        hint = did_you_mean(name, lists | {_NOVAL})
        raise UserError(f"{home} has no list {name!r}; {hint}, or your own file, NAME.txt")
    return _without_voc_val(settings)


def _without_voc_val(settings: SbdSettings) -> list[str]:
    """Return SBD's ids without VOC's validation images of the tasks Segmentation and Main."""
    root = _voc_root(settings, _NOVAL)
    ours = [one for name in SPLITS for one in read_list(_home(settings) / f"{name}.txt", _REMEDY)]
    theirs = {
        one for task in ("Segmentation", "Main") for one in voc.official_ids(root, task, "val")
    }
    return [one for one in dict.fromkeys(ours) if one not in theirs]  # lists may share images


def _voc_root(settings: SbdSettings, wanted: str) -> str:
    if not settings.voc_root:
        raise UserError(
            f"SBD's list {wanted!r} needs VOC 2012: set voc_root to the folder that holds VOCdevkit"
            + (f", or put {wanted}.txt into {_home(settings)}" if wanted == _NOVAL else "")
        )
    return settings.voc_root


def _segmentation(path: Path) -> NDArray[np.uint8]:
    from scipy.io import loadmat  # slow to import, and planning imports this module

    try:
        content = loadmat(io.BytesIO(read_bytes(path)), variable_names=["GTcls"])
        values = np.asarray(content["GTcls"]["Segmentation"][0, 0])
    except BadFile:
        raise
    except Exception as error:  # scipy raises many types on damaged bytes
        reason = " ".join(str(error).split()) or type(error).__name__
        raise BadFile(
            f"{path} cannot be read as a label map of SBD, GTcls.Segmentation in a .mat file "
            f"({reason}); replace the file"
        ) from error
    if values.ndim != 2 or values.dtype != np.uint8:
        raise BadFile(
            f"{path} holds no label map: GTcls.Segmentation is {values.dtype} of {values.ndim} "
            "dimensions, not uint8 of 2; replace the file"
        )
    return np.ascontiguousarray(values)


def _home(settings: SbdSettings) -> Path:
    return Path(settings.root) / "benchmark_RELEASE" / "dataset"
