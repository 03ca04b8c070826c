"""What image transforms draw: ranges, probabilities, identities; what they refuse."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats

from kdpipe.data.columns import Ragged
from kdpipe.errors import ConfigError
from kdpipe.transforms import (
    Blur,
    ColourJitter,
    Erasing,
    Flip,
    Grey,
    PadAndCrop,
    RandAugment,
    RandomResizedCrop,
    pixels,
)
from kdpipe.transforms.rand_augment import MOST, OPERATIONS
from kdpipe.views import ViewSpec, row_keys

NUM_ROWS = 400
KEYS = row_keys([f"id-{row}" for row in range(NUM_ROWS)], 1)
TRANSFORMS = [
    PadAndCrop(padding=3, fill=9),
    RandomResizedCrop(),
    Flip(),
    Flip(vertical=True),
    ColourJitter(),
    Grey(probability=0.3),
    Blur(),
    Erasing(probability=0.6, fill=100),
    RandAugment(num_ops=3, magnitude=20),
]


def shown(transform, images, seed=0):
    return transform({"image": images, "other": KEYS}, KEYS[: len(images)], seed)["image"]


def noise(height=8, width=10, channels=3, rows=NUM_ROWS):
    return np.random.default_rng(0).integers(1, 256, (rows, height, width, channels)).astype(np.uint8)


def places(rows=NUM_ROWS, height=8, width=10):
    """Images whose pixels say where they are: line, column, 1."""
    grid = np.stack(np.meshgrid(np.arange(height), np.arange(width), indexing="ij"), axis=-1)
    return np.tile(np.concatenate([grid, np.ones((height, width, 1), int)], axis=2).astype(np.uint8), (rows, 1, 1, 1))


def share(changed):
    """A 99.9 % interval of the probability that a row was changed."""
    return stats.binomtest(int(np.sum(changed)), len(changed)).proportion_ci(0.999)


def differs(images, others):
    return (images != others).any(axis=(1, 2, 3))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("transform", TRANSFORMS, ids=lambda each: type(each).__name__)
def test_rows_depend_on_their_keys_alone(transform, channels):
    spec = ViewSpec(count=1, seed=5, transform=transform)
    images, ids = noise(channels=channels), [f"row {row}" for row in range(NUM_ROWS)]
    before = images.copy()
    images.flags.writeable = False
    every = spec.of({"image": images}, ids, 1)["image"]
    assert np.array_equal(images, before)
    assert every.dtype == np.uint8
    assert every.shape == images.shape
    assert np.any(every != images) or (channels == 1 and isinstance(transform, Grey))
    order = np.random.default_rng(0).permutation(NUM_ROWS)
    for part in np.array_split(order, [1, 2, 5, 105, 300]):
        found = spec.of({"image": images[part]}, [ids[row] for row in part], 1)["image"]
        assert np.array_equal(found, every[part])
    assert len(spec.of({"image": images[:0]}, [], 1)["image"]) == 0


@pytest.mark.parametrize(
    "transform",
    [
        PadAndCrop(padding=0),
        RandomResizedCrop(scale=(1, 1), ratio=(10 / 8, 10 / 8)),
        Flip(probability=0),
        ColourJitter(brightness=0, contrast=0, saturation=0, hue=0),
        ColourJitter(probability=0),
        Grey(probability=0),
        Blur(probability=0),
        Blur(sigma=(1e-3, 1e-3), probability=1),
        Erasing(probability=0),
    ],
    ids=repr,
)
def test_parameters_that_change_nothing(transform):
    images = noise()
    assert np.array_equal(shown(transform, images), images)


@pytest.mark.parametrize(
    ("transform", "probability"),
    [
        (Flip(probability=0.3), 0.3),
        (Flip(probability=0.3, vertical=True), 0.3),
        (ColourJitter(probability=0.6), 0.6),
        (Grey(probability=0.2), 0.2),
        (Blur(sigma=(1, 2), probability=0.7), 0.7),
        (Erasing(probability=0.4), 0.4),
    ],
    ids=lambda each: type(each).__name__,
)
def test_probabilities_are_met(transform, probability):
    images = noise()
    interval = share(differs(shown(transform, images), images))
    assert interval.low < probability < interval.high
    assert not np.array_equal(shown(transform, images, seed=1), shown(transform, images, seed=2))


def test_pad_and_crop_moves_by_every_shift_as_often():
    found = shown(PadAndCrop(padding=2, fill=0), places())
    # The middle is never outside, and tells how far the image was moved.
    moved = found[:, 4, 4, :2].astype(int) - 4
    assert moved.min(axis=0).tolist() == [-2, -2]
    assert moved.max(axis=0).tolist() == [2, 2]
    counts = np.unique(moved, axis=0, return_counts=True)[1]
    assert len(counts) == 25
    assert stats.chisquare(counts).pvalue > 1e-4
    for image, (down, right) in zip(found, moved, strict=True):
        padded = np.pad(places(1)[0], ((2, 2), (2, 2), (0, 0)))
        assert np.array_equal(image, padded[2 + down : 10 + down, 2 + right : 12 + right])


def test_resized_crops_have_the_wanted_areas_and_ratios():
    side = 96
    ramp = np.arange(side, dtype=np.uint8) * 2
    images = np.zeros((NUM_ROWS, side, side, 3), np.uint8)
    images[..., 0], images[..., 1] = ramp[:, None], ramp
    found = shown(RandomResizedCrop(scale=(0.2, 0.8), ratio=(0.5, 2)), images).astype(float)
    height = (found[:, -1, 0, 0] - found[:, 0, 0, 0]) / 2 + 1
    width = (found[:, 0, -1, 1] - found[:, 0, 0, 1]) / 2 + 1
    area, ratio = height * width / side**2, width / height
    assert 0.19 < area.min() < 0.25
    assert 0.7 < area.max() < 0.81
    assert 0.49 < ratio.min() < 0.6
    assert 1.7 < ratio.max() < 2.05
    assert abs(np.log(ratio).mean()) < 0.1


def test_a_crop_that_never_fits_is_in_the_middle():
    found = shown(RandomResizedCrop(scale=(1, 1), ratio=(4, 4)), places(50, 20, 20))
    assert (found[:, 0, 0] == found[0, 0, 0]).all()
    assert abs(int(found[0, 0, 0, 0]) - 7.5) < 1
    assert int(found[0, -1, 0, 0]) - int(found[0, 0, 0, 0]) == 4  # five lines of twenty
    assert found[0, 0, :, 1].tolist() == list(range(20))


def test_jitter_stays_in_its_ranges():
    grey = np.full((NUM_ROWS, 4, 4, 3), 100, np.uint8)
    found = shown(ColourJitter(brightness=0.3, contrast=0, saturation=0, hue=0), grey)[:, 0, 0, 0]
    assert 70 <= found.min() < 73
    assert 127 < found.max() <= 130
    assert stats.kstest((found - 70.0) / 60, "uniform").pvalue > 1e-4
    red = np.tile(np.uint8([200, 0, 0]), (NUM_ROWS, 4, 4, 1))
    turned = shown(ColourJitter(brightness=0, contrast=0, saturation=0, hue=1 / 6), red)[:, 0, 0].astype(int)
    assert (turned[:, 0] == 200).all()  # never beyond yellow and magenta
    assert (turned[:, 1:].min(axis=1) == 0).all()
    assert turned[:, 1].max() > 190
    assert turned[:, 2].max() > 190
    dark = shown(ColourJitter(brightness=9, contrast=0, saturation=0, hue=0), grey)
    assert dark.min() < 5
    assert dark.max() == 255


def test_grey_images_have_one_luma():
    images = noise()
    found = shown(Grey(probability=1), images)
    assert np.array_equal(found[7, ..., 0], np.asarray(Image.fromarray(images[7]).convert("L")))
    assert (found == found[..., :1]).all()


def test_a_blur_is_gaussian():
    point = np.zeros((50, 31, 31, 1), np.uint8)
    point[:, 15, 15] = 255
    found = shown(Blur(sigma=(2, 2), probability=1), point)[0, :, :, 0].astype(float)
    distance = np.arange(31) - 15
    exact = 255 * np.outer(stats.norm.pdf(distance, scale=2), stats.norm.pdf(distance, scale=2))
    assert np.abs(found - exact).max() < 0.75
    widths = shown(Blur(sigma=(0.5, 3), probability=1), point)[:, 15, 15, 0]
    assert len(np.unique(widths)) > 20


def test_erased_boxes_have_the_wanted_areas():
    images = np.full((NUM_ROWS, 40, 40, 1), 200, np.uint8)
    erased = shown(Erasing(probability=1, scale=(0.1, 0.3), ratio=(0.5, 2), fill=3), images)[..., 0] == 3
    height, width = erased.any(axis=2).sum(axis=1), erased.any(axis=1).sum(axis=1)
    assert np.array_equal(erased.sum(axis=(1, 2)), height * width)
    assert 0.09 < (height * width / 1600).min() < 0.12
    assert 0.27 < (height * width / 1600).max() < 0.32
    assert (width / height).min() > 0.45
    assert (width / height).max() < 2.2
    everything = Erasing(probability=1, scale=(1, 1), fill=3)
    assert np.array_equal(shown(everything, images), images)  # no box of that size is smaller than the image


def test_rand_augment_draws_every_operation_and_sign_as_often():
    images = noise(16, 16, rows=NUM_ROWS)
    images[:] = images[0]
    found = shown(RandAugment(num_ops=1, magnitude=15), images)
    one = torch.from_numpy(images[:1])
    expected = {
        (name, sign): operation(one, np.array([sign]), 0.5, 0).numpy()[0]
        for name, operation in OPERATIONS.items()
        for sign in (-1, 1)
    }
    counts = {key: int((found == image).all(axis=(1, 2, 3)).sum()) for key, image in expected.items()}
    kinds = {
        name: counts[name, 1] if np.array_equal(expected[name, 1], expected[name, -1]) else 0 for name in OPERATIONS
    }
    drawn = [kinds[name] or counts[name, 1] + counts[name, -1] for name in OPERATIONS]
    assert sum(drawn) == NUM_ROWS
    assert stats.chisquare(drawn).pvalue > 1e-4
    plus = sum(counts[name, 1] for name, alike in kinds.items() if not alike)
    both = sum(counts[name, 1] + counts[name, -1] for name, alike in kinds.items() if not alike)
    assert stats.binomtest(plus, both).pvalue > 1e-4


@pytest.mark.parametrize("name", sorted(set(OPERATIONS) - {"auto_contrast", "equalize"}))
def test_rand_augment_without_magnitude_changes_nothing(name):
    images = torch.from_numpy(noise(rows=6).clip(0, 254))  # 255 is inverted from threshold 255 on
    assert torch.equal(OPERATIONS[name](images, np.array([-1, 1] * 3), 0.0, 0), images)


def test_rand_augments_strengths():
    images = torch.from_numpy(places(2, 20, 30))
    signs = np.array([1, -1])
    moved = OPERATIONS["translate_x"](images, signs, 1.0, 255)
    shift = int(150 / 331 * 30)
    assert torch.equal(moved[0, :, : 30 - shift], images[0, :, shift:])
    assert torch.equal(moved[1, :, shift:], images[1, :, : 30 - shift])
    assert (moved[0, :, 30 - shift :] == 255).all()
    assert (moved[1, :, :shift] == 255).all()
    turned = OPERATIONS["rotate"](images, signs, 1.0, 0)
    for row, degrees in enumerate((-30, 30)):
        expected = np.asarray(Image.fromarray(images[row].numpy()).rotate(degrees))
        assert (turned[row].numpy() != expected).mean() < 0.01
    sheared = OPERATIONS["shear_x"](images, signs, 1.0, 0)
    expected = Image.fromarray(images[0].numpy()).transform((30, 20), Image.Transform.AFFINE, (1, 0.3, 0, 0, 1, 0))
    assert np.array_equal(sheared[0], np.asarray(expected))
    grey = torch.full((2, 4, 4, 1), 100, dtype=torch.uint8)
    assert OPERATIONS["brightness"](grey, signs, 1.0, 0)[:, 0, 0, 0].tolist() == [190, 10]
    assert OPERATIONS["posterize"](grey + 15, signs, 1.0, 0)[0, 0, 0].tolist() == [112]
    assert OPERATIONS["solarize"](grey, signs, 1.0, 0)[0, 0, 0].tolist() == [155]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PadAndCrop(padding=-1), "PadAndCrop: padding is -1; expected a whole number from 0 to 32768"),
        (lambda: PadAndCrop(fill=256), "PadAndCrop: fill is 256; expected a whole number from 0 to 255"),
        (
            lambda: RandomResizedCrop(scale=(0, 1)),
            r"scale is \(0, 1\); expected two ascending numbers above 0, up to 1",
        ),
        (lambda: RandomResizedCrop(ratio=(2, 1)), r"ratio is \(2, 1\); expected two ascending numbers above 0$"),
        (lambda: Flip(probability="often"), "Flip: probability is often; expected a number from 0 to 1"),
        (lambda: RandomResizedCrop(scale=(0.1, "1")), "two ascending numbers above 0, up to 1"),
        (lambda: Flip(probability=1.5), "Flip: probability is 1.5; expected a number from 0 to 1"),
        (lambda: Flip(probability=float("nan")), "Flip: probability is nan"),
        (lambda: ColourJitter(hue=0.6), "ColourJitter: hue is 0.6; expected a number from 0 to 0.5"),
        (lambda: ColourJitter(contrast=-1), "ColourJitter: contrast is -1"),
        (lambda: Blur(sigma=(0, 1)), "Blur: sigma is"),
        (lambda: Erasing(scale=(0.1, 1.1)), "Erasing: scale is"),
        (lambda: RandAugment(magnitude=MOST + 1), "RandAugment: magnitude is 31; expected a whole number from 0 to 30"),
        (lambda: RandAugment(num_ops=True), "RandAugment: num_ops is True"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_a_padding_that_shows_nothing_of_an_image_is_refused():
    images = {"image": np.zeros((2, 8, 6, 1), np.uint8)}
    with pytest.raises(ConfigError, match="padding is 6, and the images are 8 x 6: nothing may be left to see"):
        ViewSpec(count=1, transform=PadAndCrop(padding=6)).of(images, ["a", "b"], 1)
    ViewSpec(count=1, transform=PadAndCrop(padding=5)).of(images, ["a", "b"], 1)


@pytest.mark.parametrize("transform", TRANSFORMS, ids=lambda each: type(each).__name__)
@pytest.mark.parametrize(
    "columns",
    [
        {"features": np.zeros((2, 4), np.float32)},
        {"image": np.zeros((2, 4, 4, 1), np.float32)},
        {"image": np.zeros((2, 4, 4, 2), np.uint8)},
        {"image": Ragged(values=np.zeros(8, np.uint8), offsets=np.array([0, 4, 8]))},
    ],
    ids=["a table", "floats", "two channels", "encoded"],
)
def test_rows_that_are_no_images_of_one_size_are_refused(transform, columns):
    with pytest.raises(ConfigError, match=r"no column 'image' of uint8 pixels .* leave task.keep_encoded out"):
        ViewSpec(count=1, transform=transform).of(columns, ["a", "b"], 1)


def test_a_gaussians_weights_are_whole():
    weights = torch.from_numpy(np.asarray([[0, pixels.WEIGHT, 0]]))
    image = torch.from_numpy(noise(rows=1))
    assert torch.equal(pixels.blurred(image, weights), image)
