"""A picture and its label map, drawn on together."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

Colour = Sequence[float] | NDArray[np.float64]  # red, green, blue, 0 to 255
Point = tuple[float, float]


class Canvas:
    """A picture and its label map; what is drawn on one is drawn on the other."""

    def __init__(self, size: tuple[int, int]) -> None:
        height, width = size
        self.picture = Image.new("RGB", (width, height))
        self.label = Image.new("L", (width, height))
        self._brush = ImageDraw.Draw(self.picture)
        self._pen = ImageDraw.Draw(self.label)

    def polygon(self, points: Sequence[Point], kind: int, colour: Colour) -> None:
        """Fill a polygon of class `kind`."""
        self._brush.polygon(points, fill=_rgb(colour))
        self._pen.polygon(points, fill=kind)

    def box(self, x0: float, y0: float, x1: float, y1: float, kind: int, colour: Colour) -> None:
        """Fill the upright rectangle between two corners."""
        self._brush.rectangle((x0, y0, x1, y1), fill=_rgb(colour))
        self._pen.rectangle((x0, y0, x1, y1), fill=kind)

    def oval(self, x: float, y: float, rx: float, ry: float, kind: int, colour: Colour) -> None:
        """Fill an ellipse around (x, y) with the radii `rx` and `ry`."""
        corners = (x - rx, y - ry, x + rx, y + ry)
        self._brush.ellipse(corners, fill=_rgb(colour))
        self._pen.ellipse(corners, fill=kind)


def _rgb(colour: Colour) -> tuple[int, int, int]:
    red, green, blue = (int(min(255, max(0, value))) for value in colour)
    return red, green, blue
