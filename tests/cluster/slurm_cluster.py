"""The Slurm cluster of the tests: starts and ends it, and does to it what sites and people do."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.jobs import job_processes

REPOSITORY = Path(__file__).parents[2]
PROFILE = REPOSITORY / "configs/clusters/test-cluster.toml"
PYTHON = sys.executable
_PROGRAM = Path(__file__).with_name("cluster")
_NO_CLUSTER = 3  # the exit code of _PROGRAM that says so
_POLL = 0.1  # seconds
_PATIENCE = 300.0  # seconds; a busy machine takes its time to start four ranks


@dataclass(frozen=True)
class Process:
    """A process of a job on a node: `rank` is None for those that are none. A loader is a child
    of one."""

    pid: int
    rank: int | None
    is_loader: bool

    @property
    def is_alive(self) -> bool:
        """Return whether the process is more than an exit code for its parent to read."""
        return job_processes.lives(Path(f"/proc/{self.pid}"))

    def send(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)


class NoCluster(Exception):
    """This machine or this user cannot run a Slurm cluster; the message gives the reason."""


class Cluster:
    """A cluster of our own, beside any other on this machine. Run folders must lie below `runs`:
    the nodes do not share /tmp."""

    def __init__(self, nodes: int) -> None:
        """Start it. Raises `NoCluster` where that is impossible."""
        if os.geteuid() != 0:
            raise NoCluster("a Slurm cluster on one machine needs root")
        self._claim, number = _claim_number()
        self.folder = Path("/var/tmp") / f"lossgrid-cluster-{number}"
        self.runs = self.folder / "runs"
        ours = {
            "LOSSGRID_CLUSTER": str(number),
            "LOSSGRID_CLUSTER_DIR": str(self.folder),
            "LOSSGRID_CLUSTER_PYTHON": PYTHON,
        }
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "LOSSGRID_"))}
        conf = {"SLURM_CONF": str(self.folder / "slurm.conf"), "PYTHONPATH": str(REPOSITORY)}
        self.environ = {**kept, **ours, **conf}
        self._spaces = f"lg{number}-"
        if self.folder.exists():  # of a test run that was killed
            self.do("down")
            shutil.rmtree(self.folder)
        try:
            self.do("up", str(nodes))
            self._require_python(nodes)
        except BaseException:
            self.end()
            raise

    def _require_python(self, nodes: int) -> None:
        """Raise `NoCluster` if the nodes do not see this checkout and its Python: every test would
        otherwise wait in vain for its job."""
        done = self.command(
            "srun", f"--nodes={nodes}", PYTHON, "-c", "import pipeline", cwd=Path("/")
        )
        if done.returncode:
            reason = done.stderr.strip().partition("\n")[0]
            raise NoCluster(f"the nodes of the Slurm cluster cannot run {PYTHON}: {reason}")

    def end(self) -> None:
        """End it, and remove all that it and its jobs wrote."""
        self.do("down")
        shutil.rmtree(self.folder)
        self._claim.close()

    def do(self, *words: str) -> None:
        """`tests/cluster/cluster` with these words: up, down, controller stop, ..."""
        # into a file: a pipe would stay open for as long as a daemon that inherits it
        with (self.folder.parent / f"{self.folder.name}.log").open("w+") as output:
            done = subprocess.run(
                [_PROGRAM, *words], env=self.environ, stdin=subprocess.DEVNULL, stdout=output,
                stderr=subprocess.STDOUT, timeout=1800, check=False,
            )  # fmt: skip
            output.seek(0)
            text = output.read()
        Path(output.name).unlink()
        if done.returncode == _NO_CLUSTER:
            raise NoCluster(text.strip().rpartition("\n")[2].removeprefix("error: "))
        assert done.returncode == 0, text

    def fail(self, node: str) -> None:
        """Power off."""
        self.do("fail", node)

    def isolate(self, node: str) -> None:
        """Cut its network only."""
        self.do("isolate", node)

    def revive(self, node: str) -> None:
        """Power and network are back; returns when the controller says so too."""
        self.do("revive", node)

    def cut(self, node: str, other: str) -> None:
        """Cut the link between two nodes only."""
        self.do("cut", node, other)

    def join(self, node: str, other: str) -> None:
        """Join the link between two nodes again."""
        self.do("join", node, other)

    def command(
        self, *words: object, cwd: Path | None = None, **environ: str
    ) -> subprocess.CompletedProcess[str]:
        """Run a command as a user of this cluster does; whether it succeeded is the caller's to
        say."""
        return subprocess.run(
            list(map(str, words)), cwd=cwd or self.runs, env={**self.environ, **environ},
            stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=1500, check=False,
        )  # fmt: skip

    def answer(self, *words: object, **environ: str) -> str:
        """Return the output of a command that must succeed."""
        done = self.command(*words, **environ)
        assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
        return done.stdout

    def job(self, job_id: str) -> dict[str, str]:
        """Return the fields of a job that Slurm still knows: JobState, Restarts, Reason, ..."""
        text = self.answer("scontrol", "show", "job", job_id)
        return dict(re.findall(r"(\w+)=(\S*)", text))

    def state(self, job_id: str) -> str:
        """PENDING, RUNNING, COMPLETED, ..."""
        return self.job(job_id)["JobState"]

    def nodes_of(self, job_id: str) -> list[str]:
        """The names of the nodes that a job runs on."""
        listed = self.job(job_id)["NodeList"]
        return self.answer("scontrol", "show", "hostnames", listed).split()

    @staticmethod
    def jobs_of(logs: Path) -> list[str]:
        """The ids of all jobs whose logs are in a run's folder."""
        return sorted({path.name.partition("_")[0] for path in logs.glob("*_0_log.out")}, key=int)

    def sbatch(self, script: str, *options: str) -> str:
        """Submit a shell script; its job's id."""
        log = f"--output={self.runs}/sbatch-%j.log"
        return self.answer("sbatch", "--parsable", log, *options, f"--wrap={script}").strip()

    def urgent(self, nodes: Sequence[str], seconds: float = 0.0) -> str:
        """Somebody's job in the partition `urgent`, which wants the whole of some nodes."""
        options = [f"--nodes={len(nodes)}", f"--nodelist={','.join(nodes)}", "--exclusive"]
        return self.sbatch(f"sleep {seconds}", "--partition=urgent", *options)

    def processes(self, job_id: str, node: str) -> list[Process]:
        """Return the processes of a job on a node: its ranks, and all that they started."""
        own, parents = {}, {}
        for pid in self.answer("ip", "netns", "pids", self._spaces + node).split():
            try:
                environ = _variables(Path(f"/proc/{pid}/environ"))
                stat = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            except OSError:  # has ended meanwhile
                continue
            if _job_of(environ) == job_id and stat[0] != "Z":
                own[pid], parents[pid] = environ, stat[1]
        # a step's variables are those of its ranks and of all that these start
        within = {pid: environ["SLURM_PROCID"] for pid, environ in own.items() if _in_step(environ)}
        ranks = {pid: rank for pid, rank in within.items() if parents[pid] not in within}
        return [
            Process(int(pid), int(ranks[pid]) if pid in ranks else None, parents[pid] in ranks)
            for pid in own
        ]

    def ranks(self, job_id: str) -> list[Process]:
        """The ranks of a running job, over all its nodes, in order."""
        found = [p for node in self.nodes_of(job_id) for p in self.processes(job_id, node)]
        return sorted((p for p in found if p.rank is not None), key=lambda p: p.rank or 0)

    def wait_for_state(self, job_id: str, *states: str, seconds: float = _PATIENCE) -> None:
        """Until a job is in one of some states."""
        until(lambda: self.state(job_id) in states, lambda: f"{self.job(job_id)}", seconds)

    def wait_until_gone(self, *jobs: str, seconds: float = _PATIENCE) -> None:
        """Until squeue lists none of some jobs."""
        until(lambda: not self.left(jobs), lambda: f"left: {self.left(jobs)}", seconds)

    def left(self, jobs: Sequence[str]) -> list[str]:
        """A line for each of some jobs that squeue still lists."""
        lines = self.answer("squeue", "--noheader", "--format=%i %F %T %r").splitlines()
        return [line for line in lines if set(line.split()[:2]) & set(jobs)]


