"""Units of work do not touch each other's progress, whatever happens to disks and processes."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
import weakref
import zlib
from collections import UserDict
from pathlib import Path

import pytest
import torch

from hpc.cli import UserError
from hpc.storage import checkpoint
from hpc.storage.atomic import read_json, write_json
from hpc.storage.fencing import Generation, Superseded, claim
from tests.tiny_disk import NO_ROOM, on_tiny_disk

REPOSITORY = Path(__file__).parents[3]


class Run:
    """The checkpoints of one folder, and the starts that write them."""

    def __init__(self, root: Path) -> None:
        self.folder = root / "checkpoints"
        self.claims = root / "generations"

    def start(self, *entries: str) -> Generation:
        return claim(self.claims, entries)

    def save(
        self, step: int, generation: Generation, *entries: str, resumed: int | None = None, **record
    ) -> None:
        states = {name: state_of(name, step) for name in entries}
        about = {"inputs": {}, **record}
        checkpoint.save(self.folder, step, generation, states, about, resumed)

    def resume(self, *entries: str) -> tuple[int, list[str]]:
        """Return the step from which `entries` resume, and the files passed over.

        Checks that the states are those of that step.
        """
        step, states, _, problems = checkpoint.load_latest(self.folder, entries)
        for name in entries if step else ():
            assert_equal_states(states[name], state_of(name, step))
        assert sorted(states) == (sorted(entries) if step else [])
        return step, problems

    def file(self, step: int, generation: int, name: str) -> Path:
        return self.folder / f"step-{step:09d}-g{generation}" / name

    @property
    def folders(self) -> list[str]:
        return sorted(path.name for path in self.folder.iterdir())


def state_of(name: str, step: int) -> dict[str, object]:
    numbers = torch.Generator().manual_seed(step + sum(name.encode()))
    return {
        "network": {"weight": torch.randn(5, 3, generator=numbers)},
        "momentum": {0: {"momentum_buffer": torch.randn(2, generator=numbers)}},
        "scale": 0.5 + step,
        "none": None,
    }


def assert_equal_states(one: object, other: object) -> None:
    assert type(one) is type(other)
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key, value in one.items():
            assert_equal_states(value, other[key])
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    else:
        assert one == other


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path)


def newest_steps(folder: Path) -> dict[str, int]:
    return {entry: found.step for entry, found in checkpoint.newest(folder).items()}


def test_without_checkpoints_a_job_starts_at_step_0(run):
    assert run.resume("a", "b") == (0, [])
    assert newest_steps(run.folder) == {}


def test_a_job_goes_on_from_the_newest_step(run):
    mine = run.start("a", "b")
    for step in (9, 10, 100):  # as text 10 comes before 9
        run.save(step, mine, "a", "b")
    assert run.resume("a", "b") == (100, [])
    assert run.resume("b") == (100, [])
    assert newest_steps(run.folder) == {"a": 100, "b": 100}


def test_ranks_can_agree_on_an_older_step(run):
    for step in (10, 20):
        run.save(step, run.start("a"), "a")
    found = {newest: checkpoint.load_latest(run.folder, ["a"], max_step=newest)[0]
             for newest in (20, 19, 10, 9)}  # fmt: skip
    assert found == {20: 20, 19: 10, 10: 10, 9: 0}


def test_the_record_comes_back(run):
    provenance = [{"world_size": 2, "torch": "2.10.0"}]
    run.save(5, run.start("a"), "a", provenance=provenance)
    _, _, records, _ = checkpoint.load_latest(run.folder, ["a"])
    assert [record["provenance"] for record in records] == [provenance]


def test_the_newest_and_one_to_fall_back_to_are_kept(run):
    mine = run.start("a")
    for step in (10, 20, 30, 40):
        run.save(step, mine, "a")
    assert run.folders == ["step-000000030-g1", "step-000000040-g1"]


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [cut, flip, Path.unlink])
@pytest.mark.parametrize("name", ["a.pt", "index.json"])
def test_a_damaged_checkpoint_is_named_and_the_older_one_used(run, name, damage):
    mine = run.start("a", "b")
    run.save(10, mine, "a", "b")
    run.save(20, mine, "a", "b")
    damage(run.file(20, 1, name))
    step, problems = run.resume("a", "b")
    assert step == 10
    (line,) = problems
    assert line.startswith(str(run.file(20, 1, "").parent)) and name in line
    assert "\n" not in line


def test_damage_to_one_unit_is_not_the_others_loss(run):
    mine = run.start("a", "b")
    run.save(10, mine, "a", "b")
    run.save(20, mine, "a", "b")
    flip(run.file(20, 1, "a.pt"))
    assert run.resume("b") == (20, [])
    assert run.resume("a")[0] == 10


def test_a_job_starts_over_if_all_checkpoints_are_damaged(run):
    mine = run.start("a")
    run.save(10, mine, "a")
    run.save(20, mine, "a")
    cut(run.file(10, 1, "a.pt"))
    flip(run.file(20, 1, "a.pt"))
    step, problems = run.resume("a")
    assert step == 0 and len(problems) == 2


def test_of_two_starts_at_the_same_step_the_intact_one_is_used(run):
    run.save(20, run.start("a"), "a")
    run.save(20, run.start("a"), "a")
    assert run.resume("a") == (20, [])
    flip(run.file(20, 2, "a.pt"))
    step, problems = run.resume("a")
    assert step == 20 and len(problems) == 1


def test_units_that_were_saved_apart_at_the_same_step_go_on_together(run):
    run.save(20, run.start("a"), "a", provenance=["one"])
    run.save(20, run.start("b", "c"), "b", "c", provenance=["other"])
    assert run.resume("a", "b") == (20, [])
    _, _, records, _ = checkpoint.load_latest(run.folder, ["a", "c"])
    assert sorted(record["provenance"][0] for record in records) == ["one", "other"]


def test_units_at_different_steps_go_on_from_the_last_they_share(run):
    both = run.start("a", "b")
    run.save(10, both, "a", "b")
    alone = run.start("a")
    run.save(20, alone, "a")
    assert run.resume("a", "b") == (10, [])
    assert run.resume("a") == (20, [])
    assert newest_steps(run.folder) == {"a": 20, "b": 10}


def test_a_unit_that_was_never_saved_starts_over_alone(run):
    run.save(10, run.start("a"), "a")
    assert run.resume("new") == (0, [])
    assert run.resume("a") == (10, [])


def test_without_entries_nothing_is_resumed(run):
    run.save(10, run.start("a"), "a")
    assert run.resume() == (0, [])


def test_a_start_that_was_cut_off_can_neither_save_nor_delete(run):
    stale = run.start("a", "b")
    run.save(10, stale, "a", "b")
    run.save(20, stale, "a", "b")
    successor = run.start("b", "c")
    for step in (20, 30):
        with pytest.raises(Superseded):
            run.save(step, stale, "a", "b")
    with pytest.raises(Superseded):
        checkpoint.prune(run.folder, stale, finished=["a", "b"])
    assert run.folders == ["step-000000010-g1", "step-000000020-g1"]  # nor a temporary one
    run.save(30, successor, "b", "c")
    assert run.resume("b", "c") == (30, [])


def test_a_start_that_is_cut_off_while_it_saves_publishes_nothing(run, monkeypatch):
    mine = run.start("a")
    write = checkpoint.write_json

    def a_successor_starts_meanwhile(*arguments):
        write(*arguments)
        run.start("a")

    monkeypatch.setattr(checkpoint, "write_json", a_successor_starts_meanwhile)
    with pytest.raises(Superseded):
        run.save(10, mine, "a")
    assert run.folders == []


def test_a_start_that_was_cut_off_replaces_no_file_of_tensors(run, tmp_path):
    stale, path = run.start("a"), tmp_path / "head.pt"
    checkpoint.write_tensors(path, state_of("a", 1), stale.check)
    before = path.read_bytes()
    run.start("a")
    with pytest.raises(Superseded):
        checkpoint.write_tensors(path, state_of("a", 2), stale.check)
    assert path.read_bytes() == before


def test_a_start_that_was_cut_off_removes_no_temporary_folder(run):
    stale = run.start("a")
    folder = run.folder / ".tmp-dead"
    folder.mkdir(parents=True)
    os.utime(folder, (time.time() - 7200,) * 2)
    run.start("a")
    with pytest.raises(Superseded):
        checkpoint.prune(run.folder, stale, finished=["a"])
    assert folder.exists()


def test_a_start_that_is_cut_off_while_it_deletes_stops_at_once(run, monkeypatch):
    mine = run.start("a")
    run.save(10, mine, "a")
    run.save(20, mine, "a")
    remove = checkpoint.remove_folder

    def a_successor_starts_meanwhile(path):
        remove(path)
        run.start("a")

    monkeypatch.setattr(checkpoint, "remove_folder", a_successor_starts_meanwhile)
    with pytest.raises(Superseded):
        checkpoint.prune(run.folder, mine, finished=["a"])
    assert run.folders == ["step-000000010-g1"]


def test_jobs_with_other_units_of_the_same_folder_do_not_disturb_each_other(run):
    first, second = run.start("a"), run.start("b")
    for step in (10, 20, 30):
        run.save(step, first, "a")
        run.save(step + 5, second, "b")
    assert run.resume("a") == (30, [])
    assert run.resume("b") == (35, [])
    assert run.folders == [
        "step-000000020-g1",
        "step-000000025-g2",
        "step-000000030-g1",
        "step-000000035-g2",
    ]
    checkpoint.prune(run.folder, first, finished=["a"])
    assert run.folders == ["step-000000025-g2", "step-000000035-g2"]


def test_a_start_keeps_the_checkpoints_of_other_entries(run, monkeypatch):
    others, mine = run.start("b"), run.start("a")
    with monkeypatch.context() as context:
        context.setattr(checkpoint, "prune", lambda *_, **__: None)  # it has not come to that yet
        for step in (10, 20, 30):
            run.save(step, others, "b")
    checkpoint.prune(run.folder, mine, finished=["a", "b"])
    assert len(run.folders) == 3


def test_a_damaged_checkpoint_is_not_one_of_the_two_kept(run):
    first = run.start("a")
    run.save(10, first, "a")
    run.save(20, first, "a")
    flip(run.file(20, 1, "a.pt"))
    assert run.resume("a")[0] == 10
    second = run.start("a")
    run.save(30, second, "a", resumed=10)
    assert run.folders == ["step-000000010-g1", "step-000000030-g2"]
    flip(run.file(30, 2, "a.pt"))
    assert run.resume("a")[0] == 10


def test_starting_over_makes_progress_although_damaged_ones_lie_further_on(run):
    first = run.start("a")
    for step in (20, 30):
        run.save(step, first, "a")
        flip(run.file(step, 1, "a.pt"))
    assert run.resume("a")[0] == 0
    run.save(5, run.start("a"), "a", resumed=0)
    assert run.resume("a") == (5, [])


def test_after_a_split_all_parts_together_leave_nothing_behind(run):
    together = run.start("a", "b")
    run.save(10, together, "a", "b")
    run.save(20, together, "a", "b")
    first, second = run.start("a"), run.start("b")
    for step in (30, 40):
        run.save(step, first, "a", resumed=20)
    assert run.resume("b") == (20, [])  # it has not begun yet
    assert not run.file(10, 1, "a.pt").exists()
    checkpoint.prune(run.folder, first, finished=["a"])
    assert run.resume("b") == (20, [])
    for step in (30, 40):
        run.save(step, second, "b", resumed=20)
    assert run.folders == ["step-000000030-g3", "step-000000040-g3"]
    checkpoint.prune(run.folder, second, finished=["b"])
    assert run.folders == []


def test_after_a_split_the_part_that_goes_on_leaves_the_others_progress(run):
    together = run.start("a", "b")
    run.save(10, together, "a", "b")
    alone = run.start("a")
    for step in (20, 30, 40):
        run.save(step, alone, "a")
    checkpoint.prune(run.folder, alone, finished=["a"])
    assert run.resume("b") == (10, [])
    assert run.folders == ["step-000000010-g1"]


def test_finished_entries_are_removed_and_others_stay(run):
    mine = run.start("a", "b")
    run.save(10, mine, "a", "b")
    run.save(20, mine, "b")
    checkpoint.prune(run.folder, mine, finished=["a"])
    assert run.resume("b") == (20, [])
    checkpoint.prune(run.folder, mine, finished=["a", "b"])
    assert run.folders == []


def test_a_later_starts_files_are_never_deleted(run):
    older = run.start("a")
    newer = Generation(run.claims, 5, frozenset(["a"]))  # its claim is not to be seen yet
    run.save(10, newer, "a")
    checkpoint.prune(run.folder, older, finished=["a"])
    assert run.folders == ["step-000000010-g5"]


def test_foreign_files_are_left_alone(run):
    run.folder.mkdir()
    (run.folder / "notes.txt").write_text("mine")
    (run.folder / "step-5").mkdir()
    (run.folder / "step-000000099-g1.bak").mkdir()
    mine = run.start("a")
    run.save(10, mine, "a")
    assert run.resume("a") == (10, [])
    checkpoint.prune(run.folder, mine, finished=["a"])
    assert run.folders == ["notes.txt", "step-000000099-g1.bak", "step-5"]


def test_saving_a_step_twice_is_saving_it_once(run):
    mine = run.start("a")
    run.save(10, mine, "a")
    before = run.file(10, 1, "a.pt").stat().st_mtime_ns
    run.save(10, mine, "a")
    assert run.file(10, 1, "a.pt").stat().st_mtime_ns == before


def test_an_entry_is_tensors_and_plain_values_only(run, tmp_path):
    """`weights_only` refuses a file that could run code, even with a valid checksum."""
    run.save(10, run.start("a"), "a")
    path = run.file(10, 1, "a.pt")
    assert_equal_states(torch.load(path, weights_only=True), state_of("a", 10))
    torch.save({"a": Path("x")}, path)
    index = read_json(run.file(10, 1, "index.json"))
    index["entries"]["a"] = f"crc32:{zlib.crc32(path.read_bytes()):08x}"
    write_json(run.file(10, 1, "index.json"), index)
    step, (line,) = run.resume("a")
    assert (
        step == 0
        and line == f"{path} was not written by lossgrid (as a state it gives UnpicklingError)"
    )


def test_the_same_state_is_the_same_bytes(run, tmp_path):
    for name in ("x.pt", "longer-name.pt"):
        checkpoint.write_tensors(tmp_path / name, state_of("a", 1))
    assert (tmp_path / "x.pt").read_bytes() == (tmp_path / "longer-name.pt").read_bytes()


def test_a_large_unit_comes_back_and_its_checksum_is_that_of_its_file(run):
    weights = torch.randn(1000, 1000)
    checkpoint.save(run.folder, 1, run.start("a"), {"a": {"weights": weights}}, {})
    content = run.file(1, 1, "a.pt").read_bytes()
    index = read_json(run.file(1, 1, "index.json"))
    assert index["entries"] == {"a": f"crc32:{zlib.crc32(content):08x}"}
    step, states, _, problems = checkpoint.load_latest(run.folder, ["a"])
    assert (step, problems) == (1, [])
    assert torch.equal(states["a"]["weights"], weights)


class Made(UserDict):
    """States that are made when they are read, as copies from a GPU are."""

    def __init__(self, names):
        super().__init__(dict.fromkeys(names))
        self.alive = weakref.WeakSet()
        self.most = 0

    def __getitem__(self, name):
        weight = torch.full((1000,), float(ord(name)))
        self.alive.add(weight)
        self.most = max(self.most, len(self.alive))
        return {"weight": weight}


def test_one_state_at_a_time_is_in_memory(run):
    states = Made("abc")
    checkpoint.save(run.folder, 1, run.start("a", "b", "c"), states, {})
    assert states.most == 1 and not states.alive
    _, loaded, _, _ = checkpoint.load_latest(run.folder, "abc")
    assert {name: state["weight"][0].item() for name, state in loaded.items()} == {
        "a": 97, "b": 98, "c": 99,
    }  # fmt: skip


def test_saving_leaves_torchs_options_unchanged(run):
    before = torch.serialization.get_crc32_options()
    run.save(1, run.start("a"), "a")
    assert torch.serialization.get_crc32_options() == before


def test_folders_of_a_killed_writer_are_removed_after_an_hour(run):
    mine = run.start("a")
    run.save(10, mine, "a")
    for name, age in (("dead", 7200), ("slow", 60)):
        folder = run.folder / f".tmp-{name}"
        folder.mkdir()
        (folder / "a.pt").write_bytes(bytes(1000))
        for path in (folder / "a.pt", folder):
            os.utime(path, (time.time() - age,) * 2)
    run.save(20, mine, "a")
    assert run.folders == [".tmp-slow", "step-000000010-g1", "step-000000020-g1"]
    assert run.resume("a") == (20, [])


KILLED = """
import sys, time
from pathlib import Path
import torch
from hpc.storage import checkpoint
from hpc.storage.fencing import claim
root = Path(sys.argv[1])
mine = claim(root / "generations", ["a"])
class Slow(dict):
    def __getitem__(self, name):
        if name == "b":
            print("writing", flush=True)
            time.sleep(60)
        return {"weight": torch.zeros(1000)}
