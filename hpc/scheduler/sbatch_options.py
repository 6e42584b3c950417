"""A cluster profile in the words of sbatch and srun: the one translation, whoever writes the
script."""

from __future__ import annotations

import re
import shlex
from typing import Any

from hpc.scheduler.cluster_profile import ClusterProfile, Resources


def options(site: ClusterProfile, wanted: Resources, name: str) -> dict[str, Any]:
    """The options of sbatch for a job of ours, with underscores for dashes; what the profile leaves
    empty is left out. `free_options` come on top."""
    by_gres = bool(site.gres and wanted.gpus_per_node)
    given = {
        "partition": site.partition,
        "account": site.account,
        "qos": site.qos,
        "constraint": site.constraint,
        "exclude": site.exclude,
        "mail_user": site.mail_user,
        "mail_type": site.mail_type,
        "gres": site.gres if by_gres else "",
        "gpus_per_node": 0 if by_gres else wanted.gpus_per_node,
        "mem": f"{round(1024 * wanted.memory_gb)}M" if wanted.memory_gb else "",
    }
    return {key: value for key, value in given.items() if value} | {
        "job_name": re.sub(r"[^A-Za-z0-9._+-]+", "-", name)[:64].strip("-") or "job",
        "nodes": wanted.nodes,
        "ntasks_per_node": wanted.tasks_per_node,
        "cpus_per_task": wanted.cpus_per_task,
        "time": wanted.minutes,
    }


def free_options(site: ClusterProfile) -> dict[str, Any]:
    """Return `extra` of the profile, in which True is a bare flag, and whether Slurm may requeue
    the job. They win over `options`."""
    extra = {key.replace("-", "_"): v for key, v in site.extra.items() if v is not False}
    return extra | ({"requeue": True} if requeues(site) else {"no_requeue": True})


def requeues(site: ClusterProfile) -> bool:
    """Whether the profile lets Slurm put a job back into the queue."""
    extra = {key.replace("-", "_"): value for key, value in site.extra.items()}
    return extra.get("requeue", True) is not False and not extra.get("no_requeue", False)


def warnings(site: ClusterProfile) -> list[str]:
    """Return what the user should know about the options of a profile before jobs are sent."""
    line = (
        "requeue is off in the profile (extra): Slurm ends a job for good at its time limit, after "
        "a preemption or with a lost node; run `grid` again to resume from its checkpoint"
    )
    return [] if requeues(site) else [line]


def waiting_options(dependency: str) -> dict[str, Any]:
    """Return the options that end a job whose needed job failed. Slurm keeps it for ever without
    them."""
    return {"kill_on_invalid_dep": "yes"} if "afterok" in dependency else {}


def srun_options(site: ClusterProfile, wanted: Resources) -> list[str]:
    """What srun is told for every step of ours."""
    return [
        "--kill-on-bad-exit=1",  # ranks that wait for a dead one must not wait for ever
        f"--cpus-per-task={wanted.cpus_per_task}",  # not inherited from sbatch since 22.05
        # `export` in `extra` is for the job: a step takes all that the set-up lines have made
        "--export=ALL",
        "--open-mode=append",  # a requeued job goes on in the same log
        *([f"--mpi={site.mpi}"] if site.mpi else []),
    ]


def directives(given: dict[str, Any]) -> list[str]:
    """The `#SBATCH` lines of options, sorted. A value is one line of plain text, and stays one word
    whatever is in it."""
    words = {key.replace("_", "-"): value for key, value in given.items()}
    return [
        f"#SBATCH --{key}" + ("" if value is True else f"={shlex.quote(str(value))}")
        for key, value in sorted(words.items())
    ]
