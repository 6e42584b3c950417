"""Checks of a site before anybody waits for it: each says in one line what holds, or what does not
and what to do. A check that breaks is a line too, and the others go on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from hpc.cli import UserError, one_line

Verdict = Literal["pass", "warn", "FAIL", "skip"]


class CheckSkipped(Exception):
    """Why a check says nothing here."""


class CheckWarning(Exception):
    """What works today, but had better be known."""


@dataclass(frozen=True)
class CheckResult:
    """What came out of one check. `said` is the evidence of a pass, else what is wrong and what to
    do about it, or why it was skipped."""

    verdict: Verdict
    what: str
    said: str

    def __str__(self) -> str:
        said = f" ({self.said})" if self.verdict == "pass" else f": {self.said}"
        return one_line(f"{self.verdict}  {self.what}{said}")


@dataclass(frozen=True)
class Check:
    """`look` returns the evidence, or raises `UserError`, `CheckWarning` or `CheckSkipped`."""

    what: str
    look: Callable[[], str]

    def run(self) -> CheckResult:
        """What comes out of it; never raises."""
        try:
            return CheckResult("pass", self.what, self.look())
        except UserError as error:
            return CheckResult("FAIL", self.what, str(error))
        except CheckWarning as doubt:
            return CheckResult("warn", self.what, str(doubt))
        except CheckSkipped as why:
            return CheckResult("skip", self.what, str(why))
        except Exception as error:  # whatever a site has that nobody thought of
            broken = f"the check itself failed ({type(error).__name__}: {error})"
            said = f"{broken}; please report it, and go by the others"
            return CheckResult("FAIL", self.what, said)


def run_checks(checks: Iterable[Check]) -> Iterator[CheckResult]:
    """What comes out of each, one after the other."""
    return (check.run() for check in checks)


def shown_bytes(number: float) -> str:
    """Bytes for people."""
    if number < 5e4:
        return f"{number / 1e3:.1f} kB"
    return f"{number / 1e6:.1f} MB" if number < 5e7 else f"{number / 1e9:.1f} GB"
