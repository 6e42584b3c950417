"""Read a set of pictures with other libraries, as their users would.

Each reader yields the images and label maps in order, as uint8 arrays.

`pip install -e '.[benchmarks]'` installs webdataset. MosaicML Streaming 0.13 requires numpy below
2.2 and the libraries of five cloud services, but reading local files needs none of them. It works
with newer versions when installed as

    pip install --no-deps 'mosaicml-streaming==0.13.0' 'transformers<5' 'huggingface_hub<1'
    pip install regex requests pyyaml tqdm xxhash zstd Brotli python-snappy 'catalogue<3'
    pip install 'tokenizers<0.23' safetensors
"""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Callable, Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torchvision.datasets import VisionDataset

from benchmarks.pictures import PictureSet, decoded

Bytes = NDArray[np.uint8]
Pairs = Iterator[tuple[Bytes, Bytes]]
WEBDATASET = "webdataset, PNG"
STREAMING_PNG = "MosaicML Streaming, PNG"
STREAMING_RAW = "MosaicML Streaming, raw arrays"
NEEDS = {WEBDATASET: "webdataset", STREAMING_PNG: "streaming", STREAMING_RAW: "streaming"}


class PngFolder(VisionDataset):
    """A folder, read as torchvision's own data sets (VOCSegmentation, Cityscapes) do."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self._images = sorted((root / "png").iterdir())
        self._labels = sorted((root / "labels").iterdir())

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, i: int) -> tuple[Image.Image, Image.Image]:
        return Image.open(self._images[i]).convert("RGB"), Image.open(self._labels[i])


def why_absent(peer: str) -> str:
    """Return the reason why a peer cannot be measured; "" if it can."""
    package = NEEDS.get(peer)
    if package is None or find_spec(package) is not None:
        return ""
    return f"{package} is not installed (see benchmarks/readers.py)"


def readers(pictures: PictureSet) -> dict[str, Callable[[], Pairs]]:
    """Return, for each installed peer, a function that starts a pass over the set."""
    ways: dict[str, Callable[[PictureSet], Callable[[], Pairs]]] = {
        "torchvision, PNG folder": _torchvision,
        WEBDATASET: _webdataset,
        STREAMING_PNG: _streaming_png,
        STREAMING_RAW: _streaming_raw,
    }
    return {name: way(pictures) for name, way in ways.items() if not why_absent(name)}


def _torchvision(pictures: PictureSet) -> Callable[[], Pairs]:
    folder = PngFolder(pictures.root)
    return lambda: _as_arrays(folder[i] for i in range(len(folder)))


def _webdataset(pictures: PictureSet) -> Callable[[], Pairs]:
    import webdataset

    path = pictures.root / "pictures.tar"
    with tarfile.open(path, "w") as tar:
        pairs = zip(pictures.files("png"), pictures.files("labels"), strict=True)
        for number, pair in enumerate(pairs):
            for kind, file in zip(("image", "label"), pair, strict=True):
                tar.add(file, f"{number:06d}.{kind}.png")
    samples = (
        webdataset.WebDataset(str(path), shardshuffle=False)
        .to_tuple("image.png", "label.png")
        .map_tuple(_opened, _opened)  # its own decoder is slower and returns label maps as RGB
    )
    return lambda: _as_arrays(samples)


def _streaming_png(pictures: PictureSet) -> Callable[[], Pairs]:
    return _mosaic(pictures, "png", Image.open)


def _streaming_raw(pictures: PictureSet) -> Callable[[], Pairs]:
    return _mosaic(pictures, "ndarray:uint8", decoded)


def _mosaic(
    pictures: PictureSet, encoding: str, read: Callable[[Path], object]
) -> Callable[[], Pairs]:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # an imported library would look for updates
    from streaming import LocalDataset, MDSWriter

    folder = pictures.root / f"mds-{encoding.partition(':')[0]}"
    columns = {"image": encoding, "label": encoding}
    with MDSWriter(out=str(folder), columns=columns, size_limit="512mb") as writer:
        for image, label in zip(pictures.files("png"), pictures.files("labels"), strict=True):
            writer.write({"image": read(image), "label": read(label)})
    samples = LocalDataset(str(folder))
    order = range(len(samples))
    return lambda: _as_arrays((row["image"], row["label"]) for row in map(samples.get_item, order))


def _opened(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data))


def _as_arrays(pairs: Iterable[tuple[Any, Any]]) -> Pairs:
    for image, label in pairs:
        yield np.asarray(image), np.asarray(label)
