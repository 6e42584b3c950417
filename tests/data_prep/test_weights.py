"""Published pre-trained weights are found, fetched and checked."""

import hashlib
from pathlib import Path

import pytest
import torch
from torchvision import models
from torchvision.models import segmentation

from data_prep import weights
from data_prep.weights import (
    FILES,
    SOURCE,
    VOC_CLASSES,
    check_published,
    fetch,
    require_weights,
    weights_path,
)
from hpc.cli import UserError
from hpc.storage.atomic import Damaged
from jobs.models.registry import MODELS

IMAGENET = {
    "resnet50": models.ResNet50_Weights,
    "resnet101": models.ResNet101_Weights,
    "mobilenet_v3_large": models.MobileNet_V3_Large_Weights,
}
COCO = {
    "fcn_resnet50": segmentation.FCN_ResNet50_Weights,
    "fcn_resnet101": segmentation.FCN_ResNet101_Weights,
    "deeplabv3_resnet50": segmentation.DeepLabV3_ResNet50_Weights,
    "deeplabv3_resnet101": segmentation.DeepLabV3_ResNet101_Weights,
    "deeplabv3_mobilenet_v3_large": segmentation.DeepLabV3_MobileNet_V3_Large_Weights,
}


@pytest.fixture
def torch_home(tmp_path, monkeypatch):
    """An empty folder as torch's folder of weights."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    return tmp_path / "torch"


@pytest.fixture
def published(torch_home):
    """A file as on torchvision's site: its name ends with the hash of its content."""
    content = b"weights" * 1000
    path = torch_home / f"tiny-{hashlib.sha256(content).hexdigest()[:8]}.pth"
    path.parent.mkdir()
    path.write_bytes(content)
    return path


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A folder in place of torchvision's site."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.setattr(weights, "SOURCE", folder.as_uri())
    return folder


@pytest.fixture
def grid(tmp_path):
    """Write a grid file."""

    def write(protocol, *names):
        path = tmp_path / "grid.toml"
        path.write_text(f"models = {list(names)}\n[protocol]\n{protocol}\n")
        return str(path)

    return write


@pytest.mark.parametrize("model", MODELS)
def test_imagenets_files_are_torchvisions_first_ones(model):
    expected = IMAGENET[MODELS[model].backbone.removesuffix("_pyramid")].IMAGENET1K_V1.url
    assert f"{SOURCE}/{FILES['imagenet', model]}" == expected


@pytest.mark.parametrize("weights", ["coco", "pre-fine"])
@pytest.mark.parametrize("model", COCO)
def test_cocos_files_are_those_with_the_labels_of_voc(model, weights):
    published = COCO[model].COCO_WITH_VOC_LABELS_V1
    assert f"{SOURCE}/{FILES[weights, model]}" == published.url
    assert len(published.meta["categories"]) == VOC_CLASSES


def test_no_other_weights_are_called_published():
    coco = {(weights, model) for weights in ("coco", "pre-fine") for model in COCO}
    assert FILES.keys() == {("imagenet", model) for model in MODELS} | coco


