"""Resize, flip and crop: image and label map stay one picture, and chance is fair."""

import itertools

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats
from torchvision.transforms.functional import resize as resize_in_torchvision

from data_prep.settings import VOID
from jobs.data.batches import (
    Draw,
    augment,
    draw_view,
    resize_short_side,
    resized_for_evaluation,
    resized_size,
)
from jobs.spec.protocol import Protocol

SIZE = (40, 56)
COLOURS = np.array([[250, 20, 20], [20, 250, 20], [20, 20, 250]], np.uint8)


def protocol(**settings):
    return Protocol(**{"resize": (40, 40), "crop": SIZE, "flip": 0.0, **settings})


def a_picture(size=SIZE, seed=0):
    """Patches of three classes, each painted in the colour of its class."""
    height, width = size
    patches = np.random.default_rng(seed).integers(3, size=(-(-height // 8), -(-width // 8)))
    label = patches.repeat(8, 0).repeat(8, 1)[:height, :width].astype(np.uint8)
    return COLOURS[label], label


def places(size=SIZE):
    """A picture whose pixels say where they are: row in red, column in green, 7 in blue; and a
    label map of columns."""
    rows, columns = np.indices(size).astype(np.uint8)
    return np.stack([rows, columns, np.full_like(rows, 7)], axis=2), columns


def augmented(picture, draw=(0, 0, 0), **settings):
    return augment(*picture, protocol(**settings), Draw(*draw))


@pytest.mark.parametrize("crop", [(40, 56), (16, 24), (61, 30), (30, 80), (100, 120), (1, 1)])
@pytest.mark.parametrize("resize", [(40, 40), (20, 60)])
def test_a_sample_has_the_size_of_the_crop(crop, resize):
    for sample in range(10):
        image, label = augmented(a_picture(), (0, 0, sample), crop=crop, resize=resize, flip=0.5)
        assert image.shape == (*crop, 3) and image.dtype == np.uint8
        assert label.shape == crop and label.dtype == np.uint8


@pytest.mark.parametrize("size", [(40, 56), (56, 40), (33, 90)])
def test_label_and_image_stay_one_picture(size):
    """Inside a patch the image has the colour of the label, whatever was done to both."""
    for sample in range(20):
        image, label = augmented(
            a_picture(size), (1, 2, sample), resize=(30, 90), crop=(48, 48), flip=0.5
        )
        inside = np.ones((44, 44), bool)
        for dy, dx in itertools.product(range(5), range(5)):
            inside &= label[dy : dy + 44, dx : dx + 44] == label[2:46, 2:46]
        for value, colour in enumerate(COLOURS):
            pixels = image[2:46, 2:46][inside & (label[2:46, 2:46] == value)].astype(int)
            assert np.abs(pixels - colour).max(initial=0) <= 2
        assert inside.mean() > 0.1


def test_a_flip_mirrors_image_and_label_alike():
    image, label = augmented(places(), flip=1.0)
    expected_image, expected_label = places()
    np.testing.assert_array_equal(image, expected_image[:, ::-1])
    np.testing.assert_array_equal(label, expected_label[:, ::-1])


def test_half_of_the_samples_are_flipped():
    flipped = sum(
        augmented(places(), (3, 0, n), flip=0.5)[0][0, 0, 1] != 0 for n in range(2000)
    )  # column 0 is no longer on the left
    assert abs(flipped - 1000) < 4 * (2000 / 4) ** 0.5


def test_beyond_a_small_image_pixels_are_zero_and_labels_void():
    image, label = augmented(places(), crop=(50, 70))
    expected_image, expected_label = places()
    np.testing.assert_array_equal(image[:40, :56], expected_image)
    np.testing.assert_array_equal(label[:40, :56], expected_label)
    beyond = np.ones((50, 70), bool)
    beyond[:40, :56] = False
    assert not image[beyond].any()
    assert (label[beyond] == VOID).all()


def test_an_image_that_is_small_in_one_direction_is_cropped_in_the_other():
    for sample in range(20):
        image, label = augmented(places(), (0, 0, sample), crop=(50, 30))
        first = int(image[0, 0, 1])
        np.testing.assert_array_equal(image[:40], places()[0][:, first : first + 30])
        assert not image[40:].any() and (label[40:] == VOID).all()


def test_a_crop_is_a_window_and_every_position_is_equally_likely():
    positions = np.zeros((5, 7), int)
    for sample in range(3500):
        image, label = augmented(places(), (4, 0, sample), crop=(36, 50))
        top, left = (int(value) for value in image[0, 0, :2])
        window = (slice(top, top + 36), slice(left, left + 50))
        if sample < 50:
            np.testing.assert_array_equal(image, places()[0][window])
            np.testing.assert_array_equal(label, places()[1][window])
        positions[top, left] += 1
    assert stats.chisquare(positions.ravel()).pvalue > 1e-3


def test_every_short_side_of_the_range_is_equally_likely():
    """A white picture in a black frame shows its size."""
    white = np.full((40, 56, 3), 255, np.uint8), np.zeros((40, 56), np.uint8)
    sides = [
        (augmented(white, (5, 0, n), resize=(20, 29), crop=(64, 64))[1][:, 0] != VOID).sum()
        for n in range(2000)
    ]
    assert stats.chisquare(np.bincount(sides, minlength=30)[20:]).pvalue > 1e-3


@pytest.mark.parametrize("seed", range(3))
def test_labels_are_only_those_of_the_original(seed):
    _, label = a_picture(seed=seed)
    label = np.where(label == 1, VOID, label * 100).astype(np.uint8)  # 0, 255, 200
    image = np.zeros((*SIZE, 3), np.uint8)
    for sample in range(20):
        _, found = augmented((image, label), (seed, 0, sample), resize=(20, 80), flip=0.5)
        assert set(np.unique(found)) <= {0, 200, VOID}


# --- resize -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "short_side", "expected"),
    [
        ((40, 56), 20, (20, 28)),
        ((40, 56), 65, (65, 91)),
        ((56, 40), 30, (42, 30)),
        ((50, 50), 33, (33, 33)),
        ((40, 57), 20, (20, 28)),  # 28.5: to the even one, as Python rounds
        ((200, 3), 1, (67, 1)),
    ],
)
def test_a_resized_image_is_that_of_pillow(size, short_side, expected):
    image, label = a_picture(size)
    found_image, found_label = resize_short_side(image, label, Protocol(eval_size=short_side))
    height, width = expected
    bilinear = Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR)
    nearest = Image.fromarray(label).resize((width, height), Image.Resampling.NEAREST)
    np.testing.assert_array_equal(found_image, np.asarray(bilinear))
    np.testing.assert_array_equal(found_label, np.asarray(nearest))


@pytest.mark.parametrize("size", [(333, 500), (500, 333), (375, 500), (1024, 2048), (7, 9)])
@pytest.mark.parametrize("short_side", [260, 261, 520, 1040])
def test_a_truncated_long_side_is_that_of_torchvision(size, short_side):
    expected = tuple(resize_in_torchvision(torch.zeros(1, *size), [short_side]).shape[1:])
    assert resized_size(*size, short_side, "truncate") == expected


def test_the_long_side_is_rounded_unless_the_protocol_says_otherwise():
    image, label = a_picture((333, 500))
    sizes = {"round": (520, 781), "truncate": (520, 780)}
    for long_side, size in sizes.items():
        settings = Protocol(eval_size=520, resize=(520, 520), long_side=long_side)
        assert resize_short_side(image, label, settings)[1].shape == size
        assert resized_for_evaluation(image, label, settings)[1].shape == size
        assert draw_view(333, 500, settings, Draw(0, 0, 0)).size == size


@pytest.mark.parametrize("short_side", [0, 40])
def test_the_own_size_leaves_every_pixel_as_it_is(short_side):
    image, label = a_picture()
    found_image, found_label = resize_short_side(image, label, Protocol(eval_size=short_side))
    np.testing.assert_array_equal(found_image, image)
    np.testing.assert_array_equal(found_label, label)


def test_an_enlarged_label_is_the_pixel_at_the_same_place():
    """Twice the size: each pixel becomes four, by the formula of the nearest centre."""
    image, label = a_picture()
    _, found = resize_short_side(image, label, Protocol(eval_size=80))
    np.testing.assert_array_equal(found, label.repeat(2, 0).repeat(2, 1))


# --- chance -----------------------------------------------------------------------------------


def test_a_sample_depends_on_seed_epoch_and_its_number_and_on_nothing_else():
    settings = {"resize": (20, 80), "crop": (16, 16), "flip": 0.5}
    keys = list(itertools.product((0, 1, 2**31), (0, 1, 29), (0, 1, 2**31)))
    first = {key: augmented(a_picture(), key, **settings)[0].tobytes() for key in keys}
    np.random.default_rng(0).shuffle(keys)
    assert all(augmented(a_picture(), key, **settings)[0].tobytes() == first[key] for key in keys)
    assert len(set(first.values())) == len(first)


def test_the_original_is_not_written_to():
    image, label = a_picture()
    image.setflags(write=False), label.setflags(write=False)
    augmented((image, label), crop=(50, 50), flip=1.0)


@pytest.mark.parametrize("bound", [1, 2, 7, 781])
def test_integers_are_uniform(bound):
    draw = Draw(0, 0, 0)
    counts = np.bincount([draw.below(bound) for _ in range(20 * bound + 1000)], minlength=bound)
    assert len(counts) == bound
    assert bound == 1 or stats.chisquare(counts).pvalue > 1e-3


@pytest.mark.parametrize("probability", [0.0, 0.25, 1.0])
def test_chances_are_as_asked(probability):
    draw = Draw(0, 0, 1)
    hits = sum(draw.chance(probability) for _ in range(4000))
    assert abs(hits - 4000 * probability) <= 4 * (4000 * probability * (1 - probability)) ** 0.5


def test_every_order_of_four_is_equally_likely():
    orders = [tuple(Draw(0, epoch, 9).permutation(4)) for epoch in range(4800)]
    counts = [orders.count(order) for order in itertools.permutations(range(4))]
    assert sum(counts) == 4800
    assert stats.chisquare(counts).pvalue > 1e-3


def test_numbers_of_neighbouring_samples_and_epochs_are_independent():
    """16 x 16 pairs of numbers below 16."""
    drawn = np.array([[Draw(0, epoch, n).below(16) for n in range(160)] for epoch in range(161)])
    for one, other in ((drawn[:-1], drawn[1:]), (drawn[:, :-1], drawn[:, 1:])):
        pairs = np.bincount((16 * one + other).ravel(), minlength=256)
        assert stats.chisquare(pairs).pvalue > 1e-3
