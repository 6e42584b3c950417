"""The pictures that reading and augmenting are measured on, as folders of PNG and of JPEG files and
as shards, all with the same pixels.

    CamVid        photographs of 480 x 360; from the folder that LOSSGRID_CAMVID names, else
                  ../shared/camvid beside the repository (train and trainannot)
    large streets drawn scenes of 2048 x 1024, which as PNG take as many bytes a pixel as CamVid's
                  photographs do

JPEG files come first and PNG files hold what they show, so that no way has easier pixels."""

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
NUM_CAMVID, NUM_LARGE = 96, 12  # the least is a batch
LARGE_SIZE = (1024, 2048)
JPEG_QUALITY = 92  # that of the CamVid files
NUM_CLASSES, CAMVID_VOID = 11, 11


@dataclass(frozen=True)
class Pictures:
    """One set. root: folders png and jpeg of images and labels of label maps (PNG), equal stems.
    reader: the shards made of png."""

    name: str
    root: Path
    reader: SplitReader
    png_bytes_per_pixel: float

    def files(self, folder: str) -> list[Path]:
        """The files of one of its folders, in the reader's order."""
        return sorted((self.root / folder).iterdir())


@contextmanager
def camvid() -> Iterator[Pictures | None]:
    """The first `NUM_CAMVID` training pictures, in a folder that is gone afterwards; None where
    there is no CamVid."""
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
def large_streets() -> Iterator[Pictures]:
    """`NUM_LARGE` drawn scenes, in a folder that is gone afterwards."""
    with TemporaryDirectory() as name:
        root = _folders(Path(name))
        for index in range(NUM_LARGE):
            image, label = draw_scene(seed=0, split=0, index=index, size=LARGE_SIZE)
            Image.fromarray(image).save(root / "jpeg" / f"{index}.jpg", quality=JPEG_QUALITY)
            Image.fromarray(label).save(root / "labels" / f"{index}.png")
        yield _finished("2048 x 1024", root)


def on_all(make: Callable[[Pictures], list], without_camvid: Callable[[], list]) -> list:
    """What `make` gives for each set, one after the other."""
    with camvid() as small:
        found = make(small) if small else without_camvid()
    with large_streets() as large:
        return found + make(large)


def decoded(file: Path) -> NDArray[np.uint8]:
    """The pixels of an image or a label map."""
    with Image.open(file) as image:
        return np.asarray(image)


def shard_settings(root: Path, shards: Path, shard_mb: int = 512) -> FolderSettings:
    """What to pack the folders of a set with."""
    return FolderSettings(
        source="folder", root=str(root), shards=str(shards), shard_mb=shard_mb, void=VOID,
        classes=tuple(f"class {number}" for number in range(NUM_CLASSES)),
        train_images="png", train_labels="labels", val_images="val", val_labels="vallabels",
    )  # fmt: skip


def _folders(root: Path) -> Path:
    for folder in ("jpeg", "png", "labels", "val", "vallabels"):
        (root / folder).mkdir()
    return root


def _finished(name: str, root: Path) -> Pictures:
    """The set, once its JPEG files and label maps lie there."""
    for file in (root / "jpeg").iterdir():
        Image.fromarray(decoded(file)).save(root / "png" / f"{file.stem}.png")
    files = sorted((root / "png").iterdir())
    shutil.copy(files[0], root / "val")  # a set has a validation split too
    shutil.copy(root / "labels" / files[0].name, root / "vallabels")
    manifest = pack("pictures", shard_settings(root, root / "shards"), processes=1)
    reader = SplitReader(manifest, "train")
    pixels = sum(height * width for height, width in map(reader.size, range(len(reader))))
    size = sum(file.stat().st_size for file in files)
    return Pictures(name, root, reader, size / pixels)
