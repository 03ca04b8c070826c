"""Rows made of two: each is mixed with its partner (`kdpipe.views.PartnerPlan`), and their labels in the same shares.

Shapes: M rows of which B are shown, H height, W width, C channels, D columns of a table.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import betaincinv

from kdpipe.data.columns import Column, Columns, concatenate, take
from kdpipe.errors import ConfigError
from kdpipe.preprocess.columns import CATEGORY, FEATURES
from kdpipe.random_numbers import uniform
from kdpipe.transforms import pixels
from kdpipe.transforms.checking import check_probability, check_range
from kdpipe.transforms.images import IMAGE, fixed, on_images, pixels_of, whole
from kdpipe.views import Pairs

_MOST_ALPHA = 100
_LEAST_ALPHA = 0.01


@dataclass(frozen=True, kw_only=True)
class Mixup:
    """`share x row + (1 - share) x partner`, with `probability` (Zhang et al. 2018, "mixup", equation 1).

    The share is drawn from Beta(`alpha`, `alpha`), a multiple of 1/65536. Pixels are rounded to whole steps, halves up.
    Of a table the numbers are mixed, missing where a part of either is missing; categories are those of the row with
    the larger share.
    """

    mixes = True
    alpha: float = 0.2
    probability: float = 1.0

    def __post_init__(self) -> None:
        check_range(self, "alpha", _LEAST_ALPHA, _MOST_ALPHA)
        check_probability(self)

    def mix(
        self, columns: Columns, keys: NDArray[np.uint64], seed: int, pairs: Pairs
    ) -> tuple[Columns, NDArray[np.float64]]:
        """Draws whether, and the share."""
        draws = uniform(keys[pairs.rows], (2,), seed)
        share = _shares(draws, self.alpha, self.probability)
        rows, partners = pairs.of(columns)
        if set(columns) == {IMAGE}:
            return on_images(rows, pixels.blended, pixels_of(partners), fixed(share)), share
        return {name: _mixed(name, column, partners[name], share) for name, column in rows.items()}, share


@dataclass(frozen=True, kw_only=True)
class CutMix:
    """A box of the image is its partner's, with `probability` (Yun et al. 2019, "CutMix", section 3.1).

    Its sides are `sqrt(1 - share)` of the image's, share drawn from Beta(`alpha`, `alpha`); its centre is uniform. What
    lies beyond the image is cut off, and the row's own share is that of its pixels that stay.
    """

    mixes = True
    alpha: float = 1.0
    probability: float = 1.0

    def __post_init__(self) -> None:
        check_range(self, "alpha", _LEAST_ALPHA, _MOST_ALPHA)
        check_probability(self)

    def mix(
        self, columns: Columns, keys: NDArray[np.uint64], seed: int, pairs: Pairs
    ) -> tuple[Columns, NDArray[np.float64]]:
        """Draws whether, the share, and the centre."""
        if set(columns) != {IMAGE}:
            raise ConfigError(f"rows have {', '.join(columns)}; CutMix is for rows of {IMAGE} alone")
        rows, partners = pairs.of(columns)
        others = pixels_of(partners)
        draws = uniform(keys[pairs.rows], (4,), seed)
        size = np.array(others.shape[1:3])
        side = np.floor(size * np.sqrt(1 - _shares(draws, self.alpha, self.probability))[:, np.newaxis])
        corner = whole(draws[:, 2:], size) - side // 2
        box = np.stack([corner, corner + side], axis=1).clip(0, size).astype(np.int64)
        (top, left), (bottom, right) = box[:, 0].T, box[:, 1].T
        share = 1 - (bottom - top) * (right - left) / size.prod()
        return on_images(rows, pixels.pasted, others, top, left, bottom - top, right - left), share


def _shares(draws: NDArray[np.float64], alpha: float, probability: float) -> NDArray[np.float64]:
    """Of draws `[B, 2 or more]`, Beta(alpha, alpha) by its inverse, in 1/65536; 1 where nothing is mixed."""
    drawn = fixed(betaincinv(alpha, alpha, draws[:, 1])) / pixels.ONE
    return np.where(draws[:, 0] < probability, drawn, 1.0)


def _mixed(name: str, column: Column, partners: Column, share: NDArray[np.float64]) -> Column:
    """A column of a table."""
    if name == FEATURES and isinstance(column, np.ndarray) and isinstance(partners, np.ndarray):
        own = share[:, np.newaxis]
        mixed = np.where(own == 1, column, np.where(own == 0, partners, own * column + (1 - own) * partners))
        numbers: NDArray[np.floating] = mixed.astype(column.dtype)
        return numbers
    if name.startswith(CATEGORY):
        place = np.arange(len(share))
        return take(concatenate([column, partners]), np.where(share >= 0.5, place, place + len(share)))
    raise ConfigError(
        f"column {name!r} cannot be mixed; Mixup is for rows of {IMAGE} alone, or of a table: between words, tokens or "
        "encoded images there is nothing"
    )
