"""Provide the pictures for measuring reading and augmenting: PNG files, JPEG files, and shards.

    CamVid         photographs of 480 x 360, from the folder in LOSSGRID_CAMVID, else from
                   ../shared/camvid beside the repository (train and trainannot)
    large streets  drawn scenes of 2048 x 1024; their PNG files need as many bytes per pixel as
                   those of CamVid

All three forms have the same pixels: the PNG files and shards are made from the JPEG files.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from data_prep.pack import pack
from data_prep.settings import VOID, FolderSettings
from data_prep.shards.reader import SplitReader
from data_prep.sources.scenes import draw_scene

REPOSITORY = Path(__file__).resolve().parent.parent
NUM_CAMVID, NUM_LARGE = 96, 12  # at least a batch
LARGE_SIZE = (1024, 2048)
JPEG_QUALITY = 92  # that of the CamVid files
NUM_CLASSES, CAMVID_VOID = 11, 11


@dataclass(frozen=True)
class PictureSet:
    """A set of pictures.

    `root` has the folders png and jpeg with images, and labels with label maps (PNG), all with
    equal stems. `reader` reads the shards made from png.
    """

    name: str
    root: Path
    reader: SplitReader
    png_bytes_per_pixel: float

    def files(self, folder: str) -> list[Path]:
        """Return the files of one of its folders, in the reader's order."""
        return sorted((self.root / folder).iterdir())


@contextmanager
def camvid() -> Iterator[PictureSet | None]:
    """Provide the first `NUM_CAMVID` pictures in a temporary folder, or None without CamVid."""
    source = Path(os.environ.get("LOSSGRID_CAMVID", REPOSITORY.parent / "shared" / "camvid"))
    if not (source / "train").is_dir():
        yield None
        return
    with TemporaryDirectory() as name:
        root = _folders(Path(name))
        for image in islice(sorted((source / "train").iterdir()), NUM_CAMVID):
            shutil.copy(image, root / "jpeg")
            label = decoded(source / "trainannot" / f"{image.stem}.png")
            label = np.where(label == CAMVID_VOID, np.uint8(VOID), label)
            Image.fromarray(label).save(root / "labels" / f"{image.stem}.png")
        yield _finished("CamVid", root)


@contextmanager
def large_streets() -> Iterator[PictureSet]:
    """Provide `NUM_LARGE` drawn scenes in a temporary folder."""
    with TemporaryDirectory() as name:
        root = _folders(Path(name))
        for index in range(NUM_LARGE):
            image, label = draw_scene(seed=0, split=0, index=index, size=LARGE_SIZE)
            Image.fromarray(image).save(root / "jpeg" / f"{index}.jpg", quality=JPEG_QUALITY)
            Image.fromarray(label).save(root / "labels" / f"{index}.png")
        yield _finished("2048 x 1024", root)


def on_all(make: Callable[[PictureSet], list], without_camvid: Callable[[], list]) -> list:
    """Call `make` with each set in turn and return all results."""
    with camvid() as small:
        found = make(small) if small else without_camvid()
    with large_streets() as large:
        return found + make(large)


def decoded(file: Path) -> NDArray[np.uint8]:
    """Return the pixels of an image or a label map."""
    with Image.open(file) as image:
        return np.asarray(image)


def shard_settings(root: Path, shards: Path, shard_mb: int = 512) -> FolderSettings:
    """Return the settings to pack the folders of a set."""
    return FolderSettings(
        source="folder", root=str(root), shards=str(shards), shard_mb=shard_mb, void=VOID,
        classes=tuple(f"class {number}" for number in range(NUM_CLASSES)),
        train_images="png", train_labels="labels", val_images="val", val_labels="vallabels",
    )  # fmt: skip


def _folders(root: Path) -> Path:
    for folder in ("jpeg", "png", "labels", "val", "vallabels"):
        (root / folder).mkdir()
    return root


def _finished(name: str, root: Path) -> PictureSet:
    """Complete the set from its JPEG files and label maps."""
    for file in (root / "jpeg").iterdir():
        Image.fromarray(decoded(file)).save(root / "png" / f"{file.stem}.png")
    files = sorted((root / "png").iterdir())
    shutil.copy(files[0], root / "val")  # packing requires a validation split
    shutil.copy(root / "labels" / files[0].name, root / "vallabels")
    manifest = pack("pictures", shard_settings(root, root / "shards"), processes=1)
    reader = SplitReader(manifest, "train")
    pixels = sum(height * width for height, width in map(reader.size, range(len(reader))))
    size = sum(file.stat().st_size for file in files)
    return PictureSet(name, root, reader, size / pixels)
