"""Download and check pre-trained weights: `python -m data_prep.weights CONFIG`.

Run it on the login node, since compute nodes have no internet.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from data_prep.settings import DatasetSettings, read_datasets
from data_prep.sources import source_module
from hpc.account import expanded
from hpc.cli import MissingInput, UserError, argument_parser, run
from hpc.config import did_you_mean, read_toml, shown, user_path
from hpc.storage.atomic import Damaged, file_sha256, new_file

T = TypeVar("T", dict, list)

SOURCE = "https://download.pytorch.org/models"
PRE_FINE = "pre-fine"  # these weights, and the paper's name of CE started from them
OF_ONE_MODEL = ("coco", PRE_FINE)  # weights with a file and a backbone for each model
VOC_CLASSES = 21  # the classes of the classifiers in COCO's files
_IMAGENET = {
    "resnet50": "resnet50-0676ba61.pth",
    "resnet101": "resnet101-63fe2227.pth",
    "mobilenet_v3_large": "mobilenet_v3_large-8738ca79.pth",
}
_COCO = {
    "fcn_resnet50": "fcn_resnet50_coco-1167a1af.pth",
    "fcn_resnet101": "fcn_resnet101_coco-7ecb50ca.pth",
    "deeplabv3_resnet50": "deeplabv3_resnet50_coco-cd0a2569.pth",
    "deeplabv3_resnet101": "deeplabv3_resnet101_coco-586e9e4e.pth",
    "deeplabv3_mobilenet_v3_large": "deeplabv3_mobilenet_v3_large-fc3c493d.pth",
}
# (weights, model) -> file. ImageNet's are the first published ones, which the paper could use.
# COCO's are COCO_WITH_VOC_LABELS_V1: `coco` takes their backbone, `pre-fine` the head as well.
# A file's name ends with the start of its SHA-256.
FILES = {
    **{
        ("imagenet", f"{head}_{backbone}"): file
        for backbone, file in _IMAGENET.items()
        for head in ("fcn", "deeplabv3")
    },
    ("imagenet", "unet_resnet50"): _IMAGENET["resnet50"],
    **{(weights, model): file for weights in OF_ONE_MODEL for model, file in _COCO.items()},
}
PUBLISHED = ("imagenet", "coco", PRE_FINE)
WITHOUT_FILE = ("none", "pretrain")


def _torch_home(environ: Mapping[str, str] = os.environ) -> Path:
    """Return the folder of downloaded weights, as `torch.hub.get_dir` finds it."""
    cache = environ.get("XDG_CACHE_HOME") or expanded("~/.cache")
    return expanded(environ.get("TORCH_HOME") or Path(cache) / "torch")


def weights_path(weights: str, model: str) -> Path:
    """Return the path of the file that `weights` means for `model`. It may be missing.

    Args:
        weights: one of `PUBLISHED`, or a path.
        model: a model's name.

    Raises:
        UserError: no such weights are published for the model.
    """
    if (weights, model) in FILES:
        return _torch_home() / "hub" / "checkpoints" / FILES[weights, model]
    if weights in PUBLISHED:
        models = [name for kind, name in FILES if kind == weights]
        raise UserError(
            f"no {weights!r} weights are published for {model!r}; {did_you_mean(model, models)}"
        )
    return user_path(weights, "weights")


def require_weights(weights: str, model: str) -> Path:
    """Return `weights_path` of a file that exists; the file is not read.

    Raises:
        UserError: there is no such file, or as `weights_path`.
    """
    path = weights_path(weights, model)
    if path.is_file():
        return path
    if (weights, model) in FILES:
        raise MissingInput(
            f"weights = {weights!r} needs {path}; fetch it where there is internet with "
            f"`python -m data_prep.weights CONFIG`, or copy {SOURCE}/{path.name} there"
        )
    raise UserError(
        f"weights = {shown(weights)} is neither {', '.join(PUBLISHED)}, none or pretrain nor a "
        "file that exists"
    )


def without_pre_fine(settings: DatasetSettings, model: str) -> str:
    """Return why `model` has no pre-fine weights for this data set; "" if it has."""
    if (PRE_FINE, model) not in FILES:
        return f"no weights trained on COCO are published for {model}"
    found = len(source_module(settings.source).classes(settings))
    if found != VOC_CLASSES:
        return f"pre-fine needs VOC's {VOC_CLASSES} classes, not {found}"
    return ""


def check_published(path: Path) -> None:
    """Check a published file against the hash in its name.

    Raises:
        Damaged: the content has another hash.
    """
    expected = _hash_prefix(path)
    if not file_sha256(path).startswith(expected):
        raise Damaged(f"{path} is damaged (its SHA-256 does not start with {expected}); delete it")


def _hash_prefix(path: Path) -> str:
    return path.stem.rsplit("-", 1)[-1]


def fetch(path: Path) -> None:
    """Download a published file to `path`, whole and checked.

    Raises:
        UserError: the file cannot be downloaded or written, or has another hash.
    """
    # imported here because planning imports this module
    from http.client import HTTPException
    from urllib.error import URLError

    import torch.hub

    url = f"{SOURCE}/{path.name}"
    with new_file(path) as temporary:
        try:
            torch.hub.download_url_to_file(url, str(temporary), hash_prefix=_hash_prefix(path))
        # caught inside `new_file`, which takes OSErrors for errors of the disk;
        # RuntimeError: the hash differs
        except (URLError, HTTPException, ConnectionError, TimeoutError, RuntimeError) as error:
            raise UserError(f"cannot fetch {url}: {error}") from error


def main(argv: Sequence[str]) -> int:
    """Fetch and check the weights of a grid file, and return the exit code."""
    parser = argument_parser("python -m data_prep.weights", __doc__)
    parser.add_argument("config", type=Path, help="the grid file")
    arguments = parser.parse_args(argv)
    needed = sorted(_needed(arguments.config))
    for weights in dict.fromkeys(w for w, _ in needed if w in WITHOUT_FILE):
        print(f"weights = {weights!r} needs no file")
    for path in sorted({weights_path(w, m) for w, m in needed if w not in WITHOUT_FILE}):
        published = path.name in FILES.values()
        if published and not path.is_file():
            print(f"fetching {path.name}")
            fetch(path)
        elif published:
            check_published(path)
        elif not path.is_file():
            raise UserError(f"weights = {str(path)!r}: there is no such file")
        print(f"ready: {path}")
    return 0


def _needed(config: Path) -> set[tuple[str, str]]:
    """Return the (weights, model) that a grid file needs."""
    grid = read_toml(config)
    protocol = _of_type(dict, grid.get("protocol", {}), f"{config}: [protocol]")
    where = f"{config}: [protocol.per_dataset]"
    special = _of_type(dict, protocol.get("per_dataset", {}), where)
    tables = [protocol, *(t for t in special.values() if isinstance(t, dict) and "weights" in t)]
    models = _of_type(list, grid.get("models", []), f"{config}: models")
    needed = {(str(t.get("weights", "imagenet")), str(m)) for t in tables for m in models}
    if PRE_FINE in _of_type(list, grid.get("losses", []), f"{config}: losses"):
        datasets = read_datasets(config).values()
        starts = (m for m in models if not all(without_pre_fine(d, m) for d in datasets))
        needed |= {(PRE_FINE, model) for model in starts}
    return needed


def _of_type(kind: type[T], value: Any, where: str) -> T:
    if not isinstance(value, kind):
        expected = {dict: "a table", list: "a list"}[kind]
        raise UserError(f"{where} must be {expected}, not {value!r}")
    return value


if __name__ == "__main__":
    run(main)
