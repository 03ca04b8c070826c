"""Which sample each row of a store is, and of which content.

Shapes: N rows, B asked for.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from functools import cached_property

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from kdpipe.data.columns import bytes_of


class StoredRows:
    """rows.parquet, read when it is first asked for: a reader that goes by row number never needs it."""

    def __init__(self, read: Callable[[], pa.Table]) -> None:
        self._read = read

    @cached_property
    def _table(self) -> pa.Table:
        return self._read()

    @cached_property
    def sample_ids(self) -> NDArray[np.str_]:
        """Sample ids `[N]`, in row order."""
        ids: NDArray[np.str_] = self._table["sample_id"].to_numpy(zero_copy_only=False).astype(np.str_)
        return ids

    @cached_property
    def digests(self) -> NDArray[np.uint8]:
        """Content digests `[N, 16]`."""
        return bytes_of(self._table["digest"])

    def find(self, sample_ids: Sequence[str]) -> NDArray[np.int64]:
        """Row numbers `[B]` of sample ids, -1 for unknown ones."""
        wanted = np.asarray(sample_ids, dtype=np.str_)
        if not len(self.sample_ids):
            return np.full(len(wanted), -1, np.int64)
        order, ordered = self._sorted
        found = np.minimum(np.searchsorted(ordered, wanted), len(ordered) - 1)
        return np.where(ordered[found] == wanted, order[found], -1)

    @cached_property
    def _sorted(self) -> tuple[NDArray[np.int64], NDArray[np.str_]]:
        order = np.argsort(self.sample_ids, kind="stable")
        return order, self.sample_ids[order]


def inputs_digest(sample_ids: NDArray[np.str_], digests: NDArray[np.uint8]) -> str:
    """SHA-256 (hex) of some rows' ids and content digests: what a commit record was computed from."""
    ids = "\0".join(sample_ids.tolist()).encode()
    return hashlib.sha256(ids + digests.tobytes()).hexdigest()
