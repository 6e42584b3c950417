"""Label images with a trained cell: write a label map with colours and a confidence map for each.

    python -m pipeline.predict CELL IMAGES... --out DIR

CELL is a cell's name (camvid/fcn_resnet101/DLNWCE/0), the start of its signature, or the path of a
trained head.
"""

from __future__ import annotations

import colorsys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from data_prep.images import decode_rgb, read_bytes
from hpc.cli import UserError, argument_parser, one_line, run
from hpc.config import did_you_mean
from hpc.distributed.launcher import single_process
from hpc.distributed.process_group import process_group
from hpc.storage.atomic import new_file
from jobs.spec.run_paths import RunPaths
from jobs.training.predictor import Prediction, Predictor
from pipeline.config.grid_file import Grid, find_config, read_grid


def main(argv: Sequence[str]) -> int:
    """Write IMAGE.png and IMAGE-confidence.png for each image; see `write_maps`."""
    parser = argument_parser("python -m pipeline.predict", __doc__)
    parser.add_argument("cell", help="name, start of signature, or path of a trained head")
    parser.add_argument("images", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="folder for the maps")
    parser.add_argument("--config", help="the grid file that the cell belongs to")
    arguments = parser.parse_args(argv)
    _refuse_overwriting(arguments.images, arguments.out)
    head, paths = find_head(arguments.cell, arguments.config)
    with process_group(single_process(), paths.rendezvous) as group:
        predictor = Predictor(head, paths, group)
        for path in arguments.images:
            image = decode_rgb(read_bytes(path), str(path))
            write_maps(predictor.predict(image), arguments.out, path.stem, len(predictor.classes))
    shown = ", ".join(f"{index} {name}" for index, name in enumerate(predictor.classes))
    print(one_line(f"{len(arguments.images)} images labelled in {arguments.out}; classes: {shown}"))
    return 0


def find_head(cell: str, config: str | None) -> tuple[Path, RunPaths]:
    """Return the file of a cell's trained head, and its run.

    Args:
        cell: the cell's name, the start of its signature, or the path of a trained head (.pt).
        config: the grid file; None for the default of `find_config`.

    Raises:
        UserError: the cell is unknown or ambiguous, or has no trained head.
    """
    if cell.endswith(".pt"):
        head = Path(cell).absolute()
        if not head.is_file():
            raise UserError(
                f"there is no trained head {cell}; give the path of a file in RUN/heads"
            )
        return head, RunPaths(head.parent.parent)
    grid = read_grid(find_config(config))
    signature = _signature(grid, cell)
    head = grid.run.head(signature)
    if not head.is_file():
        raise UserError(
            f"{cell} has no trained head {head}; see "
            f"`python -m pipeline.status {grid.command_arguments}`"
        )
    return head, grid.run


def _signature(grid: Grid, cell: str) -> str:
    names = {c.name: c.signature for c in grid.cells}
    if cell in names:
        return names[cell]
    matches = [signature for signature in names.values() if signature.startswith(cell)]
    if len(matches) == 1:
        return matches[0]
    hint = did_you_mean(cell, names)
    raise UserError(f"{grid.path} has {len(matches) or 'no'} cells {cell!r}; {hint}")


def _refuse_overwriting(images: Sequence[Path], folder: Path) -> None:
    """Raise `UserError` if a map would replace an image, or the map of another image."""
    maps = [path for image in images for path in _map_paths(folder, image.stem)]
    path, times = Counter(maps).most_common(1)[0]
    if times > 1:
        raise UserError(
            f"{times} maps would be called {path.name}, and overwrite each other; rename an image, "
            "or label the images one by one into other folders"
        )
    given = {image.resolve() for image in images}
    if replaced := [path for path in maps if path.resolve() in given]:
        raise UserError(
            f"a map would replace the image {replaced[0]}; name another folder in --out"
        )


def _map_paths(folder: Path, stem: str) -> tuple[Path, Path]:
    """Return the paths of an image's label map and confidence map."""
    return folder / f"{stem}.png", folder / f"{stem}-confidence.png"


def write_maps(prediction: Prediction, folder: Path, stem: str, num_classes: int) -> None:
    """Write `STEM.png` and `STEM-confidence.png` into `folder`.

    The first holds class indices with a palette, the second confidences from 0 to 1 as 0 to 255.
    """
    labels = Image.fromarray(prediction.labels)
    labels.putpalette(palette(num_classes))
    confidence = np.round(prediction.confidence * 255).astype(np.uint8)
    images = labels, Image.fromarray(confidence)
    for path, image in zip(_map_paths(folder, stem), images, strict=True):
        with new_file(path) as temporary:
            image.save(temporary, format="PNG")


def palette(num_classes: int) -> list[int]:
    """Return the RGB values of all classes in one list: different hues, two brightnesses."""
    colours: list[int] = []
    for index in range(num_classes):
        rgb = colorsys.hsv_to_rgb(index / num_classes, 0.65, 0.95 if index % 2 else 0.7)
        colours += [round(255 * channel) for channel in rgb]
    return colours


if __name__ == "__main__":
    run(main)
