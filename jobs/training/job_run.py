"""One start of one job: its generation, checkpoints and heartbeat, and the agreement of all ranks.

The ranks decide together, between two steps, whether to go on, save, stop or abort.
"""

from __future__ import annotations

import enum
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from data_prep.shards.manifest import ROOTS, Manifest
from hpc.cli import UserError, one_line
from hpc.distributed.preemption import StopRequest
from hpc.distributed.process_group import Group
from hpc.storage import checkpoint
from hpc.storage.atomic import Damaged, read_json, write_json
from hpc.storage.fencing import Generation, Superseded, claim
from jobs.models.build import Backbone
from jobs.models.memory_format import for_file
from jobs.spec.cell import Cell
from jobs.spec.task import Task
from jobs.training.backbone import moving_buffers
from jobs.training.cell_trainer import CellTrainer, half_precision, is_mixed

HEARTBEAT_SECONDS = 2.0

# Part of the provenance. Increase it when a change of the program alters rounding.
ROUNDING = {"cpu": 3, "cuda": 6}

T = TypeVar("T")


class Action(enum.IntEnum):
    """The ranks' decision between two steps; they agree on the highest that one of them wants."""

    GO_ON = 0
    SAVE = 1
    STOP = 2
    ABORT = 3


@dataclass
class JobRun:
    """This start of `task`.

    Only rank 0 writes. If it cannot (disk full, superseded by a newer generation), the error is
    raised on all ranks. So no rank waits for another that has exited.

    Attributes:
        inputs: hashes of the data set and the backbone, which must not change under a half-trained
            cell.
        generation: fencing token of this start.
        provenance: the machines and versions that trained the cells, one entry for each change.
    """

    task: Task
    group: Group
    stop: StopRequest
    inputs: Mapping[str, str]
    generation: Generation = field(init=False)
    provenance: list[dict[str, Any]] = field(init=False)
    _saved_at: float = field(init=False, default_factory=time.monotonic)
    _beat_at: float = field(init=False, default=0.0)
    _started: tuple[float, int] = field(init=False, default=(0.0, 0))
    _trouble: UserError | None = field(init=False, default=None)  # of rank 0's heartbeat
    _muted: bool = field(init=False, default=False)  # its last heartbeat could not be written

    def __post_init__(self) -> None:
        signatures = [cell.signature for cell in self.task.cells]
        folder = self.task.paths.generations(self.bundle_key)
        self.generation = self.group.on_main(lambda: claim(folder, signatures))
        self.provenance = [_provenance(self.task.cells[0], self.group)]

    @property
    def bundle_key(self) -> str:
        return self.task.cells[0].bundle_key

    @property
    def label(self) -> str:
        return f"{self.task.name} (generation {self.generation.number})"

    def resume(self, trainers: Sequence[CellTrainer], backbone: Backbone | None) -> int:
        """Load the newest checkpoint that all cells have and all ranks can read.

        Returns the number of steps done. Raises `UserError` if the inputs changed.
        """
        step, states, records, problems = self._load(trainers, backbone)
        for problem, ranks in problems.items():
            everywhere = len(ranks) == self.group.world_size
            where = "" if everywhere else f" (on rank {', '.join(map(str, ranks))})"
            self.log(f"warning: {problem}{where}; passed over")
        if step == 0:
            self.log("warning: no checkpoint is intact" if problems else "there is no checkpoint")
            self.log("starting at step 0")
            return 0
        for record in records:
            self._require_same_inputs(record["inputs"])
        for trainer in trainers:
            state = states[trainer.cell.signature]
            trainer.load(state)
            if backbone is not None and state["backbone"]:
                backbone.load_state_dict(state["backbone"], strict=False)
        starts = [p for record in records for p in record["provenance"]] + self.provenance
        self.provenance = [p for i, p in enumerate(starts) if p not in starts[:i]]
        self.log(f"resuming at step {step}")
        return step

    def _load(self, trainers: Sequence[CellTrainer], backbone: Backbone | None) -> tuple[Any, ...]:
        """Return `checkpoint.load_latest` at the newest step that every rank can read.

        Its last item gives, for each problem, the ranks that have it.
        """
        folder = self.task.paths.checkpoints(self.bundle_key)
        cells = {trainer.cell.signature: trainer for trainer in trainers}
        buffers = moving_buffers(backbone, self.task.cells[0].protocol)

        def state_matches(entry: str, state: Any) -> bool:
            return cells[entry].state_matches(state, buffers)

        newest, problems = None, []
        while True:
            step, *found, passed_over = checkpoint.load_latest(folder, cells, state_matches, newest)
            problems += passed_over
            shared = -self.group.max(-step)
            if self.group.max(step) == shared:
                return step, *found, self._by_rank(problems)
            self.log(f"warning: not every rank can read a checkpoint beyond step {shared}")
            newest = shared

    def _by_rank(self, problems: Sequence[str]) -> dict[str, list[int]]:
        found: dict[str, list[int]] = {}
        for rank in range(self.group.world_size):
            for problem in dict.fromkeys(self.group.broadcast(problems, source=rank)):
                found.setdefault(problem, []).append(rank)
        return found

    def _require_same_inputs(self, recorded: Mapping[str, str]) -> None:
        for what, sha256 in self.inputs.items():
            if recorded.get(what) != sha256:
                folder = self.task.paths.checkpoints(self.bundle_key)
                anew = (
                    "submit grid with --retrain stale" if what == "data set" else f"delete {folder}"
                )
                raise UserError(
                    f"the {what} changed under half-trained cells of {self.task.name}; restore it, "
                    f"or {anew} to train them anew"
                )

    def begin(self, step: int) -> None:
        """Start the clocks of the training rate and of the checkpoint interval at `step`."""
        self._started = (time.monotonic(), step)
        self._saved_at = time.monotonic()

    def decide(self) -> Action:
        """Return what all ranks do after this step. All ranks must call it together."""
        wish = Action.GO_ON
        minutes = self.task.cells[0].protocol.checkpoint_minutes
        if self._trouble is not None:
            wish = Action.ABORT
        elif self.stop:
            wish = Action.STOP
        elif self.group.is_main and time.monotonic() - self._saved_at >= 60 * minutes:
            wish = Action.SAVE
        return Action(self.group.max(wish))

    def agree(self) -> Action:
        """Return the decision of `decide`. If any rank has an error, raise it on all ranks.

        The error is that a newer generation has started, a damaged claim, or one of the loader.
        """
        action = self.decide()
        if action is Action.ABORT:
            self.raise_trouble()
        return action

    def raise_trouble(self) -> None:
        """Raise the error of one rank, if any, on all ranks. All ranks must call it together."""
        self.group.raise_together(self._trouble)

    def fetch(self, items: Iterator[T]) -> T | None:
        """Return the next of `items`, or None at their end or after a `UserError`.

        The next `decide` or `raise_trouble` reports the error to all ranks.
        """
        try:
            with self.group.watch.part("data"):
                return next(items, None)
        except UserError as error:
            self._trouble = error
            return None

    def save(self, step: int, trainers: Sequence[CellTrainer], backbone: Backbone | None) -> None:
        """Publish a checkpoint of the cells that still train. All ranks must call it together."""
        if trainers:
            with self.group.watch.part("checkpoints"):
                self.group.on_main(lambda: self._write_checkpoint(step, trainers, backbone))
        self._saved_at = time.monotonic()

    def _write_checkpoint(
        self, step: int, trainers: Sequence[CellTrainer], backbone: Backbone | None
    ) -> None:
        buffers = moving_buffers(backbone, self.task.cells[0].protocol)
        entries = _States({t.cell.signature: t for t in trainers}, for_file(buffers))
        record = {"inputs": dict(self.inputs), "provenance": self.provenance}
        folder, (_, resumed) = self.task.paths.checkpoints(self.bundle_key), self._started
        checkpoint.save(folder, step, self.generation, entries, record, resumed)

    def give_up(self, trainer: CellTrainer, step: int | None) -> None:
        """Record on rank 0 why a cell failed; the other cells continue.

        `step` is None if the cell failed after its last step.
        """
        record = {"cell": trainer.cell.name, "step": step, "reason": trainer.failure,
                  "inputs": dict(self.inputs)}  # fmt: skip
        path = self.task.paths.failure(trainer.cell.signature)
        write_json(path, record, self.generation.check)
        self.log(f"warning: {trainer.cell.name} stops: {trainer.failure}")

    def counts_record(self, manifest: Manifest) -> dict[str, Any]:
        """Return the record of a counts file: what all its cells have in common."""
        return {
            "task": self.task.name,
            "generation": self.generation.number,
            "manifest": manifest.fingerprint,
            "provenance": self.provenance,
            "source": self.task.source,
            "time": time.time(),
        }

    def finish(self, stage: str, step: int, total: int) -> None:
        """Write the last heartbeat. Raise on all ranks if a newer generation has started.

        A full disk is only logged. All ranks must call this together.
        """
        self.heartbeat(stage, step, total, force=True)
        self.raise_trouble()

    def heartbeat(self, stage: str, step: int, total: int, force: bool = False) -> None:
        """Write the job's progress on rank 0, at most every `HEARTBEAT_SECONDS` unless `force`.

        It notices a newer generation; the next `decide` tells the other ranks.
        """
        now = time.monotonic()
        if not self.group.is_main or (now - self._beat_at < HEARTBEAT_SECONDS and not force):
            return
        self._beat_at = now
        began, first = self._started
        rate = (step - first) / (now - began) if step > first and now > began else 0.0
        record = {"stage": stage, "step": step, "total": total, "steps_per_second": rate,
                  "time": time.time(), "generation": self.generation.number}  # fmt: skip
        path = self.task.paths.progress_of(self.task.name)
        muted, self._muted = self._muted, False
        try:
            write_json(path, record, self.generation.check)
        except (Superseded, Damaged) as error:
            self._trouble = error
        except UserError as error:  # a missing heartbeat alone does not make the job count as dead
            self._muted = True
            if not muted:
                self.log(f"warning: {error}; without a heartbeat training goes on")

    def log(self, text: str) -> None:
        """Print a line to the job's log on rank 0."""
        if self.group.is_main:
            print(one_line(f"{self.label}: {text}"), file=sys.stderr, flush=True)


