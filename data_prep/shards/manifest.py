"""Describe a packed data set: its shards, ids, sizes, class pixel counts and checksums.

Free of torch, h5py and mpi4py: planning reads manifests on the login node.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from data_prep.settings import VOID, DatasetSettings
from hpc.cli import UserError
from hpc.storage.atomic import Damaged, fingerprint, read_json, write_json

MANIFEST = "manifest.json"
FORMAT = "lossgrid shards 4"
SPLITS = ("train", "val")
ROOTS = frozenset({"root", "voc_root"})  # settings that only locate the files
_MAX_SHOWN = 3  # class names in a message


@dataclass(frozen=True)
class ShardSummary:
    """One shard file. Its samples are listed in their order in the file."""

    file: str  # name within the folder, see `shard_name`
    bytes: int
    sha256: str  # of the whole file
    arenas: tuple[tuple[int, int], ...]  # (offset, bytes) of pixels and of labels
    frame_sha256: str  # of all bytes outside the arenas; checked when the shard is opened
    ids: tuple[str, ...]
    sizes: tuple[tuple[int, int], ...]  # (height, width)
    class_pixels: tuple[int, ...]  # one count per class
    void_pixels: int

    @property
    def images(self) -> int:
        """Return the number of samples."""
        return len(self.ids)

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> ShardSummary:
        """Return the summary that `asdict` turned into plain values."""
        lists = {
            "arenas": tuple((offset, size) for offset, size in record["arenas"]),
            "ids": tuple(record["ids"]),
            "sizes": tuple((height, width) for height, width in record["sizes"]),
            "class_pixels": tuple(record["class_pixels"]),
        }
        return cls(**{**record, **lists})


@dataclass(frozen=True)
class SplitSummary:
    """The training or the validation half of a data set."""

    shards: tuple[ShardSummary, ...]
    left_out: tuple[str, ...] = ()  # one message per sample that `skip_bad` left out

    @property
    def images(self) -> int:
        """Return the number of samples."""
        return sum(shard.images for shard in self.shards)

    @property
    def class_pixels(self) -> tuple[int, ...]:
        """Return the number of labelled pixels of each class."""
        counts = zip(*(shard.class_pixels for shard in self.shards), strict=True)
        return tuple(sum(of_class) for of_class in counts)

    @property
    def void_pixels(self) -> int:
        """Return the number of void pixels."""
        return sum(shard.void_pixels for shard in self.shards)

    @property
    def void_share(self) -> str:
        """Return the share of void pixels as text, such as `2.5 %`."""
        return f"{100 * self.void_pixels / (sum(self.class_pixels) + self.void_pixels):.1f} %"


@dataclass(frozen=True)
class Manifest:
    """A packed data set.

    `fingerprint` is the SHA-256 of classes and content, without names, paths and times. It is
    recorded with everything that is made from the data.
    """

    folder: Path
    name: str
    classes: tuple[str, ...]
    splits: dict[str, SplitSummary]
    source_stamp: str = ""  # names, sizes and times of the source files and the settings
    leaked: tuple[str, ...] = ()  # ids of validation images that are also training images
    origin: Mapping[str, Any] = field(default_factory=dict)  # see `DatasetSettings.origin`
    kept: tuple[str, ...] = ()  # shards of earlier content, which running jobs may still open
    fingerprint: str = field(init=False)

    def __post_init__(self) -> None:
        shards = {
            split: list(map(asdict, summary.shards)) for split, summary in self.splits.items()
        }
        content = {"format": FORMAT, "classes": list(self.classes), "splits": shards}
        object.__setattr__(self, "fingerprint", fingerprint(content))

    @classmethod
    def load(cls, folder: str | Path) -> Manifest:
        """Read the manifest of a packed data set.

        Raises:
            UserError: there is none, or another version of this program wrote it.
            Damaged: it is not as it was written.
        """
        return _from_record(Path(folder), _read(Path(folder)))

    def save(self) -> None:
        """Write the manifest into its folder in one step."""
        splits = {split: asdict(summary) for split, summary in self.splits.items()}
        record = {
            "format": FORMAT,
            "name": self.name,
            "source_stamp": self.source_stamp,
            "leaked": list(self.leaked),
            "fingerprint": self.fingerprint,
            "origin": dict(self.origin),
            "kept": list(self.kept),
            "classes": list(self.classes),
            "splits": splits,
        }
        write_json(self.folder / MANIFEST, record)

    @property
    def files(self) -> set[str]:
        """Return the file names of all shards."""
        return {shard.file for summary in self.splits.values() for shard in summary.shards}

    def differences(self, origin: Mapping[str, Any]) -> dict[str, str]:
        """Compare the settings that the data set was packed with to `origin`.

        Returns:
            A phrase for each setting that differs, by its name.
        """
        keys = {key for key in {*self.origin, *origin} if self.origin.get(key) != origin.get(key)}
        return {
            key: f"{key} = {_shown(self.origin, key)} there, {_shown(origin, key)} here"
            for key in sorted(keys)
        }

    def require_settings(
        self, origin: Mapping[str, Any], folder: str | Path, name: str, moved: str = ""
    ) -> None:
        """Refuse a data set that was packed with other settings than `origin`.

        Args:
            origin: the present settings, see `DatasetSettings.origin`.
            folder: the folder of the data set, for the message.
            name: the name of the data set, for the message.
            moved: the end of the message if only the places of the files differ.

        Raises:
            UserError: the settings differ.
        """
        if found := self.differences(origin):
            moved = moved if found.keys() <= ROOTS else ""
            raise UserError(
                f"{folder} was packed with other settings than [dataset.{name}] has now "
                f"({'; '.join(found.values())}); set shards to another folder, or delete that one "
                f"if no grid needs it{moved}"
            )

    def require_classes(self, settings: DatasetSettings) -> None:
        """Refuse a split in which fewer than two classes have pixels.

        Args:
            settings: give the label values of classes and void, for the message.

        Raises:
            UserError: a split has fewer than two such classes.
        """
        for split, summary in self.splits.items():
            found = [index for index, pixels in enumerate(summary.class_pixels) if pixels]
            if len(found) >= 2:
                continue
            where = f"{split} of the data set {self.name!r}"
            what = f"no class has pixels in {where}"
            if found:
                name = f"{self.classes[found[0]]!r}{_values(settings, found[0])}"
                what = f"{name} is the only class with pixels in {where}"
            void = f"{summary.void_share} of the pixels are void{_values(settings, VOID)}"
            raise UserError(
                f"{what}; {void}; at least two are needed: {settings.few_classes_remedy}"
            )

    def warnings(self) -> list[str]:
        """Return one line for each split in which a class has no pixel."""
        effects = {
            "train": "no cell can learn it",
            "val": "scores are averaged over the classes that do occur",
        }
        absent = {
            split: [c for c, n in zip(self.classes, summary.class_pixels, strict=True) if not n]
            for split, summary in self.splits.items()
        }
        return [
            f"{_listed(names)} of the data set {self.name!r} has no pixel in {split}, of which "
            f"{self.splits[split].void_share} are void: {effects[split]}; add images that show it, "
            "or take it out of the classes"
            for split, names in absent.items()
            if names
        ]

    def check_files(self) -> None:
        """Check that all shards exist and have their lengths, without reading content.

        Raises:
            Damaged: a shard is missing or has another length; the first one.
        """
        for summary in self.splits.values():
            for shard in summary.shards:
                check_length(self.folder / shard.file, shard.bytes)


def read_fingerprint(folder: str | Path) -> str:
    """Return the fingerprint of the data set in `folder`, faster than `Manifest.load`.

    Raises the same errors.
    """
    return str(_read(Path(folder))["fingerprint"])


def check_length(path: Path, expected: int) -> None:
    """Check the length of a file.

    Raises:
        Damaged: the file is missing or does not have `expected` bytes.
    """
    try:
        found = path.stat().st_size
    except OSError as error:
        raise Damaged(f"{path} cannot be read: {error.strerror}; {remedy(path)}") from error
    if found != expected:
        raise Damaged(f"{path} has {found} bytes instead of {expected}; {remedy(path)}")


def _values(settings: DatasetSettings, label: int) -> str:
    values = settings.label_values(label)
    return f" (label value {' or '.join(map(str, values))})" if values else ""


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:_MAX_SHOWN])
    more = f" and {len(names) - _MAX_SHOWN} more" if len(names) > _MAX_SHOWN else ""
    return f"each of the classes {shown}{more}" if len(names) > 1 else f"the class {shown}"


def remedy(path: Path) -> str:
    """Return the advice for a damaged shard."""
    return f"delete {path.name} if it is there and run `python -m data_prep.pack CONFIG` again"


def shard_name(stem: str, sha256: str) -> str:
    """Return the file name of a shard, which ends with a part of its SHA-256.

    Other content gets another name, so that packing again replaces no shard that a running job may
    still open.
    """
    return f"{stem}-{sha256[:12]}.h5"


def shard_stem(file: str) -> str:
    """Return `train-00000` for a shard's file name."""
    return file.rpartition("-")[0]


