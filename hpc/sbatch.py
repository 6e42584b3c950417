"""A cluster profile in the words of sbatch and srun: the one translation, whoever writes the
script."""

from __future__ import annotations

import re
import shlex
from typing import Any

from hpc.profile import ClusterProfile, Resources


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
    """`--requeue`, and what the profile gives beside its own keys; True is a bare flag. They win
    over `options`."""
    extra = {key: value for key, value in site.extra.items() if value is not False}
    return {"requeue": True, **extra}


def waiting_options(dependency: str) -> dict[str, Any]:
    """Return the options that end a job whose needed job failed. Slurm keeps it for ever without
    them."""
    return {"kill_on_invalid_dep": "yes"} if "afterok" in dependency else {}


def srun_options(site: ClusterProfile, wanted: Resources) -> list[str]:
    """What srun is told for every step of ours."""
    return [
        "--kill-on-bad-exit=1",  # ranks that wait for a dead one must not wait for ever
        f"--cpus-per-task={wanted.cpus_per_task}",  # not inherited from sbatch since 22.05
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
