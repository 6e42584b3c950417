"""The table of models: name -> (head, backbone). Free of torch, because planning imports it."""

from __future__ import annotations

from typing import Literal, NamedTuple

Head = Literal["fcn", "deeplabv3", "unet"]
Channels = int | tuple[int, ...]  # of the features; a tuple if there are several, finest first


class Architecture(NamedTuple):
    """A segmentation model: the head and the backbone that feeds it."""

    head: Head
    backbone: str


# `resnet50_pyramid` is an undilated ResNet-50 whose features are those at strides 2, 4, 8, 16, 32.
FEATURE_CHANNELS: dict[str, Channels] = {
    "resnet50": 2048,
    "resnet101": 2048,
    "mobilenet_v3_large": 960,
    "resnet50_pyramid": (64, 256, 512, 1024, 2048),
}
# Number of parameters, for estimates of memory and disk: of a head by the channels of its features,
# with some tens of classes, and of a backbone.
HEAD_PARAMETERS: dict[Head, dict[Channels, float]] = {
    "fcn": {2048: 9.45e6, 960: 2.08e6},
    "deeplabv3": {2048: 16.1e6, 960: 8.1e6},
    "unet": {FEATURE_CHANNELS["resnet50_pyramid"]: 9.01e6},
}
BACKBONE_PARAMETERS = {
    "resnet50": 23.5e6,
    "resnet101": 42.5e6,
    "mobilenet_v3_large": 3.0e6,
    "resnet50_pyramid": 23.5e6,
}

# For each pixel of the image: multiply-adds of a forward pass (MACS), and numbers that a training
# step keeps for its backward pass (ACTIVATIONS), which include a head's features.
BACKBONE_MACS = {
    "resnet50": 380e3,
    "resnet101": 676e3,
    "mobilenet_v3_large": 7.0e3,
    "resnet50_pyramid": 81.5e3,
}
BACKBONE_ACTIVATIONS = {
    "resnet50": 1008,
    "resnet101": 1824,
    "mobilenet_v3_large": 210,
    "resnet50_pyramid": 447,
}
HEAD_MACS: dict[Head, dict[Channels, float]] = {
    "fcn": {2048: 147.6e3, 960: 8.12e3},
    "deeplabv3": {2048: 243.8e3, 960: 30.5e3},
    "unet": {FEATURE_CHANNELS["resnet50_pyramid"]: 73.9e3},
}
# Operations of a head's step on frozen features, in forward passes. The gradient of the features is
# not computed.
HEAD_PASSES: dict[Head, float] = {"fcn": 2.0, "deeplabv3": 2.1, "unet": 2.6}
HEAD_ACTIVATIONS: dict[Head, dict[Channels, float]] = {
    "fcn": {2048: 64, 960: 7.6},
    "deeplabv3": {2048: 108, 960: 22.9},
    "unet": {FEATURE_CHANNELS["resnet50_pyramid"]: 141},
}
# Pixels of the image for each position of the logits, along one axis
STRIDE = {"resnet50": 8, "resnet101": 8, "mobilenet_v3_large": 16, "resnet50_pyramid": 2}

# The first model of each backbone is the plainest.
MODELS: dict[str, Architecture] = {
    **{
        f"{head}_{backbone}": Architecture(head, backbone)
        for backbone in ("resnet50", "resnet101", "mobilenet_v3_large")
        for head in ("fcn", "deeplabv3")
    },
    "unet_resnet50": Architecture("unet", "resnet50_pyramid"),
}
