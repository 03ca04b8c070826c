"""RandAugment: some of fourteen operations on each image, all of one magnitude (Cubuk et al. 2020).

Shapes: B rows, H height, W width, C channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdpipe.data.columns import Columns
from kdpipe.random_numbers import uniform
from kdpipe.transforms import pixels
from kdpipe.transforms.checking import check_whole
from kdpipe.transforms.images import IMAGE, change, fixed, pixels_of

MOST = 30
"""The largest magnitude."""

_MOST_SHEAR, _MOST_SHIFT, _MOST_DEGREES, _MOST_CONTRAST, _FEWEST_BITS = 0.3, 150 / 331, 30, 0.9, 4

Operation = Callable[[Tensor, NDArray[np.int64], float, int], Tensor]
"""`(images uint8 [B, H, W, C], signs [B] of -1 and 1, strength 0 to 1, fill) -> images`."""


@dataclass(frozen=True, kw_only=True)
class RandAugment:
    """`num_ops` times one of `OPERATIONS`, each as probable, with `magnitude` 0 to 30; ranges are torchvision's.

    A moved image is made of nearest pixels, and `fill` comes in.
    """

    num_ops: int = 2
    magnitude: int = 9
    fill: int = 0

    def __post_init__(self) -> None:
        check_whole(self, "num_ops", 1, 16)
        check_whole(self, "magnitude", 0, MOST)
        check_whole(self, "fill", 0, 255)

    def __call__(self, columns: Columns, keys: NDArray[np.uint64], seed: int) -> Columns:
        """Draws, `num_ops` times, an operation and its sign."""
        draws = uniform(keys, (self.num_ops, 2), seed)
        images, operations = pixels_of(columns), list(OPERATIONS.values())
        numbers, signs = (draws[..., 0] * len(operations)).astype(np.int64), np.where(draws[..., 1] < 0.5, -1, 1)
        for place in range(self.num_ops):
            for number, operation in enumerate(operations):
                rows = np.flatnonzero(numbers[:, place] == number)
                change(images, rows, partial(self._operate, operation), signs[:, place])
        return {**columns, IMAGE: images}

    def _operate(self, operation: Operation, images: Tensor, signs: Tensor) -> Tensor:
        return operation(images, signs.cpu().numpy(), self.magnitude / MOST, self.fill)


def _shear_x(images: Tensor, signs: NDArray[np.int64], strength: float, fill: int) -> Tensor:
    return _moved(images, fill, b=signs * _MOST_SHEAR * strength)


def _shear_y(images: Tensor, signs: NDArray[np.int64], strength: float, fill: int) -> Tensor:
    return _moved(images, fill, d=signs * _MOST_SHEAR * strength)


def _translate_x(images: Tensor, signs: NDArray[np.int64], strength: float, fill: int) -> Tensor:
    return _moved(images, fill, c=signs * int(_MOST_SHIFT * images.shape[2] * strength))


def _translate_y(images: Tensor, signs: NDArray[np.int64], strength: float, fill: int) -> Tensor:
    return _moved(images, fill, f=signs * int(_MOST_SHIFT * images.shape[1] * strength))


def _rotate(images: Tensor, signs: NDArray[np.int64], strength: float, fill: int) -> Tensor:
    """Clockwise where the sign is 1, about the centre."""
    cos, sin = math.cos(math.radians(_MOST_DEGREES * strength)), math.sin(math.radians(_MOST_DEGREES * strength))
    x, y = images.shape[2] / 2, images.shape[1] / 2
    turn = signs * sin
    return _moved(images, fill, a=cos, b=turn, c=x - cos * x - turn * y, d=-turn, e=cos, f=y + turn * x - cos * y)


def _moved(images: Tensor, fill: int, **given: NDArray[Any] | float) -> Tensor:
    """`pixels.affine`; what is not given is that of the image itself."""
    matrix = np.tile([1.0, 0.0, 0.0, 0.0, 1.0, 0.0], (len(images), 1))
    for name, values in given.items():
        matrix[:, "abcdef".index(name)] = values
    return pixels.affine(images, torch.from_numpy(fixed(matrix)).to(images.device), fill)


def _brightness(images: Tensor, signs: NDArray[np.int64], strength: float, fill: int) -> Tensor:
    return pixels.blended(images, 0, _factor(images, signs, strength))


def _colour(images: Tensor, signs: NDArray[np.int64], strength: float, fill: int) -> Tensor:
    return pixels.blended(images, pixels.luma(images), _factor(images, signs, strength))


def _contrast(images: Tensor, signs: NDArray[np.int64], strength: float, fill: int) -> Tensor:
    return pixels.blended(images, pixels.mean_luma(images), _factor(images, signs, strength))


def _sharpness(images: Tensor, signs: NDArray[np.int64], strength: float, fill: int) -> Tensor:
    return pixels.blended(images, pixels.smoothed(images), _factor(images, signs, strength))


def _factor(images: Tensor, signs: NDArray[np.int64], strength: float) -> Tensor:
    return torch.from_numpy(fixed(1 + signs * _MOST_CONTRAST * strength)).to(images.device)


def _posterize(images: Tensor, signs: NDArray[np.int64], strength: float, fill: int) -> Tensor:
    return pixels.posterized(images, 8 - round((8 - _FEWEST_BITS) * strength))


def _solarize(images: Tensor, signs: NDArray[np.int64], strength: float, fill: int) -> Tensor:
    return pixels.solarized(images, math.ceil(255 * (1 - strength)))


OPERATIONS: Mapping[str, Operation] = {
    "identity": lambda images, signs, strength, fill: images,
    "shear_x": _shear_x,
    "shear_y": _shear_y,
    "translate_x": _translate_x,
    "translate_y": _translate_y,
    "rotate": _rotate,
    "brightness": _brightness,
    "colour": _colour,
    "contrast": _contrast,
    "sharpness": _sharpness,
    "posterize": _posterize,
    "solarize": _solarize,
    "auto_contrast": lambda images, signs, strength, fill: pixels.auto_contrasted(images),
    "equalize": lambda images, signs, strength, fill: pixels.equalized(images),
}
"""What is drawn from, by name. Strength 1 is: sheared by 0.3, moved by 150/331 of the side, turned by 30 degrees;
brightness, colour, contrast and sharpness times 0.1 or 1.9; 4 bits; inverted from 0 on. Half of the signs are -1.
"""
