"""A run of hundreds of cells in a hundred jobs: what status, reduce and report say of it, against
what lies in its files; and how often they ask the file system, which at 10,000 cells decides how
long they take (`python -m benchmarks.scale` says how long)."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import asdict
from html.parser import HTMLParser
from pathlib import Path

import h5py
import numpy as np
import pytest

from benchmarks.large_run import large_grid, write_finished, write_submission
from hpc.scheduler.auto import open_queue
from hpc.storage.atomic import fingerprint, write_json
from jobs.spec.cell import FORMAT, KEY_LENGTH
from pipeline import reduce, report, status
from pipeline.config.grid_file import Grid
from pipeline.rendering import figure_data
from pipeline.scores.results_file import read_results
from pipeline.tracking.survey import survey

REPOSITORY = Path(__file__).parents[3]
LOSSES = ["CE", "WCE", "DL", "DLNCE", "DLNWCE", "DLAWCE@0.2-0.8", "FL", "TL", "WDL", "DLWCE",
          "CEMP", "WDLNWCE", "WDLACE", "DLCE", "DLACE", "WDLWCE", "DLACE@0.4-0.6", "DLAWCE",
          "DLNCE@0.1-0.5", "DLNWCE@0.4-0.6"]  # fmt: skip
OPEN_JOBS = 10
MOST_BLOCKS, MOST_LOSSES = 2, 3
# What a run's commands open and list, told to standard error by a process of its own.
_WATCHED = """
import os, sys
def told(event, arguments):
    if event in ("open", "os.listdir", "os.scandir") and isinstance(arguments[0], str):
        if arguments[0].startswith(sys.argv[1]):
            os.write(2, f"{event} {arguments[0]}\\n".encode())
sys.addaudithook(told)
from pipeline import status
status.main(sys.argv[2:])
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Grid:
    """640 cells in 160 jobs; all but ten jobs have ended well, and two cells were given up."""
    grid = large_grid(tmp_path_factory.mktemp("large"), 4, ("streets", "rooms"), LOSSES)
    tasks = write_submission(grid)
    write_finished(grid, tasks[OPEN_JOBS:])
    for cell in tasks[0].cells[:2]:
        write_json(grid.run.failure(cell.signature), {"step": 7, "reason": "the loss is inf"})
    return grid


def open_cells(grid: Grid) -> list[str]:
    """Return the cells that no counts file on disk names."""
    counted: set[str] = set()
    for path in grid.run.counts.glob("*.json"):
        counted.update(json.loads(path.read_text())["cells"]["signature"])
    return [cell.signature for cell in grid.cells if cell.signature not in counted]


def test_a_cell_is_called_the_fingerprint_of_its_settings_as_a_whole(run):
    for cell in run.cells[::37]:
        settings = {
            "format": FORMAT, "dataset": cell.dataset, "data": cell.data, "seed": cell.seed,
            "protocol": cell.protocol.identity(), "model": cell.model,
            "loss": asdict(cell.loss),
        }  # fmt: skip
        assert cell.signature == fingerprint(settings)[:KEY_LENGTH]
        del settings["model"], settings["loss"]
        backbone = {**settings, "backbone": cell.model.partition("_")[2]}
        assert cell.bundle_key == fingerprint(backbone)[:KEY_LENGTH]
        longer = cell.protocol.model_copy(update={"epochs": 31})
        assert cell.model_copy(update={"protocol": longer}).signature != cell.signature


def test_status_tells_every_cell_apart(run):
    state = survey(run, open_queue(run.cluster, run.run.logs, run.run.queue))
    unfinished = open_cells(run)
    assert len(unfinished) == 4 * OPEN_JOBS
    found = {cell.cell.signature: cell.state for cell in state.cells}
    assert [name for name in found if found[name] != "done"] == unfinished
    assert Counter(found.values()) == {"done": 600, "missing": 38, "failed": 2}
    assert state.problems == ()


def test_damage_that_came_since_the_last_look_is_seen_at_the_next(run):
    path = sorted(run.run.counts.glob("*.h5"))[5]
    whole, index = path.read_bytes(), path.with_suffix(".json")
    times, text = index.stat(), index.read_bytes()
    queue = open_queue(run.cluster, run.run.logs, run.run.queue)
    try:
        path.write_bytes(whole[:-1])
        (problem,) = survey(run, queue).problems
        assert str(path) in problem
        path.write_bytes(whole)
        index.write_bytes(text.replace(b'"time": 0.0', b'"time": 1.0'))
        os.utime(index, ns=(times.st_atime_ns, times.st_mtime_ns))  # same size, same time
        (problem,) = survey(run, queue).problems
        assert str(index) in problem
    finally:
        path.write_bytes(whole)
        index.write_bytes(text)
    assert survey(run, queue).problems == ()


