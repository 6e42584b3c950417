"""Check the nodes of a partition against a profile, one property per check.

Each check returns its evidence. It raises `UserError` if it fails, `CheckWarning`, or
`CheckSkipped`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from hpc.cli import UserError
from hpc.config import did_you_mean, shown
from hpc.diagnostics.check import CheckSkipped, CheckWarning
from hpc.diagnostics.slurm_site import Row, SlurmSite, num_gpus
from hpc.scheduler.cluster_profile import ClusterProfile

# POWERED_DOWN is left out, since Slurm starts such nodes for a job
_AWAY = re.compile(r"(^|\+)(DOWN|DRAIN|FAIL|MAINT|NOT_RESPONDING|UNKNOWN)|\*")


def partitions_of(profile: ClusterProfile, site: SlurmSite) -> list[Row]:
    """Return the partitions that the profile names, or the site's default.

    Raises:
        UserError: A partition does not exist.
    """
    if not profile.partition:
        default = [row for row in site.partitions.values() if row.get("Default") == "YES"]
        if not default:
            known = ", ".join(site.partitions)
            raise UserError(f"the site has no default partition; set partition to one of {known}")
        return default
    names = profile.partition.split(",")
    for name in names:
        if name not in site.partitions:
            raise UserError(
                f"there is no partition {shown(name)}; {did_you_mean(name, site.partitions)}; "
                "set partition in the profile (`sinfo` lists them)"
            )
    return [site.partitions[name] for name in names]


def known_partitions(profile: ClusterProfile, site: SlurmSite) -> list[Row]:
    """Return `partitions_of`, for checks other than the partition's own.

    Raises:
        CheckSkipped: A partition does not exist; its own check says so.
    """
    try:
        return partitions_of(profile, site)
    except UserError as error:
        raise CheckSkipped("its partition is not known") from error


def nodes_of_partition(profile: ClusterProfile, site: SlurmSite) -> str:
    """Check that the partition has enough nodes that are not excluded, and permits so many."""
    for row in known_partitions(profile, site):
        most = row.get("MaxNodes", "")
        if most.isdigit() and profile.nodes > int(most):
            raise UserError(
                f"nodes = {profile.nodes}, but the partition {row['PartitionName']} gives a job at "
                f"most {most}; set nodes in the profile"
            )
    found = len(_nodes(profile, site))
    if found < profile.nodes:
        left = ", without those that it excludes" if profile.exclude else ""
        raise UserError(
            f"nodes = {profile.nodes}, but the partition has {found}{left}; set nodes in the "
            "profile, or choose another partition"
        )
    return f"{profile.nodes} of {found}"


def features(profile: ClusterProfile, site: SlurmSite) -> str:
    """Check that enough nodes have the features of `constraint`."""
    if not profile.constraint:
        raise CheckSkipped("the profile has no constraint")
    if not re.fullmatch(r"[\w.&,|-]+", profile.constraint):
        raise CheckSkipped(
            f"constraint = {shown(profile.constraint)} is for sbatch to judge, below"
        )
    alternatives = [set(re.split("[&,]", part)) for part in profile.constraint.split("|")]

    def has(node: Row) -> bool:
        own = set(node.get("AvailableFeatures", "").split(","))
        return any(wanted <= own for wanted in alternatives)

    nodes = _nodes(profile, site)
    known = {f for node in nodes for f in node.get("AvailableFeatures", "").split(",")}
    names = ", ".join(sorted(known - {"", "(null)"})) or "none"
    remedy = f"there are {names}, so set constraint"
    return _enough(profile, nodes, has, f"the features {profile.constraint!r}", remedy)


def cpus(profile: ClusterProfile, site: SlurmSite) -> str:
    """Check that enough nodes have CPUs for all tasks."""
    wanted = profile.tasks_per_node * profile.cpus_per_task
    return _enough_of(
        profile, site, lambda node: int(node.get("CPUEfctv") or node["CPUTot"]), wanted,
        "tasks_per_node or cpus_per_task", "CPUs",
    )  # fmt: skip


def memory(profile: ClusterProfile, site: SlurmSite) -> str:
    """Check that enough nodes have the memory."""
    if not profile.memory_gb:
        raise CheckSkipped("the profile leaves it to the site's default (memory_gb)")
    megabytes = round(1024 * profile.memory_gb)
    return _enough_of(profile, site, lambda node: int(node["RealMemory"]), megabytes,
                      "memory_gb", "MB of memory")  # fmt: skip


def gpus(profile: ClusterProfile, site: SlurmSite) -> str:
    """Check that enough nodes have the GPUs, of the kind in `gres`."""
    if not profile.gpus_per_node:
        raise CheckSkipped("the profile asks for none (gpus_per_node)")
    words = profile.gres.split(":")
    kind = words[1] if len(words) > 1 and not words[1].isdigit() else ""
    wanted = num_gpus(profile.gres) if profile.gres.startswith("gpu") else profile.gpus_per_node
    return _enough_of(profile, site, lambda node: num_gpus(node.get("Gres", ""), kind), wanted,
                      "gpus_per_node or gres", f"GPUs{' of kind ' * bool(kind)}{kind}")  # fmt: skip


def nodes_up(profile: ClusterProfile, site: SlurmSite) -> str:
    """Check that enough nodes are up for a job."""
    nodes = _nodes(profile, site)
    if len(nodes) < profile.nodes:
        raise CheckSkipped("the partition has too few nodes, up or down")
    away = [n["NodeName"] for n in nodes if _AWAY.search(n.get("State", ""))]
    if len(nodes) - len(away) < profile.nodes:
        raise CheckWarning(
            f"{', '.join(away)} cannot take jobs now, which leaves {len(nodes) - len(away)} of "
            f"{len(nodes)} for nodes = {profile.nodes}; jobs wait until they are back (`sinfo -R`)"
        )
    return f"{len(nodes) - len(away)} of {len(nodes)}"


def _nodes(profile: ClusterProfile, site: SlurmSite) -> list[Row]:
    """Return the nodes of the profile's partitions, without excluded ones."""
    names = {row["PartitionName"] for row in known_partitions(profile, site)}
    excluded = site.hosts(profile.exclude)
    return [
        node
        for node in site.nodes
        if names & set(node.get("Partitions", "").split(",")) and node["NodeName"] not in excluded
    ]


def _enough(
    profile: ClusterProfile,
    nodes: Sequence[Row],
    fits: Callable[[Row], bool],
    what: str,
    remedy: str,
) -> str:
    """Check that enough of `nodes` have `what`."""
    fitting = sum(map(fits, nodes))
    if fitting < min(profile.nodes, len(nodes)):  # another check reports too few nodes
        raise UserError(
            f"nodes = {profile.nodes}, but only {fitting} of the partition's {len(nodes)} have "
            f"{what}; {remedy} in the profile"
        )
    return f"{fitting} of {len(nodes)} have {what}"


def _enough_of(
    profile: ClusterProfile,
    site: SlurmSite,
    amount: Callable[[Row], int],
    wanted: int,
    key: str,
    unit: str,
) -> str:
    """Check that enough nodes have `wanted` of a unit."""
    nodes = _nodes(profile, site)
    most = max(map(amount, nodes), default=0)
    remedy = f"the most is {most}, so set {key}"
    return _enough(profile, nodes, lambda node: amount(node) >= wanted, f"{wanted} {unit}", remedy)
