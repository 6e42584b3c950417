"""A trained head labels images with its run's backbone as evaluation scored them, or is refused in
one line."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torchvision import models

from data_prep.shards.reader import SplitReader
from data_prep.weights import weights_path
from hpc.cli import UserError
from hpc.distributed.preemption import StopRequest
from hpc.storage import checkpoint
from jobs import pretrain, train
from jobs.models.build import build_head, seeded
from jobs.spec.run_paths import RunPaths
from jobs.spec.task import Task
from jobs.training import backbone, evaluate
from jobs.training.predictor import Predictor
from tests.jobs.cells import MODEL, a_cell
from tests.jobs.small_runs import results

IMAGE = np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8)


@pytest.fixture
def head(tmp_path):
    """A head as training leaves it, with other content where a test asks for it."""

    def head(**changes):
        cell = a_cell()
        content = {
            "cell": cell.model_dump(mode="json"),
            "classes": ["road", "car", "sky"],
            "backbone_sha256": "",
            "backbone": {},
            "weights": build_head(cell.model, 3, 0, 0.1).state_dict(),
        }
        path = RunPaths(tmp_path).head(cell.signature)
        checkpoint.write_tensors(path, {**content, **changes})
        return path

    return head


def refusal(path, group):
    with pytest.raises(UserError) as refused:
        Predictor(path, RunPaths(path.parent.parent), group)
    message = str(refused.value)
    assert message.startswith(str(path)) and "\n" not in message
    return message


def test_a_head_labels_an_image_at_its_own_size(head, alone):
    path = head()
    prediction = Predictor(path, RunPaths(path.parent.parent), alone).predict(IMAGE)
    assert prediction.labels.shape == prediction.confidence.shape == (40, 50)
    assert prediction.labels.dtype == np.uint8 and set(np.unique(prediction.labels)) <= {0, 1, 2}
    assert (prediction.confidence > 1 / 3).all() and (prediction.confidence <= 1).all()


def test_a_head_of_another_network(head, alone):
    other = build_head("fcn_resnet50", 3, 0, 0.1).state_dict()
    assert "holds weights of another network" in refusal(head(weights=other), alone)
    assert "holds weights of another network" in refusal(head(weights=3), alone)


def test_a_head_that_was_trained_on_another_backbone(head, alone):
    assert "on another backbone" in refusal(head(backbone_sha256="0123"), alone)


@pytest.mark.parametrize("change", [{"cell": {}}, {"cell": 3}, {"classes": None, "cell": None}])
def test_what_is_no_head(head, alone, change):
    assert "is not a trained head" in refusal(head(**change), alone)


def test_a_flipped_bit_of_a_head(head, alone):
    """torch itself reads it as another number."""
    path = head()
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert torch.load(path, weights_only=True)
    assert "is not a trained head (BadZipFile)" in refusal(path, alone)


def test_running_statistics_that_are_missing_or_of_another_backbone(head, alone):
    """Without them a head would label images with logits that evaluation never scored."""
    moving = a_cell(backbone_batchnorm="train").model_dump(mode="json")
    lacking = "does not hold the running statistics that its backbone had in training: it holds "
    assert f"{lacking}none; train it again" in refusal(head(cell=moving), alone)
    other = {"backbone.0.1.running_mean": torch.zeros(16)}
    assert f"{lacking}those of another" in refusal(head(cell=moving, backbone=other), alone)
    assert f"{lacking}those of another" in refusal(head(backbone=other), alone)


# --- what was scored --------------------------------------------------------------------------

DEEPLAB = "deeplabv3_mobilenet_v3_large"
# settings of the protocol beside those of `scored`, and the model where it is not the FCN
PROTOCOLS = [
    {},
    {"backbone_batchnorm": "train"},
    {"backbone_batchnorm": "train", "weights": "imagenet"},
    {"backbone_batchnorm": "train", "weights": "coco", "model": DEEPLAB},
    {"backbone_batchnorm": "train", "weights": "pre-fine", "model": DEEPLAB},
    {"backbone_batchnorm": "train", "weights": "pretrain", "model": DEEPLAB},
    {"backbone_batchnorm": "train", "weights": "own"},
    {"backbone_batchnorm": "train", "precision": "bf16", "eval_size": 30, "long_side": "truncate"},
    {"backbone_batchnorm": "train", "batchnorm_momentum": 1.0, "counting": "fused"},
    {"train": "all"},
    {"train": "all", "backbone_batchnorm": "train", "weights": "imagenet"},
    {"train": "all", "precision": "bf16", "eval_size": 64},
]


def drawn(weights):
    """The state of a file of `weights` with random numbers; pre-fine has the streets' 8 classes."""
    with seeded("published"):
        if weights == "imagenet":
            return models.mobilenet_v3_large().state_dict()
        builder = models.segmentation.deeplabv3_mobilenet_v3_large
        return builder(weights_backbone=None, num_classes=8, aux_loss=True).state_dict()


@pytest.fixture
def scored(tmp_path, alone, streets, monkeypatch):
    """Train a cell in a job; its task, and the logits that evaluation scored, image by image."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(backbone, "check_published", lambda path: None)
    seen = []
    honest = evaluate.count

    def count(logits, *others):
        seen.append(logits.clone())
        return honest(logits, *others)

    monkeypatch.setattr(evaluate, "count", count)

    def scored(model=MODEL, weights="none", **protocol):
        if weights == "own":
            weights = str(tmp_path / "own.pth")
        if weights not in ("none", "pretrain"):
            path = weights_path(weights, model)
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.save(drawn(weights), path)
        small = {"epochs": 1, "batch_size": 4, "learning_rate": 0.1, "resize": (40, 56),
                 "crop": (32, 32), "eval_size": 0, "threads": 1, "workers": 0,
                 "counting": "reference", "pretrain": {"epochs": 1, "batch_size": 4}}  # fmt: skip
        cell = a_cell("CE", model, weights=weights, **{**small, **protocol})
        data = {"data": str(streets.folder), "origin": streets.origin}
        task = Task(kind="bundle", name="job", run=str(tmp_path / "run"), **data, cells=(cell,))
        if weights == "pretrain":
            first = task.model_copy(update={"kind": "pretrain"})
            pretrain.pretrain_backbone(first, alone, StopRequest())
            seen.clear()
        train.train_bundle(task, alone, StopRequest())
        return task, seen

    return scored


@pytest.mark.parametrize(
    "settings", PROTOCOLS, ids=lambda settings: " ".join(map(str, settings.values())) or "plain"
)
def test_what_is_saved_reproduces_what_was_scored_to_the_bit(settings, scored, streets, alone):
    task, seen = scored(**settings)
    (cell,) = task.cells
    torch.set_num_threads(2)  # as a login node may have more than the job had
    predictor = Predictor(task.paths.head(cell.signature), task.paths, alone)
    reader, confusion = SplitReader(streets, "val"), np.zeros((8, 8), np.int64)
    assert len(seen) == len(reader) and torch.get_num_threads() == cell.protocol.threads
    for position, logits in enumerate(seen):
        assert torch.equal(predictor.logits(reader.image(position))[0], logits)
        labels, predicted = reader.label(position), predictor.predict(reader.image(position)).labels
        known = labels < 8
        np.add.at(confusion, (labels[known], predicted[known]), 1)
    if cell.protocol.eval_size == 0:  # else scored at another size than images are labelled at
        _, counts = results(task.paths)[cell.name]
        assert confusion.sum() > 0 and np.array_equal(confusion, counts["confusion"])
