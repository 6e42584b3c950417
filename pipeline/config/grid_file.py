"""Read a grid file and resolve it into cells, without torch, h5py or mpi4py.

`read_grid` is the entry point. It refuses every mistake that can be seen in the file alone.
"""

from __future__ import annotations

import math
import os
import re
import shlex
from collections import Counter
from collections.abc import Collection, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from data_prep.settings import DatasetSettings, parse_dataset
from data_prep.weights import PRE_FINE
from hpc.account import expanded
from hpc.cli import UserError
from hpc.config import Name, Settings, did_you_mean, parse, read_toml, shown, user_path
from hpc.scheduler.cluster_profile import ClusterProfile, read_profile
from hpc.storage.atomic import fingerprint
from jobs.losses.grammar import LossSpec
from jobs.models.registry import MODELS, STRIDE
from jobs.spec.cell import Cell
from jobs.spec.protocol import Fraction, Protocol
from jobs.spec.run_paths import RunPaths
from pipeline.config.losses import resolve_losses, with_ramps
from pipeline.config.prefine import absences, protocol_of

DEFAULT_CONFIG = Path("lossgrid.toml")
CONFIGS = Path("configs")

Seed = Annotated[int, Field(ge=0, lt=2**63)]
MAX_CELLS = 1_000_000


class GridFile(Settings):
    """The top level of a grid file."""

    name: Name
    """Name of the grid."""
    seeds: Annotated[tuple[Seed, ...], Field(min_length=1)]
    """Seeds; every combination of data set, model and loss is trained once with each."""
    models: Annotated[tuple[str, ...], Field(min_length=1)]
    """Names of models; the table `MODELS` below lists them."""
    losses: tuple[str, ...] = ()
    """Names of losses by the grammar below."""
    ramps: tuple[tuple[Fraction, Fraction], ...] = ()
    """Start and end of schedules; each scheduled loss in `losses` is trained with each pair. Unit:
    fraction of all steps."""
    loss: tuple[dict[str, Any], ...] = ()
    """Losses of your own; see the table `[[loss]]`."""
    run_dir: str = ""
    """Run directory. Empty: `runs/NAME`."""
    dataset: dict[str, Any]
    """Data sets; see the tables `[dataset.NAME]`."""
    protocol: dict[str, Any] = Field(default_factory=dict)
    """Training and evaluation; see the table `[protocol]`."""
    cluster: dict[str, Any] | str = ""
    """Cluster profile: its name, its path, or a table `[cluster]` with its keys."""


class ProtocolTable(Protocol):
    """[protocol], and what it is for some data sets."""

    per_dataset: dict[str, Any] = Field(default_factory=dict)
    """Other values for single data sets; see the table `[protocol.per_dataset.NAME]`."""


@dataclass(frozen=True)
class Grid:
    """A resolved grid file; `cells` are in the order data set, model, loss, seed."""

    name: str
    path: Path
    datasets: Mapping[str, DatasetSettings]
    models: tuple[str, ...]
    losses_of: Mapping[str, tuple[LossSpec, ...]]  # by data set; names are the same
    seeds: tuple[int, ...]
    protocols: Mapping[str, Protocol]
    cells: tuple[Cell, ...]
    notes: tuple[str, ...]  # a line for each cell of the file that cannot exist, with the reason
    profile: Mapping[str, Any] | str  # a [cluster] table, or a profile's name or path
    run: RunPaths
    asked_profile: str = ""  # the argument of --cluster, which replaces that of the file

    @property
    def command_arguments(self) -> str:
        """Return the command-line arguments that name this grid and its cluster, quoted."""
        profile = ["--cluster", self.asked_profile] if self.asked_profile else []
        return shlex.join([str(self.path), *profile])

    @property
    def losses(self) -> tuple[LossSpec, ...]:
        """Return the losses of the first data set; those of the others have the same names."""
        return next(iter(self.losses_of.values()))

    @cached_property
    def cluster(self) -> ClusterProfile:
        """Return the cluster profile, which is read on first use.

        A job reads the run's copy of the grid file, and may not find a profile beside it.
        """
        if isinstance(self.profile, str):
            return read_profile(self.profile or None, near=self.path.parent)
        return parse(ClusterProfile, self.profile, f"{self.path}: [cluster]")


