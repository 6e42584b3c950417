"""Names of data sets, classes, losses and grids, and paths, are text wherever they go: one grid
with the worst of them, run for real under an open umask, from images to the page."""

import base64
import csv
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline import predict, status
from tests.other_user import as_user
from tests.pipeline.scores.test_score_table import compile_latex
from tests.pipeline.test_report import Page, svg_comments

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).parents[3]
SCRIPT = "<script>alert(1)</script>"
SIGNS = r"$x$ & 100% _ {b} # ~ ^ \ | [/red]"
CLASSES = [SCRIPT, SIGNS, 'a;b,"c"', "=1+1", r"\input{x}", "`touch x`; touch x"]
NAME = "$(touch x) `touch x`; touch x ' \" [/red] " + SCRIPT
DATASET = "$(touch x) [red] & *_{b}| 'q'"
LOSS = f"[red] {SIGNS} <b>"
GRID = """
name = {name}
seeds = [0]
models = ["fcn_mobilenet_v3_large"]
losses = ["CE"]
[[loss]]
name = {loss}
terms = ["DL", "CE"]
schedule = [{{at = 0.0, weights = [1, 0]}}, {{at = 1.0, weights = [0, 1]}}]
[dataset.{dataset}]
source = "folder"
root = {root}
shards = {shards}
classes = {classes}
[protocol]
epochs = 1
batch_size = 2
resize = [40, 48]
crop = [40, 40]
eval_size = 0
weights = "none"
threads = 1
[cluster]
kind = "local"
python = {python}
"""


def images(root: Path) -> None:
    """Four pairs for training and two for validation, of noise, with names like commands."""
    random = np.random.default_rng(0)
    names = {"train": ("$(touch x)", "`touch x`", "a\nb", "$x$ [b] %d"), "val": "cd"}
    for split, stems in names.items():
        for stem in stems:
            for folder, shape, top in ((split, (40, 48, 3), 256), (f"{split}annot", (40, 48), 6)):
                (root / folder).mkdir(parents=True, exist_ok=True)
                pixels = random.integers(0, top, shape, dtype=np.uint8)
                Image.fromarray(pixels).save(root / folder / f"{stem}.png")


def command(folder: Path, module: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", module, *map(str, arguments)],
        cwd=folder / "work", env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True, text=True, timeout=200,
        preexec_fn=lambda: os.umask(0),
    )  # fmt: skip


@pytest.fixture(scope="module")
def place():
    """A folder that every user may enter, unlike pytest's."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    (folder / "work").mkdir()
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def run(place):
    """`all --wait` of the grid; its file's path, and what was printed."""
    python = place / "$(touch${IFS}x)" / "python"
    python.parent.mkdir()
    python.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n')
    python.chmod(0o755)
    root = place / "the 'images' of\n\"$(touch x)\""
    images(root)
    config = place / "$(touch x)\n`touch x`.toml"
    words = {"name": NAME, "loss": LOSS, "dataset": DATASET, "root": str(root), "classes": CLASSES,
             "shards": str(place / "shards; touch x\n[red]"), "python": str(python)}  # fmt: skip
    config.write_text(GRID.format(**{key: json.dumps(value) for key, value in words.items()}))
    done = command(place, "pipeline.submit", "all", config, "--wait")
    assert done.returncode == 0, done.stderr + done.stdout
    return config, done.stdout + done.stderr


@pytest.fixture(scope="module")
def report(run, place) -> Path:
    (page,) = place.glob("work/runs/*/report/index.html")
    return page.parent


def test_nothing_in_a_name_was_run(run, place, monkeypatch, capsys):
    config, _ = run
    monkeypatch.chdir(place / "work")
    assert status.main([str(config)]) == 0
    cell = f"{DATASET}/fcn_mobilenet_v3_large/{LOSS}/0"
    assert cell in capsys.readouterr().out
    image = next(place.glob("*/val/c.png"))
    out = place / "$(touch x) out"
    arguments = [cell, image, "--out", out, "--config", config]
    assert predict.main([str(argument) for argument in arguments]) == 0
    assert f"0 {SCRIPT}, 1 {SIGNS}, " in capsys.readouterr().out
    assert (out / "c.png").exists()
    found = [path for path in place.rglob("*") if path.name == "x"]
    assert found == [] and not Path("x").exists()


def test_the_terminal_shows_names_as_they_are(run):
    _, printed = run
    for name in (NAME, DATASET, LOSS):
        assert name in printed


def test_the_page_shows_names_as_text(report):
    page = Page((report / "index.html").read_text(encoding="utf-8"))
    tags = {tag for tag, _ in page.tags}
    assert not tags & {"script", "b", "input", "iframe", "object"}
    for name in (NAME, DATASET, LOSS, *CLASSES):
        assert name in page.text
    assert not [key for _, attrs in page.tags for key in attrs if key.startswith("on")]


