"""Run the parts of `make gpu` in small on a CPU, so that none fails in the minutes with a GPU."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_check
from benchmarks.bundle_job import Job
from benchmarks.gpu import Peak
from benchmarks.gpu_check import SMALL, Row
from hpc.distributed.process_group import COMMUNICATION
from jobs.training.cell_trainer import CellTrainer
from tests.jobs.job_processes import lives

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def same_threads():
    """Training sets torch's threads for the whole process."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_a_cell_has_equal_bits_alone_and_in_a_bundle_and_its_step_has_parts():
    of_fp32, parts, of_bf16, _ = gpu_check.bits(SMALL)
    for row in (of_fp32, of_bf16):
        assert (row.expected, row.found, row.failed) == ("equal bits", "equal bits", False)
    assert {"backbone", "heads", "losses", "optimiser"} <= parts.numbers.keys()
    assert all(seconds > 0 for seconds in parts.numbers.values())


def test_a_bundle_that_changes_a_cell_fails(monkeypatch):
    """One last place in one weight, if other cells have trained before."""
    honest, cells = CellTrainer.step, Job.cells

    def counted(job, losses, *model):
        monkeypatch.setattr(CellTrainer, "others", len(losses) - 1, raising=False)
        return cells(job, losses, *model)

    def disturbed(trainer, *arguments):
        value = honest(trainer, *arguments)
        if trainer.others:
            with torch.no_grad():
                weight = next(trainer.network.parameters())
                weight.view(-1)[0] = torch.nextafter(weight.view(-1)[0], torch.tensor(9.0))
        return value

    monkeypatch.setattr(Job, "cells", counted)
    monkeypatch.setattr(CellTrainer, "step", disturbed)
    monkeypatch.setattr(gpu_check, "precisions", lambda: ["fp32"])
    row, _ = gpu_check.bits(SMALL)
    assert (row.found, row.failed) == ("other bits", True)


def test_a_resumed_bundle_has_equal_bits_and_one_that_lost_its_momentum_has_not(monkeypatch):
    monkeypatch.setattr(gpu_check, "precisions", lambda: ["bf16"])
    assert not next(gpu_check.resume(SMALL)).failed
    load = CellTrainer.load

    def without_momentum(trainer, state):
        zeros = {i: {n: t * 0 for n, t in one.items()} for i, one in state["momentum"].items()}
        load(trainer, {**state, "momentum": zeros})

    monkeypatch.setattr(CellTrainer, "load", without_momentum)
    assert next(gpu_check.resume(SMALL)).failed


@pytest.mark.parametrize(
    ("part", "words"),
    [
        (gpu_check.upsampling, ["matrix products", "torch"]),
        (
            gpu_check.evaluation,
            ["3 cells, 1 threads", "3 cells, 2 threads"],
        ),
        (gpu_check.published_way, ["as published, fp32", "as published, bf16"]),
    ],
)
def test_each_way_is_timed_beside_its_arithmetic(part, words):
    rows = list(part(SMALL))
    assert len(rows) == len(words)
    for row, word in zip(rows, words, strict=True):
        assert word in row.what
        assert row.numbers["seconds"] > 0 and row.numbers["expected seconds"] > 0
        assert " to " in row.expected


def test_the_better_memory_format_in_fp32_is_named():
    rows = list(gpu_check.formats(SMALL))
    for mode, (*ways, best) in (("", rows[:3]), (", deterministic", rows[3:])):
        assert [row.what for row in ways] == [
            f"a step of 1 FCN and 1 DeepLabV3, fp32{mode}, {name}"
            for name in ("channels last", "contiguous")
        ]
        fastest = min(ways, key=lambda row: row.numbers["seconds"])
        assert fastest.what.endswith(best.found)


