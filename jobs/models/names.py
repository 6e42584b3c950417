"""The table of models: name -> (head, backbone). Free of torch: planning reads it."""

from __future__ import annotations

from typing import Literal, NamedTuple

Head = Literal["fcn", "deeplabv3"]


class Architecture(NamedTuple):
    """A segmentation model: the head and the backbone that feeds it."""

    head: Head
    backbone: str


BACKBONES = ("resnet50", "resnet101", "mobilenet_v3_large")
MODELS = {
    f"{head}_{backbone}": Architecture(head, backbone)
    for backbone in BACKBONES
    for head in ("fcn", "deeplabv3")
}
