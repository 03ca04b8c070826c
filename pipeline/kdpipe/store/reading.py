"""Rows of arrays out of shard files: any rows through memory maps, pools of rows in whole chunks.

Shapes: B batch, N rows of a pool.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdpipe.store.layout import CRC_BYTES, ArrayLayout
from kdpipe.store.rows import grouped
from kdpipe.store.scattering import Scattered
from kdpipe.store.shard_file import ShardFile

MAX_OPEN_SHARDS = 1024
"""Files whose index and verified chunks are remembered."""
MAX_MAPPED = 256
"""Files, of all stores, that this process has mapped at a time; each counts among its open files."""
DENSE = 1 / 8
"""A chunk of which at least this share is wanted is read whole; of others the wanted rows are read."""
WIDE_ROW_BYTES = 512
"""A row from which on copying it costs more than counting where it goes."""
PLACED_AT_ONCE = 2**19
"""Rows whose places are known at a time: some 100 bytes for each."""
CACHE_LINE_BYTES = 64
_UNSHARED = 2
"""References of an array that only a local variable and `getrefcount` know."""

Arrays = dict[str, NDArray[Any]]

_mapped: OrderedDict[weakref.ref[ShardFile], None] = OrderedDict()


class ShardReader:
    """Committed shards, opened on demand by `open_shard(layout, view, shard)`."""

    def __init__(self, open_shard: Callable[[ArrayLayout, int, int], ShardFile]) -> None:
        self._open_shard = open_shard
        self._open: OrderedDict[tuple[str, int, int], ShardFile] = OrderedDict()
        self._lock = threading.Lock()  # a store is read by the threads of its streams, and by its owner's

    def shard(self, layout: ArrayLayout, view: int, shard: int) -> ShardFile:
        """An open shard. Raises `IncompleteStoreError`, `CorruptStoreError`."""
        key = (layout.name, view, shard)
        with self._lock:
            if key in self._open:
                self._open.move_to_end(key)
                return self._open[key]
        file = self._open_shard(layout, view, shard)
        with self._lock:
            self._open[key] = file
            if len(self._open) > MAX_OPEN_SHARDS:
                self._open.popitem(last=False)
        return file

    def forget(self, view: int, shard: int) -> None:
        """Close a shard whose files are replaced."""
        with self._lock:
            for key in [key for key in self._open if key[1:] == (view, shard)]:
                del self._open[key]

    def read(self, layouts: Iterable[ArrayLayout], view: int, rows: NDArray[np.int64]) -> Arrays:
        """Rows `[B, …]` of arrays of one store, in the given order."""
        layouts = list(layouts)
        result: Arrays = {each.name: np.empty((len(rows), *each.shape), each.numpy_dtype) for each in layouts}
        shard_of, position = np.divmod(rows, layouts[0].shard_rows)
        for shard, here in grouped(shard_of):
            for layout in layouts:
                result[layout.name][here] = _rows_of(self.shard(layout, view, shard), position[here])
        return result


def _rows_of(file: ShardFile, rows: NDArray[np.int64]) -> NDArray[Any]:
    """Rows by their position in an open shard, `[N, …]`; files that were mapped for long make room."""
    this = weakref.ref(file, lambda gone: _mapped.pop(gone, None))
    _mapped.pop(this, None)
    _mapped[this] = None
    while len(_mapped) > MAX_MAPPED:
        oldest = _mapped.popitem(last=False)[0]()
        if oldest is not None:
            oldest.unmap()
    taken = file.read(rows)
    if this not in _mapped:  # another thread made room before this one mapped it
        file.unmap()
    return taken


class RowPool:
    """Rows that are read together, each chunk once and each row straight to its place, and served as views.

    A buffer is filled again by the next `load` unless somebody still holds a view of it.
    """

    def __init__(self, reader: ShardReader, layouts: Sequence[ArrayLayout], *, verify_always: bool = False) -> None:
        self._reader, self._layouts, self._verify = reader, layouts, verify_always
        self._buffers: Arrays = {each.name: np.empty((0, *each.shape), each.numpy_dtype) for each in layouts}
        self._scratch = np.empty(0, np.uint8)
        self._num_rows = 0

    def load(self, view: int, rows: NDArray[np.int64], carried: Arrays | None = None) -> None:
        """Read rows `[N]` of every array; the first of them are `carried`, which another pool had read."""
        self._num_rows = len(rows)
        for layout in self._layouts:
            buffer = self._buffer_for(layout)
            first = 0
            if carried:
                first = len(carried[layout.name])
                buffer[:first] = carried[layout.name]
            for start in range(first, len(rows), PLACED_AT_ONCE):
                self._fill(buffer, layout, view, rows[start : start + PLACED_AT_ONCE], start)

    def view(self, positions: slice) -> Arrays:
        """The loaded rows at these positions of `rows`, `[B, …]`, not copied."""
        return {name: buffer[positions] for name, buffer in self._buffers.items()}

    def take(self, positions: NDArray[np.int64]) -> Arrays:
        """Copies of the loaded rows at these positions of `rows`, `[B, …]`."""
        return {name: buffer.take(positions, axis=0) for name, buffer in self._buffers.items()}

    def tail(self, num_rows: int) -> Arrays:
        """Copies of the last loaded rows."""
        stop = self._num_rows
        return {name: buffer[stop - num_rows : stop].copy() for name, buffer in self._buffers.items()}

    def _fill(self, buffer: NDArray[Any], layout: ArrayLayout, view: int, rows: NDArray[np.int64], first: int) -> None:
        """`rows` to the places of `buffer` from `first` on."""
        chunk_of = rows // layout.chunk_rows
        position = rows - chunk_of * layout.chunk_rows
        whole: list[tuple[ShardFile, int, NDArray[np.intp]]] = []
        for chunk, here in grouped(chunk_of):
            shard, inner = divmod(chunk, layout.num_chunks)
            file = self._reader.shard(layout, view, shard)
            if len(here) < DENSE * file.rows_of(inner) and not self._verify:
                buffer[here + first] = _rows_of(file, inner * layout.chunk_rows + position[here])
                file.release()  # pages of a chunk count as this process's memory
            elif layout.row_bytes < WIDE_ROW_BYTES:
                content = file.read_chunk(inner, self._scratch_for(layout), self._verify)
                buffer[here + first] = content[position[here]]
            else:
                whole.append((file, inner, here))
        at_once = max(1, PLACED_AT_ONCE // layout.chunk_rows)
        for start in range(0, len(whole), at_once):
            self._place(buffer[: self._num_rows + 1], layout, position, first, whole[start : start + at_once])

    def _place(
        self,
        buffer: NDArray[Any],
        layout: ArrayLayout,
        position: NDArray[np.int64],
        first: int,
        chunks: Sequence[tuple[ShardFile, int, NDArray[np.intp]]],
    ) -> None:
        """Whole chunks, each row straight to its place in `buffer`, whose last row takes what is not wanted."""
        unwanted = len(buffer) - 1
        place = np.full((len(chunks), layout.chunk_rows), unwanted)
        for number, (_, _, here) in enumerate(chunks):
            place[number, position[here]] = here + first
        scattered = Scattered(buffer, place.reshape(-1))
        for number, (file, inner, _) in enumerate(chunks):
            copied = layout.compressed or self._verify
            if copied or not file.scatter_chunk(inner, scattered, number * layout.chunk_rows):
                content = file.read_chunk(inner, self._scratch_for(layout), self._verify)
                buffer[place[number, : len(content)]] = content
        if np.count_nonzero(place != unwanted) == sum(len(here) for _, _, here in chunks):
            return
        for number, (_, _, here) in enumerate(chunks):  # some rows are asked for more than once
            once = place[number, position[here]]
            again = once != here + first
            buffer[here[again] + first] = buffer[once[again]]

    def _buffer_for(self, layout: ArrayLayout) -> NDArray[Any]:
        buffer = self._buffers.pop(layout.name)
        if len(buffer) <= self._num_rows or sys.getrefcount(buffer) > _UNSHARED:
            buffer = np.empty((self._num_rows + 1, *layout.shape), layout.numpy_dtype)
        self._buffers[layout.name] = buffer
        return buffer

    def _scratch_for(self, layout: ArrayLayout) -> NDArray[np.uint8]:
        if len(self._scratch) < layout.chunk_bytes + CRC_BYTES:
            self._scratch = _aligned(layout.chunk_bytes + CRC_BYTES)
        return self._scratch


def _aligned(num_bytes: int) -> NDArray[np.uint8]:
    """Memory that begins with a cache line: a kernel may take twice the time to copy a chunk to any other address."""
    memory = np.empty(num_bytes + CACHE_LINE_BYTES, np.uint8)
    return memory[-memory.ctypes.data % CACHE_LINE_BYTES :][:num_bytes]
