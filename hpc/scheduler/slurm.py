"""The queue on Slurm: submit through submitit, ask through Slurm's commands.

The state of all jobs comes from one squeue call. sacct, if the site has it, only adds how jobs
ended that squeue no longer shows.

A submitter may die after sbatch has taken its jobs and before their ids are recorded. Each array
therefore has its submission token as comment, by which squeue finds it. Its calls are written to
disk under that token before sbatch is called, and its batch script takes them from there.
"""

from __future__ import annotations

import shlex
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import redirect_stderr
from functools import cached_property
from io import StringIO
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import TYPE_CHECKING, Any, TypeVar

from hpc.cli import USER_ERROR_EXIT_CODE, UserError, one_line, warn
from hpc.scheduler import sbatch_options, slurm_cli
from hpc.scheduler.base import (
    DEFAULT_MAX_ARRAY_SIZE,
    JobState,
    QueueUnreachable,
    needed_job_failed,
)
from hpc.scheduler.clean_env import batch_lines, called_clean, ignored_options
from hpc.scheduler.cluster_profile import ClusterProfile, Resources
from hpc.scheduler.job import ModuleCall, rank_logs
from hpc.scheduler.slurm_cli import SlurmRefused
from hpc.storage.atomic import new_file
from hpc.storage.permissions import private_folder

if TYPE_CHECKING:
    from hpc.scheduler.submitit_executor import SlurmExecutor

_SUCCEEDED = "COMPLETED"
_ELSE_LOCAL = "; if this machine is in no cluster, add --cluster local"
_LONG_ARRAY = 100  # elements
_ELEMENT = "${SLURM_ARRAY_TASK_ID:-0}"
# submitit's name of a job
_JOB = "${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}"
T = TypeVar("T")


