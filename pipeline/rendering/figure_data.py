"""The numbers behind the figures, for every row of the table, also those that are not drawn."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from hpc.storage.atomic import write_text
from jobs.metrics.scores import class_recall, reliability
from pipeline.scores.results_file import Results
from pipeline.scores.score_table import NAME_COLUMNS, Row

Line = tuple[object, ...]


def write_figure_data(results: Results, table: Sequence[Row], folder: Path) -> None:
    """Write recall.csv, reliability.csv and confusion.csv: a line a number."""
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
    """Recall of every class [C], the mean over seeds; nan for a class without a labelled pixel."""
    return np.mean([class_recall(one) for one in row.each], axis=0)


def _recall(table: Iterable[Row], classes: Mapping[str, list[str]]) -> Iterator[Line]:
    for row in table:
        for name, value in zip(classes[row.dataset], mean_recall(row).tolist(), strict=True):
            yield row.dataset, row.model, row.loss, name, repr(value)


def _reliability(table: Iterable[Row]) -> Iterator[Line]:
    """Pooled over classes and seeds; a bin without a score has no line."""
    for row in table:
        score, frequency = reliability(row.counts.class_bins.sum(axis=0))
        for place in np.flatnonzero(~np.isnan(score)).tolist():
            numbers = (repr(float(score[place])), repr(float(frequency[place])))
            yield row.dataset, row.model, row.loss, place, *numbers


def _confusion(table: Iterable[Row], classes: Mapping[str, list[str]]) -> Iterator[Line]:
    """Pooled over seeds; pairs that never occur have no line."""
    for row in table:
        names = classes[row.dataset]
        for label, prediction in np.argwhere(row.counts.confusion).tolist():
            pixels = int(row.counts.confusion[label, prediction])
            yield row.dataset, row.model, row.loss, names[label], names[prediction], pixels
