"""The queue where there is no Slurm: job files in a folder, started by one runner process.

Each process that adds a job makes sure that a runner exists. The runner starts jobs through
submitit's local executor, and ends when no job waits or runs. Killing it stops no job; the next
runner takes over.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from signal import SIG_DFL, SIGINT, SIGKILL, SIGTERM, signal
from typing import IO, TYPE_CHECKING, Any

from hpc.cli import UserError, argument_parser, one_line, run
from hpc.scheduler.base import (
    DEFAULT_MAX_ARRAY_SIZE,
    DEPENDENCY_FAILED,
    NO_RUNNER,
    JobState,
    needed_job_failed,
)
from hpc.scheduler.clean_env import called_clean, visible_gpus
from hpc.scheduler.cluster_profile import ClusterProfile, Resources
from hpc.scheduler.job import ModuleCall, rank_logs
from hpc.scheduler.local_jobs import (
    LocalJobs,
    choose_gpus,
    is_local,
    processes,
    result_of,
    send,
    standard_input,
)
from hpc.storage.atomic import write_json, write_text
from hpc.storage.locks import take_lock
from hpc.storage.permissions import private_folder, require_private

if TYPE_CHECKING:
    import submitit

_POLL_SECONDS = 0.2
_KILL_WAIT_SECONDS = 60.0  # time of a cancelled job to save
_SHORT_SECONDS = 3.0  # a job with too few live ranks for this long is stopped
_UNSUCCESSFUL = ("failed", "cancelled", DEPENDENCY_FAILED)
_NO_LIMIT_MINUTES = 60 * 24 * 365 * 10


class LocalQueue:
    """A `hpc.scheduler.base.Queue` on one machine.

    Jobs start in order of submission, except those that wait for others. `profile.local_jobs` run
    at a time, without a time limit. They run in the directory where `submit` was called, and in the
    environment of the process that started the runner.
    """

    has_site = False
    starts_mpi = False
    poll_seconds = 0.5
    unreachable = ""

    def __init__(
        self, profile: ClusterProfile, folder: str | Path, queue_folder: str | Path
    ) -> None:
        """Open the queue.

        Args:
            profile: The cluster profile.
            folder: Takes logs.
            queue_folder: Takes job files.
        """
        self.profile = profile
        self.folder = Path(folder).absolute()
        self.jobs = LocalJobs(Path(queue_folder).absolute(), profile.group)

    def submit(
        self,
        calls: Sequence[ModuleCall],
        resources: Resources,
        name: str,
        after: Sequence[str] = (),
        token: str = "",
        needs: Sequence[str] = (),
    ) -> list[str]:
        """Write one local job per call, and make sure that a runner exists."""
        self.trial(resources, name, len(calls))
        private_folder(self.folder, self.profile.group)
        common = self._common_part(resources, name, after, needs)
        work = [{"module": call.module, "arguments": list(call.arguments)} for call in calls]
        with self.jobs.locked():
            self._refuse_failed(needs)
            ids = self.jobs.add([{**part, **common} for part in work], token)
        self.ensure_runner()
        return ids

    def gone_is_certain(self, job_id: str) -> bool:
        """Return True for a job of this queue, and for "", which is no job.

        The kernel holds a job's lock as long as one of its processes lives.
        """
        return not job_id or is_local(job_id)

    def check(self) -> None:
        """Do nothing; files always answer."""

    def trial(self, resources: Resources, name: str, num_calls: int = 1) -> str:
        """Refuse jobs of more than one node."""
        if resources.nodes > 1:
            raise UserError(
                f"the local queue has one node, the profile asks for {resources.nodes};"
                " set nodes = 1 in [cluster], or submit where there is Slurm"
            )
        at_once = self.profile.local_jobs
        return f"jobs run on this machine, {at_once} at a time; Slurm is not asked"

    def find_by_token(self, tokens: Iterable[str]) -> dict[str, dict[int, str]]:
        """Find jobs by the token in their files."""
        return self.jobs.find_by_token(tokens)

    def job_states(self, ids: Iterable[str]) -> dict[str, JobState]:
        """Return the state of each job, from its files."""
        found = {job_id: self.jobs.job_state(job_id) for job_id in ids}
        waiting = [job_id for job_id, job in found.items() if job.state == "waiting"]
        if waiting and not self.jobs.has_runner():
            found |= dict.fromkeys(waiting, JobState("waiting", NO_RUNNER))
        return found

    def final_states(self, ids: Iterable[str]) -> dict[str, str]:
        """Return nothing; `job_states` tells all that is known."""
        return {}

    def free_slots(self) -> None:
        """Return None; any number of jobs may wait."""

    def cancel(self, ids: Iterable[str]) -> None:
        """End waiting jobs now, and let the runner end the running ones."""
        with self.jobs.locked():
            for job_id in ids:
                state = self.jobs.state(job_id)
                if state == "waiting":
                    self.jobs.end(job_id, "cancelled")
                elif state == "running":
                    self.jobs.path(job_id, "cancelled").touch()
        self.ensure_runner()

    def log_files(self, job_id: str) -> list[Path]:
        """Return the stderr logs of a job, with the file that says why it could not be started."""
        refused = self.jobs.path(job_id, "refused")
        return [*rank_logs(self.folder, job_id), *([refused] if refused.exists() else [])]

    def ensure_runner(self) -> None:
        """Start a runner if a job waits or runs and no runner exists."""
        with self.jobs.locked(), self.jobs.runner_lock() as lock:
            if lock is None or not self.jobs.open_ids():
                return
            command = [sys.executable, "-m", "hpc.scheduler.local", str(self.jobs.folder)]
            with (self.jobs.folder / "runner.log").open("ab") as log:
                subprocess.Popen(
                    [*command, "--group", self.profile.group, "--lock", str(lock.fileno())],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,  # it outlives the terminal
                    pass_fds=[lock.fileno()],  # handed over locked, so that no second one starts
                )

    def max_array_size(self) -> int:
        """Return Slurm's default, since batch scripts written here are for another machine."""
        return DEFAULT_MAX_ARRAY_SIZE

    def wait_for_runner(self, seconds: float) -> None:
        """Wait for the end of the runner, which ends when no job waits or runs."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            with self.jobs.runner_lock() as lock:
                if lock is not None:
                    return
            time.sleep(_POLL_SECONDS)

    def _refuse_failed(self, needs: Sequence[str]) -> None:
        for job_id in needs:
            if (outcome := self.jobs.outcome(job_id)) in _UNSUCCESSFUL:
                raise needed_job_failed(job_id, outcome)

    def _common_part(
        self, resources: Resources, name: str, after: Sequence[str], needs: Sequence[str]
    ) -> dict[str, Any]:
        return {
            "name": name,
            "after": [*after, *needs],
            "needs": list(needs),
            "tasks": resources.tasks_per_node,
            "gpus": resources.gpus_per_node,
            "local_jobs": self.profile.local_jobs,
            "python": self.profile.python_command(),
            "setup": self.profile.setup_lines(),
            "working_directory": str(Path.cwd()),
            "folder": str(self.folder),
        }


class Runner:
    """Starts the jobs of one queue and records their outcomes."""

    def __init__(
        self, jobs: LocalJobs, lock: IO[str], visible_gpus: Sequence[str] | None = None
    ) -> None:
        """Prepare to run jobs.

        Args:
            jobs: The job files.
            lock: The runner's lock, held by this process.
            visible_gpus: The GPUs that jobs may use; None: as many as they ask for, from 0 on.
        """
        self.jobs = jobs
        self._lock = lock
        self._visible_gpus = visible_gpus
        self._processes: dict[str, submitit.Job[None]] = {}
        self._stopped: dict[str, float] = {}
        self._short_since: dict[str, float] = {}

    def run(self) -> None:
        """Run until no job waits or runs; then free the lock."""
        while self._step():
            time.sleep(_POLL_SECONDS)

    def _step(self) -> bool:
        for job in self._processes.values():
            job.done()  # reaps the process
        with self.jobs.locked():
            states = {job_id: self.jobs.state(job_id) for job_id in self.jobs.open_ids()}
            running = [job_id for job_id in states if states[job_id] == "running"]
            for job_id in states:
                if states[job_id] == "gone":
                    self._record_end(job_id)
                elif states[job_id] == "waiting" and self._try_start(job_id, running):
                    running.append(job_id)
            for job_id in running:
                if self.jobs.path(job_id, "cancelled").exists() or self._lost_a_rank(job_id):
                    self._stop(job_id)
            if not states:
                self._lock.close()  # while `locked`, so that whoever adds a job next finds it free
        return bool(states)

    def _try_start(self, job_id: str, running: Sequence[str]) -> bool:
        try:
            job = self.jobs.read(job_id)
            if len(running) >= job["local_jobs"]:
                return False
            if any(self.jobs.state(before) != "gone" for before in job["after"]):
                return False
            needed = [self.jobs.outcome(before) for before in job["needs"]]
            if any(outcome in _UNSUCCESSFUL for outcome in needed):
                self.jobs.end(job_id, DEPENDENCY_FAILED)
            if any(outcome not in ("succeeded", "unknown") for outcome in needed):
                return False
            self._start(job_id, job, self._free_gpus(job, running))
        except (OSError, UserError, KeyError) as error:
            self._refuse(job_id, error)
            return False
        return True

    def _free_gpus(self, job: dict[str, Any], running: Sequence[str]) -> list[str]:
        taken = [gpu for other in running for gpu in self.jobs.gpus(other)]
        numbered = [str(number) for number in range(job["gpus"] * job["local_jobs"])]
        visible = numbered if self._visible_gpus is None else self._visible_gpus
        return choose_gpus(job["gpus"], visible, taken)

    def _start(self, job_id: str, job: dict[str, Any], gpus: list[str]) -> None:
        with self.jobs.path(job_id, "lock").open("w+") as lock:
            take_lock(lock, wait=True)
            write_json(self.jobs.path(job_id, "started"), {"gpus": gpus, "time": time.time()})
            os.chdir(job["working_directory"])
            folder = Path(job["folder"]) / job_id
            for private in (folder.parent, folder):  # private, since submitit pickles into it
                private_folder(private, self.jobs.group)
            import submitit  # takes 0.2 s, and only the runner needs it

            executor = submitit.LocalExecutor(folder, python=_python_command(job_id, job, gpus))
            executor.update_parameters(
                tasks_per_node=job["tasks"], timeout_min=_NO_LIMIT_MINUTES, signal_delay_s=0
            )
            with standard_input(lock), called_clean():
                call = ModuleCall(job["module"], tuple(job["arguments"]))
                self._processes[job_id] = executor.submit(call)

    def _refuse(self, job_id: str, error: Exception) -> None:
        damage = f"the job file of {job_id} has no key {error}"
        said = damage if isinstance(error, KeyError) else one_line(str(error))
        write_text(self.jobs.path(job_id, "refused"), f"error: {said}\n")
        self.jobs.end(job_id, "failed")

    def _record_end(self, job_id: str) -> None:
        self._processes.pop(job_id, None)
        if self.jobs.path(job_id, "cancelled").exists():  # even if it ended well
            return self.jobs.end(job_id, "cancelled")
        try:
            tasks, results = self.jobs.read(job_id)["tasks"], self._results(job_id)
        except (OSError, UserError, KeyError) as error:
            return self._refuse(job_id, error)
        succeeded = len(results) == tasks and set(results) == {"success"}
        return self.jobs.end(job_id, "succeeded" if succeeded else "failed")

    def _stop(self, job_id: str) -> None:
        """Send SIGTERM to the controller, which passes it to the ranks; later SIGKILL to all."""
        alive = processes(self.jobs.path(job_id, "lock"))
        if job_id not in self._stopped:
            self._stopped[job_id] = time.monotonic()
            send(SIGTERM, _controllers(alive))
        elif time.monotonic() - self._stopped[job_id] > _KILL_WAIT_SECONDS:
            send(SIGKILL, alive)

    def _lost_a_rank(self, job_id: str) -> bool:
        """Return True if a rank has failed while others run, which may wait for it forever."""
        if not self._is_short(job_id):
            self._short_since.pop(job_id, None)
            return False
        # a job whose ranks are being started looks the same for some milliseconds
        since = self._short_since.setdefault(job_id, time.monotonic())
        return time.monotonic() - since > _SHORT_SECONDS

    def _is_short(self, job_id: str) -> bool:
        """Return True if fewer ranks live than should; False if the job file is damaged."""
        with suppress(OSError, UserError, KeyError):  # `_record_end` reports the damage
            tasks = self.jobs.read(job_id)["tasks"]
            missing = tasks - self._results(job_id).count("success")
            return tasks > 1 and 0 < self._num_ranks(job_id) < missing
        return False

    def _num_ranks(self, job_id: str) -> int:
        alive = processes(self.jobs.path(job_id, "lock"))
        controllers = _controllers(alive)
        return sum(parent in controllers for parent in alive.values())

    def _results(self, job_id: str) -> list[str]:
        """Return `success` or `error` per rank; a killed rank leaves no result."""
        return [result_of(file) for file in self._folder(job_id).glob("*_result.pkl")]

    def _folder(self, job_id: str) -> Path:
        return Path(self.jobs.read(job_id)["folder"]) / job_id


def _controllers(alive: Mapping[int, int]) -> list[int]:
    """Return the processes of a job whose parent is outside of it: submitit's controller."""
    return [pid for pid, parent in alive.items() if parent not in alive]


