"""Translate a cluster profile into options of sbatch and srun, for all writers of scripts.

The writers add `signal`, `array`, `comment` and `dependency`.
"""

from __future__ import annotations

import re
import shlex
from typing import Any

from hpc.scheduler.cluster_profile import ClusterProfile, Resources


def options(profile: ClusterProfile, resources: Resources, name: str) -> dict[str, Any]:
    """Return the options of sbatch for a job, without those that the profile leaves empty.

    Keys have underscores for dashes. `free_options` win over them.
    """
    by_gres = bool(profile.gres and resources.gpus_per_node)
    given = {
        "partition": profile.partition,
        "account": profile.account,
        "qos": profile.qos,
        "constraint": profile.constraint,
        "exclude": profile.exclude,
        "mail_user": profile.mail_user,
        "mail_type": profile.mail_type,
        "gres": profile.gres if by_gres else "",
        "gpus_per_node": 0 if by_gres else resources.gpus_per_node,
        "mem": f"{round(1024 * resources.memory_gb)}M" if resources.memory_gb else "",
    }
    return {key: value for key, value in given.items() if value} | {
        "job_name": re.sub(r"[^A-Za-z0-9._+-]+", "-", name)[:64].strip("-") or "job",
        "nodes": resources.nodes,
        "ntasks_per_node": resources.tasks_per_node,
        "cpus_per_task": resources.cpus_per_task,
        "time": resources.minutes,
    }


def free_options(profile: ClusterProfile) -> dict[str, Any]:
    """Return `extra` of the profile, and the option that says if Slurm may requeue the job.

    True is an option without a value. They win over `options`.
    """
    extra = {key: value for key, value in _extra(profile).items() if value is not False}
    return extra | ({"requeue": True} if requeues(profile) else {"no_requeue": True})


def requeues(profile: ClusterProfile) -> bool:
    """Return True if the profile lets Slurm put a job back into the queue."""
    extra = _extra(profile)
    return extra.get("requeue", True) is not False and not extra.get("no_requeue", False)


def _extra(profile: ClusterProfile) -> dict[str, Any]:
    return {key.replace("-", "_"): value for key, value in profile.extra.items()}


def warnings(profile: ClusterProfile) -> list[str]:
    """Return warnings about the options of a profile, for before jobs are submitted."""
    line = (
        "requeue is off in the profile (extra): Slurm ends a job for good at its time limit, after "
        "a preemption or with a lost node; run `grid` again to resume from its checkpoint"
    )
    return [] if requeues(profile) else [line]


def waiting_options(dependency: str) -> dict[str, Any]:
    """Return the options that end a job whose needed job failed; Slurm would keep it forever."""
    return {"kill_on_invalid_dep": "yes"} if "afterok" in dependency else {}


def srun_options(profile: ClusterProfile, resources: Resources) -> list[str]:
    """Return the options of srun for every step."""
    return [
        "--kill-on-bad-exit=1",  # other ranks would wait for a dead one forever
        f"--cpus-per-task={resources.cpus_per_task}",  # not inherited from sbatch since 22.05
        # `export` in `extra` limits the job's variables; a step needs those of the setup lines
        "--export=ALL",
        "--open-mode=append",  # a requeued job appends to its log
        *([f"--mpi={profile.mpi}"] if profile.mpi else []),
    ]


def directives(given: dict[str, Any]) -> list[str]:
    """Return the `#SBATCH` lines of options, sorted.

    Values are one line of plain text, and quoted, so that each stays one word.
    """
    words = {key.replace("_", "-"): value for key, value in given.items()}
    return [
        f"#SBATCH --{key}" + ("" if value is True else f"={shlex.quote(str(value))}")
        for key, value in sorted(words.items())
    ]
