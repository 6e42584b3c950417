"""In half precision on a GPU, weights, features and logits are channels-last.

Here a CPU uses that memory format: the numbers are the same, and files do not change.
"""

import copy
import io
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from hpc.storage import checkpoint
from jobs import train as job
from jobs.models import memory_format as layout
from jobs.models.build import build_backbone, build_head
from jobs.models.memory_format import memory_format
from jobs.models.registry import MODELS
from jobs.spec.run_paths import RunPaths
from jobs.train import features
from jobs.training.backbone import LoadedBackbone
from jobs.training.cell_trainer import CellTrainer
from jobs.training.job_run import JobRun
from jobs.training.predictor import Predictor
from tests.jobs.cells import CLASS_WEIGHTS, IMAGES, MODEL, a_cell, a_share
from tests.jobs.ranks import on_ranks
from tests.jobs.small_runs import grid_of, results, task_of
from tests.jobs.training.test_cell_trainer import (
    TOTAL,
    assert_equal_states,
    everything,
    trainee_of,
    weights,
)

DEEPLAB, UNET = "deeplabv3_mobilenet_v3_large", "unet_resnet50"


def as_on_a_gpu(patch):
    patch.setattr(layout, "memory_format", lambda *_: torch.channels_last)


@pytest.fixture
def on_a_gpu(monkeypatch):
    as_on_a_gpu(monkeypatch)


def train(trainer, steps):
    return [trainer.step(*a_share(step), step, TOTAL) for step in steps]


def saved(state):
    file = io.BytesIO()
    torch.save(state, file)
    return file.getvalue()


@pytest.mark.parametrize("fp32", [torch.channels_last, torch.contiguous_format])
def test_half_precision_on_a_gpu_has_channels_last_and_fp32_what_was_chosen(monkeypatch, fp32):
    monkeypatch.setattr(layout, "FP32_ON_GPU", fp32)
    on_gpu = {p: memory_format(torch.device("cuda", 1), p) for p in ("fp32", "mixed", "bf16")}
    assert on_gpu == {"fp32": fp32, "mixed": torch.channels_last, "bf16": torch.channels_last}


def test_a_processor_takes_what_there_is():
    for precision in ("fp32", "mixed", "bf16"):
        assert memory_format(torch.device("cpu"), precision) == torch.preserve_format


def test_fp32_stays_with_cudnn_under_deterministic_algorithms(monkeypatch):
    """Dilated convolutions of contiguous tensors would not."""
    monkeypatch.setattr(layout, "FP32_ON_GPU", torch.contiguous_format)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        found = memory_format(torch.device("cuda"), "fp32")
    finally:
        torch.use_deterministic_algorithms(before)
    assert found == torch.channels_last
    assert memory_format(torch.device("cuda"), "fp32") == torch.contiguous_format


# --- everywhere -------------------------------------------------------------------------------


def strays(module):
    """The modules inside `module` that take or give features which lie otherwise, once it ran.

    Images lie as they were read: the first convolution reorders them.
    """
    found = []

    def look(name, tensors):
        flat = [t for one in tensors for t in (one if isinstance(one, list) else [one])]
        maps = [t for t in flat if isinstance(t, torch.Tensor) and t.dim() == 4]
        maps = [t for t in maps if t.shape[1:] != IMAGES]
        if not all(t.is_contiguous(memory_format=torch.channels_last) for t in maps):
            found.append(name)

    for name, child in module.named_modules():
        if not isinstance(child, nn.ModuleDict):  # torchvision's, whose outputs have names
            child.register_forward_hook(lambda _, i, out, name=name: look(name, [*i, out]))
    return found


# every kind of backbone and of head
@pytest.mark.parametrize("model", ["fcn_resnet50", DEEPLAB, UNET])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_all_features_lie_so_and_so_do_gradients(alone, on_a_gpu, model, precision):
    cell = a_cell(model=model, train="all", precision=precision)
    backbone = build_backbone(MODELS[model].backbone, 0, 0.1)
    trainer = CellTrainer(cell, 3, CLASS_WEIGHTS, alone, backbone)
    found = strays(trainer.network)
    _, batch, target = a_share(0, images=2, size=IMAGES)
    trainer.step(features(None, batch.images, cell, alone), batch, target, 0, TOTAL)
    assert found == []
    strides = [(p.stride(), p.grad.stride()) for p in trainer.network.parameters()]
    assert [pair for pair in strides if pair[0] != pair[1]] == []
    kernels = [p for p in trainer.network.parameters() if p.dim() == 4]
    assert any(not kernel.is_contiguous() for kernel in kernels)


@pytest.fixture
def in_double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("model", [MODEL, DEEPLAB])
def test_only_rounding_differs(alone, in_double, monkeypatch, model):
    cell = a_cell("WDLNWCE", model, learning_rate=0.1)
    usual = trainee_of(cell, alone)
    start = weights(usual)
    losses = train(usual, range(3))
    as_on_a_gpu(monkeypatch)
    other = trainee_of(cell, alone)
    assert train(other, range(3)) == pytest.approx(losses, rel=1e-10)
    assert (weights(other) - weights(usual)).norm() < 1e-10 * (weights(usual) - start).norm()


