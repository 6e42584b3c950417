"""The [protocol] table of a grid file: the settings of training and evaluation of every cell."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from data_prep.weights import PUBLISHED, WITHOUT_FILE
from hpc.cli import UserError
from hpc.config import Settings
from hpc.storage.atomic import canonical

BatchSize = Annotated[int, Field(ge=1, le=1_000_000)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Rate = Annotated[float, Field(gt=0.0)]
Side = Annotated[int, Field(ge=1, le=32_768)]  # pixels
Threads = Annotated[int, Field(ge=1, le=1024)]
Epochs = Annotated[int, Field(ge=1, le=1_000_000)]

WEIGHTS = (*PUBLISHED, *WITHOUT_FILE)
MAX_STEPS = 10**9 - 1  # a checkpoint's name has nine digits

# Settings that change results by rounding at most; not part of the identity.
RUNTIME_FIELDS = frozenset({"threads", "workers", "deterministic", "checkpoint_minutes", "profile"})


class Pretrain(Settings):
    """[protocol.pretrain]: the training of the network whose backbone `weights = "pretrain"` uses.

    Its loss is CE. Resize, crop, flip, momentum, weight decay and decay are those of [protocol].
    """

    epochs: Epochs = 20
    """Passes over the training images. Unit: epochs."""
    batch_size: BatchSize = 8
    """Images per step over all ranks. Unit: images."""
    learning_rate: Rate = 0.02
    """Learning rate of the first step."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Seed of the initial weights, of augmentation and of the order of images."""
    threads: Annotated[int, Field(ge=0, le=1024)] = 0
    """CPU threads per rank; 0 takes `threads` of `[protocol]`."""


class Protocol(Settings):
    """[protocol]; the defaults are those of the paper."""

    epochs: Epochs = 30
    """Passes over the training images. Unit: epochs."""
    batch_size: BatchSize = 12
    """Images per step over all ranks; an incomplete last batch is dropped. Unit: images."""
    learning_rate: Rate = 1e-3
    """Learning rate of the first step."""
    decay: Literal["linear", "polynomial"] = "linear"
    """Decay of the learning rate to 0 over all steps."""
    decay_power: Rate = 0.9
    """Exponent of the polynomial decay."""
    momentum: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.9
    """Momentum of SGD."""
    weight_decay: Annotated[float, Field(ge=0.0)] = 1e-4
    """Weight decay (L2) of SGD."""

    resize: tuple[Side, Side] = (260, 1040)
    """Range from which the short side of a training image is drawn. Unit: pixels."""
    long_side: Literal["round", "truncate"] = "round"
    """Rounding of the long side: to the nearest pixel, or down as torchvision does."""
    crop: tuple[Side, Side] = (480, 480)
    """Height and width of a training crop. Unit: pixels."""
    flip: Fraction = 0.5
    """Probability of a horizontal flip."""
    eval_size: Annotated[int, Field(ge=0, le=32_768)] = 520
    """Short side in validation; 0 keeps the size of each image. Unit: pixels."""

    weights: str = "imagenet"
    """Initial weights: `imagenet`, `coco`, `pre-fine`, `none`, `pretrain`, or a path of a file."""
    train: Literal["head", "all"] = "head"
    """Trained part: the head over a frozen backbone, or the whole network."""
    backbone_batchnorm: Literal["eval", "train"] = "eval"
    """Batch norm mode of a frozen backbone."""
    batchnorm_momentum: Annotated[float, Field(gt=0.0, le=1.0)] = 0.1
    """Momentum of the running statistics of batch norm."""
    precision: Literal["fp32", "mixed", "bf16"] = "fp32"
    """Precision of training: `mixed` is fp16 with a gradient scaler, on a GPU only. `bf16` needs
    a CPU or a GPU newer than V100."""

    naive_ramp: tuple[Fraction, Fraction] = (0.3, 0.9)
    """Start and end of naive schedules. Unit: fraction of all steps."""
    alternating_ramp: tuple[Fraction, Fraction] = (0.5, 0.9)
    """Start and end of alternating schedules. Unit: fraction of all steps."""
    bins: Annotated[int, Field(ge=1, le=100)] = 10
    """Bins of the calibration histograms. Unit: bins."""
    counting: Literal["fused", "reference"] = "fused"
    """Program that makes the evaluation counts: one pass on the CPU, or plain PyTorch on the
    device."""
    pretrain: Pretrain = Pretrain()
    """Pre-training with `weights = "pretrain"`; see the table `[protocol.pretrain]`."""

    threads: Threads = 2
    """CPU threads per rank."""
    workers: Annotated[int, Field(ge=0, le=64)] = 1
    """Loader processes per rank; 0 loads in the rank itself."""
    deterministic: bool = False
    """Use deterministic algorithms. Equal bits on a GPU need this; it changes no bit on a CPU."""
    checkpoint_minutes: Annotated[float, Field(ge=0.0)] = 10.0
    """Time between two checkpoints. Unit: minutes."""
    profile: bool = False
    """Measure the time of each part of a job, as `--profile` does."""

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
        """Return the batches in an epoch of `images` training images.

        An incomplete last batch is dropped. Raises `UserError` if there is no complete batch, or if
        training has more than `MAX_STEPS` steps.
        """
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

    def identity(self) -> dict[str, Any]:
        """Return the settings that can change a result, as plain values for a fingerprint."""
        fields = self.model_dump(mode="json", exclude=set(RUNTIME_FIELDS))
        if self.weights not in WEIGHTS:
            # without the folder; results record the hash of the file
            fields["weights"] = f"file {Path(self.weights).name}"
        del fields["pretrain"]["threads"]
        if self.weights != "pretrain":
            del fields["pretrain"]
        return fields

    @cached_property
    def identity_json(self) -> str:
        """Return `identity` as canonical JSON, cached because all cells of a data set share it."""
        return canonical(self.identity())

    @cached_property
    def backbone_json(self) -> str:
        """Return the settings that can change a pre-trained backbone, as canonical JSON."""
        of_cells = {"weights", "train", "backbone_batchnorm", "bins", "counting", "eval_size",
                    "naive_ramp", "alternating_ramp", "epochs", "batch_size",
                    "learning_rate"}  # fmt: skip
        settings = self.identity()
        return canonical({key: settings[key] for key in settings.keys() - of_cells})
