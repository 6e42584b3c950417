"""One start of one job: what surrounds training. Its generation, its checkpoints, its heartbeat,
and the agreement of all ranks on what to do at a step's edge."""

from __future__ import annotations

import enum
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from hpc import checkpoint
from hpc.atomic import write_json
from hpc.command import UserError
from hpc.generation import Generation, claim
from hpc.groups import Group
from hpc.preempt import StopRequest
from jobs.backbone import moving_buffers
from jobs.cell import Cell
from jobs.models.build import Backbone
from jobs.task import Task
from jobs.trainee import Trainee, is_mixed

HEARTBEAT_SECONDS = 2.0


class Action(enum.IntEnum):
    """What happens at a step's edge; the ranks agree on the highest that one of them wants."""

    GO_ON = 0
    SAVE = 1
    STOP = 2


@dataclass
class Run:
    """This start of `task`. `inputs` are the hashes of what the cells are made from; they must not
    change under a half-trained cell."""

    task: Task
    group: Group
    stop: StopRequest
    inputs: Mapping[str, str]
    generation: Generation = field(init=False)
    provenance: list[dict[str, Any]] = field(init=False)
    _saved_at: float = field(init=False, default_factory=time.monotonic)
    _beat_at: float = field(init=False, default=0.0)
    _started: tuple[float, int] = field(init=False, default=(0.0, 0))

    def __post_init__(self) -> None:
        signatures = [cell.signature for cell in self.task.cells]
        if self.group.is_main:
            mine = claim(self.task.paths.generations(self.bundle_key), signatures)
        self.generation = self.group.broadcast(mine if self.group.is_main else None)
        self.provenance = [_provenance(self.task.cells[0], self.group)]

    @property
    def bundle_key(self) -> str:
        return self.task.cells[0].bundle_key

    @property
    def label(self) -> str:
        return f"{self.task.name} (generation {self.generation.number})"

    def resume(self, trainees: Sequence[Trainee], backbone: Backbone | None) -> int:
        """Take up the newest checkpoint that all cells share. Returns the number of steps done."""
        folder = self.task.paths.checkpoints(self.bundle_key)
        names = [trainee.cell.signature for trainee in trainees]
        step, states, records, problems = checkpoint.load_latest(folder, names)
        step = self.group.broadcast(step)
        for problem in problems:
            self.say(f"warning: {problem}; passed over")
        if step == 0:
            self.say("warning: no checkpoint is intact" if problems else "there is no checkpoint")
            self.say("starting at step 0")
            return 0
        for record in records:
            self._require_same_inputs(record["inputs"])
        for trainee in trainees:
            state = states[trainee.cell.signature]
            trainee.load(state)
            if backbone is not None and state["backbone"]:
                backbone.load_state_dict(state["backbone"], strict=False)
        starts = [p for record in records for p in record["provenance"]] + self.provenance
        self.provenance = [p for i, p in enumerate(starts) if p not in starts[:i]]
        self.say(f"resuming at step {step}")
        return step

    def _require_same_inputs(self, recorded: Mapping[str, str]) -> None:
        for what, sha256 in self.inputs.items():
            if recorded[what] != sha256:
                folder = self.task.paths.checkpoints(self.bundle_key)
                raise UserError(
                    f"the {what} changed under half-trained cells of {self.task.name}; restore it, "
                    f"or delete {folder} to train them anew"
                )

    def begin(self, step: int) -> None:
        """Training goes on from `step` now: rates and intervals count from here."""
        self._started = (time.monotonic(), step)
        self._saved_at = time.monotonic()

    def agree(self) -> Action:
        """What all ranks do at this step's edge."""
        wish = Action.GO_ON
        minutes = self.task.cells[0].protocol.checkpoint_minutes
        if self.stop:
            wish = Action.STOP
        elif self.group.is_main and time.monotonic() - self._saved_at >= 60 * minutes:
            wish = Action.SAVE
        return Action(self.group.max(wish))

    def save(self, step: int, trainees: Sequence[Trainee], backbone: Backbone | None) -> None:
        """Publish a checkpoint of the cells that still train; rank 0 writes."""
        if self.group.is_main and trainees:
            buffers = moving_buffers(backbone) if backbone is not None else {}
            entries = {t.cell.signature: {**t.state(), "backbone": buffers} for t in trainees}
            record = {"inputs": dict(self.inputs), "provenance": self.provenance}
            folder = self.task.paths.checkpoints(self.bundle_key)
            checkpoint.save(folder, step, self.generation, entries, record)
        self._saved_at = time.monotonic()

    def give_up(self, trainee: Trainee, step: int) -> None:
        """Record why a cell stopped for good. Its neighbours go on."""
        self.say(f"warning: {trainee.cell.name} stops: {trainee.failure}")
        if self.group.is_main:
            record = {"cell": trainee.cell.name, "step": step, "reason": trainee.failure}
            write_json(self.task.paths.failure(trainee.cell.signature), record)

    def beat(self, stage: str, step: int, total: int, force: bool = False) -> None:
        """Say that this job lives, and how far it is."""
        now = time.monotonic()
        if not self.group.is_main or (now - self._beat_at < HEARTBEAT_SECONDS and not force):
            return
        self._beat_at = now
        began, first = self._started
        rate = (step - first) / (now - began) if step > first and now > began else 0.0
        record = {"stage": stage, "step": step, "total": total, "steps_per_second": rate,
                  "time": time.time(), "generation": self.generation.number}  # fmt: skip
        write_json(self.task.paths.progress_of(self.task.name), record)

    def say(self, text: str) -> None:
        """A line in the job's log, from rank 0."""
        if self.group.is_main:
            print(f"{self.label}: {text}", file=sys.stderr, flush=True)


def _provenance(cell: Cell, group: Group) -> dict[str, Any]:
    """What bits may depend on beside the cell's settings."""
    cuda = group.device.type == "cuda"
    return {
        "world_size": group.world_size,
        "threads": torch.get_num_threads(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(group.device) if cuda else "cpu",
        "mixed_precision": is_mixed(cell.protocol, group),
        "deterministic": cell.protocol.deterministic or not cuda,
    }
