"""The backbone that a bundle shares: which weights it has, and their hash."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from data_prep.weights import FILES, WITHOUT_FILE, check_published, require_weights
from hpc.atomic import Damaged, file_sha256, read_json
from hpc.command import UserError
from hpc.groups import Group
from jobs.cell import Cell, RunPaths
from jobs.models.build import Backbone, build_backbone
from jobs.models.names import MODELS


class LoadedBackbone(NamedTuple):
    """A backbone on its device, and the SHA-256 of the file its weights came from ("" for random
    ones, which are a function of the seed)."""

    module: Backbone
    sha256: str


def load_backbone(cell: Cell, paths: RunPaths, group: Group) -> LoadedBackbone:
    """The backbone of `cell` with the weights its protocol names. Raises `UserError` if their
    file is missing, damaged or of another network."""
    protocol = cell.protocol
    name = MODELS[cell.model].backbone
    backbone = build_backbone(name, cell.seed, protocol.batchnorm_momentum, group.process_group)
    sha256 = ""
    if protocol.weights != "none":
        path = weights_file(cell, paths)
        sha256 = file_sha256(path)
        backbone.load_state_dict(backbone_state(path, backbone))
    return LoadedBackbone(backbone.to(group.device), sha256)


def weights_file(cell: Cell, paths: RunPaths) -> Path:
    """The file that holds the weights of the cell's backbone; a pre-trained one is checked."""
    weights = cell.protocol.weights
    if weights not in WITHOUT_FILE:
        path = require_weights(weights, cell.model)
        if path.name in FILES.values():
            check_published(path)
        return path
    path = paths.backbone(cell.backbone_key)
    try:
        if file_sha256(path) != read_json(path.with_suffix(".json"))["sha256"]:
            raise Damaged(f"{path} is damaged; delete it and run grid again")
    except OSError as error:
        raise UserError(f"the pre-trained backbone {path} is missing; run grid again") from error
    return path


def freeze(backbone: Backbone, cell: Cell) -> None:
    """No gradient runs through a frozen backbone; its batch norm uses running statistics, or, with
    `backbone_batchnorm = "train"`, those of the batch."""
    backbone.requires_grad_(False)
    backbone.train(cell.protocol.backbone_batchnorm == "train")


def moving_buffers(backbone: nn.Module) -> dict[str, Tensor]:
    """The running statistics of a frozen backbone in train mode; nothing in eval mode."""
    return dict(backbone.named_buffers()) if backbone.training else {}


def backbone_state(path: Path, backbone: Backbone) -> dict[str, Tensor]:
    """The backbone's part of a weights file: a segmentation model's, as torchvision and we save
    them, or a classifier's. Raises `UserError` if names or shapes do not fit."""
    try:
        named = {_backbone_name(name): tensor for name, tensor in read_tensors(path).items()}
    except Exception as error:  # torch raises many kinds for a file that is not its own
        raise UserError(
            f"{path} is not a file of weights: reading it gave {type(error).__name__}; give "
            "a state dict that torch.save wrote"
        ) from error
    expected = backbone.state_dict()
    for name, tensor in expected.items():
        if name.endswith("num_batches_tracked"):
            # torchvision's ImageNet files are older than this counter, and nothing reads it
            named.setdefault(name, tensor)
        if not isinstance(named.get(name), Tensor):
            raise UserError(f"{path} has no {name!r}; are these weights of another network?")
        if not named[name].isfinite().all():
            raise UserError(f"{path}: {name!r} is not finite; give weights that were trained well")
        if named[name].shape != tensor.shape:
            raise UserError(
                f"{path}: {name!r} has shape {tuple(named[name].shape)}, not {tuple(tensor.shape)}"
            )
    return {name: named[name] for name in expected}


def read_tensors(path: Path) -> Any:
    """What `torch.save` wrote, of tensors and plain values; raises nearly any exception."""
    # torch compares no checksum: flipped bits would just be other weights
    if zipfile.is_zipfile(path) and (bad := zipfile.ZipFile(path).testzip()):
        raise zipfile.BadZipFile(f"the checksum of {bad} does not fit")
    return torch.load(path, map_location="cpu", weights_only=True)


def _backbone_name(name: str) -> str:
    if name.startswith(("backbone.", "classifier.", "aux_classifier.")):
        return name
    return f"backbone.{name.removeprefix('features.')}"
