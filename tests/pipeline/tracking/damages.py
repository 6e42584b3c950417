"""Damage a file of counts, or its index, in every way that a disk may."""

from __future__ import annotations

from zlib import crc32

import h5py
import numpy as np
import pytest

from hpc.storage.atomic import file_sha256, read_json, write_json


def cut(path):
    path.write_bytes(path.read_bytes()[:-9])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def empty(path):
    path.write_bytes(b"")


def remove(path):
    path.unlink()


def make_folder(path):
    path.unlink()
    path.mkdir()


def link_to_itself(path):
    path.unlink()
    path.symlink_to(path.name)


def link_to_nowhere(path):
    path.unlink()
    path.symlink_to("nowhere")


def foreign(path):
    """The file of another program."""
    with h5py.File(path, "w") as file:
        file.create_group("confusion")["of"] = np.arange(9)


def other_text(path):
    path.write_bytes(b"confusion,nll\n" * 99)


def three_bins(path):
    """As a grid with other bins and one cell less has them."""
    with h5py.File(path, "r+") as file:
        table = file["top1_bins"][:-1, :3]
        del file["top1_bins"]
        file["top1_bins"] = table


def in_floats(path):
    with h5py.File(path, "r+") as file:
        table = file["confusion"][...].astype(float)
        del file["confusion"]
        file["confusion"] = table


def without_nll(path):
    with h5py.File(path, "r+") as file:
        del file["nll"]


def fitting(damage):
    """The damage, and an index whose checksums and places of arrays fit it."""

    def both(path):
        damage(path)
        index = read_json(path.with_suffix(".json"))
        with h5py.File(path) as file:
            arrays = {name: (d.id.get_offset(), d.dtype.str, d.shape) for name, d in file.items()}
        about = {"sha256": file_sha256(path), "crc32": crc32(path.read_bytes())}
        changed = {**index, **about, "bytes": path.stat().st_size, "arrays": arrays}
        write_json(path.with_suffix(".json"), changed)

    both.__name__ = f"fitting_{damage.__name__}"
    return both


def other_index(change):
    """An index with a checksum that fits, and something else in it."""

    def of_index(path):
        write_json(path, change(read_json(path)))

    return of_index


def places(change):
    """An index that says something else of where the arrays lie."""
    return other_index(
        lambda index: {**index, "arrays": {k: change(*v) for k, v in index["arrays"].items()}}
    )


OF_ARRAYS = [cut, flip, empty, remove, make_folder, link_to_itself, foreign, other_text]
OF_ARRAYS += [fitting(d) for d in (three_bins, in_floats, without_nll)]
OF_INDEX = {
    **{d.__name__: d for d in (cut, flip, empty, make_folder, link_to_itself, link_to_nowhere)},
    "without_cells": other_index(lambda index: {k: v for k, v in index.items() if k != "cells"}),
    "of_numbers": other_index(lambda index: {**index, "cells": [1, 2]}),
    "without_signatures": other_index(lambda index: {**index, "cells": {"name": ["CE"]}}),
    "of_lists": other_index(lambda index: {**index, "cells": {"signature": [["CE"]]}}),
    "of_text": other_index(lambda index: {**index, "cells": {"signature": "CE"}}),
    "with_a_short_column": other_index(
        lambda index: {**index, "cells": {**index["cells"], "backbone": ["0123"]}}
    ),
    "beyond_the_end": places(lambda offset, kind, shape: [offset + 10**6, kind, shape]),
    "in_floats": places(lambda offset, kind, shape: [offset, "<f8", shape]),
    "of_nothing": places(lambda offset, kind, shape: [offset, "nothing", shape]),
}
DAMAGES = [
    *(pytest.param(".h5", damage, id=damage.__name__) for damage in OF_ARRAYS),
    *(pytest.param(".json", damage, id=f"index_{name}") for name, damage in OF_INDEX.items()),
]
