"""Find the files of samples in the folders and lists of official data sets."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from hpc.cli import MissingInput, UserError, unreadable

TREE_HINT = "docs/how-to/public-data-sets.md shows the tree"


@dataclass(frozen=True)
class Sample:
    """The files of one image and its label map.

    If one file holds the labels of many images, `label` is that file, and `annotation` the part of
    this image, in the source's own text. So a large file is parsed once, not by every process.
    """

    id: str
    image: Path
    label: Path
    annotation: str = ""


def names_in(folder: Path, remedy: str) -> set[str]:
    """Return the names in `folder`, without hidden ones.

    One listing is used, since testing every file takes minutes on a parallel file system.

    Args:
        folder: the folder to list.
        remedy: the end of the error message.

    Raises:
        UserError: the folder cannot be read.
    """
    try:
        return {entry.name for entry in folder.iterdir() if not entry.name.startswith(".")}
    except OSError as error:
        message = f"cannot read the folder {folder}: {error.strerror}; {remedy}"
        raise unreadable(error, message) from error


def read_list(path: Path, remedy: str) -> list[str]:
    """Return the ids of a list with one id per line, in its order.

    Args:
        path: a text file.
        remedy: the end of the error message if it cannot be read.

    Raises:
        UserError: the list cannot be read, is empty, or has a line that is no id or is repeated.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        message = f"cannot read the list {path}: {error.strerror}; {remedy}"
        raise unreadable(error, message) from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text; a list holds one id per line") from error
    ids: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        found = line.strip()
        if not found:
            continue
        if len(found.split()) > 1 or "/" in found:
            raise UserError(
                f"{path}, line {number}: {found!r} is not an id; a list holds one id per line, a "
                "file name without folder and suffix"
            )
        if found in ids:
            raise UserError(
                f"{path} holds {found!r} twice, in lines {ids[found]} and {number}; remove one"
            )
        ids[found] = number
    if not ids:
        raise UserError(f"the list {path} is empty; it must hold one id per line")
    return list(ids)


def listed_samples(
    ids: Iterable[str], named_by: str, images: Path, labels: Path, suffix: str, remedy: str
) -> list[Sample]:
    """Return the samples of `ids`, sorted by id: images/ID.jpg and labels/ID`suffix`.

    Args:
        ids: the ids, each once.
        named_by: the list that names them, for messages.
        images: the folder of images.
        labels: the folder of label maps.
        suffix: the suffix of label maps.
        remedy: the end of the error message.

    Raises:
        UserError: files are missing.
    """
    ordered = sorted(ids, key=str.encode)
    for folder, ending in ((images, ".jpg"), (labels, suffix)):
        there = names_in(folder, remedy)
        missing = [name for one in ordered if (name := one + ending) not in there]
        refuse_missing(missing, folder, named_by, remedy)
    return [Sample(one, images / f"{one}.jpg", labels / f"{one}{suffix}") for one in ordered]


def refuse_missing(missing: Sequence[str], folder: Path, named_by: str, remedy: str) -> None:
    """Raise `MissingInput` if the list `missing` of file names in `folder` is not empty."""
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise MissingInput(
            f"{folder} has no {missing[0]}{more}, which {named_by} asks for; {remedy}"
        )
