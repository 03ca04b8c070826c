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

from kdpipe.targets import are_of_places


def padded(
    column: Any, shape: Sequence[int | None], *, as_integers: bool = False
) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """Values `[B, ...]` of lists, and how many each innermost list has `[B, ...]`; 0 for an absent (null) one.

    `shape` has one entry per list level; None: as wide as the longest. Shorter lists are padded: floats by -inf,
    others by 0. Integers become floats unless `as_integers`. Raises `ValueError` for longer lists, other nesting, and
    what holds no numbers.
    """
    column = _nested(column, len(shape))
    lengths = _lengths(column)
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


def list_lengths(column: Any, depth: int) -> list[NDArray[np.int64]]:
    """Of each of `depth` levels how many entries the lists have, one list after the other; 0 for an absent (null) one.

    Raises `ValueError` for other nesting.
    """
    column = _nested(column, depth)
    levels = [_lengths(column)]
    for _ in range(depth - 1):
        column = column.flatten()
        levels.append(_lengths(column))
    return levels


def token_lengths(column: Any, num_tokens: int) -> NDArray[np.int64]:
    """How many values each token has `[B, num_tokens]`; 0 past a row's last one. Raises `ValueError` as `padded`."""
    tokens, values = list_lengths(column, 2)
    if tokens.max(initial=0) > num_tokens:
        raise ValueError(f"a list of {tokens.max()} values; expected {num_tokens}")
    return _spread(values, np.arange(num_tokens) < tokens[:, np.newaxis])


def spoken(covered: NDArray[np.bool_], values: NDArray[Any], *, of_features: bool) -> NDArray[np.bool_]:
    """Coverage `[B, ...]` so that it broadcasts with values `[B, ...]`, of features or of logits and what is by them.

    Features that are not of tokens (see `are_of_places`) are covered where any token of the row is.
    """
    if of_features and not are_of_places(values.shape, covered.shape):
        covered = np.logical_or.reduce(covered.reshape(len(covered), -1), axis=1)
    return covered.reshape(*covered.shape, *[1] * (values.ndim - covered.ndim))


def numbers(column: Any) -> NDArray[Any]:
    """A column of numbers or booleans; null is NaN. Raises `ValueError` for what holds others."""
    if not len(column):
        return np.zeros(0)
    values: NDArray[Any] = column.to_numpy(zero_copy_only=False)
    if values.dtype.kind not in "fiub":
        found = f"{column.type}{' and null' if column.null_count else ''}"
        raise ValueError(
            f"it holds {found}; expected {'true and false' if pa.types.is_boolean(column.type) else 'numbers'}"
        )
    return values


def depth_of(type_: Any) -> int:
    """How many list levels a column has."""
    return len(_types(type_)) - 1


def entry_type(type_: Any) -> Any:
    """The type of the innermost lists' entries, or of a column without lists."""
    return _types(type_)[-1]


def _nested(column: Any, depth: int) -> Any:
    """A column of lists nested `depth` deep; JSON Lines do not tell how deep empty ones are. Raises `ValueError`."""
    types = _types(column.type)
    if len(types) <= depth and pa.types.is_null(types[-1]):
        type_ = pa.float64()
        for _ in range(depth):
            type_ = pa.list_(type_)
        return column.cast(type_)
    if len(types) != depth + 1:
        raise ValueError(f"lists nested {len(types) - 1} deep; expected {depth}")
    return _storage(column)


def _types(type_: Any) -> list[Any]:
    """A column's type, that of its lists' entries, and so on."""
    if isinstance(type_, pa.BaseExtensionType):
        type_ = type_.storage_type
    is_list = pa.types.is_list(type_) or pa.types.is_large_list(type_) or pa.types.is_fixed_size_list(type_)
    return [type_, *(_types(type_.value_type) if is_list else [])]


def _storage(column: Any) -> Any:
    return column.storage if isinstance(column, pa.ExtensionArray) else column


def _lengths(column: Any) -> NDArray[np.int64]:
    """How many entries each list has; 0 for an absent (null) one."""
    lengths: NDArray[np.int64] = pc.list_value_length(column).fill_null(0).to_numpy(zero_copy_only=False)
    return lengths.astype(np.int64)


def _spread(values: NDArray[Any], used: NDArray[np.bool_]) -> NDArray[Any]:
    """Values `[sum, ...]` of all lists, one after the other, at the `used [B, W]` places: `[B, W, ...]`."""
    if used.all():
        return values.reshape(*used.shape, *values.shape[1:])
    result = np.full((*used.shape, *values.shape[1:]), -np.inf if values.dtype.kind == "f" else 0, values.dtype)
    result[used] = values
    return result
