"""The doctor's checks of a Slurm site. Each is broken once, by the profile or by the site: its line
says FAIL and what to do, and no other line does."""

from __future__ import annotations

import pytest

from hpc.scheduler.cluster_profile import ClusterProfile
from hpc.scheduler.job import ModuleCall
from hpc.scheduler.slurm import SlurmQueue
from tests.hpc.scheduler.hostile import HOSTILE
from tests.pipeline.doctor.fake_site import CONFIG, PROFILE
from tests.pipeline.doctor.lines import failures, only_failure


def test_sbatch_tests_the_scripts_that_grid_would_submit(examine, site, tmp_path, monkeypatch):
    for name, value in HOSTILE.items():
        monkeypatch.setenv(name, value)
    extra = {"reservation": "course", "exclusive": True}
    lines = examine(extra=extra)[1]
    assert [
        line for line in lines if line.startswith("warn  options in the shell: SBATCH_CLUSTERS,")
    ]
    words = site.asked("sbatch")
    assert [word[0] for word in words] == ["--test-only"] * len(words)
    assert site.variables()["sbatch"] & HOSTILE.keys() == set()
    queue = SlurmQueue(ClusterProfile(**{**PROFILE, "extra": extra}), tmp_path / "run" / "logs")
    sent = [(2, queue.profile.training()), (1, queue.profile.single())]
    assert len(words) == len(sent)
    for number, (calls, wanted) in enumerate(sent):
        queue.submit([ModuleCall("x")] * calls, wanted, "doctor", token="trial")
        assert site.options(number) == site.options(len(sent) + number)


THREE = "nodes = 2, but only 0 of the partition's 3 have"
# what is asked for; the check that fails, and what it says
PROFILES = [
    ({"partition": "gpus"}, "partition", "there is no partition 'gpus'; did you mean 'gpu'?"),
    ({"account": "visions"}, "account", "account = 'visions' is no account of "),
    ({"qos": "longer"}, "quality of service", "there is no quality of service 'longer'; did you"),
    ({"qos": "gold"}, "quality of service", "you may not use qos = 'gold', only long, normal"),
    ({"minutes": 1441}, "time limit", "minutes = 1441, but the partition gpu allows 1440; set"),
    ({"constraint": "a100"}, "features of the nodes", f"{THREE} the features 'a100'; there are"),
    ({"constraint": "v100&big"}, "features of the nodes", f"{THREE} the features 'v100&big'; "),
    ({"cpus_per_task": 11}, "CPUs of a node", f"{THREE} 44 CPUs; the most is 40, so set tasks_"),
    ({"memory_gb": 188}, "memory of a node", f"{THREE} 192512 MB of memory; the most is 192000"),
    ({"gres": "gpu:a100:4"}, "GPUs of a node", f"{THREE} 4 GPUs of kind a100; the most is 0, so"),
    ({"gres": "", "gpus_per_node": 5, "qos": "normal"}, "GPUs of a node", f"{THREE} 5 GPUs; the"),
    ({"mpi": "pmi3"}, "MPI type", "srun has no MPI type 'pmi3'; did you mean"),
    ({"setup": ["if true; then"]}, "set-up lines", "the shell cannot read them ("),
    ({"max_jobs": 151}, "jobs in the queue", "max_jobs = 151, but the qos long lets you have 150"),
]


@pytest.mark.parametrize(("profile", "what", "said"), PROFILES)
def test_a_profile_that_asks_for_something_missing(examine, profile, what, said):
    assert only_failure(examine(**profile)).startswith(f"{what}: {said}")


@pytest.mark.parametrize("profile", [
    {"constraint": "a100|v100"},
    {"constraint": "[rack1*2&rack2*2]"},  # for sbatch to judge
    {"partition": "cpu,gpu"},
    {"partition": None, "qos": None},  # the default partition has such nodes too
    {"gres": "", "mpi": None, "account": "teaching", "qos": "normal", "minutes": 1440},
])  # fmt: skip
def test_a_profile_in_other_notation_passes(examine, profile):
    assert examine(**profile)[0] == 0


