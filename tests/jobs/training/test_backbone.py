"""The backbone of a bundle comes from the file that its protocol names, or the file is refused."""

import hashlib
import io
import os

import pytest
import torch
from torchvision import models
from torchvision.models import segmentation

from data_prep.weights import weights_path
from hpc.cli import UserError
from hpc.storage import checkpoint
from hpc.storage.atomic import Damaged, file_sha256, write_json
from jobs.models.build import build_backbone, seeded
from jobs.spec.run_paths import RunPaths
from jobs.training.backbone import freeze, load_backbone, moving_buffers
from tests.jobs.cells import a_cell
from tests.jobs.models.published import state_of

MOBILENET, RESNET = "fcn_mobilenet_v3_large", "fcn_resnet50"


@pytest.fixture
def load(tmp_path, alone):
    """Load the backbone of a model from a weights file, as a job would."""

    def load(weights, model=MOBILENET, **protocol):
        cell = a_cell(model=model, weights=str(weights), **protocol)
        return load_backbone(cell, RunPaths(tmp_path / "run"), alone)

    return load


def drawn(builder, **options):
    """A network of torchvision with random weights."""
    with seeded("torchvision's"):
        return builder(weights=None, **options)


def saved(state, path):
    torch.save(state, path)
    return path


def refusal(load, *arguments, **options):
    """The one line by which a weights file is refused."""
    with pytest.raises(UserError) as error:
        load(*arguments, **options)
    message = str(error.value)
    assert "\n" not in message and len(message) < 600
    return message


def equal(state, other):
    return state.keys() == other.keys() and all(torch.equal(state[k], other[k]) for k in state)


# --- files that fit ---------------------------------------------------------------------------


@pytest.mark.parametrize("counter", [True, False], ids=["with", "without num_batches_tracked"])
def test_the_file_of_a_classifier(load, tmp_path, counter):
    """As torchvision publishes ImageNet's, from before batch norm had a counter."""
    classifier = drawn(models.resnet50).state_dict()
    if not counter:
        classifier = {k: v for k, v in classifier.items() if "num_batches_tracked" not in k}
    path = saved(classifier, tmp_path / "resnet50.pth")
    loaded = load(path, RESNET)
    assert loaded.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()

    theirs = segmentation.fcn_resnet50(weights=None, weights_backbone=None).backbone
    left = theirs.load_state_dict(classifier, strict=False)
    assert left.unexpected_keys == ["fc.weight", "fc.bias"]
    assert all("num_batches_tracked" in name for name in left.missing_keys)
    assert equal(loaded.module.backbone.state_dict(), theirs.state_dict())


def test_the_file_of_a_mobile_classifier_whose_features_have_another_name(load, tmp_path):
    classifier = drawn(models.mobilenet_v3_large)
    path = saved(classifier.state_dict(), tmp_path / "mobilenet.pth")
    expected = classifier.features.state_dict()
    assert equal(load(path).module.backbone.state_dict(), expected)


@pytest.mark.parametrize("auxiliary", [True, False])
def test_the_file_of_a_segmentation_model(load, tmp_path, auxiliary):
    """As torchvision publishes COCO's; its heads are left out."""
    builder = segmentation.deeplabv3_mobilenet_v3_large
    model = drawn(builder, weights_backbone=None, aux_loss=auxiliary)
    path = saved(model.state_dict(), tmp_path / "coco.pth")
    assert equal(load(path).module.backbone.state_dict(), model.backbone.state_dict())


def test_random_weights_are_drawn_from_the_seed(load):
    loaded = load("none")
    assert loaded.sha256 == ""
    expected = build_backbone("mobilenet_v3_large", 0, momentum=0.1)
    assert equal(loaded.module.state_dict(), expected.state_dict())


# --- the backbone that was trained here -------------------------------------------------------


@pytest.fixture
def pretrained(tmp_path):
    """The file of a backbone that `jobs.pretrain` trained, and its weights."""
    state = build_backbone("mobilenet_v3_large", seed=7, momentum=0.1).state_dict()
    path = RunPaths(tmp_path / "run").backbone(a_cell(weights="pretrain").backbone_key)
    checkpoint.write_tensors(path, state)
    write_json(path.with_suffix(".json"), {"sha256": file_sha256(path)})
    return path, state


@pytest.mark.parametrize("model", [MOBILENET, "deeplabv3_mobilenet_v3_large"])
def test_a_backbone_that_was_trained_here(load, pretrained, model):
    path, state = pretrained
    loaded = load("pretrain", model)
    assert equal(loaded.module.state_dict(), state)
    assert loaded.sha256 == file_sha256(path)


def test_a_damaged_backbone_of_our_own_is_refused(load, pretrained):
    path, _ = pretrained
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(Damaged, match=f"{path.name} is damaged; delete it and run grid again"):
        load("pretrain")


@pytest.mark.parametrize("lost", [".pt", ".json"])
def test_a_backbone_of_our_own_that_is_not_there(load, pretrained, lost):
    path, _ = pretrained
    path.with_suffix(lost).unlink()
    assert "is missing; run grid again" in refusal(load, "pretrain")


