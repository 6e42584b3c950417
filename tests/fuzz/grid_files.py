"""Valid grid files as trees of tables, their spelling as TOML, and what goes wrong in them."""

from __future__ import annotations

import copy
import datetime
import math
import random
import re
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from hypothesis import strategies as st

from tests.pipeline.grids import TEXT

REPOSITORY = Path(__file__).parents[2]
MORE = """
[[loss]]
name = "three-way"
terms = ["WDL", "FL", "WCE"]
schedule = [
    {at = 0.0, weights = [1, 0, 0]},
    {at = 0.5, weights = [0, 1.5, 0]},
    {at = 0.9, weights = [0, 0, 1], ramp = "cosine"},
]

[[loss]]
name = "even"
terms = ["DL", "CE"]

[dataset.fields]
source = "folder"
root = "../somewhere else"
classes = ["wheat", "weed & thistle"]
labels = {1 = "wheat", 4 = "weed & thistle", 7 = "wheat"}
void = [0, 9]

[protocol.per_dataset.fields]
naive_ramp = [0.1, 0.2]
pretrain = {epochs = 8}
"""
PROFILE = 'cluster = "site"\n'
TEXTS = {
    "demo": (REPOSITORY / "configs/demo.toml").read_text(),
    "camvid": (REPOSITORY / "configs/camvid.toml").read_text(),
    "small": TEXT.format(folder="here"),
    "composed": TEXT.format(folder="here") + MORE,
    "profile": PROFILE + TEXT.format(folder="here").partition("[cluster]")[0],
}
SITE = (REPOSITORY / "configs/clusters/v100.toml").read_text()
Tree = dict[str, Any]


class Deep(NamedTuple):
    """Lists in lists."""

    levels: int


ODD_TEXTS = (
    "", " ", "x" * 10_000, "../x", "a/b", "/", ".", "..", "~", "~nobody-here/x", "a\0b", "a\nb",
    "ü", "\x1b[31m", "\u202e", "🜁", "$(touch x)", "<script>", "%j", "a\\b", "here/run",
    "here/streets", "imagenet", "coco", "none", "pretrain", "CE", "DLNWCE", "synthetic", "folder",
    "streets", "fcn_resnet50", "slurm", "site",
)  # fmt: skip
ODD_VALUES: tuple[Any, ...] = (
    0, 1, -1, 2, 8, 16, 17, 2**15 + 1, 2**63, -(2**63), 10**30, 10**400, 16**5000, 0.0, -0.0, 0.5,
    1.0, 1e-320, 1e308, math.nan, math.inf, -math.inf, True, False, [], {}, [[]], [0], [1, 1],
    [0.5, 0.5], [17, 17], [0, 0, 0], ["CE", "CE"], [["x"]], ["../x"], list(range(2000)),
    {"a": {"b": 1}}, {"epochs": 1}, Deep(90), Deep(2000), datetime.date(2020, 1, 1),
)  # fmt: skip
values = st.one_of(
    st.sampled_from(ODD_TEXTS + ODD_VALUES),
    st.integers(),
    st.floats(),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=20),
    st.lists(st.integers(-3, 300) | st.floats(0, 1), max_size=3),
)


def as_toml(tree: Tree) -> str:
    """The tree as TOML, a line for each key of its top."""
    return "".join(f"{_key(key)} = {_value(value)}\n" for key, value in tree.items())


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int):
        return hex(value) if value > 10**300 else str(value)  # hexadecimal ones may be any length
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, Deep):
        return "[" * value.levels + "]" * value.levels
    if isinstance(value, list):
        return f"[{', '.join(map(_value, value))}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_key(k)} = {_value(v)}" for k, v in value.items()) + "}"
    return str(value)


def _key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else _text(key)


def _text(text: str) -> str:
    escaped = {'"': '\\"', "\\": "\\\\"}
    return '"' + "".join(
        escaped.get(c, f"\\u{ord(c):04x}" if ord(c) < 32 or ord(c) == 127 else c) for c in text
    ) + '"'  # fmt: skip


def places(table: Any) -> Iterator[tuple[Any, Any]]:
    """Every (table or list, key or index) of a tree."""
    for key in table if isinstance(table, dict) else range(len(table)):
        yield table, key
        if isinstance(table[key], dict | list):
            yield from places(table[key])


def set_value(chance: random.Random, table: Any, key: Any, value: Any) -> None:
    table[key] = value


def set_like_value(chance: random.Random, table: Any, key: Any, value: Any) -> None:
    """Another one of its type."""
    kind = type(table[key])
    same = [odd for odd in ODD_TEXTS + ODD_VALUES if type(odd) is kind and odd != table[key]]
    if same:
        table[key] = copy.deepcopy(chance.choice(same))


def drop(chance: random.Random, table: Any, key: Any, value: Any) -> None:
    del table[key]


def misspell(chance: random.Random, table: Any, key: Any, value: Any) -> None:
    if isinstance(table, dict):
        place = chance.randrange(len(key) + 1)
        wrong = chance.choice(
            (
                key[:place] + key[place + 1 :],
                key[:place] + "s" + key[place:],
                key.upper(),
                f"../{key}",
            )
        )
        table[wrong] = table.pop(key)


def nest(chance: random.Random, table: Any, key: Any, value: Any) -> None:
    table[key] = chance.choice(([table[key]], {str(key): table[key]}))


def repeat(chance: random.Random, table: Any, key: Any, value: Any) -> None:
    if isinstance(table, list):
        table.append(copy.deepcopy(table[key]))
    else:
        table[f"{key}-2"] = copy.deepcopy(table[key])


def stretch(chance: random.Random, table: Any, key: Any, value: Any) -> None:
    if isinstance(table[key], str | list):
        table[key] = table[key] * chance.choice((0, 2, 1000))
    elif type(table[key]) in (int, float):
        table[key] = table[key] * chance.choice((-1, 0, 0.5, 1000, 10**20))


def retype(chance: random.Random, table: Any, key: Any, value: Any) -> None:
    old = table[key]
    table[key] = chance.choice((str(old), [old], True)) if not isinstance(old, str) else [old]


MISTAKES: tuple[Callable[[random.Random, Any, Any, Any], None], ...] = (
    set_value, set_value, set_like_value, set_like_value, drop, misspell, nest, repeat, stretch,
    retype,
)  # fmt: skip


def mistaken(chance: random.Random, text: str, given: list[Any]) -> tuple[Tree, Any]:
    """The tables of `text` after a mistake for each value of `given`, and the key of the last."""
    tree = tomllib.loads(text)
    key = None
    for value in given:
        where: dict[Any, list[tuple[Any, Any]]] = {}  # by key: a long list is no likelier place
        for table, place in places(tree):
            where.setdefault(place if isinstance(place, str) else "", []).append((table, place))
        if not where:
            break
        table, key = chance.choice(where[chance.choice(sorted(where))])
        chance.choice(MISTAKES)(chance, table, key, value)
    return tree, key
