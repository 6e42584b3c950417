"""Make small data sets in the official layouts, with label maps that the tests draw by hand."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from scipy.io import savemat

from data_prep.settings import DatasetSettings, parse_dataset
from data_prep.shards.manifest import Manifest
from data_prep.shards.reader import SplitReader

# 5 of VOC's categories in the order of the official file, and two that VOC has not
COCO_CATEGORIES = {
    1: "person", 2: "bicycle", 3: "car", 4: "motorcycle", 5: "airplane", 6: "bus", 7: "train",
    9: "boat", 16: "bird", 17: "cat", 18: "dog", 19: "horse", 20: "sheep", 21: "cow",
    25: "giraffe", 44: "bottle", 59: "pizza", 62: "chair", 63: "couch", 64: "potted plant",
    67: "dining table", 72: "tv",
}  # fmt: skip


@dataclass
class Packed:
    """A packed data set, read with its readers."""

    manifest: Manifest

    def split(self, split: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Return image and label map by id, in the order of the shards."""
        reader = SplitReader(self.manifest, split)
        return {reader.id(k): (reader.image(k), reader.label(k)) for k in range(len(reader))}


def settings(source: str, root: Path, **table: Any) -> DatasetSettings:
    """Return the settings of a data set under `root`, named as its source."""
    shards = {"shards": str(root / "shards" / source)}
    return parse_dataset(source, {"source": source, "root": str(root), **shards, **table}, "g.toml")


def config(path: Path, *tables: DatasetSettings) -> Path:
    """Write a grid file with these data sets, each named as its source."""
    lines = []
    for table in tables:
        lines.append(f"[dataset.{table.source}]")
        lines += [f"{key} = {json.dumps(value)}" for key, value in table.model_dump().items()]
    path.write_text("\n".join(lines))
    return path


def picture(path: Path, size: tuple[int, int], mode: str = "RGB", **save: Any) -> None:
    """Write a noisy image of `size` (height, width)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(sum(path.name.encode())).integers(0, 256, (*size, 3), np.uint8)
    Image.fromarray(noise).convert(mode).save(path, **save)


def voc(root: Path, labels: Mapping[str, np.ndarray], grey: Iterable[str] = (), **lists: str):
    """Write VOCdevkit/VOC2012 under `root`; `lists` are the texts of its segmentation lists."""
    home = root / "VOCdevkit" / "VOC2012"
    for one, label in labels.items():
        mode = "L" if one in grey else "RGB"
        picture(home / "JPEGImages" / f"{one}.jpg", label.shape, mode)
        _palette(home / "SegmentationClass" / f"{one}.png", label)
        instances = np.where(label == 255, 255, np.arange(label.size).reshape(label.shape) % 7)
        _palette(home / "SegmentationObject" / f"{one}.png", instances.astype(np.uint8))
    for name, text in lists.items():
        _text(home / "ImageSets" / "Segmentation" / f"{name}.txt", text)
        _text(home / "ImageSets" / "Main" / f"{name}.txt", text)
    return home


def sbd(root: Path, labels: Mapping[str, np.ndarray], grey: Iterable[str] = (), **lists: str):
    """Write benchmark_RELEASE/dataset under `root`."""
    home = root / "benchmark_RELEASE" / "dataset"
    for one, label in labels.items():
        picture(home / "img" / f"{one}.jpg", label.shape, "L" if one in grey else "RGB")
        mat(home / "cls" / f"{one}.mat", GTcls={"Segmentation": label, "Boundaries": np.zeros(20)})
        mat(home / "inst" / f"{one}.mat", GTinst={"Segmentation": label % 3, "Categories": [15]})
    for name, text in lists.items():
        _text(home / f"{name}.txt", text)
    return home


def mat(path: Path, **content: Any) -> None:
    """Write a .mat file of Matlab's version 5, compressed like SBD's files."""
    path.parent.mkdir(parents=True, exist_ok=True)
    savemat(path, content, do_compression=True)


def cityscapes(root: Path, **splits: Mapping[str, np.ndarray]):
    """Write leftImg8bit and gtFine under `root`, without polygon files.

    Args:
        root: the folder.
        splits: by split, raw ids by CITY/STEM.
    """
    for split, raws in splits.items():
        for one, raw in raws.items():
            picture(root / "leftImg8bit" / split / f"{one}_leftImg8bit.png", raw.shape)
            label = root / "gtFine" / split / f"{one}_gtFine_labelIds.png"
            label.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(raw).save(label)
            instances = Image.fromarray(raw.astype(np.uint16) * 1000)
            instances.save(str(label).replace("labelIds", "instanceIds"))
            picture(Path(str(label).replace("labelIds", "color")), raw.shape, "RGBA")


def coco(root: Path, **splits: Mapping[str, tuple[tuple[int, int], list[dict[str, Any]]]]):
    """Write train2017, val2017 and annotations: by split, size and objects by file stem."""
    for split, pictures in splits.items():
        images, annotations = [], []
        for stem, (size, objects) in pictures.items():
            path = root / f"{split}2017" / f"{stem}.jpg"
            picture(path, size, "L" if stem.endswith("9") else "RGB")
            whole = {"id": int(stem), "file_name": path.name, "height": size[0], "width": size[1]}
            images.append(whole)
            annotations += [
                {"image_id": int(stem), "id": number, **one} for number, one in enumerate(objects)
            ]
        categories = [{"id": k, "name": name} for k, name in COCO_CATEGORIES.items()]
        record = {"images": images, "annotations": annotations, "categories": categories}
        _text(root / "annotations" / f"instances_{split}2017.json", json.dumps(record))


def rectangle(category: int, top: int, left: int, bottom: int, right: int) -> dict[str, Any]:
    """Return a polygon object that covers the rows [top, bottom) and columns [left, right)."""
    corners = [left, top, right, top, right, bottom, left, bottom]
    return {
        "category_id": category,
        "segmentation": [[float(one) for one in corners]],
        "area": float((bottom - top) * (right - left)),
        "bbox": [left, top, right - left, bottom - top],
        "iscrowd": 0,
    }


def crowd(category: int, mask: np.ndarray) -> dict[str, Any]:
    """Return a crowd that covers `mask`, as COCO's run lengths: by column, unset pixels first."""
    down = [False, *mask.T.reshape(-1).tolist()]
    runs = [len(list(run)) for _, run in groupby(down)]
    runs[0] -= 1  # the pixel put before the first, so that the first run is of unset ones
    return {
        "category_id": category,
        "segmentation": {"counts": runs, "size": list(mask.shape)},
        "area": float(mask.sum()),
        "bbox": [0, 0, mask.shape[1], mask.shape[0]],
        "iscrowd": 1,
    }


def _palette(path: Path, values: np.ndarray) -> None:
    """Write a palette image with VOC's colours: the bits of an index, spread over channels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    colours = [
        sum(((index >> (3 * bit + channel)) & 1) << (7 - bit) for bit in range(3))
        for index in range(256)
        for channel in range(3)
    ]
    image = Image.fromarray(values, "P")
    image.putpalette(colours)
    image.save(path)


def compacted(path: Path) -> None:
    """Renumber a label map's palette as image editors do: only the used colours, in order."""
    with Image.open(path) as image:
        values, colours = np.array(image), np.array(image.getpalette()).reshape(-1, 3)
    used, indices = np.unique(values, return_inverse=True)
    image = Image.fromarray(indices.reshape(values.shape).astype(np.uint8), "P")
    image.putpalette(colours[used].astype(np.uint8).tobytes())
    image.save(path)


def _text(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode())
