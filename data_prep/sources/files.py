"""Lists of ids and the files that they name, as official data sets lay them out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from hpc.cli import MissingInput, UserError, unreadable

LAYOUTS = "docs/how-to/public-data-sets.md shows the tree"


@dataclass(frozen=True)
class Sample:
    """One picture and its label map, as files.

    Where one file holds the labels of many pictures, `label` is that file, and `annotation` is what
    it says of this one, in the source's own text. It travels with the sample, so that a large file
    is parsed once and not by every process that packs."""

    id: str
    image: Path
    label: Path
    annotation: str = ""


def names_in(folder: Path, remedy: str) -> set[str]:
    """The names of what lies in `folder`; `UserError`, which ends with `remedy`, if it is not
    there. One listing: asking for every file would take a parallel file system minutes."""
    try:
        return {entry.name for entry in folder.iterdir() if not entry.name.startswith(".")}
    except OSError as error:
        message = f"cannot read the folder {folder}: {error.strerror}; {remedy}"
        raise unreadable(error, message) from error


def read_list(path: Path, remedy: str) -> list[str]:
    """The ids of a list, one a line, in its order. Raises `UserError`: not there (`remedy`), empty,
    an id twice, a line that is no id."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        message = f"cannot read the list {path}: {error.strerror}; {remedy}"
        raise unreadable(error, message) from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text; a list holds one id a line") from error
    ids: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        found = line.strip()
        if not found:
            continue
        if len(found.split()) > 1 or "/" in found:
            raise UserError(
                f"{path}, line {number}: {found!r} is no id; a list holds one id a line, a file "
                "name without folder and suffix"
            )
        if found in ids:
            raise UserError(
                f"{path} holds {found!r} twice, in lines {ids[found]} and {number}; remove one"
            )
        ids[found] = number
    if not ids:
        raise UserError(f"the list {path} is empty; it must hold one id a line")
    return list(ids)


def listed_samples(
    ids: Iterable[str], named_by: str, images: Path, labels: Path, suffix: str, remedy: str
) -> list[Sample]:
    """The samples of `ids`, sorted by id: images/ID.jpg and labels/ID`suffix`. Raises `UserError`
    for files that are not there; `named_by` says what names them."""
    ordered = sorted(ids, key=str.encode)
    for folder, ending in ((images, ".jpg"), (labels, suffix)):
        there = names_in(folder, remedy)
        missing = [name for one in ordered if (name := one + ending) not in there]
        refuse_missing(missing, folder, named_by, remedy)
    return [Sample(one, images / f"{one}.jpg", labels / f"{one}{suffix}") for one in ordered]


def refuse_missing(missing: Sequence[str], folder: Path, named_by: str, remedy: str) -> None:
    """`MissingInput` if there are any files `missing` in `folder`."""
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise MissingInput(
            f"{folder} has no {missing[0]}{more}, which {named_by} asks for; {remedy}"
        )
