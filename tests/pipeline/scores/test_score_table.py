"""The table of a grid: one row for each loss, in grid order, the same in every format."""

import csv
import io
import shutil
import subprocess
from dataclasses import replace

import numpy as np
import pytest

from jobs.metrics.counts import NAMES, Counts
from jobs.metrics.scores import SCORES, scores
from pipeline.scores.results_file import DatasetResults, Results
from pipeline.scores.score_table import (
    best,
    blocks,
    latex_escaped,
    markdown_escaped,
    rows,
    shown,
    to_csv,
    to_latex,
    to_markdown,
)
from tests.pipeline.scores import simulated

NASTY = [
    "$(touch x)",
    "50% & more_of #1",
    r"\input{/etc/passwd}",
    'a|b`c"d',
    "x^2~{y}<z>",
    "a,b\nc",
    "[red] x--y",
    "*x'`",
]


@pytest.fixture(scope="module")
def results():
    return simulated.made_up_results(
        models=("deeplabv3_resnet101", "fcn_resnet101"), losses=("WDL", "CE"), seeds=(0, 1, 2)
    )


def by_hand(confusions, loss="CE"):
    """Results of one loss with a seed for each confusion matrix, of two classes."""
    arrays = [Counts.zeros(2, 10).as_arrays() for _ in confusions]
    for one, confusion in zip(arrays, confusions, strict=True):
        one.update(confusion=np.array(confusion, np.int64), pixels=np.array(np.sum(confusion)))
    counts = {name: np.stack([one[name] for one in arrays]) for name in NAMES}
    cells = [simulated.cell_record("d", "m", loss, seed) for seed in range(len(confusions))]
    pixels = np.array([5, 5])
    return Results("g", {}, [DatasetResults("d", ["a", "b"], pixels, pixels, cells, counts)])


def test_rows_come_in_grid_order_whatever_the_order_of_the_cells(results):
    data = results.datasets[0]
    order = [10, 4, 0, 7, 1, 2, 3, 5, 6, 8, 9, 11]
    shuffled = replace(
        data,
        cells=[data.cells[i] for i in order],
        counts={name: array[order] for name, array in data.counts.items()},
    )
    table = rows(replace(results, datasets=[shuffled]))
    assert [row.loss for row in table] == ["WDL", "CE", "WDL", "CE"]
    assert sorted(table[0].seeds) == [0, 1, 2]


def test_a_row_is_mean_and_deviation_over_its_seeds(results):
    row = rows(results)[1]
    each = [scores(results.datasets[0].counts_of(i))["s_rec"] for i in (3, 4, 5)]
    assert row.scores["s_rec"].mean == pytest.approx(np.mean(each))
    assert row.scores["s_rec"].std == pytest.approx(np.std(each, ddof=1))


def test_the_csv_reads_back_in_full_precision(results):
    table = rows(results)
    read = list(csv.DictReader(io.StringIO(to_csv(table))))
    assert len(read) == len(table)
    for line, row in zip(read, table, strict=True):
        assert (line["dataset"], line["model"], line["loss"]) == (row.dataset, row.model, row.loss)
        for score in SCORES:
            assert float(line[f"{score}_mean"]) == row.scores[score].mean
            assert int(line[f"{score}_n"]) == 3


def test_f1_is_nan_where_one_seed_never_predicts_a_class():
    table = rows(by_hand([[[3, 1], [1, 3]], [[4, 0], [4, 0]]]))
    assert shown(table[0].scores["f1"]) == "nan (1 of 2)"
    assert table[0].never_right == {"b": 1}  # the other seed finds it
    line = next(csv.DictReader(io.StringIO(to_csv(table))))
    assert (line["f1_mean"], line["f1_n"], line["rec_mean"]) == ("nan", "1", "0.625")


def test_a_class_that_is_predicted_but_never_right_leaves_f1_undefined_and_is_named():
    table = rows(by_hand([[[4, 0], [4, 0]], [[3, 1], [2, 0]]]))
    assert table[0].never_right == {"b": 2}
    assert shown(table[0].scores["f1"]) == "nan"


def test_the_best_is_the_highest_score_and_the_smallest_error(results):
    block = next(iter(blocks(rows(results)).values()))
    highest = max(block, key=lambda row: row.scores["acc"].mean).loss
    smallest = min(block, key=lambda row: row.scores["nll"].mean).loss
    assert best(block, "acc") == {highest}
    assert best(block, "nll") == {smallest}
    assert best(rows(by_hand([[[4, 0], [4, 0]]])), "f1") == set()


def test_one_seed_is_shown_without_a_deviation():
    assert shown(rows(by_hand([[[3, 1], [1, 3]]]))[0].scores["acc"]) == "0.750"


def test_markdown_has_one_line_a_row_and_escapes_names():
    table = rows(by_hand([[[3, 1], [1, 3]]], loss="a|b\n*c* <script>"))
    lines = to_markdown(table).splitlines()
    assert len(lines) == 3
    assert r"a\|b \*c\* \<script\>" in lines[2]
    assert markdown_escaped("fcn_resnet101") == r"fcn\_resnet101"


def test_latex_names_typeset_as_themselves():
    assert latex_escaped("50% & more_of #1") == r"50\% \& more\_of \#1"
    assert latex_escaped(r"\input{x}") == r"\textbackslash{}input\{x\}"
    assert latex_escaped("$(touch x)") == r"\$(touch x)"


def test_csv_keeps_nasty_names():
    for name in NASTY:
        read = list(csv.DictReader(io.StringIO(to_csv(rows(by_hand([[[3, 1], [1, 3]]], name))))))
        assert read[0]["loss"] == name


def has_booktabs():
    if shutil.which("pdflatex") is None or shutil.which("kpsewhich") is None:
        return False
    return subprocess.run(["kpsewhich", "booktabs.sty"], capture_output=True).returncode == 0


def compile_latex(table, folder):
    """Typeset a table as a paper would."""
    (folder / "table.tex").write_text(table, encoding="utf-8")
    (folder / "paper.tex").write_text(
        "\\documentclass{article}\\usepackage{booktabs}"
        "\\begin{document}\\input{table}\\end{document}\n"
    )
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "paper.tex"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout[-2000:]
    assert (folder / "paper.pdf").exists()


@pytest.mark.skipif(not has_booktabs(), reason="no pdflatex with booktabs here")
def test_the_latex_table_compiles(tmp_path):
    table = [
        replace(row, dataset=name)  # first in its row, after \\midrule or \\\\
        for name in NASTY
        for row in rows(by_hand([[[3, 1], [1, 3]]] * 2, name)) * 2
    ]
    compile_latex(to_latex(table), tmp_path)


def test_latex_is_balanced_and_marks_the_best(results):
    text = to_latex(rows(results))
    assert text.count("{") == text.count("}")
    assert text.count(r"\midrule") == 2
    assert text.count(r" \\") == 5
    assert r"\textbf{" in text
