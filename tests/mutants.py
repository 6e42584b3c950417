"""Mutation testing of the core modules with mutmut, one module at a time: CONTRIBUTING.md."""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
MUTMUT = Path(sys.executable).with_name("mutmut")
SOURCES = ("hpc", "data_prep", "jobs", "pipeline")
COPIED = (*SOURCES, "benchmarks", "configs", "tests", "lossgrid.toml", "pyproject.toml")
# the fast tests of each module, in whose process it runs
TESTS = {
    "hpc/storage/checkpoint.py": "hpc/storage/test_checkpoint",
    "hpc/storage/fencing.py": "hpc/storage/test_fencing",
    "jobs/spec/counts_file.py": "jobs/spec/test_counts_file pipeline/tracking/test_damaged_counts",
    "jobs/losses/functional.py": "jobs/losses/test_losses jobs/losses/test_schedule",
    "jobs/losses/grammar.py": "jobs/losses/test_grammar jobs/losses/test_schedule",
    "jobs/losses/pooling.py": "jobs/losses/test_pooling",
    "jobs/metrics/reference.py": "jobs/metrics/test_counts jobs/metrics/test_fixed_point",
    "jobs/metrics/counts.py": "jobs/metrics/test_counts",
    "jobs/metrics/scores.py": (
        "jobs/metrics/test_scores jobs/metrics/test_fixed_point pipeline/scores/test_score_table"
    ),
    "pipeline/submission/decision.py": (
        "pipeline/tracking/test_stale pipeline/test_retry pipeline/tracking/test_survey"
    ),
    "pipeline/tracking/outcomes.py": (
        "pipeline/test_retry pipeline/submission/test_stage_jobs pipeline/tracking/test_survey"
    ),
    "pipeline/planning/plan.py": (
        "pipeline/config/test_grid_file "
        "pipeline/submission/test_room "
        "pipeline/tracking/test_survey "
        "pipeline/test_retry "
        "pipeline/planning/test_forecast"
    ),
    "pipeline/tracking/submissions.py": (
        "pipeline/tracking/test_survey pipeline/submission/test_lost_submissions"
    ),
    "pipeline/tracking/survey.py": (
        "pipeline/tracking/test_survey pipeline/tracking/test_script_jobs"
    ),
}
# torch is not safe to fork once it has run, hence the server
CONFIG = """[mutmut]
source_paths =
    {sources}
only_mutate = {module}
also_copy =
    {copied}
pytest_add_cli_args_test_selection =
    {tests}
process_isolation = forkserver
use_git_change_detection = false
"""


def prepare(module: str) -> Path:
    """Copy the checkout to the folder in which mutmut works on `module`; return it. Results of an
    earlier run stay there."""
    folder = REPOSITORY / "mutants" / module.removesuffix(".py")
    folder.mkdir(parents=True, exist_ok=True)
    for name in COPIED:
        source, target = REPOSITORY / name, folder / name
        if source.is_dir():
            shutil.rmtree(target, ignore_errors=True)
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy2(source, target)
    lines = {
        "sources": SOURCES,
        "copied": [name for name in COPIED if name not in SOURCES],
        "tests": [f"tests/{name}.py" for name in TESTS[module].split()],
    }
    joined = {key: "\n    ".join(words) for key, words in lines.items()}
    (folder / "setup.cfg").write_text(CONFIG.format(module=module, **joined))
    return folder


def mutate(module: str, processes: int) -> str:
    """Run what is new or changed of a module's mutants; return a line of numbers. The diffs of
    those that survived are in `survived.diff`."""
    folder = prepare(module)
    done = subprocess.run([MUTMUT, "run", f"--max-children={processes}"], cwd=folder, check=False)
    if done.returncode:
        return f"{module}: not mutated: mutmut failed; do {TESTS[module]} pass without it?"
    said = _mutmut(folder, "results", "--all", "true")
    states = dict(re.findall(r"^ *(\S+): (.+)$", said, re.MULTILINE))
    survived = [name for name, state in states.items() if state == "survived"]
    diffs = "\n".join(_mutmut(folder, "show", name) for name in survived)
    (folder / "survived.diff").write_text(diffs)
    numbers = ", ".join(f"{n} {state}" for state, n in Counter(states.values()).most_common())
    shown = (folder / "survived.diff").relative_to(REPOSITORY)
    return f"{module}: {len(states)} mutants: {numbers}; see {shown}"


def _mutmut(folder: Path, *words: str) -> str:
    done = subprocess.run([MUTMUT, *words], cwd=folder, check=True, capture_output=True, text=True)
    return done.stdout


def main(argv: list[str] | None = None) -> None:
    """Mutate some modules, or all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("modules", nargs="*", metavar="MODULE", help=", ".join(TESTS))
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args(argv)
    if unknown := [name for name in options.modules if name not in TESTS]:
        parser.error(f"{unknown[0]} has no tests in {__file__}; choose from {', '.join(TESTS)}")
    lines = [mutate(module, options.processes) for module in options.modules or TESTS]
    print("", *lines, sep="\n")


if __name__ == "__main__":
    main()
