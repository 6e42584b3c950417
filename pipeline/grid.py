"""The grid file -> cells -> tasks. Pure functions of the file and of what exists already; no torch,
h5py or mpi4py, so that planning costs nothing."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise, product
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from data_prep.settings import DatasetSettings, parse_dataset
from hpc.command import UserError
from hpc.config import Settings, did_you_mean, parse, read_toml
from hpc.env import default_config
from hpc.profile import ClusterProfile, read_profile
from jobs.cell import Cell, RunPaths, bundles
from jobs.losses.names import Knot, LossSpec, Ramp, UnknownLoss, example_names, parse_loss
from jobs.models.names import MODELS
from jobs.protocol import Protocol
from jobs.task import Task, bundle_task_name

DEFAULT_CONFIG = Path("lossgrid.toml")
CONFIGS = Path("configs")

Seed = Annotated[int, Field(ge=0, lt=2**63)]
Weight = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]


class GridFile(Settings):
    """The top level of a grid file."""

    name: Annotated[str, Field(min_length=1)]
    seeds: Annotated[tuple[Seed, ...], Field(min_length=1)]
    models: Annotated[tuple[str, ...], Field(min_length=1)]
    losses: tuple[str, ...] = ()  # the paper's names
    loss: tuple[dict[str, Any], ...] = ()  # [[loss]] tables: any other
    run_dir: str = ""  # runs/NAME where not given
    dataset: dict[str, Any]
    protocol: dict[str, Any] = Field(default_factory=dict)
    cluster: dict[str, Any] | str = ""  # a [cluster] table, or the name of a profile


class KnotTable(Settings):
    """One entry of a [[loss]]'s schedule, see `Knot`."""

    at: Annotated[float, Field(ge=0.0, le=1.0)]
    weights: Annotated[tuple[Weight, ...], Field(min_length=1)]
    ramp: Ramp = "linear"


class LossTable(Settings):
    """A [[loss]]: named terms and a piecewise schedule of their weights; equal shares if none."""

    name: Annotated[str, Field(min_length=1)]
    terms: Annotated[tuple[str, ...], Field(min_length=1)]
    schedule: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True)
class Grid:
    """A grid file, resolved. `cells` are in the order of the file: data set, model, loss, seed."""

    name: str
    path: Path
    datasets: Mapping[str, DatasetSettings]
    models: tuple[str, ...]
    losses: tuple[LossSpec, ...]
    seeds: tuple[int, ...]
    protocols: Mapping[str, Protocol]
    cells: tuple[Cell, ...]
    profile: Mapping[str, Any] | str  # a [cluster] table, or a profile's name or path
    run: RunPaths

    @cached_property
    def cluster(self) -> ClusterProfile:
        """The cluster profile. Read when it is asked for: only what submits needs it, and a job
        that reads the run's copy of the grid file may not find the profile that lay beside it.
        """
        if isinstance(self.profile, str):
            return read_profile(self.profile or None, near=self.path.parent)
        return parse(ClusterProfile, self.profile, f"{self.path}: [cluster]")


def find_config(given: str | Path | None) -> Path:
    """The grid file a command means: the one given, `$LOSSGRID_CONFIG`, or ./lossgrid.toml.
    Raises `UserError` that lists what there is in configs/."""
    path = Path(given) if given else default_config() or DEFAULT_CONFIG
    if path.is_file():
        return path
    known = sorted(str(p) for p in CONFIGS.glob("*.toml"))
    hint = f"; there are {', '.join(known)}" if known else ""
    if given or default_config():
        raise UserError(f"there is no grid file {path}{hint}")
    raise UserError(
        f"no grid file: give one, set LOSSGRID_CONFIG, or run where there is a {path}{hint}"
    )


