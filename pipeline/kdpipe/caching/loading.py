"""Prepared rows, read and checked ahead of the teacher.

Shapes: B rows.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Executor, Future
from functools import partial
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from kdpipe.caching.batches import Batch
from kdpipe.data.columns import Columns, Ragged
from kdpipe.data.prepared import ANEW, PreparedInputs
from kdpipe.data.segments import content_digests
from kdpipe.errors import DataError
from kdpipe.views import ViewSpec, taken

LOAD_AHEAD = 2
"""Blocks of batches that are read before the teacher wants them."""
LOAD_BYTES = 2**18
"""A block: as many batches of one shard as have so many bytes, or one. To wake a thread for less costs more."""


class Loader:
    """Reads batches; its thread reads the next ones while the caller works."""

    def __init__(self, inputs: PreparedInputs, views: ViewSpec, thread: Executor) -> None:
        self._inputs, self._views, self._thread = inputs, views, thread
        self._batches_per_block = 1

    def read(self, batches: Iterable[Batch]) -> Iterator[tuple[Batch, Columns]]:
        """Batches with their rows, in order."""
        loading: deque[Future[list[tuple[Batch, Columns]]]] = deque()
        for block in self._blocks(batches):
            loading.append(self._thread.submit(self._load, block))
            if len(loading) > LOAD_AHEAD:
                yield from loading.popleft().result()
        while loading:
            yield from loading.popleft().result()

    def _blocks(self, batches: Iterable[Batch]) -> Iterator[list[Batch]]:
        block: list[Batch] = []
        for batch in batches:
            block.append(batch)
            if batch.is_last or len(block) >= self._batches_per_block:
                yield block
                block = []

    def _load(self, block: list[Batch]) -> list[tuple[Batch, Columns]]:
        whole = Batch.joined(block)
        if not len(whole.rows):
            return [(batch, {}) for batch in block]
        columns = self._shown(whole)
        num_bytes = sum((each.values if isinstance(each, Ragged) else each).nbytes for each in columns.values())
        self._batches_per_block = max(1, LOAD_BYTES * len(block) // max(1, num_bytes))
        starts = np.cumsum([0, *(len(batch.rows) for batch in block)]).tolist()
        places = [np.arange(start, stop) for start, stop in pairwise(starts)]
        return [(batch, taken(columns, place)) for batch, place in zip(block, places, strict=True)]

    def _shown(self, batch: Batch) -> Columns:
        read = partial(read_intact, self._inputs)
        if batch.view == 0:  # nothing is drawn, so ids are not read
            return read(batch.rows)
        return self._views.read(read, self._inputs.sample_ids, batch.rows, batch.view).columns


def read_intact(inputs: PreparedInputs, rows: NDArray[np.int64]) -> Columns:
    """Prepared rows as they were when their digests were taken: targets are committed under those digests.

    Raises `DataError` naming a row whose content is another one.
    """
    columns = inputs.read(rows)
    found = np.frombuffer(b"".join(content_digests(columns)), np.uint8).reshape(len(rows), -1)
    wrong = np.flatnonzero((found != inputs.digests[rows]).any(axis=1))
    if len(wrong):
        raise DataError(
            f"the prepared content of {inputs.sample_ids[rows[int(wrong[0])]]} differs from its digest "
            f"({len(wrong)} such rows in a batch). {ANEW}"
        )
    return columns
