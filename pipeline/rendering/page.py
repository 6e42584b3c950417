"""Fill the page of a report with plain values; `templates/report.html` defines its look."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from jobs.metrics.scores import ERRORS, SCORES, Summary
from pipeline.scores import paired_comparison
from pipeline.scores.evidence import Evidence
from pipeline.scores.results_file import DatasetResults, Results
from pipeline.scores.score_table import LABELS, Row, best, blocks, shown

_NUM_CELLS = re.compile(r'<meta name="lossgrid-cells" content="([0-9]{1,9})">')
_HEAD = 4096  # the number of a page's first characters, which hold `_NUM_CELLS`


@dataclass(frozen=True)
class Drawn:
    """An image as a data URI; the title names its data set and model.

    `width` is in pixels of the page; None means the width of the image.
    """

    title: str
    source: str
    width: int | None = None


@dataclass(frozen=True)
class Section:
    """The figures of a topic, whose heading and explanation stand in the template.

    `note` describes the rows that are not drawn.
    """

    topic: str
    figures: list[Drawn]
    note: str = ""


@dataclass(frozen=True)
class Note:
    """A remark for the reader, and the cells that it concerns; without names it concerns all."""

    text: str
    cells: list[str]


@dataclass(frozen=True)
class ScoreCell:
    """One number of the main table."""

    mean: str
    spread: str
    best: bool


@dataclass(frozen=True)
class TableRow:
    """One line of the main table."""

    loss: str
    seeds: int
    champion: bool  # True if its S_rec is the best of its block
    scores: list[ScoreCell]
    never_right: tuple[str, ...]


@dataclass(frozen=True)
class Block:
    """The lines of one data set and model."""

    dataset: str
    model: str
    rows: list[TableRow]


def cells_of(results: Results) -> int:
    """Return the number of finished cells in the results."""
    return sum(len(dataset.cells) for dataset in results.datasets)


def num_cells(page: Path) -> int:
    """Return the number of cells on a page of `render`; 0 if the file is missing or unknown."""
    try:
        with page.open(encoding="utf-8", errors="replace") as file:
            found = _NUM_CELLS.search(file.read(_HEAD))
    except OSError:
        return 0
    return int(found[1]) if found else 0


def render(
    results: Results,
    table: Sequence[Row],
    evidence: Evidence,
    sections: Sequence[Section],
    paper_html: str = "",
    paper_headings: Mapping[str, str] = MappingProxyType({}),
) -> str:
    """Return the page as HTML.

    Args:
        results: all finished cells of a grid.
        table: all rows of `results`.
        evidence: the scores of `table`.
        sections: the figures.
        paper_html: the HTML of the paper's section, in which every name is escaped.
        paper_headings: the headings of that section by HTML id.
    """
    groups = paired_comparison.groups(evidence)
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html").render(
        grid=results.grid,
        num_cells=cells_of(results),
        missing=results.record.get("missing", []),
        notes=notes(results),
        datasets=[_dataset_facts(dataset) for dataset in results.datasets],
        models=_distinct(row.model for row in table),
        losses=_distinct(row.loss for row in table),
        seeds=sorted({seed for row in table for seed in row.seeds}),
        protocol=list(flattened(results.record.get("protocol", {}))),
        commit=results.record.get("commit", ""),
        columns=[(LABELS[score], score in ERRORS) for score in SCORES],
        blocks=[_block(*key, block) for key, block in blocks(table).items()],
        winners=[winner for block in blocks(table).values() for winner in winners(block)],
        any_never_right=any(row.never_right for row in table),
        sections=sections,
        bins=_bins(results),
        paper_html=paper_html,
        paper_headings=paper_headings,
        groups=groups,
        across=paired_comparison.across(groups),
        compared_labels=[LABELS[score] for score in paired_comparison.COMPARED],
        shown_pair=paired_comparison.shown,
    )


def notes(results: Results) -> list[Note]:
    """Return the notes of the record, then those of cells, each once with all its cells."""
    carriers: dict[str, list[str]] = {}
    for dataset in results.datasets:
        for cell in dataset.cells:
            for text in cell["notes"]:
                carriers.setdefault(text, []).append(cell["name"])
    general = [Note(text, []) for text in results.record.get("notes", [])]
    return general + [Note(text, cells) for text, cells in carriers.items()]


def flattened(table: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield the values of a nested table as (dotted key, value as JSON)."""
    for key, value in table.items():
        if isinstance(value, dict):
            yield from flattened(value, f"{prefix}{key}.")
        else:
            shown_value = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            yield prefix + key, shown_value


def _dataset_facts(dataset: DatasetResults) -> dict[str, Any]:
    images = dataset.counts["images"]
    return {
        "name": dataset.name,
        "classes": dataset.classes,
        "train_pixels": int(dataset.train_class_pixels.sum()),
        "val_pixels": int(dataset.val_class_pixels.sum()),
        "val_images": int(images[0]) if len(images) else 0,
        "absent": _absent(dataset.classes, dataset.val_class_pixels),
        "unseen": _absent(dataset.classes, dataset.train_class_pixels),
        "cells": len(dataset.cells),
        "backbones": sorted({cell["backbone"][:12] for cell in dataset.cells if cell["backbone"]}),
    }


def _absent(classes: Sequence[str], class_pixels: np.ndarray) -> list[str]:
    return [classes[int(c)] for c in np.flatnonzero(class_pixels == 0)]


def _block(dataset: str, model: str, block: Sequence[Row]) -> Block:
    champions = {score: best(block, score) for score in SCORES}
    lines = [
        TableRow(
            loss=row.loss,
            seeds=len(row.seeds),
            champion=row.loss in champions["s_rec"],
            scores=[score_cell(row.scores[s], row.loss in champions[s]) for s in SCORES],
            never_right=tuple(
                name if seeds == len(row.seeds) else f"{name} ({seeds} of {len(row.seeds)})"
                for name, seeds in row.never_right.items()
            ),
        )
        for row in block
    ]
    return Block(dataset, model, lines)


def score_cell(summary: Summary, is_best: bool) -> ScoreCell:
    """Return a score as the main table shows it, such as `0.844` and `±.002`."""
    if np.isnan(summary.mean):
        return ScoreCell("nan", f"{summary.defined} of {summary.n}", False)
    spread = "" if np.isnan(summary.std) else "±" + f"{summary.std:.3f}".removeprefix("0")
    return ScoreCell(f"{summary.mean:.3f}", spread, is_best)


def winners(block: Sequence[Row]) -> list[dict[str, str]]:
    """Return the rows of a block with the best S_rec, as texts."""
    champions = best(block, "s_rec")
    return [
        {
            "dataset": row.dataset,
            "model": row.model,
            "loss": row.loss,
            "s_rec": shown(row.scores["s_rec"]),
        }
        for row in block
        if row.loss in champions
    ]


def _bins(results: Results) -> int:
    return results.datasets[0].counts["top1_bins"].shape[1] if results.datasets else 0


def _distinct(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))
