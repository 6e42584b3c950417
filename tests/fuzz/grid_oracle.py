"""Describe valid grid files a second time and in another way: a table of keys and a condition
on each value. A file that `read_grid` accepts must hold nothing else, and must come out unchanged.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jobs.losses.grammar import example_names
from jobs.models.registry import MODELS

Condition = Callable[[Any], bool]


def whole(low: int, high: float = math.inf) -> Condition:
    return lambda value: type(value) is int and low <= value <= high


def number(low: float, high: float = math.inf, above: bool = False) -> Condition:
    """Finite, from `low` (or above it) to `high`."""

    def condition(value: Any) -> bool:
        if type(value) not in (int, float) or not math.isfinite(value):
            return False
        return low <= value <= high and (value > low or not above)

    return condition


def one_of(*words: str) -> Condition:
    return lambda value: type(value) is str and value in words


def text(value: Any) -> bool:
    return type(value) is str


def name(value: Any) -> bool:
    return text(value) and value.isprintable() and value.strip() != ""


def truth(value: Any) -> bool:
    return type(value) is bool


def several(condition: Condition, least: int = 0, most: float = math.inf) -> Condition:
    return lambda value: (
        type(value) is list and least <= len(value) <= most and all(map(condition, value))
    )


def rising(condition: Condition, equal: bool) -> Condition:
    pair = several(condition, 2, 2)
    return lambda value: pair(value) and (value[0] < value[1] or (equal and value[0] == value[1]))


def table(keys: Mapping[str, Condition], *needed: str) -> Condition:
    return lambda value: (
        type(value) is dict
        and set(needed) <= set(value) <= set(keys)
        and all(keys[key](inner) for key, inner in value.items())
    )


def tables(condition: Condition, least: int = 0) -> Condition:
    """A table of tables with names of one's own."""
    return lambda value: (
        type(value) is dict and len(value) >= least and all(map(condition, value.values()))
    )


def distinct(condition: Condition) -> Condition:
    return lambda value: condition(value) and len(set(value)) == len(value)


def tables_of_classes(value: Any) -> bool:
    """Names of classes by the values in label maps."""
    keys = {str(number) for number in range(256)}
    return type(value) is dict and set(value) <= keys and all(map(text, value.values()))


def loss_table(value: Any) -> bool:
    if not table(LOSS, "name", "terms")(value):
        return False
    knots = value.get("schedule", [])
    places = [knot["at"] for knot in knots]
    return places == sorted(set(places)) and all(
        len(knot["weights"]) == len(value["terms"]) and any(knot["weights"]) for knot in knots
    )


PRETRAIN = {
    "epochs": whole(1, 10**6),
    "batch_size": whole(1, 10**6),
    "learning_rate": number(0, above=True),
    "seed": whole(0, 2**63 - 1),
    "threads": whole(0, 1024),
}
LARGEST = 2**15  # pixels a side
ALWAYS_SEEN = 9  # pixels a side: no model has more than 8 x 8 of them a position, or more
PROTOCOL = {
    "epochs": whole(1, 10**6),
    "batch_size": whole(1, 10**6),
    "learning_rate": number(0, above=True),
    "decay": one_of("linear", "polynomial"),
    "decay_power": number(0, above=True),
    "momentum": lambda value: number(0)(value) and value < 1,
    "weight_decay": number(0),
    "resize": rising(whole(ALWAYS_SEEN, LARGEST), equal=True),
    "long_side": one_of("round", "truncate"),
    "crop": several(whole(ALWAYS_SEEN, LARGEST), 2, 2),
    "flip": number(0, 1),
    "eval_size": lambda value: value == 0 or whole(ALWAYS_SEEN, LARGEST)(value),
    "weights": text,
    "train": one_of("head", "all"),
    "backbone_batchnorm": one_of("eval", "train"),
    "batchnorm_momentum": number(0, 1, above=True),
    "precision": one_of("fp32", "mixed"),
    "naive_ramp": rising(number(0, 1, above=True), equal=False),
    "alternating_ramp": rising(number(0, 1, above=True), equal=False),
    "bins": whole(1, 100),
    "counting": one_of("fused", "reference"),
    "pretrain": table(PRETRAIN),
    "threads": whole(1, 1024),
    "workers": whole(0, 64),
    "deterministic": truth,
    "checkpoint_minutes": number(0),
}
DATASET = {
    "source": one_of("folder", "synthetic"),
    "shards": text,
    "codec": one_of("auto", "raw", "encoded"),
    "shard_mb": whole(1, 100_000),
    "skip_bad": truth,
    "root": text,
}
SYNTHETIC = DATASET | {
    "train": whole(1, 10**5),
    "val": whole(1, 10**5),
    "size": several(whole(32, LARGEST), 2, 2),
    "seed": whole(0, 2**63 - 1),
}
FOLDER = DATASET | {
    "classes": distinct(several(text, 2, 255)),
    "labels": tables_of_classes,
    "void": lambda value: whole(0, 255)(value) or several(whole(0, 255))(value),
    **dict.fromkeys(("train_images", "train_labels", "val_images", "val_labels"), text),
}
CLUSTER = {
    "kind": one_of("auto", "slurm", "local"),
    **dict.fromkeys(
        ("group", "partition", "account", "qos", "constraint", "exclude", "gres", "mail_user",
         "mail_type", "python", "mpi", "network_interface"),
        lambda value: text(value) and (value == "" or value.isprintable()),
    ),
    "extra": tables(lambda value: text(value) or truth(value) or whole(-math.inf)(value)),
    "memory_gb": number(0, above=True),
    "lead_seconds": whole(0, 65535),
    "minutes": whole(1, 60 * 24 * 3650),
    "setup": several(text),
    "gpus_per_node": whole(0, 10**6),
    "cells_per_job": lambda value: value == "fit" or whole(0, 10**6)(value),
    "gpu_memory_gb": number(0, above=True),
    **dict.fromkeys(
        ("nodes", "tasks_per_node", "cpus_per_task", "array_parallelism", "local_jobs"),
        whole(1, 10**6),
    ),
}  # fmt: skip
KNOT = {
    "at": number(0, 1),
    "weights": several(number(0), 1),
    "ramp": one_of("constant", "linear", "cosine"),
}
LOSS = {
    "name": lambda value: name(value) and value not in example_names(),
    "terms": several(text, 1),
    "schedule": several(table(KNOT, "at", "weights")),
}
GRID = {
    "name": name,
    "seeds": distinct(several(whole(0, 2**63 - 1), 1)),
    "models": distinct(several(one_of(*MODELS), 1)),
    "losses": distinct(several(text)),
    "ramps": several(rising(number(0, 1, above=True), equal=False)),
    "loss": several(loss_table),
    "run_dir": text,
    "dataset": tables(
        lambda value: (
            (table(SYNTHETIC, "source")(value) and value["source"] == "synthetic")
            or (table(FOLDER, "source", "root")(value) and value["source"] == "folder"
                and ("classes" in value or len(value["labels"]) > 1))
        ),
        least=1,
    ),
    "protocol": table(PROTOCOL | {"per_dataset": tables(table(PROTOCOL))}),
    "cluster": lambda value: text(value) or table(CLUSTER)(value),
}  # fmt: skip
may_be_a_grid = table(GRID, "name", "seeds", "models", "dataset")


