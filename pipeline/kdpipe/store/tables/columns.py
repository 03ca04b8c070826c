"""Arrow columns of nested lists as padded arrays.

Shapes: B rows, `...` list levels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray


def padded(
    column: Any, shape: Sequence[int | None], *, as_integers: bool = False
) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """Values `[B, ...]` of lists, and how many each innermost list has `[B, ...]`; 0 for an absent (null) one.

    `shape` has one entry per list level; None: as wide as the longest. Shorter lists are padded: floats by -inf,
    others by 0. Integers become floats unless `as_integers`. Raises `ValueError` for longer lists, other nesting, and
    what holds no numbers.
    """
    if depth_of(column.type) != len(shape):
        raise ValueError(f"lists nested {depth_of(column.type)} deep; expected {len(shape)}")
    if isinstance(column, pa.ExtensionArray):
        column = column.storage
    lengths = pc.list_value_length(column).fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64)
    width = shape[0]
    if width is None:
        is_fixed = pa.types.is_fixed_size_list(column.type)
        width = column.type.list_size if is_fixed else int(lengths.max(initial=0))
    if lengths.max(initial=0) > width:
        raise ValueError(f"a list of {lengths.max()} values; expected {width}")
    used = np.arange(width) < lengths[:, np.newaxis]
    if len(shape) == 1:
        values = numbers(column.flatten())
        values = values.astype(np.float64) if values.dtype.kind in "iu" and not as_integers else values
        return _spread(values, used), lengths
    inner, inner_lengths = padded(column.flatten(), shape[1:], as_integers=as_integers)
    return _spread(inner, used), _spread(inner_lengths, used)


def spoken(covered: NDArray[np.bool_], values: NDArray[Any]) -> NDArray[np.bool_]:
    """Coverage `[B, ...]` so that it broadcasts with values `[B, ...]`.

    Values that are not per token are covered where any token of the row is.
    """
    if values.shape[: covered.ndim] != covered.shape:
        covered = np.logical_or.reduce(covered.reshape(len(covered), -1), axis=1)
    return covered.reshape(*covered.shape, *[1] * (values.ndim - covered.ndim))


def numbers(column: Any) -> NDArray[Any]:
    """A column of numbers or booleans; null is NaN. Raises `ValueError` for what holds others."""
    if not len(column):
        return np.zeros(0)
    values: NDArray[Any] = column.to_numpy(zero_copy_only=False)
    if values.dtype.kind not in "fiub":
        raise ValueError(f"it holds {column.type}{' and null' if column.null_count else ''}; expected numbers")
    return values


def depth_of(type_: Any) -> int:
    """How many list levels a column has."""
    if isinstance(type_, pa.BaseExtensionType):
        type_ = type_.storage_type
    is_list = pa.types.is_list(type_) or pa.types.is_large_list(type_) or pa.types.is_fixed_size_list(type_)
    return 1 + depth_of(type_.value_type) if is_list else 0


def _spread(values: NDArray[Any], used: NDArray[np.bool_]) -> NDArray[Any]:
    """Values `[sum, ...]` of all lists, one after the other, at the `used [B, W]` places: `[B, W, ...]`."""
    if used.all():
        return values.reshape(*used.shape, *values.shape[1:])
    result = np.full((*used.shape, *values.shape[1:]), -np.inf if values.dtype.kind == "f" else 0, values.dtype)
    result[used] = values
    return result
