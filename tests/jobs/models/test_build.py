"""Networks are torchvision's: the same names, shapes, parameter counts and logits."""

import pytest
import torch
from torch import nn
from torchvision.models import segmentation

from jobs.models.build import (
    Backbone,
    Network,
    build_backbone,
    build_head,
    normalise,
    seeded,
    upsample,
)
from jobs.models.dropout import PositionalDropout, set_dropout_position
from jobs.models.registry import (
    BACKBONE_MACS,
    BACKBONE_PARAMETERS,
    FEATURE_CHANNELS,
    HEAD_MACS,
    HEAD_PARAMETERS,
    MODELS,
    STRIDE,
)
from jobs.models.sync_batchnorm import BatchNorm2d

CLASSES = 5
PUBLISHED = ["fcn_resnet50", "deeplabv3_resnet50", "deeplabv3_mobilenet_v3_large"]


def num_parameters(module):
    return sum(parameter.numel() for parameter in module.parameters())


def without_values(build):
    """Return the result of `build` on torch's meta device."""
    with torch.device("meta"):
        return build()


def head_of(model, num_classes=CLASSES, seed=0):
    return build_head(model, num_classes, seed, momentum=0.1)


def equal(state, other):
    return state.keys() == other.keys() and all(torch.equal(state[k], other[k]) for k in state)


@pytest.fixture(scope="module", params=PUBLISHED)
def pair(request):
    """Torchvision's own model with random weights and statistics, and ours with the same."""
    model = request.param
    with seeded("torchvision's"):
        builder = getattr(segmentation, model)
        theirs = builder(weights=None, weights_backbone=None, num_classes=CLASSES, aux_loss=True)
        for name, buffer in theirs.named_buffers():
            if name.endswith("running_var"):
                buffer.uniform_(0.5, 2)
    ours = Network(build_backbone(MODELS[model].backbone, 0, momentum=0.1), head_of(model))
    ours.backbone.load_state_dict(part(theirs, "backbone."))
    head = part(theirs, "classifier.")
    ours.classifier.load_state_dict({name.partition(".")[2]: head[name] for name in head})
    return theirs.eval(), ours.eval()


def part(model, prefix):
    state = model.state_dict()
    return {name: state[name] for name in state if name.startswith(prefix)}


def test_the_state_of_torchvision_fits_and_leaves_only_the_auxiliary_head(pair):
    theirs, ours = pair  # that it fits was checked, strictly, when it was loaded
    taken = ours.backbone.state_dict().keys() | {
        f"classifier.{name}" for name in ours.classifier.state_dict()
    }
    left = theirs.state_dict().keys() - taken
    assert {name.partition(".")[0] for name in left} == {"aux_classifier"}


@torch.no_grad()
def test_logits_are_those_of_torchvision(pair):
    theirs, ours = pair
    images = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(1))
    expected = theirs(images)["out"]
    assert expected.shape == (2, CLASSES, 64, 96) and expected.std() > 1e-3
    assert torch.equal(upsample(ours(images), (64, 96)), expected)


