"""Import matplotlib with its default settings, whatever the shell or a matplotlibrc sets.

All other modules import matplotlib's names from here.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import chdir, contextmanager

__all__ = [
    "Axes", "Bbox", "BboxBase", "Figure", "FuncFormatter", "Line2D", "LogLocator",
    "PercentFormatter", "rc_context",
]  # fmt: skip


@contextmanager
def _as_shipped() -> Iterator[None]:
    """Hide all user settings while matplotlib is imported.

    On import it reads MPLBACKEND and the first matplotlibrc in the working directory, MATPLOTLIBRC
    and the user's folders.
    """
    environ = dict(os.environ)
    os.environ.pop("MPLBACKEND", None)
    os.environ["MATPLOTLIBRC"] = os.devnull
    # without a home directory it warns of a temporary folder
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    try:
        with chdir("/"):
            yield
    finally:
        for name in ("MPLBACKEND", "MATPLOTLIBRC"):
            os.environ.pop(name, None)
            os.environ.update({name: environ[name]} if name in environ else {})


with _as_shipped():
    from matplotlib import rc_context
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.ticker import FuncFormatter, LogLocator, PercentFormatter
    from matplotlib.transforms import Bbox, BboxBase
