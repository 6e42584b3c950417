"""Choose the rows that a page draws, and write the numbers behind the figures of all rows.

A page draws all rows of a grid of usual size. Of a larger grid it draws some, beside an overview;
the files hold the rest. This module loads no matplotlib, so that the terminal can use it.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hpc.storage.atomic import write_text
from jobs.metrics.scores import class_recall, reliability
from pipeline.scores.paired_comparison import REFERENCE
from pipeline.scores.results_file import Results
from pipeline.scores.score_table import NAME_COLUMNS, Row, blocks

MOST_ROWS = 150  # a table of at most this many rows is drawn whole; the paper's grid has 102
MOST_BLOCKS = 6  # drawn of a larger table
MOST_LOSSES = 6  # drawn of each of these blocks

Line = tuple[object, ...]
Blocks = dict[tuple[str, str], list[Row]]


@dataclass(frozen=True)
class Selection:
    """The drawn rows by data set and model; `left_out` describes the others, "" if none."""

    drawn: Blocks
    left_out: str

    @property
    def losses(self) -> set[str]:
        """Return the names of all losses that are drawn for some data set and model."""
        return {row.loss for block in self.drawn.values() for row in block}


def select(table: Sequence[Row]) -> Selection:
    """Select the rows to draw: all, or a part of a table of more than `MOST_ROWS` rows.

    The part has one model of each data set first, then further models; for each the reference and
    the losses with the best S_rec.
    """
    found = blocks(table)
    if len(table) <= MOST_ROWS:
        return Selection(found, "")
    firsts = {dataset: (dataset, model) for dataset, model in reversed(found)}
    order = [*reversed(firsts.values()), *(key for key in found if key not in firsts.values())]
    chosen = order[:MOST_BLOCKS]
    drawn = {key: _best(block) for key, block in found.items() if key in chosen}
    return Selection(
        drawn,
        f"Drawn are {len(drawn)} of {len(found)} data sets and models, and of each "
        f"{REFERENCE} and the losses with the best S_rec, {MOST_LOSSES} together; the same numbers "
        f"of all {len(table)} rows are in recall.csv, reliability.csv and confusion.csv.",
    )


def _best(block: Sequence[Row]) -> list[Row]:
    chosen = {row.loss for row in sorted(block, key=_rank)[:MOST_LOSSES]}
    return [row for row in block if row.loss in chosen]


def _rank(row: Row) -> tuple[bool, float]:
    mean = row.scores["s_rec"].mean
    return row.loss != REFERENCE, math.inf if math.isnan(mean) else -mean


def write_figure_data(results: Results, table: Sequence[Row], folder: Path) -> None:
    """Write recall.csv, reliability.csv and confusion.csv, a line for each number of all rows."""
    classes = {dataset.name: dataset.classes for dataset in results.datasets}
    for name, columns, lines in (
        ("recall", ("class", "recall"), _recall(table, classes)),
        ("reliability", ("bin", "score", "frequency"), _reliability(table)),
        ("confusion", ("label", "prediction", "pixels"), _confusion(table, classes)),
    ):
        file = io.StringIO()
        writer = csv.writer(file, lineterminator="\r\n")
        writer.writerow([*NAME_COLUMNS, *columns])
        writer.writerows(lines)
        write_text(folder / f"{name}.csv", file.getvalue())


def mean_recall(row: Row) -> np.ndarray:
    """Return the recall of every class [C], averaged over seeds; nan without a labelled pixel."""
    return np.mean([class_recall(one) for one in row.each], axis=0)


def _recall(table: Iterable[Row], classes: Mapping[str, list[str]]) -> Iterator[Line]:
    for row in table:
        for name, value in zip(classes[row.dataset], mean_recall(row).tolist(), strict=True):
            yield row.dataset, row.model, row.loss, name, repr(value)


def _reliability(table: Iterable[Row]) -> Iterator[Line]:
    """Pool classes and seeds, and leave out bins without a score."""
    for row in table:
        score, frequency = reliability(row.counts.class_bins.sum(axis=0))
        for place in np.flatnonzero(~np.isnan(score)).tolist():
            numbers = (repr(float(score[place])), repr(float(frequency[place])))
            yield row.dataset, row.model, row.loss, place, *numbers


def _confusion(table: Iterable[Row], classes: Mapping[str, list[str]]) -> Iterator[Line]:
    """Pool seeds, and leave out pairs that never occur."""
    for row in table:
        names = classes[row.dataset]
        for label, prediction in np.argwhere(row.counts.confusion).tolist():
            pixels = int(row.counts.confusion[label, prediction])
            yield row.dataset, row.model, row.loss, names[label], names[prediction], pixels