def _python_command(job_id: str, job: dict[str, Any], gpus: Sequence[str]) -> str:
    # submitit numbers GPUs from 0, and its shell for `setup` may keep signals from the job. So both
    # are set here, before the interpreter, by commands that `exec` the next one.
    words = ["env", f"LOSSGRID_JOB_ID={job_id}", f"CUDA_VISIBLE_DEVICES={','.join(gpus)}"]
    if job["setup"]:
        words += ["bash", "-c", "\n".join([*job["setup"], 'exec "$0" "$@"'])]
    return shlex.join([*words, *shlex.split(job["python"])])


def main(argv: Sequence[str]) -> None:
    """Run the jobs of a local queue until none waits or runs."""
    parser = argument_parser("python -m hpc.scheduler.local", main.__doc__)
    parser.add_argument("folder", type=Path, help="the folder of the job files")
    parser.add_argument("--group", default="", help="the Unix group that shares the folder")
    parser.add_argument("--lock", type=int, help="inherited descriptor of the runner's lock")
    options = parser.parse_args(argv)
    folder = options.folder.absolute()
    require_private(folder, options.group)
    lock = os.fdopen(options.lock, "a") if options.lock else (folder / "lock").open("a")
    if not take_lock(lock):  # an inherited lock is ours already; taking it again does nothing
        raise UserError(f"the queue {folder} has a runner already")
    # a process started in the background by a script ignores SIGINT, and all jobs would inherit it
    signal(SIGINT, SIG_DFL)
    Runner(LocalJobs(folder, options.group), lock, visible_gpus()).run()


if __name__ == "__main__":
    run(main)
