"""Read an image or label map of a public data set, or refuse it.

The content of a file, not its suffix, decides its format. The orientation in a file's metadata is
ignored everywhere, since label maps are drawn on the stored rows.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal, cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from data_prep.settings import VOID
from hpc.cli import UserError

if TYPE_CHECKING:
    from PIL.ImageFile import ImageFile
    from PIL.TiffImagePlugin import TiffImageFile

Codec = Literal["raw", "encoded"]
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")
_EIGHT_BIT_MODES = {"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr"}
_OTHER_SPACES = {"LAB", "HSV", "La", "RGBa"}  # of 8 bits, but not convertible to RGB here
# only these, since Pillow would start Ghostscript for EPS, for instance
_FORMATS = ("JPEG", "PNG", "BMP", "TIFF", "WEBP")

# other compressions of TIFF, such as JPEG, do not keep every value
_LOSSLESS_TIFF = (
    "raw",
    "packbits",
    "tiff_lzw",
    "tiff_deflate",
    "tiff_adobe_deflate",
    "lzma",
    "zstd",
)
_ORIENTATION, _TIFF_WIDTH, _TIFF_HEIGHT = 0x0112, 0x0100, 0x0101  # tags
# by orientation, the inverse of the transposition that Pillow applies when it loads a TIFF
_UNDO = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}

# this module refuses files itself; a global filter, since `catch_warnings` is not thread-safe
warnings.filterwarnings("ignore", module=r"PIL\b")


class BadFile(UserError):
    """An image or label map that cannot be packed. The message names the file and the reason."""


@dataclass(frozen=True)
class Header:
    """The header of an image file."""

    height: int
    width: int
    keeps_jpeg: bool  # a JPEG in RGB or grey, whose own bytes can be kept


def read_header(path: Path) -> Header:
    """Read size and kind of an image without decoding it.

    Raises:
        BadFile: the image cannot be read or packed.
    """
    with _opened(path, str(path)) as image:
        _refuse_deep(image, str(path))
        keeps_jpeg = image.format == "JPEG" and image.mode in ("RGB", "L")
        return Header(*_stored_size(image), keeps_jpeg)


def read_bytes(path: Path) -> bytes:
    """Return a file's content.

    Raises:
        BadFile: the file cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise BadFile(f"{path} cannot be read: {error.strerror}") from error


def decode_rgb(data: bytes, name: str) -> NDArray[np.uint8]:
    """Return the image in `data`, converted to RGB, as a new uint8 array [H, W, 3].

    Args:
        data: the content of an image file.
        name: the file's name, for messages.

    Raises:
        BadFile: `data` is truncated, is no image, or has more than 8 bits per channel.
        UserError: there is not enough memory.
    """
    _check_png(data, name)
    with _opened(io.BytesIO(data), name) as image:
        _refuse_deep(image, name)
        return np.array(_as_stored(image).convert("RGB"))


def read_index_map(path: Path) -> NDArray[np.uint8]:
    """Return the values of a label map as they are in its file, uint8 [H, W].

    Raises:
        BadFile: the file is not lossless or does not have one channel of 8 bits (grey, or palette
            indices).
    """
    return read_palette_map(path)[0]


def read_palette_map(path: Path) -> tuple[NDArray[np.uint8], NDArray[np.uint8] | None]:
    """Return `read_index_map` and the palette, uint8 [N, 3] in RGB; None for a grey file."""
    data = read_bytes(path)
    _check_png(data, str(path))
    with _opened(io.BytesIO(data), str(path)) as image:
        _refuse_misread_bmp(image, str(path))
        _refuse_inexact(image, path)
        # Pillow scales 2- and 4-bit grey to 0..255, so that the values are no indices
        stretched = image.mode == "L" and "L;" in _raw_mode(image)
        if image.mode not in ("L", "P") or stretched:
            raise BadFile(
                f"{path} is not a label map: it must have one channel of 8 bits, not mode "
                f"{_raw_mode(image) or image.mode}; save class indices as 8-bit PNG"
            )
        stored = _as_stored(image)  # before any other call that loads the image
        colours = np.array(stored.getpalette() or [], np.uint8).reshape(-1, 3)
        return np.array(stored), colours if stored.mode == "P" else None


