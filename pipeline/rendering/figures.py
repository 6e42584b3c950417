"""Draw the report's figures: SVG for lines and points, PNG for matrices.

Each function returns the bytes of an image. Equal values give equal bytes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hpc.cli import one_line
from jobs.losses.grammar import Knot, term_weights
from jobs.metrics.scores import reliability
from pipeline.rendering.figure_data import mean_recall
from pipeline.rendering.figure_style import (
    BLUE,
    FAINT,
    INK,
    MUTED,
    ORANGE,
    STYLE,
    TERM_COLOURS,
    WIDTH,
    name_points,
    png,
    small_multiples,
    svg,
)
from pipeline.rendering.plotting import (
    Axes,
    Figure,
    FuncFormatter,
    Line2D,
    LogLocator,
    PercentFormatter,
    rc_context,
)
from pipeline.scores.results_file import DatasetResults
from pipeline.scores.score_table import Row

LARGEST_OVERVIEW = (60, 40)  # numbers of losses, and of data sets and models
LARGEST_LABELLED_MATRIX = 40  # number of classes above which tick labels overlap

Reals = NDArray[np.float64]


@rc_context(STYLE)
def class_frequencies(dataset: DatasetResults) -> bytes:
    """Draw each class's share of the labelled pixels, most frequent first, on a log axis."""
    order = frequency_order(dataset)
    height = np.arange(len(order))[::-1]
    figure = Figure(figsize=(WIDTH * 0.5, 0.9 + 0.23 * len(order)), layout="constrained")
    axes = figure.subplots()
    train = _shares(dataset.train_class_pixels)[order]
    val = _shares(dataset.val_class_pixels)[order]
    axes.set_xscale("log")
    axes.hlines(height, np.fmin(train, val), np.fmax(train, val), color=FAINT, linewidth=2.5)
    axes.plot(train, height, "o", color=BLUE, markersize=6, label="training")
    axes.plot(
        val, height, "o", color=ORANGE, markersize=6, markerfacecolor="white", label="validation"
    )
    axes.set_yticks(height, labels=[one_line(dataset.classes[label]) for label in order])
    axes.xaxis.set_major_locator(LogLocator(10))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:g}%"))
    axes.grid(axis="y", visible=False)
    axes.set_ylim(-0.7, len(order) - 0.3)
    axes.set_xlabel("share of labelled pixels")
    axes.legend(loc="lower right")
    return svg(figure)


@rc_context(STYLE)
def recall_heatmap(dataset: DatasetResults, block: Sequence[Row]) -> bytes:
    """Draw the recall of every class (columns) under every loss (rows), averaged over seeds.

    Classes are sorted by frequency; those without a labelled pixel are left out.
    """
    order = [label for label in frequency_order(dataset) if dataset.val_class_pixels[label] > 0]
    table = np.array([mean_recall(row)[order] for row in block])
    width = min(WIDTH * 1.5, max(WIDTH * 0.6, 2.2 + 0.46 * len(order)))
    figure = Figure(figsize=(width, 1.5 + 0.29 * len(block)), layout="constrained")
    axes = figure.subplots()
    classes = [dataset.classes[label] for label in order]
    _draw_heatmap(figure, axes, table, [row.loss for row in block], classes, "recall")
    return png(figure)


@rc_context(STYLE)
def overview(found: Mapping[tuple[str, str], Sequence[Row]]) -> bytes:
    """Draw S_rec of every loss (rows) on every data set and model (columns), averaged over seeds.

    At most `LARGEST_OVERVIEW` of each are drawn; see `overview_note`.
    """
    means = {
        (row.loss, key): row.scores["s_rec"].mean for key, rows in found.items() for row in rows
    }
    losses = _losses(found)[: LARGEST_OVERVIEW[0]]
    columns = list(found)[: LARGEST_OVERVIEW[1]]
    table = np.array([[means.get((loss, key), np.nan) for key in columns] for loss in losses])
    figure = Figure(
        figsize=(2.2 + 0.46 * len(columns), 2.6 + 0.24 * len(losses)), layout="constrained"
    )
    names = [" · ".join(key) for key in columns]
    _draw_heatmap(figure, figure.subplots(), table, losses, names, "S_rec")
    return png(figure)


def overview_note(found: Mapping[tuple[str, str], Sequence[Row]]) -> str:
    """Return the part of `found` that `overview` draws; "" if it draws all."""
    numbers = zip(
        LARGEST_OVERVIEW,
        (len(_losses(found)), len(found)),
        ("losses", "data sets and models"),
        strict=True,
    )
    parts = [f"{most} of {number} {what}" for most, number, what in numbers if number > most]
    return f"Drawn are the first {' and '.join(parts)}; table.csv has all." if parts else ""


def _losses(found: Mapping[tuple[str, str], Sequence[Row]]) -> list[str]:
    return list(dict.fromkeys(row.loss for rows in found.values() for row in rows))