def _default_config(environ: Mapping[str, str] = os.environ) -> Path | None:
    """Return the grid file that `$LOSSGRID_CONFIG` names; None if it is not set or empty."""
    name = environ.get("LOSSGRID_CONFIG")
    return expanded(name) if name else None


def find_config(given: str | Path | None) -> Path:
    """Return the path of the grid file: `given`, `$LOSSGRID_CONFIG`, or ./lossgrid.toml.

    Raises `UserError`, which lists the files in configs/, if it does not exist.
    """
    path = Path(given) if given else _default_config() or DEFAULT_CONFIG
    if path.is_file():
        return path
    known = sorted(str(p) for p in CONFIGS.glob("*.toml"))
    hint = f"; there are {', '.join(known)}" if known else ""
    if given or _default_config():
        raise UserError(f"there is no grid file {path}{hint}")
    raise UserError(
        f"no grid file: give one, set LOSSGRID_CONFIG, or change to a folder with {path}{hint}"
    )


def read_grid(path: str | Path, cluster: str | None = None) -> Grid:
    """Read and resolve a grid file.

    Args:
        path: the grid file.
        cluster: the name or path of a cluster profile to use instead of that of the file.

    Raises:
        UserError: the first mistake in the file.
    """
    path = Path(path)
    file = parse(GridFile, read_toml(path), str(path))
    _refuse_repeats(
        path,
        {"seeds": file.seeds, "models": file.models, "losses": file.losses, "ramps": file.ramps},
    )
    for model in file.models:
        if model not in MODELS:
            raise UserError(f"{path}: unknown model {shown(model)}; {did_you_mean(model, MODELS)}")
    if not file.dataset:
        raise UserError(f"{path}: no data set; add a table [dataset.NAME] with a source")
    datasets = {n: parse_dataset(n, table, str(path)) for n, table in file.dataset.items()}
    run = RunPaths(user_path(file.run_dir or f"runs/{_folder(file.name)}", f"{path}: run_dir"))
    _refuse_shared_folders(path, run.root, datasets)
    protocols = _protocols(path, file, datasets)
    _refuse_small_sides(path, file.models, protocols)
    names = with_ramps(str(path), file.losses, file.ramps)
    losses = {
        name: tuple(resolve_losses(str(path), names, file.loss, protocol))
        for name, protocol in protocols.items()
    }
    _refuse_too_many(path, [datasets, file.models, names + file.loss, file.seeds])
    absent = absences(path, file.losses, file.models, datasets, protocols)
    return Grid(
        name=file.name,
        path=path,
        datasets=datasets,
        models=file.models,
        losses_of=losses,
        seeds=file.seeds,
        protocols=protocols,
        cells=tuple(_cells(file, datasets, losses, protocols, absent)),
        notes=tuple(f"{'/'.join(where)} has no pre-fine: {why}" for where, why in absent.items()),
        profile=cluster or file.cluster,
        run=run,
        asked_profile=cluster or "",
    )


def _cells(
    file: GridFile,
    datasets: Mapping[str, DatasetSettings],
    losses_of: Mapping[str, Sequence[LossSpec]],
    protocols: Mapping[str, Protocol],
    absent: Container[tuple[str, str]],
) -> Iterator[Cell]:
    """Yield the cells in the order data set, model, loss, seed.

    `absent`: data sets and models without pre-fine.
    """
    for name, settings in datasets.items():
        data = settings.identity()
        runs = [(loss, protocol_of(loss, protocols[name])) for loss in losses_of[name]]
        for model, (loss, protocol), seed in product(file.models, runs, file.seeds):
            if loss.name != PRE_FINE or (name, model) not in absent:
                # skip validation: the values were checked before, and there are thousands of cells
                yield Cell.model_construct(dataset=name, data=data, model=model, loss=loss,
                                           seed=seed, protocol=protocol)  # fmt: skip


def profiled(grid: Grid) -> Grid:
    """Return the same grid with jobs that measure the time of each part."""
    return replace(grid, cells=tuple(cell.profiled() for cell in grid.cells))


