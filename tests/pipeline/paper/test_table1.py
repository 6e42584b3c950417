"""The layout of the paper's Table 1: for the paper's own figures and for others."""

import csv
import io
import math
import re
import shutil
import subprocess
from dataclasses import replace
from statistics import fmean

import pytest

from jobs.metrics.scores import Summary, scores
from pipeline.paper.reference import Difference, paper_table
from pipeline.paper.table1 import difference_table, means, table1, to_csv, to_latex, to_markdown
from pipeline.scores.score_table import PAPER_SCORES, rows
from tests.pipeline.scores import simulated

FCN, DEEPLAB = "fcn_resnet101", "deeplabv3_resnet101"
NASTY = ["$(touch x)", "50% & more_of #1", r"\input{/etc/passwd}", 'a|b`c"d', "x^2~{y}<z>", "a\nb"]


def marked(layout):
    """{(model, data set): losses whose S_rec is marked}."""
    return {
        (model, dataset): {
            line.loss for line in lines if line.cells[index] and line.cells[index][5].best
        }
        for model, lines in layout.blocks
        for index, dataset in enumerate(layout.datasets)
    }


def difference(loss="DLCE", score="acc", ours=0.5, paper=0.4, **flags):
    flags = {"doubtful": False, "unweighted": False, **flags}
    summary = Summary(ours, math.nan, 1, 1)
    return Difference("d", FCN, loss, "voc", loss, score, summary, paper, **flags)


def test_the_papers_figures_come_out_as_the_paper_has_them():
    written = list(csv.DictReader(io.StringIO(to_csv(table1(paper_table())))))
    read = {
        (line["dataset"], line["model"], line["loss"]): [line[score] for score in PAPER_SCORES]
        for line in written
    }
    assert list(read) == list(paper_table())  # the paper's order too
    for key, row in paper_table().items():
        assert read[key] == ["nan" if math.isnan(row[s]) else f"{row[s]:.2f}" for s in PAPER_SCORES]


def test_models_are_blocks_and_a_loss_that_was_not_trained_leaves_its_place_empty():
    layout = table1(paper_table())
    assert layout.datasets == ("voc", "sbd", "cityscapes")
    assert [(model, len(lines)) for model, lines in layout.blocks] == [(FCN, 17), (DEEPLAB, 17)]
    pre_fine = layout.blocks[0][1][0]
    assert pre_fine.loss == "pre-fine"
    assert [cell is None for cell in pre_fine.cells] == [False, False, True]


def test_the_best_s_rec_after_pre_fine_is_marked_for_each_data_set_and_model():
    by_hand = {
        (FCN, "voc"): {"WDLNWCE"},
        (FCN, "sbd"): {"DLWCE", "WDLWCE"},
        (FCN, "cityscapes"): {"DLAWCE"},
        (DEEPLAB, "voc"): {"WDLWCE", "DLNCE", "WDLNCE"},
        (DEEPLAB, "sbd"): {"WDLNCE", "WDLACE"},
        (DEEPLAB, "cityscapes"): {"DLWCE", "DLNWCE", "DLAWCE", "WDLNWCE"},
    }
    assert marked(table1(paper_table())) == by_hand


def test_nothing_is_marked_where_no_s_rec_is_defined():
    undefined = {k: {**row, "s_rec": math.nan} for k, row in paper_table().items()}
    assert set().union(*marked(table1(undefined)).values()) == set()


def test_results_are_laid_out_by_their_means_over_seeds():
    results = simulated.made_up_results(losses=("CE", "DLNWCE"), seeds=(0, 1))
    table = rows(results)
    layout = table1(means(table))
    ((_, lines),) = layout.blocks
    for line, row in zip(lines, table, strict=True):
        by_seed = [[scores(counts)[name] for counts in row.each] for name in PAPER_SCORES]
        assert [value.text for value in line.cells[0]] == [f"{fmean(of):.2f}" for of in by_seed]


def test_markdown_is_a_table_a_model_with_equal_columns():
    text = to_markdown(table1(paper_table()))
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len(lines) == 2 * (2 + 17)
    assert {line.count("|") for line in lines} == {1 + 1 + 18}
    assert "**0.85**" in next(line for line in lines if line.startswith("| WDLNWCE"))
    assert "| nan |" in text


def test_a_difference_has_its_sign_and_what_is_undefined_is_said():
    pairs = dict.fromkeys(PAPER_SCORES, (0.5, 0.4)) | {
        "f1": (math.nan, math.nan), "rec": (math.nan, 0.4), "cal": (0.4, 0.5),
        "s_acc": (0.5, 0.501), "s_rec": (0.5, 0.1),
    }  # fmt: skip
    layout = difference_table(
        difference(score=s, ours=a, paper=b, doubtful=s == "s_rec") for s, (a, b) in pairs.items()
    )
    ((_, (line,)),) = layout.blocks
    texts = [value.text for value in line.cells[0]]
    assert texts == ["+0.10", "=", "nan/0.40", "-0.10", "+0.00", "+0.40"]
    assert [value.notes for value in line.cells[0]] == ["", "", "c", "", "", "a"]
    assert list(layout.footnotes) == ["a", "c"]


def test_a_footnote_that_goes_for_a_row_stands_at_its_loss():
    six = [difference("WCE", score, unweighted=True) for score in PAPER_SCORES]
    layout = difference_table(six)
    ((_, (line,)),) = layout.blocks
    assert (line.notes, line.cells[0][0].notes, list(layout.footnotes)) == ("b", "", ["b"])
    assert "| WCE<sup>b</sup> |" in to_markdown(layout)
    assert "WCE$^{b}$ &" in to_latex(layout)


def compiled(folder, text, body=r"\input{table1}"):
    """Return the output and exit status of pdflatex for a document that loads only graphicx."""
    (folder / "table1.tex").write_text(text, encoding="utf-8")
    (folder / "paper.tex").write_text(
        "\\documentclass{article}\\usepackage{graphicx}"
        f"\\begin{{document}}{body}\\end{{document}}\n"
    )
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "paper.tex"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60)
    return done.stdout, done.returncode


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="no pdflatex here")
def test_the_papers_table_compiles_and_fits_the_page(tmp_path):
    output, status = compiled(tmp_path, to_latex(table1(paper_table())))
    assert status == 0, output[-2000:]
    assert "Overfull" not in output
    assert "(1 page" in output


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="no pdflatex here")
def test_a_table_is_shrunk_to_the_line_and_never_blown_up(tmp_path):
    measured = r"\setbox1\hbox{\input{table1}}\typeout{WIDTH \the\wd1 OF \the\linewidth}"
    one = {key: row for key, row in paper_table().items() if key[0] == "voc"}
    shares = []
    for figures in (paper_table(), one):
        output, _ = compiled(tmp_path, to_latex(table1(figures)), measured)
        width, line = (float(of) for of in re.findall(r"([\d.]+)pt", output.split("WIDTH")[1])[:2])
        shares.append(width / line)
    assert shares[0] == pytest.approx(1, abs=1e-3)
    assert shares[1] < 0.8


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="no pdflatex here")
def test_nasty_names_and_footnotes_compile(tmp_path):
    flags = [{"doubtful": True}, {"unweighted": True}, {"ours": math.nan}] * 2
    made = [
        replace(difference(name, score, **flag), dataset=name, model=name)
        for name, flag in zip(NASTY, flags, strict=True)
        for score in PAPER_SCORES
    ]
    output, status = compiled(tmp_path, to_latex(difference_table(made)))
    assert status == 0, output[-2000:]
