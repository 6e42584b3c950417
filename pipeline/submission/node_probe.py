"""Check the compute nodes for `pipeline.doctor` with probe jobs.

A probe job starts as a job of training or `reduce` does, and only reports what it finds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from data_prep.shards.manifest import MANIFEST, Manifest
from data_prep.weights import WITHOUT_FILE, weights_path
from hpc.cli import UserError
from hpc.diagnostics import node_checks
from hpc.diagnostics.check import Check, CheckResult, CheckSkipped, run_checks
from hpc.diagnostics.node_facts import sizes, versions
from hpc.diagnostics.probe_jobs import ProbeJob, Report, run_probe_jobs, temporary_folder
from hpc.scheduler.auto import has_time_limit, open_queue
from hpc.scheduler.base import Queue
from hpc.scheduler.cluster_profile import Resources
from hpc.scheduler.job import ModuleCall
from hpc.storage.atomic import write_json
from hpc.storage.permissions import restrict_umask
from jobs.probe import PACKAGES, SOURCES
from jobs.spec.cell import Cell, bundles
from pipeline.config.grid_file import Grid
from pipeline.planning.cost_model import checkpoint_bytes
from pipeline.planning.forecast import Forecast
from pipeline.tracking.snapshot import DEAD_AFTER_SECONDS

_MINUTES = 15  # time limit of a probe job, without the notice before its end


def node_results(grid: Grid, say: Callable[[str], None]) -> Iterator[CheckResult]:
    """Yield the results of the checks on the nodes; `say` gets a line about each wait."""
    try:
        reports = _ask(grid, say)
    except UserError as error:
        yield CheckResult("FAIL", "a job on the nodes", str(error))
        return
    yield from run_checks(checks_of(grid, reports))


def _ask(grid: Grid, say: Callable[[str], None]) -> dict[str, Report]:
    group = grid.cluster.group
    restrict_umask(group)
    with temporary_folder(grid.run.root.absolute(), group) as folder:
        plan = folder / "plan.json"
        data = [str(manifest.folder.absolute()) for manifest in _packed(grid)]
        files, node_local = list(inputs(grid)), grid.cluster.node_local
        write_json(plan, {"files": files, "data": data, "node_local": node_local})
        queue = open_queue(grid.cluster, folder / "logs", folder / "queue")
        probes = _probe_jobs(grid, queue, plan)
        return {report.probe.name: report for report in run_probe_jobs(queue, probes, folder, say)}


def _probe_jobs(grid: Grid, queue: Queue, plan: Path) -> list[ProbeJob]:
    """Return a probe job for training, and one for `reduce` if it has more than one MPI rank."""
    wanted = {"train": grid.cluster.training()}
    if queue.starts_mpi and _num_ranks(grid.cluster.reducing()) > 1:
        wanted["reduce"] = grid.cluster.reducing()
    minutes = min(grid.cluster.minutes, _MINUTES + grid.cluster.lead_seconds // 60)
    return [
        ProbeJob(name, ModuleCall("jobs.probe", (str(plan), name)), replace(one, minutes=minutes))
        for name, one in wanted.items()
    ]


def _num_ranks(wanted: Resources) -> int:
    return wanted.nodes * wanted.tasks_per_node


def checks_of(grid: Grid, reports: Mapping[str, Report]) -> list[Check]:
    """Return the checks of the nodes from the reports of the probe jobs, by job name.

    `train` is required; without `reduce` the check of its MPI is skipped.
    """
    profile, report = grid.cluster, reports["train"]
    checks: dict[str, Callable[[], str]] = {
        "a job on the nodes": partial(node_checks.launch, profile, report),
        "run directory from the nodes": partial(node_checks.shared_folder, report),
        "clocks": partial(node_checks.clocks, report, DEAD_AFTER_SECONDS),
        "set-up lines on the nodes": partial(node_checks.set_up_words, profile, report),
        "software": partial(
            node_checks.same_versions, profile, report, versions(PACKAGES, SOURCES)
        ),
        "shards and weights from the nodes": partial(node_checks.same_files, report, inputs(grid)),
        "content of the shards": partial(content, report, _packed(grid)),
        "disk of the nodes": partial(node_checks.node_disk, profile, report, _staged_bytes(grid)),
        "GPUs as torch sees them": partial(node_checks.graphics, profile, report),
        "network interface": partial(node_checks.interface, profile, report),
        "network between the ranks": partial(node_checks.network, profile, report),
        "time to save": partial(_time_to_save, grid, report),
        "MPI of reduce": partial(_mpi, grid, reports.get("reduce")),
    }
    return [Check(name, perform) for name, perform in checks.items()]


def inputs(grid: Grid) -> dict[str, int]:
    """Return the bytes of each existing shard and weights file, by path."""
    wanted = {(cell.protocol.weights, cell.model) for cell in grid.cells}
    weights = {weights_path(*pair) for pair in wanted if pair[0] not in WITHOUT_FILE}
    paths = [*sorted(weights), *(path for manifest in _packed(grid) for path in _files(manifest))]
    return sizes(str(path.absolute()) for path in paths if path.is_file())


def _packed(grid: Grid) -> list[Manifest]:
    folders = [Path(settings.shards) for settings in grid.datasets.values()]
    return [Manifest.load(folder) for folder in folders if (folder / MANIFEST).exists()]


def _files(manifest: Manifest) -> list[Path]:
    splits = manifest.splits.values()
    return [manifest.folder / shard.file for split in splits for shard in split.shards]


def content(report: Report, packed: Sequence[Manifest]) -> str:
    """Check that the ranks found no damaged byte, each in its share of the shards.

    Raises:
        CheckSkipped: nothing is packed yet.
        UserError: a shard is damaged.
    """
    if not packed:
        raise CheckSkipped("nothing is packed yet")
    damaged = node_checks.of_ranks(report, "damaged", "run `python -m data_prep.verify` on it")
    if lines := [line for of_rank in damaged.values() for line in of_rank]:
        more = f" (and {len(lines) - 1} more)" if len(lines) > 1 else ""
        raise UserError(f"{lines[0]}{more}")
    return f"every byte of {', '.join(manifest.name for manifest in packed)} is as packed"


def _staged_bytes(grid: Grid) -> int:
    """Return the bytes of the largest data set."""
    return max((sum(p.stat().st_size for p in _files(one)) for one in _packed(grid)), default=0)


def _time_to_save(grid: Grid, report: Report) -> str:
    if not has_time_limit(grid.cluster):
        raise CheckSkipped("the local queue has no time limit")
    return node_checks.time_to_save(grid.cluster, report, _saved_bytes(grid))


def _saved_bytes(grid: Grid) -> int:
    """Return the bytes of a checkpoint of the largest job."""
    forecast, most = Forecast(grid), grid.cluster.cells_per_job

    def saved(cells: Sequence[Cell]) -> int:
        number = forecast.fits(cells) if most == "fit" else most or len(cells)
        return sum(map(checkpoint_bytes, cells[:number]))

    return max(map(saved, bundles(grid.cells).values()))


def _mpi(grid: Grid, report: Report | None) -> str:
    if report is None:
        raise CheckSkipped("reduce is one process here (reduce_nodes, reduce_tasks_per_node)")
    return node_checks.mpi_world(grid.cluster, report)
