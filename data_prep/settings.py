"""Read the [dataset.NAME] tables of a grid file.

Free of torch, h5py and mpi4py: planning imports it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from hpc.account import expanded
from hpc.cli import UserError
from hpc.config import Settings, did_you_mean, parse, read_toml, shown, user_path
from hpc.storage.atomic import fingerprint

LabelValue = Annotated[int, Field(ge=0, le=255)]
Side = Annotated[int, Field(ge=32, le=32_768)]  # pixels of a drawn image

VOID = 255  # the value of void pixels in shards, whatever the source uses
MAX_CLASSES = 255


class DatasetSettings(Settings):
    """The settings of every source."""

    published: ClassVar[Mapping[str, int]] = {}  # images in each official list, if known
    few_classes_remedy: ClassVar[str] = "choose lists with images of more classes"
    source: str
    """Format of the raw data set."""
    shards: str = ""
    """Folder of the packed data set. Empty: `data/NAME-HASH`, a hash of the other settings."""
    codec: Literal["auto", "raw", "encoded"] = "auto"
    """Images in shards: decoded (`raw`) or as their files are (`encoded`). `auto` keeps RGB
    and grey JPEG files and decodes all others."""
    shard_mb: Annotated[int, Field(ge=1, le=100_000)] = 512
    """Size at which a new shard begins. Unit: MB."""
    skip_bad: bool = False
    """Leave damaged files out and list them; otherwise the first one ends packing."""

    def identity(self) -> str:
        """Return a hash of the settings that change the packed samples.

        `root`, `voc_root` and `shards` do not count, so a copy elsewhere is the same data set. List
        files and the folders below `root` count by their names, since they select the images.
        """
        # skip_bad does not count: it only decides whether bad files are refused
        others = {"root", "voc_root", "shards", "shard_mb", "codec", "skip_bad"}
        return fingerprint(self.model_dump(mode="json", exclude=others))[:16]

    def label_values(self, label: int) -> tuple[int, ...]:
        """Return the values in label maps that the user's settings map to `label`.

        Args:
            label: a class index or VOID.

        Returns:
            The values; empty for sources with a fixed mapping.
        """
        return ()

    def origin(self) -> dict[str, Any]:
        """Return all settings that decide which files are packed and how.

        Paths are absolute. Defaults are left out. A folder of shards belongs to one origin.
        """
        found = self.model_dump(mode="json", exclude={"shards", "skip_bad"}, exclude_defaults=True)
        lists = {key: found[key] for key in ("train", "val") if _is_list_file(found.get(key))}
        return {**found, **{key: str(expanded(p).absolute()) for key, p in lists.items()}}


class FolderSettings(DatasetSettings):
    """Images and label maps (8-bit, one channel) of equal stem in pairs of folders.

    A value in a label map is a class index, or `labels` maps it to the name of a class. Validation
    derives `classes` and `void` from `labels`, so that equal fields mean equal label maps.
    """

    few_classes_remedy: ClassVar[str] = (
        'map the label values to classes, such as labels = {0 = "background", 255 = "road"}, '
        "choose another void = VALUE, or correct the label maps"
    )
    source: Literal["folder"]
    """Your own images and label maps."""
    root: str
    """Folder that holds the four folders below."""
    classes: tuple[str, ...] = ()
    """Names of the classes, in the order of their indices. Empty: the names in `labels`."""
    labels: dict[str, str] = Field(default_factory=dict)
    """Class name of each value in the label maps. Empty: a value is a class index."""
    void: LabelValue | tuple[LabelValue, ...] = VOID
    """Values in the label maps that loss and metrics ignore (PyTorch's `ignore_index`)."""
    train_images: str = "train"
    """Folder of the training images."""
    train_labels: str = "trainannot"
    """Folder of the training label maps."""
    val_images: str = "val"
    """Folder of the validation images."""
    val_labels: str = "valannot"
    """Folder of the validation label maps."""

    @model_validator(mode="after")
    def _labels_fit(self) -> FolderSettings:
        if "classes" not in self.model_fields_set and not self.labels:
            raise ValueError("the key 'classes' is missing; list them, or map values with labels")
        values = {_label_value(key): name for key, name in self.labels.items()}
        if values and "classes" not in self.model_fields_set:
            self.__dict__["classes"] = tuple(dict.fromkeys(self.labels.values()))
            if "void" in self.classes:
                key = next(key for key, name in self.labels.items() if name == "void")
                raise ValueError(
                    f"labels: void is not a class; remove {key} from labels and set void = [{key}]"
                )
        if VOID in values and "void" not in self.model_fields_set:
            self.__dict__["void"] = ()
        return self

    @model_validator(mode="after")
    def _classes_fit(self) -> FolderSettings:
        if not 2 <= len(self.classes) <= MAX_CLASSES:
            raise ValueError(f"classes must name 2 to {MAX_CLASSES} classes")
        if len(set(self.classes)) < len(self.classes):
            raise ValueError("classes must be distinct")
        used = set(self.labels.values()) or set(self.classes)
        if unknown := [name for name in self.labels.values() if name not in self.classes]:
            hint = did_you_mean(unknown[0], self.classes)
            raise ValueError(f"labels: {unknown[0]!r} is not one of classes; {hint}")
        if unused := [name for name in self.classes if name not in used]:
            raise ValueError(f"labels maps no value to the class {unused[0]!r} of classes")
        for value in self.void_values:
            if str(value) in self.labels:
                raise ValueError(f"{value} is both void and a class in labels; remove one")
            if not self.labels and value < len(self.classes):
                raise ValueError(f"void = {value} is the index of a class; choose another value")
        return self

    @property
    def void_values(self) -> tuple[int, ...]:
        """Return the values in label maps that are void."""
        return self.void if isinstance(self.void, tuple) else (self.void,)

    def label_values(self, label: int) -> tuple[int, ...]:
        """Return the values in label maps that mean `label`, a class index or VOID."""
        return tuple(value for value, of in self.label_of_value().items() if of == label)

    def label_of_value(self) -> dict[int, int]:
        """Return the class index, or VOID, of every value that label maps may hold."""
        index = {name: number for number, name in enumerate(self.classes)}
        known = {int(key): index[name] for key, name in self.labels.items()}
        return (known or dict(enumerate(index.values()))) | dict.fromkeys(self.void_values, VOID)


def _label_value(key: str) -> int:
    if key.isascii() and key.isdigit() and str(int(key[:4])) == key and int(key) <= 255:
        return int(key)
    raise ValueError(f"labels: {shown(key)} is not a value of a label map, 0 to 255")


class SyntheticSettings(DatasetSettings):
    """Drawn street scenes with 8 classes whose areas span three orders of magnitude."""

    source: Literal["synthetic"]
    """Drawn street scenes with 8 classes."""
    root: str = ""
    """Folder for the drawn JPEG and PNG files. Empty: `source` in the folder of the shards."""
    train: Annotated[int, Field(ge=1, le=100_000)] = 200
    """Number of training images. Unit: images."""
    val: Annotated[int, Field(ge=1, le=100_000)] = 50
    """Number of validation images. Unit: images."""
    size: tuple[Side, Side] = (128, 192)
    """Height and width of an image. Unit: pixels."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Seed of the drawing."""

    def origin(self) -> dict[str, Any]:
        """Return the settings without `root`: the others decide every pixel."""
        return {key: value for key, value in super().origin().items() if key != "root"}


class VocSettings(DatasetSettings):
    """PASCAL VOC 2012. A list is train, val, trainval, or a text file of the user (`.txt`)."""

    published: ClassVar = {"train": 1464, "val": 1449, "trainval": 2913}
    source: Literal["voc"]
    """PASCAL VOC 2012."""
    root: str
    """Folder that holds `VOCdevkit`."""
    train: str = "train"
    """Training list: `train`, `val`, `trainval`, or a text file of your own (`.txt`)."""
    val: str = "val"
    """Validation list: `train`, `val`, `trainval`, or a text file of your own (`.txt`)."""


class SbdSettings(DatasetSettings):
    """The Semantic Boundaries Dataset.

    A list is train, val, train_noval, or a text file of the user (`.txt`). `val` may also be
    voc_val: VOC 2012's validation images with VOC's own label maps.
    """

    published: ClassVar = {"train": 8498, "val": 2857, "train_noval": 5623, "voc_val": 1449}
    source: Literal["sbd"]
    """Semantic Boundaries Dataset."""
    root: str
    """Folder that holds `benchmark_RELEASE`."""
    train: str = "train"
    """Training list: `train`, `val`, `train_noval`, or a text file of your own (`.txt`)."""
    val: str = "val"
    """Validation list: as for `train`, or `voc_val`."""
    voc_root: str = ""
    """Folder that holds `VOCdevkit`; for `train_noval`, `voc_val`, and to count images that are in
    both splits."""


class CityscapesSettings(DatasetSettings):
    """Cityscapes, fine annotations."""

    published: ClassVar = {"train": 2975, "val": 500}
    source: Literal["cityscapes"]
    """Cityscapes, fine annotations."""
    root: str
    """Folder that holds `leftImg8bit` and `gtFine`."""
    num_classes: Literal[30, 34, 19] = 30
    """Classes: raw ids 4 to 33 (30), all raw ids (34), or the training ids (19)."""


class CocoSettings(DatasetSettings):
    """COCO 2017 with the classes of VOC."""

    source: Literal["coco"]
    """COCO 2017 with the classes of VOC."""
    root: str
    """Folder that holds `train2017`, `val2017` and `annotations`."""


SOURCES: dict[str, type[DatasetSettings]] = {
    "voc": VocSettings,
    "sbd": SbdSettings,
    "cityscapes": CityscapesSettings,
    "coco": CocoSettings,
    "folder": FolderSettings,
    "synthetic": SyntheticSettings,
}


def _is_list_file(chosen: Any) -> bool:
    return isinstance(chosen, str) and chosen.endswith(".txt")


def parse_dataset(name: str, table: Any, where: str) -> DatasetSettings:
    """Return the settings of one [dataset.NAME] table, with absolute paths.

    Relative paths start at the working directory; `~` is the home.

    Args:
        name: NAME.
        table: the TOML table.
        where: the grid file, for messages.

    Raises:
        UserError: a key or value is wrong.
    """
    where = f"{where}: [dataset.{name}]"
    if not isinstance(table, dict):
        raise UserError(f"{where} must be a table")
    if not name.strip() or "/" in name or name.startswith("."):
        raise UserError(
            f"{where}: the name is also a folder name; use one without / and leading dot"
        )
    source = table.get("source")
    if not isinstance(source, str) or source not in SOURCES:
        hint = did_you_mean(source if isinstance(source, str) else "", SOURCES)
        raise UserError(f"{where}: unknown source {shown(source)}; {hint}")
    settings = parse(SOURCES[source], table, where)
    given = {key: getattr(settings, key, "") for key in ("root", "voc_root")}
    paths = {key: str(user_path(p, f"{where}: {key}")) for key, p in given.items() if p}
    settings = settings.model_copy(update=paths)
    # with a hash, so that other images under the same name get another folder
    folder = settings.shards or f"data/{name}-{fingerprint(settings.origin())[:8]}"
    shards = user_path(folder, f"{where}: shards")
    root = paths.get("root") or str(shards / "source")
    return settings.model_copy(update={"shards": str(shards), "root": root})


def read_datasets(config: str | Path) -> dict[str, DatasetSettings]:
    """Return the settings of all data sets of a grid file, by name.

    Raises:
        UserError: the file cannot be read, has no data set, or a table is wrong.
    """
    tables = read_toml(config).get("dataset", {})
    if not isinstance(tables, dict) or not tables:
        raise UserError(f"{config}: no data set; add a table [dataset.NAME] with a source")
    return {name: parse_dataset(name, table, str(config)) for name, table in tables.items()}
