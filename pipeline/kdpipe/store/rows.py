"""Which sample each row of a store is, and of which content; rows found by id, and taken together by shard or chunk.

Shapes: N rows, B asked for.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from kdpipe.data.columns import bytes_of, text_array
from kdpipe.errors import ConfigError


def grouped(keys: NDArray[np.int64]) -> Iterator[tuple[int, NDArray[np.intp]]]:
    """Each key that stands in `keys [B]`, ascending, and the positions where it stands, ascending."""
    if not len(keys):
        return
    above = keys - keys.min()
    # NumPy sorts 16 bits by radix, which is some times faster.
    order = np.argsort(above.astype(np.uint16) if above.max() < 2**16 else above, kind="stable")
    ordered = keys[order]
    starts = np.flatnonzero(np.diff(ordered, prepend=ordered[0] - 1))
    yield from zip(ordered[starts].tolist(), np.split(order, starts[1:]), strict=True)


class SampleIndex:
    """Row numbers by sample id."""

    def __init__(self, sample_ids: NDArray[np.str_]) -> None:
        """`sample_ids [N]` in row order."""
        self._order = np.argsort(sample_ids, kind="stable")
        self._ordered = sample_ids[self._order]

    def find(self, sample_ids: Sequence[str] | NDArray[np.str_]) -> NDArray[np.int64]:
        """Row numbers `[B]` of sample ids, -1 for unknown ones. Raises `ConfigError` for what is no sequence of ids."""
        wanted = np.asarray(sample_ids, dtype=np.str_)
        if wanted.ndim != 1:
            found = f"ids of shape {list(wanted.shape)}" if wanted.ndim else f"a single id, {sample_ids!r}"
            raise ConfigError(f"found {found}; expected a sequence of sample ids; put one id into a list")
        if not len(self._ordered):
            return np.full(len(wanted), -1, np.int64)
        place = np.minimum(np.searchsorted(self._ordered, wanted), len(self._ordered) - 1)
        return np.where(self._ordered[place] == wanted, self._order[place], -1)


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
        return text_array([self._table["sample_id"]])

    @cached_property
    def digests(self) -> NDArray[np.uint8]:
        """Content digests `[N, 16]`."""
        return bytes_of(self._table["digest"])

    def inputs_digest(self, start: int, stop: int) -> str:
        """`inputs_digest` of rows `[start, stop)`."""
        rows = self._table.slice(start, stop - start)
        return inputs_digest(rows["sample_id"].to_pylist(), bytes_of(rows["digest"]))

    def find(self, sample_ids: Sequence[str]) -> NDArray[np.int64]:
        """As `SampleIndex.find`."""
        return self._index.find(sample_ids)

    @cached_property
    def _index(self) -> SampleIndex:
        return SampleIndex(self.sample_ids)


def inputs_digest(sample_ids: Sequence[str], digests: NDArray[np.uint8]) -> str:
    """SHA-256 (hex) of some rows' ids and content digests: what a commit record was computed from."""
    ids = "\0".join(sample_ids).encode()
    return hashlib.sha256(ids + digests.tobytes()).hexdigest()
