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
from data_prep.pack import pack
from hpc.command import UserError, run
from pipeline import reduce, status, submit
from pipeline.checks import check_inputs
from pipeline.grid import find_config, read_grid
from tests.pipeline.grids import grid_file, pairs, small_grid

REPOSITORY = Path(__file__).parents[2]
LOSS = '\n[[loss]]\nname = "mine"\n'
TERMS = f'{LOSS}terms = ["DL", "CE"]\n'
WEIGHTS = 'weights = "none"'


@pytest.fixture
def refusal(tmp_path, monkeypatch, capsys):
    """What a command says to its refused arguments, without `error: `; nothing was queued."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "no weights"))
    monkeypatch.delenv("LOSSGRID_CONFIG", raising=False)

    def refused(main, *arguments) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            run(main, [str(argument) for argument in arguments])
        line = capsys.readouterr().err
        assert ended.value.code == 2
        assert line.startswith("error: ")
        assert line.endswith("\n") and line.count("\n") == 1
        for folder in ("queue", "submitted", "tasks", "logs"):
            assert not list(tmp_path.glob(f"**/{folder}"))
        return line.removeprefix("error: ").rstrip("\n")

    return refused


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
        (('source = "synthetic"', "source = [1]"), "unknown source [1]; valid: folder, synthetic"),
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
        (f"{LOSS}terms = ['CX']", "[[loss]] 'mine': unknown term 'CX'; valid: CE, DL, FL, WCE"),
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
        (TERMS.replace("mine", "CE"), "[[loss]] 'CE': another loss has that name already"),
        (TERMS.replace("[[loss]]", "[loss]"), "loss: Input should be a valid list"),
    ],
)  # fmt: skip
def test_a_composed_loss_that_does_not_fit_together(tmp_path, refusal, table, message):
    path = grid_file(tmp_path, more=table)
    said = refusal(submit.main, "grid", path)
    assert said.startswith(f"{path}: ")
    assert message in said


def test_two_data_sets_in_one_folder(tmp_path, refusal):
    more = f'\n[dataset.roads]\nsource = "synthetic"\nshards = "{tmp_path}/streets"\n'
    said = refusal(submit.main, "grid", grid_file(tmp_path, more=more))
    assert "the data sets 'streets' and 'roads' have the same shards folder" in said


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


def folder_grid(tmp_path: Path) -> Path:
    text = f'source = "folder"\nroot = "{tmp_path}/rooms"\nclasses = ["wall", "floor"]'
    synthetic = "train = 6\nval = 3\nsize = [32, 40]"
    return grid_file(tmp_path, ('source = "synthetic"', text), (f"{synthetic}\n", ""))


@pytest.mark.parametrize("command", ["pack", "grid", "all"])
def test_images_without_label_maps(tmp_path, refusal, command):
    pairs(tmp_path / "rooms", "abcdef")
    for stem in "bdef":
        (tmp_path / f"rooms/trainannot/{stem}.png").unlink()
    path = folder_grid(tmp_path)
    arguments = [packing.main] if command == "pack" else [submit.main, command]
    assert refusal(*arguments, path) == (
        f"b.png, d.png, e.png and 1 more in {tmp_path}/rooms/train: no label map of the same stem "
        f"in {tmp_path}/rooms/trainannot; add or remove files so that they pair"
    )


@pytest.mark.parametrize("command", ["pack", "grid"])
def test_a_folder_of_images_that_is_missing(tmp_path, refusal, command):
    pairs(tmp_path / "rooms", "ab")
    shutil.rmtree(tmp_path / "rooms/val")
    arguments = [packing.main] if command == "pack" else [submit.main, "grid"]
    assert refusal(*arguments, folder_grid(tmp_path)) == (
        f"cannot read the folder {tmp_path}/rooms/val: No such file or directory; check root and "
        "the folder names of the data set"
    )


def test_a_batch_larger_than_the_training_set(tmp_path, refusal):
    path = grid_file(tmp_path, ("batch_size = 2", "batch_size = 7"))
    expected = (
        "batch_size = 7 is larger than the training set of 6 images; choose a smaller one in"
        " [protocol]"
    )
    assert refusal(submit.main, "all", path) == expected
    run_packing(path)
    assert refusal(submit.main, "grid", path) == expected
    pretrain = (WEIGHTS, 'weights = "pretrain"\npretrain = {batch_size = 9}')
    said = refusal(submit.main, "grid", grid_file(tmp_path, pretrain))
    assert said.startswith(
        "[protocol.pretrain] batch_size = 9 is larger than the training set of 6"
    )


def run_packing(path: Path) -> None:
    assert packing.main([str(path)]) == 0


def test_weights_that_are_not_on_the_disk(tmp_path, refusal):
    path = grid_file(tmp_path, (WEIGHTS, 'weights = "imagenet"'))
    file = tmp_path / "no weights/hub/checkpoints/mobilenet_v3_large-8738ca79.pth"
    expected = f"weights = 'imagenet' needs {file}; fetch it where there is internet with `python"
    assert refusal(submit.main, "all", path).startswith(expected)
    run_packing(path)
    assert refusal(submit.main, "grid", path).startswith(expected)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ("coco", "no 'coco' weights are published for 'fcn_mobilenet_v3_large'; did you mean"),
        ("imagnet", "weights = 'imagnet' is neither imagenet, coco, none or pretrain nor a file"),
        ("mine/w.pt", "weights = 'mine/w.pt' is neither imagenet, coco, none or pretrain nor a"),
    ],
)
def test_weights_that_do_not_exist(tmp_path, refusal, weights, message):
    path = grid_file(tmp_path, (WEIGHTS, f'weights = "{weights}"'))
    run_packing(path)
    assert refusal(submit.main, "grid", path).startswith(message)


def test_shards_that_were_lost_or_damaged_since(tmp_path, refusal):
    path = grid_file(tmp_path)
    run_packing(path)
    shard = tmp_path / "streets/val-00000.h5"
    shard.write_bytes(shard.read_bytes()[:-1])
    assert f"{shard} has " in refusal(submit.main, "grid", path)
    shard.unlink()
    said = refusal(submit.main, "grid", path)
    assert said.startswith(f"{shard} cannot be read: No such file or directory; ")
    assert "run `python -m data_prep.pack CONFIG` again" in said
    manifest = tmp_path / "streets/manifest.json"
    manifest.write_text(manifest.read_text().replace('"val-00000.h5"', '"val-00001.h5"'))
    assert f"{manifest} is damaged" in refusal(submit.main, "grid", path)


def test_a_data_set_that_is_not_packed_is_packed_first_or_named(tmp_path, refusal):
    grid = small_grid(tmp_path)
    assert submit.stages_of("grid", grid) == ("prep", "grid")
    said = refusal(reduce.main, grid.path)
    assert said == (
        f"{tmp_path}/streets holds no packed data set (no manifest.json); run `python -m "
        "data_prep.pack CONFIG`"
    )
    run_packing(grid.path)
    assert submit.stages_of("grid", grid) == ("grid",)


def test_a_disk_without_room_for_what_training_leaves(tmp_path, refusal, monkeypatch):
    path = grid_file(tmp_path)
    run_packing(path)
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
        "no grid file: give one, set LOSSGRID_CONFIG, or run where there is a lossgrid.toml"
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
    return subprocess.run(line, cwd=REPOSITORY, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "there is no grid file {path}; there are configs/camvid.toml, "),
        (b"name = small\n", "{path} is not valid TOML: Invalid value (at line 1, column 8)"),
        ("name = 'Zürich'\n".encode("latin-1"), "{path} is not UTF-8 text; TOML files must be"),
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
    assert f"hpc.command.UserError: {path}: [protocol]: unknown key 'epoch'" in done.stderr


def test_an_argument_that_does_not_exist(tmp_path):
    done = user("pipeline.submit", "train", "grid.toml")
    assert done.returncode == 2
    assert done.stderr.startswith("error: argument stage: invalid choice: 'train' (choose from ")
    assert done.stderr.count("\n") == 1


def test_shards_that_were_packed_with_other_settings_are_not_trained_on(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    dataset = '[dataset.streets]\nsource = "synthetic"\ntrain = 8\nval = 5\nsize = [32, 48]\n'
    head = 'name = "g"\nseeds = [0]\nmodels = ["fcn_mobilenet_v3_large"]\nlosses = ["CE"]\n'
    protocol = '[protocol]\nbatch_size = 2\nweights = "none"\n[cluster]\nkind = "local"\n'
    config = tmp_path / "grid.toml"
    config.write_text(head + dataset + protocol)
    grid = read_grid(config)
    pack("streets", grid.datasets["streets"], processes=1)
    check_inputs(grid, packed=True)
    config.write_text(head + dataset.replace("train = 8", "train = 9") + protocol)
    with pytest.raises(UserError, match="packed with other settings"):
        check_inputs(read_grid(config), packed=True)


def test_a_place_of_a_schedule_without_any_weight_is_refused(tmp_path, refusal):
    knots = "schedule = [{at = 0.0, weights = [0, 0]}]\n"
    config = grid_file(tmp_path, more=TERMS + knots)
    assert "weights of a place are all 0" in refusal(submit.main, "grid", config)


def test_a_dry_run_refuses_what_a_submission_would(tmp_path, refusal):
    config = grid_file(tmp_path, ("batch_size = 2", "batch_size = 9999"))
    assert "batch_size = 9999" in refusal(submit.main, "all", config, "--dry-run")


def test_a_data_set_cannot_be_named_out_of_its_folder(tmp_path, refusal):
    config = grid_file(tmp_path, ("[dataset.streets]", '[dataset."../x"]'))
    assert "without /" in refusal(submit.main, "prep", config)
