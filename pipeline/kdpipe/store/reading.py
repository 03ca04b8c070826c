"""Rows of arrays out of shard files: any rows through memory maps, pools of rows in whole chunks.

Shapes: B batch, N rows of a pool.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdpipe.store.layout import ArrayLayout
from kdpipe.store.shard_file import ShardFile

MAX_OPEN_SHARDS = 1024
DENSE = 0.5
SMALL_CHUNK_BYTES = 64 * 2**10
"""A chunk is read whole when it is small, or when this share of it is wanted; of others the wanted rows are read."""

Arrays = dict[str, NDArray[Any]]


class ShardReader:
    """Committed shards, opened on demand by `open_shard(layout, view, shard)`."""

    def __init__(self, open_shard: Callable[[ArrayLayout, int, int], ShardFile]) -> None:
        self._open_shard = open_shard
        self._open: OrderedDict[tuple[str, int, int], ShardFile] = OrderedDict()

    def shard(self, layout: ArrayLayout, view: int, shard: int) -> ShardFile:
        """An open shard. Raises `IncompleteStoreError`, `CorruptStoreError`."""
        key = (layout.name, view, shard)
        if key in self._open:
            self._open.move_to_end(key)
            return self._open[key]
        self._open[key] = self._open_shard(layout, view, shard)
        if len(self._open) > MAX_OPEN_SHARDS:
            self._open.popitem(last=False)
        return self._open[key]

    def release(self) -> None:
        """Let go of mapped pages, which count as this process's memory."""
        for file in self._open.values():
            file.release()

    def forget(self, view: int, shard: int) -> None:
        """Close a shard whose files are replaced."""
        for key in [key for key in self._open if key[1:] == (view, shard)]:
            del self._open[key]

    def read(self, layouts: Iterable[ArrayLayout], view: int, rows: NDArray[np.int64]) -> Arrays:
        """Rows `[B, …]` of arrays of one store, in the given order."""
        layouts = list(layouts)
        result: Arrays = {each.name: np.empty((len(rows), *each.shape), each.numpy_dtype) for each in layouts}
        if not len(rows):
            return result
        shard_of, position = np.divmod(rows, layouts[0].shard_rows)
        order = np.argsort(shard_of, kind="stable")
        shards, starts = np.unique(shard_of[order], return_index=True)
        for shard, here in zip(shards.tolist(), np.split(order, starts[1:]), strict=True):
            for layout in layouts:
                result[layout.name][here] = self.shard(layout, view, shard).read(position[here])
        return result


class RowPool:
    """Rows that are read together and then taken batch by batch; its memory is used again by the next `load`."""

    def __init__(self, reader: ShardReader, layouts: Sequence[ArrayLayout], *, verify_always: bool = False) -> None:
        self._reader, self._layouts, self._verify = reader, layouts, verify_always
        self._arrays = {each.name: _PooledArray(each) for each in layouts}

    def load(self, view: int, rows: NDArray[np.int64]) -> None:
        """Read rows `[N]` of every array: whole chunks where most of a chunk is wanted, single rows of the others."""
        for array in self._arrays.values():
            array.load(self._reader, view, rows, self._verify)
        self._reader.release()

    def take(self, positions: slice | NDArray[np.int64]) -> Arrays:
        """Copies of the loaded rows at these positions of `rows`, `[B, …]`."""
        return {name: array.take(positions) for name, array in self._arrays.items()}

    @property
    def num_bytes(self) -> int:
        """Memory that is held."""
        return sum(array.num_bytes for array in self._arrays.values())


class _PooledArray:
    """One array's part of a pool: chunks one after the other, then single rows; `_position [N]` says where each is."""

    def __init__(self, layout: ArrayLayout) -> None:
        self._layout = layout
        self._buffer: NDArray[Any] = np.empty((0, *layout.shape), layout.numpy_dtype)
        self._position = np.empty(0, np.int64)

    @property
    def num_bytes(self) -> int:
        return self._buffer.nbytes

    def take(self, positions: slice | NDArray[np.int64]) -> NDArray[Any]:
        return self._buffer.take(self._position[positions], axis=0)

    def load(self, reader: ShardReader, view: int, rows: NDArray[np.int64], verify: bool) -> None:
        layout = self._layout
        chunk_of = rows // layout.chunk_rows
        wanted = np.bincount(chunk_of)
        least = 1 if layout.chunk_bytes <= SMALL_CHUNK_BYTES else DENSE * layout.chunk_rows
        dense = np.flatnonzero(wanted >= least)
        base = np.full(len(wanted), -1, np.int64)
        base[dense] = np.arange(len(dense)) * layout.chunk_rows
        single = np.flatnonzero(base[chunk_of] < 0)
        in_chunks = len(dense) * layout.chunk_rows
        self._reserve(in_chunks + len(single))
        for chunk in dense.tolist():
            shard, inner = divmod(chunk, layout.num_chunks)
            file = reader.shard(layout, view, shard)
            start = int(base[chunk])
            file.read_chunk(inner, self._buffer[start : start + file.rows_of(inner)], verify=verify)
        self._position = base[chunk_of] + rows - chunk_of * layout.chunk_rows
        if len(single):
            self._position[single] = np.arange(in_chunks, in_chunks + len(single))
            self._buffer[in_chunks : in_chunks + len(single)] = reader.read([layout], view, rows[single])[layout.name]

    def _reserve(self, num_rows: int) -> None:
        if len(self._buffer) < num_rows:
            self._buffer = np.empty((num_rows, *self._layout.shape), self._layout.numpy_dtype)
