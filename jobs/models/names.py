"""The table of models: name -> (head, backbone). Free of torch: planning reads it."""

from __future__ import annotations

from typing import Literal, NamedTuple

Head = Literal["fcn", "deeplabv3"]


class Architecture(NamedTuple):
    """A segmentation model: the head and the backbone that feeds it."""

    head: Head
    backbone: str


# Number of parameters, for estimates before anything is built: a head on features of so many
# channels, with some tens of classes, and a backbone.
HEAD_PARAMETERS = {"fcn": {2048: 9.45e6, 960: 2.08e6}, "deeplabv3": {2048: 16.1e6, 960: 8.1e6}}
BACKBONE_PARAMETERS = {"resnet50": 23.5e6, "resnet101": 42.5e6, "mobilenet_v3_large": 3.0e6}
FEATURES = {"resnet50": 2048, "resnet101": 2048, "mobilenet_v3_large": 960}  # output channels
STRIDE = {"resnet50": 8, "resnet101": 8, "mobilenet_v3_large": 16}  # pixels a position of output

BACKBONES = ("resnet50", "resnet101", "mobilenet_v3_large")
MODELS = {
    f"{head}_{backbone}": Architecture(head, backbone)
    for backbone in BACKBONES
    for head in ("fcn", "deeplabv3")
}
