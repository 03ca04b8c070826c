"""A table's rows into a store's shards, whatever the order of either side.

A shard is open from its first row to its last, and then committed. Open shards lie in memory while they are few (a
table in about the store's order), else in one nameless file beside the store, which vanishes with the process.

Shapes: M rows of the table, B rows of a batch.
"""

from __future__ import annotations

import math
import mmap
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kdpipe.distributed import Shard
from kdpipe.encodings import ArraySpec, TopK
from kdpipe.store.manifest import COVERED
from kdpipe.store.rows import grouped
from kdpipe.store.tables.importing import TableTargets
from kdpipe.store.target_store import TargetStore

MEMORY_BYTES = 256 * 2**20
_ALIGNED = 64
_NOT_WANTED = -1
_ONE_BY_ONE = 1
"""The batch size of records: no row of a table depends on others."""


def fill(
    store: TargetStore,
    said: TableTargets,
    rows: NDArray[np.int64],
    wanted: Sequence[tuple[int, Shard]],
    on_rows: Callable[[int], None] = lambda _: None,
    memory_bytes: int = MEMORY_BYTES,
    counted: Callable[[NDArray[np.int64]], NDArray[np.bool_]] | None = None,
) -> None:
    """Commit the `wanted` (view, shard) of a store; line i of the table is row `rows[i]` of its view (-1: unused).

    Rows that the table lacks are not covered. Raises `DataError` for numbers that mean nothing; what was committed
    stays. `on_rows` is told how many rows were encoded so far. `counted` says of the store's rows `[B]` which of their
    tokens count, bool `[B, T]`; others are not covered.
    """
    numbers = _numbers(store, said.index[1], rows, wanted)
    desk = _Desk(store, wanted, numbers, memory_bytes)
    start = done = 0
    for num_rows, arrays in said.encoded(store.encodings, numbers != _NOT_WANTED):
        here = slice(start, start + num_rows)
        start += num_rows
        if arrays:
            number, row = numbers[here], rows[here]
            number, row = number[number != _NOT_WANTED], row[number != _NOT_WANTED]
            if counted is not None:
                arrays[COVERED] = arrays[COVERED] & counted(row)
                arrays["statistics"][~arrays[COVERED]] = 0
            desk.put(number, row, arrays)
            done += len(arrays["statistics"])
            on_rows(done)
    desk.finish()


def _numbers(
    store: TargetStore, views: NDArray[np.int64], rows: NDArray[np.int64], wanted: Sequence[tuple[int, Shard]]
) -> NDArray[np.int64]:
    """Which of the `wanted` each line belongs to `[M]`; -1: to none."""
    number_of = np.full((store.num_views, len(store.shards)), _NOT_WANTED)
    for number, (view, shard) in enumerate(wanted):
        number_of[view, shard.index] = number
    is_here = (rows >= 0) & (views < store.num_views)
    result = np.full(len(rows), _NOT_WANTED)
    result[is_here] = number_of[views[is_here], rows[is_here] // store.manifest.shard_rows]
    return result


class _Desk:
    """Shards in work."""

    def __init__(
        self, store: TargetStore, wanted: Sequence[tuple[int, Shard]], numbers: NDArray[np.int64], memory_bytes: int
    ) -> None:
        self._store, self._wanted = store, wanted
        numbers = numbers[numbers != _NOT_WANTED]
        self._owed = np.bincount(numbers, minlength=len(wanted))
        self._silent = np.flatnonzero(self._owed == 0).tolist()
        self._blank = _blank_row(store) if store.manifest.coverage else {}
        self._open: dict[int, dict[str, NDArray[Any]]] = {}
        self._places, self._shard_bytes = _places(store)
        in_memory = _most_open(numbers) * self._shard_bytes <= memory_bytes
        self._scratch = None if in_memory else _scratch(store.path, len(wanted) * self._shard_bytes)

    def put(self, numbers: NDArray[np.int64], rows: NDArray[np.int64], arrays: Mapping[str, NDArray[Any]]) -> None:
        """Lay rows `[B]` of arrays into their shards; commit those that are complete."""
        for number, here in grouped(numbers):
            for name, values in self._opened(number).items():
                values[rows[here] - self._wanted[number][1].start] = arrays[name][here]
            self._owed[number] -= len(here)
            if not self._owed[number]:
                self._commit(number)

    def finish(self) -> None:
        """Commit the shards about which the table says nothing."""
        for number in self._silent:
            self._opened(number)
            self._commit(number)

    def _opened(self, number: int) -> dict[str, NDArray[Any]]:
        if number not in self._open:
            content = bytearray(self._shard_bytes) if self._scratch is None else self._scratch
            start = 0 if self._scratch is None else number * self._shard_bytes
            self._open[number] = {
                name: np.frombuffer(content, spec.dtype, math.prod(shape), start + offset).reshape(shape)
                for name, (spec, shape, offset) in self._places.items()
            }
            for name, blank in self._blank.items():
                self._open[number][name][:] = blank
        return self._open[number]

    def _commit(self, number: int) -> None:
        view, shard = self._wanted[number]
        arrays = {name: values[: shard.num_rows] for name, values in self._open.pop(number).items()}
        self._store.write(view, shard, arrays, _ONE_BY_ONE)


def _places(store: TargetStore) -> tuple[dict[str, tuple[ArraySpec, tuple[int, ...], int]], int]:
    """Where the arrays of an open shard lie: spec, shape, offset in bytes; and the bytes of all."""
    places, end = {}, 0
    for name, spec in store.manifest.arrays().items():
        shape = (store.manifest.shard_rows, *spec.shape)
        places[name] = (spec, shape, end)
        end += -(-spec.row_bytes * store.manifest.shard_rows // _ALIGNED) * _ALIGNED
    return places, end


def _blank_row(store: TargetStore) -> dict[str, NDArray[Any]]:
    """Arrays `[1, ...]` of a row about which the teacher said nothing; of logits one token stands for all."""
    arrays: dict[str, NDArray[Any]] = {}
    for name, output in store.outputs.items():
        encoding, shape = store.encodings[name], output.shape
        if output.kind == "logits":
            shape = (*(1 for _ in shape[:-1]), shape[-1])
        if isinstance(encoding, TopK):
            encoded = encoding.encode_alike(shape)
        else:
            encoded = encoding.encode(torch.zeros(1, *shape), np.zeros(1, np.uint64))
        arrays |= {name + suffix: values for suffix, values in encoded.items()}
    others = store.manifest.arrays().items()
    return {name: arrays.get(name, np.zeros((1, *spec.shape), spec.dtype)) for name, spec in others}


def _most_open(numbers: NDArray[np.int64]) -> int:
    """How many shards are open at once, at most; `numbers [M]` says which shard each line belongs to."""
    _, first = np.unique(numbers, return_index=True)
    _, last = np.unique(numbers[::-1], return_index=True)
    opened, closed = np.sort(first), np.sort(len(numbers) - 1 - last)
    now_open = np.arange(1, len(opened) + 1) - np.searchsorted(closed, opened)
    return int(now_open.max(initial=0))


def _scratch(folder: Path, num_bytes: int) -> mmap.mmap:
    """Bytes in a file without a name. Raises `OSError` when the disk has no room for them."""
    with tempfile.TemporaryFile(dir=folder) as file:
        reserve = getattr(os, "posix_fallocate", lambda descriptor, _, size: os.ftruncate(descriptor, size))
        reserve(file.fileno(), 0, num_bytes)  # a mapped file that finds no room later would kill the process
        return mmap.mmap(file.fileno(), num_bytes)
