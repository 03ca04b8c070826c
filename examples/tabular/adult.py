"""Adult's rows, numbered, as some are in the file twice; its training rows parted between teacher and student."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa

from kdpipe.data.sources import Table
from kdpipe.fingerprint import uniform_by_id


class Adult(Table):
    """The table with a column `row`; about half of the rows of `train`, drawn by `seed`, are of `transfer` instead."""

    def __init__(self, path: Path, seed: int = 0) -> None:
        super().__init__(path, number_as="row")
        self._seed = seed

    def batches(self) -> Iterator[pa.RecordBatch]:
        """The rows in order."""
        for batch in super().batches():
            rows, split = map(str, batch["row"].to_pylist()), np.array(batch["split"].to_pylist())
            is_moved = (split == "train") & (uniform_by_id(list(rows), self._seed, "transfer") < 0.5)
            place = batch.schema.get_field_index("split")
            yield batch.set_column(place, "split", pa.array(np.where(is_moved, "transfer", split)))
