"""Check that a grid can run here: the site, the grid's needs, and on request the compute nodes.

    python -m pipeline.doctor [CONFIG]               a few seconds; submits nothing
    python -m pipeline.doctor [CONFIG] --on-nodes    also checks the nodes, with a small job or two

Prints a line for each check: pass with its evidence, FAIL with the remedy, warn, or skip with the
reason. The exit code is 1 if a check fails. Nothing is changed.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path

from data_prep.packing.split_overlap import ImageIds
from data_prep.shards.manifest import MANIFEST, remedy
from data_prep.weights import FILES, WITHOUT_FILE, check_published, require_weights
from hpc.cli import UserError, argument_parser, one_line, run
from hpc.diagnostics.check import Check, CheckResult, CheckSkipped, run_checks, shown_bytes
from hpc.diagnostics.node_facts import versions
from hpc.diagnostics.site_checks import setup_lines, site_checks
from hpc.diagnostics.slurm_site import SlurmSite
from hpc.scheduler.auto import open_queue
from hpc.storage.atomic import file_sha256
from hpc.storage.locks import require_locks
from hpc.storage.permissions import require_private
from jobs.probe import PACKAGES, SOURCES
from jobs.spec.counts_file import counted_cells
from pipeline.config.grid_file import Grid, find_config, read_grid
from pipeline.planning.preflight import check_files, check_room, existing_folder, require_packed
from pipeline.submission.node_probe import node_results

_QUICK_BYTES = 1 << 30  # of shards that the login node reads, in about 2 s


def main(argv: Sequence[str]) -> int:
    """Check a grid and its cluster, and print a line for each check."""
    parser = argument_parser("python -m pipeline.doctor", __doc__)
    parser.add_argument("config", nargs="?", help="the grid file")
    parser.add_argument("--cluster", metavar="PROFILE", help="a cluster profile's name or path")
    parser.add_argument("--on-nodes", action="store_true", help="check the nodes with a small job")
    arguments = parser.parse_args(argv)
    grid = read_grid(find_config(arguments.config), arguments.cluster)
    failed = _show(run_checks([*_scheduler(grid), *_run_directory(grid)]))
    damaged = _show(run_checks(_inputs(grid)))
    if not arguments.on_nodes:
        _show([CheckResult("skip", "the nodes", "not checked without --on-nodes")])
    elif failed:
        why = "a job would fail for the reasons above; fix them first"
        _show([CheckResult("skip", "the nodes", why)])
    else:
        failed = _show(node_results(grid, _say))
    return int(failed or damaged)


def _show(found: Iterable[CheckResult]) -> bool:
    """Print each result at once; return True if a check failed."""
    failed = False
    for result in found:
        print(result, flush=True)
        failed |= result.verdict == "FAIL"
    return failed


def _say(line: str) -> None:
    print(one_line(line), file=sys.stderr, flush=True)


def _scheduler(grid: Grid) -> list[Check]:
    """Return the checks of Slurm or the local queue."""
    profile = grid.cluster  # an invalid one raises here
    try:
        queue = open_queue(profile, grid.run.logs, grid.run.queue)
    except UserError as error:
        return [Check("scheduler", partial(_fail, error))]
    if queue.has_site:
        return site_checks(profile, SlurmSite(), queue)
    return [
        Check("local queue", partial(queue.trial, profile.training(), "doctor")),
        Check("set-up lines", partial(setup_lines, profile)),
    ]


def _fail(error: UserError) -> str:
    raise error


def _run_directory(grid: Grid) -> list[Check]:
    done = counted_cells(grid.run.counts)
    left = [cell for cell in grid.cells if cell.signature not in done]
    return [
        Check("run directory", partial(_private, grid)),
        Check("file locks in it", lambda: require_locks(existing_folder(grid).absolute())),
        Check("room on its disk", partial(check_room, grid, left)),
        Check("files on its disk", partial(check_files, grid, left)),
    ]


def _private(grid: Grid) -> str:
    group = grid.cluster.group
    require_private(grid.run.root, group, "set run_dir to a folder of yours")
    root, existing = grid.run.root.absolute(), existing_folder(grid).absolute()
    who = f"you and the group {group}" if group else "you"
    where = root if existing == root else f"{existing}, where it will be made"
    return f"only {who} can write to {where}"


def _inputs(grid: Grid) -> list[Check]:
    """Return the checks of the jobs' inputs, which the checks on the nodes do not need."""
    wanted = {(cell.protocol.weights, cell.model) for cell in grid.cells}
    weights = sorted({pair for pair in wanted if pair[0] not in WITHOUT_FILE})
    return [
        Check("software here", _software),
        *(Check(f"data set {name}", partial(_data_set, grid, name)) for name in grid.datasets),
        *(Check(f"weights {' for '.join(pair)}", partial(_weights, *pair)) for pair in weights),
    ]


def _software() -> str:
    found = versions(PACKAGES, SOURCES)
    if missing := [name for name, version in found.items() if version == "none"]:
        raise UserError(f"{', '.join(missing)} not installed; install with -c constraints.txt")
    return ", ".join(f"{name} {version}" for name, version in found.items())


def _data_set(grid: Grid, name: str) -> str:
    """Check the lengths of all shards, and the content of at most `_QUICK_BYTES`."""
    settings = grid.datasets[name]
    if not (Path(settings.shards) / MANIFEST).exists():
        ImageIds.of_source(settings)  # raises the errors of packing
        raise CheckSkipped("not packed yet; `python -m pipeline.submit prep`, or `all`, does it")
    manifest = require_packed(name, settings)
    shards = [shard for split in manifest.splits.values() for shard in split.shards]
    read = 0
    for shard in shards:
        path = manifest.folder / shard.file
        if read + shard.bytes > _QUICK_BYTES:
            continue
        read += shard.bytes
        if file_sha256(path) != shard.sha256:
            raise UserError(f"{path} is damaged (its checksum differs); {remedy(path)}")
    total = sum(shard.bytes for shard in shards)
    return f"{shown_bytes(total)} in {len(shards)} shards, {shown_bytes(read)} read and as packed"


def _weights(weights: str, model: str) -> str:
    path = require_weights(weights, model)
    if (weights, model) not in FILES:
        return f"{path}, {shown_bytes(path.stat().st_size)}"
    check_published(path)
    return f"{path}, with the hash in its name"


if __name__ == "__main__":
    run(main)
