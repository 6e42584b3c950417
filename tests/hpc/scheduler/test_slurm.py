"""The Slurm queue, with only Slurm's commands faked: scripts on PATH that record their arguments,
and an srun that runs its command."""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from hpc.cli import UserError
from hpc.config import parse
from hpc.scheduler import slurm_cli
from hpc.scheduler.auto import jobs_at_once, open_queue
from hpc.scheduler.base import JobState, QueueUnreachable
from hpc.scheduler.cluster_profile import ClusterProfile, Resources, read_profile
from hpc.scheduler.exit_cause import exit_cause
from hpc.scheduler.job import ModuleCall, last_error
from hpc.scheduler.local import LocalQueue
from hpc.scheduler.slurm import SlurmQueue
from hpc.scheduler.slurm_cli import SlurmRefused, requeue
from tests.hpc.scheduler.hostile import HANDED_ON, HOSTILE
from tests.hpc.scheduler.test_local import states

COMMANDS = {
    "sbatch": """
        if [ -s refuse ]; then echo "sbatch: error: $(cat refuse)" >&2; exit 1; fi
        if [ -e refuse ]; then echo "sbatch: error: invalid partition" >&2; exit 1; fi
        number=$(($(cat number 2>/dev/null || echo 0) + 1)); echo $number >number
        cp "${!#}" script.$number
        if [ -e answer ]; then sed "s/NUMBER/$number/" answer; else echo $number; fi """,
    "squeue": """
        if [ -e error ]; then cat error >&2; exit 1; fi
        cat queue 2>/dev/null || true """,
    "scontrol": """
        echo "MaxArraySize            = $(cat max_array_size 2>/dev/null || echo 1001)" """,
    "scancel": "",
    "sacct": """
        if [ -e accounting_is_off ]; then echo "Slurm accounting storage is disabled" >&2; exit 1
        fi
        cat accounting 2>/dev/null || true """,
    "sacctmgr": """
        if [ -e accounting_is_off ]; then echo "sacctmgr: error: not running" >&2; exit 1; fi
        cat max_submit 2>/dev/null || true """,
    "srun": """
        while [[ $1 == --* ]]; do
            case $1 in --output) out=$2; shift;; --error) err=$2; shift;; esac
            shift
        done
        name() { sed "s/%A/$SLURM_ARRAY_JOB_ID/; s/%a/$SLURM_ARRAY_TASK_ID/; s/%t/0/" <<<"$1"; }
        exec "$@" >"$(name "$out")" 2>"$(name "$err")" """,
}
PROGRAM = """
from hpc.cli import UserError
def main(arguments):
    print("ran with", arguments)
    if arguments == ["mistake"]:
        raise UserError("no manifest")
"""


class FakeSlurm:
    """A folder with fake commands, the answers they give and the arguments they got."""

    def __init__(self, folder: Path, commands: dict[str, str] | None = None) -> None:
        """Write the commands; `commands` replaces some of the usual ones."""
        self.folder = folder
        (folder / "bin").mkdir(parents=True)
        for name, body in {**COMMANDS, **(commands or {})}.items():
            note = (
                f'cd {shlex.quote(str(folder))}; printf "%s\\n" "{name} $*" >>asked\n'
                f'echo "{name}" $(compgen -e) >>variables\n'
            )
            if body == COMMANDS["srun"]:
                note = ""  # stays where the job runs
            script = folder / "bin" / name
            script.write_text(f"#!/bin/bash\n{note}{body}\n")
            script.chmod(0o755)

    def answer(self, name: str, text: str = "") -> None:
        (self.folder / name).write_text(text)

    def asked(self, command: str) -> list[list[str]]:
        lines = (self.folder / "asked").read_text().splitlines()
        return [line.split()[1:] for line in lines if line.split()[0] == command]

    def variables(self) -> dict[str, set[str]]:
        """Return the names of all environment variables that each command saw."""
        found: dict[str, set[str]] = {}
        for line in (self.folder / "variables").read_text().splitlines():
            command, *names = line.split()
            found.setdefault(command, set()).update(names)
        return found

    def script(self, number: int = 1) -> str:
        return (self.folder / f"script.{number}").read_text()

    def options(self, number: int = 1) -> dict[str, str]:
        words = [
            shlex.split(line.removeprefix("#SBATCH "))[0]
            for line in self.script(number).splitlines()
            if line.startswith("#SBATCH ")
        ]
        pairs = [word.removeprefix("--").partition("=") for word in words]
        return {key: value for key, _, value in pairs}

    def run(self, number: int, environment: dict[str, str]) -> int:
        variables = {**os.environ, "SLURM_PROCID": "0", **environment}
        script = self.folder / f"script.{number}"
        return subprocess.run(["bash", str(script)], env=variables).returncode


