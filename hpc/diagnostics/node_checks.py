"""Check the nodes by the facts that the ranks of a probe job reported.

Each check returns its evidence. It raises `UserError` if it fails, `CheckWarning`, or
`CheckSkipped`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from hpc.cli import UserError
from hpc.diagnostics.check import CheckSkipped, CheckWarning, shown_bytes
from hpc.diagnostics.probe_jobs import Report
from hpc.scheduler.cluster_profile import ClusterProfile

_SKEW_SECONDS = 1.0  # above it, the times in logs mislead
_COMPLAINT = re.compile(r"command not found|No such file|[Ee]rror|cannot|[Uu]nable|not found")


def launch(profile: ClusterProfile, report: Report) -> str:
    """Check that every rank started, on the right number of nodes, and knows its number."""
    wanted, facts = report.probe.world_size, report.facts
    if not facts and not report.has_log:
        raise UserError(
            f"the nodes do not see the run directory: job {report.job} could leave neither log nor "
            "facts there; set run_dir to a folder on a file system that the nodes share"
        )
    if not facts:
        raise UserError(
            f"job {report.job} ended before it reported anything ({report.ended}); fix setup or "
            "python in the profile"
        )
    sizes = sorted({rank["world_size"] for rank in facts})
    if sizes != [wanted]:
        raise UserError(
            f"ranks see a world size of {', '.join(map(str, sizes))}, not {wanted}: the variables "
            "of srun did not reach Python; fix python in the profile"
        )
    if missing := sorted(set(range(wanted)) - {rank["rank"] for rank in facts}):
        raise UserError(
            f"rank {missing[0]} of {wanted} reported nothing ({report.ended}); see that all nodes "
            "have the run directory (`sinfo -R`), or exclude the bad node in the profile"
        )
    nodes = sorted({rank["node"] for rank in facts})
    if len(nodes) != report.probe.resources.nodes:
        raise UserError(
            f"ranks are on {', '.join(nodes)}, not on {report.probe.resources.nodes} nodes; look "
            "at extra in the profile"
        )
    return f"{wanted} ranks on {', '.join(nodes)}"


def shared_folder(report: Report) -> str:
    """Check that each node and this one read files that the other wrote."""
    nodes = sorted(_of_nodes(report, "clock", "the run directory must be on a file system that "
                                              "all nodes share: set run_dir"))  # fmt: skip
    return f"{', '.join(nodes)} and this node read what the other wrote"


def clocks(report: Report, most: float) -> str:
    """Check that no node's clock differs from this node's by `most` seconds or more."""
    found = _of_nodes(report, "clock", "without a shared folder clocks cannot be compared")
    worst = 0.0
    for node, times in found.items():
        # this node read its clock after the other sent, and before the other received
        ahead = times["sent"] - times["login_time"], times["received"] - times["login_time"]
        min_skew = max(ahead[0], -ahead[1])
        remedy = "ask the site's administrators to set it (chrony, NTP), or exclude the node"
        which = "ahead of" if ahead[0] > 0 else "behind"
        if min_skew >= most:
            raise UserError(
                f"the clock of {node} is {min_skew:.0f} s {which} this node's: at {most:.0f} s "
                f"or more, running jobs look dead; {remedy}"
            )
        if min_skew > _SKEW_SECONDS:
            skew = f"{min_skew:.1f} s {which} this node's"
            raise CheckWarning(f"the clock of {node} is {skew}; {remedy}")
        worst = max(worst, *map(abs, ahead))
    if worst >= most:
        raise CheckWarning(
            f"the folder shows files so late that clocks may differ by up to {worst:.0f} s"
        )
    return f"within {worst:.1f} s of this node's, {most:.0f} s are allowed"


def set_up_words(profile: ClusterProfile, report: Report) -> str:
    """Check that the setup lines printed no error."""
    if not profile.setup:
        raise CheckSkipped("the profile has none")
    _reported(report)
    if bad := [line for line in report.set_up if _COMPLAINT.search(line)]:
        said = re.sub(r"^\S*/slurm_script: ", "", bad[0])
        raise UserError(f"a line prints {said!r}; fix setup in the profile")
    return f"{len(profile.setup)} lines, no complaint"


def same_versions(profile: ClusterProfile, report: Report, own: Mapping[str, str]) -> str:
    """Check that all nodes and this one have the same versions."""
    found = _of_nodes(report, "versions", "install the same on all nodes")
    first = next(iter(found))
    for node, theirs in found.items():
        if wrong := _difference(theirs, found[first]):
            raise UserError(
                f"{wrong[0]} is {wrong[1]} on {node}, but {wrong[2]} on {first}; install the same "
                "on all nodes, on a file system that they share, or exclude the node"
            )
    if wrong := _difference(found[first], own):
        text = f"{wrong[0]} is {wrong[1]} on {first}, but {wrong[2]} here"
        if profile.python:
            raise CheckWarning(f"{text}; the profile's python is another one on purpose?")
        raise UserError(f"{text}; load the same environment in setup, or name it in python")
    versions = ", ".join(f"{name} {version}" for name, version in found[first].items())
    return f"on {', '.join(found)} and here: {versions}"


def interface(profile: ClusterProfile, report: Report) -> str:
    """Check that each node has the network interface of the profile."""
    if not profile.network_interface:
        raise CheckSkipped("the profile lets NCCL and gloo choose (network_interface)")
    found = _of_nodes(report, "interfaces", "look at the node")
    for node, names in found.items():
        if missing := sorted(set(profile.network_interface.split(",")) - set(names)):
            raise UserError(
                f"{node} has no {missing[0]!r}, only {', '.join(names)}; set network_interface in "
                "the profile, or leave it out"
            )
    return f"{profile.network_interface} on {', '.join(found)}"


def same_files(report: Report, expected: Mapping[str, int]) -> str:
    """Check that each node sees the files with the size in bytes that they have here."""
    if not expected:
        raise CheckSkipped("there are none yet")
    for node, found in _of_nodes(report, "files", "look at the node").items():
        for path, size in expected.items():
            if found.get(path) != size:
                state = f"has {found[path]} bytes of" if found.get(path, -1) >= 0 else "cannot read"
                raise UserError(
                    f"{node} {state} {path}, which has {size} here; put it on a file system that "
                    "all nodes share"
                )
    return f"all {len(expected)}, {shown_bytes(sum(expected.values()))}"


def node_disk(profile: ClusterProfile, report: Report, needed: int) -> str:
    """Check that `node_local` can be written to and has room for `needed` bytes."""
    if not profile.node_local:
        raise CheckSkipped("the profile has none (node_local)")
    found = _of_nodes(report, "room", "set node_local in the profile, or leave it out")
    for node, free in found.items():
        if free < needed:
            raise UserError(
                f"{node} has {shown_bytes(free)} free in {profile.node_local}, not the "
                f"{shown_bytes(needed)} that are copied there, so jobs would read from the shared "
                "disk; set node_local to another folder, or leave it out"
            )
    return f"{profile.node_local} has {shown_bytes(min(found.values()))} free or more"


def graphics(profile: ClusterProfile, report: Report) -> str:
    """Check that torch loads and has kernels for the GPU of every rank."""
    ranks = of_ranks(report, "device", "fix python or setup in the profile")
    if not profile.gpus_per_node:
        raise CheckSkipped("the profile asks for none (gpus_per_node)")
    if blind := [rank for rank, device in ranks.items() if device["name"] == "cpu"]:
        raise UserError(
            f"torch sees no GPU on {blind[0]}; install a build of torch for CUDA, or see with "
            "`nvidia-smi` in a job whether the node has one"
        )
    names = sorted({device["name"] for device in ranks.values()})
    return f"{len(ranks)} ranks on {', '.join(names)}"


def network(profile: ClusterProfile, report: Report) -> str:
    """Check that all ranks joined one process group, as in training, and summed correctly."""
    over = f" over {profile.network_interface}" if profile.network_interface else ""
    remedy = (
        f"the ranks cannot communicate{over}: set network_interface in the profile to one that "
        "leads to the other nodes (`ip link`), and see that no firewall is between them"
    )
    found = of_ranks(report, "met", remedy)
    right = sum(range(1, report.probe.world_size + 1))
    for rank, met in found.items():
        if met["sum"] != right:
            raise UserError(f"{rank} has a sum of {met['sum']:g} instead of {right}; {remedy}")
    slowest = max(met["seconds"] for met in found.values())
    return f"{len(found)} ranks added 4 MB up in {1000 * slowest:.0f} ms{over}"


def time_to_save(profile: ClusterProfile, report: Report, bytes_saved: int) -> str:
    """Check that `lead_seconds` is long enough to write `bytes_saved`."""
    rates = of_ranks(report, "bytes_per_second", "look at the disk of the run directory", first=1)
    rate = next(iter(rates.values()))
    seconds = bytes_saved / rate
    takes = f"{shown_bytes(bytes_saved)} in about {seconds:.1f} s, at {rate / 1e6:.0f} MB a second"
    if seconds > profile.lead_seconds:
        raise UserError(
            f"a job saves {takes}, which is longer than lead_seconds = {profile.lead_seconds}; set "
            "it higher in the profile"
        )
    return f"{takes}; lead_seconds = {profile.lead_seconds}"


def mpi_world(profile: ClusterProfile, report: Report) -> str:
    """Check that MPI sees every rank that srun started."""
    remedy = "set mpi in the profile to what mpi4py's MPI speaks (`srun --mpi=list`)"
    found = of_ranks(report, "world", remedy)
    for rank, size in found.items():
        if size != report.probe.world_size:
            raise UserError(
                f"MPI sees {size} ranks on {rank}, but {report.probe.world_size} started; {remedy}"
            )
    return f"{report.probe.world_size} ranks in one world, by {profile.mpi or 'the site default'}"


def _difference(one: Mapping[str, str], other: Mapping[str, str]) -> tuple[str, str, str] | None:
    """Return the first name that differs, and both values; None if all are equal."""
    names = (name for name in one if one[name] != other.get(name))
    return next(((name, one[name], other.get(name, "none")) for name in names), None)


def _reported(report: Report) -> Sequence[dict[str, Any]]:
    if not report.facts:
        raise CheckSkipped("no rank reported")
    return report.facts


def _of_nodes(report: Report, name: str, remedy: str) -> dict[str, Any]:
    """Return a fact by node, from the first rank of each node."""
    ranks = [rank for rank in _reported(report) if rank["local_rank"] == 0]
    return {rank["node"]: _fact(report, rank, name, remedy) for rank in ranks}


def of_ranks(report: Report, name: str, remedy: str, first: int | None = None) -> dict[str, Any]:
    """Return a fact by rank; `first` limits it to the first ranks.

    Args:
        report: The report of a probe job.
        name: Name of the fact.
        remedy: What to do if a rank could not find it out.
        first: Number of ranks; None means all.

    Raises:
        UserError: A rank failed to find out the fact.
        CheckSkipped: No rank reported anything.
    """
    ranks = _reported(report)[:first]
    for rank in ranks:  # the error of one rank explains why others ended
        if name in rank["errors"]:
            _fact(report, rank, name, remedy)
    return {_place(rank): _fact(report, rank, name, remedy) for rank in ranks}


def _fact(report: Report, rank: dict[str, Any], name: str, remedy: str) -> Any:
    if name in rank["errors"]:
        raise UserError(f"{_place(rank)}: {rank['errors'][name]}; {remedy}")
    if name not in rank:
        raise UserError(f"{_place(rank)} ended before it reported this ({report.ended}); {remedy}")
    return rank[name]


def _place(rank: dict[str, Any]) -> str:
    return f"rank {rank['rank']} on {rank['node']}"
