"""Every operation on pixels beside Pillow, SciPy or plain Python, image by image."""

from __future__ import annotations

import colorsys

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from scipy.ndimage import correlate1d

from kdpipe.transforms import pixels

NUM_ROWS, HEIGHT, WIDTH = 12, 17, 23
SIZES = [(HEIGHT, WIDTH, 3), (HEIGHT, WIDTH, 1), (1, 1, 3), (2, 5, 1)]


def images(height=HEIGHT, width=WIDTH, channels=3):
    """Noise, gradients, single colours, and two values only."""
    random = np.random.default_rng(0)
    found = random.integers(0, 256, (NUM_ROWS, height, width, channels)).astype(np.uint8)
    found[3:6] = np.linspace(20, 230, height * width).reshape(height, width, 1).astype(np.uint8)
    found[6] = 0
    found[7] = [[[200] * channels]]
    found[8] = 255
    found[9:11] = 40 + 60 * (found[9:11] > 99)
    return found


def pillow(image):
    return Image.fromarray(image[..., 0] if image.shape[2] == 1 else image)


def by_pillow(batch, change):
    """`change(image, row)` of each image as Pillow has it."""
    return np.stack([np.asarray(change(pillow(each), row)).reshape(each.shape) for row, each in enumerate(batch)])


def apart(found, expected):
    """The largest difference between uint8 images."""
    assert found.dtype == torch.uint8
    assert found.shape == expected.shape
    return int(np.abs(found.numpy().astype(int) - expected).max())


def given(values):
    return torch.tensor(values)


@pytest.mark.parametrize("size", SIZES)
def test_windows(size):
    batch = images(*size)
    height, width = max(1, size[0] - 4), max(1, size[1] - 3)
    random = np.random.default_rng(1)
    top, left = random.integers(0, size[0] - height + 1, NUM_ROWS), random.integers(0, size[1] - width + 1, NUM_ROWS)
    found = pixels.windows(torch.from_numpy(batch), given(top), given(left), height, width)
    expected = [each[y : y + height, x : x + width] for each, y, x in zip(batch, top, left, strict=True)]
    assert apart(found, np.stack(expected)) == 0


@pytest.mark.parametrize("size", SIZES)
def test_resized_crops_are_pillows_bilinear_ones(size):
    batch, random = images(*size), np.random.default_rng(2)
    height, width = random.integers(1, size[0] + 1, NUM_ROWS), random.integers(1, size[1] + 1, NUM_ROWS)
    top = (random.random(NUM_ROWS) * (size[0] + 1 - height)).astype(int)
    left = (random.random(NUM_ROWS) * (size[1] + 1 - width)).astype(int)
    found = pixels.resized_crop(torch.from_numpy(batch), *map(given, (top, left, height, width)))

    def crop(image, row):
        box = (left[row], top[row], left[row] + width[row], top[row] + height[row])
        return image.crop(box).resize((size[1], size[0]), Image.Resampling.BILINEAR)

    assert apart(found, by_pillow(batch, crop)) <= 1  # Pillow rounds after either axis


def test_a_crop_of_the_whole_image_is_the_image():
    batch, zeros = torch.from_numpy(images()), torch.zeros(NUM_ROWS, dtype=torch.int64)
    assert torch.equal(pixels.resized_crop(batch, zeros, zeros, zeros + HEIGHT, zeros + WIDTH), batch)


def test_mirrored_images_are_pillows():
    batch = images()
    assert (
        apart(pixels.mirrored(torch.from_numpy(batch), 2), by_pillow(batch, lambda each, _: ImageOps.mirror(each))) == 0
    )
    assert (
        apart(pixels.mirrored(torch.from_numpy(batch), 1), by_pillow(batch, lambda each, _: ImageOps.flip(each))) == 0
    )


def test_boxes_are_filled():
    batch, random = images(), np.random.default_rng(3)
    box = np.stack([random.integers(0, 8, NUM_ROWS) for _ in range(4)])
    found = pixels.filled(torch.from_numpy(batch), *map(given, box), fill=9)
    expected = batch.copy()
    for each, (y, x, height, width) in zip(expected, box.T, strict=True):
        each[y : y + height, x : x + width] = 9
    assert apart(found, expected) == 0


@pytest.mark.parametrize("channels", [1, 3])
def test_luma_is_pillows_and_so_is_its_mean(channels):
    batch = images(channels=channels)
    expected = np.stack([np.asarray(pillow(each).convert("L")) for each in batch])
    assert np.array_equal(pixels.luma(torch.from_numpy(batch))[..., 0], expected)
    means = [int(each.mean() + 0.5) for each in expected.astype(np.float64)]
    assert pixels.mean_luma(torch.from_numpy(batch)).flatten().tolist() == means