def test_a_profile_without_requeueing_is_a_warning(examine):
    code, lines = examine(extra={"requeue": False})
    assert code == 0
    assert [x for x in lines if x.startswith("warn  requeueing: requeue is off in the profile")]


def test_too_many_nodes(examine):
    two_gpus = {"gpus_per_node": 2, "tasks_per_node": 2, "gres": "gpu:v100:2"}
    assert examine(nodes=4, exclude="", **two_gpus)[0] == 0
    assert only_failure(examine(nodes=4, **two_gpus)).startswith(
        "nodes of the partition: nodes = 4, but the partition has 3, without those that it excludes"
    )


def test_more_in_one_job_than_accounting_allows(examine):
    found = examine(nodes=3)
    assert only_failure(found).startswith(
        "limits of one job: a job takes gres/gpu = 12, but the qos long allows 8; ask for less"
    )


SHORT = "minutes = 1200, but"
REFUSED = "sbatch: error: Batch job submission failed: Job violates policy"
SITES = [
    ("partition", {"state": "DOWN"}, "partition", "the partition 'gpu' is DOWN; choose another"),
    ("partition", {"accounts": "physics"}, "partition", "the partition 'gpu' does not take 'visi"),
    ("partition", {"time": "10:00:00"}, "time limit", f"{SHORT} the partition gpu allows 600; set"),
    (
        "partition",
        {"most": "1"},
        "nodes of the partition",
        "nodes = 2, but the partition gpu gives",
    ),
    (
        "qos",
        "long||12:00:00|\n",
        "time limit",
        f"{SHORT} the qos long allows 720; set minutes = 720",
    ),
    ("assoc", "vision||long|200|30|\n", "time limit", f"{SHORT} the account vision allows 30; set"),
    ("assoc", "", "account", "accounting knows no account of "),
    (
        "mpi",
        "srun: MPI types are...\nsrun: none\nsrun: openmpi\n",
        "MPI type",
        "srun has no MPI ty",
    ),
    ("refuse", REFUSED, "a training job, as sbatch sees it", f"sbatch says: {REFUSED}; fix what"),
]


@pytest.mark.parametrize(("where", "change", "what", "said"), SITES)
def test_a_site_that_has_or_allows_less(examine, site, where, change, what, said):
    if isinstance(change, dict):
        site.partition(**change)
    else:
        site.answer(where, change)
    assert only_failure(examine()).startswith(f"{what}: {said}")


def test_nodes_that_are_down_are_a_warning(examine, site):
    site.node(state="DOWN*+DRAIN")
    code, lines = examine(nodes=3, gpus_per_node=2, tasks_per_node=2, gres="gpu:v100:2")
    assert code == 0
    (line,) = [line for line in lines if line.startswith("warn")]
    assert line.startswith("warn  nodes that are up: n1 cannot take jobs now, which leaves 2 of 3")


def test_without_accounting_its_checks_are_left_out(examine, site):
    site.answer("accounting_is_off")
    code, lines = examine(max_jobs=0)
    assert code == 0
    skipped = [line.split(":")[0] for line in lines if "accounting does not answer" in line]
    assert skipped == ["skip  account", "skip  quality of service", "skip  limits of one job"]


def test_no_account_is_needed_if_slurm_wants_none(examine, site):
    site.answer("assoc", "")
    site.answer("config", CONFIG.format("none"))
    code, lines = examine()
    assert code == 0
    assert [line for line in lines if line.startswith("skip  account: accounting knows no account")]


def test_a_controller_that_does_not_answer_fails_once_and_the_rest_goes_on(examine, site):
    site.answer("silent")
    code, lines = examine()
    assert code == 1
    (failure,) = failures(lines)
    assert failure.startswith("scheduler: scontrol failed: slurm_load: Unable to contact")
    assert [line for line in lines if line.startswith("pass  data set streets")]


def test_without_slurm_the_files_are_checked_all_the_same(examine, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    found = examine()
    assert only_failure(found).startswith("scheduler: there is no sbatch on PATH; use a login")
