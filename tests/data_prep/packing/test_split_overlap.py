"""Images that two lists of official data sets share are counted."""

from __future__ import annotations

import shutil

import numpy as np
import pytest

from data_prep import verify
from data_prep.pack import main, pack
from data_prep.packing.split_overlap import ImageIds, overlap_warnings
from data_prep.shards.manifest import Manifest
from pipeline import submit
from tests.data_prep.sources import trees

LABEL = np.arange(20, dtype=np.uint8).reshape(4, 5)
VOC = ("2007_000032", "2008_000003", "2009_000001", "2010_000002")


@pytest.fixture
def tree(tmp_path):
    """VOC and SBD in one folder: SBD trains on two of VOC's three validation images."""
    labels = dict.fromkeys(VOC, LABEL)
    home = trees.voc(tmp_path, labels, train=VOC[0], val="\n".join(VOC[1:]))
    (home / "ImageSets/Segmentation/trainval.txt").write_text("\n".join(VOC))
    trees.sbd(tmp_path, labels, train="2009_000001\n2007_000032\n2008_000003", val=VOC[3])
    return tmp_path


def warned(capsys) -> list[str]:
    lines = capsys.readouterr().err.splitlines()
    return [line for line in lines if line.startswith("warning: ") and "training images" in line]


def test_every_official_layout_packs_and_verifies_from_the_command_line(tree, command, capsys):
    raw = np.full((40, 50), 7, np.uint8)
    raw[0] = 11
    trees.cityscapes(tree, train={"ulm/ulm_1": raw}, val={"bonn/bonn_1": raw})
    objects = [trees.rectangle(3, 0, 0, 40, 40)]
    trees.coco(tree, train={"0007": ((41, 43), objects)}, val={"0008": ((41, 43), objects)})
    images = {"voc": (1, 3), "sbd": (3, 1), "cityscapes": (1, 1), "coco": (1, 1)}
    file = trees.config(tree / "grid.toml", *(trees.settings(source, tree) for source in images))
    done = command("data_prep.pack", file, "--processes", 1)
    assert done.returncode == 0, done.stderr
    for source, (train, val) in images.items():
        assert verify.main([str(tree / "shards" / source)]) == 0
        found = capsys.readouterr().out
        assert found.endswith(
            f"/{source}: {train} train, {val} val images, all as they were packed\n"
        )


def test_lists_that_share_nothing_give_no_warning(tree, capsys):
    main([str(trees.config(tree / "grid.toml", trees.settings("voc", tree)))])
    assert warned(capsys) == []


def test_a_train_and_a_val_list_that_share_images_are_counted(tree, capsys):
    settings = trees.settings("voc", tree, train="trainval")
    main([str(trees.config(tree / "grid.toml", settings))])
    [line] = warned(capsys)
    assert line.startswith(
        "warning: 3 of 3 validation images of the data set 'voc' are training images too, "
        "'2008_000003' first; "
    )


def test_sbd_beside_voc_is_counted_whichever_is_trained_on(tree, capsys):
    tables = [trees.settings("voc", tree), trees.settings("sbd", tree, voc_root=str(tree))]
    main([str(trees.config(tree / "grid.toml", *tables))])
    [line] = warned(capsys)
    assert "2 of 3 validation images of the data set 'voc' are training images of the" in line
    assert "data set 'sbd', '2008_000003' first" in line and "train_noval" in line


def test_sbd_alone_is_counted_against_voc_where_voc_root_says_where_it_lies(tree, capsys):
    main([str(trees.config(tree / "a.toml", trees.settings("sbd", tree)))])
    assert warned(capsys) == []
    with_voc = trees.settings("sbd", tree, voc_root=str(tree))
    main([str(trees.config(tree / "b.toml", with_voc))])
    [line] = warned(capsys)
    assert "2 of 3 validation images of VOC 2012 are training images of the data set 'sbd'" in line


def test_training_on_sbd_and_validating_on_voc_is_counted_once(tree, capsys):
    table = trees.settings("sbd", tree, val="voc_val", voc_root=str(tree))
    main([str(trees.config(tree / "grid.toml", table))])
    [line] = warned(capsys)
    assert "2 of 3 validation images of the data set 'sbd' are training images too" in line


def test_train_noval_shares_nothing_with_vocs_validation(tree, capsys):
    table = trees.settings("sbd", tree, train="train_noval", val="voc_val", voc_root=str(tree))
    main([str(trees.config(tree / "grid.toml", table))])
    assert warned(capsys) == []


def test_equal_names_in_unrelated_data_sets_are_not_the_same_picture(tree):
    raw = np.full((4, 5), 7, np.uint8)
    trees.cityscapes(tree, train={"ulm/ulm_1": raw}, val={"bonn/bonn_1": raw})
    tables = {name: trees.settings("cityscapes", tree) for name in ("one", "two")}
    pictures = {"one": ImageIds(["a"], ["b"], []), "two": ImageIds(["b"], ["a"], [])}
    assert overlap_warnings(tables, pictures) == []


@pytest.mark.parametrize("packed", [False, True])
def test_a_leak_is_an_equal_picture_and_not_an_equal_name(rooms, packed):
    """`a` is a different image in each split; `b` is copied, with another label map."""
    rooms.pair("a", split="val")
    shutil.copy(rooms.root / "train/b.png", rooms.root / "val/b.png")
    rooms.label("b.png", (70, 30), split="val", values=(1, 2))
    if packed:  # then those of other names are found too
        shutil.copy(rooms.root / "train/b.png", rooms.root / "val/c.png")
        rooms.label("c.png", (70, 30), split="val")
        assert pack("rooms", rooms.settings).leaked == ("b", "c")
        pictures = ImageIds.packed(Manifest.load(rooms.shards))
    else:
        pictures = ImageIds.of_source(rooms.settings)
    [warning] = overlap_warnings({"rooms": rooms.settings}, {"rooms": pictures})
    assert warning.startswith(
        f"{1 + packed} of {3 + packed} validation images of the data set 'rooms' are training "
        "images too, 'b' first; "
    )


def test_shards_outlive_the_voc_that_their_overlap_was_counted_with(tree):
    settings = trees.settings("sbd", tree, voc_root=str(tree))
    ids = ImageIds.packed(pack("sbd", settings))
    assert ids == ImageIds.packed(Manifest.load(settings.shards))
    assert len(overlap_warnings({"sbd": settings}, {"sbd": ids})) == 1
    (tree / "VOCdevkit").rename(tree / "gone")
    assert overlap_warnings({"sbd": settings}, {"sbd": ids}) == []


@pytest.mark.parametrize("packed", [False, True])
def test_planning_a_submission_counts_too(tree, capsys, packed):
    settings = trees.settings("voc", tree, train="trainval")
    grid = trees.config(tree / "grid.toml", settings)
    head = f'name = "g"\nrun_dir = "{tree}/run"\nseeds = [0]\nmodels = ["fcn_mobilenet_v3_large"]\n'
    protocol = '\n[protocol]\nbatch_size = 1\nweights = "none"\n[cluster]\nkind = "local"\n'
    grid.write_text(f'{head}losses = ["CE"]\n{grid.read_text()}{protocol}')
    if packed:
        pack("voc", settings)
    assert submit.main(["grid", str(grid), "--dry-run"]) == 0
    [line] = warned(capsys)
    assert line.startswith("warning: 3 of 3 validation images of the data set 'voc' are training")
