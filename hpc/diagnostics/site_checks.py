"""Check that a Slurm site has, and allows, what a cluster profile asks for.

Each check takes the profile and the site, and returns its evidence. It raises `UserError` if it
fails, `CheckWarning`, or `CheckSkipped`.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Iterable
from functools import partial
from typing import TypeVar

from hpc.cli import UserError
from hpc.config import did_you_mean, shown
from hpc.diagnostics.check import Check, CheckSkipped, CheckWarning
from hpc.diagnostics.partition_checks import (
    cpus,
    features,
    gpus,
    known_partitions,
    memory,
    nodes_of_partition,
    nodes_up,
    partitions_of,
)
from hpc.diagnostics.slurm_site import Row, SlurmSite, amounts, minutes_of
from hpc.scheduler import sbatch_options
from hpc.scheduler.base import Queue, QueueUnreachable
from hpc.scheduler.clean_env import ignored_options
from hpc.scheduler.cluster_profile import ClusterProfile, Resources
from hpc.scheduler.slurm_cli import SlurmRefused

T = TypeVar("T")


def site_checks(profile: ClusterProfile, site: SlurmSite, queue: Queue) -> list[Check]:
    """Return the checks of a site in the order in which the user fixes their failures."""
    checks: dict[str, Callable[[ClusterProfile, SlurmSite], str]] = {
        "partition": partition,
        "account": account,
        "quality of service": qos,
        "time limit": time_limit,
        "nodes of the partition": nodes_of_partition,
        "features of the nodes": features,
        "CPUs of a node": cpus,
        "memory of a node": memory,
        "GPUs of a node": gpus,
        "nodes that are up": nodes_up,
        "limits of one job": job_limits,
        "jobs in the queue": queue_limits,
        "MPI type": mpi_type,
        "set-up lines": setup_lines,
        "requeueing": requeueing,
        "options in the shell": options_in_shell,
        "a training job, as sbatch sees it": partial(trial, queue),
    }
    return [Check(name, partial(check, profile, site)) for name, check in checks.items()]


def partition(profile: ClusterProfile, site: SlurmSite) -> str:
    """Check that the partition is up and admits the profile's account and quality of service."""
    rows = partitions_of(profile, site)
    for row in rows:
        name = row["PartitionName"]
        if row.get("State", "UP") != "UP":
            raise UserError(f"the partition {name!r} is {row['State']}; choose another, or wait")
        for key, given in (("Accounts", profile.account), ("Qos", profile.qos)):
            allowed, denied = (row.get(f"{verb}{key}", "") for verb in ("Allow", "Deny"))
            shut_out = given in denied.split(",") or (
                allowed not in ("", "ALL", "N/A") and given not in allowed.split(",")
            )
            if given and shut_out:
                raise UserError(
                    f"the partition {name!r} does not take {given!r} (Allow{key}={allowed or 'ALL'}"
                    f"); choose another partition, account or qos in the profile"
                )
    return ", ".join(f"{row['PartitionName']} is up" for row in rows)


def account(profile: ClusterProfile, site: SlurmSite) -> str:
    """Check that accounting knows this user in the profile's account."""
    rows = _or_skip(lambda: site.associations)
    own = list(dict.fromkeys(row["Account"] for row in rows))
    enforced = "associations" in site.config.get("AccountingStorageEnforce", "")
    if not own:
        if enforced:
            raise UserError(
                f"accounting knows no account of {site.user!r}, and Slurm requires one; "
                "ask the site's administrators for one"
            )
        raise CheckSkipped(f"accounting knows no account of {site.user!r}; Slurm requires none")
    if profile.account and profile.account not in own:
        raise UserError(
            f"account = {shown(profile.account)} is no account of {site.user!r}; "
            f"{did_you_mean(profile.account, own)}; set account in the profile"
        )
    return profile.account or f"the default of {site.user}, who has {', '.join(own)}"


def qos(profile: ClusterProfile, site: SlurmSite) -> str:
    """Check that the profile's quality of service exists and this user may use it."""
    if not profile.qos:
        return "the profile names none, so the default"
    known = _or_skip(lambda: site.qos)
    if profile.qos not in known:
        raise UserError(
            f"there is no quality of service {shown(profile.qos)}; "
            f"{did_you_mean(profile.qos, known)}; set qos in the profile"
        )
    granted = [name for row in _associations(profile, site) for name in row["QOS"].split(",")]
    if any(granted) and profile.qos not in granted:
        raise UserError(
            f"you may not use qos = {shown(profile.qos)}, only {', '.join(sorted(set(granted)))}; "
            "set qos in the profile, or ask the site's administrators"
        )
    return profile.qos


def time_limit(profile: ClusterProfile, site: SlurmSite) -> str:
    """Check that partition, quality of service and account allow the time limit."""
    limits = {f"the partition {row['PartitionName']}": row.get("MaxTime", "")
              for row in known_partitions(profile, site)}  # fmt: skip
    limits |= {of: row["MaxWall"] for of, row in _limits(profile, site).items()}
    least = min(limits, key=lambda of: minutes_of(limits[of]))
    most = minutes_of(limits[least])
    if profile.minutes > most:
        raise UserError(
            f"minutes = {profile.minutes}, but {least} allows {most:.0f}; set minutes = {most:.0f} "
            "or less in the profile: a job that takes longer is requeued and resumes"
        )
    allowed = "no limit" if most == float("inf") else f"{least} allows {most:.0f}"
    return f"{profile.minutes} minutes; {allowed}"