class SlurmQueue:
    """A `hpc.scheduler.base.Queue` on Slurm."""

    has_site = True
    starts_mpi = True
    poll_seconds = 15.0

    def __init__(
        self, profile: ClusterProfile, folder: str | Path, read_only: bool = False
    ) -> None:
        """Open the queue.

        Args:
            profile: The cluster profile.
            folder: Takes submission files and logs.
            read_only: Set `unreachable` instead of raising an error if Slurm does not answer.

        Raises:
            QueueUnreachable: Slurm is not installed here, or does not answer.
        """
        self.profile = profile
        self.folder = Path(folder).absolute()
        self.unreachable = ""
        self._warned = False
        self._read_only = read_only
        missing = [name for name in ("sbatch", "srun", "squeue") if not shutil.which(name)]
        if missing:
            self._give_up(slurm_cli.not_on_path(missing[0]))
        elif not read_only:
            self.check()

    def gone_is_certain(self, job_id: str) -> bool:
        """Return False: a node that lost its network may still run what Slurm has given up."""
        return False

    def check(self) -> None:
        """Ask the controller, unless it has answered before."""
        if not self.unreachable:
            try:
                _ = self._max_array_size
            except QueueUnreachable as error:
                self._give_up(error)

    def submit(
        self,
        calls: Sequence[ModuleCall],
        resources: Resources,
        name: str,
        after: Sequence[str] = (),
        token: str = "",
        needs: Sequence[str] = (),
    ) -> list[str]:
        """Submit the calls as one array, or as several if there are more calls than MaxArraySize.

        A single call is a plain job. If Slurm refuses an array, those sent before it are cancelled.
        """
        private_folder(self.folder, self.profile.group)
        self._warn_once()
        parameters = self._parameters(resources, name, self._dependency(after, needs))
        size = self._max_array_size if len(calls) > 1 else 1
        ids: list[str] = []
        try:
            for start in range(0, len(calls), size):
                of_array = _array_token(token, start) if token else ""
                ids += self._submit_array(calls[start : start + size], parameters, of_array)
        except UserError:
            self.cancel(ids)
            raise
        return ids

    def trial(self, resources: Resources, name: str, num_calls: int = 1) -> str:
        """Return the answer of `sbatch --test-only` to the script that `submit` would send."""
        parameters = self._parameters(resources, name, dependency="")
        executor = self._executor(parameters, _array_token("trial", 0))
        with NamedTemporaryFile("w", suffix=".sbatch", encoding="utf-8") as script:
            script.write(executor.script(num_calls))
            script.flush()
            return slurm_cli.ask("sbatch", "--test-only", script.name).strip()

    def find_by_token(self, tokens: Iterable[str]) -> dict[str, dict[int, str]]:
        """Find jobs by their comments.

        Finds nothing if the site, or the profile, gives jobs comments of its own.
        """
        found: dict[str, dict[int, str]] = {token: {} for token in tokens}
        for job_id, comment in self._if_reachable(slurm_cli.comments, dict[str, str]()).items():
            token, _, first = comment.partition("+")
            if token in found and first.isdigit():
                found[token][int(first) + int(job_id.partition("_")[2] or 0)] = job_id
        return found

    def job_states(self, ids: Iterable[str]) -> dict[str, JobState]:
        """Return the state of each job, by one squeue call."""
        ids = list(ids)
        return self._states_of(ids, self._known(ids))

    def _known(self, ids: Iterable[str]) -> dict[str, JobState]:
        """Return the jobs in the arrays of `ids` that Slurm knows; {} if it does not answer."""
        arrays = sorted({_array_of(job_id) for job_id in _of_slurm(ids)})
        return self._if_reachable(lambda: slurm_cli.job_states(arrays), {}) if arrays else {}

    def _states_of(self, ids: Iterable[str], known: dict[str, JobState]) -> dict[str, JobState]:
        other = JobState("unknown" if self.unreachable else "gone")
        return {job_id: known.get(job_id, other) for job_id in ids}

    def final_states(self, ids: Iterable[str]) -> dict[str, str]:
        """Return how jobs ended that squeue no longer shows; {} if sacct does not answer."""
        try:
            return slurm_cli.final_states(known) if (known := _of_slurm(ids)) else {}
        except (QueueUnreachable, SlurmRefused):
            return {}

    def free_slots(self) -> int | None:
        """Return the profile's `max_jobs`, or else the site's limit, less the jobs in the queue."""
        limit = self.profile.max_jobs or self._site_limit
        return None if limit is None else max(0, limit - slurm_cli.num_queued())

    def cancel(self, ids: Iterable[str]) -> None:
        """End jobs by one scancel call."""
        if known := _of_slurm(ids):
            slurm_cli.cancel(known)

    def log_files(self, job_id: str) -> list[Path]:
        """Return the stderr logs of a job; rank 0's also has what the batch script wrote."""
        return rank_logs(self.folder, job_id)

    def max_array_size(self) -> int:
        """Return the site's limit, or Slurm's default if Slurm does not answer."""
        try:
            return DEFAULT_MAX_ARRAY_SIZE if self.unreachable else self._max_array_size
        except QueueUnreachable:
            return DEFAULT_MAX_ARRAY_SIZE

    def ensure_runner(self) -> None:
        """Do nothing; Slurm needs no runner."""

    def wait_for_runner(self, seconds: float) -> None:
        """Do nothing; Slurm needs no runner."""

    def _if_reachable(self, question: Callable[[], T], otherwise: T) -> T:
        """Return the answer, or `otherwise` if a queue opened `read_only` does not answer."""
        if self.unreachable:
            return otherwise
        try:
            return question()
        except QueueUnreachable as error:
            if not self._read_only:
                raise
            self._give_up(error)
            return otherwise

    def _give_up(self, error: QueueUnreachable) -> None:
        text = f"{error}{_ELSE_LOCAL if self.profile.kind == 'auto' else ''}"
        if not self._read_only:
            raise QueueUnreachable(text) from error
        self.unreachable = text

    def _submit_array(
        self, calls: Sequence[ModuleCall], parameters: dict[str, Any], token: str
    ) -> list[str]:
        # importing submitit takes 0.2 s, so only submissions do
        from submitit.core.utils import FailedJobError, FailedSubmissionError

        executor = self._executor(parameters, token)
        if token:
            _write_calls(self.folder, token, calls)
        try:
            with called_clean(), redirect_stderr(StringIO()):  # submitit prints the error too
                jobs = executor.submit_array(calls)
        except (FailedJobError, FailedSubmissionError) as error:
            said = one_line(str(error))
            hint = "; max_jobs in the profile defers the jobs beyond it" if "limit" in said else ""
            raise UserError(f"sbatch refused the job: {said}{hint}") from error
        return [job.job_id for job in jobs]

    def _executor(self, parameters: dict[str, Any], token: str) -> SlurmExecutor:
        from hpc.scheduler.submitit_executor import SlurmExecutor

        executor = SlurmExecutor(self.folder, python=self.profile.python_command())
        find_call = _lines_to_find_call(self.folder, token) if token else []
        setup = [*batch_lines(), *find_call, *self.profile.setup_lines()]
        comment = {"comment": token} if token else {}
        executor.update_parameters(**parameters, setup=setup, **comment)
        return executor

    def _warn_once(self) -> None:
        if not self._warned:
            for line in [*sbatch_options.warnings(self.profile), *ignored_options()]:
                warn(line)
        self._warned = True

    def _parameters(self, resources: Resources, name: str, dependency: str) -> dict[str, Any]:
        profile = self.profile
        return ({"dependency": dependency} if dependency else {}) | {
            **sbatch_options.options(profile, resources, name),
            "wckey": None,  # submitit sets one otherwise
            "array_parallelism": profile.array_parallelism,
            "additional_parameters": {
                # submitit would take the signal from an environment variable
                "signal": f"USR2@{profile.lead_seconds}",
                **sbatch_options.waiting_options(dependency),
                **sbatch_options.free_options(profile),
            },
            "srun_args": sbatch_options.srun_options(profile, resources),
        }

    def _dependency(self, after: Sequence[str], needs: Sequence[str]) -> str:
        """Return sbatch's --dependency, without jobs that are gone.

        sbatch may refuse a dependency on a job that Slurm no longer knows.
        """
        known = self._known([*after, *needs])
        jobs = self._states_of([*after, *needs], known)
        gone = {job_id: jobs[job_id].why for job_id in needs if jobs[job_id].state == "gone"}
        gone |= self.final_states([job_id for job_id, word in gone.items() if not word])
        for job_id, word in gone.items():
            if word not in ("", _SUCCEEDED):
                raise needed_job_failed(job_id, word)
        kinds = {"afterok": needs, "afterany": [job_id for job_id in after if job_id not in needs]}
        alive = {
            kind: [job_id for job_id in dict.fromkeys(ids) if jobs[job_id].state != "gone"]
            for kind, ids in kinds.items()
        }
        # not for afterok, since an element outside of `needs` may have failed
        alive["afterany"] = _whole_arrays(alive["afterany"], known)
        return ",".join(f"{kind}:{':'.join(ids)}" for kind, ids in alive.items() if ids)

    @cached_property
    def _site_limit(self) -> int | None:
        return slurm_cli.submit_limit(self.profile.account, self.profile.qos)

    @cached_property
    def _max_array_size(self) -> int:
        return slurm_cli.max_array_size()