@pytest.mark.parametrize("variable", ["TORCH_HOME", "XDG_CACHE_HOME", "HOME"])
def test_files_lie_where_torch_itself_looks(variable, tmp_path, monkeypatch):
    for name in ("TORCH_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, str(tmp_path))
    path = weights_path("imagenet", "fcn_resnet101")
    assert str(path.parent) == f"{torch.hub.get_dir()}/checkpoints"
    assert path.is_relative_to(tmp_path)


def test_any_other_weights_are_the_path_of_a_file(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.pth").write_bytes(b"")
    for written in ("own.pth", "~/own.pth", str(tmp_path / "own.pth")):
        assert require_weights(written, "fcn_resnet50") == tmp_path / "own.pth"


def test_unpublished_weights_are_refused(torch_home):
    with pytest.raises(UserError) as error:
        weights_path("coco", "fcn_mobilenet_v3_large")
    assert "no 'coco' weights are published for 'fcn_mobilenet_v3_large'" in str(error.value)
    assert "did you mean 'deeplabv3_mobilenet_v3_large'" in str(error.value)


def test_a_missing_file_is_named_with_its_download(torch_home):
    with pytest.raises(UserError) as error:
        require_weights("imagenet", "fcn_resnet101")
    name = "resnet101-63fe2227.pth"
    assert str(torch_home / "hub" / "checkpoints" / name) in str(error.value)
    assert f"https://download.pytorch.org/models/{name}" in str(error.value)
    with pytest.raises(UserError, match="'imagnet' is neither imagenet, coco, pre-fine, none"):
        require_weights("imagnet", "fcn_resnet101")


def test_a_published_file_carries_its_own_checksum(published):
    check_published(published)
    published.write_bytes(published.read_bytes()[:-1] + b"!")
    with pytest.raises(Damaged, match=r"tiny-.*\.pth is damaged .*delete it"):
        check_published(published)


def test_a_file_is_fetched_whole(published, site, torch_home):
    path = torch_home / "hub" / "checkpoints" / published.name
    content = published.read_bytes()
    published.rename(site / published.name)
    fetch(path)
    assert path.read_bytes() == content
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("trouble", ["cut short", "not there"])
def test_a_file_that_cannot_be_fetched_leaves_nothing(trouble, published, site, torch_home):
    path = torch_home / "hub" / "checkpoints" / published.name
    if trouble == "cut short":
        (site / published.name).write_bytes(published.read_bytes()[:100])
    with pytest.raises(UserError, match="cannot fetch file:"):
        fetch(path)
    assert list(path.parent.iterdir()) == []


def test_the_command_does_nothing_if_no_file_is_needed(grid, torch_home, capsys):
    assert weights.main([grid("weights = 'none'", "fcn_resnet50")]) == 0
    assert capsys.readouterr().out == "weights = 'none' needs no file\n"


def test_the_command_checks_existing_files(grid, torch_home):
    path = weights_path("imagenet", "fcn_resnet50")
    path.parent.mkdir(parents=True)
    path.write_bytes(b"not these weights")
    with pytest.raises(Damaged, match=path.name):
        weights.main([grid("", "fcn_resnet50", "deeplabv3_resnet50")])


def test_the_command_fetches_each_file_once(grid, torch_home, site, monkeypatch, capsys):
    """Two heads share the ImageNet weights of their backbone."""
    fetched = []

    def pretend(path):
        fetched.append(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()

    monkeypatch.setattr(weights, "fetch", pretend)
    names = ["fcn_resnet50", "deeplabv3_resnet50", "fcn_resnet101"]
    assert weights.main([grid("", *names)]) == 0
    assert [path.name for path in fetched] == ["resnet101-63fe2227.pth", "resnet50-0676ba61.pth"]
    assert capsys.readouterr().out.count("ready: ") == 2


def test_the_command_refuses_a_missing_file_of_the_user(grid, tmp_path):
    with pytest.raises(UserError, match="there is no such file"):
        weights.main([grid(f"weights = '{tmp_path}/own.pth'", "fcn_resnet50")])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("models = 5", "models must be a list, not 5"),
        ("losses = 5", "losses must be a list, not 5"),
        ("protocol = 5", "[protocol] must be a table, not 5"),
        ("[protocol]\nper_dataset = 5", "[protocol.per_dataset] must be a table, not 5"),
    ],
)
def test_the_command_refuses_a_file_that_is_no_grid(tmp_path, text, message):
    path = tmp_path / "grid.toml"
    path.write_text(text)
    with pytest.raises(UserError) as error:
        weights.main([str(path)])
    assert str(error.value) == f"{path}: {message}"


def test_the_folder_of_weights_is_torchs():
    home = Path("~").expanduser()
    assert weights._torch_home({"TORCH_HOME": "~/weights"}) == home / "weights"
    assert weights._torch_home({"XDG_CACHE_HOME": "/cache"}) == Path("/cache/torch")
    assert weights._torch_home({"TORCH_HOME": "/a", "XDG_CACHE_HOME": "/cache"}) == Path("/a")
    assert weights._torch_home({}) == home / ".cache/torch"
