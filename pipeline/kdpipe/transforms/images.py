"""Augmentations of uint8 images `[B, H, W, C]` of one size: parameters drawn per row, pixels by `pixels`.

Every argument is the same for all rows; what is drawn is said per transform. Shapes: B rows, H height, W width,
C channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdpipe.data.columns import Columns
from kdpipe.devices import compute_device
from kdpipe.errors import ConfigError
from kdpipe.random_numbers import uniform
from kdpipe.transforms import pixels
from kdpipe.transforms.checking import check_probability, check_range, check_whole

IMAGE = "image"
_AT_ONCE = {"cpu": 2**17, "cuda": 2**24}
"""Values that are worked on at a time: in a core's cache; enough of them to keep a GPU busy."""
_CANDIDATES = 10
"""Boxes that are drawn; the first one that lies within the image is taken."""

Floats = NDArray[np.floating[Any]]


@dataclass(frozen=True, kw_only=True)
class PadAndCrop:
    """Moves an image by up to `padding` pixels in each direction; `fill` comes in (He et al. 2016, section 4.2)."""

    padding: int = 4
    fill: int = 0

    def __post_init__(self) -> None:
        check_whole(self, "padding", 0, 2**15)
        check_whole(self, "fill", 0, 255)

    def __call__(self, columns: Columns, keys: NDArray[np.uint64], seed: int) -> Columns:
        """Draws the two shifts, uniform whole numbers. Raises `ConfigError` for images that could go out of sight."""
        size = _size_of(columns)
        if self.padding >= min(size):
            raise ConfigError(
                f"PadAndCrop: padding is {self.padding}, and the images are {size[0]} x {size[1]}: nothing may be left "
                "to see; expected less than that"
            )
        corner = whole(uniform(keys, (2,), seed), 2 * self.padding + 1)

        def move(images: Tensor, top: Tensor, left: Tensor) -> Tensor:
            beside = (self.padding,) * 4
            padded = torch.nn.functional.pad(images, (0, 0, *beside), value=self.fill)
            return pixels.windows(padded, top, left, *images.shape[1:3])

        return on_images(columns, move, corner[:, 0], corner[:, 1])


@dataclass(frozen=True, kw_only=True)
class RandomResizedCrop:
    """A box of the image at the image's size, bilinear (Szegedy et al. 2015, section 6).

    Its share of the image's area is uniform in `scale`, its width / height log-uniform in `ratio`. Where none of ten
    boxes lies within the image, it is the largest one in the middle whose ratio is allowed.
    """

    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)

    def __post_init__(self) -> None:
        check_range(self, "scale", 0, 1)
        check_range(self, "ratio", 0, math.inf)

    def __call__(self, columns: Columns, keys: NDArray[np.uint64], seed: int) -> Columns:
        """Draws ten boxes."""
        size = _size_of(columns)
        box, fits = _boxes(uniform(keys, (_CANDIDATES, 4), seed), size, self.scale, self.ratio, at_most=size)
        box[~fits] = self._in_the_middle(*size)
        return on_images(columns, pixels.resized_crop, *box.T)

    def _in_the_middle(self, height: int, width: int) -> tuple[int, int, int, int]:
        low, high = self.ratio
        wide = max(1, min(width, round(height * high)))
        tall = max(1, min(height, round(width / low)))
        return (height - tall) // 2, (width - wide) // 2, tall, wide


@dataclass(frozen=True, kw_only=True)
class Flip:
    """Mirrors an image with `probability`: left to right, or upside down where `vertical`."""

    probability: float = 0.5
    vertical: bool = False

    def __post_init__(self) -> None:
        check_probability(self)

    def __call__(self, columns: Columns, keys: NDArray[np.uint64], seed: int) -> Columns:
        """Draws whether."""
        chosen = uniform(keys, (1,), seed)[:, 0] < self.probability
        return on_images(columns, lambda images: pixels.mirrored(images, 1 if self.vertical else 2), chosen=chosen)


