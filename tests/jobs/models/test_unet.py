"""U-Net on ResNet-50: its features are a list, which training, ranks, resuming and predicting take
as they take one tensor."""

import signal

import numpy as np
import pytest
import torch
from torch.nn import functional
from torchvision.models import resnet50
from torchvision.models.feature_extraction import create_feature_extractor

from data_prep.pack import pack
from data_prep.shards.reader import SplitReader
from hpc.distributed.preemption import StopRequest
from hpc.storage.atomic import read_json
from jobs import pretrain, train
from jobs.models.build import build_backbone, build_head
from jobs.models.registry import FEATURE_CHANNELS
from jobs.spec.counts_file import read_counts, read_index
from jobs.spec.task import Task, write_task
from jobs.training import cell_trainer
from jobs.training.backbone import freeze
from jobs.training.cell_trainer import CellTrainer
from jobs.training.predictor import Predictor
from tests.jobs.cells import CLASS_WEIGHTS, IMAGES, a_cell, a_share
from tests.jobs.ranks import on_ranks
from tests.pipeline.grids import small_grid

UNET, PYRAMID = "unet_resnet50", "resnet50_pyramid"
SIZES = [(64, 96), (45, 67), (33, 31), (1, 1)]


@pytest.fixture(scope="module")
def backbone():
    """In evaluation mode, with the statistics of two images."""
    backbone = build_backbone(PYRAMID, 0, momentum=1.0)
    backbone(images_of((64, 96)))
    return backbone.eval()


def images_of(size, count=2):
    return torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(1))


