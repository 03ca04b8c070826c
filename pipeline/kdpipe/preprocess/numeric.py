"""Numeric columns as a model takes them.

Shapes: B batch, D columns.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from kdpipe.data.columns import Array, Columns, layout_of
from kdpipe.errors import ConfigError
from kdpipe.preprocess.base import Moments, State


class Standardize:
    """Numeric columns `[B, D]` -> `(x - mean) / std`, per column.

    `mean` and `std` are learnt from the training rows where they are not given.
    """

    def __init__(self, mean: list[float] | None = None, std: list[float] | None = None) -> None:
        if (mean is None) != (std is None):
            raise ConfigError("preprocess: give both mean and std, or neither to learn them from the training rows")
        self._mean, self._std = mean, std

    def fit(self, blocks: Iterable[Columns]) -> None:
        """Learn mean and std per column, unless they were given."""
        if self._mean is not None:
            return
        moments = Moments()
        for block in blocks:
            moments.add(_features(block).astype(np.float64))
        self._mean, self._std = moments.mean_and_std()

    def state(self) -> State:
        """`mean` and `std` per column."""
        if self._mean is None or self._std is None:
            raise ConfigError("preprocess Standardize knows no mean and std: give them, or train the model here")
        return {"mean": self._mean, "std": self._std}

    def load_state(self, state: State) -> None:
        """Take back what `state` gave."""
        self._mean, self._std = state["mean"], state["std"]

    def __call__(self, columns: Columns) -> Tensor:
        """`[B, D]`. Raises `ConfigError` unless there is one mean and one std per column."""
        state = self.state()
        features = torch.from_numpy(_features(columns).astype(np.float32))
        mean, std = (torch.tensor(state[key]) for key in ("mean", "std"))
        if not features.shape[1:] == mean.shape == std.shape:
            raise ConfigError(
                f"preprocess Standardize has {mean.numel()} numbers as mean and {std.numel()} as std, and the rows "
                f"have {features[:1].numel()} columns of numbers; expected one per column"
            )
        return (features - mean) / std


def _features(columns: Columns) -> Array:
    """`[B, D]`."""
    features = columns.get("features")
    if not isinstance(features, np.ndarray):
        raise ConfigError(
            f"preprocess Standardize takes a column `features` of numbers; rows here have {layout_of(columns)}"
        )
    return features
