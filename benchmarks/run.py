"""Measure every claim of speed beside its usual alternatives.

    python -m benchmarks.run [NAME ...] [--out DIR]

Prints a Markdown table and writes DIR/NAME.json for each NAME. Alternatives run in turns in one
process, or in processes of the same kind, on this machine. A ratio is the median over rounds.
Rows name the peers that are not installed; `pip install -e '.[benchmarks]'` installs them.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module

from benchmarks.machine import machine, write_record
from benchmarks.measure import HEAD, NotMeasured, Result, parse_names, row

# The module docstring of each says what it measures. `measure()` returns or yields comparisons.
BENCHMARKS = (
    "counting",
    "pooling",
    "reading",
    "augmenting",
    "bundles",
    "reducing",
    "saving",
)


def main(argv: Sequence[str]) -> int:
    """Run the named benchmarks, or all; return 1 if a target was missed."""
    names, folder = parse_names("python -m benchmarks.run", __doc__, BENCHMARKS, argv)
    missed, on = [], machine()
    for name in names:
        print(f"\n## {name}\n\n{HEAD}", flush=True)
        found: list[Result] = []
        for one in import_module(f"benchmarks.{name}").measure():
            found.append(one)
            print(row(one), flush=True)  # keep each result even if a later benchmark fails
            write_record(
                folder / f"{name}.json", {"comparisons": [one.record() for one in found]}, on
            )
        missed += [f"{one.what} against {one.against}" for one in found if _missed(one)]
    print(f"\ntargets missed: {'; '.join(missed) or 'none'}")
    return 1 if missed else 0


def _missed(one: Result) -> bool:
    return not isinstance(one, NotMeasured) and not one.met


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