# --- the network ------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("size", SIZES)
def test_features_are_those_of_an_undilated_resnet_at_five_strides(backbone, size):
    classifier = resnet50(weights=None)
    state = {k.removeprefix("backbone."): v for k, v in backbone.state_dict().items()}
    assert classifier.load_state_dict(state, strict=False).missing_keys == ["fc.weight", "fc.bias"]
    names = ["relu", "layer1", "layer2", "layer3", "layer4"]
    expected = create_feature_extractor(classifier.eval(), names)(images_of(size))
    found = backbone(images_of(size))
    for name, features, stride in zip(names, found, (2, 4, 8, 16, 32), strict=True):
        assert features.shape[2:] == tuple(-(-length // stride) for length in size)
        assert torch.equal(features, expected[name])
    assert tuple(features.shape[1] for features in found) == FEATURE_CHANNELS[PYRAMID]


@torch.no_grad()
@pytest.mark.parametrize("size", SIZES)
def test_the_decoder_written_down_once_more(backbone, size):
    """Upsample, join with the skip, twice convolve, normalise and cut; classify at stride 2."""
    head = build_head(UNET, 5, 0, momentum=1.0)
    head(backbone(images_of((64, 96))))
    head.eval()
    tensors = iter(head.state_dict().values())
    *skips, x = backbone(images_of(size))
    for skip, width in zip(skips[::-1], (256, 128, 64, 32), strict=True):
        x = functional.interpolate(x, skip.shape[2:], mode="bilinear")
        x = torch.cat([skip, x], 1)
        for _ in range(2):
            x = functional.conv2d(x, next(tensors), padding=1)
            weight, bias, mean, variance, _ = (next(tensors) for _ in range(5))
            x = functional.batch_norm(x, mean, variance, weight, bias).relu()
        assert x.shape[1] == width
    expected = functional.conv2d(x, next(tensors), next(tensors))
    found = head(backbone(images_of(size)))
    assert found.shape == (2, 5, -(-size[0] // 2), -(-size[1] // 2))
    assert expected.std() > 0.1
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


# --- ranks ------------------------------------------------------------------------------------


def step_on(group):
    """One step of a rank on its share of five images, of which the first two have no label: the
    update, as a vector, thinned out."""
    torch.set_default_dtype(torch.float64)
    cell = a_cell("WDLNWCE", UNET, learning_rate=0.1)
    trained = CellTrainer(cell, 3, CLASS_WEIGHTS, group)
    before = thinned_out(trained.network)
    images, batch, target = a_share(2, group.rank, group.world_size, 5, (0, 1), IMAGES)
    with torch.no_grad():
        inputs = build_backbone(PYRAMID, 0, 0.1).eval()(images)
    trained.step(inputs, batch, target, 2, 5)
    return thinned_out(trained.network) - before


def thinned_out(network):
    return torch.cat([p.detach().flatten()[::50] for p in network.parameters()])


def test_two_ranks_change_nothing_but_rounding(tmp_path):
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
    (expected,) = on_ranks(1, tmp_path / "one", step_on)
    found = on_ranks(2, tmp_path / "two", step_on)
    assert torch.equal(*found) and expected.norm() > 0
    assert float((found[0] - expected).norm() / expected.norm()) < 1e-10


# --- a run ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """A grid of U-Nets with odd crops, and its data set."""
    folder = tmp_path_factory.mktemp("unet")
    grid = small_grid(
        folder,
        ('["fcn_mobilenet_v3_large", "deeplabv3_mobilenet_v3_large"]', f'["{UNET}"]'),
        ("seeds = [0, 1]", "seeds = [0]"),
        ("crop = [32, 32]", "crop = [40, 36]"),
        ('weights = "none"', 'weights = "pretrain"\nlearning_rate = 0.05\nworkers = 0'),
        more="[protocol.pretrain]\nepochs = 1\nbatch_size = 3\n",
    )
    return grid, pack("streets", grid.datasets["streets"], processes=1)


def task_of(grid, run, cells, kind="bundle"):
    settings = grid.datasets["streets"]
    return Task(
        kind=kind, name="task", run=str(run), data=settings.shards, origin=settings.origin(),
        cells=tuple(cells),
    )  # fmt: skip


def with_weights(cells, weights):
    changed = [cell.protocol.model_copy(update={"weights": weights}) for cell in cells]
    return [c.model_copy(update={"protocol": p}) for c, p in zip(cells, changed, strict=True)]


def results(task):
    """Trained weights and counts by cell name."""
    (path,) = task.paths.counts.glob("*.json")
    index = read_index(path)
    arrays = read_counts(index)
    return {
        cell["name"]: (
            torch.load(task.paths.head(cell["signature"]), weights_only=True)["weights"],
            {name: array[position] for name, array in arrays.items()},
        )
        for position, cell in enumerate(map(index.of_cell, index.signatures))
    }


def assert_same(one, other):
    for mine, yours in zip(one, other, strict=True):
        assert mine.keys() == yours.keys()
        for name in mine:
            assert np.array_equal(mine[name], yours[name]), name


@pytest.fixture(scope="module")
def bundle(packed, tmp_path_factory):
    """A job that trained both losses on a random backbone, undisturbed."""
    grid, _ = packed
    task = task_of(grid, tmp_path_factory.mktemp("through"), with_weights(grid.cells, "none"))
    assert train.main([str(write_task(task))]) == 0
    return task


class StopAfter(StopRequest):
    """Asks for a stop when it has been looked at so many times, once a step."""

    def __init__(self, steps):
        super().__init__()
        self._left = steps

    def __bool__(self):
        self._left -= 1
        if self._left <= 0:
            self.signal = signal.SIGTERM
        return self.signal is not None


def test_alone_stopped_and_resumed_it_becomes_what_it_is_in_an_undisturbed_bundle(
    packed, bundle, tmp_path, alone, capfd
):
    grid, _ = packed
    cell = bundle.cells[1]
    task = task_of(grid, tmp_path / "run", [cell])
    train.train_bundle(task, alone, StopAfter(4))
    assert not task.paths.counts.exists()
    train.train_bundle(task, alone, StopRequest())
    assert "resuming at step 4" in capfd.readouterr().err
    assert_same(results(task)[cell.name], results(bundle)[cell.name])


def test_an_image_is_labelled_as_it_was_in_the_evaluation(packed, bundle, alone):
    _, manifest = packed
    cell = bundle.cells[0]
    predictor = Predictor(bundle.paths.head(cell.signature), bundle.paths, alone)
    num_classes = len(manifest.classes)
    confusion = np.zeros((num_classes, num_classes), np.int64)
    reader = SplitReader(manifest, "val")
    for position in range(len(reader)):
        pixels, labels = reader.image(position), reader.label(position)
        predicted = predictor.predict(pixels).labels
        known = labels < num_classes
        np.add.at(confusion, (labels[known], predicted[known]), 1)
    _, counts = results(bundle)[cell.name]
    assert confusion.sum() > 0 and np.array_equal(confusion, counts["confusion"])


def test_a_backbone_of_its_own_is_pre_trained_where_no_weights_exist(packed):
    """Its features fit no other head, so a U-Net trains it."""
    grid, _ = packed
    task = task_of(grid, grid.run.root, grid.cells[:1], "pretrain")
    assert pretrain.main([str(write_task(task))]) == 0
    path = task.paths.backbone(grid.cells[0].backbone_key)
    assert read_json(path.with_suffix(".json"))["model"] == UNET
    learnt = torch.load(path, weights_only=True)
    drawn = build_backbone(PYRAMID, 0, momentum=0.1).state_dict()
    assert learnt.keys() == drawn.keys()
    assert not torch.equal(learnt["backbone.conv1.weight"], drawn["backbone.conv1.weight"])

    task = task_of(grid, grid.run.root, grid.cells)
    assert train.main([str(write_task(task))]) == 0
    (path,) = task.paths.counts.glob("*.json")
    assert set(read_index(path).columns["backbone"]) == {
        read_json(task.paths.backbone(grid.cells[0].backbone_key).with_suffix(".json"))["sha256"]
    }


def test_mixed_precision_takes_a_list_of_features_too(alone, monkeypatch):
    """As on a GPU; here the processor computes in float16."""
    monkeypatch.setattr(cell_trainer, "is_mixed", lambda protocol, group: True)
    cell = a_cell("WDLCE", UNET)
    trained = CellTrainer(cell, 3, CLASS_WEIGHTS, alone)
    backbone = build_backbone(PYRAMID, 0, momentum=0.1)
    freeze(backbone, cell)
    _, batch, target = a_share(0, images=2, size=IMAGES)
    inputs = train.features(backbone, batch.images[..., :16, :16], cell, alone)
    assert {features.dtype for features in inputs} == {torch.float16}
    before = thinned_out(trained.network)
    assert np.isfinite(trained.step(inputs, batch, target, 0, 5))
    moved = thinned_out(trained.network) - before
    assert torch.isfinite(moved).all() and moved.norm() > 0