def read_grid(path: str | Path, cluster: str | None = None) -> Grid:
    """Read and resolve a grid file; `cluster` names a profile that is used in place of its own.
    Raises `UserError` for the first thing that is wrong."""
    path = Path(path)
    file = parse(GridFile, read_toml(path), str(path))
    _refuse_repeats(path, {"seeds": file.seeds, "models": file.models, "losses": file.losses})
    for model in file.models:
        if model not in MODELS:
            raise UserError(f"{path}: unknown model {model!r}; {did_you_mean(model, MODELS)}")
    if not file.dataset:
        raise UserError(f"{path}: no data set; add a table [dataset.NAME] with a source")
    datasets = {n: parse_dataset(n, table, str(path)) for n, table in file.dataset.items()}
    _refuse_shared_shards(path, datasets)
    protocols = _protocols(path, file, datasets)
    losses = {n: tuple(_losses(path, file, p)) for n, p in protocols.items()}
    cells = tuple(
        Cell(dataset=name, data=datasets[name].identity(), model=model, loss=loss, seed=seed,
             protocol=protocols[name])
        for name in datasets
        for model, loss, seed in product(file.models, losses[name], file.seeds)
    )  # fmt: skip
    return Grid(
        name=file.name,
        path=path,
        datasets=datasets,
        models=file.models,
        losses=next(iter(losses.values())),
        seeds=file.seeds,
        protocols=protocols,
        cells=cells,
        profile=cluster or file.cluster,
        run=RunPaths(Path(file.run_dir or f"runs/{_folder(file.name)}").expanduser().absolute()),
    )


def _folder(name: str) -> str:
    return "".join(c if c.isalnum() or c in "-_." else "-" for c in name).lstrip(".") or "grid"


def _refuse_repeats(path: Path, lists: Mapping[str, tuple[Any, ...]]) -> None:
    for key, values in lists.items():
        for value in values:
            if values.count(value) > 1:
                raise UserError(f"{path}: {key} names {value!r} twice; once is enough")


def _refuse_shared_shards(path: Path, datasets: Mapping[str, DatasetSettings]) -> None:
    owners: dict[str, str] = {}
    for name, settings in datasets.items():
        owner = owners.setdefault(settings.shards, name)
        if owner != name:
            raise UserError(
                f"{path}: the data sets {owner!r} and {name!r} have the same shards folder "
                f"{settings.shards}; give each its own"
            )


def _protocols(
    path: Path, file: GridFile, datasets: Mapping[str, DatasetSettings]
) -> dict[str, Protocol]:
    """[protocol] for each data set, with [protocol.per_dataset.NAME] in place of its own keys."""
    table = dict(file.protocol)
    special = _table(table.pop("per_dataset", {}), f"{path}: [protocol.per_dataset]")
    protocols = dict.fromkeys(datasets, parse(Protocol, table, f"{path}: [protocol]"))
    for name, changes in special.items():
        where = f"{path}: [protocol.per_dataset.{name}]"
        if name not in datasets:
            raise UserError(f"{where}: no such data set; {did_you_mean(name, datasets)}")
        protocols[name] = parse(Protocol, _changed(table, _table(changes, where)), where)
    return protocols


