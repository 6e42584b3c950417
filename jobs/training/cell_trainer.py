"""Train one cell: its network, loss and optimiser, and the step that updates the weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd import Variable
from torch.nn.parallel import DistributedDataParallel

from data_prep.settings import VOID
from hpc.cli import UserError
from hpc.distributed.process_group import COMMUNICATION, Group
from hpc.distributed.timer import Stopwatch
from jobs.data.batches import Batch
from jobs.losses.functional import combined_loss
from jobs.models.build import Backbone, Features, Network, build_head, upsample
from jobs.models.dropout import set_dropout_position
from jobs.models.memory_format import for_file, place
from jobs.spec.cell import Cell
from jobs.spec.protocol import Protocol
from jobs.training.overflow import LossScaler, in_fp32, remember


class CellTrainer:
    """Trains the head of `cell` on frozen features, or, given a `backbone`, the whole network.

    The state is that of the network, the momentum and the loss scaler; everything else is a
    function of the step.
    """

    def __init__(
        self,
        cell: Cell,
        num_classes: int,
        class_weights: np.ndarray,
        group: Group,
        backbone: Backbone | None = None,
    ) -> None:
        protocol = cell.protocol
        head = build_head(
            cell.model, num_classes, cell.seed, protocol.batchnorm_momentum, group.process_group
        )
        self.cell = cell
        self.head = head
        network: nn.Module = head if backbone is None else Network(backbone, head)
        self.network = place(network, group.device, protocol.precision)
        self.failure: str | None = None  # why this cell stopped, if it did
        self._group = group
        self._class_weights = torch.from_numpy(class_weights).to(group.device)
        # Keep gradient buckets fixed: by default, and with static_graph, DDP rebuilds them after
        # the first step, so a resumed run would add gradients in another order.
        # find_unused_parameters prevents this; its warning in the log is expected.
        # Gradients are views of these buckets: a cell has one buffer of them, for all its steps.
        self._parallel = DistributedDataParallel(
            self.network,
            broadcast_buffers=False,
            find_unused_parameters=True,
            gradient_as_bucket_view=True,
        )
        self._optimizer = sgd(self.network, protocol)
        self._half = half_precision(protocol, group)
        scaled = self._half == torch.float16  # bf16 has the range of fp32 and needs no scaler
        self._scaler = LossScaler(group.device, enabled=scaled)
        self.network.train()

    def step(self, inputs: Features, batch: Batch, target: Tensor, step: int, total: int) -> float:
        """Update the weights once. Return the loss of the global batch, for tests and benchmarks.

        If the loss is not finite, set `failure` and leave the weights as they are. In fp16 this
        holds for a loss that is not finite in fp32 either, and for gradients; see `LossScaler`.

        Args:
            inputs: Features or normalised images of this rank's share of the batch.
            batch: The same share; its positions key the dropout.
            target: int64 [b, h, w] on the device.
            step: Number of this step, from 0.
            total: Number of steps of the whole training.
        """
        cell, scaler = self.cell, self._scaler
        set_dropout_position(self.network, cell.seed, cell.model, step, batch.positions)
        restore = remember(self.network.buffers() if scaler.is_enabled() else ())
        loss = self._loss(inputs, target, step / total, self._half)
        value = scaler.read(self._group.sum(loss), step)
        if scaler.is_enabled() and not math.isfinite(value):
            del loss  # frees its graph
            restore()
            scaler.count("recomputed", step)
            loss = self._loss(in_fp32(inputs), target, step / total, None)
            value = scaler.read(self._group.sum(loss), step)
        self.failure = scaler.fault
        if not math.isfinite(value):
            self.failure = f"the loss was {value} at step {step} of {total}"
        if self.failure is None:
            self._update(loss, learning_rate(cell.protocol, step, total))
        if step == total - 1:  # no loss follows
            scaler.settle()
            self.failure = self.failure or scaler.fault
        return value

    def _loss(
        self, inputs: Features, target: Tensor, position: float, half: torch.dtype | None
    ) -> Tensor:
        """Return the loss of this rank; the network computes in `half`, or in fp32 if None."""
        watch = self._group.watch
        with watch.part("heads"), autocast(self._group.device, half):
            logits = self._parallel(inputs)
        if watch.running:
            logits.register_hook(partial(_time_network_backward, watch))
        with watch.part("losses"):
            logits = logits if half is None else logits.float()
            return combined_loss(  # no name keeps the upsampled logits alive
                upsample(logits, _size(target)),
                target, self.cell.loss, position, self._class_weights, VOID, self._group.sum,
            )  # fmt: skip

    @property
    def overflows(self) -> dict[str, int]:
        """Return the history of fp16 overflows; see `LossScaler`. Empty in other precisions."""
        return self._scaler.history

    def _update(self, loss: Tensor, rate: float) -> None:
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.zero_grad(set_to_none=True)
        with self._group.watch.part("losses"):
            # our losses add up over ranks, while DDP takes the mean of the ranks' gradients
            self._scaler.scale(loss * self._group.world_size).backward()
        with self._group.watch.part("optimiser"):
            self._scaler.step(self._optimizer)
            self._scaler.update()

    def state(self) -> dict[str, Any]:
        """Return everything that a step changes, as contiguous tensors and plain values."""
        momentum = self._optimizer.state_dict()["state"]
        return {
            "network": for_file(self.network.state_dict()),
            "momentum": {i: for_file(one) for i, one in momentum.items()},
            "scaler": self._scaler.state_dict(),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Load a state that `state` returned."""
        self.network.load_state_dict(state["network"])
        momentum = self._optimizer.state_dict()["state"]
        for i, one in momentum.items():  # copied, to keep the strides of the weights
            one["momentum_buffer"].copy_(state["momentum"][i]["momentum_buffer"])
        if state["scaler"]:  # empty if it was saved without mixed precision
            self._scaler.load_state_dict(state["scaler"])

    def state_matches(self, state: Any, buffers: Mapping[str, Tensor]) -> bool:
        """Return True if `state` has the entries, shapes and dtypes of this cell's state.

        Args:
            state: what a checkpoint holds, possibly of another program.
            buffers: the running statistics of the frozen backbone that training moves.
        """
        own = self._optimizer.state_dict()["state"]
        try:
            return (
                _shapes(state["network"]) == _shapes(self.network.state_dict())
                and {i: _shapes(one) for i, one in state["momentum"].items()}
                == {i: _shapes(one) for i, one in own.items()}
                and _shapes(state["backbone"]) == _shapes(buffers)
                and isinstance(state["scaler"], dict)
            )
        except (AttributeError, KeyError, TypeError):
            return False