def assert_unchanged(given: Mapping[str, Any], read: Any) -> None:
    """Every value of the table `given` is the attribute of its name of `read`: the same number,
    text or truth. Lists are tuples, whole numbers may be decimal ones."""
    for key, value in given.items():
        assert_same(value, getattr(read, key), key)


def assert_same(given: Any, read: Any, key: str) -> None:
    if isinstance(given, dict) and not isinstance(read, dict):
        assert_unchanged(given, read)
    elif isinstance(given, list):
        assert len(given) == len(read), key
        for one, other in zip(given, read, strict=True):
            assert_same(one, other, key)
    else:
        wider = type(given) is int and type(read) is float
        assert given == read and (type(given) is type(read) or wider), key


def sides_are_seen(models: Sequence[str], protocol: Mapping[str, Any]) -> bool:
    """Return whether all sides are longer than one position of the models' features."""
    position = 16 if any("mobilenet" in model for model in models) else 8  # pixels a side
    sides = [*protocol.get("crop", ()), *protocol.get("resize", ())]
    return min([*sides, protocol.get("eval_size", 0) or math.inf]) > position


PATHS = {"shards", "root"}


def assert_read_as_written(tree: Mapping[str, Any], grid: Any) -> None:
    """The resolved grid says what the file's tables say."""
    assert_unchanged({key: tree[key] for key in ("name", "seeds", "models")}, grid)
    for dataset, given in tree["dataset"].items():
        plain = {key: value for key, value in given.items() if key not in PATHS}
        assert_unchanged(plain, grid.datasets[dataset])
        for key in PATHS & given.keys():
            if given[key]:
                expected = Path(given[key]).expanduser().absolute()
                assert getattr(grid.datasets[dataset], key) == str(expected)
    protocol = dict(tree.get("protocol", {}))
    special = protocol.pop("per_dataset", {})
    for dataset, read in grid.protocols.items():
        changes = special.get(dataset, {})
        pretrain = protocol.get("pretrain", {}) | changes.get("pretrain", {})
        assert_unchanged(protocol | changes | {"pretrain": pretrain}, read)
    if isinstance(tree.get("cluster"), dict):
        assert_unchanged(tree["cluster"], grid.cluster)
    named = tree.get("losses", [])
    composed = tree.get("loss", [])
    assert [loss.name for loss in grid.losses] == [*named, *(one["name"] for one in composed)]
    for given, loss in zip(composed, grid.losses[len(named) :], strict=True):
        assert [term.name for term in loss.terms] == given["terms"]
        assert_same(
            given.get("schedule") or [], loss.schedule[: len(given.get("schedule") or [])], ""
        )
    for read in grid.protocols.values():
        assert sides_are_seen(grid.models, read.model_dump())
    axes = (tree["dataset"], tree["models"], grid.losses, tree["seeds"])
    assert len(grid.cells) == math.prod(map(len, axes))
    assert len({cell.signature for cell in grid.cells}) == len(grid.cells)
