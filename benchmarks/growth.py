"""Measure and plot how cost grows, beside the ideal.

A step grows with the cells of a bundle, packing and reading with processes, a reduction with cells
and ranks.

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

from benchmarks import bundles, growth_data, reducing
from benchmarks.machine import write_record
from benchmarks.measure import parse_names
from pipeline.rendering.plotting import Figure, FuncFormatter, LogLocator

Rounds = Mapping[int, Sequence[float]]  # seconds of each round, by the number on the x axis


@dataclass(frozen=True)
class Line:
    """Measured rounds, and the seconds without any overhead."""

    label: str
    rounds: Rounds
    ideal: Mapping[int, float]


@dataclass(frozen=True)
class Plot:
    """Lines over one x axis, whose label is `across`."""

    title: str
    across: str
    lines: tuple[Line, ...]


def main(argv: Sequence[str]) -> int:
    """Measure and draw the named plots, or all."""
    names, folder = parse_names("python -m benchmarks.growth", __doc__, tuple(PLOTS), argv)
    for name in names:
        plot = PLOTS[name]()
        draw(plot, folder / f"growth-{name}.png")
        write_record(folder / f"growth-{name}.json", asdict(plot))
        print(f"\n{plot.title}\n\n{table(plot)}", flush=True)
    return 0


def bundle() -> Plot:
    """Plot a step over cells; ideally the backbone runs once and each head costs as much."""
    rounds = bundles.bundle_growth()
    backbone = median(rounds.pop(0))
    head = median(rounds[1]) - backbone
    ideal = {cells: backbone + cells * head for cells in rounds}
    return Plot("Seconds of a step", "cells in the bundle", (Line("a bundle", rounds, ideal),))


def packing() -> Plot:
    """Plot packing over worker processes."""
    return _shared("Seconds to pack a data set", "worker processes", growth_data.packing_growth())


def reading() -> Plot:
    """Plot reading and augmenting over loader processes."""
    return _shared("Seconds of reading", "loader processes", growth_data.reading_growth())


def reduction() -> Plot:
    """Plot a reduction over cells, a line for each number of ranks."""
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
    """Plot work that processes share; ideally each has an equal part and its own core."""
    cores = os.cpu_count() or 1
    ideal = {workers: median(rounds[1]) / min(workers, cores) for workers in rounds}
    return Plot(title, across, (Line("measured", rounds, ideal),))


def draw(plot: Plot, path: Path) -> None:
    """Write the plot as PNG: log axes, median and range of the rounds, the ideal dashed."""
    figure = Figure(figsize=(5, 3.5), layout="constrained")
    axes = figure.subplots()
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
    axes.set_ylim(lowest / 1.4, highest * 1.4)  # shows two ticks at least
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda seconds, _: f"{seconds:g}"))
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=110)


def table(plot: Plot) -> str:
    """Return a Markdown table of medians, with the ideal in brackets."""
    columns = sorted({x for line in plot.lines for x in line.rounds})
    rows = [
        [line.label, *(f"{median(line.rounds[x]):.3g} ({line.ideal[x]:.3g})" for x in columns)]
        for line in plot.lines
    ]
    head = [plot.across, *(f"{x:,}" for x in columns)]
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
