"""What a packed data set consists of: shards, ids, sizes, class pixel counts, checksums.

Free of torch, h5py and mpi4py: planning reads it on the login node."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hpc.atomic import Damaged, fingerprint, read_json, write_json
from hpc.command import UserError

MANIFEST = "manifest.json"
FORMAT = "lossgrid shards 2"
SPLITS = ("train", "val")


@dataclass(frozen=True)
class ShardSummary:
    """One shard file, its samples in their order in the file."""

    file: str  # name within the folder
    bytes: int
    sha256: str  # of the whole file
    index_sha256: str  # of the index and all CRCs: says at opening that content is the manifest's
    ids: tuple[str, ...]
    sizes: tuple[tuple[int, int], ...]  # (height, width)
    class_pixels: tuple[int, ...]  # one count a class
    void_pixels: int

    @property
    def images(self) -> int:
        """Number of samples."""
        return len(self.ids)

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> ShardSummary:
        """The summary that `asdict` turned into plain values."""
        lists = {
            "ids": tuple(record["ids"]),
            "sizes": tuple((height, width) for height, width in record["sizes"]),
            "class_pixels": tuple(record["class_pixels"]),
        }
        return cls(**{**record, **lists})


@dataclass(frozen=True)
class SplitSummary:
    """The training or the validation half of a data set."""

    shards: tuple[ShardSummary, ...]
    left_out: tuple[str, ...] = ()  # what `--skip-bad` left out: one message a sample

    @property
    def images(self) -> int:
        """Number of samples."""
        return sum(shard.images for shard in self.shards)

    @property
    def class_pixels(self) -> tuple[int, ...]:
        """Number of labelled pixels of each class."""
        counts = zip(*(shard.class_pixels for shard in self.shards), strict=True)
        return tuple(sum(of_class) for of_class in counts)

    @property
    def void_pixels(self) -> int:
        """Number of pixels that count nowhere."""
        return sum(shard.void_pixels for shard in self.shards)


@dataclass(frozen=True)
class Manifest:
    """A packed data set. `fingerprint` is the SHA-256 of all that the manifest says about classes
    and content (not of names, paths and times), to be recorded with whatever was made from it."""

    folder: Path
    name: str
    classes: tuple[str, ...]
    splits: dict[str, SplitSummary]
    source_stamp: str = ""  # names, sizes and times of the source files and the settings
    identity: str = ""  # of the settings it was packed with, see `DatasetSettings.identity`
    fingerprint: str = field(init=False)

    def __post_init__(self) -> None:
        shards = {split: [asdict(s) for s in half.shards] for split, half in self.splits.items()}
        content = {"format": FORMAT, "classes": list(self.classes), "splits": shards}
        object.__setattr__(self, "fingerprint", fingerprint(content))

    @classmethod
    def load(cls, folder: str | Path) -> Manifest:
        """The manifest of a packed data set. Raises `UserError` if there is none or it is of
        another version of this program, `Damaged` if it is not as it was written."""
        folder = Path(folder)
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
        return _from_record(folder, record)

    def save(self) -> None:
        """Write the manifest into its folder in one step."""
        splits = {split: asdict(half) for split, half in self.splits.items()}
        record = {
            "format": FORMAT,
            "name": self.name,
            "source_stamp": self.source_stamp,
            "identity": self.identity,
            "classes": list(self.classes),
            "splits": splits,
        }
        write_json(self.folder / MANIFEST, record)

    def check_files(self) -> None:
        """`Damaged` for the first shard that is missing or of another length. Reads no content."""
        for half in self.splits.values():
            for shard in half.shards:
                check_length(self.folder / shard.file, shard.bytes)


def check_length(path: Path, expected: int) -> None:
    """`Damaged` if the file is missing or has not `expected` bytes."""
    try:
        found = path.stat().st_size
    except OSError as error:
        raise Damaged(f"{path} cannot be read: {error.strerror}; {remedy(path)}") from error
    if found != expected:
        raise Damaged(f"{path} has {found} bytes instead of {expected}; {remedy(path)}")


def remedy(path: Path) -> str:
    """What to do about a damaged shard."""
    return f"delete {path.name} if it is there and run `python -m data_prep.pack CONFIG` again"


def _from_record(folder: Path, record: dict[str, Any]) -> Manifest:
    splits = {
        split: SplitSummary(
            shards=tuple(ShardSummary.from_record(s) for s in half["shards"]),
            left_out=tuple(half["left_out"]),
        )
        for split, half in record["splits"].items()
    }
    return Manifest(
        folder,
        record["name"],
        tuple(record["classes"]),
        splits,
        record["source_stamp"],
        record["identity"],
    )
