"""Faults of a data set are refused before anything is queued, or by the job that packs it: one
line that says what, where, and what to do."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data_prep import pack as packing
from data_prep.pack import pack
from data_prep.shards.manifest import Manifest, SplitSummary
from hpc.cli import UserError
from pipeline import reduce, status, submit
from pipeline.config.grid_file import read_grid
from pipeline.planning.preflight import check_inputs
from pipeline.scores.results_file import read_results
from tests.pipeline.fake_queue import FakeQueue
from tests.pipeline.grids import grid_file, pairs, small_grid
from tests.pipeline.planning.test_preflight import user
from tests.pipeline.stories import work


def test_two_data_sets_in_one_folder(tmp_path, refusal):
    more = f'\n[dataset.roads]\nsource = "synthetic"\nshards = "{tmp_path}/streets"\n'
    said = refusal(submit.main, "grid", grid_file(tmp_path, more=more))
    shared = "the shards folder of 'streets' and the shards folder of 'roads' are both"
    assert f"{shared} {tmp_path}/streets; give each its own" in said


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
    assert packing.main([str(path)]) == 0
    assert refusal(submit.main, "grid", path) == expected
    pretrain = ('weights = "none"', 'weights = "pretrain"\npretrain = {batch_size = 9}')
    said = refusal(submit.main, "grid", grid_file(tmp_path, pretrain))
    assert said.startswith(
        "[protocol.pretrain] batch_size = 9 is larger than the training set of 6"
    )


def test_shards_that_were_lost_or_damaged_since(tmp_path, refusal):
    path = grid_file(tmp_path)
    assert packing.main([str(path)]) == 0
    [shard] = (tmp_path / "streets").glob("val-*.h5")
    shard.write_bytes(shard.read_bytes()[:-1])
    assert f"{shard} has " in refusal(submit.main, "grid", path)
    shard.unlink()
    said = refusal(submit.main, "grid", path)
    assert said.startswith(f"{shard} cannot be read: No such file or directory; ")
    assert "run `python -m data_prep.pack CONFIG` again" in said
    manifest = tmp_path / "streets/manifest.json"
    manifest.write_text(manifest.read_text().replace('"val-00000-', '"val-00001-'))
    assert f"{manifest} is damaged" in refusal(submit.main, "grid", path)


def test_a_data_set_that_is_not_packed_is_packed_first_or_named(tmp_path, refusal):
    grid = small_grid(tmp_path)
    assert submit.stages_of("grid", grid) == ("prep", "grid")
    said = refusal(reduce.main, grid.path)
    assert said == (
        f"{tmp_path}/streets holds no packed data set (no manifest.json); run `python -m "
        "data_prep.pack CONFIG`"
    )
    assert packing.main([str(grid.path)]) == 0
    assert submit.stages_of("grid", grid) == ("grid",)


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
    changed = read_grid(config)
    assert submit.stages_of("grid", changed) == ("prep", "grid")  # it has a folder of its own
    shutil.copytree(grid.datasets["streets"].shards, changed.datasets["streets"].shards)
    with pytest.raises(UserError, match=r"other settings .*train = 8 there, 9 here"):
        check_inputs(changed, packed=True)


def test_a_dry_run_refuses_what_a_submission_would(tmp_path, refusal):
    config = grid_file(tmp_path, ("batch_size = 2", "batch_size = 9999"))
    assert "batch_size = 9999" in refusal(submit.main, "all", config, "--dry-run")


def test_a_data_set_cannot_be_named_out_of_its_folder(tmp_path, refusal):
    config = grid_file(tmp_path, ("[dataset.streets]", '[dataset."../x"]'))
    assert "without /" in refusal(submit.main, "prep", config)


LACKING = """\
name = "lacking"
seeds = [0]
models = ["fcn_mobilenet_v3_large"]
losses = ["WCE", "DL", "WDL"]
run_dir = "{folder}/run"

[dataset.rooms]
source = "folder"
root = "{folder}/rooms"
shards = "{folder}/shards"
classes = ["wall", "floor", "ghost"]
{more}
[protocol]
epochs = 1
batch_size = 2
resize = [32, 40]
crop = [32, 32]
eval_size = 0
weights = "none"
threads = 1
workers = 0