def _shown(settings: Mapping[str, Any], key: str) -> str:
    return repr(settings[key]) if key in settings else "not set"


def _read(folder: Path) -> dict[str, Any]:
    try:
        record = read_json(folder / MANIFEST)
    except FileNotFoundError as error:
        raise UserError(
            f"{folder} holds no packed data set (no {MANIFEST}); "
            "run `python -m data_prep.pack CONFIG`"
        ) from error
    except OSError as error:
        raise UserError(f"cannot read {folder / MANIFEST}: {error.strerror}") from error
    if record.get("format") != FORMAT:
        raise UserError(
            f"{folder} was packed by another version ({record.get('format')!r}, not "
            f"{FORMAT!r}); delete the folder and run `python -m data_prep.pack` again"
        )
    return record


def _from_record(folder: Path, record: dict[str, Any]) -> Manifest:
    splits = {
        split: SplitSummary(
            shards=tuple(ShardSummary.from_record(s) for s in summary["shards"]),
            left_out=tuple(summary["left_out"]),
        )
        for split, summary in record["splits"].items()
    }
    return Manifest(
        folder,
        record["name"],
        tuple(record["classes"]),
        splits,
        record["source_stamp"],
        tuple(record["leaked"]),
        record["origin"],
        tuple(record["kept"]),
    )
