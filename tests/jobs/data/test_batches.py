"""The batch of a step is a function of seed and step, however it is prepared and shared."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from data_prep.shards.reader import SplitReader
from hpc.cli import UserError
from jobs.data.batches import (
    Batch,
    Draw,
    EvaluationImages,
    TrainingBatches,
    share,
)
from jobs.data.loader import Transfer, load_images, load_steps
from jobs.spec.protocol import Protocol

STEPS = 7  # three epochs and a half of two batches of four, of eleven pictures
# pictures of 40 x 56 as they are, so that they can be told apart
AS_THEY_ARE = {"resize": (40, 40), "crop": (40, 56), "flip": 0.0}


@pytest.fixture
def train(streets):
    return SplitReader(streets, "train")


def batches_of(reader, seed=0, rank=0, world_size=1, **settings):
    table = {"batch_size": 4, "resize": (30, 60), "crop": (32, 48), **settings}
    return TrainingBatches(reader, Protocol(**table), seed, rank, world_size)


def loaded(batches, start=0, stop=STEPS, workers=0):
    """Return copies of the batches, each made while it is the last."""
    return [content(batch) for batch in load_steps(batches, start, stop, workers)]


def content(batch):
    return batch.images.numpy().tobytes(), batch.target.numpy().tobytes()


def pictures(batches, steps):
    """The images of these steps, one after the other, as bytes that tell them apart."""
    return [image.numpy().tobytes() for step in steps for image in batches[step].images]


def test_a_batch_is_images_and_labels_of_the_crops_size(train):
    batch = batches_of(train)[0]
    assert (batch.images.dtype, batch.target.dtype) == (torch.uint8, torch.uint8)
    assert batch.images.shape == (4, 3, 32, 48) and batch.target.shape == (4, 32, 48)
    assert batch.positions == range(4)
    assert batch.images.is_contiguous()


def test_images_and_labels_are_those_of_the_data_set(train):
    """Resized, flipped and cropped not at all, a sample is its picture and its own label map."""
    originals = {
        train.image(k).transpose(2, 0, 1).tobytes(): train.label(k) for k in range(len(train))
    }
    for step in range(4):
        batch = batches_of(train, **AS_THEY_ARE)[step]
        for image, target in zip(batch.images, batch.target, strict=True):
            np.testing.assert_array_equal(target, originals[image.numpy().tobytes()])


def test_training_may_begin_at_any_step(train):
    through = loaded(batches_of(train))
    assert len(set(through)) == STEPS
    for start in (1, 2, 5):
        assert loaded(batches_of(train), start) == through[start:]


@pytest.mark.parametrize("workers", [1, 2])
def test_any_number_of_loaders_prepares_the_same_batches_in_order(train, workers):
    assert loaded(batches_of(train), 3, workers=workers) == loaded(batches_of(train), 3)


def test_more_loaders_than_steps(train):
    assert len(loaded(batches_of(train), 6, 7, workers=3)) == 1
    assert loaded(batches_of(train), 7, 7, workers=2) == []


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 6])
def test_the_shares_of_all_ranks_are_the_batch(train, world_size):
    """Six ranks for four images: two of them have none."""
    whole = batches_of(train)
    ranks = [batches_of(train, rank=rank, world_size=world_size) for rank in range(world_size)]
    for step in range(STEPS):
        shares = [rank[step] for rank in ranks]
        assert torch.equal(torch.cat([share.images for share in shares]), whole[step].images)
        assert torch.equal(torch.cat([share.target for share in shares]), whole[step].target)
        assert [p for share in shares for p in share.positions] == list(range(4))


@pytest.mark.parametrize("batch_size", [1, 5, 12, 13])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 16])
def test_shares_are_contiguous_and_even_up_to_one(batch_size, world_size):
    shares = [share(batch_size, rank, world_size) for rank in range(world_size)]
    assert [position for one in shares for position in one] == list(range(batch_size))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_a_sample_is_seen_at_most_once_an_epoch(train):
    """Eleven pictures, two batches of four: three are left out, others each time."""
    batches = batches_of(train, **AS_THEY_ARE)
    known = {train.image(k).transpose(2, 0, 1).tobytes() for k in range(len(train))}
    left_out = set()
    for epoch in range(8):
        seen = pictures(batches, range(2 * epoch, 2 * epoch + 2))
        assert len(set(seen)) == len(seen) == 8 and known.issuperset(seen)
        left_out.add(frozenset(known.difference(seen)))
    assert len(left_out) > 1


def test_without_a_remainder_every_sample_is_seen_once_an_epoch(train):
    batches = batches_of(train, batch_size=11, **AS_THEY_ARE)
    assert batches.steps_per_epoch == 1
    known = {train.image(k).transpose(2, 0, 1).tobytes() for k in range(len(train))}
    assert [set(pictures(batches, [epoch])) for epoch in range(5)] == [known] * 5


def test_epochs_and_seeds_differ_in_their_order(train):
    batches = [batches_of(train, seed, batch_size=11, **AS_THEY_ARE) for seed in (0, 1)]
    orders = [tuple(pictures(b, [epoch])) for b in batches for epoch in range(3)]
    assert len(set(orders)) == 6


def test_a_sample_looks_different_in_another_epoch(train):
    """Seen whole in every epoch, at another size, mirrored or not."""
    batches = batches_of(train, batch_size=11)
    epochs = [set(pictures(batches, [epoch])) for epoch in range(3)]
    assert not set.intersection(*epochs)
    assert all(len(epoch) == 11 for epoch in epochs)


def test_the_state_of_other_random_numbers_has_no_part(train):
    expected = content(batches_of(train)[3])
    torch.manual_seed(99), np.random.default_rng(99)
    assert content(batches_of(train)[3]) == expected


def test_a_batch_that_is_larger_than_the_training_set_is_refused(train):
    with pytest.raises(UserError, match="batch_size = 12 is larger than the training set of 11 im"):
        batches_of(train, batch_size=12)


def test_the_order_of_an_epoch_is_drawn_once(train, monkeypatch):
    """And it is that of the epoch, whichever step comes next."""
    batches, lengths, draw = batches_of(train), [], Draw.permutation

    def counted(self, length):
        lengths.append(length)
        return draw(self, length)

    monkeypatch.setattr(Draw, "permutation", counted)
    steps = [0, 1, 2, 3, 3, 2, 0]  # of epochs 0, 0, 1, 1, 1, 1, 0
    found = [content(batches[step]) for step in steps]
    assert lengths == [11] * 3
    assert found == [content(batches_of(train)[step]) for step in steps]


# --- validation -------------------------------------------------------------------------------


@pytest.mark.parametrize("short_side", [0, 40, 30])
def test_validation_images_come_in_order_at_the_size_that_is_asked(streets, short_side):
    reader = SplitReader(streets, "val")
    images = EvaluationImages(reader, Protocol(eval_size=short_side))
    found = list(load_images(images, range(1, 3), workers=1))
    assert len(found) == 2
    for number, (image, label) in enumerate(found, start=1):
        size = (42, 30) if short_side == 30 else (56, 40)  # width, height
        picture, classes = map(Image.fromarray, (reader.image(number), reader.label(number)))
        expected = np.asarray(picture.resize(size, Image.Resampling.BILINEAR))
        np.testing.assert_array_equal(image.permute(1, 2, 0), expected)
        np.testing.assert_array_equal(label, np.asarray(classes.resize(size, Image.NEAREST)))


def test_ranks_take_turns_and_see_every_validation_image_once(streets):
    reader = SplitReader(streets, "val")
    images = EvaluationImages(reader, Protocol(eval_size=0))
    seen = [
        image.numpy().tobytes()
        for rank in range(2)
        for image, _ in load_images(images, range(rank, len(reader), 2), workers=0)
    ]
    expected = [reader.image(k).transpose(2, 0, 1).tobytes() for k in (0, 2, 1)]
    assert seen == expected


def test_a_batch_is_pinned_where_a_gpu_reads_it(monkeypatch):
    """Without a GPU nothing can be, so here it is copied instead."""
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor, *_: tensor + 1)
    images, target = torch.zeros(2, 3, 4, 5, dtype=torch.uint8), torch.zeros(2, 4, 5).byte()
    pinned = Batch(images, target, range(6, 8)).pin_memory()
    assert torch.equal(pinned.images, images + 1) and torch.equal(pinned.target, target + 1)
    assert pinned.positions == range(6, 8)
    there = pinned.to(torch.device("meta"))
    assert (there.images.device.type, there.target.device.type) == ("meta", "meta")
    assert there.images.dtype == torch.uint8 and there.positions == range(6, 8)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
def test_batches_come_to_a_real_gpu_beside_its_work(train):
    """Each has its own bytes, however long the GPU still computes when it comes."""
    batches, gpu = batches_of(train), torch.device("cuda")
    transfer, busy = Transfer(gpu), torch.rand(4096, 4096, device=gpu)
    for step, batch in enumerate(load_steps(batches, 0, STEPS, 2)):
        for _ in range(20):
            busy = (busy @ busy).clamp(0, 1)
        moved = transfer(batch)
        assert moved.images.device.type == "cuda"
        assert torch.equal(moved.images.cpu(), batches[step].images)
        assert torch.equal(moved.target.cpu(), batches[step].target)
