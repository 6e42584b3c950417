"""The exit cause of a job is found from the queue's last word and the job's logs."""

from __future__ import annotations

import pytest

from hpc.scheduler.exit_cause import exit_cause, traceback_at
from hpc.scheduler.job import START_PREFIX

AT = "2026-01-01T00:00:00"
TIME_LIMIT = f"slurmstepd-n1: error: *** STEP 12.0 ON n1 CANCELLED AT {AT} DUE TO TIME LIMIT ***"
PREEMPTION = f"slurmstepd-n1: error: *** JOB 12 ON n1 CANCELLED AT {AT} DUE TO PREEMPTION ***"
NODE_FAILURE = (
    f"slurmstepd: error: *** JOB 12 ON n1 CANCELLED AT {AT} DUE TO NODE FAILURE, SEE SLURMCTLD LOG "
    "FOR DETAILS ***"
)
CANCELLED = f"slurmstepd-n1: error: *** JOB 12 ON n1 CANCELLED AT {AT} ***"
STEP_ENDED = f"slurmstepd-n1: error: *** STEP 12.0 ON n1 CANCELLED AT {AT} ***"
OOM_KILL = (
    "slurmstepd-n1: error: Detected 1 oom_kill event in StepId=12.0. Some of the step tasks have "
    "been OOM Killed."
)
LOST_PEER = (
    "Traceback (most recent call last):\n  File \"train.py\", line 1, in f\n    f()\n"
    "RuntimeError: [pair.cc:534] Connection closed by peer [10.0.0.1]:2891"
)  # fmt: skip
BUG = 'Traceback (most recent call last):\n  File "a.py", line 1, in f\n    f()\nValueError: boom'


@pytest.fixture
def ended(tmp_path):
    def told(*ranks: str, word: str = "") -> tuple[str, str]:
        logs = [tmp_path / f"{number}.err" for number in range(len(ranks))]
        for log, text in zip(logs, ranks, strict=True):
            log.write_text(text + "\n" if text else "")
        return tuple(exit_cause(word, logs))

    return told


@pytest.mark.parametrize(
    ("word", "cause"),
    [
        ("NODE_FAIL", "node failure"),
        ("PREEMPTED", "preemption"),
        ("TIMEOUT", "time limit"),
        ("OUT_OF_MEMORY", "out of memory"),
        ("CANCELLED", "cancelled"),
        ("cancelled", "cancelled"),
        ("COMPLETED", "unknown"),
        ("", "unknown"),
    ],
)
def test_the_queues_word_is_enough(ended, word, cause):
    assert ended(word=word) == (cause, "")
    assert ended("step 5 of 10", word=word) == (cause, "")


@pytest.mark.parametrize(
    ("line", "cause"),
    [
        (TIME_LIMIT, "time limit"),
        (PREEMPTION, "preemption"),
        (NODE_FAILURE, "node failure"),
        ("srun: error: Node failure on n2", "node failure"),
        (CANCELLED, "cancelled"),
        (OOM_KILL, "out of memory"),
        ("srun: error: n1: task 0: Out Of Memory", "out of memory"),
        ("slurmstepd: error: Job 12 exceeded memory limit (9 > 8), being killed", "out of memory"),
        ("srun: error: n1: task 1: Killed", "killed"),
        ("srun: error: n1: tasks 0-3: Killed", "killed"),
        ("srun: error: n1: task 0: Segmentation fault (core dumped)", "error"),
        ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB", "out of memory"),
        ("[rank0]: torch.OutOfMemoryError: CUDA out of memory.", "out of memory"),
        ("RuntimeError: CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate`",
         "out of memory"),
        # a broken installation says the same
        ("RuntimeError: cuDNN error: CUDNN_STATUS_NOT_INITIALIZED", "error"),
        ("RuntimeError: GET was unable to find an engine to execute this computation", "error"),
        ("MemoryError", "out of memory"),
        ("numpy._core._exceptions._ArrayMemoryError: Unable to allocate", "out of memory"),
        ("RuntimeError: DefaultCPUAllocator: can't allocate memory", "out of memory"),
        ("terminate called after throwing an instance of 'std::bad_alloc'", "out of memory"),
        ("error: data/x is damaged; fix it", "error"),
        ("task1 (generation 2): stopped by SIGUSR2 after step 3 of 9", "time limit"),
        ("task1 (generation 2): stopped by SIGTERM after step 3 of 9", "killed"),
    ],
)  # fmt: skip
def test_without_a_word_the_logs_tell_and_name_the_line(ended, line, cause):
    assert ended(f"step 5 of 10\n{line}", "") == (cause, line)
    assert ended("step 5 of 10", line) == (cause, line)