checkpoint.save(root / "checkpoints", 20, mine, Slow(a=None, b=None), {})
"""


def test_a_writer_killed_in_the_middle_leaves_the_older_checkpoint(run, tmp_path):
    run.save(10, run.start("a"), "a")
    line = [sys.executable, "-c", KILLED, str(tmp_path)]
    writer = subprocess.Popen(line, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
    assert writer.stdout
    assert writer.stdout.readline() == "writing\n"
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    writer.stdout.close()
    assert run.resume("a") == (10, [])
    run.save(20, run.start("a"), "a")
    assert run.resume("a") == (20, [])


FULL = """
import sys
from pathlib import Path
import torch
from hpc.storage import checkpoint
from hpc.cli import UserError
from hpc.storage.fencing import claim
disk = Path(sys.argv[1])
mine = claim(disk / "generations", ["a"])
checkpoint.save(disk / "checkpoints", 10, mine, {"a": {"weight": torch.ones(10_000)}}, {})
large = {"weight": torch.zeros(200_000)}
for attempt in (
    lambda: checkpoint.save(disk / "checkpoints", 20, mine, {"a": large}, {}),
    lambda: checkpoint.write_tensors(disk / "checkpoints" / "head.pt", large),
):
    try:
        attempt()
    except UserError as error:
        print(error)