BLENDS = {
    "brightness": (ImageEnhance.Brightness, lambda batch: 0),
    "contrast": (ImageEnhance.Contrast, pixels.mean_luma),
    "colour": (ImageEnhance.Color, pixels.luma),
    "sharpness": (ImageEnhance.Sharpness, pixels.smoothed),
}


@pytest.mark.parametrize("name", BLENDS)
def test_blends_are_pillows(name):
    enhance, other_of = BLENDS[name]
    batch, factors = images(), np.linspace(0, 2.5, NUM_ROWS)
    tensor, fixed = torch.from_numpy(batch), given(np.rint(factors * pixels.ONE).astype(int))
    expected = by_pillow(batch, lambda each, row: enhance(each).enhance(factors[row]))
    assert apart(pixels.blended(tensor, other_of(tensor), fixed), expected) <= 1  # Pillow rounds down
    assert torch.equal(pixels.blended(tensor, other_of(tensor), torch.full((NUM_ROWS,), pixels.ONE)), tensor)


@pytest.mark.parametrize("size", [(HEIGHT, WIDTH, 3), (3, 3, 1), (2, 5, 1), (1, 1, 3)])
def test_smoothed_images_are_pillows(size):
    batch = images(*size)
    expected = by_pillow(batch, lambda each, _: each.filter(ImageFilter.SMOOTH)) if min(size[:2]) > 2 else batch
    assert apart(pixels.smoothed(torch.from_numpy(batch)).byte(), expected) == 0


def test_hue_turns_as_colorsys_says():
    batch, turns = images(5, 6), np.linspace(-0.5, 0.5, NUM_ROWS)
    expected = np.empty(batch.shape)
    for row, y, x in np.ndindex(*batch.shape[:3]):
        hue, saturation, value = colorsys.rgb_to_hsv(*batch[row, y, x] / 255)
        expected[row, y, x] = np.multiply(colorsys.hsv_to_rgb((hue + turns[row]) % 1, saturation, value), 255)
    found = pixels.hue_turned(torch.from_numpy(batch), given(np.rint(6 * turns * pixels.ONE).astype(int)))
    assert np.abs(found.numpy() - expected).max() < 0.51
    still = pixels.hue_turned(torch.from_numpy(batch), torch.zeros(NUM_ROWS, dtype=torch.int64))
    assert np.array_equal(still, batch)


@pytest.mark.parametrize("size", SIZES)
def test_a_blur_is_scipys_convolution(size):
    batch, random = images(*size), np.random.default_rng(4)
    reach = min(4, min(size[:2]) - 1)
    weights = random.multinomial(pixels.WEIGHT, np.full(2 * reach + 1, 1 / (2 * reach + 1)), NUM_ROWS)
    found = pixels.blurred(torch.from_numpy(batch), given(weights))
    exact = [
        correlate1d(correlate1d(each / 1.0, weight, 0, mode="mirror"), weight, 1, mode="mirror") / pixels.WEIGHT**2
        for each, weight in zip(batch, weights, strict=True)
    ]
    assert np.array_equal(found, np.floor(np.stack(exact) + 0.5))


@pytest.mark.parametrize("size", SIZES)
def test_tables_of_values_are_pillows(size):
    batch = images(*size)
    tensor = torch.from_numpy(batch)
    for bits in (1, 4, 8):
        expected = by_pillow(batch, lambda each, _, bits=bits: ImageOps.posterize(each, bits))
        assert apart(pixels.posterized(tensor, bits), expected) == 0
    for threshold in (0, 1, 128, 255):
        expected = by_pillow(batch, lambda each, _, threshold=threshold: ImageOps.solarize(each, threshold))
        assert apart(pixels.solarized(tensor, threshold), expected) == 0
    assert apart(pixels.equalized(tensor), by_pillow(batch, lambda each, _: ImageOps.equalize(each))) == 0
    stretched = by_pillow(batch, lambda each, _: ImageOps.autocontrast(each))
    assert apart(pixels.auto_contrasted(tensor), stretched) <= 1  # Pillow multiplies by a rounded factor


@pytest.mark.parametrize("size", SIZES)
def test_affine_images_are_pillows_nearest_ones(size):
    batch, random = images(*size), np.random.default_rng(5)
    matrix = np.array([1, 0, 0, 0, 1, 0]) + random.normal(size=(NUM_ROWS, 6)) * [0.3, 0.3, 4, 0.3, 0.3, 4]
    matrix = np.rint(matrix * pixels.ONE).astype(int)

    def move(image, row):
        coefficients = (matrix[row] / pixels.ONE).tolist()
        fill = 7 if size[2] == 1 else (7, 7, 7)
        return image.transform(
            image.size, Image.Transform.AFFINE, coefficients, Image.Resampling.NEAREST, fillcolor=fill
        )

    assert apart(pixels.affine(torch.from_numpy(batch), given(matrix), 7), by_pillow(batch, move)) == 0