@pytest.fixture
def slurm(tmp_path, monkeypatch) -> FakeSlurm:
    fake = FakeSlurm(tmp_path / "fake slurm")
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "slurm_program.py").write_text(PROGRAM)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "modules"), prepend=os.pathsep)
    monkeypatch.setenv("PATH", str(fake.folder / "bin"), prepend=os.pathsep)
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    return fake


@pytest.fixture
def logs(tmp_path) -> Path:
    return tmp_path / "a b'c\"$x" / "logs"


def open_slurm(logs, **settings) -> SlurmQueue:
    queue = open_queue(ClusterProfile(**settings), logs, logs / "queue")
    assert isinstance(queue, SlurmQueue)
    return queue


def call(*arguments: str) -> ModuleCall:
    return ModuleCall("slurm_program", arguments)


def test_many_calls_are_one_array(slurm, logs):
    queue = open_slurm(logs, array_parallelism=2)
    ids = queue.submit([call("a"), call("b"), call("c")], Resources(), "train")
    assert ids == ["1_0", "1_1", "1_2"]
    assert len(slurm.asked("sbatch")) == 1
    assert slurm.options()["array"] == "0-2%2"


def test_one_call_is_a_plain_job(slurm, logs):
    assert open_slurm(logs).submit([call("a")], Resources(), "reduce") == ["1"]
    assert "array" not in slurm.options()


def test_no_call_asks_slurm_nothing(slurm, logs):
    queue = open_slurm(logs)
    assert queue.submit([], Resources(), "nothing") == []
    queue.cancel([])
    assert states(queue, []) == {}
    assert (slurm.folder / "asked").read_text() == "scontrol show config\n", "opening it"


def test_an_array_longer_than_the_site_allows_is_split(slurm, logs):
    slurm.answer("max_array_size", "2")
    ids = open_slurm(logs).submit([call(str(i)) for i in range(5)], Resources(), "long")
    assert ids == ["1_0", "1_1", "2_0", "2_1", "3"]


def test_the_profile_reaches_sbatch(slurm, logs):
    queue = open_slurm(
        logs,
        partition="gpu",
        account="us",
        constraint="v100&big",
        extra={"reservation": "it's", "exclusive": True, "overcommit": False, "wckey": "ours"},
        nodes=2,
        tasks_per_node=4,
        cpus_per_task=10,
        gpus_per_node=4,
        memory_gb=1.5,
        minutes=1200,
        lead_seconds=90,
        mpi="pmi2",
        network_interface="ib0",
        setup=("module load cuda",),
    )
    queue.submit([call("a")], queue.profile.training(), "a name; $(rm) é\n")
    assert slurm.options() == {
        "account": "us",
        "constraint": "v100&big",
        "cpus-per-task": "10",
        "error": str(logs / "%j_0_log.err"),
        "exclusive": "",
        "gpus-per-node": "4",
        "job-name": "a-name-rm",
        "mem": "1536M",
        "nodes": "2",
        "ntasks-per-node": "4",
        "open-mode": "append",
        "output": str(logs / "%j_0_log.out"),
        "partition": "gpu",
        "requeue": "",
        "reservation": "it's",
        "signal": "USR2@90",
        "time": "1200",
        "wckey": "ours",
    }
    srun = shlex.split(slurm.script().splitlines()[-1])
    wanted = ["--kill-on-bad-exit=1", "--cpus-per-task=10", "--open-mode=append", "--mpi=pmi2",
              "--export=ALL"]  # fmt: skip
    assert set(wanted) <= set(srun)
    assert "\nmodule load cuda\ntrap - ERR\nexport NCCL_SOCKET_IFNAME=ib0 GLOO" in slurm.script()


