"""A model's own deterministic way from prepared rows to its inputs: the protocol, and moments of a stream."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Protocol, TypeAlias, runtime_checkable

import numpy as np

from kdpipe.data.columns import Array, Columns
from kdpipe.inputs import Inputs

State: TypeAlias = Mapping[str, Any]
"""What a fitted preprocess keeps beside its arguments: JSON values, stored with the model."""


@runtime_checkable
class Preprocess(Protocol):
    """Rows in, model inputs out; the same for the same rows, always.

    An attribute `offers` holds keyword values for the model's factory (`vocab_size`, say). Where rows become tokens,
    a method `lengths(columns)` gives how many, int64 `[B]`.
    """

    def fit(self, blocks: Iterable[Columns]) -> None:
        """Learn from the rows that the model trains on. Does nothing where there is nothing to learn."""

    def state(self) -> State:
        """What `fit` learnt; empty where there is nothing. Raises `ConfigError` before `fit` where there is."""

    def load_state(self, state: State) -> None:
        """Take back what `state` gave."""

    def __call__(self, columns: Columns) -> Inputs:
        """Model inputs `[B, …]` on the CPU: one tensor, or several by the names of `forward`'s arguments."""


def offers(preprocess: Preprocess) -> Mapping[str, Any]:
    """Keyword values for the factory of the model that takes its inputs."""
    return dict(getattr(preprocess, "offers", {}))


_ROUNDING = 1e-12
"""Spread relative to the mean that float64 sums of a constant may show."""


class Moments:
    """Mean and standard deviation per column of a stream, by Chan et al. 1983; a constant column counts as std 1."""

    def __init__(self) -> None:
        self._count = 0
        self._mean: Any = 0.0
        self._squares: Any = 0.0

    def add(self, rows: Array) -> None:
        """Take in rows `[N, D]`."""
        count, mean = len(rows), rows.mean(axis=0)
        total = self._count + count
        delta = mean - self._mean
        self._squares = self._squares + ((rows - mean) ** 2).sum(axis=0) + delta**2 * self._count * count / total
        self._mean = self._mean + delta * count / total
        self._count = total

    def mean_and_std(self) -> tuple[list[float], list[float]]:
        """Of every column so far."""
        std = np.sqrt(self._squares / self._count)
        constant = std <= _ROUNDING * np.abs(self._mean)
        return self._mean.tolist(), np.where(constant, 1.0, std).tolist()
