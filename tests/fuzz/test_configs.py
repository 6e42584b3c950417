"""A grid file is a grid or one line that says what is wrong with it; never a traceback, never half
of what it says."""

from __future__ import annotations

import io
import random
import tomllib
from contextlib import redirect_stderr, redirect_stdout, suppress
from pathlib import Path

import pytest
from hypothesis import strategies as st

from hpc.cli import UserError, one_line
from pipeline import submit
from pipeline.config.grid_file import Grid, read_grid
from pipeline.planning.plan import make_plan
from tests.fuzz.accidents import damaged
from tests.fuzz.cases import fuzzed
from tests.fuzz.grid_files import SITE, TEXTS, as_toml, mistaken, values
from tests.fuzz.grid_oracle import (
    CLUSTER,
    assert_read_as_written,
    assert_unchanged,
    may_be_a_grid,
    sides_are_seen,
)
from tests.fuzz.grid_oracle import table as table_of

NUMBERS = st.integers(0, 2**64 - 1)
NAMED = {"losses": "loss", "models": "model", **dict.fromkeys("147", "labels")}
OF_THE_FILE = ("streets", "fields", "camvid")  # keys that the file chose and may not have
OF_THE_PROFILE = (
    "there is no cluster profile ", "the cluster profile: ", "cannot read ", "clusters/site.toml: "
)  # fmt: skip
WHICH = st.sampled_from(sorted(TEXTS))


@pytest.fixture(scope="module", autouse=True)
def here(tmp_path_factory):
    """A working directory with a cluster profile, and nothing else."""
    folder = tmp_path_factory.mktemp("configs")
    (folder / "clusters").mkdir()
    (folder / "clusters/site.toml").write_text(SITE)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(folder)
        yield folder


def refusal_or_grid(path: Path) -> Grid | str:
    """The grid with its plan, which holds all cells, or the line that refuses it."""
    try:
        grid = read_grid(path)
        cells = list(grid.cells[:100])
        planned = make_plan(grid, cells, {}, (), {}) if grid.cluster else None
    except UserError as error:
        return said(error, path)
    assert planned
    signatures = {cell.signature for task in planned.bundles for cell in task.cells}
    assert signatures == {cell.signature for cell in cells}
    return grid


def said(error: UserError, path: Path | str) -> str:
    line = one_line(str(error))
    assert line.isprintable() and len(line) < 9000
    assert str(path) in line or line.startswith(OF_THE_PROFILE), line
    return line


def read_plainly(content: bytes) -> dict | None:
    with suppress(ValueError, RecursionError):
        return tomllib.loads(content.decode("utf-8-sig"))
    return None


def assert_right(path: Path, content: bytes) -> str:
    """Assert that an accepted file is a grid by the table of keys, in folders of its own."""
    path.write_bytes(content)
    grid = refusal_or_grid(path)
    if isinstance(grid, str):
        return grid
    tree = read_plainly(content)
    assert tree is not None and may_be_a_grid(tree)
    assert_read_as_written(tree, grid)
    folders = [grid.run.root, *(Path(data.shards) for data in grid.datasets.values())]
    assert len({folder.resolve() for folder in folders}) == len(folders)
    assert all(Path(folder).is_absolute() for folder in folders)
    if not tree.get("run_dir"):
        assert grid.run.root.parent == Path.cwd() / "runs"
    return ""


@fuzzed(0.15, which=WHICH, number=NUMBERS, given=st.lists(values, min_size=1, max_size=2))
def test_a_grid_file_with_mistakes_is_refused_or_still_says_what_it_means(
    which, number, given, here
):
    tree, key = mistaken(random.Random(number), TEXTS[which], given)
    line = assert_right(here / "grid.toml", as_toml(tree).encode())
    if line and len(given) == 1 and isinstance(key, str) and key not in OF_THE_FILE:
        word = NAMED.get(key, key)
        of_all = "is not valid TOML" in line or line.startswith(OF_THE_PROFILE)
        assert of_all or word in line, (key, line)


@fuzzed(0.07, which=WHICH, number=NUMBERS)
def test_a_damaged_grid_file_is_refused_or_still_says_what_it_means(which, number, here):
    assert_right(here / "grid.toml", damaged(random.Random(number), TEXTS[which].encode()))


@fuzzed(0.04, number=NUMBERS, given=values, edited=st.booleans())
def test_a_cluster_profile_is_refused_or_says_what_it_means(number, given, edited, here):
    chance = random.Random(number)
    if edited:
        content = as_toml(mistaken(chance, SITE, [given])[0]).encode()
    else:
        content = damaged(chance, SITE.encode())
    path = here / "clusters/mine.toml"
    path.write_bytes(content)
    (here / "grid.toml").write_text(TEXTS["profile"].replace('"site"', '"mine"'))
    try:
        profile = read_grid(here / "grid.toml").cluster
    except UserError as error:
        said(error, path)
        return
    tree = read_plainly(content)
    assert tree is not None and table_of(CLUSTER)(tree)
    assert_unchanged(tree, profile)