def test_other_lines_of_a_log_are_no_exit_cause(ended):
    assert ended("a warning: there is no memory to pin", "step 5 of 10") == ("unknown", "")


def test_an_out_of_memory_rank_explains_all_other_errors(ended):
    """Its peers lose it, srun ends them, and the user cancels the rest."""
    rank0 = f"{LOST_PEER}\nsrun: error: n1: task 1: Out Of Memory\n{STEP_ENDED}\n{CANCELLED}"
    assert ended(rank0, OOM_KILL, word="CANCELLED")[0] == "out of memory"


@pytest.mark.parametrize(
    "why",
    [
        "Cuda failure 2 'out of memory'",
        "Cuda failure 'out of memory'",  # older releases
        "Failed to CUDA calloc 6291456 bytes",
        "Failed to CUDA calloc async 608 bytes",
        "Failed to CUDA host alloc 4096 bytes",
    ],
)
def test_nccl_without_memory_is_no_lost_peer(ended, why):
    """Its error has the same name for both, and says why in the last of several lines."""
    error = (
        "[rank0]: torch.distributed.DistBackendError: NCCL error in: NCCLUtils.cpp:94, unhandled "
        "cuda error (run with NCCL_DEBUG=INFO for details), NCCL version 2.27.5"
    )
    trace = f"[rank0]: Traceback (most recent call last):\n{error}"
    assert ended(f"{trace}\n[rank0]: Last error:\n[rank0]: {why}", LOST_PEER) == (
        "out of memory",
        f"[rank0]: {why}",
    )
    closed = f"{trace}\n[rank0]: Last error:\n[rank0]: socketProgress: Connection closed by peer"
    assert ended(closed, LOST_PEER) == ("killed", error)


def test_a_rank_that_only_lost_its_peer_has_no_error_of_its_own(ended):
    missed = "RuntimeError: [pair.cc:534] Connection closed by peer [10.0.0.1]:2891"
    assert ended(LOST_PEER, "step 5 of 10") == ("killed", missed)
    assert ended(LOST_PEER, BUG) == ("error", "ValueError: boom")
    loader = "error: loader process 7 was killed by signal 9 (Killed), perhaps for want of memory"
    assert ended(LOST_PEER, loader) == ("killed", loader)
    lost = f"{LOST_PEER}\n{NODE_FAILURE}"
    assert ended(lost)[0] == "node failure"


def test_the_rank_that_ended_first_tells_a_kill_from_an_error(ended):
    """srun ends the others, and they look killed too."""
    killed = "srun: error: n1: task 1: Killed\nsrun: error: n1: task 0: Exited with exit code 1"
    assert ended(f"{LOST_PEER}\n{killed}") == ("killed", "srun: error: n1: task 1: Killed")
    failed = "srun: error: n1: task 0: Exited with exit code 2\nsrun: error: n1: task 1: Killed"
    mistake = f"error: no such folder\n{STEP_ENDED}\n{failed}"
    assert ended(mistake, word="FAILED") == ("error", "error: no such folder")


def test_an_error_is_named_by_its_line(ended):
    assert ended(BUG) == ("error", "ValueError: boom")
    more_lines = f"{BUG}\nCompile with more checks to see more."
    assert ended(more_lines) == ("error", "ValueError: boom")
    assert ended(BUG, "error: disk full; make room") == ("error", "error: disk full; make room")
    assert ended("bash: module: command not found", word="FAILED") == (
        "error",
        "bash: module: command not found",
    )
    assert ended(word="FAILED") == ("error", "it failed without a word")


def test_a_rank_of_the_local_queue_that_left_neither_result_nor_error_was_killed(ended):
    assert ended("step 5 of 10", word="failed") == ("killed", "")
    assert ended("error: disk full", "", word="failed") == ("error", "error: disk full")


def test_only_the_last_start_counts(ended):
    """A requeued job appends to its logs."""
    first = f"{START_PREFIX}12-0-0: rank 0 of 2 on n1\n{OOM_KILL}\n{TIME_LIMIT}\nerror: disk full"
    second = f"{START_PREFIX}12-1-0: rank 0 of 2 on n2\nstep 6 of 10"
    assert ended(first)[0] == "out of memory"
    assert ended(f"{first}\n{second}") == ("unknown", "")
    assert ended(f"{first}\n{second}\n{PREEMPTION}") == ("preemption", PREEMPTION)


def test_a_log_that_is_not_there_tells_nothing(tmp_path):
    assert exit_cause("", [tmp_path / "none"]) == ("unknown", "")


def test_an_exception_that_was_ignored_is_no_traceback():
    ignored = ["Exception ignored in: <function f>", "Traceback (most recent call last):", "E: x"]
    assert traceback_at(ignored) is None
    assert traceback_at([*ignored, "Traceback (most recent call last):"]) == 3
