"""The local queue runs real jobs through submitit and a real runner, and both are killed."""

import os
import pickle
import signal
import stat
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Thread

import pytest

from hpc.cli import UserError
from hpc.scheduler import local
from hpc.scheduler.auto import open_queue
from hpc.scheduler.base import NO_RUNNER, Queue, State
from hpc.scheduler.cluster_profile import ClusterProfile, Resources
from hpc.scheduler.exit_cause import exit_cause
from hpc.scheduler.job import ModuleCall, last_error
from hpc.scheduler.local import LocalQueue, Runner
from hpc.scheduler.local_jobs import LocalJobs, choose_gpus, processes, result_of
from hpc.storage.atomic import read_json, write_json
from hpc.storage.locks import take_lock
from tests.hpc.scheduler.hostile import HOSTILE

PROGRAM = '''
import os, pickle, signal, sys, time
from pathlib import Path
from hpc.cli import UserError

RANK = os.environ["SUBMITIT_LOCAL_GLOBALID"]

def main(arguments):
    globals()[arguments[0]](*arguments[1:])

def note(path, text):
    with open(path, "a") as file:
        file.write(text + "\\n")

def hold(path):
    """Wait until PATH.go exists."""
    note(path, RANK)
    while not Path(path + ".go").exists():
        time.sleep(0.02)

def save(path):
    """Save on SIGTERM, as a training job does."""
    signal.signal(signal.SIGTERM, lambda *_: (note(path + ".saved", RANK), sys.exit(1)))
    hold(path)

def stubborn(path):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    hold(path)

def lose_rank_1(path):
    if RANK == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    hold(path)

def mistake():
    raise UserError("no manifest")

class Attack:
    def __init__(self, path):
        self.path = path
    def __reduce__(self):
        return os.mkdir, (self.path,)

def leave_pickle(path):
    """Write a second result beside submitit's own."""
    with open(os.environ["SUBMITIT_FOLDER"] + "/0_1_result.pkl", "wb") as file:
        pickle.dump(("success", Attack(path)), file)
    with open(path + ".pkl", "wb") as file:
        pickle.dump(Attack(path), file)

def environment(path, *names):
    note(path, " ".join(os.environ.get(name, "?") for name in names))
'''
ONE = Resources()


