"""Read the cluster profile: the options of a site, and the resources of a job."""

from __future__ import annotations

import re
import shlex
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from hpc.cli import USER_ERROR_EXIT_CODE, UserError
from hpc.config import Settings, did_you_mean, parse, read_toml, shown, user_path

_PROFILES = Path("configs/clusters")
_MOST = 1_000_000  # upper bound of all counts
_OUR_OPTIONS = {
    "array", "dependency", "error", "job-name", "kill-on-invalid-dep", "open-mode", "output",
    "signal",
}  # fmt: skip
_OTHER_CLUSTERS = "clusters"


# For a script and for `bash -c`. Without errtrace, the trap covers the setup lines, but no command
# inside functions such as `module` and `conda`. Lines with `eval` and sourced commands are exempt,
# since they may fail on purpose.
_GUARD = (
    "setup_failed() {  # STATUS LINE",
    '    local line; line=$(sed -n "$2p" <<<"${BASH_EXECUTION_STRING:-$(<"$0")}")',
    '    [[ ${FUNCNAME[1]-} == source || " $line" == *[[:space:]]eval\\ * ]] && return',
    '    echo "error: a setup line of the cluster profile failed (exit status $1): $line" >&2',
    f"    exit {USER_ERROR_EXIT_CODE}",
    "}",
    "trap 'setup_failed $? $LINENO' ERR",
)


@dataclass(frozen=True)
class Resources:
    """The resources of one job.

    `memory_gb` is per node, None means the site's default; `minutes` is the time limit.
    """

    nodes: int = 1
    tasks_per_node: int = 1
    cpus_per_task: int = 1
    gpus_per_node: int = 0
    memory_gb: float | None = None
    minutes: int = 60


