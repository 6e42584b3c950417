"""Compute a grid's table, a row for each (data set, model, loss), as CSV, Markdown and LaTeX."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import reduce
from operator import add

import numpy as np

from jobs.metrics.counts import Counts
from jobs.metrics.scores import ERRORS, SCORES, Summary, never_right, scores, summarise
from pipeline.scores.results_file import DatasetResults, Results

PAPER_SCORES = ("acc", "f1", "rec", "cal", "s_acc", "s_rec")
LABELS = {
    "acc": "Acc",
    "f1": "F1",
    "rec": "Rec",
    "cal": "Cal",
    "s_acc": "S_acc",
    "s_rec": "S_rec",
    "miou": "mIoU",
    "ece": "ECE",
    "cece": "cECE",
    "brier": "Brier",
    "nll": "NLL",
}
NAME_COLUMNS = ("dataset", "model", "loss")


@dataclass(frozen=True)
class Row:
    """One loss on one model and data set.

    `scores` are summaries over seeds by name, `counts` the sum over seeds. `never_right` gives the
    number of seeds for each present class that leaves F1 undefined with some seed. `each` and
    `by_seed` hold the counts and scores of each seed.
    """

    dataset: str
    model: str
    loss: str
    seeds: tuple[int, ...]
    scores: dict[str, Summary]
    never_right: Mapping[str, int]
    counts: Counts
    each: tuple[Counts, ...]
    by_seed: tuple[dict[str, float], ...]


def rows(results: Results) -> list[Row]:
    """Return all rows in grid order: data set, model, loss."""
    return [row for dataset in results.datasets for row in _dataset_rows(results, dataset)]


def blocks(table: Iterable[Row]) -> dict[tuple[str, str], list[Row]]:
    """Return the rows by (data set, model); those of one block differ only in their loss."""
    grouped: dict[tuple[str, str], list[Row]] = {}
    for row in table:
        grouped.setdefault((row.dataset, row.model), []).append(row)
    return grouped


def best(block: Iterable[Row], score: str) -> set[str]:
    """Return the names of the losses with the best mean of `score`.

    These are several if the means are exactly equal, and none if all are nan.
    """
    sign = -1 if score in ERRORS else 1
    means = {row.loss: sign * row.scores[score].mean for row in block}
    defined = [mean for mean in means.values() if not np.isnan(mean)]
    return {loss for loss, mean in means.items() if defined and mean == max(defined)}


def to_csv(table: Iterable[Row]) -> str:
    """Return the table as CSV: mean, standard deviation and number of defined seeds of each score.

    Numbers have full precision. The names in the column `never_right` are a line of CSV themselves,
    separated by semicolons.
    """
    parts = [f"{score}_{part}" for score in SCORES for part in ("mean", "std", "n")]
    lines = [_csv_line([*NAME_COLUMNS, "seeds", *parts, "never_right"])]
    for row in table:
        numbers = [value for score in SCORES for value in _csv_numbers(row.scores[score])]
        names = (row.dataset, row.model, row.loss)
        classes = _csv_line(row.never_right, ";")
        lines.append(_csv_line([*names, len(row.seeds), *numbers, classes]))
    return "".join(f"{line}\n" for line in lines)


def to_markdown(table: Iterable[Row]) -> str:
    """Return the table as Markdown, every score as mean ± standard deviation."""
    header = ["Data set", "Model", "Loss", "Seeds", *(LABELS[score] for score in SCORES)]
    lines = [header, ["---"] * 3 + ["---:"] * (1 + len(SCORES))]
    lines += [
        [*_names(row, markdown_escaped), str(len(row.seeds)), *_cells(row, SCORES, "±")]
        for row in table
    ]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def to_latex(table: Iterable[Row]) -> str:
    """Return the paper's six scores as a LaTeX `tabular`, the best of every block in bold.

    Use it with \\input in a document that loads booktabs.
    """
    columns = [re.sub(r"^S_(\w+)", r"$S_\\mathrm{\1}$", LABELS[score]) for score in PAPER_SCORES]
    header = ["Data set", "Model", "Loss", "Seeds", *columns]
    lines = [r"\begin{tabular}{lll" + "r" * (1 + len(columns)) + "}", r"\toprule"]
    lines.append(_latex_line(header))
    for block in blocks(table).values():
        lines.append(r"\midrule")
        champions = {score: best(block, score) for score in PAPER_SCORES}
        lines += [_latex_row(row, champions) for row in block]
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", ""])


def shown(summary: Summary, plus_minus: str = "±") -> str:
    """Return a score as text: `0.870 ± 0.012`, or `0.870` for one seed.

    The text is `nan (3 of 4)` if three of four seeds define the score.
    """
    if np.isnan(summary.mean):
        return f"nan ({summary.defined} of {summary.n})" if summary.defined else "nan"
    if np.isnan(summary.std):
        return f"{summary.mean:.3f}"
    return f"{summary.mean:.3f} {plus_minus} {summary.std:.3f}"


def latex_escaped(name: str) -> str:
    """Return `name` as LaTeX text that typesets as itself."""
    return "".join(_LATEX.get(character, character) for character in _flat(name))


def markdown_escaped(name: str) -> str:
    """Return `name` as Markdown text that reads as itself, also in a table."""
    return re.sub(r"([\\`*_{}\[\]<>()#+!|~&$])", r"\\\1", _flat(name))


_LATEX = {
    "\\": r"\textbackslash{}",
    "^": r"\textasciicircum{}",
    "~": r"\textasciitilde{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': r"{\char34}",  # a command in babel
    "'": r"\textquotesingle{}",
    "`": r"\textasciigrave{}",
    "-": "-{}",  # two hyphens would become a dash
    # at the start of a row they would be arguments of the \\ or \midrule before it
    **{character: f"{{{character}}}" for character in "[]*"},
    **{character: "\\" + character for character in "{}$&#%_"},
}


def _dataset_rows(results: Results, dataset: DatasetResults) -> list[Row]:
    seeds_of: dict[tuple[str, str], list[int]] = {}
    for index, cell in enumerate(dataset.cells):
        seeds_of.setdefault((cell["model"], cell["loss"]), []).append(index)
    models = list(dict.fromkeys(model for model, _ in seeds_of))
    losses = [loss["name"] for loss in results.record.get("losses", [])]
    losses += [loss for _, loss in seeds_of]
    return [
        _row(dataset, model, loss, seeds_of[model, loss])
        for model in models
        for loss in dict.fromkeys(losses)
        if (model, loss) in seeds_of
    ]


def _row(dataset: DatasetResults, model: str, loss: str, indices: list[int]) -> Row:
    each = tuple(dataset.counts_of(index) for index in indices)
    by_seed = [scores(counts) for counts in each]
    undefined = np.sum([never_right(counts) for counts in each], axis=0)  # seeds, [C]
    return Row(
        dataset=dataset.name,
        model=model,
        loss=loss,
        seeds=tuple(dataset.cells[index]["seed"] for index in indices),
        scores={name: summarise([of[name] for of in by_seed]) for name in SCORES},
        never_right={dataset.classes[c]: int(undefined[c]) for c in np.flatnonzero(undefined)},
        counts=reduce(add, each),
        each=each,
        by_seed=tuple(by_seed),
    )


def _csv_line(values: Iterable[object], delimiter: str = ",") -> str:
    file = io.StringIO()
    # the writer quotes a \r or \n in a name only if it is part of its own line end
    csv.writer(file, delimiter=delimiter, lineterminator="\r\n").writerow(values)
    return file.getvalue().removesuffix("\r\n")


def _csv_numbers(summary: Summary) -> tuple[str, str, int]:
    return repr(summary.mean), repr(summary.std), summary.defined


def _names(row: Row, escape: Callable[[str], str]) -> list[str]:
    return [escape(name) for name in (row.dataset, row.model, row.loss)]


def _cells(row: Row, names: Iterable[str], plus_minus: str) -> list[str]:
    return [shown(row.scores[name], plus_minus) for name in names]


def _latex_row(row: Row, champions: Mapping[str, set[str]]) -> str:
    cells = _cells(row, PAPER_SCORES, r"$\pm$")
    marked = [
        rf"\textbf{{{cell}}}" if row.loss in champions[score] else cell
        for score, cell in zip(PAPER_SCORES, cells, strict=True)
    ]
    return _latex_line([*_names(row, latex_escaped), str(len(row.seeds)), *marked])


def _latex_line(cells: Iterable[str]) -> str:
    return " & ".join(cells) + r" \\"


def _flat(name: str) -> str:
    # a line break would end the row
    return "".join(c if c.isprintable() else " " for c in name)
