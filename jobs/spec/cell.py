"""What is trained: a cell, the bundle it shares a backbone with, their signatures, and every path
of a run. Free of torch, h5py and mpi4py: planning reads it."""

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

# Raised when the same settings begin to mean something else, so that old results are not reused.
FORMAT = 1
KEY_LENGTH = 16


class Cell(Settings):
    """One (data set, model, loss, seed) under one protocol. `data` identifies the data set's
    result-changing settings, whatever its path."""

    model_config = ConfigDict(strict=False)  # a record: JSON has lists where there were tuples

    dataset: str
    data: str
    model: str
    loss: LossSpec
    seed: int
    protocol: Protocol

    @property
    def name(self) -> str:
        """The name that people use: `camvid/fcn_resnet101/DLNWCE/0`."""
        return f"{self.dataset}/{self.model}/{self.loss.name}/{self.seed}"

    @cached_property
    def signature(self) -> str:
        """Hash of the resolved settings that change the result; the identity of the cell."""
        loss, model = self.loss.identity_json, canonical(self.model)
        return _key({**self._shared(), "model": model, "loss": loss})

    @cached_property
    def bundle_key(self) -> str:
        """Equal for the cells that may share a backbone's pass. A cell that trains the whole
        network shares with none."""
        shared = self._shared()
        shared["backbone"] = canonical(MODELS[self.model].backbone)
        if self.protocol.train == "all":
            shared["alone"] = canonical(self.signature)
        elif self._model_of_weights:
            shared["weights_of"] = canonical(self._model_of_weights)
        return _key(shared)

    @cached_property
    def backbone_key(self) -> str:
        """Names the backbone that `weights = "pretrain"` trains: one a data set and backbone."""
        return _backbone_key(
            canonical(self.dataset),
            canonical(self.data),
            self.protocol.backbone_json,
            canonical(MODELS[self.model].backbone),
        )

    @cached_property
    def weights_key(self) -> str:
        """Equal for the cells of a data set that start from one file of weights."""
        return _key(
            {
                "backbone": canonical(self.backbone_key),
                "weights": canonical(self.protocol.weights),
                "model": canonical(self._model_of_weights),
            }
        )

    @property
    def _model_of_weights(self) -> str:
        """The model that the file of weights belongs to; "" if it serves all models with this
        backbone."""
        return self.model if self.protocol.weights in OF_ONE_MODEL else ""

    def profiled(self) -> Cell:
        """The same cell, whose job measures how long each of its parts takes."""
        protocol = self.protocol.model_copy(update={"profile": True})
        return self.model_copy(update={"protocol": protocol})

    def _shared(self) -> dict[str, str]:
        return {
            "format": f"{FORMAT}",
            "dataset": canonical(self.dataset),
            "data": canonical(self.data),
            "seed": f"{self.seed}",
            "protocol": self.protocol.result_json,
        }


@lru_cache
def _backbone_key(dataset: str, data: str, protocol: str, backbone: str) -> str:
    """Of the canonical JSON of each. Thousands of cells share a few."""
    return _key(
        {"format": f"{FORMAT}", "dataset": dataset, "data": data, "protocol": protocol,
         "backbone": backbone}
    )  # fmt: skip


def _key(settings: Mapping[str, str]) -> str:
    """The fingerprint of settings from the canonical JSON of each: what thousands of cells share is
    written once."""
    return text_sha256(canonical_table(settings))[:KEY_LENGTH]


def bundles(cells: Iterable[Cell]) -> dict[str, list[Cell]]:
    """Cells by bundle key; bundles and cells keep the order of the grid."""
    grouped: dict[str, list[Cell]] = {}
    for cell in cells:
        grouped.setdefault(cell.bundle_key, []).append(cell)
    return grouped


def pretraining_cell(cell: Cell) -> Cell:
    """The cell that trains the backbone of `cell`: the protocol's own augmentation and optimiser,
    with the epochs, batch, rate and seed of [protocol.pretrain]."""
    pretrain = cell.protocol.pretrain
    changes = pretrain.model_dump(exclude={"seed"})
    changes["threads"] = pretrain.threads or cell.protocol.threads
    protocol = cell.protocol.model_copy(update={**changes, "weights": "none", "train": "all"})
    backbone = MODELS[cell.model].backbone
    model = next(name for name in MODELS if MODELS[name].backbone == backbone)
    update = {"model": model, "loss": parse_loss("CE"), "seed": pretrain.seed, "protocol": protocol}
    return cell.model_copy(update=update)
