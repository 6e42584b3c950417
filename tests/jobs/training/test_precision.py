"""A cell computes in half precision if the protocol says so, and in fp32 where it must."""

import copy
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from hpc.cli import UserError
from jobs import train as job
from jobs.spec.counts_file import read_index
from jobs.training import cell_trainer as cell_trainer
from jobs.training import job_run
from jobs.training.cell_trainer import half_precision
from jobs.training.torch_settings import configure_torch
from tests.jobs.cells import MODEL, a_cell, a_share
from tests.jobs.small_runs import grid_of, results, task_of
from tests.jobs.training.test_cell_trainer import (
    TOTAL,
    assert_equal_states,
    everything,
    train,
    trainee_of,
    weights,
)

CUDA = SimpleNamespace(device=torch.device("cuda"))


def test_mixed_precision_is_for_a_gpu(alone):
    protocol = a_cell(precision="mixed").protocol
    assert half_precision(protocol, alone) is None
    assert half_precision(protocol, CUDA) == torch.float16
    assert half_precision(a_cell().protocol, CUDA) is None


def test_fp32_is_no_tf32():
    """TF32 is torch's default for convolutions on GPUs that have it."""
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True
    configure_torch(a_cell().protocol)
    assert not torch.backends.cudnn.allow_tf32
    assert not torch.backends.cuda.matmul.allow_tf32


