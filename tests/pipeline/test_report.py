"""The report: tables, and one self-contained page."""

import base64
import csv
import io
import json
import os
import re
import shutil
import xml.etree.ElementTree as ET
from dataclasses import replace
from html import unescape
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from hpc.cli import UserError
from jobs.metrics.scores import Summary
from pipeline.paper.section import paper_section
from pipeline.rendering import figures
from pipeline.rendering.page import render, score_cell
from pipeline.rendering.terminal import printed_table
from pipeline.report import main, sections, write_report
from pipeline.scores import score_table
from pipeline.scores.evidence import evidence
from pipeline.scores.paired_comparison import comparisons, to_csv
from pipeline.scores.score_table import rows
from tests.pipeline.grids import grid_file
from tests.pipeline.scores import simulated

SCRIPT = "<script>alert(1)</script>"


class Page(HTMLParser):
    """The tags and the visible text of a page."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def results():
    made_up = simulated.made_up_results(
        grid="$(touch x)",
        classes=[SCRIPT, *simulated.CLASSES[1:]],
        missing=["camvid/fcn_resnet101/WDLNWCE/2"],
        notes=["The backbone was pre-trained here"],
    )
    made_up.datasets[0].cells[1]["notes"].append("mixed provenance")
    return made_up


def report_of(results, folder):
    return write_report(results, rows(results), folder)


@pytest.fixture(scope="module")
def report(tmp_path_factory, results):
    folder = tmp_path_factory.mktemp("$(touch x)")
    return report_of(results, folder / "report")


@pytest.fixture(scope="module")
def page(report):
    return Page(report.page.read_text(encoding="utf-8"))


def test_the_page_asks_for_nothing_outside_itself(page):
    sources = [v for _, attrs in page.tags for k, v in attrs.items() if k in ("src", "href")]
    assert sources
    assert all(source.startswith(("data:image/", "#")) for source in sources)
    assert "link" not in dict(page.tags)


def test_names_are_text_and_never_markup(page):
    assert "script" not in dict(page.tags)
    assert SCRIPT in page.text  # in the list of classes, as text
    assert "$(touch x)" in page.text


def test_missing_cells_and_notes_are_named(page):
    assert "1 cell missing." in page.text
    assert "camvid/fcn_resnet101/WDLNWCE/2" in page.text
    assert "The backbone was pre-trained here" in page.text
    assert "mixed provenance (1 cell)" in page.text
    assert "camvid/fcn_resnet101/WCE/1" in page.text


def test_the_page_says_what_was_compared_and_defines_its_scores(page):
    text = re.sub(r"\s+", " ", page.text)
    assert "2 losses compared on 1 data set and 1 model with 2 seeds: 4 trained cells." in text
    assert "pretrain.epochs" in text
    assert "over N = 10 equal bins" in text
    assert "★ best Srec" in text


def test_the_page_sets_the_results_beside_the_paper(page):
    text = re.sub(r"\s+", " ", page.text)
    headings = ["As the paper's Table 1", "Difference to the paper",
                "The paper's claims on these results", "Losses compared over seeds"]  # fmt: skip
    assert all(heading in text for heading in headings)
    assert "camvid: not comparable, its 11 classes are those of none" in text
    assert "? FL and CEMP have the worst calibration. cannot be judged" in text
    assert "missing: camvid/fcn_resnet101/FL; camvid/fcn_resnet101/CEMP" in text
    assert "Without CE in the grid" in text
    (against,) = re.findall(r"camvid · fcn_resnet101, minus (\w+)", text)
    assert against in ("WCE", "WDLNWCE")


def analysed(results, folder):
    """Write the files of a report; return its page without figures, which are slow."""
    table = rows(results)
    seen = evidence(results, table)
    paper = paper_section(results, table, seen)
    for name, text in paper.files.items():
        (folder / name).write_text(text, encoding="utf-8")
    (folder / "comparisons.csv").write_text(to_csv(comparisons(seen)), encoding="utf-8")
    return Page(render(results, table, seen, [], paper.html, paper.headings))


def test_the_page_says_where_a_claim_holds_and_by_how_much(tmp_path):
    losses = ("CE", "DLCE", "DLNCE", "DLACE", "DLNWCE", "DLAWCE", "pre-fine")
    shown = analysed(simulated.made_up_results(losses=losses, seeds=(0, 1)), tmp_path)
    text = re.sub(r"\s+", " ", shown.text)
    for claim in json.loads((tmp_path / "claims.json").read_text(encoding="utf-8")):
        assert f"{claim['sentence']} {claim['verdict']}" in text
        for finding in claim["findings"]:
            assert all(line in text for line in finding["text"])
    assert "camvid · fcn_resnet101, minus CE" in text
    with (tmp_path / "comparisons.csv").open(encoding="utf-8") as file:
        pairs = {(line["loss"], line["against"]) for line in csv.DictReader(file)}
    assert len(pairs) == 7 * 6 / 2


def test_names_in_the_comparison_with_the_paper_are_text(results, tmp_path):
    data = results.datasets[0]
    cells = [{**cell, "model": SCRIPT} for cell in data.cells]
    shown = analysed(replace(results, datasets=[replace(data, cells=cells)]), tmp_path)
    assert "script" not in dict(shown.tags)
    assert f"missing: camvid/{SCRIPT}/FL" in shown.text
    for name in ("claims.md", "table1.md"):
        text = (tmp_path / name).read_text(encoding="utf-8")
        assert r"\<script\>" in text
        assert not re.search(r"(?<!\\)<script", text)


def test_every_link_inside_the_page_leads_somewhere(page):
    ids = {attrs["id"] for _, attrs in page.tags if "id" in attrs}
    assert {a["href"][1:] for tag, a in page.tags if tag == "a"} <= ids


def test_every_figure_has_words_for_those_who_cannot_see_it(page):
    images = [attrs for tag, attrs in page.tags if tag == "img"]
    assert len(images) == 6
    assert all(attrs["alt"] for attrs in images)


def test_the_same_results_give_the_same_report(report, results, tmp_path):
    again = report_of(results, tmp_path)
    for name in ("csv", "markdown", "latex", "page"):
        assert getattr(again, name).read_bytes() == getattr(report, name).read_bytes()


@pytest.fixture
def nothing(results):
    """Results of which no cell is done yet."""
    data = results.datasets[0]
    empty = {name: array[:0] for name, array in data.counts.items()}
    return replace(results, datasets=[replace(data, cells=[], counts=empty)])


def test_a_grid_of_which_nothing_is_done_has_a_page_too(nothing, tmp_path):
    paths = report_of(nothing, tmp_path)
    assert "No cell is done yet." in paths.page.read_text(encoding="utf-8")


def test_a_report_of_more_cells_is_not_replaced(report, nothing, tmp_path, capsys):
    grid = grid_file(tmp_path)
    folder = shutil.copytree(report.page.parent, tmp_path / "run/report")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    simulated.write_results(tmp_path / "run/results.h5", nothing)
    with pytest.raises(UserError, match=r"index\.html has 4 finished cells, but would now have 0,"):
        main([str(grid)])
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    main([str(grid), "--allow-fewer"])
    assert "no cell is finished" in capsys.readouterr().out
    assert "No cell is done yet." in (folder / "index.html").read_text(encoding="utf-8")


def test_a_report_that_fails_leaves_the_one_before_whole(report, results, tmp_path, monkeypatch):
    folder = shutil.copytree(report.page.parent, tmp_path / "report")
    (folder / "table.csv").write_text("a table of another day")
    monkeypatch.setattr(figures, "class_frequencies", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        report_of(results, folder)
    assert (folder / "table.csv").read_text() == "a table of another day"
    assert not list(folder.glob(".*"))


def test_a_report_warns_of_counts_that_its_results_lack(results, tmp_path, capsys):
    grid, counts = grid_file(tmp_path), tmp_path / "run/counts"
    counts.mkdir(parents=True)
    simulated.write_results(tmp_path / "run/results.h5", results)
    reduced = (tmp_path / "run/results.h5").stat().st_mtime
    for name, age in (("a-g1", 5), ("b-g1", -5)):
        (counts / f"{name}.json").touch()
        os.utime(counts / f"{name}.json", (0, reduced - age))
    main([str(grid)])
    said = capsys.readouterr().out
    assert "results.h5 is older than 1 counts files, so the report lacks them" in said
    assert f"run `python -m pipeline.reduce {grid}`" in said


def test_without_results_the_report_says_what_to_do(tmp_path):
    with pytest.raises(UserError, match="run `reduce` first"):
        main([str(grid_file(tmp_path))])


def test_a_grid_file_that_does_not_exist_is_a_users_mistake(tmp_path):
    with pytest.raises(UserError, match=r"no\.toml"):
        main([str(tmp_path / "no.toml")])


def test_the_terminal_shows_names_with_brackets_as_they_are(results):
    table = [replace(row, loss="[red]x[/]") for row in rows(results)]
    console = Console(file=io.StringIO(), width=200)
    console.print(printed_table("[b]streets[/b]", table))
    assert "[red]x[/]" in console.file.getvalue()
    assert "[b]streets[/b]" in console.file.getvalue()


def svg_comments(image: bytes) -> str:
    parser = ET.XMLParser(target=ET.TreeBuilder(insert_comments=True))
    tree = ET.fromstring(image, parser)
    assert not [e for e in tree.iter() if str(e.tag).endswith("}script")]
    return "\n".join(unescape(e.text or "") for e in tree.iter() if e.tag is ET.Comment)


def test_control_characters_reach_neither_terminal_nor_figure_and_keep_the_tables_whole():
    """Line ends, and what makes a terminal change its colour."""
    name = "a\rb\x1b[31m\u2028"
    results = simulated.made_up_results(grid=name, classes=[name, *simulated.CLASSES[1:]])
    for cell in results.datasets[0].cells:
        cell["loss"] = name
    table = rows(results)
    assert next(csv.DictReader(io.StringIO(score_table.to_csv(table), newline="")))["loss"] == name
    assert len(score_table.to_markdown(table).splitlines()) == len(table) + 2
    assert len([line for line in score_table.to_latex(table).splitlines() if "a b" in line]) == len(
        table
    )
    console = Console(file=io.StringIO(), width=200)
    console.print(printed_table(name, table))
    assert not set(console.file.getvalue()) & {"\r", "\x1b", "\u2028"}
    assert console.file.getvalue().count(r"a\rb\x1b[31m\u2028") == len(table) + 1
    drawn = ""
    for section in sections(results, table):
        for figure in section.figures:
            if "svg" in figure.source[:20]:
                drawn += svg_comments(base64.b64decode(figure.source.split(",", 1)[1]))
    assert r"a\rb\x1b[31m\u2028" in drawn


def test_a_rare_class_without_training_pixels_does_not_break_the_log_axis(results):
    data = results.datasets[0]
    pixels = data.train_class_pixels.copy()
    pixels[3] = 0
    assert figures.class_frequencies(replace(data, train_class_pixels=pixels)).startswith(b"<?xml")


def test_heatmaps_grow_with_the_number_of_losses(results):
    table = rows(results)
    heights = [
        Image.open(io.BytesIO(figures.recall_heatmap(results.datasets[0], block))).height
        for block in (table, table * 4)
    ]
    assert heights[1] > heights[0]


def test_the_overview_says_which_losses_and_models_it_leaves_out(results):
    row = rows(results)[0]
    block = [replace(row, loss=f"loss {number}") for number in range(61)]
    found = {("streets", f"model {number}"): block for number in range(41)}
    assert figures.overview_note(found) == (
        "Drawn are the first 60 of 61 losses and 40 of 41 data sets and models; table.csv has all."
    )
    assert figures.overview_note({("streets", "model"): block[:60]}) == ""


def test_a_spread_above_1_keeps_its_digits():
    assert score_cell(Summary(5.0, 10.012, 4, 4), False).spread == "±10.012"
    assert score_cell(Summary(0.5, 0.012, 4, 4), False).spread == "±.012"


def test_only_losses_whose_weights_move_are_scheduled():
    losses = [simulated.loss_record(name) for name in ("CE", "DLCE", "DLNCE", "DLACE")]
    assert [loss["name"] for loss in figures.scheduled(losses)] == ["DLNCE", "DLACE"]


def test_the_naive_and_the_alternating_schedule_are_drawn_as_the_paper_has_them():
    time = np.array([0, 0.25, 0.3, 0.5, 0.6, 0.7, 0.9, 1.0])
    naive = figures.weights_over(simulated.loss_record("DLNCE")["schedule"], time)[:, 1]
    np.testing.assert_allclose(naive, np.clip((time - 0.3) / 0.6, 0, 1), atol=1e-12)
    alternating = figures.weights_over(simulated.loss_record("DLACE")["schedule"], time)[:, 1]
    ramp = np.clip((time - 0.5) / 0.4, 0, 1)
    expected = np.clip(1 - time / 0.5, 0, 1) + 1 - np.cos(np.pi / 2 * ramp)
    np.testing.assert_allclose(alternating, expected, atol=1e-12)


def test_each_schedule_of_a_loss_is_drawn_with_its_data_sets():
    other = simulated.loss_record("DLNCE@0.1-0.2")["schedule"]
    losses = [
        {**simulated.loss_record("DLNCE"), "datasets": ["voc", "sbd"]},
        {**simulated.loss_record("DLNCE"), "schedule": other, "datasets": ["camvid"]},
        {**simulated.loss_record("DLACE"), "datasets": ["voc", "sbd", "camvid"]},
    ]
    drawn = re.findall("<!-- (.*) -->", figures.loss_schedules(losses).decode())
    titles = [text for text in drawn if text[:2] in ("DL", "vo", "ca") and text != "DL"]
    assert titles == ["DLNCE", "voc, sbd", "DLNCE", "camvid", "DLACE"]


def test_a_jump_is_drawn_as_a_jump():
    schedule = [
        {"at": 0.2, "weights": [1, 0, 0], "ramp": "linear"},
        {"at": 0.5, "weights": [0, 1, 0], "ramp": "constant"},
        {"at": 0.9, "weights": [0, 0, 1], "ramp": "linear"},
    ]
    weights = figures.weights_over(schedule, np.array([0.0, 0.49, 0.5, 0.7, 1.0]))
    expected = [[1, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0.5, 0.5], [0, 0, 1]]
    np.testing.assert_allclose(weights, expected, atol=1e-12)