@rc_context(STYLE)
def reliability_diagrams(block: Sequence[Row]) -> bytes:
    """Draw a reliability diagram for every loss, pooled over classes and seeds."""
    figure, panels = small_multiples(len(block), per_row=6, panel=(WIDTH / 6, WIDTH / 6 + 0.25))
    for axes, row in zip(panels, block, strict=True):
        score, frequency = reliability(row.counts.class_bins.sum(axis=0))
        filled = ~np.isnan(score)
        axes.plot([0, 1], [0, 1], color=MUTED, linewidth=0.8, linestyle=(0, (4, 3)))
        axes.vlines(score[filled], score[filled], frequency[filled], color=ORANGE, alpha=0.35, lw=3)
        axes.plot(score[filled], frequency[filled], "o-", color=BLUE, ms=3.5, lw=1.2, clip_on=False)
        axes.set_title(f"{one_line(row.loss)}\ncal {row.scores['cal'].mean:.3f}")
        axes.set(xlim=(0, 1), ylim=(0, 1), aspect="equal")
        axes.set_xticks([0, 0.5, 1], labels=["0", ".5", "1"])
        axes.set_yticks([0, 0.5, 1], labels=["0", ".5", "1"])
    figure.supxlabel("mean score of the bin", fontsize=9)
    figure.supylabel("frequency of being right", fontsize=9)
    return svg(figure)


@rc_context(STYLE)
def confusion_matrices(dataset: DatasetResults, block: Sequence[Row]) -> bytes:
    """Draw the confusion matrix of every loss, each row divided by its sum, pooled over seeds."""
    num_classes = len(dataset.classes)
    side = min(3.4, max(1.7, 0.5 + 0.11 * num_classes))
    per_row = max(1, int(WIDTH / side))
    figure, panels = small_multiples(len(block), per_row, (WIDTH / per_row, WIDTH / per_row + 0.1))
    # enlarge the figure for long names, which would take the room of the matrices
    longest = max(len(one_line(name)) for name in dataset.classes)
    room = max(0.0, 0.058 * longest - 0.9)
    width, height = figure.get_size_inches()
    figure.set_size_inches(width + room, height + room)
    for index, (axes, row) in enumerate(zip(panels, block, strict=True)):
        table = row.counts.confusion
        shares = table / np.maximum(table.sum(axis=1, keepdims=True), 1)
        image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, interpolation="none")
        axes.set_title(one_line(row.loss))
        axes.grid(False)
        axes.spines[:].set(visible=True, color=FAINT)
        axes.tick_params(length=0)
        below = index + per_row >= len(block)
        _label_classes(axes, dataset.classes, left=index % per_row == 0, below=below)
    bar = figure.colorbar(image, ax=panels, fraction=0.02, pad=0.01, shrink=0.6, aspect=30)
    bar.set_label("share of the label's pixels")
    bar.outline.set_visible(False)
    figure.supxlabel("prediction", fontsize=9)
    figure.supylabel("label", fontsize=9)
    return png(figure)


@rc_context(STYLE)
def loss_schedules(losses: Sequence[dict[str, Any]]) -> bytes:
    """Draw the weights of the terms of each scheduled loss over training; see `scheduled`.

    A loss with different schedules on different data sets has a panel for each schedule, with the
    names of its data sets.
    """
    figure, panels = small_multiples(len(losses), per_row=4, panel=(WIDTH / 4, 1.75))
    time = np.linspace(0, 1, 501)
    terms = list(dict.fromkeys(term for loss in losses for term in loss["terms"]))
    colours = {t: TERM_COLOURS[i % len(TERM_COLOURS)] for i, t in enumerate(terms)}
    for axes, loss, title in zip(panels, losses, _schedule_titles(losses), strict=True):
        weights = weights_over(loss["schedule"], time)
        for term, weight in zip(loss["terms"], weights.T, strict=True):
            axes.plot(time, weight, color=colours[term], linewidth=1.8)
        axes.set_title(title)
        axes.set_xlim(0, 1)
        axes.set_ylim(min(0.0, float(weights.min())) - 0.04, max(1.0, float(weights.max())) + 0.04)
        axes.xaxis.set_major_formatter(PercentFormatter(1))
        axes.set_xticks([0, 0.25, 0.5, 0.75, 1])
    handles = [Line2D([], [], color=colours[term], linewidth=1.8) for term in terms]
    figure.legend(handles, terms, loc="outside upper left", ncols=len(terms))
    figure.supxlabel("training done", fontsize=9)
    figure.supylabel("weight of the term", fontsize=9)
    return svg(figure)


def _schedule_titles(losses: Sequence[dict[str, Any]]) -> list[str]:
    names = Counter(loss["name"] for loss in losses)
    return [
        one_line(loss["name"])
        + (f"\n{one_line(', '.join(loss['datasets']))}" if names[loss["name"]] > 1 else "")
        for loss in losses
    ]


