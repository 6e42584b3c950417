"""An evaluation gives the same counts, to the last bit, however many ranks share it: every image is
counted once, by one of them."""

from __future__ import annotations

from collections import Counter
from itertools import chain

import numpy as np
import pytest
import torch

from data_prep.pack import pack
from data_prep.settings import VOID, parse_dataset
from data_prep.shards.manifest import Manifest
from data_prep.shards.reader import SplitReader
from hpc.distributed.launcher import single_process
from hpc.distributed.process_group import Group
from hpc.storage.atomic import fingerprint
from jobs.kernels.fused_counts import count_upsampled
from jobs.metrics.counts import NAMES, Counts
from jobs.metrics.reference import count_image
from jobs.models.build import IMAGENET_MEAN, IMAGENET_STD, normalise, upsample
from jobs.spec.protocol import Protocol
from jobs.training import evaluate as evaluation
from jobs.training.evaluate import count, evaluate
from tests.jobs.ranks import on_ranks

CELLS = 2
PROTOCOL = Protocol(eval_size=0, bins=7, workers=0, threads=1, counting="reference")
FUSED = PROTOCOL.model_copy(update={"counting": "fused"})
WORLD_SIZES = (1, 2, 3)


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> Manifest:
    """A data set whose images to validate on neither two nor three ranks share evenly."""
    folder = tmp_path_factory.mktemp("packed")
    table = {"source": "synthetic", "shards": str(folder), "train": 2, "val": 5, "size": [40, 56]}
    return pack("streets", parse_dataset("streets", table, "grid.toml"), processes=1)


def forward(images, num_classes):
    """Logits of two cells, at a stride of 8, as heads have them."""
    generator = torch.Generator().manual_seed(0)
    kernels = torch.randn(CELLS, num_classes, 3, 8, 8, generator=generator) / 4
    return [torch.nn.functional.conv2d(images, kernel, stride=8) for kernel in kernels]


def on_rank(group, folder):
    """By protocol the counts of both cells, and the images that this rank has seen."""
    return {p.counting: evaluated_by(group, folder, p) for p in (PROTOCOL, FUSED)}


def evaluated_by(group, folder, protocol):
    manifest, seen = Manifest.load(folder), []
    num_classes = len(manifest.classes)

    def noted(images):
        assert len(images) == 1
        seen.append(fingerprint(images.tolist()))
        return forward(images, num_classes)

    reader = SplitReader(manifest, "val")
    counts = evaluate(noted, CELLS, reader, num_classes, protocol, group, lambda: False)
    arrays = [
        {name: torch.from_numpy(array) for name, array in one.as_arrays().items()} for one in counts
    ]
    return arrays, seen


@pytest.fixture(scope="module")
def evaluated(packed, tmp_path_factory):
    """The results of each rank, by the number of ranks and the way of counting."""
    found = {
        size: on_ranks(size, tmp_path_factory.mktemp("ranks"), on_rank, packed.folder)
        for size in WORLD_SIZES
    }
    return {
        size: {counting: [rank[counting] for rank in ranks] for counting in ranks[0]}
        for size, ranks in found.items()
    }


@pytest.fixture(scope="module")
def by_hand(packed):
    """The counts of every image of both cells, one after the other, and the images themselves."""
    reader = SplitReader(packed, "val")
    counts, images = [[] for _ in range(CELLS)], []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for index in range(len(reader)):
        image = normalise(torch.from_numpy(reader.image(index).transpose(2, 0, 1).copy())[None])
        label = torch.from_numpy(np.array(reader.label(index)))
        images.append(fingerprint(image.tolist()))
        with torch.no_grad():
            for cell, logits in enumerate(forward(image, len(packed.classes))):
                scores = upsample(logits, tuple(label.shape))[0]
                counts[cell].append(count_image(scores, label, PROTOCOL.bins, VOID))
    torch.set_num_threads(threads)
    return counts, images