def test_preparing_and_reporting_take_one_task_and_no_gpu(slurm, logs):
    queue = open_slurm(logs, nodes=2, tasks_per_node=4, gpus_per_node=4, gres="gpu:v100:4")
    queue.submit([call("a")], queue.profile.single(), "prep")
    queue.submit([call("a")], queue.profile.training(), "train")
    assert not {"gres", "gpus-per-node"} & slurm.options(1).keys()
    assert (slurm.options(1)["nodes"], slurm.options(1)["ntasks-per-node"]) == ("1", "1")
    assert slurm.options(2)["gres"] == "gpu:v100:4"
    assert "gpus-per-node" not in slurm.options(2)


def test_a_job_waits_for_those_that_slurm_still_knows(slurm, logs):
    slurm.answer("queue", "7_0 RUNNING\n7_1 PENDING\n")
    open_slurm(logs).submit([call("a")], Resources(), "report", after=["7_0", "7_1", "3"])
    assert slurm.options()["dependency"] == "afterany:7_0:7_1"


def test_a_needed_job_must_succeed(slurm, logs):
    """A job that succeeded is not waited for; one that failed is refused at once."""
    slurm.answer("queue", "7_0 RUNNING\n7_1 PENDING\n8 COMPLETED\n9 FAILED\n")
    slurm.answer("accounting", "11|CANCELLED by 0\n12|COMPLETED\n")
    queue = open_slurm(logs)
    queue.submit([call("a")], Resources(), "train", ["7_1", "4"], needs=["7_0", "8", "12", "13"])
    assert slurm.options()["dependency"] == "afterok:7_0,afterany:7_1"
    assert slurm.options()["kill-on-invalid-dep"] == "yes"  # else it waits forever
    queue.submit([call("a")], Resources(), "reduce", after=["7_0"])
    assert "kill-on-invalid-dep" not in slurm.options(2)
    for job, word in (("9", "FAILED"), ("11", "CANCELLED")):
        with pytest.raises(UserError, match=rf"job {job}, .* did not succeed \({word}\)"):
            queue.submit([call("a")], Resources(), "train", needs=[job])


def test_a_job_whose_needed_job_failed_says_so(slurm, logs):
    slurm.answer("queue", "7 CANCELLED DependencyNeverSatisfied\n8 CANCELLED None\n")
    words = open_slurm(logs).job_states(["7", "8"])
    assert [exit_cause(words[job].why, []).cause for job in "78"] == [
        "dependency failed",
        "cancelled",
    ]


def test_one_squeue_tells_all_states(slurm, logs):
    slurm.answer("queue", "7_0 RUNNING\n7_1 PENDING\n8 COMPLETING\n9 REQUEUED\n")
    queue = open_slurm(logs)
    assert states(queue, ["7_0", "7_1", "7_2", "8", "9"]) == {
        "7_0": "running",
        "7_1": "waiting",
        "7_2": "gone",
        "8": "running",
        "9": "waiting",
    }
    (asked,) = slurm.asked("squeue")
    assert "--array" in asked
    assert "--jobs=7,8,9" in asked


def test_a_forgotten_job_is_gone_but_a_silent_controller_is_no_answer(slurm, logs):
    queue = open_slurm(logs)
    slurm.answer("error", "slurm_load_jobs error: Invalid job id specified\n")
    assert states(queue, ["7"]) == {"7": "gone"}
    slurm.answer("error", "slurm_load_jobs error: Unable to contact slurm controller\n")
    with pytest.raises(QueueUnreachable, match="Unable to contact"):
        states(queue, ["7"])


def test_jobs_of_an_earlier_local_run_are_gone_and_their_logs_are_found(slurm, logs):
    """squeue, sacct and scancel refuse a whole question for one id that is not Slurm's."""
    slurm.answer("queue", "7_0 RUNNING None\n")
    queue = open_slurm(logs)
    assert states(queue, ["local-000001", "7_0"]) == {"local-000001": "gone", "7_0": "running"}
    queue.final_states(["local-000001", "8"])
    queue.cancel(["local-000001", "8"])
    asked = [slurm.asked(command)[0][-1] for command in ("squeue", "sacct", "scancel")]
    assert asked == ["--jobs=7", "--jobs=8", "8"]
    assert queue.final_states(["local-000001"]) == {}
    folder = logs / "local-000001"
    folder.mkdir(parents=True)
    for rank in (10, 9):
        (folder / f"4711_{rank}_log.err").touch()
    assert queue.log_files("local-000001") == [folder / f"4711_{n}_log.err" for n in (9, 10)]


