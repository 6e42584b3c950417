"""The queue where there is no Slurm: tickets in a folder, one runner, submitit's local executor.

Whoever adds a ticket makes sure that there is a runner: a process of its own, which leaves when no
job waits or runs. Killing it stops no job; the next runner carries on where it was.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from signal import SIG_DFL, SIGINT, SIGKILL, SIGTERM, signal
from typing import IO, TYPE_CHECKING, Any

from hpc.cli import UserError, argument_parser, one_line, run
from hpc.scheduler.base import (
    DEFAULT_MAX_ARRAY_SIZE,
    DEPENDENCY_FAILED,
    NO_RUNNER,
    JobState,
    Outcome,
    State,
    needed_job_failed,
)
from hpc.scheduler.clean_env import called_clean
from hpc.scheduler.cluster_profile import ClusterProfile, Resources
from hpc.scheduler.job import ModuleCall
from hpc.scheduler.local_jobs import (
    Tickets,
    choose_gpus,
    processes,
    result_of,
    send,
    standard_input,
)
from hpc.storage.atomic import read_json, write_json, write_text
from hpc.storage.locks import take_lock
from hpc.storage.permissions import private_folder, require_private

if TYPE_CHECKING:
    import submitit

_POLL_SECONDS = 0.2
_KILL_WAIT_SECONDS = 60.0  # what a cancelled job gets to save
_SHORT_SECONDS = 3.0  # how long a job may have fewer ranks than it should
_UNSUCCESSFUL = ("failed", "cancelled", DEPENDENCY_FAILED)
_NO_LIMIT_MINUTES = 60 * 24 * 365 * 10


class LocalQueue:
    """A `hpc.scheduler.base.Queue` on one machine. `folder` takes logs, `queue_folder` tickets.

    Jobs start in order, `profile.local_jobs` at a time, on one node, with no time limit, in the
    working directory of `submit` and in the environment of whoever started the runner.
    """

    has_site = False
    starts_mpi = False
    gone_is_certain = True  # the kernel holds a job's lock as long as one of its processes lives
    poll_seconds = 0.5
    unreachable = ""

    def __init__(
        self, profile: ClusterProfile, folder: str | Path, queue_folder: str | Path
    ) -> None:
        self.profile = profile
        self.folder = Path(folder).absolute()
        self.tickets = Tickets(Path(queue_folder).absolute(), profile.group)

    def submit(
        self,
        calls: Sequence[ModuleCall],
        resources: Resources,
        name: str,
        after: Sequence[str] = (),
        token: str = "",
        needs: Sequence[str] = (),
    ) -> list[str]:
        """One ticket a call, and a runner for them."""
        self.trial(resources, name, len(calls))
        private_folder(self.folder, self.profile.group)
        common = self._common_part(resources, name, after, needs)
        work = [{"module": call.module, "arguments": list(call.arguments)} for call in calls]
        with self.tickets.locked():
            self._refuse_failed(needs)
            ids = self.tickets.add([{**part, **common} for part in work], token)
        self.ensure_runner()
        return ids

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

    def sent_as(self, tokens: Iterable[str]) -> dict[str, dict[int, str]]:
        """From what the tickets say."""
        return self.tickets.sent_as(tokens)

    def look(self, ids: Iterable[str]) -> dict[str, JobState]:
        """The state of each job, from its files; of one that has ended, its outcome; and of one
        that waits, whether nobody is there to start it."""
        found = {job_id: self.tickets.look(job_id) for job_id in ids}
        waiting = [job_id for job_id, job in found.items() if job.state == "waiting"]
        if waiting and not self.tickets.has_runner():
            found |= dict.fromkeys(waiting, JobState("waiting", NO_RUNNER))
        return found

    def states(self, ids: Iterable[str]) -> dict[str, State]:
        """The same without why."""
        return {job_id: job.state for job_id, job in self.look(ids).items()}

    def remembered(self, ids: Iterable[str]) -> dict[str, str]:
        """Nothing: `look` tells all that is known."""
        return {}

    def room(self) -> None:
        """Any number of tickets may wait."""

    def cancel(self, ids: Iterable[str]) -> None:
        """End waiting jobs now, and let the runner end the running ones."""
        with self.tickets.locked():
            for job_id in ids:
                state = self.tickets.state(job_id)
                if state == "waiting":
                    self.tickets.end(job_id, "cancelled")
                elif state == "running":
                    self.tickets.path(job_id, "cancelled").touch()
        self.ensure_runner()

    def log_files(self, job_id: str) -> list[Path]:
        """The stderr logs of a job's ranks."""
        logs = (self.folder / job_id).glob("*_log.err")
        refused = self.tickets.path(job_id, "refused")  # why it could not even be started
        return [
            *sorted(logs, key=lambda log: int(log.name.split("_")[1])),
            *([refused] if refused.exists() else []),
        ]

    def ensure_runner(self) -> None:
        """Start a runner if a job waits or runs and none is there."""
        with self.tickets.locked(), self.tickets.runner_lock() as lock:
            if lock is None or not self.tickets.open_ids():
                return
            command = [sys.executable, "-m", "hpc.scheduler.local", str(self.tickets.folder)]
            with (self.tickets.folder / "runner.log").open("ab") as log:
                subprocess.Popen(
                    [*command, "--group", self.profile.group, "--lock", str(lock.fileno())],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,  # it outlives the terminal
                    pass_fds=[lock.fileno()],  # handed over locked: there is no moment without
                )

    def max_array_size(self) -> int:
        """Return Slurm's own default: scripts are for another machine."""
        return DEFAULT_MAX_ARRAY_SIZE

    def let_runner_leave(self, seconds: float) -> None:
        """Wait for the end of the runner, which ends when it finds no ticket."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            with self.tickets.runner_lock() as lock:
                if lock is not None:
                    return
            time.sleep(_POLL_SECONDS)

    def _refuse_failed(self, needs: Sequence[str]) -> None:
        for job_id in needs:
            if (outcome := self.tickets.outcome(job_id)) in _UNSUCCESSFUL:
                raise needed_job_failed(job_id, outcome)

    def _common_part(
        self, wanted: Resources, name: str, after: Sequence[str], needs: Sequence[str]
    ) -> dict[str, Any]:
        return {
            "name": name,
            "after": [*after, *needs],
            "needs": list(needs),
            "tasks": wanted.tasks_per_node,
            "gpus": wanted.gpus_per_node,
            "local_jobs": self.profile.local_jobs,
            "python": self.profile.python_command(),
            "setup": self.profile.setup_lines(),
            "working_directory": str(Path.cwd()),
            "folder": str(self.folder),
        }


class Runner:
    """Starts the tickets of one queue, and records how they end. `lock` is the runner's lock."""

    def __init__(self, tickets: Tickets, lock: IO[str]) -> None:
        self.tickets = tickets
        self._lock = lock
        self._jobs: dict[str, submitit.Job[None]] = {}
        self._stopped: dict[str, float] = {}
        self._short_since: dict[str, float] = {}

    def run(self) -> None:
        """Return when no job waits or runs, with the lock given back."""
        while self._step():
            time.sleep(_POLL_SECONDS)

    def _step(self) -> bool:
        for job in self._jobs.values():
            job.done()  # reaps the process
        with self.tickets.locked():
            states = {job_id: self.tickets.state(job_id) for job_id in self.tickets.open_ids()}
            running = [job_id for job_id in states if states[job_id] == "running"]
            for job_id in states:
                if states[job_id] == "gone":
                    self._record_end(job_id)
                elif states[job_id] == "waiting" and self._try_start(job_id, running):
                    running.append(job_id)
            for job_id in running:
                if self.tickets.path(job_id, "cancelled").exists() or self._lost_a_rank(job_id):
                    self._stop(job_id)
            if not states:
                self._lock.close()  # before `locked` ends: who adds a ticket next finds it free
        return bool(states)

    def _try_start(self, job_id: str, running: Sequence[str]) -> bool:
        try:
            ticket = self._ticket(job_id)
            if len(running) >= ticket["local_jobs"]:
                return False
            if any(self.tickets.state(before) != "gone" for before in ticket["after"]):
                return False
            needed = [self.tickets.outcome(before) for before in ticket.get("needs", ())]
            if any(outcome in _UNSUCCESSFUL for outcome in needed):
                self.tickets.end(job_id, DEPENDENCY_FAILED)
            if any(outcome not in ("succeeded", "unknown") for outcome in needed):
                return False
            taken = [gpu for other in running for gpu in self.tickets.gpus(other)]
            self._start(job_id, ticket, choose_gpus(ticket["gpus"], ticket["local_jobs"], taken))
        except (OSError, UserError) as error:
            self._refuse(job_id, error)
            return False
        return True

    def _start(self, job_id: str, ticket: dict[str, Any], gpus: list[str]) -> None:
        with self.tickets.path(job_id, "lock").open("w+") as lock:
            take_lock(lock, wait=True)
            write_json(self.tickets.path(job_id, "started"), {"gpus": gpus, "time": time.time()})
            os.chdir(ticket["working_directory"])
            folder = Path(ticket["folder"]) / job_id
            for place in (folder.parent, folder):  # pickles will lie in it
                private_folder(place, self.tickets.group)
            import submitit  # see `hpc.scheduler.slurm`: only the runner needs it

            executor = submitit.LocalExecutor(folder, python=_python_command(job_id, ticket, gpus))
            executor.update_parameters(
                tasks_per_node=ticket["tasks"], timeout_min=_NO_LIMIT_MINUTES, signal_delay_s=0
            )
            with standard_input(lock), called_clean():
                call = ModuleCall(ticket["module"], tuple(ticket["arguments"]))
                self._jobs[job_id] = executor.submit(call)

    def _refuse(self, job_id: str, error: Exception) -> None:
        text = f"error: {one_line(str(error))}\n"
        write_text(self.tickets.path(job_id, "refused"), text)
        self.tickets.end(job_id, "failed")

    def _record_end(self, job_id: str) -> None:
        self._jobs.pop(job_id, None)
        cancelled = self.tickets.path(job_id, "cancelled").exists()
        results = self._results(job_id)
        succeeded = len(results) == self._ticket(job_id)["tasks"] and set(results) == {"success"}
        outcome: Outcome = "succeeded" if succeeded else "cancelled" if cancelled else "failed"
        self.tickets.end(job_id, outcome)

    def _stop(self, job_id: str) -> None:
        """SIGTERM to the controller, which hands it to the ranks; after a while SIGKILL to all."""
        alive = processes(self.tickets.path(job_id, "lock"))
        if job_id not in self._stopped:
            self._stopped[job_id] = time.monotonic()
            send(SIGTERM, [pid for pid, parent in alive.items() if parent not in alive])
        elif time.monotonic() - self._stopped[job_id] > _KILL_WAIT_SECONDS:
            send(SIGKILL, alive)

    def _lost_a_rank(self, job_id: str) -> bool:
        """Whether a rank has failed while others go on, waiting for it perhaps for ever."""
        tasks = self._ticket(job_id)["tasks"]
        if tasks == 1:
            return False
        if not 0 < self._num_ranks(job_id) < tasks - self._results(job_id).count("success"):
            self._short_since.pop(job_id, None)
            return False
        # while the ranks are being started it looks the same, for some milliseconds
        since = self._short_since.setdefault(job_id, time.monotonic())
        return time.monotonic() - since > _SHORT_SECONDS

    def _num_ranks(self, job_id: str) -> int:
        alive = processes(self.tickets.path(job_id, "lock"))
        controllers = [pid for pid, parent in alive.items() if parent not in alive]
        return sum(parent in controllers for parent in alive.values())

    def _results(self, job_id: str) -> list[str]:
        """`success` or `error` for each rank that has left a result; killed ones leave none."""
        return [result_of(file) for file in self._folder(job_id).glob("*_result.pkl")]

    def _folder(self, job_id: str) -> Path:
        return Path(self._ticket(job_id)["folder"]) / job_id

    def _ticket(self, job_id: str) -> dict[str, Any]:
        return read_json(self.tickets.path(job_id, "json"))


