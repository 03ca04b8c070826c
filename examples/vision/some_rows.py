"""The first rows of a split of a table, and all of its others: less to learn from than there is."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa

from kdpipe.data.sources import Table


class SomeRows(Table):
    """The table with the first `num_rows` rows of `split`."""

    def __init__(self, path: Path, num_rows: int, split: str = "train") -> None:
        super().__init__(path)
        self._num_rows, self._split = num_rows, split

    def batches(self) -> Iterator[pa.RecordBatch]:
        """The rows that are kept, in order."""
        left = self._num_rows
        for batch in super().batches():
            limited = np.array(batch["split"].to_pylist()) == self._split
            yield batch.filter(pa.array(~limited | (np.cumsum(limited) <= left)))
            left -= int(limited.sum())