def test_the_refusal_of_too_many_jobs_names_max_jobs(slurm, logs):
    slurm.answer("refuse", "Job violates accounting/QOS policy (job submit limit)")
    with pytest.raises(UserError, match=r"submit limit\).*; max_jobs in the profile"):
        open_slurm(logs).submit([call("a")], Resources(), "one")


def test_one_squeue_tells_wait_reasons_and_exit_causes_too(slurm, logs):
    slurm.answer("queue", "7_0 RUNNING None\n7_1 PENDING Priority\n8 NODE_FAIL NodeDown\n9 PENDING "
                 "Nodes required for job are DOWN, DRAINED\n")  # fmt: skip
    assert open_slurm(logs).job_states(["7_0", "7_1", "8", "9", "10"]) == {
        "7_0": ("running", ""),
        "7_1": ("waiting", "Priority"),
        "8": ("gone", "NODE_FAIL"),
        "9": ("waiting", "Nodes required for job are DOWN, DRAINED"),
        "10": ("gone", ""),
    }
    assert len(slurm.asked("squeue")) == 1


def test_sacct_is_asked_once_for_jobs_that_squeue_has_forgotten_and_may_be_off(slurm, logs):
    slurm.answer("accounting", "7_0|CANCELLED by 1000\n7_1|NODE_FAIL\n8|RUNNING\n10|TIMEOUT\n")
    queue = open_slurm(logs)
    assert queue.final_states(["7_0", "7_1", "8", "9"]) == {"7_0": "CANCELLED", "7_1": "NODE_FAIL"}
    (asked,) = slurm.asked("sacct")
    assert "--jobs=7_0,7_1,8,9" in asked
    slurm.answer("accounting_is_off")
    assert queue.final_states(["7_0"]) == {}
    (slurm.folder / "bin" / "sacct").unlink()
    assert queue.final_states(["7_0"]) == {}
    assert queue.final_states([]) == {}


def test_every_start_is_marked_in_the_log_and_only_the_last_counts(slurm, logs):
    """A requeued job appends to its logs."""
    queue = open_slurm(logs)
    queue.submit([call("mistake")], Resources(), "train")
    step = {"SLURM_JOB_ID": "1", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "1"}
    assert slurm.run(1, {**step, "SLURM_ARRAY_JOB_ID": "", "SLURM_RESTART_COUNT": "0"}) == 2
    (log,) = queue.folder.glob("*.err")
    first = log.read_text()
    assert first.splitlines()[0].startswith("--- start 1-0-0: rank 0 of 1 on ")
    assert exit_cause("", [log]) == ("error", "error: no manifest")
    assert slurm.run(1, {**step, "SLURM_ARRAY_JOB_ID": "", "SLURM_RESTART_COUNT": "1"}) == 2
    second = log.read_text()  # the fake srun begins its logs anew
    assert second.splitlines()[0].startswith("--- start 1-1-0: rank 0 of 1 on ")
    log.write_text(first + second.splitlines()[0] + "\nstep 3 of 6\n")
    assert exit_cause("", [log]) == ("unknown", "")
    assert last_error([log]) == "step 3 of 6"


def test_the_room_left_is_the_sites_limit_less_what_is_queued(slurm, logs):
    slurm.answer("queue", "7_0\n7_1\n8\n")
    assert open_slurm(logs).free_slots() is None  # the site sets none
    slurm.answer("max_submit", "40\n10\n\n")  # of the user's associations
    assert open_slurm(logs).free_slots() == 7
    assert "account=us" in {w for line in asked_room(slurm, logs, account="us") for w in line}
    assert open_slurm(logs, max_jobs=2).free_slots() == 0  # the profile knows better
    slurm.answer("accounting_is_off")
    assert open_slurm(logs).free_slots() is None


def asked_room(slurm, logs, **settings) -> list[list[str]]:
    open_slurm(logs, **settings).free_slots()
    return slurm.asked("sacctmgr")


def test_reduction_takes_the_tasks_that_mpi_gets(slurm, logs):
    queue = open_slurm(
        logs, gpus_per_node=4, nodes=4, reduce_nodes=2, reduce_tasks_per_node=3, mpi="pmix"
    )
    queue.submit([call("a")], queue.profile.reducing(), "reduce")
    assert (slurm.options()["nodes"], slurm.options()["ntasks-per-node"]) == ("2", "3")
    assert "gpus-per-node" not in slurm.options()
    assert queue.starts_mpi


