"""Time several implementations of the same work in turns.

Other load on the machine then affects all of them alike. The result is the ratio of each round;
seconds stand beside it.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:  # most programs here do without
    import torch

Work = Callable[[], object]
_SMALLEST = 0.05  # seconds that a round lasts at least, far above the clock's resolution


@dataclass(frozen=True)
class Comparison:
    """Seconds of our implementation and of a peer, one value a round, for one unit of work.

    `target` is the ratio that we aim at, 0 for none. `limit` names the hardware's lower bound.
    `more` holds other numbers by name.
    """

    what: str
    against: str
    ours: tuple[float, ...]
    peers: tuple[float, ...]
    target: float = 0.0
    limit: str = ""
    more: Mapping[str, float | str] = field(default_factory=dict)

    @property
    def ratios(self) -> list[float]:
        """Return the peer's time divided by ours, one value a round."""
        return [peer / mine for mine, peer in zip(self.ours, self.peers, strict=True)]

    @property
    def ratio(self) -> float:
        """Return the median ratio over all rounds."""
        return statistics.median(self.ratios)

    @property
    def met(self) -> bool:
        """Return True if the median ratio reaches the target."""
        return self.ratio >= self.target

    def record(self) -> dict[str, Any]:
        """Return the comparison as JSON values."""
        own = {key: getattr(self, key) for key in ("what", "against", "ours", "peers", "target")}
        return {**own, "ratio": self.ratio, "limit": self.limit, "more": dict(self.more)}


@dataclass(frozen=True)
class NotMeasured:
    """A comparison that could not be measured, and the reason."""

    what: str
    against: str
    why: str

    def record(self) -> dict[str, Any]:
        """Return the reason as JSON values."""
        return {"what": self.what, "against": self.against, "absent": self.why}


Result = Comparison | NotMeasured


def time_in_turns(ways: Mapping[str, Work], rounds: int = 7) -> dict[str, tuple[float, ...]]:
    """Return the seconds of one call of each function, one value a round.

    Every function runs once before the first round. Short functions are repeated within a round.
    """
    repeats = {}
    for name, work in ways.items():
        work()
        once = _seconds(work, 1)
        repeats[name] = max(1, int(_SMALLEST / max(once, 1e-9)))
    found: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, work in ways.items():
            found[name].append(_seconds(work, repeats[name]))
    return {name: tuple(seconds) for name, seconds in found.items()}


def compare(
    what: str,
    ours: Work,
    peers: Mapping[str, tuple[Work, float]],
    rounds: int = 7,
    limit: str = "",
    units: int = 1,
    more: Mapping[str, float | str] | None = None,
) -> list[Comparison]:
    """Compare our function with each peer.

    Args:
        what: the name of the work.
        ours: our function; one call does `units` units of work, as each peer's does.
        peers: by name, the peer's function and its target ratio.
        rounds: the number of rounds.
        limit: the hardware's lower bound, in words.
        units: the number of units that one call does.
        more: other numbers for the record.
    """
    ways = {"": ours, **{name: work for name, (work, _) in peers.items()}}
    found = {
        name: tuple(s / units for s in seconds)
        for name, seconds in time_in_turns(ways, rounds).items()
    }
    return [
        Comparison(what, name, found[""], found[name], target, limit, more or {})
        for name, (_, target) in peers.items()
    ]


def _seconds(work: Work, repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        work()
    return (time.perf_counter() - start) / repeats


def users_environment() -> dict[str, str]:
    """Return the environment of a user's shell, in which Python keeps compiled modules."""
    return {key: v for key, v in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}


HEAD = (
    "| what | against | ours | peer | ratio, median (least to most) | target | limit |\n"
    "|---|---|---:|---:|---:|---:|---|"
)


def row(one: Result) -> str:
    """Return a comparison as a row of the Markdown table with the heading `HEAD`."""
    if isinstance(one, NotMeasured):
        return f"| {one.what} | {one.against} | | | not measured: {one.why} | | |"
    mine, peer = (time_text(statistics.median(s)) for s in (one.ours, one.peers))
    spread = f"{min(one.ratios):.3g} to {max(one.ratios):.3g}"
    aim = f"{one.target:g}{'' if one.met else ' (missed)'}" if one.target else ""
    return (
        f"| {one.what} | {one.against} | {mine} | {peer} | **{one.ratio:.3g}** ({spread}) "
        f"| {aim} | {one.limit} |"
    )


def time_text(seconds: float) -> str:
    """Return `seconds` in s, ms or µs, with 3 digits."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e6:.3g} µs"


def copy_bandwidth(size: int = 256 * 2**20) -> float:
    """Return the copy bandwidth of one core in bytes per second, reads and writes added.

    The best of 5 copies of `size` bytes counts.
    """
    source, target = np.ones(size, np.uint8), np.empty(size, np.uint8)
    return 2 * size / best_seconds(lambda: np.copyto(target, source))


def matrix_rate(dtype: torch.dtype | None = None, device: torch.device | None = None) -> float:
    """Return the floating-point operations per second of a matrix product, the best of 5.

    The defaults are float32 on all cores.
    """
    import torch

    device = device or torch.device("cpu")
    dtype = dtype or torch.float32
    on_processor = 2048 if dtype == torch.float32 else 256  # slow in half precision
    size = 8192 if device.type == "cuda" else on_processor
    one = torch.randn(size, size, device=device).to(dtype)
    return 2 * size**3 / best_seconds(synchronised(lambda: one @ one, device))


def synchronised(work: Work, device: torch.device) -> Work:
    """Return a function that calls `work` and then waits for `device`."""
    if device.type != "cuda":
        return work

    def whole() -> None:
        import torch

        work()
        torch.cuda.synchronize(device)

    return whole


def best_seconds(work: Work) -> float:
    """Return the seconds of the fastest of 5 calls, after one call to warm up."""
    work()
    return min(_seconds(work, 1) for _ in range(5))


def arithmetic(flops: float, rate: float) -> str:
    """Return the time of `flops` operations at `rate` operations per second, in words."""
    unit, name = (1e12, "TFLOP/s") if rate >= 1e13 else (1e9, "GFLOP/s")
    return f"{flops / 1e9:.0f} GFLOP at {rate / unit:.0f} {name}: {time_text(flops / rate)}"


def parse_names(
    program: str, description: str | None, names: Sequence[str], argv: Sequence[str]
) -> tuple[Sequence[str], Path]:
    """Return the names on a command line, all of `names` if none, and the folder of `--out`.

    The folder is created. An unknown name ends the program.
    """
    parser = argparse.ArgumentParser(
        prog=program, description=description, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(names)}")
    parser.add_argument("--out", type=Path, default=Path("benchmark-results"), metavar="DIR")
    options = parser.parse_args(argv)
    unknown = [name for name in options.names if name not in names]
    if unknown:
        parser.error(f"unknown name {unknown[0]}; choose from {', '.join(names)}")
    options.out.mkdir(parents=True, exist_ok=True)
    return options.names or names, options.out
