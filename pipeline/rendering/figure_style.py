"""The style of all figures, small multiples, labels that do not overlap, and images as bytes."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.rendering.plotting import Axes, Bbox, BboxBase, Figure

# Colours by Okabe and Ito, distinct under every common colour blindness.
BLUE, ORANGE, GREEN, PURPLE = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
TERM_COLOURS = (BLUE, ORANGE, GREEN, PURPLE, "#E69F00", "#56B4E9", "#555555")
INK, MUTED, FAINT = "#222222", "#707070", "#dddddd"

# For `rc_context`; `Any`, because only some matplotlib versions type its keys.
STYLE: Any = {
    "font.family": "DejaVu Sans",  # comes with matplotlib, so it is equal everywhere
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.labelcolor": INK,
    "axes.labelpad": 6,
    "axes.edgecolor": MUTED,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": "#ececec",
    "grid.linewidth": 0.8,
    "text.color": INK,
    "text.parse_math": False,  # names may contain dollar signs
    "text.usetex": False,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "svg.hashsalt": "lossgrid",  # ids in the file would be random without it
    "figure.dpi": 100,
}
WIDTH = 10.6  # inches
PNG_DPI = 180
Point = NDArray[np.float64]


def small_multiples(
    count: int, per_row: int, panel: tuple[float, float]
) -> tuple[Figure, list[Axes]]:
    """Return a figure and its `count` axes, row by row; `panel` is (width, height) in inches."""
    num_columns, num_rows = min(count, per_row), math.ceil(count / per_row)
    size = (max(panel[0] * num_columns, WIDTH * 0.35), panel[1] * num_rows + 0.45)
    figure = Figure(figsize=size, layout="constrained")
    panels = list(figure.subplots(num_rows, num_columns, squeeze=False).flat)
    for unused in panels[count:]:
        unused.set_visible(False)
    return figure, panels[:count]


def svg(figure: Figure) -> bytes:
    """Return the figure as an SVG file; equal figures give equal bytes."""
    file = io.BytesIO()
    figure.savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()


def png(figure: Figure) -> bytes:
    """Return the figure as a PNG file; equal figures give equal bytes."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=PNG_DPI, metadata={"Software": None})
    return file.getvalue()


def name_points(
    figure: Figure, axes: Axes, names: Sequence[str], places: Sequence[tuple[float, float]]
) -> None:
    """Write each point's name beside it, where it covers least of the other points and names."""
    figure.draw_without_rendering()  # computes all positions
    points = [axes.transData.transform(place) for place in places]
    taken = [Bbox.from_extents(x - 5, y - 5, x + 5, y + 5) for x, y in points]
    for name, place, point in zip(names, places, points, strict=True):
        text = axes.annotate(
            name,
            place,
            xytext=(0, 0),
            textcoords="offset pixels",
            fontsize=7.5,
            bbox={"facecolor": "white", "alpha": 0.7, "edgecolor": "none", "pad": 0.3},
            arrowprops={"arrowstyle": "-", "color": MUTED, "linewidth": 0.5},
        )
        text.set_in_layout(False)
        size = np.array(text.get_window_extent().size)
        boxes = [_beside(point, size, np.array(offset)) for offset in _OFFSETS]
        chosen = min(boxes, key=lambda box: _covered(box, taken, axes.bbox))
        text.set_position(chosen.p0 - point)
        taken.append(chosen)


_DIRECTIONS = ((1, 0), (0, 1), (0, -1), (-1, 0), (0.7, 0.7), (0.7, -0.7), (-0.7, 0.7), (-0.7, -0.7))
# Offsets around a point at growing distances in pixels, the most readable first.
_OFFSETS = [(x * far, y * far) for far in (8, 18, 30, 44) for x, y in _DIRECTIONS]


def _beside(point: Point, size: Point, offset: Point) -> Bbox:
    # place the side of the box that faces the point at the offset
    anchor = (np.sign(np.round(offset)) - 1) / 2
    low = point + offset + anchor * size
    return Bbox.from_bounds(*low, *size)


def _covered(box: Bbox, taken: Sequence[Bbox], within: BboxBase) -> float:
    inside = Bbox.intersection(box, within)
    outside = box.width * box.height - (inside.width * inside.height if inside else 0.0)
    common = (Bbox.intersection(box, other) for other in taken)
    return outside * 10 + sum(shared.width * shared.height for shared in common if shared)