def test_jobs_are_cancelled_by_one_scancel(slurm, logs):
    open_slurm(logs).cancel(["7_0", "8"])
    assert slurm.asked("scancel") == [["--quiet", "7_0", "8"]]


def test_a_thousand_elements_of_an_array_are_cancelled_by_one_word(slurm, logs):
    """scancel may ask the controller once per argument."""
    elements = [f"7_{n}" for n in (*range(1000, 200, -1), 17, 3)]
    open_slurm(logs).cancel([*elements, "8"])
    assert slurm.asked("scancel") == [["--quiet", "7_3", "7_17", "7_[201-1000]", "8"]]


def test_a_refusal_is_one_line_and_leaves_nothing_queued(slurm, logs):
    slurm.answer("refuse")
    queue = open_slurm(logs)
    with pytest.raises(UserError, match=r"sbatch refused the job: .*invalid partition"):
        queue.submit([call("a")], Resources(), "a")


def test_a_refusal_in_the_middle_cancels_what_was_queued(slurm, logs):
    slurm.answer("max_array_size", "2")
    sbatch = slurm.folder / "bin" / "sbatch"
    sbatch.write_text(sbatch.read_text() + "\n[ $number = 2 ] && touch refuse\n:\n")
    with pytest.raises(UserError, match="refused"):
        open_slurm(logs).submit([call(str(i)) for i in range(6)], Resources(), "long")
    assert slurm.asked("scancel") == [["--quiet", "1_0", "1_1", "2_0", "2_1"]]


def test_the_script_runs_the_call_under_an_awkward_path(slurm, logs):
    queue = open_slurm(logs)
    ids = queue.submit([call("x", "y z"), call("mistake")], Resources(), "train")
    element = {"SLURM_JOB_ID": "1", "SLURM_ARRAY_JOB_ID": "1"}
    assert slurm.run(1, {**element, "SLURM_ARRAY_TASK_ID": "0"}) == 0
    assert slurm.run(1, {**element, "SLURM_ARRAY_TASK_ID": "1"}) == 2
    assert "ran with ['x', 'y z']" in (logs / "1_0_0_log.out").read_text()
    assert queue.log_files(ids[1]) == [logs / "1_1_0_log.err"]
    assert last_error(queue.log_files(ids[1])) == "error: no manifest"


NASTY = "$(touch x) `touch x`; touch x #' \" & | > x * [red] {b} ~ !"


def test_names_and_paths_are_words_and_nothing_in_them_is_run(slurm, tmp_path, monkeypatch):
    """All texts of the profile, the job's name, its folder and its arguments are quoted."""
    python = tmp_path / "$(touch${IFS}x)" / "python"
    python.parent.mkdir()
    python.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n')
    python.chmod(0o755)
    sbatch = ["partition", "account", "qos", "constraint", "exclude", "mail_user", "mail_type"]
    queue = open_slurm(
        tmp_path / NASTY / "logs",
        **dict.fromkeys([*sbatch, "gres", "mpi", "network_interface"], NASTY),
        extra={"comment": NASTY},
        gpus_per_node=1,
        python=str(python),
    )
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    (job,) = queue.submit([call(NASTY, "\n")], queue.profile.training(), f"{NASTY}\n")
    options = slurm.options()
    assert {key: options[key.replace("_", "-")] for key in sbatch} == dict.fromkeys(sbatch, NASTY)
    assert options["gres"] == options["comment"] == NASTY
    assert options["output"] == f"{queue.folder}/%j_0_log.out"
    assert options["job-name"] == "touch-x-touch-x-touch-x-x-red-b"
    script = slurm.folder / "script.1"
    assert subprocess.run(["bash", "-n", str(script)]).returncode == 0
    (srun,) = [line for line in slurm.script().splitlines() if line.startswith("srun ")]
    assert f"--mpi={NASTY}" in shlex.split(srun)
    assert str(python) in shlex.split(srun)
    assert slurm.run(1, {"SLURM_JOB_ID": job, "SLURM_ARRAY_JOB_ID": ""}) == 0
    (log,) = queue.folder.glob("*.out")
    assert f"ran with {[NASTY, chr(10)]!r}" in log.read_text()
    exported = [line for line in slurm.script().splitlines() if line.startswith("export NCCL")]
    echo = f'{exported[0]}; printf %s "$GLOO_SOCKET_IFNAME"'
    assert subprocess.run(["bash", "-c", echo], capture_output=True, text=True).stdout == NASTY
    assert not [path for path in tmp_path.rglob("*") if path.name == "x"]


