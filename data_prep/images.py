"""One image or label map as it lies in a public data set: its header, its pixels, its refusal.

EXIF orientation is ignored everywhere: label maps are drawn on the sensor's own rows."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from data_prep.settings import VOID
from hpc.command import UserError

Codec = Literal["raw", "encoded"]
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")
_EIGHT_BIT_MODES = {"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr"}
_OTHER_SPACES = {"LAB", "HSV", "La", "RGBa"}  # 8 bits too
# no others, whatever a file's name: for EPS, say, Pillow would start Ghostscript
_FORMATS = ("JPEG", "PNG", "BMP", "TIFF", "WEBP")

# what Pillow warns of is refused here or of no matter; threads cannot share `catch_warnings`
warnings.filterwarnings("ignore", module=r"PIL\b")


class BadFile(UserError):
    """An image or label map that cannot be packed. The message names the file and the reason."""


@dataclass(frozen=True)
class Header:
    """What the first bytes of an image file tell."""

    height: int
    width: int
    keeps_jpeg: bool  # its own bytes can be kept: a JPEG in RGB or grey


def read_header(path: Path) -> Header:
    """Size and kind of an image without decoding it. Raises `BadFile`."""
    with _opened(path, str(path)) as image:
        _refuse_deep(image, str(path))
        keeps_jpeg = image.format == "JPEG" and image.mode in ("RGB", "L")
        return Header(image.height, image.width, keeps_jpeg)


def read_bytes(path: Path) -> bytes:
    """A file's content. Raises `BadFile`."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise BadFile(f"{path} cannot be read: {error.strerror}") from error


def decode_rgb(data: bytes, name: str) -> NDArray[np.uint8]:
    """The image in `data`, converted to RGB, as a fresh uint8 array [H, W, 3].

    Raises `BadFile` (naming `name`) for what is truncated, no image, or deeper than 8 bits."""
    _check_png(data, name)
    with _opened(io.BytesIO(data), name) as image:
        _refuse_deep(image, name)
        return np.array(image.convert("RGB"))


def read_index_map(path: Path) -> NDArray[np.uint8]:
    """The values of a label map as they are in its file, uint8 [H, W].

    Raises `BadFile` unless it is single-channel 8-bit (grey, or palette indices) and lossless."""
    data = read_bytes(path)
    _check_png(data, str(path))
    with _opened(io.BytesIO(data), str(path)) as image:
        _refuse_narrow_bmp(image, str(path))
        # Pillow stretches 2- and 4-bit grey to 0..255: the values would be no indices
        stretched = image.mode == "L" and "L;" in _raw_mode(image)
        if image.mode not in ("L", "P") or stretched:
            raise BadFile(
                f"{path} is no label map: it must have one channel of 8 bits, not mode "
                f"{_raw_mode(image) or image.mode}; save class indices as 8-bit PNG"
            )
        if image.format in ("JPEG", "WEBP"):
            raise BadFile(f"{path}: {image.format} blurs label values; save label maps as PNG")
        return np.array(image)


def map_labels(
    values: NDArray[np.uint8], label_of: Mapping[int, int], path: Path
) -> NDArray[np.uint8]:
    """Return `values`, [H, W], with each value replaced by its class index or VOID in `label_of`.

    Raises:
        BadFile: `values` has a value that is not in `label_of`.
    """
    present = np.flatnonzero(np.bincount(values.reshape(-1), minlength=256)).tolist()
    if strange := [value for value in present if value not in label_of]:
        classes = _ranges(value for value, label in label_of.items() if label != VOID)
        void = _ranges(value for value, label in label_of.items() if label == VOID)
        raise BadFile(
            f"{path} holds the label value {strange[0]}, but classes are {classes} and "
            f"{f'void is {void}' if void else 'no void'}; correct the label map, or the settings "
            "of the data set"
        )
    if all(label_of[value] == value for value in present):
        return values
    table = np.array([label_of.get(value, VOID) for value in range(256)], np.uint8)
    return table[values]


def class_indices(num_classes: int, void: int | None = VOID) -> dict[int, int]:
    """Return the mapping for `map_labels` of label maps that hold class indices and `void`."""
    void_values = {} if void is None else {void: VOID}
    return {index: index for index in range(num_classes)} | void_values


def _ranges(values: Iterable[int]) -> str:
    """Return `0 to 18, 255`."""
    runs: list[list[int]] = []
    for value in sorted(values):
        if runs and value == runs[-1][1] + 1:
            runs[-1][1] = value
        else:
            runs.append([value, value])
    return ", ".join(f"{a} to {b}" if a < b else str(a) for a, b in runs)


@contextmanager
def _opened(file: Path | IO[bytes], name: str) -> Iterator[Image.Image]:
    try:
        with Image.open(file, formats=_FORMATS) as image:
            yield image
    except BadFile:
        raise
    except MemoryError as error:  # no fault of the file: not to be left out as a bad one
        raise UserError(
            f"there is not enough memory to decode {name}; run again with fewer --processes"
        ) from error
    except Exception as error:  # Pillow raises nearly any type on damaged bytes
        reason = (
            "no known image format" if isinstance(error, Image.UnidentifiedImageError) else error
        )
        reason = str(reason) or type(error).__name__
        raise BadFile(f"{name} cannot be read as an image ({reason}); replace the file") from error


def _check_png(data: bytes, name: str) -> None:
    # decoding skips the CRCs of a PNG's pixels, and what follows them
    with _opened(io.BytesIO(data), name) as image:
        if image.format == "PNG":
            image.verify()


def _refuse_deep(image: Image.Image, name: str) -> None:
    if image.mode in _OTHER_SPACES:
        raise BadFile(f"{name} is in the colour space {image.mode}; convert it to 8-bit RGB")
    # Pillow reads 16-bit RGB as mode RGB and drops half of each value without a word
    if image.mode not in _EIGHT_BIT_MODES or ";16" in _raw_mode(image):
        raise BadFile(
            f"{name} has more than 8 bits a channel (mode {_raw_mode(image) or image.mode}); "
            "convert it to 8 bits"
        )
    if not image.width or not image.height:
        raise BadFile(f"{name} has no pixels; replace the file")
    _refuse_narrow_bmp(image, name)


def _refuse_narrow_bmp(image: Image.Image, name: str) -> None:
    # Pillow reads the nibbles of a 4-bit grey BMP as if they were bytes
    if image.format == "BMP" and image.mode == "L" and _tile_arguments(image)[1] < image.width:
        raise BadFile(f"{name} is a grey BMP of less than 8 bits a pixel; save it as PNG")


def _raw_mode(image: Image.Image) -> str:
    """How pixels lie in the file, such as `RGB;16B` or `L;4`; empty where Pillow does not say."""
    arguments = _tile_arguments(image)
    first = arguments[0] if isinstance(arguments, tuple) and arguments else arguments
    return first if isinstance(first, str) else ""


def _tile_arguments(image: Image.Image) -> Any:
    tiles = getattr(image, "tile", None) or []
    return tiles[0][3] if tiles else ""
