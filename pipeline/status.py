"""Show state, step, rate and time left of each cell of a grid.

Of more than 1000 cells, show the number in each state by data set and model.

python -m pipeline.status [CONFIG]
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import chain

from data_prep.shards.manifest import Manifest
from hpc.cli import UserError, argument_parser, one_line, run
from hpc.scheduler.auto import open_queue
from pipeline.config.grid_file import Grid, find_config, read_grid
from pipeline.tracking.display import (
    MOST_ROWS,
    cells_lines,
    cells_overview,
    cells_table,
    console,
    describe_survey,
    failure_lines,
    outdated_lines,
    reason_lines,
    stage_lines,
)
from pipeline.tracking.survey import STATES, survey


def main(argv: Sequence[str]) -> int:
    """Print the state of a grid; changes nothing."""
    parser = argument_parser("python -m pipeline.status", __doc__)
    parser.add_argument("config", nargs="?", help="the grid file")
    parser.add_argument("--cluster", metavar="PROFILE", help="the profile it was submitted with")
    parser.add_argument("--state", choices=STATES, help="only the cells in this state")
    arguments = parser.parse_args(argv)
    grid = read_grid(find_config(arguments.config), arguments.cluster)
    state = survey(grid, open_queue(grid.cluster, grid.run.logs, grid.run.queue, read_only=True))
    shown = [cell for cell in state.cells if arguments.state in (None, cell.state)]
    if len(shown) <= MOST_ROWS:
        console().print(cells_table(shown, whole=arguments.state is not None))
    elif arguments.state:
        print("\n".join(cells_lines(shown)))
    else:
        console().print(cells_overview(shown))
        print(f"more than {MOST_ROWS} cells: --state STATE names those in a state")
        for line in reason_lines(cell for cell in shown if cell.state == "failed"):
            print(one_line(line))
    for warning in _data_warnings(grid):
        print(f"warning: {one_line(warning)}")
    lines = (stage_lines(state), failure_lines(grid, state), outdated_lines(grid, state))
    for line in chain(*lines):
        print(one_line(line))
    describe_survey(grid, state)
    return 0


def _data_warnings(grid: Grid) -> Iterator[str]:
    for settings in grid.datasets.values():
        with suppress(UserError):  # not packed yet
            yield from Manifest.load(settings.shards).warnings()


if __name__ == "__main__":
    run(main)
