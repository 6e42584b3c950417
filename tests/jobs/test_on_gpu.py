"""What is to run on a GPU is refused where it cannot, before anything is trained."""

from __future__ import annotations

import pytest
import torch

from hpc.command import UserError
from jobs import pretrain
from jobs import train as job
from jobs.on_gpu import require_gpu
from jobs.protocol import Protocol
from tests.jobs.small_runs import grid_of, task_of

SETTINGS = [("counting", "triton", "fused"), ("augment_on", "gpu", "cpu")]


@pytest.mark.parametrize(("kind", "main"), [("bundle", job.main), ("pretrain", pretrain.main)])
@pytest.mark.parametrize(("key", "value", "instead"), SETTINGS)
def test_without_a_gpu_nothing_is_trained(
    streets, tmp_path, monkeypatch, kind, main, key, value, instead
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    grid = grid_of(tmp_path, streets.folder, "CE", epochs=1, **{key: value})
    with pytest.raises(UserError) as refused:
        main([str(task_of(grid, kind=kind))])
    assert str(refused.value) == (
        f'{key} = "{value}" needs a GPU, but torch sees none here; set {key} = "{instead}" in '
        "[protocol], or ask for GPUs in the profile"
    )
    assert not any(path.is_file() for path in grid.run.checkpoints("").rglob("*"))


@pytest.mark.parametrize(("key", "value", "instead"), SETTINGS)
def test_a_gpu_on_which_triton_does_not_work_is_refused_in_one_line(
    monkeypatch, key, value, instead
):
    def fail(*_, **__):
        raise RuntimeError("no kernel image\nis available")

    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla K80")
    monkeypatch.setattr(torch, "zeros", fail)
    monkeypatch.setattr(torch.Tensor, "to", fail)
    with pytest.raises(UserError) as refused:
        require_gpu(Protocol(**{key: value}), torch.device("cuda"))
    assert str(refused.value) == (
        f'{key} = "{value}" does not work on Tesla K80 (RuntimeError: no kernel image); set '
        f'{key} = "{instead}" in [protocol]'
    )


def test_who_asks_for_nothing_needs_no_gpu():
    for counting in ("fused", "reference"):
        require_gpu(Protocol(counting=counting), torch.device("cpu"))
