"""The backbone that a bundle shares: which weights it has, and their hash; and what its heads start
from, where that is not random."""

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

# What of a weights file is left out, by weights; a file of one's own may hold any of it. The rest
# must be the network's, name by name.
_LEFT_OUT = {
    "imagenet": ("fc.", "classifier."),
    "coco": ("classifier.", "aux_classifier."),
    PRE_FINE: ("aux_classifier.",),
    "pretrain": (),
}
_ANY_HEAD = ("fc.", "classifier.", "aux_classifier.")
_HEAD = "classifier."


class LoadedBackbone(NamedTuple):
    """A backbone on its device, and of the file its weights came from: its SHA-256 ("" for random
    ones, which are a function of the seed), its path, and what heads start from, if not from
    random weights."""

    module: Backbone
    sha256: str
    path: Path | None = None
    head: Mapping[str, Tensor] | None = None


def load_backbone(cell: Cell, paths: RunPaths, group: Group) -> LoadedBackbone:
    """The backbone of `cell` with the weights its protocol names; with pre-fine, these have a head
    too. Raises `UserError` if their file is missing, damaged or of another network."""
    protocol = cell.protocol
    name = MODELS[cell.model].backbone
    backbone = build_backbone(name, cell.seed, protocol.batchnorm_momentum, group.process_group)
    if protocol.weights == "none":
        return LoadedBackbone(place(backbone, group.device), "")
    path = weights_file(cell, paths)
    state = read_weights(path, protocol.weights)
    head = None
    if protocol.weights == PRE_FINE:
        names = [name for name in state if name.startswith(_HEAD)]
        head = {name.removeprefix(_HEAD): state.pop(name) for name in names}
    load_exactly(backbone, state, path)
    return LoadedBackbone(place(backbone, group.device), file_sha256(path), path, head)


def start_head(head: nn.Module, loaded: LoadedBackbone) -> None:
    """Give `head` the weights that came with the backbone, if any did. Raises `UserError` if they
    are of another head, or of other classes."""
    if loaded.head is not None:
        assert loaded.path is not None
        load_exactly(head, loaded.head, loaded.path, _HEAD)


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


def moving_buffers(backbone: nn.Module | None, protocol: Protocol) -> dict[str, Tensor]:
    """Return the running statistics of a frozen backbone that training moves; nothing if it leaves
    them as they are, or if they belong to a network that trains as a whole."""
    if backbone is None or protocol.train == "all" or protocol.backbone_batchnorm == "eval":
        return {}
    return dict(backbone.named_buffers())


def read_weights(path: Path, weights: str) -> dict[str, Tensor]:
    """The tensors of a weights file by torchvision's names in a segmentation model: that of such a
    model, as torchvision and we save them, or of a classifier. What `weights` leaves out is left
    out. Raises `UserError` if it is not a file of tensors."""
    try:
        state = read_tensors(path)
        if not any(isinstance(tensor, Tensor) for tensor in state.values()):
            raise TypeError("none is a tensor")
        left_out = _LEFT_OUT.get(weights, _ANY_HEAD)
        kept = {name: state[name] for name in state if not name.startswith(left_out)}
    except Exception as error:  # torch raises many kinds for a file that is not its own
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
    """Load into `module` what `path` holds for it. Raises `UserError` if a tensor is missing, has
    another shape, or is not one of the module's; `prefix` precedes the names in the file."""
    expected = module.state_dict()
    # torchvision's ImageNet files are older than this counter, and nothing reads it
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
            raise UserError(f"{path} has {prefix + name!r}, which has no place here; {other}")
    module.load_state_dict(state)


def read_tensors(path: Path) -> Any:
    """What `torch.save` wrote, of tensors and plain values; raises nearly any exception."""
    # torch compares no checksum: flipped bits would just be other weights
    if zipfile.is_zipfile(path) and (bad := zipfile.ZipFile(path).testzip()):
        raise zipfile.BadZipFile(f"the checksum of {bad} does not fit")
    return torch.load(path, map_location="cpu", weights_only=True)
