"""How cost grows: a step with the cells of a bundle, packing and reading with workers, a reduction
with cells and ranks. Each becomes a plot with the ideal beside it.

    python -m benchmarks.growth [NAME ...] [--out DIR]

Writes DIR/growth-NAME.png and DIR/growth-NAME.json.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import matplotlib as mpl

from benchmarks import bundles, growth_data, reducing
from benchmarks.measure import chosen, write_record

mpl.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.ticker import LogLocator, StrMethodFormatter

Rounds = Mapping[int, Sequence[float]]  # seconds of each round, by what grows


@dataclass(frozen=True)
class Line:
    """Measured rounds, and what they would be if nothing but the work itself took time."""

    label: str
    rounds: Rounds
    ideal: Mapping[int, float]


@dataclass(frozen=True)
class Plot:
    title: str
    across: str
    lines: tuple[Line, ...]


def main(argv: Sequence[str]) -> int:
    """Measure and draw what is named, or all."""
    names, folder = chosen("python -m benchmarks.growth", __doc__, tuple(PLOTS), argv)
    for name in names:
        plot = PLOTS[name]()
        draw(plot, folder / f"growth-{name}.png")
        write_record(folder / f"growth-{name}.json", asdict(plot))
        print(f"\n{plot.title}\n\n{table(plot)}", flush=True)
    return 0


def bundle() -> Plot:
    """A step against cells: the backbone once, and each head as long as the first."""
    rounds = bundles.bundle_growth()
    backbone = median(rounds.pop(0))
    head = median(rounds[1]) - backbone
    ideal = {cells: backbone + cells * head for cells in rounds}
    return Plot("Seconds of a step", "cells in the bundle", (Line("a bundle", rounds, ideal),))


def packing() -> Plot:
    """Packing against worker processes."""
    return _shared("Seconds to pack a data set", "worker processes", growth_data.packing_growth())


def reading() -> Plot:
    """Reading and augmenting against loader processes."""
    return _shared("Seconds of reading", "loader processes", growth_data.reading_growth())


def reduction() -> Plot:
    """A reduction against cells, on several ranks."""
    found = reducing.reducing_growth()
    most = max(cells for _, cells in found)
    lines = []
    for ranks in sorted({ranks for ranks, _ in found}):
        rounds = {cells: seconds for (r, cells), seconds in found.items() if r == ranks}
        each = median(found[1, most]) / most / min(ranks, os.cpu_count() or 1)
        label = "1 rank" if ranks == 1 else f"{ranks} ranks"
        lines.append(Line(label, rounds, {cells: each * cells for cells in rounds}))
    return Plot("Seconds of a reduction", "cells", tuple(lines))


PLOTS: dict[str, Callable[[], Plot]] = {
    "bundle": bundle,
    "packing": packing,
    "reading": reading,
    "reduction": reduction,
}


def _shared(title: str, across: str, rounds: Rounds) -> Plot:
    """Work that processes share: ideally each of them takes an equal part, on a core of its own."""
    cores = os.cpu_count() or 1
    ideal = {workers: median(rounds[1]) / min(workers, cores) for workers in rounds}
    return Plot(title, across, (Line("measured", rounds, ideal),))


def draw(plot: Plot, path: Path) -> None:
    """Both axes logarithmic: the median of the rounds, from least to most, and the ideal dashed."""
    figure, axes = plt.subplots(figsize=(5, 3.5), layout="constrained")
    for number, line in enumerate(plot.lines):
        x, colour = list(line.rounds), f"C{number}"
        middle = [median(seconds) for seconds in line.rounds.values()]
        spread = [
            [m - min(seconds) for m, seconds in zip(middle, line.rounds.values(), strict=True)],
            [max(seconds) - m for m, seconds in zip(middle, line.rounds.values(), strict=True)],
        ]
        axes.errorbar(x, middle, spread, color=colour, marker="o", capsize=3, label=line.label)
        ideal = f"ideal of {line.label}" if len(plot.lines) > 1 else "ideal"
        axes.plot(x, list(line.ideal.values()), "--", color=colour, label=ideal)
    axes.set(title=plot.title, xlabel=plot.across, ylabel="seconds", xscale="log", yscale="log")
    ticks = sorted({x for line in plot.lines for x in line.rounds})
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.minorticks_off()
    lowest, highest = axes.get_ylim()
    axes.set_ylim(lowest / 1.4, highest * 1.4)  # so that two ticks are in sight
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def table(plot: Plot) -> str:
    """A Markdown table of medians, and in brackets of the ideal."""
    columns = sorted({x for line in plot.lines for x in line.rounds})
    rows = [
        [line.label, *(f"{median(line.rounds[x]):.3g} ({line.ideal[x]:.3g})" for x in columns)]
        for line in plot.lines
    ]
    head = [plot.across, *(f"{x:,}" for x in columns)]
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
