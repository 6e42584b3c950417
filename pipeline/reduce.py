"""Reduce the evaluation counts of all finished cells into results.h5, on one or more MPI ranks.

python -m pipeline.reduce [CONFIG]
mpiexec -n 4 python -m pipeline.reduce [CONFIG]
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from itertools import chain
from typing import Any

import numpy as np

from data_prep.shards.manifest import Manifest
from data_prep.weights import weights_path
from hpc.cli import UserError, argument_parser, one_line, run
from hpc.distributed.mpi import World, world
from hpc.storage.atomic import Damaged, file_sha256, read_json
from jobs.losses.grammar import LossSpec
from jobs.spec.cell import Cell
from jobs.spec.counts_file import CountsIndex
from jobs.spec.protocol import WEIGHTS
from pipeline.config.grid_file import Grid, find_config, read_grid
from pipeline.scores.counts_share import files_of, read_shares
from pipeline.scores.results_file import DatasetResults, ResultsFile, num_cells, refuse_fewer
from pipeline.tracking.finished import finished_cells, garbage_collection_paused
from pipeline.tracking.stale import other_data, stale_line


def main(argv: Sequence[str]) -> int:
    """Write results.h5 and print the missing cells."""
    parser = argument_parser("python -m pipeline.reduce", __doc__)
    parser.add_argument("config", nargs="?", help="the grid file")
    parser.add_argument("--allow-fewer", action="store_true",
                        help="let a result with fewer cells replace one with more")  # fmt: skip
    arguments = parser.parse_args(argv)
    ranks = world()
    with ranks.abort_on_error():
        grid = read_grid(find_config(arguments.config))
        reduce_grid(grid, ranks, arguments.allow_fewer)
    return 0


@garbage_collection_paused()
def reduce_grid(grid: Grid, ranks: World, allow_fewer: bool = False) -> None:
    """Let every rank read its share of the counts files, and rank 0 write results.h5.

    Raises:
        UserError: the existing results have more cells, and `allow_fewer` is False.
    """
    found = ranks.bcast(_find(grid) if ranks.rank == 0 else None)
    assert found is not None
    chosen, problems, stale = found
    why = stale_line(grid, len(stale)) if stale else ""
    if why and ranks.rank == 0:
        problems.append(why)
    indices = files_of(chosen)
    cells = _cells_by_dataset(grid)
    file, read = ResultsFile(grid.name) if ranks.rank == 0 else None, set[str]()
    mine = indices[ranks.rank :: ranks.size]
    for share in read_shares(grid, mine, chosen, problems, whole=ranks.rank == 0):
        gathered = ranks.gather(share.signatures)
        ranks.rows_to_root(share.counts.values(), share.rows)
        if file is not None and gathered is not None:
            have = set(chain.from_iterable(gathered))
            counts = share.counts
            file.add(_dataset(grid, share.dataset, cells[share.dataset], have, counts, chosen))
            read |= have
    lines = ranks.gather(problems)
    if file is not None and lines is not None:
        if not allow_fewer:
            refuse_fewer(grid.run.results, num_cells(grid.run.results), len(read), why)
        sources = [index.record["source"] for index in indices]
        left = {cell.signature for cell in stale}
        _write(grid, file, read, left, sorted(set(chain.from_iterable(lines))), sources)


def _find(grid: Grid) -> tuple[dict[str, CountsIndex], list[str], list[Cell]]:
    """Return the counts file of each finished cell by signature, the problems, and stale cells.

    Stale cells are left out. Raises `UserError` if cells that should
    share a backbone were counted with different ones.
    """
    done, problems = finished_cells(grid.run)
    chosen = {c.signature: done[c.signature] for c in grid.cells if c.signature in done}
    now = {n: Manifest.load(settings.shards).fingerprint for n, settings in grid.datasets.items()}
    stale = [c for c in grid.cells if c.signature in chosen
             and other_data(chosen[c.signature], now[c.dataset])]  # fmt: skip
    for cell in stale:
        del chosen[cell.signature]
    _refuse_other_backbones(grid, chosen)
    return chosen, problems, stale


def _refuse_other_backbones(grid: Grid, chosen: Mapping[str, CountsIndex]) -> None:
    """Raise `UserError` unless cells that share a backbone were counted with the same weights.

    The weights must also equal the file that the run trained or that the user gave.
    """
    shared: dict[str, tuple[Any, str]] = {}
    for cell in grid.cells:
        if cell.signature not in chosen:
            continue
        weights, key = cell.protocol.weights, cell.weights_key
        if weights == "pretrain" and key not in shared:
            with suppress(Damaged, KeyError):  # `_backbone_notes` reports it
                sha256 = _trained_here(grid, cell)["sha256"]
                shared[key] = (sha256, f"{grid.run.backbone(cell.backbone_key)} holds now")
        # the path of a weights file is not part of a cell's identity, so compare the content
        own = weights not in WEIGHTS and key not in shared and weights_path(weights, cell.model)
        if own and own.is_file():
            shared[key] = (file_sha256(own), f"{own} holds now")
        path = chosen[cell.signature].path
        sha256 = chosen[cell.signature].of_cell(cell.signature)["backbone"]
        expected, whose = shared.setdefault(key, (sha256, f"{path} was"))
        if sha256 != expected:
            raise UserError(
                f"{path} was counted with another backbone than {whose}, and their cells would be "
                "compared; delete the file of the backbone that is not wanted and run grid again"
            )


def _trained_here(grid: Grid, cell: Cell) -> dict[str, Any]:
    """Return the record of the backbone that `weights = "pretrain"` trained, {} if none.

    Raises `Damaged`.
    """
    try:
        return read_json(grid.run.backbone(cell.backbone_key).with_suffix(".json"))
    except FileNotFoundError:
        return {}


def _dataset(
    grid: Grid,
    name: str,
    cells: Sequence[Cell],
    have: set[str],
    counts: Mapping[str, Any],
    chosen: Mapping[str, CountsIndex],
) -> DatasetResults:
    manifest = Manifest.load(grid.datasets[name].shards)
    rows = [row for row, cell in enumerate(cells) if cell.signature in have]
    return DatasetResults(
        name=name,
        classes=list(manifest.classes),
        train_class_pixels=np.array(manifest.splits["train"].class_pixels, np.int64),
        val_class_pixels=np.array(manifest.splits["val"].class_pixels, np.int64),
        cells=[_cell(cells[row], chosen[cells[row].signature]) for row in rows],
        # indexing copies, so avoid it if all cells are there
        counts={k: a if len(rows) == len(cells) else a[rows] for k, a in counts.items()},
    )


def _cell(cell: Cell, index: CountsIndex) -> dict[str, Any]:
    provenances = index.record["provenance"]
    notes = [f"mixed provenance: {len(provenances)} kinds"] if len(provenances) > 1 else []
    return {
        "signature": cell.signature,
        "name": cell.name,
        "model": cell.model,
        "loss": cell.loss.name,
        "seed": cell.seed,
        "notes": notes,
        "backbone": index.of_cell(cell.signature)["backbone"],
    }


def _cells_by_dataset(grid: Grid) -> dict[str, list[Cell]]:
    cells: dict[str, list[Cell]] = {name: [] for name in grid.datasets}
    for cell in grid.cells:
        cells[cell.dataset].append(cell)
    return cells


def _write(
    grid: Grid,
    file: ResultsFile,
    have: set[str],
    left_out: set[str],
    problems: list[str],
    sources: Sequence[Mapping[str, str]],
) -> None:
    missing = [c.name for c in grid.cells if c.signature not in have | left_out]
    record = {
        "missing": missing,
        "notes": [*_backbone_notes(grid), *_data_notes(grid), *problems],
        "protocol": {n: p.model_dump(mode="json") for n, p in grid.protocols.items()},
        "losses": _losses(grid),
        "commit": ", ".join(sorted({_commit(source) for source in sources} - {""})),
    }
    file.write(grid.run.results, record)
    for problem in problems:
        print(f"warning: {one_line(problem)}")
    print(f"{one_line(str(grid.run.results))}: {len(have)} of {len(grid.cells)} cells")
    if not have:
        command = f"`python -m pipeline.status {grid.command_arguments}`"
        print(one_line(f"warning: no cell is finished, so the results are empty; see {command}"))
    for name in missing:
        print(f"missing: {one_line(name)}")


def _commit(source: Mapping[str, str]) -> str:
    return source.get("commit", "") + (" with changes" if source.get("diff") else "")


def _losses(grid: Grid) -> list[dict[str, Any]]:
    """Return a record for each loss in grid order, or for each of its schedules.

    The schedule of a loss can differ between data sets.
    """
    records = []
    for one_loss in zip(*grid.losses_of.values(), strict=True):
        schedules: dict[LossSpec, list[str]] = {}
        for dataset, loss in zip(grid.losses_of, one_loss, strict=True):
            schedules.setdefault(loss, []).append(dataset)
        records += [{**_loss(loss), "datasets": names} for loss, names in schedules.items()]
    return records


def _loss(loss: LossSpec) -> dict[str, Any]:
    names = [term.name for term in loss.terms]
    return {"name": loss.name, "terms": names, "schedule": [asdict(k) for k in loss.schedule]}


def _data_notes(grid: Grid) -> list[str]:
    """Return a line for each split that lacks pixels of a class."""
    manifests = [Manifest.load(settings.shards) for settings in grid.datasets.values()]
    return [warning for manifest in manifests for warning in manifest.warnings()]


def _backbone_notes(grid: Grid) -> list[str]:
    """Return a line for each backbone that this run trained itself."""
    notes: dict[str, str] = {}
    for cell in grid.cells:
        if cell.protocol.weights != "pretrain" or cell.backbone_key in notes:
            continue
        try:
            record = _trained_here(grid, cell)
        except Damaged as error:
            notes[cell.backbone_key] = str(error)
            continue
        if record:
            protocol = record["protocol"]
            notes[cell.backbone_key] = (
                f"The backbone of {record['model']} was trained on {record['dataset']} itself "
                f"(whole network, CE, {protocol['epochs']} epochs, seed {record['seed']}; its "
                f"accuracy {record['scores']['acc']:.2f}, recall {record['scores']['rec']:.2f}), "
                f"then frozen for all cells; SHA-256 {record['sha256'][:12]}…"
            )
    return list(notes.values())


if __name__ == "__main__":
    run(main)
