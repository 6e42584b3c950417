"""Run checks and report each in one line: what holds, or what is wrong and what to do.

A check that raises an unexpected error gives a line too, and the other checks still run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from hpc.cli import UserError, one_line

Verdict = Literal["pass", "warn", "FAIL", "skip"]


class CheckSkipped(Exception):
    """The check does not apply, or cannot be made; the message gives the reason."""


class CheckWarning(Exception):
    """Jobs would run, but the user should know what the message says."""


@dataclass(frozen=True)
class CheckResult:
    """The result of one check.

    Attributes:
        verdict: Severity of the result.
        name: Subject of the check.
        message: The evidence of a pass; else what is wrong and what to do, or why it was skipped.
    """

    verdict: Verdict
    name: str
    message: str

    def __str__(self) -> str:
        message = f" ({self.message})" if self.verdict == "pass" else f": {self.message}"
        return one_line(f"{self.verdict}  {self.name}{message}")


@dataclass(frozen=True)
class Check:
    """A check by name.

    `perform` returns the evidence. It raises `UserError` if the check fails, `CheckWarning`, or
    `CheckSkipped`.
    """

    name: str
    perform: Callable[[], str]

    def run(self) -> CheckResult:
        """Return the result; raise nothing."""
        try:
            return CheckResult("pass", self.name, self.perform())
        except UserError as error:
            return CheckResult("FAIL", self.name, str(error))
        except CheckWarning as warning:
            return CheckResult("warn", self.name, str(warning))
        except CheckSkipped as reason:
            return CheckResult("skip", self.name, str(reason))
        except Exception as error:  # an unforeseen answer of a site
            broken = f"the check itself failed ({type(error).__name__}: {error})"
            message = f"{broken}; please report it; the other checks are valid"
            return CheckResult("FAIL", self.name, message)


def run_checks(checks: Iterable[Check]) -> Iterator[CheckResult]:
    """Run the checks one after the other and yield their results."""
    return (check.run() for check in checks)


def shown_bytes(number: float) -> str:
    """Return a number of bytes in kB, MB or GB."""
    if number < 5e4:
        return f"{number / 1e3:.1f} kB"
    return f"{number / 1e6:.1f} MB" if number < 5e7 else f"{number / 1e9:.1f} GB"
