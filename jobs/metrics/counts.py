"""Evaluation counts of a cell: int64 sums, which do not depend on how images are split.

Any split of the images over ranks, jobs or calls gives the same sums to the last bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

Int64 = NDArray[np.int64]

# A real x is stored as round(x * FIXED_POINT), because integer sums do not depend on their order.
FIXED_POINT = 2**24
# -log p can exceed 1 by far, so its integer part needs more bits.
NLL_FIXED_POINT = 2**16


@dataclass(frozen=True, eq=False)
class Counts:
    """Sums over any number of images, all int64; scalars have the shape [].

    All but `void` and `images` are sums over labelled pixels.

    Attributes:
        confusion: [C, C], pixels by (label, prediction).
        class_bins: [C, N, 3], for each class and bin of its score: number of pixels, number of
            them with this label, sum of scores * FIXED_POINT.
        top1_bins: [N, 3], for each bin of the highest score: number of pixels, number of them
            predicted right, sum of scores * FIXED_POINT.
        brier: sum of Brier scores * FIXED_POINT.
        nll: sum of -log p of the true class * NLL_FIXED_POINT.
        pixels: number of labelled pixels.
        void: number of void pixels.
        images: number of images.
    """

    confusion: Int64
    class_bins: Int64
    top1_bins: Int64
    brier: Int64
    nll: Int64
    pixels: Int64
    void: Int64
    images: Int64

    def __post_init__(self) -> None:
        for name in NAMES:
            object.__setattr__(self, name, np.asarray(getattr(self, name)))
            if getattr(self, name).dtype != np.int64:
                raise ValueError(f"counts are int64, but {name} is {getattr(self, name).dtype}")
        expected = shapes(self.num_classes, self.bins)
        for name, shape in expected.items():
            if getattr(self, name).shape != shape:
                raise ValueError(f"{name} is {getattr(self, name).shape}, should be {shape}")

    @classmethod
    def zeros(cls, num_classes: int, bins: int) -> Counts:
        """Return the counts of no image."""
        expected = shapes(num_classes, bins)
        return cls(**{name: np.zeros(shape, np.int64) for name, shape in expected.items()})

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, Int64]) -> Counts:
        """Invert `as_arrays`. Raises `ValueError` for wrong names, shapes or types."""
        if set(arrays) != set(NAMES):
            raise ValueError(f"counts are {', '.join(NAMES)}, not {', '.join(sorted(arrays))}")
        return cls(**{name: np.asarray(arrays[name]) for name in NAMES})

    def as_arrays(self) -> dict[str, Int64]:
        """Return the arrays by name, in the order of `NAMES`."""
        return {name: getattr(self, name) for name in NAMES}

    @property
    def num_classes(self) -> int:
        return len(self.confusion)

    @property
    def bins(self) -> int:
        return len(self.top1_bins)

    def __add__(self, other: Counts) -> Counts:
        """Return the sum. Raises `ValueError` if the numbers of classes or bins differ."""
        if (self.num_classes, self.bins) != (other.num_classes, other.bins):
            raise ValueError(
                f"counts of {self.num_classes} classes and {self.bins} bins cannot be added to "
                f"those of {other.num_classes} classes and {other.bins} bins"
            )
        mine, others = self.as_arrays(), other.as_arrays()
        return Counts.from_arrays({name: mine[name] + others[name] for name in NAMES})

    def equals(self, other: Counts) -> bool:
        """Return True if every count is the same."""
        mine, others = self.as_arrays(), other.as_arrays()
        return all(np.array_equal(mine[name], others[name]) for name in NAMES)


NAMES = tuple(field.name for field in fields(Counts))


def shapes(num_classes: int, bins: int) -> dict[str, tuple[int, ...]]:
    """Return the shape of every array of `Counts`, by name."""
    return {
        "confusion": (num_classes, num_classes),
        "class_bins": (num_classes, bins, 3),
        "top1_bins": (bins, 3),
        "brier": (),
        "nll": (),
        "pixels": (),
        "void": (),
        "images": (),
    }