def job_limits(profile: ClusterProfile, site: SlurmSite) -> str:
    """Check that accounting allows one job the nodes, CPUs and GPUs."""
    tasks = profile.nodes * profile.tasks_per_node
    wanted = {"node": profile.nodes, "cpu": tasks * profile.cpus_per_task,
              "gres/gpu": profile.nodes * profile.gpus_per_node}  # fmt: skip
    granted = _or_skip(lambda: _limits(profile, site, silent=False))
    for of, row in granted.items():
        for name, most in amounts(row["MaxTRES"]).items():
            if wanted.get(name, 0) > most:
                raise UserError(
                    f"a job takes {name} = {wanted[name]}, but {of} allows {most}; ask for less in "
                    "the profile, or choose another account or qos"
                )
    return f"{wanted['node']} nodes, {wanted['cpu']} CPUs, {wanted['gres/gpu']} GPUs"


def queue_limits(profile: ClusterProfile, site: SlurmSite) -> str:
    """Check that `max_jobs` is within the site's limit of jobs in the queue.

    Longer arrays are split, and jobs beyond the limit are deferred.
    """
    array = int(site.config.get("MaxArraySize", 0))
    if array < 2:
        raise CheckWarning(
            "the site has no job arrays (MaxArraySize); every job is submitted on its own"
        )
    limits = {of: row.get("MaxSubmitJobs") or row.get("MaxSubmitPU", "")
              for of, row in _limits(profile, site).items()}  # fmt: skip
    numbers = {of: int(limit) for of, limit in limits.items() if limit.isdigit()}
    if not numbers:
        return f"arrays of up to {array} jobs; no limit of your own is known"
    least = min(numbers, key=lambda of: numbers[of])
    if profile.max_jobs > numbers[least]:
        raise UserError(
            f"max_jobs = {profile.max_jobs}, but {least} lets you have {numbers[least]} jobs in "
            f"the queue; set max_jobs = {numbers[least]} in the profile or leave it out"
        )
    return f"arrays of up to {array} jobs; you may have {numbers[least]} in the queue ({least})"


def mpi_type(profile: ClusterProfile, site: SlurmSite) -> str:
    """Check that srun has the MPI type of the profile."""
    if not profile.mpi:
        return f"the profile names none, so {site.config.get('MpiDefault', 'the default')}"
    if profile.mpi not in site.mpi_types:
        raise UserError(
            f"srun has no MPI type {shown(profile.mpi)}; "
            f"{did_you_mean(profile.mpi, site.mpi_types)}; set mpi in the profile "
            "(`srun --mpi=list`)"
        )
    return profile.mpi


def setup_lines(profile: ClusterProfile, _site: SlurmSite | None = None) -> str:
    """Check that a shell can parse the setup lines."""
    if not profile.setup:
        raise CheckSkipped("the profile has none (setup)")
    text = "\n".join(profile.setup)
    read = subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True, timeout=30)
    if read.returncode:
        said = read.stderr.strip().splitlines()[0].removeprefix("bash: ")
        raise UserError(f"the shell cannot read them ({said}); fix setup in the profile")
    return "a shell can read them; only a node can tell if they work"


def requeueing(profile: ClusterProfile, _site: SlurmSite) -> str:
    """Check that Slurm may requeue a job that was stopped before its end."""
    for line in sbatch_options.warnings(profile):
        raise CheckWarning(line)
    return "a job that is stopped before its end goes back into the queue"


def options_in_shell(_profile: ClusterProfile, _site: SlurmSite) -> str:
    """Check that the shell has no options of sbatch, which would be ignored."""
    for line in ignored_options():
        raise CheckWarning(line)
    return "none"


def trial(queue: Queue, profile: ClusterProfile, site: SlurmSite) -> str:
    """Check that sbatch would take the jobs of `grid`, `prep`, `reduce` and `report`."""
    known_partitions(profile, site)
    single = dict.fromkeys((profile.single(), profile.reducing()))
    of_training = _trial(queue, profile.training(), 2)
    for resources in single:
        _trial(queue, resources, 1)
    return of_training


def _trial(queue: Queue, resources: Resources, num_calls: int) -> str:
    try:
        lines = queue.trial(resources, "doctor", num_calls).splitlines()
    except SlurmRefused as error:
        raise UserError(f"{error}; fix what the profile asks for") from error
    return re.sub(r"^sbatch: Job \d+ to start at \S+ ", "", lines[-1]) if lines else "it is taken"


def _or_skip(question: Callable[[], T]) -> T:
    try:
        return question()
    except (QueueUnreachable, SlurmRefused) as error:
        raise CheckSkipped(f"accounting does not answer ({error})") from error


def _associations(profile: ClusterProfile, site: SlurmSite) -> list[Row]:
    """Return the user's associations in the profile's account, or in the only one, that apply to
    its partition."""
    partitions = {"", *profile.partition.split(",")}
    accounts = {row["Account"] for row in site.associations}
    own = {profile.account} if profile.account else accounts if len(accounts) == 1 else set()
    return [
        row for row in site.associations if row["Account"] in own and row["Partition"] in partitions
    ]


def _limits(profile: ClusterProfile, site: SlurmSite, silent: bool = True) -> dict[str, Row]:
    """Return the limits of jobs, from associations, the profile's qos and its partitions' qos.

    Without accounting return {}, or raise the error if `silent` is False.
    """
    try:
        found = {f"the account {row['Account']}": row for row in _associations(profile, site)}
        named: Iterable[str] = [
            profile.qos, *(row.get("QoS", "") for row in known_partitions(profile, site))
        ]  # fmt: skip
        known = {name: site.qos[name] for name in named if name in site.qos}
    except (QueueUnreachable, SlurmRefused):
        if silent:
            return {}
        raise
    return found | {f"the qos {name}": row for name, row in known.items()}
