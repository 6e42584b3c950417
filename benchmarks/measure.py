"""Times two ways of doing the same side by side, in turns, so that whatever else the machine does
hits both alike. Ratios of rounds are what counts; seconds are given beside them."""

from __future__ import annotations

import argparse
import json
import os
import platform
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
_SMALLEST = 0.05  # seconds that a round must last, so that the clock's grain is nothing


@dataclass(frozen=True)
class Comparison:
    """Seconds of each round, for one unit of work, in turns with those of the peer. `target`: the
    ratio that was aimed at, 0 for none. `limit`: what no program can go below, in words and
    numbers. `more`: other numbers worth keeping, by name."""

    what: str
    against: str
    ours: tuple[float, ...]
    peers: tuple[float, ...]
    target: float = 0.0
    limit: str = ""
    more: Mapping[str, float | str] = field(default_factory=dict)

    @property
    def ratios(self) -> list[float]:
        """How many times as long the peer took, round by round."""
        return [peer / mine for mine, peer in zip(self.ours, self.peers, strict=True)]

    @property
    def ratio(self) -> float:
        """Their median."""
        return statistics.median(self.ratios)

    @property
    def met(self) -> bool:
        return self.ratio >= self.target

    def record(self) -> dict[str, Any]:
        """All of it, as JSON has it."""
        own = {key: getattr(self, key) for key in ("what", "against", "ours", "peers", "target")}
        return {**own, "ratio": self.ratio, "limit": self.limit, "more": dict(self.more)}


@dataclass(frozen=True)
class Absent:
    """A comparison that could not be made, and why."""

    what: str
    against: str
    why: str

    def record(self) -> dict[str, Any]:
        return {"what": self.what, "against": self.against, "absent": self.why}


Found = Comparison | Absent


def in_turns(ways: Mapping[str, Work], rounds: int = 7) -> dict[str, tuple[float, ...]]:
    """Seconds of one call of each way, in each of `rounds` rounds, in which every way has a turn.
    Each runs once before, to warm up. Short ways are repeated within a turn."""
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
    """Our way against each peer, named with its target ratio; a call does `units` of work."""
    ways = {"": ours, **{name: work for name, (work, _) in peers.items()}}
    found = {
        name: tuple(s / units for s in seconds) for name, seconds in in_turns(ways, rounds).items()
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
    """The environment of commands as a user starts them: his Python keeps compiled modules."""
    return {key: v for key, v in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}


HEAD = (
    "| what | against | ours | peer | ratio, median (least to most) | target | limit |\n"
    "|---|---|---:|---:|---:|---:|---|"
)


def row(one: Found) -> str:
    """A comparison as a row of a Markdown table below `HEAD`."""
    if isinstance(one, Absent):
        return f"| {one.what} | {one.against} | | | not measured: {one.why} | | |"
    mine, peer = (time_text(statistics.median(s)) for s in (one.ours, one.peers))
    spread = f"{min(one.ratios):.3g} to {max(one.ratios):.3g}"
    aim = f"{one.target:g}{'' if one.met else ' (missed)'}" if one.target else ""
    return (
        f"| {one.what} | {one.against} | {mine} | {peer} | **{one.ratio:.3g}** ({spread}) "
        f"| {aim} | {one.limit} |"
    )


def time_text(seconds: float) -> str:
    """Seconds with a fitting unit."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e6:.3g} µs"


def machine() -> dict[str, Any]:
    """What was measured on, and the two limits that the rest is held against, measured here too."""
    import torch

    from benchmarks.gpu import chip, in_own_process  # which measures by what stands here

    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "copy_gb_per_s": round(copy_bandwidth() / 1e9, 2),
        "float32_gflop_per_s": round(matrix_rate() / 1e9, 1),
        "load": os.getloadavg()[0],
        **(in_own_process(chip) if torch.cuda.is_available() else {}),
    }


def copy_bandwidth(size: int = 256 * 2**20) -> float:
    """Bytes a second that one core copies, those it reads and those it writes together: the best of
    five."""
    source, target = np.ones(size, np.uint8), np.empty(size, np.uint8)
    return 2 * size / best_seconds(lambda: np.copyto(target, source))


def matrix_rate(dtype: torch.dtype | None = None, device: torch.device | None = None) -> float:
    """Floating-point operations a second of a matrix product of random numbers, float32 on all
    cores if nothing else is said: best of five."""
    import torch

    device = device or torch.device("cpu")
    dtype = dtype or torch.float32
    on_processor = 2048 if dtype == torch.float32 else 256  # slow in half precision
    size = 8192 if device.type == "cuda" else on_processor
    one = torch.randn(size, size, device=device).to(dtype)
    return 2 * size**3 / best_seconds(waited(lambda: one @ one, device))


def waited(work: Work, device: torch.device) -> Work:
    """`work`, until `device` has done it."""
    if device.type != "cuda":
        return work

    def whole() -> None:
        import torch

        work()
        torch.cuda.synchronize(device)

    return whole


def best_seconds(work: Work) -> float:
    """Of five calls, after one to warm up."""
    work()
    return min(_seconds(work, 1) for _ in range(5))


def arithmetic(flops: float, rate: float) -> str:
    """The limit of so many floating-point operations at so many a second, in words."""
    unit, name = (1e12, "TFLOP/s") if rate >= 1e13 else (1e9, "GFLOP/s")
    return f"{flops / 1e9:.0f} GFLOP at {rate / unit:.0f} {name}: {time_text(flops / rate)}"


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def chosen(
    program: str, description: str | None, names: Sequence[str], argv: Sequence[str]
) -> tuple[Sequence[str], Path]:
    """Which of `names` a command line names, all if none, and the folder its --out gives, which is
    made. Ends the program for a name that is not one of them."""
    parser = argparse.ArgumentParser(
        prog=program, description=description, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(names)}")
    parser.add_argument("--out", type=Path, default=Path("benchmark-results"), metavar="DIR")
    options = parser.parse_args(argv)
    unknown = [name for name in options.names if name not in names]
    if unknown:
        parser.error(f"nothing is called {unknown[0]}; there are {', '.join(names)}")
    options.out.mkdir(parents=True, exist_ok=True)
    return options.names or names, options.out


def write_record(
    path: Path, record: Mapping[str, Any], on: Mapping[str, Any] | None = None
) -> None:
    """Write what was measured as JSON, and on what machine: `on`, or as it is now."""
    path.write_text(json.dumps({"machine": on or machine(), **record}, indent=1) + "\n")
