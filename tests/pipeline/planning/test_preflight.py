"""A user's mistake is refused before anything is queued: one line that says what, where, and what
to do, exit code 2, and no traceback."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest

from data_prep import pack as packing
from hpc.cli import UserError
from pipeline import reduce, status, submit
from pipeline.config.grid_file import find_config
from tests.pipeline.grids import grid_file

REPOSITORY = Path(__file__).parents[3]
LOSS = '\n[[loss]]\nname = "mine"\n'
TERMS = f'{LOSS}terms = ["DL", "CE"]\n'
WEIGHTS = 'weights = "none"'


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("seeds =", "seedz ="), "unknown key 'seedz'; did you mean 'seeds'?"),
        (("seeds = [0, 1]\n", ""), "the key 'seeds' is missing"),
        (("seeds = [0, 1]", "seeds = 3"), "seeds: Input should be a valid list, not 3"),
        (("seeds = [0, 1]", "seeds = []"), "seeds: List should have at least 1 item, not 0"),
        (("seeds = [0, 1]", "seeds = [0, 1, 0]"), "seeds names 0 twice; once is enough"),
        (('"DLNWCE"', '"DLNWCE", "CE"'), "losses names 'CE' twice; once is enough"),
        (('"deeplabv3_mobilenet', '"fcn_mobilenet'), "models names 'fcn_mobilenet_v3_large' twice"),
        (('"deeplabv3_mobilenet', '"deeplab_mobilenet'), (
            "unknown model 'deeplab_mobilenet_v3_large'; did you mean 'deeplabv3_mobilenet_v3")),
        (('"DLNWCE"', '"DLNWCX"'), "unknown loss 'DLNWCX'; did you mean 'DLNWCE' or"),
        (('losses = ["CE", "DLNWCE"]', "losses = []"), "no loss; add losses = [...] or a table"),
        (("epochs = 2", "epoch = 2"), "[protocol]: unknown key 'epoch'; did you mean 'epochs'?"),
        (("epochs = 2", 'epochs = "2"'), "[protocol]: epochs: Input should be a valid integer"),
        (("epochs = 2", "epochs = 0"), "[protocol]: epochs: Input should be greater than or equal"),
        (("epochs = 2", "learning_rate = nan"), "[protocol]: learning_rate: Input should be a fin"),
        (("epochs = 2", "naive_ramp = [0.9, 0.3]"), "[protocol]: naive_ramp must be [start, end]"),
        (('"small"', '" "'), "name: must be one line of text, and not blank"),
        (("crop = [32, 32]", "crop = [16, 32]"), "crop has a side of 16 pixels for the data set"),
        (("resize = [32, 40]", "resize = [9, 40]"), "resize has a side of 9 pixels for the data"),
        (("eval_size = 0", "eval_size = 1"), "16 x 16 are one position to fcn_mobilenet_v3_large"),
        (("epochs = 2", "epochs = 2\nper_datset = {}"), "unknown key 'per_datset'; did you mean"),
        (("resize = [32, 40]", "resize = [40, 32]"), "[protocol]: resize must be [smallest, larg"),
        (("threads = 1", "pretrain = {epoch = 3}"), (
            "[protocol]: unknown key 'pretrain.epoch'; did you mean 'epochs'?")),
        (("threads = 1", "per_dataset = {street = {epochs = 3}}"), (
            "[protocol.per_dataset.street]: no such data set; did you mean 'streets'?")),
        (("threads = 1", "per_dataset = {streets = {epoch = 3}}"), (
            "[protocol.per_dataset.streets]: unknown key 'epoch'; did you mean 'epochs'?")),
        (("threads = 1", "per_dataset = {streets = 3}"), "streets] must be a table, not 3"),
        (("threads = 1", "per_dataset = 3"), "[protocol.per_dataset] must be a table, not 3"),
        (('source = "synthetic"', 'source = "sintetic"'), (
            "[dataset.streets]: unknown source 'sintetic'; did you mean 'synthetic'?")),
        (('source = "synthetic"', "source = [1]"), (
            "unknown source [1]; valid: cityscapes, coco, folder, sbd, synthetic, voc")),
        (("val = 3", "vals = 3"), "[dataset.streets]: unknown key 'vals'; did you mean 'val'?"),
        (("val = 3", "val = 0"), "[dataset.streets]: val: Input should be greater than or equal"),
        (('kind = "local"', "local_job = 2"), "[cluster]: unknown key 'local_job'; did you mean"),
        (('kind = "local"', 'kind = "pbs"'), "[cluster]: kind: Input should be 'auto', 'slurm' or"),
    ],
)  # fmt: skip
def test_a_grid_file_with_something_wrong_in_it(tmp_path, refusal, change, message):
    path = grid_file(tmp_path, change)
    said = refusal(submit.main, "grid", path)
    assert said.startswith(f"{path}: ")
    assert message in said


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (f"{LOSS}term = ['CE']", "[[loss]]: unknown key 'term'; did you mean 'terms'?"),
        (f"{LOSS}terms = []", "[[loss]]: terms: List should have at least 1 item, not 0"),
        (f"{LOSS}terms = ['CX']", (
            "[[loss]] 'mine': unknown term 'CX'; valid: CE, CEMP, DL, FL, FLMP, TL, WCE")),
        (f"{LOSS}terms = ['DLNCE']", "unknown term 'DLNCE'"),
        (f"{TERMS}schedule = [3]", "[[loss]]: schedule.0: Input should be a valid table, not 3"),
        (f"{TERMS}schedule = [{{weights = [1, 0]}}]", "schedule: the key 'at' is missing"),
        (f"{TERMS}schedule = [{{at = 0, weight = [1, 0]}}]", "schedule: unknown key 'weight'; did"),
        (f"{TERMS}schedule = [{{at = 0, weights = [1]}}]", "schedule needs 2 weights at each"),
        (f"{TERMS}schedule = [{{at = 2, weights = [1, 0]}}]", "at: Input should be less than or"),
        (f"{TERMS}schedule = [{{at = 0, weights = [nan, 0]}}]", "weights.0: Input should be a fin"),
        (f"{TERMS}schedule = [{{at = 0, weights = [1, -1]}}]", "weights.1: Input should be great"),
        (f"{TERMS}schedule = [{{at = 0, weights = [1, 0], ramp = 'sine'}}]", (
            "ramp: Input should be 'constant', 'linear' or 'cosine', not 'sine'")),
        (f"{TERMS}schedule = [{{at = 0.5, weights = [1, 0]}}, {{at = 0.5, weights = [0, 1]}}]", (
            "the places of the schedule (at) must rise")),
        (TERMS + TERMS, "[[loss]] 'mine': another loss has that name already; choose another"),
        (TERMS.replace("mine", "WFL"), "[[loss]] 'WFL': that name means a loss of the paper"),
        (TERMS.replace("mine", "CE"), "[[loss]] 'CE': another loss has that name already"),
        (TERMS.replace("[[loss]]", "[loss]"), "loss: Input should be a valid list"),
    ],
)  # fmt: skip
def test_a_composed_loss_that_does_not_fit_together(tmp_path, refusal, table, message):
    path = grid_file(tmp_path, more=table)
    said = refusal(submit.main, "grid", path)
    assert said.startswith(f"{path}: ")
    assert message in said


def test_a_grid_without_end(tmp_path, refusal):
    seeds = ("seeds = [0, 1]", f"seeds = {list(range(250_001))}")
    said = refusal(submit.main, "grid", grid_file(tmp_path, seeds))
    assert said.endswith("1000004 cells are more than 1000000; split the grid")


@pytest.mark.parametrize(
    ("run_dir", "shards", "root"),
    [("streets", "streets", ""), ("run", "a", "run"), ("run", "a/../b", "x/../b"), ("l", "a", "")],
)
def test_two_things_in_one_folder(tmp_path, refusal, run_dir, shards, root):
    (tmp_path / "a").mkdir()
    (tmp_path / "l").symlink_to("a")
    path = grid_file(
        tmp_path,
        (f'"{tmp_path}/run"', f'"{run_dir}"'),
        (f'shards = "{tmp_path}/streets"', f'shards = "{shards}"\nroot = "{root}"'),
    )
    assert "; give each its own" in refusal(submit.main, "grid", path)


def test_a_profile_that_is_not_there(tmp_path, refusal):
    (tmp_path / "clusters").mkdir()
    (tmp_path / "clusters/v100.toml").write_text("minutes = 5\n")
    path = grid_file(tmp_path)
    said = refusal(submit.main, "grid", path, "--cluster", "v10")
    assert said == "there is no cluster profile 'v10'; did you mean 'v100'?"
    said = refusal(status.main, path, "--cluster", "./mine.toml")
    assert said == "cannot read mine.toml: No such file or directory"
    (tmp_path / "clusters/v100.toml").write_text("minute = 5\n")
    said = refusal(submit.main, "grid", path, "--cluster", "v100")
    assert said == f"{tmp_path}/clusters/v100.toml: unknown key 'minute'; did you mean 'minutes'?"


def test_a_run_directory_that_cannot_be(tmp_path, refusal):
    (tmp_path / "notes").write_text("a file")
    run_dir = f'run_dir = "{tmp_path}/run"'
    path = grid_file(tmp_path, (run_dir, 'run_dir = "notes"'))
    said = refusal(submit.main, "grid", path)
    assert said == (
        f"cannot write into {tmp_path}/notes: File exists; set run_dir to a folder of yours"
    )
    path = grid_file(tmp_path, (run_dir, 'run_dir = "run%j"'))
    assert "has '%' in its path" in refusal(submit.main, "grid", path)


def test_weights_that_are_not_on_the_disk(tmp_path, refusal):
    path = grid_file(tmp_path, (WEIGHTS, 'weights = "imagenet"'))
    file = tmp_path / "no weights/hub/checkpoints/mobilenet_v3_large-8738ca79.pth"
    expected = f"weights = 'imagenet' needs {file}; fetch it where there is internet with `python"
    assert refusal(submit.main, "all", path).startswith(expected)
    assert packing.main([str(path)]) == 0
    assert refusal(submit.main, "grid", path).startswith(expected)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ("coco", "no 'coco' weights are published for 'fcn_mobilenet_v3_large'; did you mean"),
        (
            "imagnet",
            "weights = 'imagnet' is neither imagenet, coco, pre-fine, none or pretrain nor a file",
        ),
        (
            "mine/w.pt",
            "weights = 'mine/w.pt' is neither imagenet, coco, pre-fine, none or pretrain nor a",
        ),
    ],
)
def test_weights_that_do_not_exist(tmp_path, refusal, weights, message):
    path = grid_file(tmp_path, (WEIGHTS, f'weights = "{weights}"'))
    assert packing.main([str(path)]) == 0
    assert refusal(submit.main, "grid", path).startswith(message)


def test_a_disk_without_room_for_what_training_leaves(tmp_path, refusal, monkeypatch):
    path = grid_file(tmp_path, ("val = 3", "val = 5"))  # with all classes: nothing to warn of
    assert packing.main([str(path)]) == 0
    usage = namedtuple("usage", "total used free")(10**12, 10**12 - 10**8, 10**8)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    assert re.fullmatch(
        rf"{re.escape(str(tmp_path))}/run needs \d\.\d GB for heads and checkpoints, but "
        rf"{re.escape(str(tmp_path))}/run has 0\.1 GB free; make room or set run_dir to another "
        r"disk",
        refusal(submit.main, "grid", path),
    )


def test_no_grid_file_at_all(tmp_path, refusal):
    assert refusal(submit.main, "grid") == (
        "no grid file: give one, set LOSSGRID_CONFIG, or change to a folder with lossgrid.toml"
    )
    (tmp_path / "configs").mkdir()
    for name in ("b.toml", "a.toml", "notes.md"):
        (tmp_path / "configs" / name).touch()
    assert refusal(submit.main, "grid").endswith("; there are configs/a.toml, configs/b.toml")
    assert refusal(status.main, "c\n.toml") == (
        "there is no grid file c\\n.toml; there are configs/a.toml, configs/b.toml"
    )
    assert refusal(reduce.main, tmp_path).startswith(f"there is no grid file {tmp_path}; ")


def test_the_grid_file_is_the_one_given_else_the_environments_else_the_folders(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LOSSGRID_CONFIG", raising=False)
    for name in ("given.toml", "environment.toml", "lossgrid.toml"):
        (tmp_path / name).touch()
    assert find_config(None) == Path("lossgrid.toml")
    monkeypatch.setenv("LOSSGRID_CONFIG", "environment.toml")
    assert find_config(None) == Path("environment.toml")
    assert find_config("given.toml") == Path("given.toml")
    (tmp_path / "environment.toml").unlink()
    with pytest.raises(UserError, match=r"there is no grid file environment\.toml"):
        find_config(None)  # rather than another one in silence


def user(*arguments: object) -> subprocess.CompletedProcess[str]:
    """`python -m ARGUMENTS`, as a user types it."""
    line = [sys.executable, "-m", *map(str, arguments)]
    return subprocess.run(line, cwd=REPOSITORY, capture_output=True, text=True, timeout=180)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "there is no grid file {path}; there are configs/camvid.toml, "),
        (b"name = small\n", "{path} is not valid TOML: Invalid value (at line 1, column 8)"),
        ("name = 'Zürich'\n".encode("latin-1"), "{path} is not UTF-8 text; save it as UTF-8"),
        (b"name = 'x'\nseed = [0]\n", "{path}: unknown key 'seed'; did you mean 'seeds'?"),
    ],
    ids=["no file", "no TOML", "no UTF-8", "unknown key"],
)
def test_on_the_command_line_it_is_one_line_and_exit_code_2(tmp_path, content, message):
    path = tmp_path / "grid.toml"
    if content is not None:
        path.write_bytes(content)
    done = user("pipeline.submit", "grid", path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {message.format(path=path)}")
    assert done.stderr.count("\n") == 1


def test_with_debug_the_traceback_is_shown(tmp_path):
    path = grid_file(tmp_path, ("epochs", "epoch"))
    done = user("pipeline.submit", "grid", path, "--debug")
    assert done.returncode == 1
    assert done.stderr.startswith("Traceback (most recent call last):")
    assert f"hpc.cli.UserError: {path}: [protocol]: unknown key 'epoch'" in done.stderr


def test_an_argument_that_does_not_exist(tmp_path):
    done = user("pipeline.submit", "train", "grid.toml")
    assert done.returncode == 2
    assert done.stderr.startswith("error: argument stage: invalid choice: 'train' (choose from ")
    assert done.stderr.count("\n") == 1


def test_a_place_of_a_schedule_without_any_weight_is_refused(tmp_path, refusal):
    knots = "schedule = [{at = 0.0, weights = [0, 0]}]\n"
    config = grid_file(tmp_path, more=TERMS + knots)
    assert "weights of a place are all 0" in refusal(submit.main, "grid", config)
