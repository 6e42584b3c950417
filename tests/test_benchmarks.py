"""Run the benchmarks in small, so that they work when a machine is free for them.

Every peer must run and agree with ours, or give a reason. No test checks a speed.
"""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import (
    augmenting,
    counting,
    growth,
    growth_data,
    measure,
    pictures,
    pooling,
    reading,
    run,
)

LARGE = "2048 x 1024"


@pytest.fixture(autouse=True)
def in_small(monkeypatch, tmp_path):
    """Set one round on pictures of 96 x 64, without CamVid."""
    threads = torch.get_num_threads()
    image = counting.an_image
    monkeypatch.setenv("LOSSGRID_CAMVID", str(tmp_path / "nowhere"))
    monkeypatch.setattr(counting, "an_image", lambda: image((5, 7), (40, 56)))
    monkeypatch.setattr(counting, "SIZE", (40, 56))
    monkeypatch.setattr(measure, "_SMALLEST", 0.0)
    monkeypatch.setattr(pictures, "NUM_LARGE", 12)
    monkeypatch.setattr(pictures, "LARGE_SIZE", (64, 96))
    monkeypatch.setattr(pooling, "PIXELS", 2000)
    monkeypatch.setattr(augmenting, "SETS", {LARGE: (0.0, 0.0, 1, 1)})
    for module in (counting, reading, growth_data):
        monkeypatch.setattr(module, "ROUNDS", 1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("name", "peers"),
    [
        pytest.param(
            "counting",
            {"plain PyTorch", "our reference", "plain PyTorch on all"},
            marks=pytest.mark.slow,
        ),
        ("pooling", {"the published loop over pixels", "the same loop on Python's numbers"}),
        ("reading", {"torchvision, PNG folder"}),
        ("augmenting", {augmenting.PNG, augmenting.JPEG, "Pillow: resize the image, then crop"}),
    ],
)
def test_ours_runs_beside_its_peers(name, peers, tmp_path, capsys):
    run.main([name, "--out", str(tmp_path)])
    found = json.loads((tmp_path / f"{name}.json").read_text(encoding="utf-8"))
    measured = [one for one in found["comparisons"] if "absent" not in one]
    assert {one["against"] for one in measured} >= peers
    printed = capsys.readouterr().out
    for one in measured:
        assert min(one["ours"] + one["peers"]) > 0 and one["ratio"] > 0
        assert f"| {one['what']} | {one['against']} |" in printed
    for one in found["comparisons"]:
        assert "absent" not in one or one["absent"]


def test_growth_is_plotted(monkeypatch, tmp_path):
    monkeypatch.setattr(growth_data, "PROCESSES", (1, 2))
    monkeypatch.setattr(growth_data, "STEPS", 2)
    plot = growth.reading()
    assert [[*line.rounds] for line in plot.lines] == [[1, 2]]
    growth.draw(plot, tmp_path / "reading.png")
    assert (tmp_path / "reading.png").read_bytes().startswith(b"\x89PNG")
