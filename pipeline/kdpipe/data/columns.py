"""Columns of a batch of rows: fixed-width arrays, or ragged ones whose rows differ in length."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

Array: TypeAlias = NDArray[Any]


@dataclass(frozen=True, kw_only=True)
class Ragged:
    """Rows of different lengths: row i is `values[offsets[i]:offsets[i + 1]]`; `offsets` is int64 `[N + 1]`, from 0."""

    values: Array
    offsets: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def row(self, index: int) -> Array:
        """One row's values."""
        return self.values[self.offsets[index] : self.offsets[index + 1]]

    def take(self, rows: NDArray[np.int64]) -> Ragged:
        """The given rows in the given order, without a Python loop."""
        starts = self.offsets[rows]
        lengths = self.offsets[rows + 1] - starts
        offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
        positions = np.arange(offsets[-1]) + np.repeat(starts - offsets[:-1], lengths)
        return Ragged(values=self.values[positions], offsets=offsets)


Column: TypeAlias = Array | Ragged
Columns: TypeAlias = Mapping[str, Column]
"""Column name -> values of the same rows: an array `[N, …]` or a `Ragged` of N rows."""


def take(column: Column, rows: NDArray[np.int64]) -> Column:
    """The given rows of a column, in the given order."""
    return column.take(rows) if isinstance(column, Ragged) else column[rows]


def concatenate(parts: list[Column]) -> Column:
    """Columns of consecutive rows as one."""
    if len(parts) == 1:
        return parts[0]
    arrays = [part for part in parts if not isinstance(part, Ragged)]
    if len(arrays) == len(parts):
        return np.concatenate(arrays)
    ragged = [part for part in parts if isinstance(part, Ragged)]
    lengths = np.concatenate([np.diff(part.offsets) for part in ragged])
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
    return Ragged(values=np.concatenate([part.values for part in ragged]), offsets=offsets)


def fixed_bytes(values: NDArray[np.uint8]) -> pa.FixedSizeBinaryArray:
    """Rows of bytes `[N, width]` as an Arrow column, without a Python loop."""
    buffer = pa.py_buffer(np.ascontiguousarray(values).tobytes())
    return pa.FixedSizeBinaryArray.from_buffers(pa.binary(values.shape[1]), len(values), [None, buffer])


def bytes_of(column: pa.ChunkedArray) -> NDArray[np.uint8]:
    """Inverse of `fixed_bytes`: `[N, width]`."""
    width = column.type.byte_width
    parts = [
        np.frombuffer(chunk.buffers()[1], np.uint8)[chunk.offset * width : (chunk.offset + len(chunk)) * width]
        for chunk in column.chunks
    ]
    return np.concatenate([np.empty(0, np.uint8), *parts]).reshape(-1, width)