def test_the_csv_gives_every_name_back(report):
    with (report / "table.csv").open(encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    assert [(line["dataset"], line["loss"]) for line in lines] == [(DATASET, "CE"), (DATASET, LOSS)]
    for line in lines:
        names = [name for row in csv.reader([line["never_right"]], delimiter=";") for name in row]
        assert set(names) < set(CLASSES)
    assert any(line["never_right"] for line in lines)


def markdown_text(cell: str) -> str:
    return re.sub(r"\\([!-/:-@\[-`{-~])", r"\1", cell.strip())


def test_the_markdown_has_as_many_columns_in_every_row(report):
    lines = (report / "table.md").read_text(encoding="utf-8").splitlines()
    cells = [re.split(r"(?<!\\)\|", line)[1:-1] for line in lines]
    assert {len(row) for row in cells} == {len(cells[0])}
    assert [markdown_text(row[2]) for row in cells[2:]] == ["CE", LOSS]
    assert markdown_text(cells[2][0]) == DATASET
    assert not re.search(r"(?<!\\)[<>*_`\[\]$]", "".join(cell for row in cells[2:] for cell in row))


LATEX_WORDS = {r"\textbackslash{}": "\\", r"\textasciicircum{}": "^", r"\textasciitilde{}": "~",
               r"\textless{}": "<", r"\textgreater{}": ">", r"\textbar{}": "|",
               r"\textquotesingle{}": "'", r"\textasciigrave{}": "`", r"{\char34}": '"',
               "-{}": "-"}  # fmt: skip


def latex_text(cell: str) -> str:
    """Return the typeset text of a cell; fail if LaTeX would read a command in it."""
    words = "|".join(map(re.escape, LATEX_WORDS))
    parts = re.findall(rf"({words})|\\([{{}}$&#%_])|\{{([\[\]*])\}}|([^\\{{}}$&#%_^~<>|])", cell)
    found = "".join(LATEX_WORDS.get(a, a) + b + c + d for a, b, c, d in parts)
    length = sum(len(a) + (len(b) + 1 if b else 0) + (len(c) + 2 if c else 0) + len(d)
                 for a, b, c, d in parts)  # fmt: skip
    assert length == len(cell), cell
    return found


def test_the_latex_typesets_names_as_themselves(report):
    text = (report / "table.tex").read_text(encoding="utf-8")
    assert not re.search(r"(\\\\|\\midrule)\s*[\[*]", text)  # would be its argument
    body = [line for line in text.splitlines() if line.endswith(r" \\")][1:]
    cells = [re.split(r"(?<!\\) & ", line) for line in body]
    assert {len(row) for row in cells} == {10}
    assert [(latex_text(row[0]), latex_text(row[2])) for row in cells] == [
        (DATASET, "CE"),
        (DATASET, LOSS),
    ]


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="no pdflatex here")
def test_the_latex_compiles(report, tmp_path):
    compile_latex((report / "table.tex").read_text(encoding="utf-8"), tmp_path)


def test_every_figure_is_drawn_and_says_the_names(report):
    page = Page((report / "index.html").read_text(encoding="utf-8"))
    sources = [attrs["src"] for tag, attrs in page.tags if tag == "img"]
    kinds, drawn = [], ""
    for source in sources:
        kind, content = source.split(",", 1)
        image = base64.b64decode(content)
        kinds.append(kind)
        if "png" in kind:
            assert np.ptp(np.asarray(Image.open(io.BytesIO(image)).convert("L"))) > 100
        else:
            drawn += svg_comments(image)
            assert b"Oblique" not in image  # the x of $x$ would be, as mathematics
    assert kinds.count("data:image/png;base64") == 2
    assert kinds.count("data:image/svg+xml;base64") == 4
    for name in (SIGNS, SCRIPT, LOSS):  # matplotlib notes the text beside its outlines
        assert name in drawn


def test_no_other_user_gets_at_any_file_of_the_run(report, place):
    """Although the umask let everybody do everything."""
    if os.geteuid():
        pytest.skip("only root can be another user")
    root = report.parent
    files = [path for path in root.rglob("*") if path.is_file()]
    assert len([file for file in files if file.suffix == ".pkl"]) == 8
    reached = [file for file in files if as_user(4242, [4343], file.read_bytes)]
    assert reached == []
    modes = {path.name: path.stat().st_mode & 0o777 for path in (root, *root.glob("[lq]*"))}
    assert modes == {root.name: 0o700, "logs": 0o700, "queue": 0o700}
    assert not [path for path in root.rglob("*") if path.lstat().st_mode & 0o022]
    assert (place / "work" / "runs").stat().st_mode & 0o777 == 0o755