@dataclass(frozen=True)
class _States(Mapping[str, dict[str, Any]]):
    """The states of `trainers` for a checkpoint, by cell; each is made when it is read."""

    trainers: Mapping[str, CellTrainer]
    buffers: Mapping[str, Tensor]  # of the frozen backbone, if training moves them

    def __getitem__(self, signature: str) -> dict[str, Any]:
        return {**self.trainers[signature].state(), "backbone": self.buffers}

    def __iter__(self) -> Iterator[str]:
        return iter(self.trainers)

    def __len__(self) -> int:
        return len(self.trainers)


def require_data(task: Task, manifest: Manifest, group: Group) -> None:
    """Raise `UserError` on all ranks if the packed data set is not the one of `task`.

    It also raises if the ranks see different data sets, because it was packed again meanwhile. A
    data set whose source files only moved is the same. All ranks must call this together.
    """
    problem = None
    try:
        cell = task.cells[0]
        if manifest.differences(task.origin).keys() - ROOTS:
            manifest.require_settings(task.origin, task.data, cell.dataset)
        if task.kind == "bundle" and cell.protocol.weights == "pretrain":
            _require_same_backbone(task, manifest)
    except UserError as error:
        problem = error
    if group.broadcast(manifest.fingerprint) != manifest.fingerprint:
        problem = UserError(f"{task.data} was packed anew while the ranks started; run grid again")
    group.raise_together(problem)