@pytest.mark.parametrize("size", WORLD_SIZES)
def test_counts_are_those_of_the_images_one_by_one(evaluated, by_hand, size):
    for cell, images in enumerate(by_hand[0]):
        whole = sum(images[1:], images[0]).as_arrays()
        assert np.count_nonzero(whole["class_bins"][..., 0]) > 20  # not a trivial evaluation
        for found, _ in evaluated[size]["reference"]:  # every rank has the sums
            for name in NAMES:
                assert found[cell][name].dtype == torch.int64
                np.testing.assert_array_equal(found[cell][name], whole[name], err_msg=name)


@pytest.mark.parametrize("size", WORLD_SIZES)
def test_so_they_are_where_the_protocol_has_them_counted_in_one_pass(packed, evaluated, size):
    reader = SplitReader(packed, "val")
    whole = [Counts.zeros(len(packed.classes), FUSED.bins) for _ in range(CELLS)]
    for index in range(len(reader)):
        image = normalise(torch.from_numpy(reader.image(index).transpose(2, 0, 1).copy())[None])
        label = torch.from_numpy(np.array(reader.label(index)))
        for cell, logits in enumerate(forward(image, len(packed.classes))):
            whole[cell] += count_upsampled(logits[0], label, FUSED.bins)
    for found, _ in evaluated[size]["fused"]:
        for cell, counts in zip(found, whole, strict=True):
            arrays = {name: tensor.numpy() for name, tensor in cell.items()}
            assert Counts.from_arrays(arrays).equals(counts)


@pytest.mark.parametrize("size", WORLD_SIZES)
def test_no_image_is_padded_left_out_or_repeated(evaluated, by_hand, packed, size):
    seen = [images for _, images in evaluated[size]["reference"]]
    assert Counter(chain(*seen)) == Counter(by_hand[1])
    assert seen == [by_hand[1][rank::size] for rank in range(size)]
    for found, _ in evaluated[size]["reference"]:
        for cell in found:
            assert cell["images"] == packed.splits["val"].images
            assert cell["pixels"] + cell["void"] == len(by_hand[1]) * 40 * 56
            assert cell["confusion"].sum() == cell["top1_bins"][:, 0].sum() == cell["pixels"]


def test_the_images_may_be_merged_in_any_order_and_in_any_tree(by_hand):
    generator = np.random.default_rng(0)
    for images in by_hand[0]:
        whole = sum(images, Counts.zeros(images[0].num_classes, images[0].bins))
        for _ in range(50):
            assert merged(images, generator).equals(whole)


def merged(counts, generator):
    """Two of them at a time, drawn at random, until one is left."""
    left = list(counts)
    while len(left) > 1:
        one = left.pop(generator.integers(len(left)))
        other = left.pop(generator.integers(len(left)))
        left.append(one + other)
    return left[0]


def evaluated_here(packed, forward, device="cpu"):
    """The counts of both cells on one rank in this process, in one pass over the logits."""
    group = Group(single_process(), torch.device(device))
    reader = SplitReader(packed, "val")
    return evaluate(forward, CELLS, reader, len(packed.classes), FUSED, group, lambda: False)


def test_a_gpu_has_its_next_image_before_the_last_one_is_counted(packed, monkeypatch):
    events, images = [], packed.splits["val"].images

    def noted_forward(image):
        events.append("forward")
        return forward(image, len(packed.classes))

    def noted_count(*arguments):
        events.append("count")
        return count(*arguments)

    monkeypatch.setattr(evaluation, "count", noted_count)
    evaluated_here(packed, noted_forward)
    counts = ["count"] * CELLS
    assert events == ["forward"] + (["forward", *counts]) * (images - 1) + counts


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
def test_a_real_gpu_counts_what_a_cpu_counts_of_the_same_logits(packed):
    mean, std = (torch.tensor(of)[:, None, None] for of in (IMAGENET_MEAN, IMAGENET_STD))

    def exact(images):  # normalised here: a GPU may round that otherwise
        pixels = ((images.cpu() * std + mean) * 255).round().byte()
        return forward(normalise(pixels), len(packed.classes))

    def on_gpu(images):
        return [cell.cuda(non_blocking=True) for cell in exact(images)]

    for found, expected in zip(
        evaluated_here(packed, on_gpu, "cuda"), evaluated_here(packed, exact), strict=True
    ):
        assert found.equals(expected)