def test_a_cell_that_began_with_tf32_has_mixed_provenance(alone, monkeypatch):
    """A program that used TF32 for fp32 on a GPU recorded 2."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100-SXM4-40GB")
    on_gpu = SimpleNamespace(device=torch.device("cuda"), world_size=1)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91002)
    assert job_run._provenance(a_cell(), on_gpu)["rounding"] == 6
    assert job_run._provenance(a_cell(), on_gpu)["cudnn"] == 91002
    assert "cudnn" not in job_run._provenance(a_cell(), alone)
    assert job_run._provenance(a_cell(), alone)["rounding"] == 3


def test_bf16_is_for_gpus_that_have_it(alone, monkeypatch):
    protocol = a_cell(precision="bf16").protocol
    assert half_precision(protocol, alone) == torch.bfloat16
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla V100-SXM2-16GB")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    assert half_precision(protocol, CUDA) == torch.bfloat16
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    with pytest.raises(UserError, match=r"Tesla V100-SXM2-16GB has no bf16; set precision = \"mi"):
        half_precision(protocol, CUDA)


@pytest.mark.parametrize("model", [MODEL, "deeplabv3_mobilenet_v3_large"])
def test_in_bf16_only_the_network_computes_so(alone, model):
    """Weights, statistics, gradients and the loss stay in single precision."""
    computed_in = set()
    trainer = trainee_of(a_cell("WDLNWCE", model, precision="bf16"), alone)
    convolutions = [m for m in trainer.network.modules() if isinstance(m, nn.Conv2d)]
    for one in convolutions:
        one.register_forward_hook(lambda module, inputs, out: computed_in.add(out.dtype))
    values = train(trainer, range(3))
    assert computed_in == {torch.bfloat16}
    tensors = [t for t in everything(trainer.state()).values() if t.is_floating_point()]
    assert {tensor.dtype for tensor in tensors} == {torch.float32}
    assert {p.grad.dtype for p in trainer.network.parameters()} == {torch.float32}
    assert trainer.state()["scaler"] == {}

    exact = trainee_of(a_cell("WDLNWCE", model), alone)
    assert values == pytest.approx(train(exact, range(3)), rel=0.02)
    assert not torch.equal(weights(trainer), weights(exact))


def test_in_bf16_a_cell_that_was_saved_goes_on_to_the_same_bits(alone):
    cell = a_cell(precision="bf16")
    through, resumed = trainee_of(cell, alone), trainee_of(cell, alone)
    train(through, range(2))
    resumed.load(copy.deepcopy(through.state()))
    assert train(through, range(2, 4)) == train(resumed, range(2, 4))
    assert_equal_states(resumed.state(), through.state())


def test_a_grid_in_bf16_is_trained_and_counted(streets, tmp_path):
    grid = grid_of(tmp_path, streets.folder, "CE", "WDLNWCE", precision="bf16", epochs=1)
    assert job.main([str(task_of(grid))]) == 0
    found = results(grid.run)
    assert {*found} == {cell.name for cell in grid.cells}
    for head, counts in found.values():
        assert all(t.dtype == torch.float32 for t in head.values() if t.is_floating_point())
        assert counts["pixels"] > 0


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_provenance_of_bf16_says_what_the_processor_has_for_it(
    streets, tmp_path, monkeypatch, precision
):
    """Its bits differ between processors that torch calls the same; those of fp32 do not."""
    found = []
    for has in (False, True):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda has=has: has, raising=False)
        grid = grid_of(tmp_path / str(has), streets.folder, "CE", precision=precision, epochs=1)
        assert job.main([str(task_of(grid))]) == 0
        (path,) = grid.run.counts.glob("*.json")
        (provenance,) = read_index(path).record["provenance"]
        found.append(provenance["cpu"])
    without, with_amx = found
    assert with_amx.startswith(torch.backends.cpu.get_cpu_capability())
    assert ("amx" in with_amx) == (without != with_amx) == (precision == "bf16")


# --- fp16 with a scaler ------------------------------------------------------------------------
# as on a GPU; here the processor computes so, with torch's own scaler


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    monkeypatch.setattr(cell_trainer, "is_mixed", lambda *_: True)


def train_small(trainer, steps):
    """Fewer numbers than `train` has: a CPU is slow in fp16."""
    shares = [a_share(step, images=2, size=(960, 1, 2)) for step in steps]
    return [trainer.step(*share, step, TOTAL) for step, share in zip(steps, shares, strict=True)]


def with_scale(trainer, scale):
    """The same cell, whose losses are multiplied by `scale` for the backward pass."""
    state = copy.deepcopy(trainer.state())
    state["scaler"]["scale"] = scale
    trainer.load(state)


def test_a_gradient_out_of_fp16s_range_skips_the_update_and_keeps_the_position(alone, as_on_a_gpu):
    """Only the scale changes. The next step has the batch, dropout and learning rate of its own
    number, as without the skipped step."""
    trainer, without = (trainee_of(a_cell(precision="mixed"), alone) for _ in range(2))
    for one in (trainer, without):
        train_small(one, range(2))
        with_scale(one, 2.0**10)
    before, momentum = weights(trainer), everything(trainer.state()["momentum"])
    with_scale(trainer, 2.0**60)
    (value,) = train_small(trainer, [2])
    assert math.isfinite(value)
    assert torch.equal(weights(trainer), before)
    after = everything(trainer.state()["momentum"])
    assert all(torch.equal(after[name], momentum[name]) for name in momentum)
    assert trainer.failure is None
    assert trainer.state()["scaler"]["scale"] == 2.0**59

    with_scale(trainer, 2.0**10)
    train_small(trainer, [3]), train_small(without, [3])
    assert not torch.equal(weights(trainer), before)
    assert torch.equal(weights(trainer), weights(without))


def test_each_cell_has_a_scale_of_its_own(alone, as_on_a_gpu):
    one, other = (trainee_of(a_cell(loss, precision="mixed"), alone) for loss in ("WCE", "DL"))
    with_scale(one, 2.0**60), with_scale(other, 2.0**10)
    train_small(one, [0]), train_small(other, [0])
    assert one.state()["scaler"]["scale"] == 2.0**59
    assert other.state()["scaler"]["scale"] == 2.0**10


def test_in_fp16_a_cell_that_was_saved_goes_on_to_the_same_bits(alone, as_on_a_gpu):
    cell = a_cell(precision="mixed")
    through, resumed = trainee_of(cell, alone), trainee_of(cell, alone)
    with_scale(through, 2.0**60)
    train_small(through, range(2))
    resumed.load(copy.deepcopy(through.state()))
    assert train_small(through, range(2, 4)) == train_small(resumed, range(2, 4))
    assert_equal_states(resumed.state(), through.state())
    assert through.state()["scaler"]["scale"] < 2.0**60