def _table(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UserError(f"{where} must be a table, not {value!r}")
    return value


def _changed(table: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`table` with the keys of `changes` in place of its own, in nested tables too."""
    nested = {
        key: _changed(table[key], value)
        for key, value in changes.items()
        if isinstance(value, dict) and isinstance(table.get(key), dict)
    }
    return {**table, **changes, **nested}


def _losses(path: Path, file: GridFile, protocol: Protocol) -> Iterator[LossSpec]:
    ramps = (protocol.naive_ramp, protocol.alternating_ramp)
    try:
        yield from (parse_loss(name, *ramps) for name in file.losses)
    except UnknownLoss as error:
        name = str(error)
        hint = did_you_mean(name, example_names())
        raise UserError(f"{path}: unknown loss {name!r}; {hint}") from error
    taken = list(file.losses)
    for table in file.loss:
        composed = _composed_loss(parse(LossTable, table, f"{path}: [[loss]]"), path, taken)
        taken.append(composed.name)
        yield composed
    if not file.losses and not file.loss:
        raise UserError(f"{path}: no loss; add losses = [...] or a table [[loss]]")


def _composed_loss(table: LossTable, path: Path, taken: Collection[str]) -> LossSpec:
    where = f"{path}: [[loss]] {table.name!r}"
    if table.name in taken:
        raise UserError(f"{where}: another loss has that name already; choose another")
    terms = []
    for name in table.terms:
        try:
            (term,) = parse_loss(name).terms
        except (UnknownLoss, ValueError) as error:
            singles = [n for n in example_names() if len(parse_loss(n).terms) == 1]
            raise UserError(
                f"{where}: unknown term {name!r}; {did_you_mean(name, singles)}"
            ) from error
        terms.append(term)
    equal = {"at": 0.0, "weights": [1 / len(terms)] * len(terms)}
    knots = [parse(KnotTable, k, f"{where}: schedule") for k in table.schedule or (equal,)]
    if any(len(knot.weights) != len(terms) for knot in knots):
        raise UserError(f"{where}: schedule needs {len(terms)} weights at each place, one a term")
    if any(sum(knot.weights) == 0 for knot in knots):
        raise UserError(f"{where}: the weights of a place are all 0; give one term a share")
    places = [knot.at for knot in knots]
    if any(a >= b for a, b in pairwise(places)):
        raise UserError(f"{where}: the places of the schedule (at) must rise")
    schedule = tuple(Knot(knot.at, knot.weights, knot.ramp) for knot in knots)
    return LossSpec(table.name, tuple(terms), schedule)


@dataclass(frozen=True)
class Plan:
    """What is to be submitted: backbones to pre-train, and bundles (or parts) to train."""

    pretrain: tuple[Task, ...]
    bundles: tuple[Task, ...]


def make_plan(
    grid: Grid,
    cells: Iterable[Cell],
    steps: Mapping[str, int],
    backbones: Collection[str],
    source: Mapping[str, str],
) -> Plan:
    """The tasks that train `cells`. A task is the cells of equal bundle and equal step, so that
    none loses progress for another; `cluster.cells_per_job` splits it further.

    steps: how far each cell's newest checkpoint is, by signature. backbones: the keys of those
    that are trained, or being trained, already. source: the code's commit, for the record.
    """
    wanted = list(cells)
    parts = [
        part
        for bundle in bundles(wanted).values()
        for step, together in _by_step(bundle, steps)
        for part in _split(grid, step, together, source)
    ]
    missing = {
        cell.backbone_key: cell
        for cell in wanted
        if cell.protocol.weights == "pretrain" and cell.backbone_key not in backbones
    }
    pretrain = [_task(grid, "pretrain", [cell], 0, source) for cell in missing.values()]
    return Plan(tuple(pretrain), tuple(parts))


def _by_step(cells: list[Cell], steps: Mapping[str, int]) -> list[tuple[int, list[Cell]]]:
    grouped: dict[int, list[Cell]] = {}
    for cell in cells:
        grouped.setdefault(steps.get(cell.signature, 0), []).append(cell)
    return sorted(grouped.items(), reverse=True)


def _split(grid: Grid, step: int, cells: list[Cell], source: Mapping[str, str]) -> Iterator[Task]:
    size = grid.cluster.cells_per_job or len(cells)
    for first in range(0, len(cells), size):
        yield _task(grid, "bundle", cells[first : first + size], step, source)


def _task(grid: Grid, kind: Any, cells: list[Cell], step: int, source: Mapping[str, str]) -> Task:
    # one backbone, one pre-training, whichever cell asked for it first
    pretrain = f"pretrain-{cells[0].backbone_key}"
    name = bundle_task_name(cells, step) if kind == "bundle" else pretrain
    return Task(
        kind=kind,
        name=name,
        run=str(grid.run.root),
        data=grid.datasets[cells[0].dataset].shards,
        cells=tuple(cells),
        source=dict(source),
    )