def test_status_lists_a_folder_once_and_opens_an_index_once(run):
    words = [sys.executable, "-c", _WATCHED, str(run.run.root), str(run.path), "--state", "done"]
    done = subprocess.run(words, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    events = Counter(tuple(line.split(maxsplit=1)) for line in done.stderr.splitlines())
    opened = Counter(path for event, path in events.elements() if event == "open")
    indices = {str(path) for path in run.run.counts.glob("*.json")}
    assert indices < opened.keys()
    assert {path: n for path, n in opened.items() if n > 1} == {}
    records = len(list(run.run.submitted.iterdir()))
    # beside them the heartbeats of open jobs, what the local queue knows of them, and why two cells
    # were given up; nothing is asked cell by cell
    of_queue = [path for path in opened if path.startswith(str(run.run.queue))]
    assert len(of_queue) == OPEN_JOBS
    assert len(opened) == len(indices) + records + OPEN_JOBS + 2 + len(of_queue)
    listed = Counter(path for event, path in events.elements() if event != "open")
    assert listed[str(run.run.counts)] == listed[str(run.run.failures)] == 1
    assert max(listed.values()) <= 2  # submissions: for records, and for the notes of scripts
    assert done.stdout.count(" │ done ") == 600


def test_status_of_more_cells_than_a_screen_has_counts_by_data_set_and_model(
    run, capsys, monkeypatch
):
    monkeypatch.setattr(status, "MOST_ROWS", 100)
    status.main([str(run.path)])
    said = capsys.readouterr().out
    rows = [line.strip("│ ").split() for line in said.splitlines() if line.startswith("│")]
    assert len(rows) == 8
    assert sum(int(word) for row in rows for word in row if word.isdigit()) == len(run.cells)
    assert "640 cells: 600 done, 2 failed, 38 missing" in said


@pytest.fixture(scope="module")
def reported(run) -> Grid:
    """Its report, of which even less is drawn than of other large ones: drawing takes its time."""
    assert reduce.main([str(run.path)]) == 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figure_data, "MOST_BLOCKS", MOST_BLOCKS)
        patch.setattr(figure_data, "MOST_LOSSES", MOST_LOSSES)
        patch.setattr(report, "MOST_SCHEDULES", 2)
        report.main([str(run.path)])
    return run


def test_reduce_has_the_counts_of_every_file(reported):
    results = read_results(reported.run.results)
    unfinished = set(open_cells(reported))
    names = [cell.name for cell in reported.cells if cell.signature in unfinished]
    assert results.record["missing"] == names
    # summed over all cells, by h5py's own objects
    pixels = dict.fromkeys(reported.datasets, 0)
    for path in reported.run.counts.glob("*.h5"):
        with h5py.File(path) as file:
            dataset = path.name.partition("-")[0]
            pixels[dataset] = pixels[dataset] + file["confusion"][...].sum(axis=0)
    for found in results.datasets:
        assert np.array_equal(found.counts["confusion"].sum(axis=0), pixels[found.name])


class Images(HTMLParser):
    """The figures of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.titles: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list) -> None:
        if tag == "img":
            self.titles.append(dict(attrs)["alt"])


def test_a_large_report_draws_some_and_has_the_numbers_of_all(reported):
    folder = reported.run.report
    page = (folder / "index.html").read_text()
    topics = Counter(title.partition(":")[0] for title in Images(page).titles)
    assert topics["All losses on all data sets and models"] == 1
    assert topics["Confusion"] == topics["Recall of each class"] == MOST_BLOCKS
    assert f"Drawn are {MOST_BLOCKS} of 8 data sets and models" in page
    assert f"and the losses with the best S_rec, {MOST_LOSSES} together" in page
    for loss in LOSSES:
        assert page.count(f'<th scope="row">{loss}') >= 8  # the tables have them all
    assert len(page) < 10e6


def test_the_numbers_beside_a_large_report_are_those_of_its_cells(reported):
    results = read_results(reported.run.results)
    wanted = {}  # recall by (data set, model, loss, class) from the confusion matrices
    for found in results.datasets:
        by_row: dict = {}
        for place, cell in enumerate(found.cells):
            table = found.counts["confusion"][place]
            recall = np.diag(table) / table.sum(axis=1)
            by_row.setdefault((found.name, cell["model"], cell["loss"]), []).append(recall)
        for key, recalls in by_row.items():
            for name, value in zip(found.classes, np.mean(recalls, axis=0), strict=True):
                wanted[(*key, name)] = value
    with (reported.run.report / "recall.csv").open(newline="") as file:
        header, *lines = csv.reader(file)
    assert header == ["dataset", "model", "loss", "class", "recall"]
    written = {tuple(line[:4]): float(line[4]) for line in lines}
    assert written == pytest.approx(wanted, rel=1e-12)
    with (reported.run.report / "confusion.csv").open(newline="") as file:
        total = sum(int(line["pixels"]) for line in csv.DictReader(file))
    assert total == sum(int(found.counts["pixels"].sum()) for found in results.datasets)