@torch.no_grad()
@pytest.mark.parametrize(
    "name", [name for name in FEATURE_CHANNELS if not name.endswith("pyramid")]
)
def test_features_have_the_channels_of_the_table(name):
    backbone = without_values(lambda: Backbone(name)).eval()
    features = backbone(torch.zeros(1, 3, 32, 64, device="meta"))
    stride = 16 if name.startswith("mobilenet") else 8
    assert features.shape == (1, FEATURE_CHANNELS[name], 32 // stride, 64 // stride)


@torch.no_grad()
@pytest.mark.parametrize("name", FEATURE_CHANNELS)
def test_features_have_the_stride_of_the_table(name):
    backbone = without_values(lambda: Backbone(name)).eval()
    for side, positions in ((STRIDE[name], 1), (STRIDE[name] + 1, 2), (3 * STRIDE[name], 3)):
        features = backbone(torch.zeros(1, 3, side, side, device="meta"))
        finest = features[0] if isinstance(features, list) else features
        assert finest.shape[2:] == (positions, positions)


@pytest.mark.parametrize("head", ["fcn", "deeplabv3"])
def test_one_image_of_one_position_teaches_nothing(head):
    """A crop must be larger than the stride, because batch norm over one value is its bias."""
    features = [torch.randn(1, 960, side, side) for side in (1, 1, 2, 2)]
    network = build_head(f"{head}_mobilenet_v3_large", 3, 0, 0.1).train()
    set_dropout_position(network, 0, "m", 0, [0])
    one, same, two, other = [network(image).mean((2, 3)) for image in features]
    torch.testing.assert_close(one, same)
    assert not torch.allclose(two, other)


def test_the_heads_of_the_paper_have_its_number_of_parameters():
    """With the 21 classes of VOC."""
    assert num_parameters(head_of("fcn_resnet101", 21)) == 9_448_981
    assert num_parameters(head_of("deeplabv3_resnet101", 21)) == 16_130_837


@pytest.mark.parametrize("num_classes", [11, 21, 34])
@pytest.mark.parametrize("model", ["fcn_resnet50", "deeplabv3_resnet50", "fcn_mobilenet_v3_large",
                                   "deeplabv3_mobilenet_v3_large", "unet_resnet50"])  # fmt: skip
def test_the_table_of_head_sizes_holds(model, num_classes):
    head, backbone = MODELS[model]
    built = num_parameters(without_values(lambda: head_of(model, num_classes)))
    assert HEAD_PARAMETERS[head][FEATURE_CHANNELS[backbone]] == pytest.approx(built, rel=0.02)


@pytest.mark.parametrize("name", FEATURE_CHANNELS)
def test_the_table_of_backbone_sizes_holds(name):
    built = num_parameters(without_values(lambda: Backbone(name)))
    assert BACKBONE_PARAMETERS[name] == pytest.approx(built, rel=0.02)


def macs_per_pixel(module, images):
    """Of the convolutions that a forward pass on `images` goes through, counted one by one."""
    counted = []

    def count(conv, _, output):
        inputs = conv.in_channels // conv.groups * conv.kernel_size[0] * conv.kernel_size[1]
        counted.append(output.numel() * inputs)

    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            layer.register_forward_hook(count)
    module.eval()(images)
    return sum(counted) / images[:, 0].numel()


@pytest.mark.parametrize("model", MODELS)
def test_the_tables_of_operations_hold(model):
    head, backbone = MODELS[model]
    images = torch.zeros(1, 3, 480, 480, device="meta")
    body = without_values(lambda: Backbone(backbone))
    whole = without_values(lambda: Network(Backbone(backbone), head_of(model, 21)))
    assert BACKBONE_MACS[backbone] == pytest.approx(macs_per_pixel(body, images), rel=0.02)
    found = macs_per_pixel(whole, images) - BACKBONE_MACS[backbone]
    assert HEAD_MACS[head][FEATURE_CHANNELS[backbone]] == pytest.approx(found, rel=0.02)


def test_the_table_of_models_is_both_heads_of_the_paper_on_every_backbone_and_a_unet():
    *paper, pyramid = FEATURE_CHANNELS
    pairs = {f"{head}_{name}": (head, name) for head in ("fcn", "deeplabv3") for name in paper}
    assert {**pairs, "unet_resnet50": ("unet", pyramid)} == MODELS


@pytest.mark.parametrize("model", ["fcn_mobilenet_v3_large", "deeplabv3_mobilenet_v3_large"])
def test_a_head_is_drawn_from_seed_and_model_alone(model):
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    first = head_of(model).state_dict()
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(6)
    head_of(model, seed=1)
    assert equal(head_of(model).state_dict(), first)
    other = head_of(model, seed=1).state_dict()
    assert not torch.equal(other["4.weight"], first["4.weight"])


def test_the_same_head_on_another_backbone_is_another_draw():
    one, other = (head_of(f"fcn_{name}").state_dict() for name in ("resnet50", "resnet101"))
    assert one["0.weight"].shape == other["0.weight"].shape
    assert not torch.equal(one["0.weight"], other["0.weight"])


def test_a_backbone_is_drawn_from_seed_and_name_alone():
    torch.manual_seed(7)
    first = build_backbone("mobilenet_v3_large", 0, momentum=0.1).state_dict()
    torch.manual_seed(8)
    assert equal(build_backbone("mobilenet_v3_large", 0, momentum=0.1).state_dict(), first)
    other = build_backbone("mobilenet_v3_large", 1, momentum=0.1).state_dict()
    assert not torch.equal(other["backbone.0.0.weight"], first["backbone.0.0.weight"])


@pytest.mark.parametrize("model", ["fcn_resnet50", "deeplabv3_mobilenet_v3_large", "unet_resnet50"])
def test_batch_norm_and_dropout_are_ours_everywhere(model):
    """torchvision's mobilenet has a momentum of its own, which ours replaces."""
    network = without_values(
        lambda: Network(
            build_backbone(MODELS[model].backbone, 0, momentum=0.25),
            build_head(model, CLASSES, 0, momentum=0.25),
        )
    )
    norms = [m for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
    dropouts = [m for m in network.classifier.modules() if isinstance(m, nn.Dropout)]
    assert {type(m) for m in norms} == {BatchNorm2d} and {m.momentum for m in norms} == {0.25}
    assert {type(m) for m in dropouts} == ({PositionalDropout} if dropouts else set())
    assert bool(dropouts) == (not model.startswith("unet"))  # whose decoder has none
    assert not any(isinstance(m, nn.Dropout) for m in network.backbone.modules())


def test_images_are_normalised_as_torchvision_prepares_them():
    images = torch.randint(256, (2, 3, 7, 9), dtype=torch.uint8)
    preset = segmentation.FCN_ResNet50_Weights.COCO_WITH_VOC_LABELS_V1.transforms()
    expected = preset.__class__(resize_size=None, mean=preset.mean, std=preset.std)(images)
    torch.testing.assert_close(normalise(images), expected)