class ClusterProfile(Settings):
    """The options of a site and the resources of a job; an empty text is not passed to Slurm."""

    kind: Literal["auto", "slurm", "local"] = "auto"
    """Queue: Slurm, or the local queue. `auto` takes Slurm if `sbatch` is installed."""
    group: str = ""
    """Unix group whose members share the run directory. Empty: the run directory is private."""
    partition: str = ""
    """Option `--partition` of sbatch."""
    account: str = ""
    """Option `--account` of sbatch."""
    qos: str = ""
    """Option `--qos` of sbatch."""
    constraint: str = ""
    """Option `--constraint` of sbatch: a feature that the nodes must have."""
    exclude: str = ""
    """Option `--exclude` of sbatch: nodes to avoid."""
    gres: str = ""
    """GPUs as the site names them (`gpu:v100:4`), in place of `--gpus-per-node`; also set
    `gpus_per_node`, their number."""
    mail_user: str = ""
    """Option `--mail-user` of sbatch."""
    mail_type: str = ""
    """Option `--mail-type` of sbatch."""
    extra: dict[str, str | int | bool] = Field({})
    """Any other options of sbatch, without dashes; `true` is an option without a value."""

    nodes: int = Field(1, ge=1, le=_MOST)
    """Nodes of one training job. Unit: nodes."""
    tasks_per_node: int = Field(1, ge=1, le=1024)
    """Ranks per node of a training job; a rank drives one GPU. Unit: ranks."""
    cpus_per_task: int = Field(1, ge=1, le=_MOST)
    """CPUs of one rank and its loader processes. Unit: CPUs."""
    gpus_per_node: int = Field(0, ge=0, le=1024)
    """GPUs per node of a training job. Unit: GPUs."""
    gpu_memory_gb: float = Field(16.0, gt=0)
    """Memory of one GPU, for estimates and `cells_per_job = "fit"`. Unit: GB."""
    memory_gb: float | None = Field(None, gt=0)
    """Memory per node. Not given: the default of the site. Unit: GiB."""
    minutes: int = Field(60, ge=1, le=60 * 24 * 3650)
    """Time limit of a job. Unit: minutes."""
    lead_seconds: int = Field(120, ge=0, le=65535)
    """Time between the signal USR2, at which a job saves, and the time limit. Unit: seconds."""
    array_parallelism: int = Field(256, ge=1, le=_MOST)
    """Jobs of one array that run at the same time. Unit: jobs."""
    max_jobs: int = Field(0, ge=0, le=_MOST)
    """Jobs that the user may have in the queue; 0 asks the accounting of the site. Unit: jobs."""
    cells_per_job: Annotated[int, Field(ge=0, le=_MOST)] | Literal["fit"] = 0
    """Units of work in one job; 0: all that belong together; `"fit"`: as many as GPU memory and
    time limit allow."""

    reduce_nodes: int = Field(1, ge=1, le=_MOST)
    """Nodes of a `reduce` job; more than one needs `mpi`. Unit: nodes."""
    reduce_tasks_per_node: int = Field(1, ge=1, le=1024)
    """Ranks per node of a `reduce` job; more than one needs `mpi`. Unit: ranks."""

    setup: tuple[str, ...] = ()
    """Shell lines before a job (`module load`, `conda activate`, `export`). A line that fails ends
    the job; lines with `eval` and sourced commands are exempt."""
    python: str = ""
    """Command that starts Python on a node. Empty: the interpreter that submits."""
    mpi: str = ""
    """Option `--mpi` of srun (`pmi2`, `pmix`). Empty: the default of the site."""
    node_local: str = ""
    """Folder on a disk of the node itself, such as `$TMPDIR`; data are copied there once."""
    network_interface: str = ""
    """Network interface for NCCL and gloo (`ib0`). Empty: they choose."""
    local_jobs: int = Field(1, ge=1, le=1024)
    """Jobs that the local queue runs at the same time. Unit: jobs."""

    @field_validator("*")
    @classmethod
    def _require_one_line(cls, value: Any) -> Any:
        # a line break would end the `#SBATCH` line and start a command
        if isinstance(value, str) and not value.isprintable():
            raise ValueError("must be one line of plain text")
        return value

    @field_validator("node_local")
    @classmethod
    def _is_absolute(cls, value: str) -> str:
        if value and not value.startswith(("/", "$")):
            raise ValueError("must be an absolute path on the nodes, or begin with a variable")
        return value

    @field_validator("python")
    @classmethod
    def _is_a_command(cls, value: str) -> str:
        shlex.split(value)  # ValueError if a quote is not closed
        return value

    @field_validator("extra")
    @classmethod
    def _free_options(cls, extra: dict[str, str | int | bool]) -> dict[str, str | int | bool]:
        for key, value in extra.items():
            if not re.fullmatch(r"[a-z][a-z0-9_-]*", key):
                raise ValueError(f"{key!r} is not an sbatch option; write it without dashes")
            # sbatch accepts the start of an option's name
            if any(option.startswith(key.replace("_", "-")) for option in _OUR_OPTIONS):
                raise ValueError(f"{key!r} is set by us and cannot be given")
            if _OTHER_CLUSTERS.startswith(key):
                raise ValueError(
                    f"{key!r} cannot be given: jobs are looked for on the cluster of the login "
                    "node; submit on a login node of the other cluster"
                )
            if not str(value).isprintable():
                raise ValueError(f"{key!r} must be one line of plain text")
        return extra

    @model_validator(mode="after")
    def _fits_together(self) -> ClusterProfile:
        if self.lead_seconds >= 60 * self.minutes:
            raise ValueError("lead_seconds must be less than the time limit (minutes)")
        if self.gres and not self.gpus_per_node:
            raise ValueError("gres needs gpus_per_node, the number of GPUs that it means")
        if 0 < self.gpus_per_node < self.tasks_per_node:
            raise ValueError(
                f"tasks_per_node = {self.tasks_per_node} ranks need a GPU each; set gpus_per_node "
                "to as many, or to 0 for CPUs"
            )
        by_mpi = self.kind != "local" and self.reduce_nodes * self.reduce_tasks_per_node > 1
        if by_mpi and not self.mpi:
            raise ValueError(
                "reduce_nodes and reduce_tasks_per_node need mpi, srun's plugin for the MPI that "
                "mpi4py uses: see `srun --mpi=list`"
            )
        return self

    def training(self) -> Resources:
        """Return the resources of a training job."""
        return Resources(
            nodes=self.nodes,
            tasks_per_node=self.tasks_per_node,
            cpus_per_task=self.cpus_per_task,
            gpus_per_node=self.gpus_per_node,
            memory_gb=self.memory_gb,
            minutes=self.minutes,
        )

    def single(self) -> Resources:
        """Return the resources of a job with one task and no GPU."""
        return Resources(
            cpus_per_task=self.cpus_per_task, memory_gb=self.memory_gb, minutes=self.minutes
        )

    def reducing(self) -> Resources:
        """Return the resources of an MPI job without GPUs."""
        return replace(
            self.single(), nodes=self.reduce_nodes, tasks_per_node=self.reduce_tasks_per_node
        )

    def python_command(self) -> str:
        """Return the command that starts Python in a job, quoted for a shell."""
        # quoted, so that the shell expands nothing, as in the local queue
        return shlex.join(shlex.split(self.python) or [sys.executable])

    def setup_lines(self) -> list[str]:
        """Return the shell lines before a job.

        A line of `setup` that fails ends the shell with an error that names the line. Lines with
        `eval` and sourced commands are exempt.
        """
        lines = [*_GUARD, *self.setup, "trap - ERR"] if self.setup else []
        if not self.network_interface:
            return lines
        name = shlex.quote(self.network_interface)
        return [*lines, f"export NCCL_SOCKET_IFNAME={name} GLOO_SOCKET_IFNAME={name}"]


def read_profile(name: str | None, near: Path | None = None) -> ClusterProfile:
    """Return a cluster profile.

    Args:
        name: A path, or the name of configs/clusters/NAME.toml in the working directory, or of
            clusters/NAME.toml or NAME.toml in `near`. None means the defaults.
        near: The folder of the grid file.

    Raises:
        UserError: The profile does not exist, with the nearest names, or is not valid.
    """
    if not name:
        return parse(ClusterProfile, {}, "[cluster]")
    path = _profile_path(name, near)
    return parse(ClusterProfile, read_toml(path), str(path))


def _profile_path(name: str, near: Path | None) -> Path:
    user_path(f"{name}.toml", "the cluster profile")
    if name.endswith(".toml") or "/" in name:
        paths = [Path(name), *([near / name] if near else [])]
        return next((path for path in paths if path.exists()), paths[0])
    folders = [_PROFILES, *([near / "clusters", near] if near else [])]
    found = [folder / f"{name}.toml" for folder in folders if (folder / f"{name}.toml").is_file()]
    if not found:
        valid = {path.stem for folder in folders[:2] for path in folder.glob("*.toml")}
        raise UserError(f"there is no cluster profile {shown(name)}; {did_you_mean(name, valid)}")
    return found[0]
