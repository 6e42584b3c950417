"""Ask Slurm about a site: its partitions, nodes, limits and MPI types.

Each question is asked once, when its answer is first needed, and changes nothing.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from functools import cached_property

from hpc.account import user_name
from hpc.scheduler import slurm_cli

Row = Mapping[str, str]
_FIELD = re.compile(r"(?:^|\s)([A-Za-z]\w*)=(\S*)")
_ASSOCIATION = ("Account", "Partition", "QOS", "MaxSubmitJobs", "MaxWall", "MaxTRES")
_QUALITY = ("Name", "MaxSubmitPU", "MaxWall", "MaxTRES")


class SlurmSite:
    """The answers of scontrol, sacctmgr and srun.

    Attributes raise `QueueUnreachable` if the command does not answer, and `SlurmRefused` if it
    fails.
    """

    @cached_property
    def user(self) -> str:
        """Return the name of the user."""
        return user_name(os.getuid())

    @cached_property
    def partitions(self) -> dict[str, Row]:
        """Return scontrol's fields of each partition, by name."""
        return {row["PartitionName"]: row for row in _shown("partition")}

    @cached_property
    def nodes(self) -> list[Row]:
        """Return scontrol's fields of each node."""
        return _shown("node")

    @cached_property
    def config(self) -> Row:
        """Return the settings of Slurm."""
        lines = slurm_cli.ask("scontrol", "show", "config").splitlines()
        pairs = (line.partition("=") for line in lines if "=" in line)
        return {key.strip(): value.strip() for key, _, value in pairs}

    @cached_property
    def mpi_types(self) -> set[str]:
        """Return the values that `srun --mpi=` accepts."""
        said = slurm_cli.ask("srun", "--mpi=list").replace("srun:", "")
        versions = re.findall(r"available: *(.*)", said)
        lines = (line.strip() for line in said.splitlines())
        return {word for word in [*lines, *re.split(r"[ ,]+", " ".join(versions))]
                if re.fullmatch(r"\w+", word)}  # fmt: skip

    @cached_property
    def associations(self) -> list[Row]:
        """Return the user's associations, one row per account and partition."""
        return _accounting("assoc", f"user={self.user}", _ASSOCIATION)

    @cached_property
    def qos(self) -> dict[str, Row]:
        """Return every quality of service of the site, by name."""
        return {row["Name"]: row for row in _accounting("qos", "", _QUALITY)}

    def hosts(self, listed: str) -> set[str]:
        """Return the names that a list such as `node[07-12]` means."""
        return (
            set(slurm_cli.ask("scontrol", "show", "hostnames", listed).split()) if listed else set()
        )


def minutes_of(limit: str) -> float:
    """Return a time limit as Slurm writes it, D-HH:MM:SS, in minutes; infinite if there is none."""
    if not re.fullmatch(r"(\d+-)?\d+(:\d+){0,2}", limit):
        return float("inf")
    days, _, clock = limit.rpartition("-")
    parts = [int(part) for part in clock.split(":")]
    if days:  # D-HH[:MM[:SS]]
        hours, minutes, seconds = [*parts, 0, 0][:3]
    elif len(parts) == 3:
        hours, minutes, seconds = parts
    else:  # MM[:SS]
        hours, (minutes, seconds) = 0, [*parts, 0][:2]
    return int(days or 0) * 1440 + hours * 60 + minutes + seconds / 60


def amounts(tres: str) -> dict[str, int]:
    """Return `cpu=64,gres/gpu=8` as numbers, without those that have a unit, such as memory."""
    pairs = (part.partition("=") for part in tres.split(","))
    return {name: int(number) for name, _, number in pairs if number.isdigit()}


def num_gpus(gres: str, kind: str = "") -> int:
    """Return the number of GPUs in a node's `Gres=gpu:v100:4(S:0-1)`, of one kind if given."""
    found = re.findall(r"(?:^|,)gpu(?::(\d*[A-Za-z_][\w.+-]*))?(?::(\d+))?(?=[(,]|$)", gres)
    return sum(int(number or 1) for name, number in found if not kind or name == kind)


def _shown(what: str) -> list[Row]:
    lines = slurm_cli.ask("scontrol", "show", what, "--oneliner").splitlines()
    return [dict(_FIELD.findall(line)) for line in lines if "=" in line]


def _accounting(what: str, where: str, columns: Sequence[str]) -> list[Row]:
    question = [what, *(["where", where] if where else []), f"format={','.join(columns)}"]
    answer = slurm_cli.ask("sacctmgr", "--noheader", "--parsable2", "show", *question)
    rows = (line.split("|") for line in answer.splitlines())
    return [dict(zip(columns, row, strict=True)) for row in rows if len(row) == len(columns)]