@dataclass(frozen=True, kw_only=True)
class ColourJitter:
    """Brightness, contrast, saturation and hue, in this order, changed with `probability`.

    The factors are uniform from 1 less to 1 more than `brightness`, `contrast` and `saturation`, and never below 0; the
    hue turns by up to `hue` of the circle, 0 to 0.5, each way. Grey images have no saturation and hue.
    """

    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.4
    hue: float = 0.1
    probability: float = 1.0

    def __post_init__(self) -> None:
        for name in ("brightness", "contrast", "saturation"):
            check_range(self, name, 0, 16)
        check_range(self, "hue", 0, 0.5)
        check_probability(self)

    def __call__(self, columns: Columns, keys: NDArray[np.uint64], seed: int) -> Columns:
        """Draws whether, the three factors and the turn."""
        draws = uniform(keys, (5,), seed)
        widths = np.array([self.brightness, self.contrast, self.saturation])
        low, high = np.maximum(0, 1 - widths), 1 + widths
        factors = fixed(low + (high - low) * draws[:, 1:4])
        turn = fixed(6 * self.hue * (2 * draws[:, 4] - 1))
        return on_images(columns, self._jittered, factors, turn, chosen=draws[:, 0] < self.probability)

    def _jittered(self, images: Tensor, factors: Tensor, turn: Tensor) -> Tensor:
        brightness, contrast, saturation = factors.unbind(dim=1)
        if self.brightness:
            images = pixels.blended(images, 0, brightness)
        if self.contrast:
            images = pixels.blended(images, pixels.mean_luma(images), contrast)
        if self.saturation and images.shape[3] == 3:
            images = pixels.blended(images, pixels.luma(images), saturation)
        if self.hue and images.shape[3] == 3:
            images = pixels.hue_turned(images, turn)
        return images


@dataclass(frozen=True, kw_only=True)
class Grey:
    """Takes the colour from an image with `probability`: every channel is its luma (ITU-R 601)."""

    probability: float = 0.1

    def __post_init__(self) -> None:
        check_probability(self)

    def __call__(self, columns: Columns, keys: NDArray[np.uint64], seed: int) -> Columns:
        """Draws whether."""
        chosen = uniform(keys, (1,), seed)[:, 0] < self.probability
        return on_images(columns, lambda images: pixels.luma(images).expand_as(images).byte(), chosen=chosen)


@dataclass(frozen=True, kw_only=True)
class Blur:
    """Convolves an image with a Gaussian with `probability`; its standard deviation is uniform in `sigma`, in pixels.

    The Gaussian ends at three times the largest `sigma`, or where the mirrored image does.
    """

    sigma: tuple[float, float] = (0.1, 2.0)
    probability: float = 0.5

    def __post_init__(self) -> None:
        check_range(self, "sigma", 0, 100)
        check_probability(self)

    def __call__(self, columns: Columns, keys: NDArray[np.uint64], seed: int) -> Columns:
        """Draws whether, and the standard deviation."""
        draws = uniform(keys, (2,), seed)
        low, high = self.sigma
        reach = min(math.ceil(3 * high), min(_size_of(columns)) - 1)
        weights = _gaussian(low + (high - low) * draws[:, 1], reach)
        return on_images(columns, pixels.blurred, weights, chosen=draws[:, 0] < self.probability)


@dataclass(frozen=True, kw_only=True)
class Erasing:
    """Fills a box of the image with `fill`, with `probability` (Zhong et al. 2020, "Random erasing data augmentation").

    Its share of the image's area is uniform in `scale`, its width / height log-uniform in `ratio`. Where none of ten
    boxes is smaller than the image, nothing is erased.
    """

    probability: float = 0.25
    scale: tuple[float, float] = (0.02, 1 / 3)
    ratio: tuple[float, float] = (0.3, 10 / 3)
    fill: int = 0

    def __post_init__(self) -> None:
        check_probability(self)
        check_range(self, "scale", 0, 1)
        check_range(self, "ratio", 0, math.inf)
        check_whole(self, "fill", 0, 255)

    def __call__(self, columns: Columns, keys: NDArray[np.uint64], seed: int) -> Columns:
        """Draws whether, and ten boxes."""
        height, width = _size_of(columns)
        draws = uniform(keys, (_CANDIDATES, 5), seed)
        box, fits = _boxes(draws, (height, width), self.scale, self.ratio, at_most=(height - 1, width - 1))
        chosen = fits & (draws[:, 0, 4] < self.probability)

        return on_images(columns, partial(pixels.filled, fill=self.fill), *box.T, chosen=chosen)


