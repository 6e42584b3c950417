"""Every claim of speed, measured beside what people would use instead.

    python -m benchmarks.run [NAME ...] [--out DIR]

Prints a Markdown table and writes DIR/NAME.json for each NAME. What is compared runs in turns in
one process (or in processes of equal kind), on this machine; a ratio is the median over rounds.
Peers that are not installed are named as such: `pip install -e '.[benchmarks]'` brings them.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module

from benchmarks.measure import HEAD, Absent, Found, chosen, machine, row, write_record

# what each measures stands at the head of its module, whose `measure()` gives the comparisons, all
# at once or as they come
BENCHMARKS = (
    "counting",
    "pooling",
    "reading",
    "augmenting",
    "bundles",
    "reducing",
    "saving",
    "gpu_steps",
)


def main(argv: Sequence[str]) -> int:
    """Measure what is named, or all; 1 if a target was missed."""
    names, folder = chosen("python -m benchmarks.run", __doc__, BENCHMARKS, argv)
    missed, on = [], machine()
    for name in names:
        print(f"\n## {name}\n\n{HEAD}", flush=True)
        found: list[Found] = []
        for one in import_module(f"benchmarks.{name}").measure():
            found.append(one)
            print(row(one), flush=True)  # what is measured stays, whatever comes
            write_record(
                folder / f"{name}.json", {"comparisons": [one.record() for one in found]}, on
            )
        missed += [f"{one.what} against {one.against}" for one in found if _missed(one)]
    print(f"\ntargets missed: {'; '.join(missed) or 'none'}")
    return 1 if missed else 0


def _missed(one: Found) -> bool:
    return not isinstance(one, Absent) and not one.met


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
