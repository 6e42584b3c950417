"""The [dataset.NAME] tables of a grid file. Free of torch, h5py and mpi4py: planning reads it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from hpc.atomic import fingerprint
from hpc.command import UserError
from hpc.config import Settings, did_you_mean, parse, read_toml, shown, user_path

Side = Annotated[int, Field(ge=32, le=32_768)]  # pixels of a drawn image

VOID = 255  # the label value in shards that counts nowhere, whatever the source calls void
MAX_CLASSES = 255


class DatasetSettings(Settings):
    """What every source has. `published`: the images of each of its lists, where that is known
    without the files."""

    published: ClassVar[Mapping[str, int]] = {}
    source: str
    shards: str = ""  # folder of the packed data set; data/NAME where not given
    codec: Literal["auto", "raw", "encoded"] = "auto"  # auto: JPEG stays encoded, others raw
    shard_mb: Annotated[int, Field(ge=1, le=100_000)] = 512
    skip_bad: bool = False  # leave bad files out and list them, instead of refusing all

    def identity(self) -> str:
        """Hash of the settings that change what is packed, whatever the paths."""
        # skip_bad: without bad files it changes nothing, and with some all is refused without it
        others = {"root", "voc_root", "shards", "shard_mb", "codec", "skip_bad"}
        return fingerprint(self.model_dump(mode="json", exclude=others))[:16]


class FolderSettings(DatasetSettings):
    """Images and label maps (8-bit, value = class index) of equal stem in pairs of folders."""

    source: Literal["folder"]
    root: str
    classes: tuple[str, ...]
    void: Annotated[int, Field(ge=0, le=255)] | None = 255  # the label value that counts nowhere
    train_images: str = "train"
    train_labels: str = "trainannot"
    val_images: str = "val"
    val_labels: str = "valannot"

    @model_validator(mode="after")
    def _classes_fit(self) -> FolderSettings:
        if not 2 <= len(self.classes) <= MAX_CLASSES:
            raise ValueError(f"classes must name 2 to {MAX_CLASSES} classes")
        if len(set(self.classes)) < len(self.classes):
            raise ValueError("classes must be distinct")
        if self.void is not None and self.void < len(self.classes):
            raise ValueError(f"void = {self.void} is the index of a class")
        return self


class SyntheticSettings(DatasetSettings):
    """Street-like scenes with 8 classes whose areas span three orders of magnitude."""

    source: Literal["synthetic"]
    root: str = ""  # where the JPEG and PNG files are written; SHARDS/source where not given
    train: Annotated[int, Field(ge=1, le=100_000)] = 200  # images
    val: Annotated[int, Field(ge=1, le=100_000)] = 50
    size: tuple[Side, Side] = (128, 192)  # height, width
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0


class VocSettings(DatasetSettings):
    """PASCAL VOC 2012. A list is train, val, trainval, or a text file of one's own (`.txt`)."""

    published: ClassVar = {"train": 1464, "val": 1449, "trainval": 2913}
    source: Literal["voc"]
    root: str  # the folder in which the archive was unpacked: it holds VOCdevkit
    train: str = "train"
    val: str = "val"


class SbdSettings(DatasetSettings):
    """The Semantic Boundaries Dataset. A list is train, val, train_noval, or a text file of one's
    own; `val` may also be voc_val, VOC 2012's validation images with VOC's own label maps."""

    published: ClassVar = {"train": 8498, "val": 2857, "train_noval": 5623, "voc_val": 1449}
    source: Literal["sbd"]
    root: str  # it holds benchmark_RELEASE
    train: str = "train"
    val: str = "val"
    voc_root: str = ""  # it holds VOCdevkit; for train_noval and voc_val, and to count overlaps


class CityscapesSettings(DatasetSettings):
    """Cityscapes, fine annotations."""

    published: ClassVar = {"train": 2975, "val": 500}
    source: Literal["cityscapes"]
    root: str  # it holds leftImg8bit and gtFine
    num_classes: Literal[30, 34, 19] = 30  # raw ids 4 to 33, all raw ids, or the training ids


class CocoSettings(DatasetSettings):
    """COCO 2017 with the classes of VOC."""

    source: Literal["coco"]
    root: str  # it holds train2017, val2017 and annotations


SOURCES: dict[str, type[DatasetSettings]] = {
    "voc": VocSettings,
    "sbd": SbdSettings,
    "cityscapes": CityscapesSettings,
    "coco": CocoSettings,
    "folder": FolderSettings,
    "synthetic": SyntheticSettings,
}


def parse_dataset(name: str, table: Any, where: str) -> DatasetSettings:
    """One [dataset.NAME] table, its paths absolute. Relative paths start at the working
    directory; `~` is the home. Raises `UserError`."""
    where = f"{where}: [dataset.{name}]"
    if not isinstance(table, dict):
        raise UserError(f"{where} must be a table")
    if not name.strip() or "/" in name or name.startswith("."):
        raise UserError(f"{where}: its name is a folder's too; use one without / or a leading dot")
    source = table.get("source")
    if not isinstance(source, str) or source not in SOURCES:
        hint = did_you_mean(source if isinstance(source, str) else "", SOURCES)
        raise UserError(f"{where}: unknown source {shown(source)}; {hint}")
    settings = parse(SOURCES[source], table, where)
    shards = user_path(settings.shards or f"data/{name}", f"{where}: shards")
    root = user_path(getattr(settings, "root", "") or str(shards / "source"), f"{where}: root")
    paths = {"shards": str(shards), "root": str(root)}
    if voc_root := getattr(settings, "voc_root", ""):
        paths["voc_root"] = str(user_path(voc_root, f"{where}: voc_root"))
    return settings.model_copy(update=paths)


def read_datasets(config: str | Path) -> dict[str, DatasetSettings]:
    """All data sets of a grid file by name. Raises `UserError`."""
    tables = read_toml(config).get("dataset", {})
    if not isinstance(tables, dict) or not tables:
        raise UserError(f"{config}: no data set; add a table [dataset.NAME] with a source")
    return {name: parse_dataset(name, table, str(config)) for name, table in tables.items()}
