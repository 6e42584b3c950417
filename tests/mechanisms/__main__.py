"""Takes out each mechanism that a promise rests on, and sees the promise's test fail.

    python -m tests.mechanisms [WORDS...] [--write FILE]

The lists are tests/mechanisms/*.toml: a promise in words, the text of the source that keeps it,
what stands there instead when it is taken out, and the test that must notice. Everything happens in
a copy of the repository. WORDS choose the promises that contain them; --write leaves the outcome as
a Markdown table.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.mechanisms.listing import REPOSITORY, Mechanism, read_lists

_PATIENCE = 300  # seconds; a test without its mechanism may wait for what never comes


def main() -> int:
    """The command; 1 if a test did not notice."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("words", nargs="*")
    parser.add_argument("--write", type=Path, metavar="FILE")
    options = parser.parse_args()
    chosen = [m for m in read_lists() if all(w in m.promise for w in options.words)]
    if not chosen:
        parser.error(f"no promise contains {' and '.join(map(repr, options.words))}")
    rows, unnoticed = [], 0
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / REPOSITORY.name
        _copy_repository(copy)
        if _run(copy, sorted({m.test for m in chosen}), patience=None) != 0:
            print("a test fails already with everything in place")
            return 1
        for mechanism in chosen:
            began = time.monotonic()
            with _taken_out(mechanism, copy):
                noticed = _run(copy, [mechanism.test]) == 1  # other codes: no such test, or worse
            unnoticed += not noticed
            outcome = "noticed" if noticed else "NOT NOTICED"
            print(
                f"{outcome:11} {time.monotonic() - began:5.1f} s  {mechanism.promise}", flush=True
            )
            rows.append(_row(mechanism, outcome))
    if options.write:
        head = ["| promise | taken out of | noticed by |", "|---|---|---|"]
        options.write.write_text("\n".join([*head, *rows]) + "\n")
    print(f"{len(chosen) - unnoticed} of {len(chosen)} noticed")
    return 1 if unnoticed else 0


def _copy_repository(target: Path) -> None:
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    names = subprocess.run(listed, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    for name in filter(None, names.stdout.split("\0")):
        if (REPOSITORY / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(REPOSITORY / name, target / name, follow_symlinks=False)
    beside = REPOSITORY.parent / "shared"
    if beside.exists():
        (target.parent / "shared").symlink_to(beside)


@contextmanager
def _taken_out(mechanism: Mechanism, copy: Path) -> Iterator[None]:
    path = copy / mechanism.file
    text = path.read_text()
    if text.count(mechanism.old) != 1:
        raise SystemExit(
            f"{mechanism.file} holds {mechanism.old!r} {text.count(mechanism.old)} times"
        )
    path.write_text(text.replace(mechanism.old, mechanism.new))
    try:
        yield
    finally:
        path.write_text(text)


def _run(copy: Path, tests: list[str], patience: int | None = _PATIENCE) -> int:
    line = [sys.executable, "-B", "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
    try:
        return subprocess.run(line, cwd=copy, capture_output=True, timeout=patience).returncode
    except subprocess.TimeoutExpired:
        return 1  # it waits for ever, where it passed in time before: that is noticed, too


def _row(mechanism: Mechanism, outcome: str) -> str:
    test = mechanism.test.rpartition("::")[2].partition("[")[0].replace("_", " ")
    return f"| {mechanism.promise} | `{mechanism.file}` | {outcome}: {test.removeprefix('test ')} |"


if __name__ == "__main__":
    sys.exit(main())
