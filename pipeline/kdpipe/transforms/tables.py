"""Augmentations of tables: rows have a column `features`, float32 `[B, D]`, NaN where a number is missing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri

from kdpipe.data.columns import Columns
from kdpipe.errors import ConfigError
from kdpipe.preprocess.columns import FEATURES
from kdpipe.random_numbers import uniform


@dataclass(frozen=True, kw_only=True)
class Noise:
    """Adds Gaussian noise to the numbers of a table; categories and missing numbers stay.

    `std` is its standard deviation, in the units of the columns: one number, or one per column, in the order of
    `task.columns`; 0 leaves a column as it is.
    """

    std: float | Sequence[float]

    def __post_init__(self) -> None:
        if not (np.isfinite(self.std).all() and np.greater_equal(self.std, 0).all()):
            raise ConfigError(f"Noise: std is {self.std}; expected finite numbers, at least 0")

    def __call__(self, columns: Columns, keys: NDArray[np.uint64], seed: int) -> Columns:
        """Draws one number per row and column."""
        features = columns.get(FEATURES)
        if not isinstance(features, np.ndarray) or features.ndim != 2:
            raise ConfigError(f"there is no column {FEATURES!r} of numbers [B, D]; Noise is for rows of a table")
        std = np.asarray(self.std, np.float64)
        if std.ndim and len(std) != features.shape[1]:
            raise ConfigError(f"std has {len(std)} numbers; the table has {features.shape[1]} columns")
        # 2^-54 is half a step: never 0, and as far from 1 as from 0.
        normal = ndtri(uniform(keys, (features.shape[1],), seed) + 2.0**-54)
        return {**columns, FEATURES: (features + std * normal).astype(features.dtype)}