# --- files that do not fit --------------------------------------------------------------------


def test_weights_of_another_network(load, tmp_path):
    path = saved(drawn(models.mobilenet_v3_large).state_dict(), tmp_path / "mobilenet.pth")
    message = refusal(load, path, RESNET)
    assert message.startswith(f"{path} has no 'backbone.") and "another network?" in message


def test_weights_of_a_deeper_network_of_the_same_family(load, tmp_path):
    """All that a ResNet-50 needs is in a ResNet-101's file, and fits."""
    path = saved(state_of("imagenet", "fcn_resnet101"), tmp_path / "own.pth")
    message = refusal(load, path, RESNET)
    assert "has 'backbone.layer3.6.conv1.weight', which the network does not have" in message


def test_a_weight_that_is_not_finite(load, tmp_path):
    state = drawn(models.mobilenet_v3_large).state_dict()
    state["features.0.0.weight"][0, 0, 0, 0] = float("nan")
    message = refusal(load, saved(state, tmp_path / "own.pth"))
    assert "'backbone.0.0.weight' is not finite" in message


def test_an_entry_that_is_no_tensor(load, tmp_path):
    state = drawn(models.mobilenet_v3_large).state_dict()
    message = refusal(load, saved({**state, "features.0.0.weight": 3}, tmp_path / "own.pth"))
    assert "has no 'backbone.0.0.weight'" in message


def test_a_flipped_bit_of_a_weight(load, tmp_path):
    """torch itself reads it as another number."""
    path = saved(drawn(models.mobilenet_v3_large).state_dict(), tmp_path / "own.pth")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert torch.load(path, weights_only=True)
    assert "is not a file of weights: reading it gave BadZipFile" in refusal(load, path)


def cut(content):
    return content[: len(content) // 2]


def whole_network():
    file = io.BytesIO()
    torch.save(drawn(models.mobilenet_v3_large), file)  # pickled code, not a state
    return file.getvalue()


def a_list():
    file = io.BytesIO()
    torch.save([torch.zeros(3)], file)
    return file.getvalue()


def numbers():
    file = io.BytesIO()
    torch.save(dict.fromkeys(drawn(models.mobilenet_v3_large).state_dict(), 3), file)
    return file.getvalue()


def truncated():
    file = io.BytesIO()
    torch.save(drawn(models.mobilenet_v3_large).state_dict(), file)
    return cut(file.getvalue())


@pytest.mark.parametrize(
    "content",
    [lambda: b"", lambda: b"garbage\n" * 99, lambda: b"<html>404</html>", truncated, whole_network,
     a_list, numbers],
    ids=["empty", "garbage", "a web page", "truncated", "a pickled network", "a list", "numbers"],
)  # fmt: skip
def test_a_file_that_is_no_state(load, tmp_path, content):
    path = tmp_path / "own.pth"
    path.write_bytes(content())
    assert refusal(load, path).startswith(f"{path} is not a file of weights: ")


class RunsCode:
    """Pickles to a call, as any pickled object may."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def test_loading_weights_runs_no_code_of_the_file(load, tmp_path):
    state = drawn(models.mobilenet_v3_large).state_dict()
    path = saved({**state, "extra": RunsCode(tmp_path / "made")}, tmp_path / "own.pth")
    assert "is not a file of weights" in refusal(load, path)
    assert not (tmp_path / "made").exists()


def test_a_file_that_is_not_there(load, tmp_path):
    assert "nor a file that exists" in refusal(load, tmp_path / "own.pth")


def test_a_published_file_that_is_not_what_was_published(load, tmp_path, monkeypatch):
    """Weights that fit, but under a name that promises others."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    path = weights_path("imagenet", MOBILENET)
    path.parent.mkdir(parents=True)
    saved(drawn(models.mobilenet_v3_large).state_dict(), path)
    with pytest.raises(Damaged, match=f"{path.name} is damaged"):
        load("imagenet")


# --- frozen -----------------------------------------------------------------------------------


def test_a_frozen_backbone_takes_no_gradient_and_keeps_its_statistics(load):
    backbone = load("none").module
    freeze(backbone, a_cell())
    assert not any(parameter.requires_grad for parameter in backbone.parameters())
    assert moving_buffers(backbone, a_cell().protocol) == {}
    before = {k: v.clone() for k, v in backbone.state_dict().items()}
    assert not backbone(torch.randn(2, 3, 32, 32)).requires_grad
    assert equal(backbone.state_dict(), before)


def test_a_frozen_backbone_may_follow_the_batches_as_the_published_code_does(load):
    backbone = load("none").module
    cell = a_cell(backbone_batchnorm="train")
    freeze(backbone, cell)
    before = {k: v.clone() for k, v in backbone.state_dict().items()}
    assert not backbone(torch.randn(2, 3, 32, 32)).requires_grad
    moved = {k for k, v in backbone.state_dict().items() if not torch.equal(v, before[k])}
    assert moved == moving_buffers(backbone.eval(), cell.protocol).keys()
    assert {name.rpartition(".")[2] for name in moved} == {
        *("running_mean", "running_var", "num_batches_tracked")
    }