@fuzzed(0.03, which=WHICH, number=NUMBERS, given=values, cluster=st.booleans())
def test_a_dry_run_of_anything_leaves_nothing(which, number, given, cluster, here):
    tree, _ = mistaken(random.Random(number), TEXTS[which], [given])
    (here / "grid.toml").write_text(as_toml(tree), encoding="utf-8")
    before = sorted(here.rglob("*"))
    arguments = ["all", "grid.toml", "--dry-run", *(["--cluster", "site"] if cluster else [])]
    with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()):
        try:
            assert submit.main(arguments) == 0
        except UserError as error:
            assert one_line(str(error)).isprintable()
        else:
            assert "would submit" in out.getvalue()
    assert sorted(here.rglob("*")) == before


VALID = {
    "epochs": st.integers(1, 10**6),
    "batch_size": st.integers(1, 10**6),
    "learning_rate": st.floats(1e-300, 1e300) | st.integers(1, 9),
    "decay": st.sampled_from(["linear", "polynomial"]),
    "momentum": st.floats(0, 0.999),
    "weight_decay": st.floats(0, 1e300),
    "resize": st.tuples(st.integers(17, 999), st.integers(999, 2**15)).map(list),
    "long_side": st.sampled_from(["round", "truncate"]),
    "crop": st.lists(st.integers(17, 2**15), min_size=2, max_size=2),
    "flip": st.floats(0, 1),
    "eval_size": st.just(0) | st.integers(17, 2**15),
    "weights": st.sampled_from(["imagenet", "coco", "none", "pretrain", "~/w.pt", "../ü w.pt"]),
    "train": st.sampled_from(["head", "all"]),
    "naive_ramp": st.tuples(st.floats(1e-9, 0.4), st.floats(0.5, 1)).map(list),
    "bins": st.integers(1, 100),
    "counting": st.sampled_from(["fused", "reference"]),
    "threads": st.integers(1, 1024),
    "workers": st.integers(0, 64),
    "deterministic": st.booleans(),
    "checkpoint_minutes": st.floats(0, 1e300),
    "pretrain": st.fixed_dictionaries({}, optional={"seed": st.integers(0, 2**63 - 1)}),
}


@fuzzed(
    0.03,
    protocol=st.fixed_dictionaries({}, optional=VALID),
    seeds=st.lists(st.integers(0, 2**63 - 1), min_size=1, max_size=9, unique=True),
    name=st.text(st.characters(exclude_categories=["C", "Z"]), min_size=1),
)
def test_a_valid_grid_file_is_accepted(protocol, seeds, name, here):
    tree = tomllib.loads(TEXTS["composed"])
    del tree["run_dir"]
    tree |= {"protocol": protocol, "seeds": seeds, "name": name}
    assert assert_right(here / "grid.toml", as_toml(tree).encode()) == ""


EDGES = {
    "crop": st.lists(st.integers(15, 40), min_size=2, max_size=2),
    "eval_size": st.sampled_from([0, 16, 17, 2**15]),
    "resize": st.lists(st.integers(15, 40), min_size=2, max_size=2),
    "momentum": st.sampled_from([0, 0.999, 1]),
    "bins": st.sampled_from([0, 1, 100, 101]),
    "naive_ramp": st.lists(st.sampled_from([0.0, 0.3, 0.5, 1]), min_size=2, max_size=2),
}


@fuzzed(
    0.03,
    protocol=st.fixed_dictionaries({}, optional=EDGES),
    seeds=st.sampled_from([[0], [1, 0], [2**63 - 1], [2**63], [-1], [1, 1]]),
    name=st.sampled_from(["x", "two words", "\u00fc", "a\nb", " ", "\x7f"]),
)
def test_at_the_edge_of_what_is_valid_it_is_decided_as_told(protocol, seeds, name, here):
    tree = tomllib.loads(TEXTS["composed"])
    tree |= {"protocol": protocol, "seeds": seeds, "name": name}
    accepted = assert_right(here / "grid.toml", as_toml(tree).encode()) == ""
    assert accepted == (may_be_a_grid(tree) and sides_are_seen(tree["models"], protocol))


def test_keys_nested_beyond_all_measure_are_refused(here):
    keys = ".".join("a" * 1000)
    for start in ("", "dataset.", "protocol.", "protocol.per_dataset.", "cluster.extra."):
        top = f"{start}{keys} = 1\n"
        assert assert_right(here / "grid.toml", (top + TEXTS["profile"][17:]).encode())


def test_line_ends_and_a_byte_order_mark_mean_nothing(here):
    plain = TEXTS["composed"]
    for text in (plain.replace("\n", "\r\n"), "\ufeff" + plain):
        assert assert_right(here / "grid.toml", text.encode()) == ""
    for other in (
        plain.replace("\n", "\r").encode(),
        plain.encode("utf-16"),
        b"\xff" + plain.encode(),
    ):
        assert "grid.toml is not " in assert_right(here / "grid.toml", other)


def test_a_cluster_profile_of_a_name_without_end_is_refused(here):
    for name in ("x" * 252, "x/" * 3000, "a\0b"):
        text = TEXTS["profile"].replace("site", name.replace("\0", "\\u0000"))
        assert assert_right(here / "grid.toml", text.encode())
