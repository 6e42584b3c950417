"""`jobs.crop_window` on a GPU, in Triton: the same integers, hence the same bytes."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor
from triton.language import constexpr, tensor

OPTIONS: dict[str, Any] = {"num_warps": 4}
TILE = 8, 64  # bytes of a program, those along the second axis beside each other in memory

_BITS, _HALF = tl.constexpr(22), tl.constexpr(2**21)  # as in `jobs.crop_window`


class Planes(NamedTuple):
    """Three colours, wherever they lie: bytes uint8, and the steps to the next colour, row and
    column."""

    content: Tensor
    colour: int
    row: int
    column: int

    @property
    def turned(self) -> Planes:
        """Rows as columns and columns as rows."""
        return Planes(self.content, self.colour, self.column, self.row)


# Which step is 1 decides how threads share the bytes. Whether places are multiples of 16 is not
# asked: it would make a kernel of each answer.
@triton.jit(
    do_not_specialize=["num_taps", "rows", "columns"],
    do_not_specialize_on_alignment=[
        "source", "source_colour", "source_row", "source_column", "first", "weights",
        "made", "made_colour", "made_row", "made_column",
    ],
)  # fmt: skip
def resize_rows(
    source: tensor, source_colour: tensor, source_row: tensor, source_column: tensor,
    made: tensor, made_colour: tensor, made_row: tensor, made_column: tensor,
    first: tensor, weights: tensor, num_taps: tensor, rows: tensor, columns: tensor,
    ROWS: constexpr, COLUMNS: constexpr,
) -> None:  # fmt: skip
    """`ROWS` x `COLUMNS` bytes of planes of `rows` x `columns`: each weighs `num_taps` bytes of its
    column of the source, from row `first` on."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    column = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    colour = tl.program_id(2).to(tl.int64)
    inside = (row < rows) & (column < columns)
    source += colour * source_colour + column.to(tl.int64) * source_column
    source += tl.load(first + row, mask=row < rows, other=0).to(tl.int64) * source_row
    total = tl.full([ROWS, COLUMNS], _HALF, tl.int32)
    k = 0
    while k < num_taps:
        weight = tl.load(weights + row * num_taps + k, mask=row < rows, other=0)
        total += weight * tl.load(source + k * source_row, mask=inside, other=0).to(tl.int32)
        k += 1
    made += colour * made_colour + row.to(tl.int64) * made_row + column.to(tl.int64) * made_column
    tl.store(made, tl.minimum(total >> _BITS, 255).to(tl.uint8), mask=inside)


class AxisOnGpu(NamedTuple):
    """An `Axis` of `jobs.crop_window` there."""

    first: Tensor
    weights: Tensor
    nearest: Tensor


def pick(label: Tensor, rows: AxisOnGpu, columns: AxisOnGpu) -> Tensor:
    """What `jobs.crop_window.Window.of_label` makes of a label map uint8 [H, W]."""
    return label.index_select(0, rows.nearest).index_select(1, columns.nearest)


def resize_image(
    image: Tensor, rows: AxisOnGpu, columns: AxisOnGpu, rows_first: bool, window: Tensor
) -> None:
    """Make what `jobs.crop_window.Window.of_image` makes of `image` uint8 [H, W, 3], whose pixels
    `rows` and `columns` count from 0, in the upper left of `window` uint8 [3, h, w]."""
    height, width = image.shape[:2]
    num_rows, num_columns = len(rows.first), len(columns.first)
    source = Planes(image, 1, 3 * width, 3)
    made = Planes(window, *window.stride())
    shape = (num_rows, width) if rows_first else (height, num_columns)
    half = Planes(image.new_empty(3, *shape), shape[0] * shape[1], shape[1], 1)
    if rows_first:
        _launch(source, half, rows, shape, TILE)
        _launch(half.turned, made.turned, columns, (num_columns, num_rows), TILE[::-1])
    else:
        _launch(source.turned, half.turned, columns, shape[::-1], TILE[::-1])
        _launch(half, made, rows, (num_rows, num_columns), TILE)


def _launch(
    source: Planes, made: Planes, taps: AxisOnGpu, shape: tuple[int, int], tile: tuple[int, int]
) -> None:
    programs = [triton.cdiv(length, side) for length, side in zip(shape, tile, strict=True)]
    resize_rows[(*programs, 3)](
        *source, *made, taps.first, taps.weights, taps.weights.shape[1], *shape, *tile, **OPTIONS
    )