def weights_on_ranks(group):
    """Return the weights at the start, and trained in the usual layout and as on a GPU."""
    torch.set_default_dtype(torch.float64)
    found = []
    with pytest.MonkeyPatch.context() as patch:
        for prepare in (lambda _: None, as_on_a_gpu):
            prepare(patch)
            trainer = trainee_of(a_cell("WDLWCE", DEEPLAB, learning_rate=0.1), group)
            start = weights(trainer)
            for step in range(3):
                trainer.step(*a_share(step, group.rank, group.world_size), step, TOTAL)
            found.append(weights(trainer))
    return start, *found


def test_ranks_reduce_such_gradients_too(tmp_path):
    (start, usual, ours), (_, _, others) = on_ranks(2, tmp_path, weights_on_ranks)
    assert torch.equal(ours, others)
    assert (ours - usual).norm() < 1e-10 * (usual - start).norm()


# --- files ------------------------------------------------------------------------------------


def test_a_file_is_the_same_byte_for_byte(alone, monkeypatch):
    """A kernel of 1 x 1 too, whose strides alone would differ."""
    usual = trainee_of(a_cell(model=DEEPLAB), alone)
    train(usual, [0])
    as_on_a_gpu(monkeypatch)
    other = trainee_of(a_cell(model=DEEPLAB), alone)
    train(other, [0])
    assert other.state_matches({**usual.state(), "backbone": {}}, {})
    other.load(copy.deepcopy(usual.state()))
    assert not all(p.is_contiguous() for p in other.network.parameters())
    assert saved(other.state()) == saved(usual.state())

    assert usual.state_matches({**other.state(), "backbone": {}}, {})
    train(other, [1])
    usual.load(other.state())
    assert all(p.is_contiguous() for p in usual.network.parameters())
    assert_equal_states(usual.state(), other.state())


def test_what_a_gpu_saves_loads_without_one(alone, monkeypatch):
    """torch's fake tensors have a device and a memory format, and no data."""
    written = []
    monkeypatch.setattr(
        checkpoint, "write_tensors", lambda _, content, *__: written.append(content)
    )
    monkeypatch.setattr(checkpoint, "save", lambda *a: written.extend(dict(a[3]).values()))
    cell = a_cell(model=DEEPLAB, backbone_batchnorm="train")
    trainer = trainee_of(cell, alone)
    task = SimpleNamespace(cells=[cell], paths=RunPaths("run"))
    run = mock.Mock(task=task, bundle_key="bundle", inputs={}, _started=(0, 0))
    with FakeTensorMode(), torch.device("cuda"):
        backbone = build_backbone("mobilenet_v3_large", 0, 0.1)
        trainer.network = build_head(DEEPLAB, 3, 0, 0.1)
        for one in trainer._optimizer.state.values():
            one["momentum_buffer"] = torch.empty(5, 3).T
        JobRun._write_checkpoint(run, 1, [trainer], backbone)
        loaded = LoadedBackbone(backbone, "")
        job.save_head(run, trainer, SimpleNamespace(classes=["a"]), loaded)
        state, head = written
        for part in (state["network"], state["backbone"], head["weights"], head["backbone"]):
            assert {(t.device.type, t.is_contiguous()) for t in part.values()} == {("cpu", True)}
        for one in state["momentum"].values():
            assert one["momentum_buffer"].is_cpu and one["momentum_buffer"].is_contiguous()


@pytest.mark.parametrize("model", [MODEL, DEEPLAB])
def test_a_cell_that_was_saved_goes_on_to_the_same_bits(alone, on_a_gpu, model):
    through, resumed = (trainee_of(a_cell("WDLAWCE", model), alone) for _ in range(2))
    train(through, range(2))
    resumed.load(torch.load(io.BytesIO(saved(through.state())), weights_only=True))
    for one in (through, resumed):
        kernels = [m["momentum_buffer"] for m in one._optimizer.state.values()]
        kernels = [kernel for kernel in kernels if kernel.dim() == 4]
        assert all(k.is_contiguous(memory_format=torch.channels_last) for k in kernels)
    assert train(through, range(2, 4)) == train(resumed, range(2, 4))
    assert_equal_states(resumed.state(), through.state())


def test_a_trained_head_labels_images_in_either_way(streets, tmp_path, monkeypatch, request):
    grid = grid_of(tmp_path / "grid", streets.folder, "WDLNWCE", workers=0)
    with monkeypatch.context() as patch:
        as_on_a_gpu(patch)
        assert job.main([str(task_of(grid))]) == 0
    ((head, counts),) = results(grid.run).values()
    assert counts["images"] == 3
    assert all(tensor.is_contiguous() for tensor in everything(head).values())
    (cell,) = grid.cells
    image = np.random.default_rng(0).integers(0, 256, (40, 56, 3), np.uint8)
    alone = request.getfixturevalue("alone")  # the job had a process group of its own
    usual = Predictor(grid.run.head(cell.signature), RunPaths(grid.run.root), alone)
    as_on_a_gpu(monkeypatch)
    other = Predictor(grid.run.head(cell.signature), RunPaths(grid.run.root), alone)
    one, two = usual.predict(image), other.predict(image)
    assert np.allclose(one.confidence, two.confidence, atol=1e-5)
    assert (one.labels == two.labels).mean() > 0.99