def _require_same_backbone(task: Task, manifest: Manifest) -> None:
    path = task.paths.backbone(task.cells[0].backbone_key)
    try:
        trained_on = read_json(path.with_suffix(".json"))["manifest"]
    except FileNotFoundError:  # `load_backbone` reports it
        return
    if trained_on != manifest.fingerprint:
        raise UserError(
            f"{path} was trained on other data than {task.data} holds now; restore the data set, "
            "or submit grid with --retrain stale"
        )


def _provenance(cell: Cell, group: Group) -> dict[str, Any]:
    """Return the facts, apart from the cell's settings, that can change its bits."""
    cuda = group.device.type == "cuda"
    libraries = {"cudnn": torch.backends.cudnn.version()} if cuda else {}
    return {
        "world_size": group.world_size,
        "threads": torch.get_num_threads(),
        "cpu": _instructions(half_precision(cell.protocol, group)),
        "torch": torch.__version__,
        "rounding": ROUNDING[group.device.type],
        "device": torch.cuda.get_device_name(group.device) if cuda else "cpu",
        "mixed_precision": is_mixed(cell.protocol, group),
        "deterministic": cell.protocol.deterministic or not cuda,
        **libraries,
    }


def _instructions(half: torch.dtype | None) -> str:
    """Return the CPU's instruction set, as far as bits depend on it.

    torch's name for it leaves out the instructions for bf16.
    """
    found = torch.backends.cpu.get_cpu_capability()
    if half != torch.bfloat16:
        return found
    # private functions of torch, which some releases lack
    asked = {"bf16": "_is_avx512_bf16_supported", "amx": "_is_amx_tile_supported"}
    has = [word for word, name in asked.items() if getattr(torch.cpu, name, bool)()]
    return " ".join([found, *has])
