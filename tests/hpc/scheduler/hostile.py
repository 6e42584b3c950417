"""Leftover variables of a shell: options of Slurm's commands, of a surrounding `salloc` and of a
launcher. None may change where or how a job runs."""

OPTIONS = {
    "SBATCH_PARTITION": "urgent", "SBATCH_TIMELIMIT": "1", "SBATCH_MEM_PER_NODE": "10",
    "SBATCH_EXPORT": "NONE", "SBATCH_OUTPUT": "/nowhere/%j", "SBATCH_CLUSTERS": "nowhere",
    "SALLOC_PARTITION": "urgent", "SRUN_EXPORT_ENV": "NONE", "SRUN_CPUS_PER_TASK": "3",
    "SQUEUE_STATES": "RUNNING", "SQUEUE_FORMAT": "%T", "SACCT_FORMAT": "User",
    "SCANCEL_INTERACTIVE": "1", "SCONTROL_ALL": "1", "SINFO_FORMAT": "%P",
}  # fmt: skip
SALLOC = {
    "SLURM_JOB_ID": "999999", "SLURM_CLUSTERS": "nowhere", "SLURM_MEM_PER_CPU": "5",
    "SLURM_CPUS_PER_TASK": "6", "SLURM_NTASKS": "7", "SLURM_TIMELIMIT": "1",
    "SLURM_EXPORT_ENV": "NONE", "SLURMD_NODENAME": "login",
}  # fmt: skip
LAUNCHER = {
    "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "10.255.255.1",
    "MASTER_PORT": "1", "TORCHELASTIC_RUN_ID": "left", "SUBMITIT_EXECUTOR": "local",
    "SUBMITIT_PREEMPT_SIGNAL": "USR1", "OMPI_COMM_WORLD_SIZE": "3", "PMI_SIZE": "3",
    "PMI_RANK": "2", "PMIX_RANK": "2",
}  # fmt: skip
HOSTILE = {**OPTIONS, **SALLOC, **LAUNCHER}
# what sbatch itself, sent by hand from such a shell, hands to a batch script
HANDED_ON = {name: HOSTILE[name] for name in ("SRUN_EXPORT_ENV", "SLURM_MEM_PER_CPU", *LAUNCHER)}
