"""Cells, their identity, and the keys of what they share: bundle, backbone, weights file.

Free of torch, h5py and mpi4py, because planning imports it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cached_property, lru_cache

from pydantic import ConfigDict

from data_prep.weights import OF_ONE_MODEL
from hpc.config import Settings
from hpc.storage.atomic import canonical, canonical_table, text_sha256
from jobs.losses.grammar import LossSpec, parse_loss
from jobs.models.registry import MODELS
from jobs.spec.protocol import Protocol

# Raise it when the same settings begin to mean something else, so that old results are not reused.
FORMAT = 1
KEY_LENGTH = 16


class Cell(Settings):
    """One (data set, model, loss, seed) under one protocol.

    `data` is the identity of the data set: a hash of its settings without paths.
    """

    model_config = ConfigDict(strict=False)  # read from JSON, which has lists instead of tuples

    dataset: str
    data: str
    model: str
    loss: LossSpec
    seed: int
    protocol: Protocol

    @property
    def name(self) -> str:
        """Return the readable name, such as `camvid/fcn_resnet101/DLNWCE/0`."""
        return f"{self.dataset}/{self.model}/{self.loss.name}/{self.seed}"

    @cached_property
    def signature(self) -> str:
        """Return the identity: a hash of all settings that can change the result."""
        loss, model = self.loss.identity_json, canonical(self.model)
        return _key({**self._shared(), "model": model, "loss": loss})

    @cached_property
    def bundle_key(self) -> str:
        """Return the key of the bundle: one data set, seed, protocol and backbone.

        If the weights file belongs to one model, the bundle has cells of that model alone. A cell
        that trains the whole network shares its bundle with none.
        """
        shared = self._shared()
        shared["backbone"] = canonical(MODELS[self.model].backbone)
        if self.protocol.train == "all":
            shared["alone"] = canonical(self.signature)
        elif self._model_of_weights:
            shared["weights_of"] = canonical(self._model_of_weights)
        return _key(shared)

    @cached_property
    def backbone_key(self) -> str:
        """Return the name of the backbone that `weights = "pretrain"` trains for this cell."""
        return _backbone_key(
            canonical(self.dataset),
            canonical(self.data),
            self.protocol.backbone_json,
            canonical(MODELS[self.model].backbone),
        )

    @cached_property
    def weights_key(self) -> str:
        """Return a key that is equal for cells of a data set that start from one weights file."""
        return _key(
            {
                "backbone": canonical(self.backbone_key),
                "weights": canonical(self.protocol.weights),
                "model": canonical(self._model_of_weights),
            }
        )

    @property
    def _model_of_weights(self) -> str:
        """Return the model of the weights file; "" if the file serves all models of a backbone."""
        return self.model if self.protocol.weights in OF_ONE_MODEL else ""

    def profiled(self) -> Cell:
        """Return the same cell with `profile = true`."""
        protocol = self.protocol.model_copy(update={"profile": True})
        return self.model_copy(update={"protocol": protocol})

    def _shared(self) -> dict[str, str]:
        return {
            "format": f"{FORMAT}",
            "dataset": canonical(self.dataset),
            "data": canonical(self.data),
            "seed": f"{self.seed}",
            "protocol": self.protocol.identity_json,
        }


@lru_cache
def _backbone_key(dataset: str, data: str, protocol: str, backbone: str) -> str:
    # cached, because thousands of cells share a few keys; all arguments are canonical JSON
    return _key(
        {"format": f"{FORMAT}", "dataset": dataset, "data": data, "protocol": protocol,
         "backbone": backbone}
    )  # fmt: skip


def _key(settings: Mapping[str, str]) -> str:
    """Return the fingerprint of settings, given the canonical JSON of each."""
    return text_sha256(canonical_table(settings))[:KEY_LENGTH]


def bundles(cells: Iterable[Cell]) -> dict[str, list[Cell]]:
    """Group cells by bundle key; bundles and cells keep the order of the grid."""
    grouped: dict[str, list[Cell]] = {}
    for cell in cells:
        grouped.setdefault(cell.bundle_key, []).append(cell)
    return grouped


def pretraining_cell(cell: Cell) -> Cell:
    """Return the cell that pre-trains the backbone of `cell`.

    It has the protocol's augmentation and optimiser, the plainest head of the backbone, CE, and the
    epochs, batch size, learning rate and seed of [protocol.pretrain].
    """
    pretrain = cell.protocol.pretrain
    changes = pretrain.model_dump(exclude={"seed"})
    changes["threads"] = pretrain.threads or cell.protocol.threads
    protocol = cell.protocol.model_copy(update={**changes, "weights": "none", "train": "all"})
    backbone = MODELS[cell.model].backbone
    model = next(name for name in MODELS if MODELS[name].backbone == backbone)
    update = {"model": model, "loss": parse_loss("CE"), "seed": pretrain.seed, "protocol": protocol}
    return cell.model_copy(update=update)