def _folder(name: str) -> str:
    """Return a folder name for a grid name: the same if possible, else one with a hash.

    Two grids then share a run directory only if both set the same `run_dir`.
    """
    if len(name) <= 60 and re.fullmatch(r"[\w-][\w.-]*", name):
        return name
    words = "".join(c if c.isalnum() or c in "-_." else "-" for c in name).lstrip(".")[:40]
    return f"{words or 'grid'}+{fingerprint(name)[:8]}"  # names that need no hash have no plus


def _refuse_repeats(path: Path, lists: Mapping[str, tuple[Any, ...]]) -> None:
    for key, values in lists.items():
        value, times = Counter(values).most_common(1)[0] if values else (None, 0)
        if times > 1:
            raise UserError(f"{path}: {key} names {shown(value)} twice; once is enough")


def _refuse_shared_folders(path: Path, run: Path, datasets: Mapping[str, DatasetSettings]) -> None:
    """Refuse a folder that two owners would write to; data sets may share a root they only read."""
    folders = [(str(run), "the run directory", True)]
    for name, settings in datasets.items():
        root: str = getattr(settings, "root", "")
        folders.append((settings.shards, f"the shards folder of {name!r}", True))
        folders.append((root, f"the root of {name!r}", settings.source == "synthetic"))
    owners: dict[str, str] = {}
    for folder, owner, written in sorted(folders, key=lambda entry: not entry[2]):
        other = owners.get(os.path.realpath(folder))
        if other:
            raise UserError(f"{path}: {other} and {owner} are both {folder}; give each its own")
        if written:
            owners[os.path.realpath(folder)] = owner


def _refuse_small_sides(
    path: Path, models: Sequence[str], protocols: Mapping[str, Protocol]
) -> None:
    """Refuse sides of at most the model's stride.

    The features of such a crop have one position: all pixels get the same scores, and batch norm
    over one value learns nothing.
    """
    model = max(models, key=lambda name: STRIDE[MODELS[name].backbone])
    stride = STRIDE[MODELS[model].backbone]
    for name, protocol in protocols.items():
        sides = {
            "crop": min(protocol.crop),
            "resize": protocol.resize[0],
            "eval_size": protocol.eval_size or stride + 1,
        }
        for key, side in sides.items():
            if side <= stride:
                raise UserError(
                    f"{path}: {key} has a side of {side} pixels for the data set {name!r}, but "
                    f"{stride} x {stride} are one position to {model}; choose more than {stride}"
                )


def _refuse_too_many(path: Path, axes: Sequence[Collection[Any]]) -> None:
    number = math.prod(len(axis) for axis in axes)
    if number > MAX_CELLS:
        raise UserError(f"{path}: {number} cells are more than {MAX_CELLS}; split the grid")


def _protocols(
    path: Path, file: GridFile, datasets: Mapping[str, DatasetSettings]
) -> dict[str, Protocol]:
    """Return the protocol of each data set; [protocol.per_dataset.NAME] overrides [protocol]."""
    special = _table(file.protocol.get("per_dataset", {}), f"{path}: [protocol.per_dataset]")
    parse(ProtocolTable, file.protocol, f"{path}: [protocol]")
    table = {key: value for key, value in file.protocol.items() if key != "per_dataset"}
    protocols = dict.fromkeys(datasets, parse(Protocol, table, f"{path}: [protocol]"))
    for name, changes in special.items():
        where = f"{path}: [protocol.per_dataset.{name}]"
        if name not in datasets:
            raise UserError(f"{where}: no such data set; {did_you_mean(name, datasets)}")
        protocols[name] = parse(Protocol, _changed(table, _table(changes, where)), where)
    return protocols


def _table(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UserError(f"{where} must be a table, not {shown(value)}")
    return value


def _changed(table: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return `table` updated with `changes`, also inside nested tables."""
    nested = {
        key: _changed(table[key], value)
        for key, value in changes.items()
        if isinstance(value, dict) and isinstance(table.get(key), dict)
    }
    return {**table, **changes, **nested}