def map_labels(
    values: NDArray[np.uint8],
    label_of: Mapping[int, int],
    path: Path,
    remedy: str = "restore the original label map",
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
            f"{f'void is {void}' if void else 'no void'}; {remedy}"
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
    except MemoryError as error:  # the file is not bad, so `skip_bad` must not leave it out
        raise UserError(
            f"there is not enough memory to decode {name}; run again with fewer --processes"
        ) from error
    except Exception as error:  # Pillow raises many types on damaged bytes
        reason = (
            "no known image format" if isinstance(error, Image.UnidentifiedImageError) else error
        )
        reason = str(reason) or type(error).__name__
        raise BadFile(f"{name} cannot be read as an image ({reason}); replace the file") from error


def _check_png(data: bytes, name: str) -> None:
    # decoding alone skips the CRCs of a PNG's pixels, and the chunks after them
    with _opened(io.BytesIO(data), name) as image:
        if image.format == "PNG":
            image.verify()


def _refuse_deep(image: Image.Image, name: str) -> None:
    if image.mode in _OTHER_SPACES:
        raise BadFile(f"{name} is in the colour space {image.mode}; convert it to 8-bit RGB")
    # Pillow reads 16-bit RGB as mode RGB and silently drops half of each value
    if image.mode not in _EIGHT_BIT_MODES or ";16" in _raw_mode(image):
        raise BadFile(
            f"{name} has more than 8 bits per channel (mode {_raw_mode(image) or image.mode}); "
            "convert it to 8 bits"
        )
    if not image.width or not image.height:
        raise BadFile(f"{name} has no pixels; replace the file")
    _refuse_misread_bmp(image, name)


def _refuse_misread_bmp(image: Image.Image, name: str) -> None:
    # Pillow reads 4-bit grey as 8-bit, and 8-bit files with a palette of two greys as 1-bit
    right = {"L": 8, "1": 1}.get(image.mode)
    if image.format == "BMP" and right and (bits := _bmp_bits(image)) != right:
        raise BadFile(
            f"{name} is a grey BMP of {bits} bits per pixel, which is not supported; save it as PNG"
        )


def _bmp_bits(image: Image.Image) -> int:
    file = cast("ImageFile", image).fp
    assert file is not None
    file.seek(14)
    header = file.read(16)
    return int.from_bytes(header[10:12] if header[0] == 12 else header[14:16], "little")


def _refuse_inexact(image: Image.Image, path: Path) -> None:
    compression = image.info.get("compression")
    exact = image.format in ("PNG", "BMP")
    kind = str(image.format)
    if image.format == "TIFF":
        exact = compression in _LOSSLESS_TIFF
        kind = f"TIFF with {compression} compression"
    if not exact:
        raise BadFile(f"{path}: {kind} does not keep label values; save label maps as PNG")
    if (frames := getattr(image, "n_frames", 1)) > 1:
        raise BadFile(f"{path} holds {frames} images; save one label map as PNG")


def _stored_size(image: Image.Image) -> tuple[int, int]:
    """Return (height, width) of the stored rows."""
    if image.format == "TIFF":
        tags = cast("TiffImageFile", image).tag_v2
        return tags[_TIFF_HEIGHT], tags[_TIFF_WIDTH]
    return image.height, image.width


def _as_stored(image: Image.Image) -> Image.Image:
    """Decode the image, with its pixels in the order of the file."""
    orientation = image.getexif().get(_ORIENTATION) if image.format == "TIFF" else None
    image.load()
    return image.transpose(_UNDO[orientation]) if orientation in _UNDO else image


def _raw_mode(image: Image.Image) -> str:
    """Return Pillow's name of the pixel format in the file, such as `RGB;16B` or `L;4`, or ""."""
    arguments = _tile_arguments(image)
    first = arguments[0] if isinstance(arguments, tuple) and arguments else arguments
    return first if isinstance(first, str) else ""


def _tile_arguments(image: Image.Image) -> Any:
    tiles = getattr(image, "tile", None) or []
    return tiles[0][3] if tiles else ""
