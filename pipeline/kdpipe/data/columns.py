"""Columns of a batch of rows: fixed-width arrays, or ragged ones whose rows differ in length."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from kdpipe.errors import DataError

Array: TypeAlias = NDArray[Any]
_TEXTS_AT_ONCE = 2**16


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


def frozen(values: Array) -> Array:
    """An array that is kept and shown to others, which none of them may write into (`ValueError`)."""
    values.flags.writeable = False
    return values


def take(column: Column, rows: NDArray[np.int64]) -> Column:
    """The given rows of a column, in the given order."""
    return column.take(rows) if isinstance(column, Ragged) else column[rows]


def layout_of(columns: Any) -> str:
    """Names, dtypes and shapes, for a message: "image uint8 [64, 28, 28, 1]"."""
    if not isinstance(columns, Mapping):
        return "nothing" if columns is None else f"a {type(columns).__name__}"
    return ", ".join(sorted(f"{name} {_column_layout(column)}" for name, column in columns.items())) or "no columns"


def _column_layout(column: Any) -> str:
    if isinstance(column, Ragged):
        return f"of {len(column)} ragged rows of {column.values.dtype}"
    if isinstance(column, np.ndarray):
        return f"{column.dtype} {list(column.shape)}"
    return f"as a {type(column).__name__}"


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


def ragged_bytes(values: pa.Array) -> Ragged:
    """An Arrow column of binary or text without nulls as uint8 rows, without a Python loop; they share its memory."""
    binary = values.cast(pa.large_binary())
    _, offsets, data = binary.buffers()
    if not len(binary):
        return Ragged(values=np.empty(0, np.uint8), offsets=np.zeros(1, np.int64))
    ends = np.frombuffer(offsets, np.int64)[binary.offset : binary.offset + len(binary) + 1]
    bytes_ = np.frombuffer(data or b"", np.uint8)[ends[0] : ends[-1]]
    return Ragged(values=bytes_, offsets=ends - ends[0])


def texts_of(column: Ragged) -> list[str]:
    """Rows of UTF-8 bytes as text. Raises `DataError` where they are none."""
    buffers = [None, pa.py_buffer(column.offsets), pa.py_buffer(np.ascontiguousarray(column.values))]
    try:
        texts: list[str] = pa.Array.from_buffers(pa.large_string(), len(column), buffers).to_pylist()
    except UnicodeDecodeError as error:
        raise DataError(f"rows of text are not UTF-8: {error}") from None
    return texts


def text_array(blocks: Callable[[], Iterable[pa.StringArray]]) -> NDArray[np.str_]:
    """Arrow arrays of text, one after the other, as one array `[N]`; few rows at a time are Python objects.

    `blocks` gives the arrays, and is asked twice: how long the longest text is must be known first.
    """
    sizes = [(len(block), pc.max(pc.utf8_length(block)).as_py() or 1) for block in blocks()]
    texts = np.empty(sum(rows for rows, _ in sizes), f"<U{max((longest for _, longest in sizes), default=1)}")
    start = 0
    for block in blocks():
        for first in range(0, len(block), _TEXTS_AT_ONCE):
            part = block.slice(first, _TEXTS_AT_ONCE)
            texts[start : start + len(part)] = part.to_numpy(zero_copy_only=False)
            start += len(part)
    return texts


def text_column(texts: NDArray[np.str_]) -> pa.ChunkedArray:
    """Inverse of `text_array`, in pieces as those of `text_pieces`."""
    starts = range(0, len(texts), _TEXTS_AT_ONCE)
    parts = [pa.array(texts[start : start + _TEXTS_AT_ONCE].tolist(), pa.string()) for start in starts]
    return pa.chunked_array(parts, pa.string())


def text_pieces(blocks: Iterable[pa.StringArray]) -> pa.ChunkedArray:
    """Texts that come in blocks of any length, as one column, whose pieces do not tell how they came."""
    parts: list[pa.StringArray] = []
    waiting: list[pa.StringArray] = []
    for block in blocks:
        for first in range(0, len(block), _TEXTS_AT_ONCE):
            waiting.append(block.slice(first, _TEXTS_AT_ONCE))
            if sum(map(len, waiting)) >= _TEXTS_AT_ONCE:
                texts = pa.concat_arrays(waiting)
                parts.append(pa.concat_arrays([texts.slice(0, _TEXTS_AT_ONCE)]))  # a copy: the rest is let go of
                waiting = [texts.slice(_TEXTS_AT_ONCE)]
    rest = [pa.concat_arrays(waiting)] if sum(map(len, waiting)) else []
    return pa.chunked_array([*parts, *rest], pa.string())


def fixed_bytes(values: NDArray[np.uint8]) -> pa.FixedSizeBinaryArray:
    """Rows of bytes `[N, width]` as an Arrow column, without a Python loop."""
    buffer = pa.py_buffer(np.ascontiguousarray(values))
    return pa.FixedSizeBinaryArray.from_buffers(pa.binary(values.shape[1]), len(values), [None, buffer])


def bytes_of(column: pa.ChunkedArray) -> NDArray[np.uint8]:
    """Inverse of `fixed_bytes`: `[N, width]`."""
    width = column.type.byte_width
    parts = [
        np.frombuffer(chunk.buffers()[1], np.uint8)[chunk.offset * width : (chunk.offset + len(chunk)) * width]
        for chunk in column.chunks
    ]
    return np.concatenate([np.empty(0, np.uint8), *parts]).reshape(-1, width)