[cluster]
kind = "local"
"""
GHOST = "the class 'ghost' of the data set 'rooms' has no pixel in"
ADVICE = "add images that show it, or take it out of the classes"
NOT_SCORED = (
    f"of which 0.0 % are void: scores are averaged over the classes that do occur; {ADVICE}"
)


@pytest.fixture
def lacking(tmp_path):
    """Pairs of images whose labels hold two of three classes, the second image broken; and a
    function that writes their grid file."""
    noise = np.random.default_rng(1)
    for split, stems in (("train", "abcde"), ("val", "xy")):
        for stem in stems:
            for name, values in (
                (split, noise.integers(0, 256, (32, 40, 3), np.uint8)),
                (f"{split}annot", noise.integers(0, 2, (32, 40), np.uint8)),
            ):
                (tmp_path / "rooms" / name).mkdir(parents=True, exist_ok=True)
                Image.fromarray(values).save(tmp_path / "rooms" / name / f"{stem}.png")
    broken = tmp_path / "rooms/train/b.png"
    broken.write_bytes(broken.read_bytes()[:1000])

    def config(more: str = "", *changes: tuple[str, str]) -> Path:
        text = LACKING.format(folder=tmp_path, more=more)
        for old, new in changes:
            assert text.count(old) == 1
            text = text.replace(old, new)
        path = tmp_path / "grid.toml"
        path.write_text(text)
        return path

    return config


def test_a_bad_file_ends_all_with_one_line(lacking, tmp_path):
    refused = user("pipeline.submit", "all", lacking(), "--wait", "--cluster", "local")
    assert refused.returncode == 2
    assert refused.stderr.splitlines()[-1].startswith(
        f"prep: error: {tmp_path}/rooms/train/b.png cannot be read as an image ("
    )
    assert "skip_bad = true in [dataset.rooms]" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_a_class_that_never_occurs_trains_to_the_end_and_is_named(lacking, tmp_path, capsys):
    """With what a broken file leaves of the training set."""
    grid = read_grid(lacking("skip_bad = true"))
    queue = FakeQueue(grid.run.logs)
    submit.submit(grid, queue, ("prep", "grid", "reduce", "report"))
    work(queue)
    assert "warning" not in capsys.readouterr().err.replace(f"warning: {GHOST}", "")
    assert len(read_results(grid.run.results).datasets[0].cells) == 3
    assert not list((tmp_path / "run").glob("failures/*"))
    for cell in grid.cells:
        weights = torch.load(grid.run.head(cell.signature), weights_only=True)["weights"]
        assert all(torch.isfinite(tensor).all() for tensor in weights.values())
    page = re.sub(r"\s+", " ", (grid.run.report / "index.html").read_text())
    [facts] = re.findall(r"<tr><td>rooms</td>.*?</tr>", page)
    assert facts.endswith("<td>ghost</td><td>ghost</td></tr>")
    assert f"{GHOST} train, of which 0.0 % are void: no cell".replace("'", "&#39;") in page


def test_what_training_should_know_of_is_warned_of_at_submission(lacking, tmp_path, capsys):
    config = lacking("skip_bad = true")
    assert packing.main([str(config)]) == 0
    capsys.readouterr()
    assert submit.main(["grid", str(config), "--dry-run"]) == 0
    first = f"the first is {Manifest.load(tmp_path / 'shards').splits['train'].left_out[0]}"
    assert [line.removeprefix("warning: ") for line in capsys.readouterr().err.splitlines()] == [
        f"{GHOST} train, of which 0.0 % are void: no cell can learn it; {ADVICE}",
        f"{GHOST} val, {NOT_SCORED}",
        f"1 of train of the data set 'rooms' were left out when it was packed; {first}",
    ]


def test_a_batch_larger_than_what_skip_bad_left(lacking, refusal):
    config = lacking("skip_bad = true", ("batch_size = 2", "batch_size = 5"))
    assert packing.main([str(config)]) == 0
    assert refusal(submit.main, "grid", config) == (
        "batch_size = 5 is larger than the training set of 4 images; choose a smaller one in "
        "[protocol]"
    )


def test_skip_bad_is_no_other_data_set(lacking):
    before = {cell.signature for cell in read_grid(lacking()).cells}
    assert {cell.signature for cell in read_grid(lacking("skip_bad = true")).cells} == before


def test_a_manifest_without_a_labelled_pixel(tmp_path, refusal):
    path = grid_file(tmp_path)
    assert packing.main([str(path)]) == 0
    manifest = Manifest.load(tmp_path / "streets")
    void = [replace(shard, class_pixels=(0,) * 8) for shard in manifest.splits["val"].shards]
    splits = {**manifest.splits, "val": SplitSummary(tuple(void))}
    replace(manifest, splits=splits).save()
    for more in ([], ["--dry-run"]):
        assert refusal(submit.main, "grid", path, *more) == (
            "no class has pixels in val of the data set 'streets'; 100.0 % of the pixels are void; "
            "at least two are needed: choose lists with images of more classes"
        )


def test_status_names_the_classes_without_a_pixel(lacking, capsys):
    config = lacking("skip_bad = true")
    assert status.main([str(config)]) == 0  # nothing is packed yet
    assert packing.main([str(config)]) == 0
    capsys.readouterr()
    assert status.main([str(config)]) == 0
    said = capsys.readouterr().out.splitlines()
    assert [line for line in said if GHOST in line] == [
        f"warning: {GHOST} train, of which 0.0 % are void: no cell can learn it; {ADVICE}",
        f"warning: {GHOST} val, {NOT_SCORED}",
    ]