def until(
    condition: Callable[[], object], what: str | Callable[[], str], seconds: float = _PATIENCE
) -> None:
    """Wait until `condition()` is true, with the patience that a cluster needs."""
    # a pause between two questions, or squeue takes the processor that it waits for
    job_processes.until(lambda: condition() or time.sleep(_POLL), what, seconds)


def _claim_number() -> tuple[socket.socket, int]:
    """A number that no other test run on this machine has; 0 is what people start."""
    for number in range(1, 100):
        claim = socket.socket(socket.AF_UNIX)
        try:
            claim.bind(f"\0lossgrid-cluster-{number}")  # the kernel frees it when we end
        except OSError:
            claim.close()
            continue
        return claim, number
    raise AssertionError("99 clusters run on this machine")


def _variables(path: Path) -> dict[str, str]:
    """Variables of a process's environment."""
    pairs = (word.partition("=") for word in path.read_bytes().decode(errors="replace").split("\0"))
    return {name: value for name, _, value in pairs}


def _in_step(environ: dict[str, str]) -> bool:
    return environ.get("SLURM_STEP_ID", "").isdigit() and "SLURM_PROCID" in environ


def _job_of(environ: dict[str, str]) -> str:
    if "SLURM_ARRAY_JOB_ID" in environ:
        return f"{environ['SLURM_ARRAY_JOB_ID']}_{environ['SLURM_ARRAY_TASK_ID']}"
    return environ.get("SLURM_JOB_ID", "")
