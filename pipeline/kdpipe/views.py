"""Which versions of a row the teacher speaks about. View 0 is the clean row; views 1, 2, … are augmented ones.

Shapes: B batch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from kdpipe.data.columns import Column, Columns, Ragged, concatenate, take
from kdpipe.errors import ConfigError

PROBE_ROWS = 16
"""Rows that `ViewSpec.probe` looks at."""
_FLOAT_STEP, _PIXELS_SHARE = 1e-5, 0.01


@runtime_checkable
class Transform(Protocol):
    """Makes augmented versions of rows: the same ones for the same keys, whatever the batch, order or process."""

    def __call__(self, columns: Columns, keys: NDArray[np.uint64], seed: int) -> Columns:
        """Columns of `B` prepared rows -> columns of the same layout. `keys [B]` names (row, view).

        Draw with `kdpipe.random_numbers.uniform(keys, shape, seed)`.
        """


@dataclass(frozen=True, kw_only=True)
class ViewSpec:
    """How many augmented views a store holds beside the clean row, from which transform and seed."""

    count: int = 0
    seed: int = 0
    transform: Transform | None = None

    @property
    def num_views(self) -> int:
        """Length of a store's view axis: the clean row and `count` augmented ones."""
        return 1 + self.count

    def view_of_epoch(self, epoch: int) -> int:
        """The view that a student meets in `epoch` (from 0): 1 + epoch mod count, or the clean row."""
        return 1 + epoch % self.count if self.count else 0

    def of(self, columns: Columns, sample_ids: Iterable[str], view: int) -> Columns:
        """What a view shows of prepared rows; teacher and student see the same.

        Raises `ConfigError` when the transform fails, or gives columns of another layout: other names, another number
        or shape of rows, another dtype.
        """
        if view == 0 or self.transform is None:
            return columns
        return _transformed(self.transform, columns, row_keys(sample_ids, view), self.seed)

    def probe(self, columns: Columns, sample_ids: Sequence[str]) -> None:
        """Show up to `PROBE_ROWS` of some rows in view 1, a second time, in another order and one by one.

        Raises `ConfigError` unless they look the same each time, but for rounding: then teacher and student, who meet
        a row in other batches, would see other rows.
        """
        if self.transform is None:
            return
        rows = np.arange(min(PROBE_ROWS, len(sample_ids)))

        def shown(order: NDArray[np.int64]) -> Columns:
            part = {name: take(column, order) for name, column in columns.items()}
            return self.of(part, [sample_ids[row] for row in order], view=1)

        order = np.random.default_rng(0).permutation(rows)
        first, mixed, alone = shown(rows), shown(order), [shown(rows[[row]]) for row in rows]
        again: dict[str, Columns] = {
            "a second time": shown(rows),
            "in another order": {name: take(column, np.argsort(order)) for name, column in mixed.items()},
            "one by one": {name: concatenate([each[name] for each in alone]) for name in first},
        }
        for way, found in again.items():
            for name, column in first.items():
                if not _look_the_same(column, found[name]):
                    raise ConfigError(
                        f"views.transform: {_name_of(self.transform)} makes another {name!r} of the same {len(rows)} "
                        f"rows when it is given them {way}; expected the same row for the same key, whatever the "
                        "batch. Draw with kdpipe.random_numbers.uniform(keys, shape, seed), and let no row depend on "
                        "the others (no shuffling, no mean over the batch)."
                    )


CLEAN = ViewSpec()
"""No augmented views."""


def row_keys(sample_ids: Iterable[str], view: int) -> NDArray[np.uint64]:
    """One number per row `[B]`, whatever its order and batch: BLAKE2b-8 of sample id and view."""
    hashed = [hashlib.blake2b(f"{each}\0{view}".encode(), digest_size=8).digest() for each in sample_ids]
    return np.frombuffer(b"".join(hashed), "<u8")


def _transformed(transform: Transform, columns: Columns, keys: NDArray[np.uint64], seed: int) -> Columns:
    expected = _layout(columns)
    try:
        found = transform(columns, keys, seed)
    except Exception as error:
        raise ConfigError(
            f"views.transform: {_name_of(transform)} fails on {expected}: {type(error).__name__}: {error}"
        ) from error
    if _layout(found) != expected:
        raise ConfigError(
            f"views.transform: {_name_of(transform)} gives {_layout(found)}; expected the layout that it was given: "
            f"{expected}"
        )
    return found


def _name_of(transform: Transform) -> str:
    return getattr(transform, "__name__", type(transform).__name__)


def _layout(columns: Any) -> str:
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


def _look_the_same(one: Column, other: Column) -> bool:
    """Whether two versions of a column differ by no more than rounding in batches of other sizes.

    Floats: by 1e-5 of the largest number at their place; uint8 (pixels): by a step, in 1 % of them; others: not at all.
    """
    if isinstance(one, Ragged) and isinstance(other, Ragged):
        return np.array_equal(one.offsets, other.offsets) and np.array_equal(one.values, other.values)
    assert isinstance(one, np.ndarray)
    assert isinstance(other, np.ndarray)
    if one.dtype.kind == "f":
        step = max(_FLOAT_STEP, 4 * float(np.finfo(one.dtype).eps))
        largest = np.abs(np.nan_to_num(one, posinf=0, neginf=0)).max(axis=0)
        return np.allclose(one, other, rtol=0, atol=step * largest, equal_nan=True)
    if one.dtype == np.uint8:
        apart = np.abs(one.astype(np.int16) - other)
        return bool((apart <= 1).all() and apart.sum() <= _PIXELS_SHARE * apart.size)
    return np.array_equal(one, other)
