"""Samples may have any name; messages that show one stay one line."""

from __future__ import annotations

import unicodedata

import pytest

from data_prep.pack import pack
from data_prep.shards.manifest import Manifest
from data_prep.shards.reader import SplitReader
from data_prep.verify import verify
from hpc.cli import UserError

NAMES = [
    "two words", " led and trailed ", "it's", 'a "quote"', "Ä", "東京", "new\nline", "\r", "tab\t",
    "-rf", "--skip-bad", "100%", "%s%d%j", "{}", "{0.__class__}", "$(touch x)", "`x`", "[bold]",
    "a\\b", "#", "*?", "\x1b[31m", "dot.dot", "<script>", "ß" * 100,
]  # fmt: skip


def test_samples_of_any_name_pack_and_read_back(rooms, command):
    for name in NAMES:
        rooms.pair(name, (9, 12))
    done = command("data_prep.pack", rooms.config(), "--processes", 1)
    assert done.returncode == 0, done.stderr
    manifest = Manifest.load(rooms.shards)
    reader = SplitReader(manifest, "train")
    expected = sorted({*NAMES, "a", "b", "Ä"}, key=str.encode)
    assert [reader.id(i) for i in range(len(reader))] == expected
    for i in range(len(reader)):
        assert reader.image(i).shape[:2] == reader.label(i).shape == reader.size(i)
    assert verify(manifest) == []


@pytest.mark.parametrize("name", NAMES)
def test_a_bad_file_of_any_name_is_one_line(rooms, command_line, name):
    rooms.pair(name)
    (rooms.root / "train" / f"{name}.png").write_bytes(b"no picture")
    code, _, errors = command_line("data_prep.pack", rooms.config(), "--processes", 1)
    said = errors.splitlines()[-1]
    assert code == 2 and errors.endswith(f"{said}\n") and said.isprintable()
    assert said.startswith("error: ") and "cannot be read as an image" in said

    code, report, errors = command_line("data_prep.pack", rooms.config(), "--skip-bad")
    assert (code, "error" in errors) == (0, False)
    lines = report.splitlines()
    assert len(lines) == 3 and all(line.isprintable() for line in lines)
    assert lines[1].startswith("  left out: ") and "cannot be read as an image" in lines[1]


@pytest.mark.parametrize("name", ["new\nline", "\x1b[31m", "{}"])
def test_a_damaged_sample_of_any_name_is_one_line(rooms, command_line, name):
    rooms.pair(name, split="val")
    rooms.table["shards"] = str(rooms.root / f"shards{name}")
    manifest = pack("rooms", rooms.settings)
    [shard] = manifest.splits["val"].shards
    path = manifest.folder / shard.file
    offset, size = shard.arenas[1]
    content = bytearray(path.read_bytes())
    for k in (0, size - 1):
        content[offset + k] ^= 1
    path.write_bytes(content)
    code, listed, errors = command_line("data_prep.verify", manifest.folder)
    said = errors.splitlines()[-1]
    assert code == 2 and said.startswith("error: ") and said.isprintable()
    assert len(listed.splitlines()) == 2 and all(x.isprintable() for x in listed.splitlines())
    shown = [f"label map {stem!r} is damaged" in listed for stem in sorted([name, "v"])]
    assert shown == [True, True]


@pytest.mark.parametrize("image_form", ["NFC", "NFD"])
def test_a_pair_in_two_unicode_forms_is_named_for_what_it_is(rooms, image_form):
    label_form = {"NFC": "NFD", "NFD": "NFC"}[image_form]
    image = rooms.image(unicodedata.normalize(image_form, "Übung.png"))
    label = rooms.label(unicodedata.normalize(label_form, "Übung.png"))
    with pytest.raises(UserError) as refused:
        pack("rooms", rooms.settings)
    assert str(refused.value) == (
        f"{image} and {label} look alike, but their names are two Unicode forms, {image_form} and "
        f"{label_form}; rename one of them (macOS writes NFD)"
    )


def test_names_in_one_form_each_stay_apart(rooms):
    for form in ("NFC", "NFD"):
        rooms.pair(unicodedata.normalize(form, "Ü"))
    assert pack("rooms", rooms.settings).splits["train"].images == 5


def test_a_name_that_is_no_text_is_refused(rooms):
    (rooms.root / "train" / "a.jpg").rename(rooms.root / "train" / "a\udcff.jpg")
    with pytest.raises(UserError, match=r"a\\udcff\.jpg': the file name is not UTF-8; rename it"):
        pack("rooms", rooms.settings)
