"""The wanted rows of missing shards, cut into the batches that a teacher is shown.

Shapes: B rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from kdpipe.data.prepared import PreparedInputs
from kdpipe.distributed import Shard
from kdpipe.errors import ConfigError
from kdpipe.order import batches_within
from kdpipe.store import TargetStore
from kdpipe.teachers.asking import lengths_of
from kdpipe.teachers.base import Teacher
from kdpipe.views import ViewSpec


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Rows of one shard for one view, `at_once` at a time; none at all where a view wants none of the shard."""

    view: int
    shard: Shard
    rows: NDArray[np.int64]
    at_once: int
    is_first: bool
    is_last: bool

    @property
    def place(self) -> NDArray[np.int64]:
        """Where its rows lie in the shard."""
        return self.rows - self.shard.start

    def is_beside(self, other: Batch) -> bool:
        """Whether both are of the same shard and view."""
        return (self.view, self.shard.index) == (other.view, other.shard.index)

    @staticmethod
    def joined(batches: Sequence[Batch]) -> Batch:
        """Batches that follow each other in one shard, as one."""
        rows, at_once = np.concatenate([each.rows for each in batches]), min(each.at_once for each in batches)
        return replace(batches[0], rows=rows, at_once=at_once, is_last=batches[-1].is_last)


class Cut:
    """How the wanted rows of a shard are cut into batches."""

    def __init__(
        self, teacher: Teacher, inputs: PreparedInputs, views: ViewSpec, batch_size: int, batch_tokens: int | None
    ) -> None:
        self._teacher, self._inputs, self._views = teacher, inputs, views
        self.batch_size, self._batch_tokens = batch_size, batch_tokens

    def __call__(self, view: int, rows: NDArray[np.int64]) -> list[NDArray[np.int64]]:
        """Batches of row numbers; one of none where there are none."""
        if self._batch_tokens is None or not len(rows):
            return [rows[start : start + self.batch_size] for start in range(0, max(1, len(rows)), self.batch_size)]
        shown = self._views.read(self._inputs.read, self._inputs.sample_ids, rows, view)
        lengths = lengths_of(self._teacher, shown.columns)
        if lengths is None:
            raise ConfigError("batch_tokens: this teacher cannot tell how many tokens a row is; leave batch_tokens out")
        return [rows[places] for places in batches_within(lengths, self.batch_size, self._batch_tokens)]


def batches_of(store: TargetStore, missing: Sequence[tuple[int, Shard]], cut: Cut) -> Iterator[Batch]:
    for view, shard in missing:
        parts = cut(view, shard.start + np.flatnonzero(store.wanted(view, shard)))
        for number, rows in enumerate(parts):
            yield Batch(
                view=view,
                shard=shard,
                rows=rows,
                at_once=cut.batch_size,
                is_first=number == 0,
                is_last=number == len(parts) - 1,
            )
