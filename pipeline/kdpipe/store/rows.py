"""Which sample each row of a store is, and of which content; rows found by id, and taken together by shard or chunk.

Shapes: N rows, B asked for.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from kdpipe.data.columns import bytes_of, fixed_bytes, frozen, text_array, text_column
from kdpipe.errors import ConfigError
from kdpipe.views import partner_blocks

SPLIT = "split"
"""Column of rows.parquet where views mix rows."""


def row_numbers(rows: Any) -> NDArray[np.int64]:
    """Row numbers `[B]`. Raises `ConfigError` for a mask, and for what is no whole number."""
    found = np.asarray(rows)
    if found.ndim != 1 or (len(found) and found.dtype.kind not in "iu"):
        raise ConfigError(
            f"rows are {found.dtype} of shape {list(found.shape)}; expected row numbers [N], such as those of a mask: "
            "np.flatnonzero(mask)"
        )
    return found.astype(np.int64, copy=False)


def grouped(keys: NDArray[np.int64]) -> Iterator[tuple[int, NDArray[np.intp]]]:
    """Each key that stands in `keys [B]`, ascending, and the positions where it stands, ascending."""
    if not len(keys):
        return
    above = keys - keys.min()
    if above.max() < 2**16:
        above = above.astype(np.uint16)  # which NumPy sorts by radix, some times faster
    order = np.argsort(above, kind="stable")
    ordered = above[order]
    edges = [0, *(np.flatnonzero(ordered[1:] != ordered[:-1]) + 1).tolist(), len(keys)]
    for start, stop in itertools.pairwise(edges):
        here = order[start:stop]
        yield int(keys[here[0]]), here


class SampleIndex:
    """Row numbers by sample id."""

    def __init__(self, sample_ids: NDArray[np.str_]) -> None:
        """`sample_ids [N]` in row order."""
        self._order = np.argsort(sample_ids, kind="stable")
        self._ordered = sample_ids[self._order]

    def find(self, sample_ids: Sequence[str] | NDArray[np.str_]) -> NDArray[np.int64]:
        """Row numbers `[B]` of sample ids, -1 for unknown ones. Raises `ConfigError` for what is no sequence of ids."""
        try:
            wanted = np.asarray(sample_ids, dtype=np.str_)
        except UnicodeDecodeError as error:
            raise ConfigError(f"sample ids are text; found bytes, such as {error.object!r}; decode them") from None
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
        return frozen(text_array(lambda: self._table["sample_id"].chunks))

    def ids_of(self, rows: NDArray[np.int64]) -> NDArray[np.str_]:
        """Sample ids `[B]` of row numbers that are near each other, without an array of all rows' ids."""
        first, last = (rows.min(), rows.max()) if len(rows) else (0, -1)
        near = self._table["sample_id"].slice(first, last - first + 1)
        return text_array(lambda: near.chunks)[rows - first]

    @cached_property
    def digests(self) -> NDArray[np.uint8]:
        """Content digests `[N, 16]`."""
        return frozen(bytes_of(self._table["digest"]))

    @cached_property
    def splits(self) -> NDArray[np.str_] | None:
        """Of rows that views mix, the split `[N]` within which each is; empty: views are not about it."""
        return frozen(text_array(lambda: self._table[SPLIT].chunks)) if SPLIT in self._table.column_names else None

    def inputs_digest(self, view: int, start: int, stop: int) -> str:
        """SHA-256 (hex) of what rows `[start, stop)` are in a view: what a commit record was computed from.

        Of their ids and content digests; in a view that mixes rows, of all rows of their blocks, and of the splits.
        """
        mixed = view > 0 and SPLIT in self._table.column_names
        part = partner_blocks(start, stop, self._table.num_rows) if mixed else slice(start, stop)
        rows = self._table.slice(part.start, part.stop - part.start)
        hashed = hashlib.sha256("\0".join(rows["sample_id"].to_pylist()).encode() + bytes_of(rows["digest"]).tobytes())
        if mixed:
            hashed.update("\0".join(rows[SPLIT].to_pylist()).encode())
        return hashed.hexdigest()

    def find(self, sample_ids: Sequence[str]) -> NDArray[np.int64]:
        """As `SampleIndex.find`."""
        return self._index.find(sample_ids)

    @cached_property
    def _index(self) -> SampleIndex:
        return SampleIndex(self.sample_ids)


def rows_table(
    sample_ids: NDArray[np.str_] | pa.ChunkedArray,
    digests: NDArray[np.uint8],
    splits: NDArray[np.str_] | None = None,
) -> pa.Table:
    """rows.parquet of rows `[N]` with content digests `[N, 16]`, and splits `[N]` where views mix rows."""
    ids = sample_ids if isinstance(sample_ids, pa.ChunkedArray) else text_column(sample_ids)
    columns = {"sample_id": ids, "digest": fixed_bytes(digests)}
    return pa.table(columns if splits is None else {**columns, SPLIT: text_column(splits)})