def test_no_command_of_slurm_sees_leftover_variables_of_the_shell(slurm, logs, monkeypatch, capsys):
    for name, value in {**HOSTILE, "SLURM_CONF": "/site/slurm.conf"}.items():
        monkeypatch.setenv(name, value)
    queue = open_slurm(logs)
    queue.submit([call("a"), call("b")], Resources(), "a", after=["7"])
    queue.final_states(["7"])
    queue.free_slots()
    queue.cancel(["7"])
    slurm.answer("queue", "RUNNING\n")
    requeue("7")
    commands = {"sbatch", "squeue", "scontrol", "scancel", "sacct", "sacctmgr"}
    assert slurm.variables().keys() == commands
    for command, names in slurm.variables().items():
        assert names & HOSTILE.keys() == set(), command
        assert {"SLURM_CONF", "PATH"} <= names
    assert slurm.options()["signal"] == "USR2@120"
    assert HOSTILE.items() <= os.environ.items(), "they are still there for others"
    (line,) = capsys.readouterr().err.splitlines()  # options that the user may rely on
    assert line.startswith("warning: SBATCH_CLUSTERS, SBATCH_EXPORT, ") and "SALLOC" not in line
    assert line.endswith(" of this shell is not used; jobs get what the cluster profile says")


def test_a_script_submitted_by_hand_from_such_a_shell_starts_the_ranks_without_them(slurm, logs):
    queue = open_slurm(logs, python="bash -c 'compgen -e' --")
    queue.submit([call("a")], Resources(), "a")
    step = {"SLURM_JOB_ID": "1", "SLURM_ARRAY_JOB_ID": "", "SLURM_NTASKS": "1"}
    assert slurm.run(1, {**HANDED_ON, **step}) == 0
    names = {name for log in logs.glob("*.out") for name in log.read_text().split()}
    assert names & HANDED_ON.keys() == {"SUBMITIT_EXECUTOR"}, "submitit sets this anew"
    assert "SLURM_NTASKS" in names


@pytest.mark.parametrize("answer", [
    "NUMBER\n", "NUMBER;cluster\n", "Submitted batch job NUMBER\n",
    "*** 2026: 3 days to the maintenance\njob budget 77\nNUMBER\nyour 5 jobs\n",
])  # fmt: skip
def test_the_job_id_is_found_among_other_lines_of_sbatch(slurm, logs, answer):
    slurm.answer("answer", answer)
    queue = open_slurm(logs)
    assert queue.submit([call("a")], Resources(), "one") == ["1"]
    assert queue.submit([call("a"), call("b")], Resources(), "two") == ["2_0", "2_1"]
    assert all(words[0] == "--parsable" for words in slurm.asked("sbatch"))


def test_a_stage_waits_for_a_long_array_by_its_name(slurm, logs):
    """Element by element, 10,000 jobs would not fit into one variable of the job's environment."""
    ids = [f"7_{n}" for n in range(101)]
    states = "".join(f"{job} PENDING None\n" for job in ids)
    slurm.answer("queue", f"7_101 COMPLETED None\n{states}8 RUNNING None\n")
    queue = open_slurm(logs)
    queue.submit([call("a")], Resources(), "all", after=[*ids, "7_101", "8"])
    assert slurm.options()["dependency"] == "afterany:7:8"
    queue.submit([call("a")], Resources(), "but one", after=ids[1:])
    assert slurm.options(2)["dependency"] == f"afterany:{':'.join(ids[1:])}"


def test_twelve_thousand_jobs_fit_into_commands(slurm, logs):
    ids = [f"1234567_{n}" for n in range(12_000)]
    slurm.answer("accounting", "".join(f"{job}|FAILED\n" for job in ids))
    assert set(open_slurm(logs).final_states(ids).values()) == {"FAILED"}
    assert len(slurm.asked("sacct")) == 3


def test_a_refusal_does_not_ask_to_wait_for_slurm(monkeypatch):
    said = "scancel: error: Kill job error on job id 7: Access/permission denied"
    refused = subprocess.CompletedProcess([], 1, "", said)
    monkeypatch.setattr(slurm_cli, "_run", lambda _: refused)
    with pytest.raises(SlurmRefused, match=r"^scancel failed: .*/permission denied$"):
        slurm_cli.cancel(["7"])


