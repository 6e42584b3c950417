"""A trained head labels images with its run's backbone, or is refused in one line."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hpc import checkpoint
from hpc.command import UserError
from jobs.cell import RunPaths
from jobs.models.build import build_head
from jobs.predictor import Predictor
from tests.jobs.cells import a_cell

pytestmark = pytest.mark.usefixtures("one_thread")
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
