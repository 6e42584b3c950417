"""Read COCO 2017 with the classes of VOC: objects as polygons, crowds as run lengths.

Label maps are made as torchvision makes them for its published COCO weights. A pixel of two objects
is void, even if they have the same class. A pixel of no object of VOC's classes is background.
Training leaves out images whose objects of these classes cover 1000 pixels or less; validation
keeps all images.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_prep.images import BadFile
from data_prep.settings import VOID, CocoSettings
from data_prep.shards.manifest import SPLITS
from data_prep.sources import voc
from data_prep.sources.files import TREE_HINT, Sample, names_in, refuse_missing
from hpc.cli import UserError, unreadable

LEAST_AREA = 1000.0  # pixels; training uses images whose objects cover more
_MAX_COORDINATE = 1e5  # pixels; a larger one is damage, and would take gigabytes to draw
# VOC's name of a class -> COCO's, if they differ
_COCO_NAMES = {
    "aeroplane": "airplane",
    "diningtable": "dining table",
    "motorbike": "motorcycle",
    "pottedplant": "potted plant",
    "sofa": "couch",
    "tvmonitor": "tv",
}
_REMEDY = (
    "the data set's root must be the folder in which train2017.zip, val2017.zip and "
    f"annotations_trainval2017.zip of https://cocodataset.org/#download were unpacked; {TREE_HINT}"
)


class _AnnotatedImage(NamedTuple):
    """The annotations of one image."""

    file_name: str
    stem: str
    area: float  # pixels of its objects of VOC's classes
    annotation: str  # JSON: height, width, objects as [class index, segmentation, box]


def classes(settings: CocoSettings) -> tuple[str, ...]:
    """Return VOC's classes, background first."""
    return voc.CLASSES


def samples(settings: CocoSettings, split: str) -> list[Sample]:
    """Return the annotated images of `split`, sorted by id.

    The annotations are cached as long as their file does not change: parsing them is slow.

    Raises:
        UserError: pycocotools, annotations or images are missing, or annotations are
            inconsistent.
    """
    _pycocotools()
    path = Path(settings.root) / "annotations" / f"instances_{split}2017.json"
    images = Path(settings.root) / f"{split}2017"
    annotated = _read(path)
    if split == "train":
        annotated = tuple(p for p in annotated if p.area > LEAST_AREA)
    if not annotated:
        raise UserError(f"{path} describes no image with enough of VOC's classes; {_REMEDY}")
    there = names_in(images, _REMEDY)
    missing = [p.file_name for p in annotated if p.file_name not in there]
    refuse_missing(missing, images, str(path), _REMEDY)
    found = (Sample(p.stem, images / p.file_name, path, p.annotation) for p in annotated)
    return sorted(found, key=lambda sample: sample.id.encode())


def read_label(settings: CocoSettings, sample: Sample) -> NDArray[np.uint8]:
    """Return a label map as uint8 [H, W], class index or VOID.

    The box of an object without polygon or run lengths is void, since the object is inside it.

    Raises:
        BadFile: the annotation cannot be drawn.
    """
    try:
        return _draw(**json.loads(sample.annotation))
    except Exception as error:  # pycocotools raises many types
        reason = " ".join(str(error).split()) or type(error).__name__
        raise BadFile(
            f"{sample.label}: the annotation of {sample.image.name} cannot be drawn ({reason}); "
            "replace the file"
        ) from error


def _draw(height: int, width: int, objects: list[Any]) -> NDArray[np.uint8]:
    label = np.zeros((height, width), np.uint8)
    covered, void = np.zeros((2, height, width), bool)
    for index, segmentation, box in objects:
        mask = _mask(segmentation, height, width)
        if mask is None:
            void |= _inside(box, height, width)
            continue
        void |= covered & mask
        covered |= mask
        label[mask] = index
    label[void] = VOID
    return label


def _read(path: Path) -> tuple[_AnnotatedImage, ...]:
    try:
        status = path.stat()
        return _parse(path, status.st_size, status.st_mtime_ns)
    except OSError as error:
        raise unreadable(error, f"cannot read {path}: {error.strerror}; {_REMEDY}") from error
    except (ValueError, RecursionError) as error:  # cut short, not JSON, not UTF-8
        raise UserError(f"{path} is truncated or not JSON ({error}); {_REMEDY}") from error
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} does not hold the instances of COCO ({type(error).__name__}: {error}); "
            f"{_REMEDY}"
        ) from error