def test_an_answer_without_a_job_id_is_an_error(slurm, logs):
    slurm.answer("answer", "your job 7 is the best\n")
    with pytest.raises(UserError, match=r"^sbatch printed no job id: 'your job 7 .*; check with s"):
        open_slurm(logs).submit([call("a")], Resources(), "one")


@pytest.mark.parametrize("extra", [{"requeue": False}, {"no-requeue": True}])
def test_a_profile_that_switches_requeueing_off_is_warned_about(slurm, logs, capsys, extra):
    queue = open_slurm(logs, extra=extra)
    for _ in range(2):
        queue.submit([call("a")], Resources(), "a")
    assert "no-requeue" in slurm.options() and "requeue" not in slurm.options()
    said = capsys.readouterr().err
    assert said.startswith("warning: requeue is off in the profile") and said.count("\n") == 1


SETUP_ERROR = "error: a setup line of the cluster profile failed (exit status {}): {}\n"
SOURCED = "false\nexport FOUND=1\n"
SETUPS = [
    (("true", "module load nope  # 'x'", "touch after"), 127, "module load nope  # 'x'"),
    (("if true; then", "  (exit 3)", "fi"), 3, "  (exit 3)"),
    (("set -e", "false"), 1, "false"),
    (("test -e medieval x",), 2, "test -e medieval x"),
    (("function load() { return 4; }", "load x"), 4, "load x"),
    ((". ./sourced", ". ./missing"), 1, ". ./missing"),
]
GOOD_SETUPS = [
    ("function load() { false; export FOUND=1; }", "load x"),
    ("false || true", "if ! false; then export FOUND=1; fi"),
    (". ./sourced",),
    ("eval 'false; export FOUND=1'",),
    ("export FOUND=\\", "1"),
]


def run_setup(profile: ClusterProfile, folder: Path, last: str) -> subprocess.CompletedProcess[str]:
    """Run the setup lines as a batch script does."""
    (folder / "sourced").write_text(SOURCED)
    script = folder / "script"
    script.write_text("\n".join(["#!/bin/bash", *profile.setup_lines(), last]))
    return subprocess.run(["bash", script], cwd=folder, capture_output=True, text=True)


@pytest.mark.parametrize(("setup", "status", "line"), SETUPS)
def test_a_setup_line_that_fails_ends_the_job_and_is_named(tmp_path, setup, status, line):
    done = run_setup(ClusterProfile(setup=setup), tmp_path, "touch after")
    assert done.returncode == 2
    assert done.stderr.endswith(SETUP_ERROR.format(status, line))
    assert not (tmp_path / "after").exists()


@pytest.mark.parametrize("setup", GOOD_SETUPS)
def test_setup_lines_that_succeed_in_the_end_are_fine(tmp_path, setup):
    done = run_setup(ClusterProfile(setup=setup), tmp_path, "false; echo $FOUND")
    assert (done.returncode, done.stdout, done.stderr) == (0, "1\n", "")


def test_only_a_running_job_is_requeued(slurm):
    slurm.answer("queue", "RUNNING\n")
    assert requeue("7_1")
    assert slurm.asked("scontrol") == [["requeue", "7_1"]]
    slurm.answer("queue", "COMPLETING\n")  # cancelled or preempted: Slurm's own affair
    assert not requeue("7_1")
    assert len(slurm.asked("scontrol")) == 1


def test_auto_means_slurm_only_where_there_is_sbatch(slurm, logs, monkeypatch):
    assert isinstance(open_queue(ClusterProfile(kind="local"), logs, logs), LocalQueue)
    assert jobs_at_once(ClusterProfile()) == 256
    shutil.rmtree(slurm.folder / "bin")
    monkeypatch.setenv("PATH", "/nowhere")
    assert isinstance(open_queue(ClusterProfile(), logs, logs), LocalQueue)
    assert jobs_at_once(ClusterProfile()) == 1
    with pytest.raises(QueueUnreachable, match="no sbatch on PATH"):
        open_queue(ClusterProfile(kind="slurm"), logs, logs)


# what a package without a slurm.conf says, as sbatch, squeue and scontrol do
NO_CONTROLLER = """
        echo "$(basename "$0"): error: resolve_ctls_from_dns_srv: res_nsearch error" >&2
        echo "$(basename "$0"): error: fetch_config: DNS SRV lookup failed" >&2
        echo "$(basename "$0"): fatal: Could not establish a configuration source" >&2; exit 1 """