def _shapes(tensors: Mapping[Any, Tensor]) -> dict[Any, tuple[torch.Size, torch.dtype]]:
    """Return shape and dtype of each tensor. Raises `AttributeError` if one is no tensor."""
    return {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}


def sgd(network: nn.Module, protocol: Protocol) -> torch.optim.SGD:
    """Return the optimiser of `network`, with momentum buffers.

    On a GPU one kernel updates many tensors, element by element. With a gradient scaler it also
    divides by the scale, and skips the update without a copy to the host.
    """
    parameters = list(network.parameters())
    optimizer = torch.optim.SGD(
        parameters,
        lr=protocol.learning_rate,
        momentum=protocol.momentum,
        weight_decay=protocol.weight_decay,
        fused=parameters[0].is_cuda,
    )
    if protocol.momentum:
        # allocated in the first step, it would fragment the memory of activations
        for parameter in parameters:
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def learning_rate(protocol: Protocol, step: int, total: int) -> float:
    """Return the learning rate of step i = `step` of I = `total`, from 0: (1 - i/I)^power."""
    power = 1.0 if protocol.decay == "linear" else protocol.decay_power
    return protocol.learning_rate * (1 - step / total) ** power


def is_mixed(protocol: Protocol, group: Group) -> bool:
    """Return True for fp16 with a gradient scaler: `precision = "mixed"` on a GPU.

    A CPU computes in fp32 instead. The provenance records which it was.
    """
    return protocol.precision == "mixed" and group.device.type == "cuda"


def half_precision(protocol: Protocol, group: Group) -> torch.dtype | None:
    """Return the half-precision dtype of training, or None for fp32.

    Raises `UserError` on a GPU without bf16. Every CPU has bf16, some of them slowly.
    """
    if protocol.precision != "bf16":
        return torch.float16 if is_mixed(protocol, group) else None
    on_gpu = group.device.type == "cuda"
    if on_gpu and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise UserError(
            f'{torch.cuda.get_device_name(group.device)} has no bf16; set precision = "mixed" '
            "(fp16) in [protocol], or ask for newer GPUs in the cluster profile"
        )
    return torch.bfloat16


def autocast(device: torch.device, half: torch.dtype | None) -> torch.autocast:
    """Return the context in which networks compute in `half`; None leaves them in fp32."""
    return torch.autocast(device.type, half or torch.float16, enabled=half is not None)


def _time_network_backward(watch: Stopwatch, gradient: Tensor) -> None:
    """Time the rest of the backward pass as `heads`, then the wait for other ranks."""
    watch.begin("heads")
    # queued before DistributedDataParallel's own callback, which waits for the all-reduce
    Variable._execution_engine.queue_callback(partial(watch.begin, COMMUNICATION))


def _size(target: Tensor) -> tuple[int, int]:
    return target.shape[-2], target.shape[-1]
