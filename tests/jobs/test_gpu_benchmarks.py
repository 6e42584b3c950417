"""Run the GPU benchmarks on a CPU, with small inputs and without the GPU's clock and memory.

A mistake in a benchmark must not waste the hour in which a GPU is available.
"""

from __future__ import annotations

import pytest
import torch

from benchmarks import bundle_job, full_size
from jobs.models.build import build_backbone
from jobs.spec.protocol import Protocol
from jobs.training import cell_trainer

MODEL = "deeplabv3_mobilenet_v3_large"
SMALL = Protocol(weights="none", batch_size=2, crop=(48, 48), precision="bf16", threads=1)
CPU = torch.device("cpu")


def test_what_a_backbone_gives_fits_into_half_precision(monkeypatch):
    """Its weights are random, and torchvision's first statistics of batch norm would let values
    double in each block, beyond what fp16 holds; then every cell stops before its first step."""
    protocol = SMALL.model_copy(update={"precision": "fp32"})
    with bundle_job.ready(protocol) as group:
        settled = bundle_job.Job("fcn_resnet101", group, protocol).pass_backbone()
        fresh = build_backbone("resnet101", 0, 0.1)
        monkeypatch.setattr(bundle_job, "settled", lambda *_: fresh)
        unsettled = bundle_job.Job("fcn_resnet101", group, protocol).pass_backbone()
    assert settled.abs().max() < 1000 < 30_000 < unsettled.abs().max()


def test_a_cell_that_stops_is_no_step(monkeypatch):
    def broken(logits, *_):
        return logits.sum() * float("nan")

    monkeypatch.setattr(cell_trainer, "combined_loss", broken)
    with bundle_job.ready(SMALL) as group:
        job = bundle_job.Job(MODEL, group, SMALL)
        with pytest.raises(RuntimeError, match=r"/CE/0 stopped: the loss was nan at step 1 of 2"):
            job.step(job.cells(["CE"]))


@pytest.mark.slow
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
        assert len(memory.split(", ")) == 1 + torch.cuda.is_available()


def test_the_steps_of_a_start_are_taken_off():
    start = {"steps": 10, "ranks": [{"data": 3.0, "heads": 9.0, "checkpoints": 5.0}] * 2}
    ranks = [{"data": 4.0, "heads": 12.0, "checkpoints": 7.0}, {"data": 6.0, "heads": 14.0}]
    found = {"steps": 30, "host": 4.0, "ranks": ranks}
    row = full_size._row("fcn", 8, found, start)
    # 20 steps took 2 s for data and 4 s for heads, in the mean of two ranks
    assert row == "| fcn | 8 | 3.333 | 5 | 100 | 0 | 200 | 0 | 0 | 0 | 0 | 4.0 |"


@pytest.mark.parametrize(
    ("options", "refusal"),
    [
        (["--cells", "0", "4"], "a job has 1 to 50 cells, not 0"),
        (["--warm", "2", "--steps", "0"], "--steps is 1 or more, and --warm 0 or more"),
        (["--set", "workers"], "--set takes KEY=VALUE, not workers"),
        (["--models", "fcn_resnet50", "fcn_resnet101"], "the models of one run share a backbone"),
    ],
)
def test_what_cannot_be_measured_is_refused(capsys, options, refusal):
    with pytest.raises(SystemExit):
        full_size.main(options)
    assert refusal in capsys.readouterr().err