def _python_command(job_id: str, ticket: dict[str, Any], gpus: Sequence[str]) -> str:
    # submitit numbers GPUs from 0 and runs `setup` in a shell that may come between it and its
    # signals, so both go before the interpreter, where each step replaces itself by the next
    words = ["env", f"LOSSGRID_JOB_ID={job_id}", f"CUDA_VISIBLE_DEVICES={','.join(gpus)}"]
    if ticket["setup"]:
        words += ["bash", "-c", "\n".join([*ticket["setup"], 'exec "$0" "$@"'])]
    return shlex.join([*words, *shlex.split(ticket["python"])])


def main(argv: Sequence[str]) -> None:
    """Run the tickets of a queue until none is left."""
    parser = argument_parser("python -m hpc.scheduler.local", main.__doc__)
    parser.add_argument("folder", type=Path, help="the folder of the tickets")
    parser.add_argument("--group", default="", help="the Unix group that shares the folder")
    parser.add_argument("--lock", type=int, help="inherited descriptor of the runner's lock")
    options = parser.parse_args(argv)
    folder = options.folder.absolute()
    require_private(folder, options.group)
    lock = os.fdopen(options.lock, "a") if options.lock else (folder / "lock").open("a")
    if not take_lock(lock):  # an inherited one is ours already, and locking it again does nothing
        raise UserError(f"the queue {folder} has a runner already")
    # processes that a script starts in the background ignore SIGINT, and so would all jobs
    signal(SIGINT, SIG_DFL)
    Runner(Tickets(folder, options.group), lock).run()


if __name__ == "__main__":
    run(main)
