"""Real encodings of random pictures in all the kinds that images come in, with what must be read
from them; and PNG files of any header."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Array = NDArray[np.uint8]
GREY, RGB, PALETTE, GREY_ALPHA, RGB_ALPHA = 0, 2, 3, 4, 6
_CHANNELS = {GREY: 1, RGB: 3, PALETTE: 1, GREY_ALPHA: 2, RGB_ALPHA: 4}
# first column and row, and steps between them, of each pass of an interlaced PNG
_ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2),
          (0, 1, 1, 2))  # fmt: skip
PNG_KINDS = [
    (bits, colour)
    for colour, depths in {
        GREY: (1, 2, 4, 8, 16),
        RGB: (8, 16),
        PALETTE: (1, 2, 4, 8),
        GREY_ALPHA: (8, 16),
        RGB_ALPHA: (8, 16),
    }.items()
    for bits in depths
]
OTHER_KINDS = [
    ("JPEG", "RGB"), ("JPEG", "L"), ("JPEG", "CMYK"), ("BMP", "RGB"), ("BMP", "L"), ("BMP", "1"),
    ("BMP", "P"), ("TIFF", "RGB"), ("TIFF", "L"), ("TIFF", "P"), ("TIFF", "CMYK"), ("TIFF", "I;16"),
    ("TIFF", "F"), ("WEBP", "RGB"), ("WEBP", "RGBA"), ("GIF", "P"), ("PPM", "RGB"),
]  # fmt: skip


@dataclass(frozen=True)
class Picture:
    """An image file's bytes, and what it must be read as: `rgb` [H, W, 3], and `labels` [H, W];
    None where it must be refused."""

    content: bytes
    size: tuple[int, int]  # height, width
    rgb: Array | None
    labels: Array | None


def png(seed: int, bits: int, colour: int, interlaced: bool) -> Picture:
    """A PNG made by hand, of random samples."""
    random = np.random.default_rng(seed)
    height, width = (int(n) for n in random.integers(1, 40, 2))
    shape = (height, width, _CHANNELS[colour])
    values = random.integers(0, 2**bits, shape).astype(np.uint16)
    palette = random.integers(0, 256, (2**bits, 3), np.uint8) if colour == PALETTE else None
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, int(interlaced))
    passes = [values[y::dy, x::dx] for x, y, dx, dy in _ADAM7] if interlaced else [values]
    rows = b"".join(_rows(one, bits) for one in passes)
    content = png_file(header, zlib.compress(rows), palette)
    if bits == 16:
        return Picture(content, shape[:2], None, None)
    whole = (values * (255 // (2**bits - 1))).astype(np.uint8)
    if palette is not None:
        rgb, labels = palette[values[:, :, 0]], values[:, :, 0].astype(np.uint8)
    elif colour in (GREY, GREY_ALPHA):
        rgb = np.repeat(whole[:, :, :1], 3, axis=2)
        labels = whole[:, :, 0] if (bits, colour) == (8, GREY) else None
    else:
        rgb, labels = whole[:, :, :3], None
    return Picture(content, shape[:2], rgb, labels)


def png_file(header: bytes, pixels: bytes, palette: Array | None = None) -> bytes:
    """A PNG of any header chunk and compressed rows; its CRCs fit."""
    chunks = [(b"IHDR", header), (b"IDAT", pixels), (b"IEND", b"")]
    if palette is not None:
        chunks.insert(1, (b"PLTE", palette.tobytes()))
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunks(chunks))


def other(seed: int, kind: str, mode: str) -> Picture:
    """A file that Pillow writes."""
    random = np.random.default_rng(seed)
    size = (int(random.integers(1, 40)), int(random.integers(1, 40)))
    image = Image.fromarray(random.integers(0, 256, (*size, 3), np.uint8))
    if mode == "I;16":
        image = Image.fromarray(random.integers(0, 65536, size).astype(np.uint16))
    elif mode != "RGB":
        image = image.convert(mode)
    file = io.BytesIO()
    image.save(file, kind, **({"lossless": True} if kind == "WEBP" else {}))
    with Image.open(io.BytesIO(file.getvalue())) as read:
        refused = kind in ("GIF", "PPM") or mode in ("I;16", "F")
        rgb = None if refused else np.array(read.convert("RGB"))
        kept = kind in ("BMP", "TIFF") and read.mode in ("L", "P")
        return Picture(file.getvalue(), size, rgb, np.array(read) if kept else None)


def _rows(values: NDArray[np.uint16], bits: int) -> bytes:
    if not values.size:
        return b""
    if bits == 16:
        lines = values.astype(">u2").reshape(len(values), -1).view(np.uint8)
    elif bits == 8:
        lines = values.astype(np.uint8).reshape(len(values), -1)
    else:
        each = [(values[:, :, 0] >> shift) & 1 for shift in range(bits - 1, -1, -1)]
        lines = np.packbits(np.stack(each, axis=2).reshape(len(values), -1), axis=1)
    return b"".join(b"\x00" + line.tobytes() for line in lines)


def _chunks(chunks: Iterable[tuple[bytes, bytes]]) -> Iterator[bytes]:
    for kind, body in chunks:
        crc = zlib.crc32(kind + body)
        yield struct.pack(">I", len(body)) + kind + body + struct.pack(">I", crc)