def on_images(
    columns: Columns,
    operation: Callable[..., Tensor],
    *parameters: NDArray[Any],
    chosen: NDArray[np.bool_] | None = None,
) -> Columns:
    """`columns` with the `chosen [B]` images changed by `operation(images, *parameters)`; null: all of them."""
    images = pixels_of(columns)
    change(images, np.arange(len(images)) if chosen is None else np.flatnonzero(chosen), operation, *parameters)
    return {**columns, IMAGE: images}


def change(
    images: NDArray[np.uint8], rows: NDArray[np.int64], operation: Callable[..., Tensor], *parameters: NDArray[Any]
) -> None:
    """Put what `operation(images, *parameters)` makes of some `rows` in their place.

    It sees some rows at a time, uint8 `[b, H, W, C]`, with their part of each of `parameters [B, …]`, on the compute
    device.
    """
    device = compute_device()
    at_once = max(1, _AT_ONCE[device.type] // max(1, images[:1].size))
    for start in range(0, len(rows), at_once):
        some = rows[start : start + at_once]
        drawn = (torch.from_numpy(each[some]).to(device) for each in parameters)
        images[some] = operation(torch.from_numpy(images[some]).to(device), *drawn).cpu().numpy()


def pixels_of(columns: Columns) -> NDArray[np.uint8]:
    """A copy of the images, uint8 `[B, H, W, C]`. Raises `ConfigError` where `image` holds something else."""
    return np.array(_image_column(columns), order="C")


def _image_column(columns: Columns) -> NDArray[np.uint8]:
    images = columns.get(IMAGE)
    if isinstance(images, np.ndarray) and images.dtype == np.uint8 and images.ndim == 4 and images.shape[3] in (1, 3):
        return images
    raise ConfigError(
        f"there is no column {IMAGE!r} of uint8 pixels [B, height, width, 1 or 3]; transforms of images need rows of "
        "one size, so leave task.keep_encoded out"
    )


def _size_of(columns: Columns) -> tuple[int, int]:
    """Height and width."""
    _, height, width, _ = _image_column(columns).shape
    return height, width


def _boxes(
    draws: Floats,
    size: tuple[int, int],
    scale: tuple[float, float],
    ratio: tuple[float, float],
    at_most: tuple[int, int],
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Top, left, height, width `[B, 4]` of the first allowed candidate of `[B, n, 4 or more]`; whether any is `[B]`."""
    area = (scale[0] + (scale[1] - scale[0]) * draws[..., 0]) * size[0] * size[1]
    low, high = math.log(ratio[0]), math.log(ratio[1])
    shape = np.exp(low + (high - low) * draws[..., 1])
    height, width = np.rint(np.sqrt(area / shape)), np.rint(np.sqrt(area * shape))
    allowed = (height >= 1) & (height <= at_most[0]) & (width >= 1) & (width <= at_most[1])
    top = whole(draws[..., 2], size[0] + 1 - height)
    left = whole(draws[..., 3], size[1] + 1 - width)
    candidates = np.stack([top, left, height.astype(np.int64), width.astype(np.int64)], axis=-1)
    first: NDArray[np.int64] = candidates[np.arange(len(draws)), allowed.argmax(axis=1)]
    return first, np.any(allowed, axis=1)


def _gaussian(sigma: Floats, reach: int) -> NDArray[np.int32]:
    """Weights `[B, 2 reach + 1]` with sum 2048; what rounding left goes to the middle."""
    exact = np.exp(-0.5 * (np.arange(-reach, reach + 1) / np.maximum(sigma, 1e-3)[:, np.newaxis]) ** 2)
    share = exact / exact.sum(axis=1, keepdims=True)
    weights: NDArray[np.int32] = np.rint(share * pixels.WEIGHT).astype(np.int32)
    weights[:, reach] += pixels.WEIGHT - weights.sum(axis=1, dtype=np.int32)
    return weights


def whole(draws: Floats, count: int | NDArray[Any]) -> NDArray[np.int64]:
    """Numbers in [0, 1) as whole numbers from 0 to `count` - 1."""
    found: NDArray[np.int64] = np.floor(draws * count).astype(np.int64)
    return found


def fixed(values: Floats) -> NDArray[np.int64]:
    """Numbers in 1/65536."""
    whole: NDArray[np.int64] = np.rint(values * pixels.ONE).astype(np.int64)
    return whole