@lru_cache(maxsize=len(SPLITS))
def _parse(path: Path, size: int, modified: int) -> tuple[_AnnotatedImage, ...]:
    """Parse an annotation file. `size` and `modified` are keys of the cache, to notice changes."""
    content = json.loads(path.read_bytes())
    _refuse_inconsistent(path, content)
    class_of = _class_of_category(content["categories"])
    objects: dict[int, list[list[Any]]] = defaultdict(list)
    areas: dict[int, float] = defaultdict(float)
    for one in content.pop("annotations"):
        index = class_of.get(one["category_id"])
        if index is not None:
            image = one["image_id"]
            areas[image] += one["area"]
            objects[image].append([index, one.get("segmentation"), one["bbox"]])
    return tuple(
        _AnnotatedImage(
            one["file_name"],
            Path(one["file_name"]).stem,
            areas.get(one["id"], 0.0),
            _compact(one["height"], one["width"], objects.pop(one["id"], [])),
        )
        for one in content["images"]
    )


def _refuse_inconsistent(path: Path, content: dict[str, Any]) -> None:
    """Refuse entries that would silently be lost or count twice."""
    images, categories = content["images"], content["categories"]
    _refuse_twice(path, "images", "id", (one["id"] for one in images))
    _refuse_twice(path, "images", "stem of file_name", (Path(i["file_name"]).stem for i in images))
    _refuse_twice(path, "categories", "id", (one["id"] for one in categories))
    _refuse_twice(path, "categories", "name", (one["name"] for one in categories))
    annotations = content["annotations"]
    # some files number the objects of each image from 0
    numbered = ((one["image_id"], one["id"]) for one in annotations if "id" in one)
    _refuse_twice(path, "annotations", "image_id and id", numbered)
    for key, listed in (("image_id", images), ("category_id", categories)):
        known = {one["id"] for one in listed}
        if lost := [one[key] for one in annotations if one[key] not in known]:
            _refuse_lost(path, key, lost, known)


def _refuse_twice(path: Path, table: str, key: str, values: Iterable[Any]) -> None:
    seen = set()
    for value in values:
        if value in seen:
            raise UserError(
                f"two entries of {table!r} in {path} have the {key} {value!r}; remove one of them"
            )
        seen.add(value)


def _refuse_lost(path: Path, key: str, lost: Sequence[Any], known: set[Any]) -> None:
    table = {"image_id": "images", "category_id": "categories"}[key]
    reason = f"which {table!r} does not list; remove them, or add what they belong to"
    if twins := [one for one in known if str(one) == str(lost[0])]:
        reason = f"but the id in {table!r} is {twins[0]!r}; write both as numbers"
    raise UserError(f"{len(lost)} annotations in {path} have the {key} {lost[0]!r}, {reason}")


def _compact(height: int, width: int, objects: list[list[Any]]) -> str:
    # text needs a quarter of the memory of numbers, and is cheap to send to other processes
    image = {"height": height, "width": width, "objects": objects}
    return json.dumps(image, separators=(",", ":"))


def _class_of_category(categories: list[Mapping[str, Any]]) -> dict[int, int]:
    """Return the index of VOC's class by COCO's category id."""
    ids = {one["name"]: one["id"] for one in categories}
    names = [_COCO_NAMES.get(name, name) for name in voc.CLASSES]
    return {ids[name]: index for index, name in enumerate(names) if index}


def _mask(segmentation: Any, height: int, width: int) -> NDArray[np.bool_] | None:
    """Return the pixels of an object, bool [H, W]; None if it has no outline."""
    api = _pycocotools()
    if isinstance(segmentation, dict):
        runs = segmentation["counts"]
        rle = segmentation if isinstance(runs, str) else _from_runs(segmentation, height, width)
    else:
        polygons = [one for one in segmentation or [] if len(one) >= 6]  # three points or more
        if not polygons:
            return None
        if not all(np.abs(np.asarray(one, float)).max() < _MAX_COORDINATE for one in polygons):
            raise ValueError("a coordinate far outside the image")
        rle = api.merge(api.frPyObjects(polygons, height, width))
    return api.decode(rle).astype(bool)


def _from_runs(segmentation: Any, height: int, width: int) -> Any:
    if sum(segmentation["counts"]) != height * width:
        raise ValueError(
            "run lengths that do not fill the image"
        )  # pycocotools leaves the rest unset
    return _pycocotools().frPyObjects(segmentation, height, width)


def _inside(box: list[float], height: int, width: int) -> NDArray[np.bool_]:
    x, y, wide, high = box
    inside = np.zeros((height, width), bool)
    rows = slice(max(0, int(np.floor(y))), max(0, int(np.ceil(y + high))))
    columns = slice(max(0, int(np.floor(x))), max(0, int(np.ceil(x + wide))))
    inside[rows, columns] = True
    return inside


def _pycocotools() -> ModuleType:
    try:
        from pycocotools import mask
    except ImportError as error:
        raise UserError(
            "COCO's masks are read with pycocotools, which is not installed; "
            "pip install 'pycocotools>=2.0.8'"
        ) from error
    return mask