step, states, _, problems = checkpoint.load_latest(disk / "checkpoints", ["a"])
print(step, states["a"]["weight"].sum().item(), problems)
print(*sorted(path.name for path in (disk / "checkpoints").iterdir()))
"""


def test_a_full_disk_leaves_the_older_checkpoint_and_gives_one_line(tmp_path):
    done = on_tiny_disk(FULL, tmp_path)
    assert done.returncode == 0, done.stderr
    *refusals, resumed, left = done.stdout.splitlines()
    for name, line in zip(["step-000000020-g1", "head.pt"], refusals, strict=True):
        start = re.escape(f"cannot write {tmp_path / 'checkpoints' / name}: ")
        assert re.fullmatch(f"{start}{NO_ROOM}; free space or fix permissions, run again", line)
    assert resumed == "10 10000.0 []"
    assert left == "step-000000010-g1"


def test_planning_reads_steps_without_torch(run):
    run.save(10, run.start("a"), "a")
    code = (
        "import sys; from pathlib import Path; from hpc.storage.checkpoint import newest\n"
        "print(newest(Path(sys.argv[1]))['a'].step, 'torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(run.folder)],
        cwd=REPOSITORY, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout == "10 False\n"


def test_a_folder_that_cannot_be_written_is_a_users_mistake(run):
    run.folder.parent.mkdir(exist_ok=True)
    run.folder.write_text("a file in the way")
    with pytest.raises(UserError, match=r"cannot write .*checkpoints/step-000000010-g1"):
        run.save(10, run.start("a"), "a")
