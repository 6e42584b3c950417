"""Figures are the same whatever the shell and matplotlib's settings say."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[3]
DRAW = """
import sys
from pipeline.rendering.figure_style import STYLE, small_multiples, svg
from pipeline.rendering.plotting import rc_context
with rc_context(STYLE):
    figure, (axes,) = small_multiples(1, 1, (3, 2))
    axes.plot([0, 1], [1, 0])
    sys.stdout.buffer.write(svg(figure))
"""


def drawn(folder: Path, **variables: str) -> bytes:
    environ = {k: v for k, v in os.environ.items() if not k.startswith(("MPL", "MATPLOTLIB"))}
    environ |= {"PYTHONPATH": str(REPOSITORY), **variables}
    done = subprocess.run(
        [sys.executable, "-c", DRAW], cwd=folder, env=environ, capture_output=True, check=True
    )
    assert done.stderr == b""
    return done.stdout


@pytest.fixture(scope="module")
def expected(tmp_path_factory) -> bytes:
    return drawn(tmp_path_factory.mktemp("plain"))


def test_a_notebooks_backend(tmp_path, expected):
    assert drawn(tmp_path, MPLBACKEND="module://matplotlib_inline.backend_inline") == expected


@pytest.mark.parametrize(
    "content",
    [b"lines.linewidth: 9\n", b"font.size: \xff\n", None],
    ids=["of another style", "that is no text", "that cannot be read"],
)
def test_a_matplotlibrc_in_the_folder_and_in_the_environment(tmp_path, expected, content):
    path = tmp_path / "matplotlibrc"
    if content is None:
        path.symlink_to("/proc/self/mem")  # also for root
    else:
        path.write_bytes(content)
    assert drawn(tmp_path, MATPLOTLIBRC=str(path)) == expected