@rc_context(STYLE)
def trade_off(
    block: Sequence[Row], scheduled_losses: Sequence[str], named: Container[str] | None = None
) -> bytes:
    """Draw accuracy over recall, and cal over recall, with a point for each loss.

    Args:
        block: the rows of one data set and model; bars are one standard deviation over seeds.
        scheduled_losses: losses that get a colour of their own.
        named: losses whose name is written; None means all.
    """
    figure = Figure(figsize=(WIDTH, 4.4), layout="constrained")
    for axes, score, label in zip(
        figure.subplots(1, 2), ("acc", "cal"), ("accuracy", "cal"), strict=True
    ):
        drawn = [
            row for row in block if not np.isnan(row.scores[score].mean + row.scores["rec"].mean)
        ]
        for row in drawn:
            _draw_point(axes, row, score, ORANGE if row.loss in scheduled_losses else BLUE)
        axes.margins(0.12)
        axes.ticklabel_format(useOffset=False)  # show whole scores at the ticks
        axes.set(xlabel="class-averaged recall", ylabel=label)
        with_name = [row for row in drawn if named is None or row.loss in named]
        places = [(row.scores["rec"].mean, row.scores[score].mean) for row in with_name]
        name_points(figure, axes, [one_line(row.loss) for row in with_name], places)
    kinds = [("one loss or a sum", BLUE), ("scheduled", ORANGE)]
    handles = [Line2D([], [], color=c, marker="o", linestyle="") for _, c in kinds]
    figure.legend(handles, [name for name, _ in kinds], loc="outside upper left", ncols=2)
    return svg(figure)


def frequency_order(dataset: DatasetResults) -> list[int]:
    """Return the class indices from the most to the least frequent in training."""
    return [int(label) for label in np.argsort(-dataset.train_class_pixels, kind="stable")]


def scheduled(losses: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the recorded losses whose weights change during training."""
    return [
        loss
        for loss in losses
        if any(knot["weights"] != loss["schedule"][0]["weights"] for knot in loss["schedule"])
    ]


def weights_over(schedule: Sequence[dict[str, Any]], time: Reals) -> Reals:
    """Return the weights [T, terms] of a recorded schedule at the fractions `time` [T]."""
    knots = [Knot(knot["at"], tuple(knot["weights"]), knot["ramp"]) for knot in schedule]
    return np.array([term_weights(knots, position) for position in time])


def _shares(pixels: NDArray[np.int64]) -> Reals:
    # nan draws no point: a log axis has no 0
    return np.where(pixels > 0, pixels / max(1, int(pixels.sum())), np.nan)


def _write_values(axes: Axes, table: Reals) -> None:
    for (row, column), value in np.ndenumerate(table):
        text = f"{value:.2f}".removeprefix("0")
        colour = "white" if value > 0.55 else INK
        axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=7.5)


def _draw_heatmap(
    figure: Figure, axes: Axes, table: Reals, rows: Sequence[str], columns: Sequence[str], what: str
) -> None:
    image = axes.imshow(table, cmap="Blues", vmin=0, vmax=1, aspect="auto", interpolation="none")
    axes.set_yticks(range(len(rows)), labels=[one_line(name) for name in rows])
    axes.set_xticks(
        range(len(columns)),
        labels=[one_line(name) for name in columns],
        rotation=40,
        ha="left",
        rotation_mode="anchor",
    )
    axes.tick_params(top=True, labeltop=True, bottom=False, labelbottom=False, length=0)
    if len(columns) <= LARGEST_LABELLED_MATRIX:
        _write_values(axes, table)
    _as_tiles(axes, table.shape)
    figure.colorbar(image, ax=axes, label=what, fraction=0.03, pad=0.01).outline.set_visible(False)


def _as_tiles(axes: Axes, shape: tuple[int, ...]) -> None:
    axes.grid(False)
    axes.spines[:].set_visible(False)
    axes.set_xticks(np.arange(1, shape[1]) - 0.5, minor=True)
    axes.set_yticks(np.arange(1, shape[0]) - 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=1.5)
    axes.tick_params(which="minor", length=0, top=False, bottom=False, left=False)


def _label_classes(axes: Axes, classes: Sequence[str], left: bool, below: bool) -> None:
    places = range(len(classes)) if len(classes) <= LARGEST_LABELLED_MATRIX else []
    size = 5.5 if len(classes) > 14 else 7
    names = [one_line(classes[place]) for place in places]
    axes.set_xticks(places, labels=names, rotation=90, fontsize=size)
    axes.set_yticks(places, labels=names, fontsize=size)
    axes.tick_params(labelleft=left, labelbottom=below, pad=1)


def _draw_point(axes: Axes, row: Row, score: str, colour: str) -> None:
    x, y = row.scores["rec"], row.scores[score]
    spread = {"xerr": np.nan_to_num(x.std), "yerr": np.nan_to_num(y.std)}
    axes.errorbar(x.mean, y.mean, **spread, fmt="none", ecolor=colour, alpha=0.3, elinewidth=1.4)
    axes.plot(x.mean, y.mean, "o", color=colour, markersize=5.5, markeredgecolor="white")
