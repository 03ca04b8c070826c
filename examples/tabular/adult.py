"""Adult's rows, numbered, as some are in the file twice; its training rows parted between teacher and student."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa

from kdpipe.data.sources import Table
from kdpipe.data.sources.base import named_column
from kdpipe.fingerprint import uniform_by_id


class Adult(Table):
    """The table with a column `row`; about half of the rows of `train`, drawn by `seed`, are of `transfer` instead.

    `split_column` says of which split a row is.
    """

    def __init__(self, path: Path, seed: int = 0, split_column: str = "split") -> None:
        super().__init__(path, number_as="row")
        self._seed, self._split_column = seed, split_column

    def batches(self) -> Iterator[pa.RecordBatch]:
        """The rows in order. Raises `ConfigError` where there is no such column."""
        for batch in super().batches():
            rows = map(str, batch["row"].to_pylist())
            split = np.array(named_column(batch, "split_column", self._split_column).to_pylist())
            is_moved = (split == "train") & (uniform_by_id(list(rows), self._seed, "transfer") < 0.5)
            place = batch.schema.get_field_index(self._split_column)
            yield batch.set_column(place, self._split_column, pa.array(np.where(is_moved, "transfer", split)))
