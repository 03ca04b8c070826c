"""A store's targets by prepared row number: found by sample id, and only if they are about the same content."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from kdpipe.data.prepared import PreparedInputs
from kdpipe.errors import StaleStoreError
from kdpipe.order import Group
from kdpipe.store.stream import TargetPools
from kdpipe.store.target_store import TargetStore
from kdpipe.targets import Targets


class AlignedTargets:
    """Targets of `rows` (numbers in `inputs`) in `views`, whatever the order and growth of either side.

    Raises `IncompleteStoreError` when rows have no targets, `StaleStoreError` when their content differs.
    """

    def __init__(
        self,
        store: TargetStore,
        inputs: PreparedInputs,
        rows: NDArray[np.int64],
        views: Iterable[int] = (0,),
        outputs: Sequence[str] | None = None,
    ) -> None:
        """`outputs` are those that are read (None: all)."""
        self.store, self._outputs = store, outputs
        self._store_row = np.full(len(inputs), -1, np.int64)
        self._store_row[rows] = _rows_of(store, rows, inputs.sample_ids[rows])
        differing = (store.digests[self._store_row[rows]] != inputs.digests[rows]).any(axis=1)
        if differing.any():
            example = inputs.sample_ids[rows[int(np.flatnonzero(differing)[0])]]
            raise StaleStoreError(
                f"{store.path}: the content of {int(differing.sum())} rows, such as {example}, is not what the teacher "
                "saw. Run `kdpipe cache-teacher NAME`."
            )
        store.check_complete()
        for view in views:
            store.check_rows(self._store_row[rows], view)

    @property
    def row_bytes(self) -> int:
        """Bytes of a row as stored."""
        return self.store.row_bytes(self._outputs)

    def read(self, rows: NDArray[np.int64], view: int = 0) -> dict[str, Targets]:
        """Targets of each output for prepared row numbers `[B]`, in the given order."""
        return self.store.read(self._store_row[rows], view, self._outputs)

    def statistics(self, rows: NDArray[np.int64], view: int = 0) -> dict[str, NDArray[np.float32]]:
        """The teacher's class, confidence and entropy (nats) at T = 1 for prepared row numbers `[B]`."""
        return self.store.statistics(self._store_row[rows], view)

    def read_ahead(self, groups: Iterable[tuple[int, Group]]) -> Iterator[dict[str, Targets]]:
        """Targets of every batch of groups of (view, prepared row numbers), in their order."""
        mapped = ((view, self._mapped(group)) for view, group in groups)
        for _, said in TargetPools(self.store, self._outputs).batches(mapped):
            yield said

    def _mapped(self, group: Group) -> Group:
        batches = [self._store_row[rows] for rows in group.batches]
        return replace(group, batches=batches, tail=self._store_row[group.tail])


def _rows_of(store: TargetStore, rows: NDArray[np.int64], sample_ids: NDArray[np.str_]) -> NDArray[np.int64]:
    """The store's rows of samples `[N]`: the same as the prepared `rows` unless either side was reordered."""
    if len(rows) and rows.max() < store.num_rows and np.array_equal(store.sample_ids[rows], sample_ids):
        return rows  # nothing needs to be sorted
    return store.rows_of(sample_ids.tolist())
