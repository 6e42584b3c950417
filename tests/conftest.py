"""Options of the whole test run."""

from __future__ import annotations

import pytest

from tests.fuzz import cases


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--fuzz-cases N`: how many cases the property-based tests try in all."""
    parser.addoption(
        "--fuzz-cases",
        type=int,
        default=cases.DEFAULT,
        metavar="N",
        help=f"cases that the fuzz tests try in all (default {cases.DEFAULT}: always the same "
        "ones; any other number: new ones at every run)",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Before any test is collected, since a test's share of the cases is fixed then."""
    cases.plan(config.getoption("--fuzz-cases"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """How many cases were tried."""
    for line in cases.summary():
        terminalreporter.write_line(line)