def test_bundles_tell_steps_a_second_and_the_time_to_save(monkeypatch):
    monkeypatch.setattr(gpu_check, "precisions", lambda: ["fp32"])
    rows = list(gpu_check.bundles(SMALL))
    assert [row.what for row in rows] == [
        f"{text} {cells}, fp32"
        for cells in ("1 FCN", "2 FCN and 1 DeepLabV3")
        for text in ("a step of", "saving")
    ]
    few, many = rows[0].numbers, rows[2].numbers
    assert few["steps a second"] == pytest.approx(1 / few["seconds"])
    assert many["expected seconds"] > few["expected seconds"]


def test_memory_is_compared_with_the_estimate_where_there_is_a_gpu(monkeypatch):
    peaks = iter([Peak(5.0, 6.0), Peak(6.5, 7.0)])
    monkeypatch.setattr(gpu_check, "_peak", lambda work, group: (work(), next(peaks))[1])
    monkeypatch.setattr(gpu_check, "precisions", lambda: ["fp32"])
    *_, whole, tensors, saving = gpu_check.bundles(replace(SMALL, bundles=((1, 0),)))
    assert (whole.found, tensors.found, saving.found) == ("6.00 GB", "5.00 GB", "6.50 GB")
    estimate = whole.numbers["expected GB"]
    assert tensors.numbers["expected GB"] == pytest.approx((estimate - 1.5) / 1.2)
    assert saving.expected == "at most 5.00 GB"


def test_ranks_agree_to_the_bit_and_one_without_memory_ends_all_with_its_reason():
    *pairs, lost = gpu_check.ranks(SMALL)
    assert [row.found for row in pairs[::2]] == ["equal bits"] * 2
    assert all(row.numbers[COMMUNICATION] > 0 for row in pairs[1::2])
    assert lost.what == "rank 1 of 2 out of memory"
    assert lost.found.startswith("all gone after ") and not lost.failed


def test_the_table_and_a_file_are_written_and_the_exit_code_says_that_nothing_failed(
    tmp_path, capsys
):
    assert gpu_check.main(["upsampling", "--small", "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    found = json.loads((tmp_path / "gpu_check.json").read_text())
    assert found["machine"]["torch"] == torch.__version__
    for row in found["parts"]["upsampling"]:
        assert f"| {row['what']} | {row['expected']} | {row['found']} |" in out


def test_a_part_that_fails_or_takes_too_long_is_a_row(tmp_path, monkeypatch, capsys):
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\necho 'Traceback ...\nValueError: no room' >&2\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    assert gpu_check.main(["bits", "--small", "--out", str(tmp_path / "out")]) == 1
    assert "| bits |  | ValueError: no room |" in capsys.readouterr().out
    program.write_text(f"#!/bin/sh\nsleep 60 &\necho $! > {tmp_path}/pid\nwait\n")
    assert gpu_check._run("bits", True, 0.5) == [Row("bits", "", "killed after 0 s", failed=True)]
    assert not lives(Path("/proc") / (tmp_path / "pid").read_text().strip())
    monkeypatch.setattr(gpu_check, "SECONDS", 0)
    assert gpu_check.main(["bits", "--small", "--out", str(tmp_path / "out")]) == 0
    assert "| bits |  | not run: the 0 s are over |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("code", "last", "failed"),
    [
        (0, "2 passed, 1500 deselected in 3 s", False),
        (1, "1 failed, 2 passed in 3 s", True),
        (0, "2 skipped, 1500 deselected in 3 s", True),  # the process saw no GPU
    ],
)
def test_tests_on_a_gpu_must_run_and_pass(monkeypatch, code, last, failed):
    done = subprocess.CompletedProcess([], code, stdout=f"..\n{last}", stderr="")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: done)
    (row,) = gpu_check.tests(SMALL)
    assert (row.found, row.failed) == (last, failed)


def test_without_a_gpu_it_is_said(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_check.main([]) == 2
    assert capsys.readouterr().err == (
        "error: torch sees no GPU; --small runs the parts on a CPU\n"
    )