def states(queue: Queue, ids: Sequence[str]) -> dict[str, State]:
    return {job_id: job.state for job_id, job in queue.job_states(ids).items()}


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Return a folder with an awkward name, in which jobs find the program above."""
    place = tmp_path / "a b'c\"$x"
    (place / "modules").mkdir(parents=True)
    (place / "modules" / "local_program.py").write_text(PROGRAM)
    monkeypatch.setenv("PYTHONPATH", str(place / "modules"), prepend=os.pathsep)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    yield place
    for pid in [
        *runners(place),
        *(pid for lock in place.rglob("*.lock") for pid in processes(lock)),
    ]:
        os.kill(pid, signal.SIGKILL)


def open_local(place, **settings) -> LocalQueue:
    profile = ClusterProfile(kind="local", **settings)
    queue = open_queue(profile, place / "logs", place / "queue")
    assert isinstance(queue, LocalQueue)
    return queue


def call(*arguments) -> ModuleCall:
    return ModuleCall("local_program", tuple(map(str, arguments)))


def runners(place) -> list[int]:
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = entry.read_bytes().split(b"\0")
        except OSError:
            continue
        if b"hpc.scheduler.local" in words and str(place / "queue").encode() in words:
            found.append(int(entry.parent.name))
    return found


def kill_runner(place):
    os.kill(runners(place)[0], signal.SIGKILL)
    # a free lock means that the kernel has cleared the old runner away
    wait_for(lambda: lock_is_free(place / "queue" / "lock"))


def lock_is_free(path) -> bool:
    with path.open() as file:
        return take_lock(file)


def wait_for(condition, seconds=30.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def wait_until_gone(queue, ids):
    wait_for(lambda: set(states(queue, ids).values()) <= {"gone"})


def lines(path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def outcome(queue, job_id) -> str:
    path = queue.jobs.path(job_id, "ended")
    wait_for(path.exists)
    return read_json(path)["outcome"]


def test_jobs_run_in_order_and_the_runner_leaves(place):
    queue = open_local(place)
    ids = queue.submit([call("note", place / "out", i) for i in range(3)], ONE, "notes")
    assert ids == ["local-000001", "local-000002", "local-000003"]
    wait_until_gone(queue, ids)
    assert lines(place / "out") == ["0", "1", "2"]
    assert [outcome(queue, job_id) for job_id in ids] == ["succeeded"] * 3
    wait_for(lambda: not runners(place))
    more = queue.submit([call("note", place / "out", "more")], ONE, "more")
    assert more == ["local-000004"]
    wait_until_gone(queue, more)


def test_as_many_at_a_time_as_the_profile_says(place):
    queue = open_local(place, local_jobs=2)
    ids = queue.submit([call("hold", place / f"job{i}") for i in range(3)], ONE, "three")
    wait_for(lambda: (place / "job0").exists() and (place / "job1").exists())
    assert list(states(queue, [*ids, "local-000099"]).values()) == [
        "running",
        "running",
        "waiting",
        "gone",
    ]
    (place / "job1.go").touch()
    wait_for(lambda: (place / "job2").exists())
    assert states(queue, ids) == {ids[0]: "running", ids[1]: "gone", ids[2]: "running"}


def test_a_job_waits_for_those_before_it_even_if_they_fail(place):
    queue = open_local(place, local_jobs=4)
    first = queue.submit([call("hold", place / "first"), call("mistake")], ONE, "first")
    then = queue.submit([call("note", place / "then", "x")], ONE, "then", after=[*first, "gone-1"])
    wait_until_gone(queue, first[1:])
    time.sleep(0.5)
    assert states(queue, then) == {then[0]: "waiting"}
    (place / "first.go").touch()
    wait_until_gone(queue, then)
    assert lines(place / "then") == ["x"]


def test_a_job_starts_if_the_record_of_one_that_it_needs_is_damaged(place):
    """The job checks the files that it needs itself."""
    queue = open_local(place)
    (job,) = queue.submit([call("note", place / "first", "x")], ONE, "first")
    assert outcome(queue, job) == "succeeded"
    wait_for(lambda: not runners(place))
    queue.jobs.path(job, "ended").write_text("")
    assert queue.job_states([job])[job] == ("gone", "")
    (then,) = queue.submit([call("note", place / "then", "x")], ONE, "then", needs=[job])
    assert outcome(queue, then) == "succeeded"


def test_a_job_does_not_start_if_one_that_it_needs_failed(place):
    queue = open_local(place, local_jobs=4)
    needed = queue.submit([call("hold", place / "good"), call("hold", place / "bad")], ONE, "two")
    wait_for(lambda: (place / "good").exists() and (place / "bad").exists())
    good, bad = (
        queue.submit([call("note", place / name, "x")], ONE, name, needs=[job, "gone-1"])
        for name, job in zip(("after good", "after bad"), needed, strict=True)
    )
    then = queue.submit([call("note", place / "then", "x")], ONE, "then", needs=bad)
    after_all = queue.submit([call("note", place / "last", "x")], ONE, "last", after=[*bad, *then])
    assert set(states(queue, [*good, *bad, *then]).values()) == {"waiting"}
    (place / "good.go").touch()
    queue.cancel(needed[1:])
    wait_until_gone(queue, [*good, *after_all])
    assert lines(place / "after good") == lines(place / "last") == ["x"]
    ended = [*bad, *then]
    assert queue.job_states(ended) == dict.fromkeys(ended, ("gone", "dependency failed"))
    assert not (place / "after bad").exists() and not (place / "then").exists()
    with pytest.raises(UserError, match=r"job local-000002, .* did not succeed \(cancelled\)"):
        queue.submit([call("note", place / "late", "x")], ONE, "late", needs=needed)


def test_a_users_mistake_ends_the_job_and_can_be_read(place):
    queue = open_local(place, tasks_per_node=2)
    (job,) = queue.submit([call("mistake")], queue.profile.training(), "mistake")
    wait_until_gone(queue, [job])
    assert outcome(queue, job) == "failed"
    logs = queue.log_files(job)
    assert [log.name.split("_")[1] for log in logs] == ["0", "1"]
    assert last_error(logs) == "error: no manifest"


def test_a_killed_runner_stops_no_job_and_the_next_takes_over(place):
    queue = open_local(place)
    ids = queue.submit([call("hold", place / "a"), call("note", place / "b", "x")], ONE, "two")
    wait_for(lambda: (place / "a").exists())
    kill_runner(place)
    assert queue.job_states(ids) == {ids[0]: ("running", ""), ids[1]: ("waiting", NO_RUNNER)}
    queue.ensure_runner()
    wait_for(lambda: runners(place))
    assert queue.job_states(ids) == {ids[0]: ("running", ""), ids[1]: ("waiting", "")}
    time.sleep(0.5)
    assert states(queue, ids) == {ids[0]: "running", ids[1]: "waiting"}
    (place / "a.go").touch()
    wait_until_gone(queue, ids)
    assert (lines(place / "a"), lines(place / "b")) == (["0"], ["x"])
    assert [outcome(queue, job_id) for job_id in ids] == ["succeeded"] * 2


def test_a_job_that_died_unseen_is_gone_and_not_run_again(place):
    queue = open_local(place)
    (job,) = queue.submit([call("hold", place / "a")], ONE, "one")
    wait_for(lambda: (place / "a").exists())
    kill_runner(place)
    for pid in processes(queue.jobs.path(job, "lock")):
        os.kill(pid, signal.SIGKILL)
    wait_until_gone(queue, [job])
    queue.ensure_runner()
    assert outcome(queue, job) == "failed"
    assert lines(place / "a") == ["0"]


def test_a_rank_without_its_controller_still_counts_as_the_job(place):
    queue = open_local(place)
    (job,) = queue.submit([call("hold", place / "a")], ONE, "one")
    wait_for(lambda: (place / "a").exists())
    alive = processes(queue.jobs.path(job, "lock"))
    (controller,) = [pid for pid, parent in alive.items() if parent not in alive]
    os.kill(controller, signal.SIGKILL)
    time.sleep(0.5)
    assert states(queue, [job]) == {job: "running"}
    queue.cancel([job])
    wait_until_gone(queue, [job])
    assert outcome(queue, job) == "cancelled"


def test_cancelled_jobs_never_start_or_may_save_on_every_rank(place):
    queue = open_local(place, tasks_per_node=2)
    calls = [call("save", place / "a"), call("note", place / "b", "x")]
    ids = queue.submit(calls, queue.profile.training(), "two")
    wait_for(lambda: len(lines(place / "a")) == 2)
    queue.cancel([*reversed(ids), "local-000099"])
    wait_until_gone(queue, ids)
    assert sorted(lines(place / "a.saved")) == ["0", "1"]
    assert not (place / "b").exists()
    assert [outcome(queue, job_id) for job_id in ids] == ["cancelled"] * 2


def test_a_job_that_ignores_sigterm_is_killed(place, monkeypatch):
    monkeypatch.setattr(local, "_KILL_WAIT_SECONDS", 0.5)
    monkeypatch.chdir(place)
    queue = open_local(place)
    queue.jobs.folder.mkdir()
    with queue.jobs.runner_lock() as lock:
        ids = queue.submit([call("stubborn", place / "a")], ONE, "stubborn")

        def cancel():
            wait_for(lambda: (place / "a").exists())
            queue.cancel(ids)

        thread = Thread(target=cancel)
        thread.start()
        Runner(queue.jobs, lock).run()
        thread.join()
    assert states(queue, ids) == {ids[0]: "gone"}
    assert outcome(queue, ids[0]) == "cancelled"


def test_ranks_do_not_wait_for_a_dead_one(place):
    queue = open_local(place, tasks_per_node=2)
    ids = queue.submit([call("lose_rank_1", place / "a")], queue.profile.training(), "lost")
    wait_until_gone(queue, ids)
    assert outcome(queue, ids[0]) == "failed"


@pytest.mark.parametrize(
    ("program", "cause", "line"),
    [("lose_rank_1", "killed", ""), ("mistake", "error", "error: no manifest")],
)
def test_the_exit_cause_is_found_in_the_logs_of_the_ranks(place, program, cause, line):
    queue = open_local(place)
    path = [place / "hold"] if program == "lose_rank_1" else []
    (job,) = queue.submit([call(program, *path)], Resources(tasks_per_node=2), "two")
    wait_for(lambda: queue.job_states([job])[job].why != "", seconds=120.0)
    assert queue.job_states([job]) == {job: ("gone", "failed")}
    assert exit_cause("failed", queue.log_files(job)) == (cause, line)


def test_a_cancelled_job_is_cancelled_even_if_it_ended_well(place):
    queue = open_local(place)
    (job,) = queue.submit([call("hold", place / "hold")], ONE, "one")
    wait_for((place / "hold").exists)
    queue.jobs.path(job, "cancelled").touch()
    (place / "hold.go").touch()
    wait_until_gone(queue, [job])
    assert queue.job_states([job]) == {job: ("gone", "cancelled")}


def test_many_submits_at_once_start_one_runner_and_lose_nothing(place):
    def submit(i):
        queue = open_local(place, local_jobs=2)
        return queue.submit([call("note", place / "out", f"{i}")], ONE, "one")

    holder = open_local(place).submit([call("hold", place / "hold")], ONE, "hold")
    with ThreadPoolExecutor(4) as pool:
        ids = [job_id for found in pool.map(submit, range(4)) for job_id in found]
    assert len(set(ids + holder)) == 5
    assert len(runners(place)) == 1
    wait_until_gone(open_local(place), ids)
    assert sorted(lines(place / "out")) == list("0123")


def test_a_job_added_as_the_runner_leaves_is_not_forgotten(place):
    queue = open_local(place)
    for i in range(3):
        wait_until_gone(queue, queue.submit([call("note", place / "out", i)], ONE, "quick"))
        time.sleep(0.08 * i)  # the runner is about to leave
    assert lines(place / "out") == list("012")


def test_jobs_get_their_setup_id_and_own_gpus(place):
    queue = open_local(place, gpus_per_node=2, local_jobs=2, setup=("export HELLO='a  b'",))
    names = ("LOSSGRID_JOB_ID", "CUDA_VISIBLE_DEVICES", "HELLO")
    wanted = queue.profile.training()
    held = queue.submit([call("hold", place / "a")], wanted, "hold")
    wait_for(lambda: (place / "a").exists())
    ids = queue.submit([call("environment", place / "out", *names)], wanted, "environment")
    ids += queue.submit(
        [call("environment", place / "out", names[1])], queue.profile.single(), "no GPU"
    )
    wait_until_gone(queue, ids)
    assert lines(place / "out") == ["local-000002 2,3 a  b", ""]
    (place / "a.go").touch()
    wait_until_gone(queue, held)


def test_a_setup_line_that_fails_ends_the_job_and_is_named(place):
    queue = open_local(place, setup=("true", "module load nope"))
    (job,) = queue.submit([call("note", place / "out", "ran")], ONE, "one")
    wait_until_gone(queue, [job])
    line = "error: a setup line of the cluster profile failed (exit status 127): module load nope"
    assert exit_cause("failed", queue.log_files(job)) == ("error", line)
    assert not (place / "out").exists()


def test_jobs_do_not_see_leftover_variables_of_the_shell(place, monkeypatch):
    for name, value in HOSTILE.items():
        monkeypatch.setenv(name, value)
    queue = open_local(place)
    (job,) = queue.submit([call("environment", place / "out", *HOSTILE)], ONE, "environment")
    wait_until_gone(queue, [job])
    submitits = {"SUBMITIT_EXECUTOR": "local"}
    assert lines(place / "out") == [" ".join(submitits.get(name, "?") for name in HOSTILE)]


def test_a_job_that_cannot_start_says_why(place, monkeypatch):
    (place / "gone").mkdir()
    monkeypatch.chdir(place / "gone")
    queue = open_local(place)
    held = queue.submit([call("hold", place / "a")], ONE, "hold")
    wait_for(lambda: (place / "a").exists())
    (job,) = queue.submit([call("note", place / "b", "x")], ONE, "nowhere")
    monkeypatch.chdir(place)
    (place / "gone").rmdir()
    (place / "a.go").touch()
    wait_until_gone(queue, [*held, job])
    assert outcome(queue, job) == "failed"
    assert "No such file" in (last_error(queue.log_files(job)) or "")


def test_a_damaged_job_fails_and_the_others_go_on(tmp_path):
    jobs = LocalJobs(tmp_path / "queue")
    common = {"local_jobs": 1, "after": [], "needs": [], "gpus": 0, "folder": str(tmp_path)}
    with jobs.locked():
        started, other = jobs.add([{**common, "tasks": 1}, {**common, "local_jobs": 0}])
    write_json(jobs.path(started, "started"), {"gpus": []})
    jobs.path(started, "lock").touch()
    jobs.path(started, "json").write_text("{")
    runner = Runner(jobs, (tmp_path / "queue/lock").open("a"))
    assert runner._step()
    assert jobs.job_state(started) == ("gone", "failed")
    assert "damaged" in jobs.path(started, "refused").read_text()
    assert jobs.state(other) == "waiting"


def test_a_running_job_with_a_damaged_file_runs_on(tmp_path):
    jobs = LocalJobs(tmp_path)
    (job,) = jobs.add([{}])
    assert not Runner(jobs, (tmp_path / "lock").open("a"))._lost_a_rank(job)


def test_a_job_file_without_a_key_fails(tmp_path):
    jobs = LocalJobs(tmp_path)
    (job,) = jobs.add([{"tasks": 1}])
    assert not Runner(jobs, (tmp_path / "lock").open("a"))._try_start(job, [])
    assert jobs.outcome(job) == "failed"
    said = f"error: the job file of {job} has no key 'local_jobs'\n"
    assert jobs.path(job, "refused").read_text() == said


def test_more_gpus_than_are_visible_are_refused():
    assert choose_gpus(2, ["0", "1", "2"], taken=["0"]) == ["1", "2"]
    with pytest.raises(UserError, match="needs 2 GPUs, and CUDA_VISIBLE_DEVICES shows 1"):
        choose_gpus(2, ["0"], taken=[])


def test_more_than_one_node_is_refused(place):
    queue = open_local(place, nodes=2)
    with pytest.raises(UserError, match="one node, the profile asks for 2"):
        queue.submit([call("note", place / "a", "x")], queue.profile.training(), "x")


def test_the_runner_runs_nothing_that_a_result_pickles(place):
    queue = open_local(place)
    attack = place / "attacked"
    (job,) = queue.submit([call("leave_pickle", attack)], ONE, "one")
    wait_until_gone(queue, [job])
    assert outcome(queue, job) == "failed"  # two results of one rank
    assert len(list((place / "logs" / job).glob("*_result.pkl"))) == 2
    assert not attack.exists()
    for result in (place / "logs" / job).glob("*_result.pkl"):
        assert result_of(result) == "success"
    assert result_of(place / "attacked.pkl") == "error"
    assert not attack.exists()
    pickle.loads((place / "attacked.pkl").read_bytes())
    assert attack.exists()  # it does attack those who load it


def test_pickles_and_job_files_are_private_under_a_permissive_umask(place):
    before = os.umask(0)
    try:
        queue = open_local(place)
        wait_until_gone(queue, queue.submit([call("note", place / "out", "x")], ONE, "x"))
    finally:
        os.umask(before)
    folders = [place / "logs", place / "queue", place / "logs/local-000001"]
    assert [stat.S_IMODE(folder.stat().st_mode) for folder in folders] == [0o700] * 3
    assert len(list(place.glob("logs/*/*.pkl"))) == 2


def test_a_folder_that_submitit_would_rewrite_is_refused(place):
    with pytest.raises(UserError, match="%"):
        open_queue(ClusterProfile(kind="local"), place / "100%j", place / "queue")


def test_a_job_of_slurm_may_still_run_though_the_local_queue_does_not_know_it(place):
    """Otherwise a change to a local profile would train running cells a second time."""
    queue = open_local(place)
    assert queue.job_states(["4711_0"])["4711_0"].state == "gone"
    assert not queue.gone_is_certain("4711_0")
    assert queue.gone_is_certain("local-000001")
