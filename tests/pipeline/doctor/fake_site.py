"""A fake Slurm site: scontrol, sacctmgr, srun and sbatch print files that a test writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.hpc.scheduler.test_slurm import FakeSlurm

COMMANDS = {
    "scontrol": """
        if [ -e silent ]; then echo "slurm_load: Unable to contact controller" >&2; exit 1; fi
        case "$2" in
            hostnames) tr , '\\n' <<<"$3";;
            *) cat "$2";;
        esac """,
    "sacctmgr": """
        if [ -e accounting_is_off ]; then echo "You are not running a supported plugin" >&2; exit 1
        fi
        cat "$4" """,
    "srun": "cat mpi >&2",
    "sbatch": """
        cp "${!#}" script.$(ls script.* 2>/dev/null | wc -l)
        [ "$1" = --test-only ] || { echo 7; exit; }
        if [ -e refuse ]; then cat refuse >&2; exit 1; fi
        echo "sbatch: Job 7 to start at 2026-01-01T00:00:00 using 80 processors on nodes n[1-2]" >&2
        """,
}
PARTITION = (
    "PartitionName={name} AllowGroups=ALL AllowAccounts={accounts} AllowQos=ALL Default={default} "
    "QoS=N/A MaxNodes={most} MaxTime={time} MinNodes=0 Nodes=n[1-4] State={state} TotalNodes=4\n"
)
NODE = (
    "NodeName={name} Arch=x86_64 CPUAlloc=0 CPUEfctv=40 CPUTot=40 CPULoad=0.5 "
    "AvailableFeatures=v100,skylake Gres={gres} OS=Linux 6.1 #1 SMP RealMemory=192000 "
    "State={state} Partitions={partitions} Reason=Not responding [root@2026-01-01]\n"
)
MPI = "MPI plugin types are...\n\tnone\n\tpmix\n\tpmi2\nspecific pmix versions available: pmix_v4\n"
CONFIG = "MaxArraySize            = 1001\nAccountingStorageEnforce = {}\n"

# a profile that asks for everything, and gets it
PROFILE: dict[str, Any] = {
    "kind": "slurm",
    "partition": "gpu",
    "account": "vision",
    "qos": "long",
    "constraint": "v100",
    "exclude": "n4",
    "gres": "gpu:v100:4",
    "gpus_per_node": 4,
    "nodes": 2,
    "tasks_per_node": 4,
    "cpus_per_task": 10,
    "memory_gb": 180,
    "minutes": 1200,
    "max_jobs": 100,
    "mpi": "pmi2",
    "setup": ["module load mpi"],
}


class FakeSite(FakeSlurm):
    """Two partitions of four nodes with four V100 each, of which one is excluded."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, COMMANDS)
        self.partition()
        self.node()
        self.answer("mpi", MPI)
        self.answer("config", CONFIG.format("limits,qos,associations"))
        self.answer("assoc", "vision||long,normal|200||\nteaching||normal|||\n")
        self.answer("qos", "normal||1-00:00:00|\nlong|150|2-00:00:00|gres/gpu=8,node=4\ngold|||\n")

    def partition(self, **changes: str) -> None:
        """Write the partition `gpu` with changes, and the default one."""
        usual = {"accounts": "ALL", "default": "NO", "most": "UNLIMITED", "time": "1-00:00:00",
                 "state": "UP"}  # fmt: skip
        gpu = PARTITION.format(name="gpu", **{**usual, **changes})
        self.answer("partition", gpu + PARTITION.format(name="cpu", **{**usual, "default": "YES"}))

    def node(self, **changes: str) -> None:
        """Write the nodes, the first with changes."""
        usual = {"gres": "gpu:v100:4(S:0-1)", "state": "IDLE", "partitions": "gpu,cpu"}
        rows = [{**usual, **changes}, usual, usual, usual]
        self.answer("node", "".join(NODE.format(name=f"n{i}", **r) for i, r in enumerate(rows, 1)))


def profile_file(folder: Path, **changes: object) -> Path:
    """Write `PROFILE` with changes, without keys that are None."""
    table = {**PROFILE, **changes}
    extra = table.pop("extra", {})
    lines = [f"{key} = {json.dumps(value)}\n" for key, value in table.items() if value is not None]
    more = ["[extra]\n", *(f"{key} = {json.dumps(value)}\n" for key, value in extra.items())]
    path = folder / "site.toml"
    path.write_text("".join([*lines, *more]))
    return path
