"""Rows of a table with a long tail: of each class after the first, fewer are kept in the split that is learnt from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from kdpipe.data.sources import Table


class LongTail(Table):
    """The table with n r^(-c / (C - 1)) rows of class c in `split`, n as many as of the first class (Cui et al. 2019).

    r is `ratio`, between the first and the last of C classes. The first rows of each class are kept.
    """

    def __init__(self, path: Path, ratio: float, num_classes: int, split: str = "train", largest: int = 6000) -> None:
        super().__init__(path)
        self._kept = (largest * ratio ** (-np.arange(num_classes) / (num_classes - 1))).round().astype(int)
        self._split = split

    def batches(self) -> Iterator[pa.RecordBatch]:
        """The rows that are kept, in order."""
        seen: dict[int, int] = {}
        for batch in super().batches():
            yield batch.filter(
                pa.array([self._keeps(row, seen) for row in batch.select(["label", "split"]).to_pylist()])
            )

    def _keeps(self, row: Mapping[str, Any], seen: dict[int, int]) -> bool:
        if row["split"] != self._split:
            return True
        seen[row["label"]] = seen.get(row["label"], 0) + 1
        return seen[row["label"]] <= int(self._kept[row["label"]])
