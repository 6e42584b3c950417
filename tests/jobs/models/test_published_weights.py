"""torchvision's published files fit our networks name by name; one that does not is refused."""

import pytest
import torch

from data_prep.weights import FILES, weights_path
from hpc.cli import UserError
from jobs.models.build import build_head
from jobs.spec.run_paths import RunPaths
from jobs.training import backbone as backbones
from jobs.training.backbone import load_backbone, start_head
from tests.jobs.cells import a_cell
from tests.jobs.models.published import publish, state_of

MOBILENET, COCO_MOBILE = "fcn_mobilenet_v3_large", "deeplabv3_mobilenet_v3_large"
# One of the models that share an ImageNet file is enough, and COCO's files are those of pre-fine.
PUBLISHED = [
    (weights, model)
    for weights, model in FILES
    if weights == "pre-fine"
    or (weights == "imagenet" and model.startswith(("fcn", "unet")))
    or (weights == "coco" and "mobilenet" in model)
]


@pytest.fixture
def start(tmp_path, alone, monkeypatch):
    """Start a backbone and a head from a file of a published name, whose content is made up."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(backbones, "check_published", lambda path: None)

    def start(weights, model, **changes):
        publish(weights, model, **changes)
        loaded = load_backbone(a_cell(model=model, weights=weights), RunPaths(tmp_path), alone)
        head = build_head(model, 21, seed=0, momentum=0.1)
        start_head(head, loaded)
        return loaded.module.state_dict(), head.state_dict()

    return start


@pytest.mark.parametrize(("weights", "model"), PUBLISHED)
def test_a_published_file_fits_name_by_name(start, weights, model):
    """Of COCO's, pre-fine takes all but the auxiliary head, and `coco` the backbone."""
    backbone, head = start(weights, model)
    file = state_of(weights, model)
    left = set(file)
    for name, tensor in backbone.items():
        inner = name.removeprefix("backbone.") if weights == "imagenet" else name
        inner = inner if inner in file else f"features.{inner}"
        assert torch.all(tensor == file[inner])
        left.remove(inner)
    for name, tensor in head.items() if weights == "pre-fine" else ():
        assert torch.all(tensor == file[f"classifier.{name}"])
        left.remove(f"classifier.{name}")
    of_imagenet = {"classifier"} if "mobilenet" in model else {"fc"}
    expected = {"coco": {"classifier", "aux_classifier"}, "pre-fine": {"aux_classifier"}}
    assert {name.partition(".")[0] for name in left} == expected.get(weights, of_imagenet)


@pytest.mark.parametrize(
    ("weights", "model", "changes", "message"),
    [
        ("imagenet", MOBILENET, {"features.3.block.1.0.weight": None},
         "has no 'backbone.3.block.1.0.weight'"),
        ("imagenet", MOBILENET, {"features.0.0.weight": torch.zeros(16, 1, 3, 3)},  # of grey images
         "'backbone.0.0.weight' has shape (16, 1, 3, 3), not (16, 3, 3, 3)"),
        ("imagenet", MOBILENET, {"aux_classifier.0.weight": torch.zeros(1)},
         "has 'backbone.aux_classifier.0.weight', which the network does not have"),
        ("coco", COCO_MOBILE, {"backbone.3.block.1.0.weight": None},
         "has no 'backbone.3.block.1.0.weight'"),
        ("coco", COCO_MOBILE, {"fc.weight": torch.zeros(1)},
         "has 'fc.weight', which the network does not have"),
        ("pre-fine", COCO_MOBILE, {"backbone.0.1.bias": None}, "has no 'backbone.0.1.bias'"),
        ("pre-fine", COCO_MOBILE, {"extra.weight": torch.zeros(1)},
         "has 'extra.weight', which the network does not have"),
        ("pre-fine", COCO_MOBILE, {"classifier.4.bias": None}, "has no 'classifier.4.bias'"),
        ("pre-fine", COCO_MOBILE, {"classifier.5.weight": torch.zeros(1)},
         "has 'classifier.5.weight', which the network does not have"),
        ("pre-fine", COCO_MOBILE, {"classifier.1.weight": torch.zeros(512, 256, 3, 3)},
         "'classifier.1.weight' has shape (512, 256, 3, 3), not (256, 256, 3, 3)"),
        ("pre-fine", COCO_MOBILE, {"classifier.4.weight": torch.zeros(11, 256, 1, 1)},
         "'classifier.4.weight' has shape (11, 256, 1, 1), not (21, 256, 1, 1)"),
    ],
)  # fmt: skip
def test_one_tensor_missing_or_too_many_or_of_another_shape(
    start, weights, model, changes, message
):
    with pytest.raises(UserError) as error:
        start(weights, model, **changes)
    found = str(error.value)
    assert message in found and "\n" not in found
    assert found.startswith(str(weights_path(weights, model)))
