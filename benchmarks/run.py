"""Every claim of speed, measured beside what people would use instead.

    python -m benchmarks.run [NAME ...] [--out DIR]

Prints a Markdown table and writes DIR/NAME.json for each NAME. What is compared runs in turns in
one process (or in processes of equal kind), on this machine; a ratio is the median over rounds.
Peers that are not installed are named as such: `pip install -e '.[benchmarks]'` brings them.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from benchmarks.measure import Absent, Found, machine, table

# what each measures stands at the head of its module, whose `measure()` gives the comparisons
BENCHMARKS = ("counting", "pooling", "reading", "augmenting", "bundles", "reducing", "saving")


def main(argv: Sequence[str]) -> int:
    """Measure what is named, or all; 1 if a target was missed."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.run",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(BENCHMARKS)}")
    parser.add_argument("--out", type=Path, default=Path("benchmark-results"), metavar="DIR")
    options = parser.parse_args(argv)
    unknown = [name for name in options.names if name not in BENCHMARKS]
    if unknown:
        parser.error(f"no benchmark is called {unknown[0]}; there are {', '.join(BENCHMARKS)}")
    options.out.mkdir(parents=True, exist_ok=True)
    missed = []
    for name in options.names or BENCHMARKS:
        print(f"\n## {name}\n", flush=True)
        found = import_module(f"benchmarks.{name}").measure()
        print(table(found), flush=True)
        record = {"machine": machine(), "comparisons": [one.record() for one in found]}
        (options.out / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
        missed += [f"{one.what} against {one.against}" for one in found if _missed(one)]
    print(f"\ntargets missed: {'; '.join(missed) or 'none'}")
    return 1 if missed else 0


def _missed(one: Found) -> bool:
    return not isinstance(one, Absent) and not one.met


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
