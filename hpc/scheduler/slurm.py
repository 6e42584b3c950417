"""The queue on Slurm: submits through submitit.

States come from one squeue call, and the truth about work is in files; sacct, where there is one,
only adds how jobs have ended that squeue has forgotten.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterable, Sequence
from contextlib import redirect_stderr
from functools import cached_property
from io import StringIO
from itertools import count, groupby, takewhile
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import TYPE_CHECKING, Any, TypeVar

from hpc.account import user_name
from hpc.cli import UserError, one_line, warn
from hpc.scheduler import sbatch_options, sends
from hpc.scheduler.base import (
    DEFAULT_MAX_ARRAY_SIZE,
    JobState,
    QueueUnreachable,
    State,
    needed_job_failed,
)
from hpc.scheduler.clean_env import batch_lines, called_clean, ignored_options, slurm_environ
from hpc.scheduler.cluster_profile import ClusterProfile, Resources
from hpc.scheduler.exit_cause import NEVER_SATISFIED
from hpc.scheduler.job import ModuleCall
from hpc.storage.permissions import private_folder

if TYPE_CHECKING:
    from hpc.scheduler.submitit_executor import SlurmExecutor

_WAITING = {"PENDING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "RESV_DEL_HOLD", "SPECIAL_EXIT"}
_ENDED = {"BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY",
          "PREEMPTED", "REVOKED", "TIMEOUT"}  # fmt: skip
_SUCCEEDED = "COMPLETED"
_ANSWER_SECONDS = 60.0
_LATER = "jobs go on; run it again when Slurm answers"
_ELSE_LOCAL = "; if this machine is in no cluster, add --cluster local"
T = TypeVar("T")
_LONG_ROW = 16  # elements of an array that are cancelled as one


class SlurmQueue:
    """A `hpc.scheduler.base.Queue` on Slurm. Submission files and logs go to `folder`."""

    has_site = True
    starts_mpi = True
    gone_is_certain = False  # a node that was cut off may still run what Slurm has given up
    poll_seconds = 15.0

    def __init__(
        self, profile: ClusterProfile, folder: str | Path, read_only: bool = False
    ) -> None:
        self.profile = profile
        self.folder = Path(folder).absolute()
        self.unreachable = ""
        self._warned = False
        self._read_only = read_only
        missing = [name for name in ("sbatch", "srun", "squeue") if not shutil.which(name)]
        if missing:
            self._give_up(_no_command(missing[0]))
        elif not read_only:
            self.check()

    def check(self) -> None:
        """Ask the controller for an answer, where that was not done before."""
        if not self.unreachable:
            try:
                _ = self._max_array_size
            except QueueUnreachable as error:
                self._give_up(error)

    def _if_reachable(self, ask: Callable[[list[str]], T], words: list[str], otherwise: T) -> T:
        """Return `ask(words)`, or `otherwise` if the queue is only read and does not answer."""
        if self.unreachable:
            return otherwise
        try:
            return ask(words)
        except QueueUnreachable as error:
            if not self._read_only:
                raise
            self._give_up(error)
            return otherwise

    def _give_up(self, error: QueueUnreachable) -> None:
        """Note `error` if the queue is only read, else raise it."""
        text = f"{error}{_ELSE_LOCAL if self.profile.kind == 'auto' else ''}"
        if not self._read_only:
            raise QueueUnreachable(text) from error
        self.unreachable = text

    def submit(
        self,
        calls: Sequence[ModuleCall],
        resources: Resources,
        name: str,
        after: Sequence[str] = (),
        token: str = "",
        needs: Sequence[str] = (),
    ) -> list[str]:
        """One array (several, if it is longer than the site allows); a single call is a plain job.
        If Slurm refuses any, none is left in the queue.
        """
        private_folder(self.folder, self.profile.group)
        self._warn_once()
        dependency = self._dependency(after, needs)
        parameters = self._parameters(resources, name, dependency)
        size = self._max_array_size if len(calls) > 1 else 1
        ids: list[str] = []
        try:
            for start in range(0, len(calls), size):
                mark = sends.mark_of(token, start) if token else ""
                ids += self._submit_array(calls[start : start + size], parameters, mark)
        except UserError:
            self.cancel(ids)
            raise
        return ids

    def trial(self, resources: Resources, name: str, num_calls: int = 1) -> str:
        """Return what sbatch says that it would do with `num_calls` such jobs, from the script that
        `submit` would send. Nothing is queued. Raises `QueueUnreachable` if sbatch refuses them."""
        executor = self._executor(self._parameters(resources, name, ""), sends.mark_of("trial", 0))
        with NamedTemporaryFile("w", suffix=".sbatch", encoding="utf-8") as script:
            script.write(executor.script(num_calls))
            script.flush()
            return ask("sbatch", "--test-only", script.name).strip()

    def sent_as(self, tokens: Iterable[str]) -> dict[str, dict[int, str]]:
        """By one squeue call; nothing is found where the site, or the profile, has comments of its
        own."""
        command = ["squeue", "--noheader", "--array", "--states=all", "--me", "--format=%i %k"]
        return sends.marked(self._if_reachable(_answer, command, "").splitlines(), tokens)

    def look(self, ids: Iterable[str]) -> dict[str, JobState]:
        """The state of each job, by one squeue call."""
        ids = list(ids)
        arrays = sorted({job_id.partition("_")[0] for job_id in ids})
        none: dict[str, JobState] = {}
        seen = self._if_reachable(_squeue, arrays, none) if ids else none
        other = JobState("unknown" if self.unreachable else "gone")
        return {job_id: seen.get(job_id, other) for job_id in ids}

    def states(self, ids: Iterable[str]) -> dict[str, State]:
        """The same without why."""
        return {job_id: job.state for job_id, job in self.look(ids).items()}

    def remembered(self, ids: Iterable[str]) -> dict[str, str]:
        """The last words of jobs that squeue has forgotten, by one call of sacct; none where
        accounting is off or does not answer."""
        ids = list(ids)
        command = ["sacct", "--noheader", "--parsable2", "--allocations", "--format=JobID,State"]
        try:
            answer = _answer([*command, f"--jobs={','.join(ids)}"]) if ids else ""
        except QueueUnreachable:
            return {}
        rows = (line.split("|") for line in answer.splitlines() if line.count("|") == 1)
        words = {job_id: state.split(maxsplit=1)[0] for job_id, state in rows if state.strip()}
        return {job_id: words[job_id] for job_id in ids if words.get(job_id) in _ENDED}

    def room(self) -> int | None:
        """What the profile's `max_jobs`, or else the site's limit for this user, leaves: by one
        call of sacctmgr and one of squeue. None too where accounting is off or does not answer."""
        limit = self.profile.max_jobs or self._site_limit
        if limit is None:
            return None
        queued = _answer(["squeue", "--noheader", "--array", "--me", "--format=%i"]).split()
        return max(0, limit - len(queued))

    def cancel(self, ids: Iterable[str]) -> None:
        """Let Slurm end jobs; those that are gone are left alone."""
        if ids := list(ids):
            _answer(["scancel", "--quiet", *_in_few_words(ids)], gone_is_fine=True)

    def log_files(self, job_id: str) -> list[Path]:
        """The stderr logs of a job's ranks; rank 0's also holds what the batch script wrote."""
        from submitit.core.utils import JobPaths

        logs = (JobPaths(self.folder, job_id, rank).stderr for rank in count())
        return list(takewhile(Path.exists, logs))

    def ensure_runner(self) -> None:
        """Nothing to do: Slurm runs."""

    def _submit_array(
        self, calls: Sequence[ModuleCall], parameters: dict[str, Any], mark: str
    ) -> list[str]:
        # submitit takes 0.2 s to import, which looking at the queue need not take
        from submitit.core.utils import FailedJobError, FailedSubmissionError

        executor = self._executor(parameters, mark)
        if mark:
            sends.leave_calls(self.folder, mark, calls)
        try:
            with called_clean(), redirect_stderr(StringIO()):  # submitit prints the error too
                jobs = executor.submit_array(calls)
        except (FailedJobError, FailedSubmissionError) as error:
            said = one_line(str(error))
            hint = (
                "; max_jobs in the profile holds back what is too many" if "limit" in said else ""
            )
            raise UserError(f"sbatch refused the job: {said}{hint}") from error
        return [job.job_id for job in jobs]

    def _executor(self, parameters: dict[str, Any], mark: str) -> SlurmExecutor:
        from hpc.scheduler.submitit_executor import SlurmExecutor

        executor = SlurmExecutor(self.folder, python=self.profile.python_command())
        find_call = sends.take_call(self.folder, mark) if mark else []
        setup = [*batch_lines(), *find_call, *self.profile.setup_lines()]
        executor.update_parameters(**parameters, setup=setup, **({"comment": mark} if mark else {}))
        return executor

    def _warn_once(self) -> None:
        if not self._warned:
            for line in [*sbatch_options.warnings(self.profile), *ignored_options()]:
                warn(line)
        self._warned = True

    def _parameters(self, wanted: Resources, name: str, dependency: str) -> dict[str, Any]:
        site = self.profile
        return ({"dependency": dependency} if dependency else {}) | {
            **sbatch_options.options(site, wanted, name),
            "wckey": None,  # submitit's own
            "array_parallelism": site.array_parallelism,
            "additional_parameters": {
                # submitit takes the signal from a variable of the shell
                "signal": f"USR2@{site.lead_seconds}",
                **sbatch_options.waiting_options(dependency),
                **sbatch_options.free_options(site),
            },
            "srun_args": sbatch_options.srun_options(site, wanted),
        }

    def _dependency(self, after: Sequence[str], needs: Sequence[str]) -> str:
        """Return sbatch's --dependency. A job that is gone is left out, since sbatch may refuse a
        job that Slurm has forgotten. Raises `UserError` if one in `needs` did not succeed."""
        jobs = self.look([*after, *needs])
        gone = {job_id: jobs[job_id].why for job_id in needs if jobs[job_id].state == "gone"}
        gone |= self.remembered([job_id for job_id, word in gone.items() if not word])
        for job_id, word in gone.items():
            if word not in ("", _SUCCEEDED):
                raise needed_job_failed(job_id, word)
        kinds = {"afterok": needs, "afterany": [job_id for job_id in after if job_id not in needs]}
        alive = {
            kind: [job_id for job_id in dict.fromkeys(ids) if jobs[job_id].state != "gone"]
            for kind, ids in kinds.items()
        }
        return ",".join(f"{kind}:{':'.join(ids)}" for kind, ids in alive.items() if ids)

    @cached_property
    def _site_limit(self) -> int | None:
        """How many jobs this user may have in the queue: the least of what his associations say,
        and the quality of service that the profile names."""
        site = self.profile
        user = user_name(os.getuid())
        account = [f"account={site.account}"] if site.account else []
        questions = [["assoc", "where", f"user={user}", *account, "format=MaxSubmitJobs"]]
        if site.qos:
            questions.append(["qos", "where", f"name={site.qos}", "format=MaxSubmitPU"])
        found = []
        for question in questions:
            try:
                answer = _answer(["sacctmgr", "--noheader", "--parsable2", "show", *question])
            except QueueUnreachable:  # no accounting, no limit
                continue
            found += [int(word) for word in answer.split() if word.isdigit()]
        return min(found, default=None)

    def max_array_size(self) -> int:
        """Return what Slurm says, or its own default if it does not answer."""
        try:
            return DEFAULT_MAX_ARRAY_SIZE if self.unreachable else self._max_array_size
        except QueueUnreachable:
            return DEFAULT_MAX_ARRAY_SIZE

    def let_runner_leave(self, seconds: float) -> None:
        """Do nothing; Slurm needs no runner."""

    @cached_property
    def _max_array_size(self) -> int:
        found = re.search(r"MaxArraySize\s*=\s*(\d+)", _answer(["scontrol", "show", "config"]))
        return max(1, int(found.group(1))) if found else DEFAULT_MAX_ARRAY_SIZE


def requeue(job_id: str) -> bool:
    """Put a job back into the queue under the same id; for rank 0 of that job, which then gets
    SIGTERM, and SIGKILL some seconds later. `job_id` is `ARRAY_TASK` for an array's element: the
    raw id of its last element is the array's, and would requeue them all.

    Returns False, with nothing done, for a job that Slurm is ending already: a cancelled one would
    rise from the dead. One that is being preempted counts as running until its grace is over.
    """
    if _answer(["squeue", "--noheader", "--format=%T", f"--jobs={job_id}"]).strip() != "RUNNING":
        return False
    _answer(["scontrol", "requeue", job_id])
    return True


def _in_few_words(ids: Iterable[str]) -> list[str]:
    """`7_[0-999]` for so many elements of an array that follow each other: scancel may ask
    the controller once for each of its words."""
    words: list[str] = []
    plain: list[str] = []
    elements: dict[str, list[int]] = {}
    for job_id in ids:
        array, _, element = job_id.partition("_")
        if element.isdecimal():
            elements.setdefault(array, []).append(int(element))
        else:
            plain.append(job_id)
    for array, numbers in elements.items():
        # equal for those that follow each other
        for _, group in groupby(enumerate(sorted(numbers)), lambda pair: pair[1] - pair[0]):
            row = [number for _, number in group]
            if len(row) < _LONG_ROW:
                words += [f"{array}_{number}" for number in row]
            else:
                words.append(f"{array}_[{row[0]}-{row[-1]}]")
    return words + plain


def _squeue(job_ids: list[str]) -> dict[str, JobState]:
    command = ["squeue", "--noheader", "--array", "--states=all", "--format=%i %T %r"]
    lines = _answer([*command, f"--jobs={','.join(job_ids)}"], gone_is_fine=True).splitlines()
    rows = (line.split(maxsplit=2) for line in lines if line.strip())
    return {job_id: _job_state(word, *reason) for job_id, word, *reason in rows}


def _job_state(word: str, reason: str = "None") -> JobState:
    if word in _WAITING:
        return JobState("waiting", "" if reason == "None" else reason)
    # Slurm remembers those that have ended for some minutes
    if word in _ENDED:
        return JobState("gone", reason if reason == NEVER_SATISFIED else word)
    return JobState("running")  # one that is being cleared away too


def _answer(command: list[str], gone_is_fine: bool = False) -> str:
    """What a Slurm command prints; nothing where it fails because a job is gone and may be."""
    done = _asked(command)
    if done.returncode and not (gone_is_fine and "Invalid job id" in done.stderr):
        # the last line is what the command ended with; those before it are its attempts
        said = done.stderr.strip().rpartition("\n")[2].strip()
        said = re.sub(r"^\w+: (fatal|error): ", "", said) or f"exit status {done.returncode}"
        raise QueueUnreachable(f"{command[0]} failed: {one_line(said)}; {_LATER}")
    return done.stdout


def _no_command(name: str) -> QueueUnreachable:
    return QueueUnreachable(f"there is no {name} on PATH; use a login node of the cluster")


def ask(*command: str) -> str:
    """All that a Slurm command says that changes nothing, on both streams, as some answer on
    standard error. Raises `QueueUnreachable` where it does not answer, or refuses."""
    done = _asked(list(command))
    if done.returncode:
        said = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        raise QueueUnreachable(f"{command[0]} says: {one_line('; '.join(said[-2:]))}")
    return done.stdout + done.stderr


def _asked(command: list[str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            command, capture_output=True, text=True, timeout=_ANSWER_SECONDS, env=slurm_environ()
        )
    except FileNotFoundError as error:
        raise _no_command(command[0]) from error
    except (OSError, subprocess.TimeoutExpired) as error:
        raise QueueUnreachable(f"{command[0]} does not answer: {error}; {_LATER}") from error