ELSE_LOCAL = "if this machine is in no cluster, add --cluster local"
DOWN = "scontrol failed: Could not establish a configuration source; jobs go on; run it again when"


@pytest.mark.parametrize(
    ("kind", "commands", "message"),
    [
        ("slurm", (), "there is no sbatch on PATH; use a login node of the cluster"),
        ("slurm", COMMANDS, f"{DOWN} Slurm answers"),
        ("auto", COMMANDS, f"{DOWN} Slurm answers; {ELSE_LOCAL}"),
    ],
    ids=["without sbatch", "without a controller", "auto"],
)  # fmt: skip
def test_a_slurm_that_does_not_answer(tmp_path, monkeypatch, logs, kind, commands, message):
    fake = FakeSlurm(tmp_path / "away", dict.fromkeys(commands, NO_CONTROLLER))
    for name in COMMANDS.keys() - commands:
        (fake.folder / "bin" / name).unlink()
    monkeypatch.setenv("PATH", f"{fake.folder}/bin:{only(tmp_path, 'bash', 'basename')}")
    profile = ClusterProfile(kind=kind)
    with pytest.raises(QueueUnreachable) as refused:
        open_queue(profile, logs, logs)
    assert str(refused.value) == message
    queue = open_queue(profile, logs, logs, read_only=True)
    queue.check()
    assert queue.unreachable == message
    assert queue.job_states(["7", "8_1"]) == dict.fromkeys(["7", "8_1"], JobState("unknown"))
    assert queue.find_by_token(["token"]) == {"token": {}}
    assert queue.log_files("7") == []
    with pytest.raises(QueueUnreachable):
        queue.cancel(["7"])


def only(folder: Path, *commands: str) -> Path:
    """Return a folder for PATH with these commands alone."""
    (folder / "only").mkdir()
    for name in commands:
        (folder / "only" / name).symlink_to(shutil.which(name))
    return folder / "only"


def test_profiles_are_found_by_name_or_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "grids" / "clusters"
    folder.mkdir(parents=True)
    (folder / "mine.toml").write_text("nodes = 2\nminutes = 30\n")
    found = read_profile("mine", near=tmp_path / "grids")
    assert (found.nodes, found.minutes) == (2, 30)
    assert read_profile(str(folder / "mine.toml")).nodes == 2
    assert read_profile(None) == ClusterProfile()
    with pytest.raises(UserError, match=r"no cluster profile 'nine'; did you mean 'mine'\?"):
        read_profile("nine", near=tmp_path / "grids")


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"partion": "gpu"}, r"\[cluster\]: unknown key 'partion'; did you mean 'partition'"),
        ({"partition": "a\n#SBATCH --x"}, "one line"),
        ({"extra": {"output": "x"}}, "'output' is set by us"),
        ({"extra": {"dep": "x"}}, "'dep' is set by us"),
        ({"extra": {"a b": "x"}}, "not an sbatch option"),
        ({"extra": {"M": "x"}}, "not an sbatch option"),
        ({"extra": {"clusters": "x"}}, "'clusters' cannot be given: jobs are looked for on"),
        ({"extra": {"cluster": "x"}}, "'cluster' cannot be given"),
        ({"gres": "gpu:4"}, "gres needs gpus_per_node"),
        ({"tasks_per_node": 4, "gpus_per_node": 2}, "tasks_per_node = 4 ranks need a GPU each"),
        ({"python": "'/opt/my python"}, "python: No closing quotation"),
        ({"minutes": 2}, "lead_seconds must be less"),
        ({"reduce_nodes": 2}, "need mpi, srun's plugin"),
    ],
)
def test_an_invalid_profile_is_refused(table, message):
    with pytest.raises(UserError, match=message):
        parse(ClusterProfile, table, "[cluster]")


def test_the_shipped_profiles_are_valid(monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[3])
    assert read_profile("local").kind == "local"
    v100 = read_profile("v100").training()
    assert (v100.nodes, v100.tasks_per_node, v100.gpus_per_node) == (1, 4, 4)


def test_planning_needs_no_heavy_library():
    heavy = {"torch", "h5py", "mpi4py", "numpy"}
    check = f"import sys, hpc.scheduler.auto; print({heavy} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
