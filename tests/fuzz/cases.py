"""Set the number of cases of each property-based test, and stop one that hangs.

    @fuzzed(0.15, damage=st.binary())
    def test_a_damaged_thing_is_named(damage, fixture): ...

tries 15 % of all cases. Up to 2,000 cases are the same ones in every run of the tests; more are
new ones each time, as in `pytest tests/fuzz --fuzz-cases 20000`. The shares of all tests add up to
one or more. A case is over in seconds, or it hangs, and that fails the test; one that hangs
in a library, where Python gets no word in, ends the whole run with a traceback.
"""

from __future__ import annotations

import faulthandler
import math
import signal
from collections import Counter
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.strategies import SearchStrategy

DEFAULT = 2000
HANGS_AFTER = 30  # seconds

_planned = DEFAULT
_tried: Counter[str] = Counter()


def plan(cases: int) -> None:
    """Set how many cases all tests try together."""
    global _planned
    _planned = cases


def fuzzed(share: float, **strategies: SearchStrategy[Any]) -> Callable[[Any], Any]:
    """Run the test on `share` of all cases, drawn from `strategies`, given by name; the test's
    other arguments are fixtures of module or session scope."""

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        number = math.ceil(share * _planned)

        @settings(
            max_examples=number,
            derandomize=_planned <= DEFAULT,
            database=None,
            deadline=None,  # a busy machine is slow; the alarm tells what hangs
            print_blob=True,
            # a failure is shown as it was found: shrinking it takes longer than reading it
            phases=(Phase.explicit, Phase.generate),
            suppress_health_check=list(HealthCheck),
        )
        @given(**strategies)
        @wraps(test)
        def counted(*arguments: Any, **drawn: Any) -> None:
            _tried[test.__name__] += 1
            before = signal.signal(signal.SIGALRM, _give_up)
            signal.alarm(HANGS_AFTER)
            faulthandler.dump_traceback_later(4 * HANGS_AFTER, exit=True)
            try:
                test(*arguments, **drawn)
            finally:
                faulthandler.cancel_dump_traceback_later()
                signal.alarm(0)
                signal.signal(signal.SIGALRM, before)

        return pytest.mark.fuzz(counted)

    return decorate


def tried() -> dict[str, int]:
    """Return the number of cases that each test has tried in this process."""
    return dict(_tried)


def add(cases: Mapping[str, int]) -> None:
    """Count cases that another process has tried."""
    _tried.update(cases)


def summary() -> list[str]:
    """A line for each test that ran, and one for all."""
    lines = [f"{number:6} cases: {name}" for name, number in _tried.items()]
    return [*lines, f"{_tried.total():6} cases fuzzed"] if lines else []


def _give_up(*_: Any) -> None:
    raise TimeoutError(f"the case hung for {HANGS_AFTER} seconds")
