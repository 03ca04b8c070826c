"""The first rows of a split of a table, and all of its others: less to learn from than there is."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa

from kdpipe.data.sources import Table
from kdpipe.data.sources.base import named_column
from kdpipe.errors import ConfigError


class SomeRows(Table):
    """The table with the first `num_rows` rows of `split`, as the column `split_column` says."""

    def __init__(self, path: Path, num_rows: int, split: str = "train", split_column: str = "split") -> None:
        super().__init__(path)
        if num_rows < 1:
            raise ConfigError(f"data.source.num_rows: {num_rows}; expected at least 1")
        self._num_rows, self._split, self._split_column = num_rows, split, split_column

    def batches(self) -> Iterator[pa.RecordBatch]:
        """The rows that are kept, in order. Raises `ConfigError` where there is no such column or split."""
        left = self._num_rows
        for batch in super().batches():
            splits = named_column(batch, "split_column", self._split_column)
            limited = np.array(splits.to_pylist()) == self._split
            yield batch.filter(pa.array(~limited | (np.cumsum(limited) <= left)))
            left -= int(limited.sum())
        if left == self._num_rows:
            raise ConfigError(f"data.source.split: no row is of split {self._split!r} in {self._split_column!r}")
