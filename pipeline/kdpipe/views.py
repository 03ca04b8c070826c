"""Which versions of a row the teacher speaks about. View 0 is the clean row; views 1, 2, … are augmented ones.

Shapes: B batch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

Columns = Mapping[str, Any]


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
        """What a view shows of prepared rows; teacher and student see the same."""
        if view == 0 or self.transform is None:
            return columns
        return self.transform(columns, row_keys(sample_ids, view), self.seed)


CLEAN = ViewSpec()
"""No augmented views."""


def row_keys(sample_ids: Iterable[str], view: int) -> NDArray[np.uint64]:
    """One number per row `[B]`, whatever its order and batch: BLAKE2b-8 of sample id and view."""
    hashed = [hashlib.blake2b(f"{each}\0{view}".encode(), digest_size=8).digest() for each in sample_ids]
    return np.frombuffer(b"".join(hashed), "<u8")
