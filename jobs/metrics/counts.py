"""What evaluation leaves of a cell: integer counts that only add, so that any split of the images
over ranks, jobs or calls gives the same sums to the last bit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

Int64 = NDArray[np.int64]

# A real x is stored as round(x * FIXED_POINT): sums of integers do not depend on their order.
FIXED_POINT = 2**24
# -log p reaches far beyond 1, so it gives up some of its places behind the point.
NLL_FIXED_POINT = 2**16


@dataclass(frozen=True, eq=False)
class Counts:
    """Sums over labelled pixels of any number of images, all int64.

    `confusion[C, C]`: pixels by (label, prediction). `class_bins[C, N, 3]`: for every class and
    bin of its score, (pixels, of them with this label, sum of scores * FIXED_POINT).
    `top1_bins[N, 3]`: for every bin of the highest score, (pixels, of them right, sum of scores *
    FIXED_POINT). `brier` is a sum * FIXED_POINT and `nll` one * NLL_FIXED_POINT. `pixels` are the
    labelled ones, `void` the others. Scalars are arrays of no dimension.
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
        """The counts of no image."""
        expected = shapes(num_classes, bins)
        return cls(**{name: np.zeros(shape, np.int64) for name, shape in expected.items()})

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, Int64]) -> Counts:
        """The inverse of `as_arrays`. Raises `ValueError` for wrong names, shapes or types."""
        if set(arrays) != set(NAMES):
            raise ValueError(f"counts are {', '.join(NAMES)}, not {', '.join(sorted(arrays))}")
        return cls(**{name: np.asarray(arrays[name]) for name in NAMES})

    def as_arrays(self) -> dict[str, Int64]:
        """The arrays by name, in the order of `NAMES`."""
        return {name: getattr(self, name) for name in NAMES}

    @property
    def num_classes(self) -> int:
        return len(self.confusion)

    @property
    def bins(self) -> int:
        return len(self.top1_bins)

    def __add__(self, other: Counts) -> Counts:
        """The counts of both. Raises `ValueError` if classes or bins differ in number."""
        if (self.num_classes, self.bins) != (other.num_classes, other.bins):
            raise ValueError(
                f"counts of {self.num_classes} classes and {self.bins} bins cannot be added to "
                f"those of {other.num_classes} classes and {other.bins} bins"
            )
        mine, others = self.as_arrays(), other.as_arrays()
        return Counts.from_arrays({name: mine[name] + others[name] for name in NAMES})

    def equals(self, other: Counts) -> bool:
        """True if every count is the same."""
        mine, others = self.as_arrays(), other.as_arrays()
        return all(np.array_equal(mine[name], others[name]) for name in NAMES)


NAMES = tuple(field.name for field in fields(Counts))


def shapes(num_classes: int, bins: int) -> dict[str, tuple[int, ...]]:
    """The shape of every array of `Counts`."""
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
