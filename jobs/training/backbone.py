"""Load the backbone of a bundle with its weights, and the initial weights of heads."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from data_prep.weights import FILES, PRE_FINE, WITHOUT_FILE, check_published, require_weights
from hpc.cli import UserError
from hpc.distributed.process_group import Group
from hpc.storage.atomic import Damaged, file_sha256, read_json
from jobs.models.build import Backbone, build_backbone
from jobs.models.memory_format import place
from jobs.models.registry import MODELS
from jobs.spec.cell import Cell
from jobs.spec.protocol import Protocol
from jobs.spec.run_paths import RunPaths

# Tensors with these prefixes in a weights file are ignored, by the setting `weights`. All other
# names must match the network. In a user's own file the prefixes of `_ANY_HEAD` are ignored.
_IGNORED = {
    "imagenet": ("fc.", "classifier."),
    "coco": ("classifier.", "aux_classifier."),
    PRE_FINE: ("aux_classifier.",),
    "pretrain": (),
}
_ANY_HEAD = ("fc.", "classifier.", "aux_classifier.")
_HEAD = "classifier."


class LoadedBackbone(NamedTuple):
    """A backbone on its device, and the file of its weights.

    Attributes:
        module: the backbone.
        sha256: hash of the file; "" for random weights, which are a function of the seed.
        path: the file; None for random weights.
        head: the initial weights of heads; None if they are random.
    """

    module: Backbone
    sha256: str
    path: Path | None = None
    head: Mapping[str, Tensor] | None = None


def load_backbone(cell: Cell, paths: RunPaths, group: Group) -> LoadedBackbone:
    """Return the backbone of `cell` with the weights of its protocol; pre-fine has a head too.

    Raises `UserError` if the weights file is missing, damaged or of another network.
    """
    protocol = cell.protocol
    name = MODELS[cell.model].backbone
    backbone = build_backbone(name, cell.seed, protocol.batchnorm_momentum, group.process_group)
    place(backbone, group.device, protocol.precision)
    if protocol.weights == "none":
        return LoadedBackbone(backbone, "")
    path = weights_file(cell, paths)
    state = read_weights(path, protocol.weights)
    head = None
    if protocol.weights == PRE_FINE:
        names = [name for name in state if name.startswith(_HEAD)]
        head = {name.removeprefix(_HEAD): state.pop(name) for name in names}
    load_exactly(backbone, state, path)
    return LoadedBackbone(backbone, file_sha256(path), path, head)


def start_head(head: nn.Module, loaded: LoadedBackbone) -> None:
    """Load the head's weights from the weights file, if it has any.

    Raises `UserError` if they belong to another head or to other classes.
    """
    if loaded.head is not None:
        assert loaded.path is not None
        load_exactly(head, loaded.head, loaded.path, _HEAD)


def weights_file(cell: Cell, paths: RunPaths) -> Path:
    """Return the file of the weights of the cell's backbone, after comparing its hash.

    A user's own file has no hash to compare. Raises `UserError` if it is missing or damaged.
    """
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
    """Freeze the backbone; `backbone_batchnorm` decides the mode of its batch norm."""
    backbone.requires_grad_(False)
    backbone.train(cell.protocol.backbone_batchnorm == "train")


def moving_buffers(backbone: nn.Module | None, protocol: Protocol) -> dict[str, Tensor]:
    """Return the running statistics of a frozen backbone if training moves them, else nothing."""
    if backbone is None or protocol.train == "all" or protocol.backbone_batchnorm == "eval":
        return {}
    return dict(backbone.named_buffers())


def read_weights(path: Path, weights: str) -> dict[str, Tensor]:
    """Return the tensors of a weights file by torchvision's names in a segmentation model.

    The file can belong to a segmentation model or to a classifier. The names that `weights` ignores
    are left out. Raises `UserError` if it is not a file of tensors.
    """
    try:
        state = read_tensors(path)
        if not any(isinstance(tensor, Tensor) for tensor in state.values()):
            raise TypeError("none is a tensor")
        ignored = _IGNORED.get(weights, _ANY_HEAD)
        kept = {name: state[name] for name in state if not name.startswith(ignored)}
    except Exception as error:  # torch raises many types for a file of another format
        raise UserError(
            f"{path} is not a file of weights: reading it gave {type(error).__name__}; give "
            "a state dict that torch.save wrote"
        ) from error
    if any(name.startswith("backbone.") for name in kept):
        return kept
    return {f"backbone.{name.removeprefix('features.')}": kept[name] for name in kept}


def load_exactly(
    module: nn.Module, found: Mapping[str, Tensor], path: Path, prefix: str = ""
) -> None:
    """Load the tensors `found` in the file `path` into `module`, name by name.

    Raises `UserError` if a tensor is missing, unexpected, of another shape, or not finite. `prefix`
    precedes the names in the file.
    """
    expected = module.state_dict()
    # torchvision's ImageNet files lack this counter, and nothing reads it
    counters = {n: expected[n] for n in expected if n.endswith("num_batches_tracked")}
    state = {**counters, **found}
    other = "are these weights of another network?"
    for name, tensor in expected.items():
        if not isinstance(state.get(name), Tensor):
            raise UserError(f"{path} has no {prefix + name!r}; {other}")
        if state[name].shape != tensor.shape:
            shape, wanted = tuple(state[name].shape), tuple(tensor.shape)
            raise UserError(f"{path}: {prefix + name!r} has shape {shape}, not {wanted}; {other}")
        if not state[name].isfinite().all():
            raise UserError(
                f"{path}: {prefix + name!r} is not finite; give weights that were trained well"
            )
    for name in state:
        if name not in expected:
            raise UserError(
                f"{path} has {prefix + name!r}, which the network does not have; {other}"
            )
    module.load_state_dict(state)


def read_tensors(path: Path) -> Any:
    """Read tensors and plain values that `torch.save` wrote; raises nearly any exception."""
    # torch does not compare the checksums of the archive
    if zipfile.is_zipfile(path) and (bad := zipfile.ZipFile(path).testzip()):
        raise zipfile.BadZipFile(f"the checksum of {bad} differs")
    return torch.load(path, map_location="cpu", weights_only=True)
