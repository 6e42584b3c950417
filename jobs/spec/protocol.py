"""The [protocol] table of a grid file: how every cell is trained and evaluated."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from hpc.cli import UserError
from hpc.config import Settings
from hpc.storage.atomic import canonical

BatchSize = Annotated[int, Field(ge=1, le=1_000_000)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Rate = Annotated[float, Field(gt=0.0)]
Side = Annotated[int, Field(ge=1, le=32_768)]  # pixels
Threads = Annotated[int, Field(ge=1, le=1024)]
Epochs = Annotated[int, Field(ge=1, le=1_000_000)]

WEIGHTS = ("imagenet", "coco", "pre-fine", "none", "pretrain")
MAX_STEPS = 10**9 - 1  # a checkpoint's name has nine digits

# Settings that change how fast or how safely a cell is trained, not what it becomes.
RUNTIME_FIELDS = frozenset({"threads", "workers", "deterministic", "checkpoint_minutes", "profile"})


class Pretrain(Settings):
    """[protocol.pretrain]: the whole network that `weights = "pretrain"` trains first with CE.
    Resize, crop, flip, momentum, weight decay and decay are those of the protocol."""

    epochs: Epochs = 20
    batch_size: BatchSize = 8
    learning_rate: Rate = 0.02
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    threads: Annotated[int, Field(ge=0, le=1024)] = 0  # CPU threads a rank; 0: those of [protocol]


class Protocol(Settings):
    """[protocol]. The defaults are the paper's."""

    epochs: Epochs = 30
    batch_size: BatchSize = 12  # over all ranks; a last incomplete batch is dropped
    learning_rate: Rate = 1e-3
    decay: Literal["linear", "polynomial"] = "linear"
    decay_power: Rate = 0.9  # of the polynomial decay
    momentum: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.9
    weight_decay: Annotated[float, Field(ge=0.0)] = 1e-4

    resize: tuple[Side, Side] = (260, 1040)  # short side is drawn from this range, pixels
    # the long side follows, rounded to the nearest pixel, or down as in torchvision
    long_side: Literal["round", "truncate"] = "round"
    crop: tuple[Side, Side] = (480, 480)  # height, width in pixels
    flip: Fraction = 0.5  # probability of a horizontal flip
    eval_size: Annotated[int, Field(ge=0, le=32_768)] = (
        520  # short side in validation; 0 is the own size
    )

    weights: str = "imagenet"  # one of WEIGHTS, or a file's path
    train: Literal["head", "all"] = "head"
    backbone_batchnorm: Literal["eval", "train"] = "eval"  # of a frozen backbone
    batchnorm_momentum: Annotated[float, Field(gt=0.0, le=1.0)] = 0.1
    # mixed is fp16 with a gradient scaler, on a GPU; bf16 needs none, and a GPU newer than V100
    precision: Literal["fp32", "mixed", "bf16"] = "fp32"

    naive_ramp: tuple[Fraction, Fraction] = (0.3, 0.9)  # s, e as fractions of all iterations
    alternating_ramp: tuple[Fraction, Fraction] = (0.5, 0.9)
    bins: Annotated[int, Field(ge=1, le=100)] = 10  # of the calibration histograms
    # fused: one pass on the CPU, whatever the device; reference: plain PyTorch on the device
    counting: Literal["fused", "reference"] = "fused"
    pretrain: Pretrain = Pretrain()

    threads: Threads = 2  # CPU threads a rank
    workers: Annotated[int, Field(ge=0, le=64)] = 1  # loader processes a rank
    deterministic: bool = False  # deterministic algorithms on a GPU
    checkpoint_minutes: Annotated[float, Field(ge=0.0)] = 10.0
    profile: bool = False  # measure how long each part takes, see jobs/training/timings.py

    @model_validator(mode="after")
    def _ranges_are_ordered(self) -> Protocol:
        if self.resize[0] > self.resize[1]:
            raise ValueError(f"resize must be [smallest, largest], not {list(self.resize)}")
        for key in ("naive_ramp", "alternating_ramp"):
            start, end = getattr(self, key)
            if not 0 < start < end:
                raise ValueError(f"{key} must be [start, end] with 0 < start < end")
        return self

    def steps_per_epoch(self, images: int) -> int:
        """Batches in an epoch of `images` training images; a last incomplete one is dropped.
        Raises `UserError` if there is not one whole batch, or training would never end."""
        if images < self.batch_size:
            raise UserError(
                f"batch_size = {self.batch_size} is larger than the training set of {images} "
                "images; choose a smaller one in [protocol]"
            )
        steps = images // self.batch_size
        if self.epochs * steps > MAX_STEPS:
            raise UserError(
                f"epochs = {self.epochs} on {images} images are {self.epochs * steps} steps, more "
                f"than {MAX_STEPS}; choose fewer in [protocol]"
            )
        return steps

    def result_changing(self) -> dict[str, Any]:
        """The settings that decide what a cell becomes, as plain values for a fingerprint."""
        fields = self.model_dump(mode="json", exclude=set(RUNTIME_FIELDS))
        if self.weights not in WEIGHTS:
            # wherever the file lies; its hash is recorded with all that is made from it
            fields["weights"] = f"file {Path(self.weights).name}"
        del fields["pretrain"]["threads"]
        if self.weights != "pretrain":
            del fields["pretrain"]
        return fields

    @cached_property
    def result_json(self) -> str:
        """`result_changing` as canonical JSON: all cells of a data set have the same."""
        return canonical(self.result_changing())

    @cached_property
    def backbone_json(self) -> str:
        """As `result_json`, without what leaves a backbone that `weights = "pretrain"` trains as it
        is."""
        of_cells = {"weights", "train", "backbone_batchnorm", "bins", "counting", "eval_size",
                    "naive_ramp", "alternating_ramp", "epochs", "batch_size",
                    "learning_rate"}  # fmt: skip
        settings = self.result_changing()
        return canonical({key: settings[key] for key in settings.keys() - of_cells})
