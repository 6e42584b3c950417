"""The whole test run: its options, and which tests may run beside which.

    pytest -n 3

runs three tests at a time: two of them fill two cores, and those on a Slurm cluster mostly wait. A
file's tests run on one worker, and so do the files of a group of tests on a cluster.
"""

from __future__ import annotations

import os
import signal
from collections import Counter
from contextlib import suppress
from typing import Any

import pytest

from tests.fuzz import cases

_CLUSTER = "tests/cluster/"
# Each group has a cluster of its own, so that one waits while another works. They take about the
# same time; only in the first are tests on a cluster that are not slow.
_GROUPS = (
    ("submission", "interruptions", "nodes", "reduce", "reduce_faults", "held", "doctor"),
    ("faults", "chaos"),
    ("queue_faults", "all"),
)
_PLACES = {
    f"{_CLUSTER}test_{name}.py": (number, position)
    for number, names in enumerate(_GROUPS)
    for position, name in enumerate(names)
}


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--fuzz-cases N`: how many cases the property-based tests try in all."""
    parser.addoption(
        "--fuzz-cases",
        type=int,
        default=cases.DEFAULT,
        metavar="N",
        help=f"cases that the fuzz tests try in all (default {cases.DEFAULT}; up to that number "
        "always the same ones, beyond it new ones at every run)",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Before any test is collected, since a test's share of the cases is fixed then. GPUs are seen
    by `-k real_gpu` alone: all other tests say what a processor does, wherever they run."""
    if "real_gpu" not in config.getoption("keyword"):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    cases.plan(config.getoption("--fuzz-cases"))
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # what a shell's `&` leaves behind
        with suppress(ValueError):  # not the main thread
            signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the tests on a cluster first, since they take longest, group by group."""
    items.sort(key=lambda item: _PLACES.get(_file(item.nodeid), (len(_GROUPS), 0)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """A file's tests share what they set up, and a group's the cluster."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            path = _file(nodeid)
            return f"{_CLUSTER}{_PLACES[path][0]}" if path in _PLACES else path

    config.option.loadscopereorder = False
    return ByFile(config, log)


def _file(nodeid: str) -> str:
    return nodeid.partition("::")[0]


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A worker tells how many cases it tried."""
    if (output := getattr(session.config, "workeroutput", None)) is not None:
        output["fuzzed"] = cases.tried()


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """A worker has ended; one that crashed tells nothing."""
    cases.add(getattr(node, "workeroutput", {}).get("fuzzed", {}))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print how many cases were tried, and why the tests on a cluster were skipped."""
    for line in [*cases.summary(), *_without_cluster(terminalreporter)]:
        terminalreporter.write_line(line)


def _without_cluster(terminalreporter: pytest.TerminalReporter) -> list[str]:
    skipped = [
        report.longrepr[2].removeprefix("Skipped: ")
        for report in terminalreporter.stats.get("skipped", [])
        if _CLUSTER in report.nodeid
    ]
    return [f"{n} tests on a Slurm cluster skipped: {why}" for why, n in Counter(skipped).items()]