def _of_slurm(ids: Iterable[str]) -> list[str]:
    """Leave out jobs of the local queue: one such id makes squeue refuse the whole question."""
    return [job_id for job_id in ids if job_id[:1].isdecimal()]


def _array_of(job_id: str) -> str:
    return job_id.partition("_")[0]


def _whole_arrays(ids: Iterable[str], known: dict[str, JobState]) -> list[str]:
    """Name a long array in place of its elements if `ids` has all of them that have not ended.

    Slurm puts the dependency into the job's environment, where a text has 128 KiB at most.
    """
    ids = list(ids)
    left = Counter(_array_of(job_id) for job_id, job in known.items() if job.state != "gone")
    named = Counter(map(_array_of, ids))
    whole = {array for array, number in named.items() if number == left[array] >= _LONG_ARRAY}
    return list(dict.fromkeys(_array_of(i) if _array_of(i) in whole else i for i in ids))


def _array_token(token: str, first: int) -> str:
    """Return the token of an array whose first element is call number `first` of a submission."""
    return f"{token}+{first}"


def _write_calls(folder: Path, token: str, calls: Sequence[ModuleCall]) -> None:
    """Write the calls of an array into `folder`, as submitit pickles them."""
    from submitit.core.utils import DelayedSubmission  # only submissions need it

    for element, call in enumerate(calls):
        with new_file(folder / f"{token}_{element}.pkl") as path:
            DelayedSubmission(call).dump(path)


def _lines_to_find_call(folder: Path, token: str) -> list[str]:
    """Return lines of a batch script that link the written call to where submitit looks for it.

    They do nothing if submitit has moved its pickle there. If both are gone the job ends with an
    error.
    """
    where = shlex.quote(str(folder))
    refusal = "error: $pickle is gone, which says what this job does; run grid again"
    return [
        f'call="{token}_{_ELEMENT}.pkl" pickle={where}/"{_JOB}_submitted.pkl"',
        '[ -e "$pickle" ] || ln -s "$call" "$pickle" 2>/dev/null',
        f'[ -e "$pickle" ] || {{ echo "{refusal}" >&2; exit {USER_ERROR_EXIT_CODE}; }}',
    ]
