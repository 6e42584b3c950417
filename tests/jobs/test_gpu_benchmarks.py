"""What measures a GPU does the same on a processor, in small: who gets hold of a GPU for an hour
must not lose it to a mistake in the program."""

from __future__ import annotations

import pytest
import torch

from benchmarks import full_size, gpu_kernels, gpu_steps
from benchmarks.measure import Absent
from jobs.protocol import Protocol
from tests.jobs import interpreted

MODEL = "deeplabv3_mobilenet_v3_large"
SMALL = Protocol(weights="none", batch_size=2, crop=(48, 48), precision="bf16", threads=1)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def process():
    with interpreted.interpreter() as process:
        yield process


@pytest.fixture(autouse=True)
def one_thread():
    """Training sets torch's threads for the whole process."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_bundles_are_measured_beside_the_published_way_and_cells_alone(monkeypatch):
    monkeypatch.setattr(gpu_steps, "ROUNDS", 2)
    found = gpu_steps.of_bundles(MODEL, SMALL, (1, 3))
    published = ["the published way, float32", "the published way, bf16"]
    assert [(one.what, one.against) for one in found] == [
        *((f"a step of a cell in a bundle of 1, {MODEL}, bf16", peer) for peer in published),
        *(
            (f"a step of a cell in a bundle of 3, {MODEL}, bf16", peer)
            for peer in (*published, "frozen, one cell a run")
        ),
    ]
    alone, bundle = found[0].ours, found[-1].ours
    assert found[-1].peers == alone and len(bundle) == 2
    for one in found:
        size = 1 if "bundle of 1," in one.what else 3
        assert one.more["steps a second"] == pytest.approx(2 / sum(one.ours) / size, rel=0.5)
        assert one.limit.endswith(("s", "ms", "µs")) and "GFLOP at" in one.limit


def test_a_setting_is_measured_beside_what_it_is(monkeypatch):
    """Compiling takes minutes here, and has tests of its own."""
    kept = {name: how for name, how in gpu_steps.SETTINGS.items() if "compile" not in name}
    monkeypatch.setattr(gpu_steps, "SETTINGS", kept)
    monkeypatch.setattr(gpu_steps, "ROUNDS", 1)
    found = gpu_steps.of_settings(MODEL, SMALL, 2)
    assert [one.against for one in found] == ["channels apart (NCHW)", "deterministic algorithms"]
    assert not torch.are_deterministic_algorithms_enabled()


def test_kernels_are_compared_with_their_references_and_timed(process):
    image = process.submit(gpu_kernels.of_counting, CPU, (3, 4), (9, 13)).result()
    assert [one.against for one in image] == [
        "plain PyTorch there", "our kernel on the processor",
    ]  # fmt: skip
    protocol = Protocol(batch_size=2, resize=(20, 30), crop=(24, 24))
    (crops,) = process.submit(gpu_kernels.of_crops, CPU, protocol, (32, 40)).result()
    assert crops.what == "crops of 2 pictures of 40 x 32, on a GPU"


def test_whole_jobs_are_profiled_and_a_cell_has_the_same_bits_in_each(capfd):
    options = "--crop 32 --picture 40 48 --cells 1 2 --steps 1 --workers 0 --threads 1"
    settings = ["--set", "resize=[32, 40]", "--set", "eval_size=40", "--set", "precision=bf16"]
    assert full_size.main(["--models", MODEL, *options.split(), *settings]) == 0
    head, _, *rows, end = capfd.readouterr().out.splitlines()
    assert head.startswith("| model | cells | steps a second | without data | data, ms | backbone")
    assert end == "cells whose weights and counts depend on their job: none"
    assert len(rows) == 2
    for number, row in enumerate(rows, 1):
        model, cells, rate, without, *parts, memory = row.strip("| ").split(" | ")
        assert (model, cells) == (MODEL, str(number))
        assert 0 < float(rate) <= float(without)
        assert len(parts) == len(full_size.PARTS)
        assert sum(map(float, parts)) <= 1.01 * 1000 / float(rate)
        assert memory.endswith(", 0.0") == (not torch.cuda.is_available())


@pytest.mark.parametrize("module", [gpu_steps, gpu_kernels])
def test_without_a_gpu_it_is_said(monkeypatch, module):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (nothing,) = module.measure()
    assert isinstance(nothing, Absent) and nothing.why == "there is no GPU here"
