"""Rows of a table with a long tail: of each class after the first, fewer are kept in the split that is learnt from."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from kdpipe.data.sources import Table
from kdpipe.data.sources.base import named_column
from kdpipe.errors import ConfigError, DataError


class LongTail(Table):
    """The table with n r^(-c / (C - 1)) rows of class c in `split`, n as many as of the first class (Cui et al. 2019).

    r is `ratio`, between the first and the last of C classes. The first rows of each class are kept. `label_column`
    says of which class a row is, 0 to C - 1, and `split_column` of which split.
    """

    def __init__(
        self,
        path: Path,
        ratio: float,
        num_classes: int,
        split: str = "train",
        largest: int = 6000,
        label_column: str = "label",
        split_column: str = "split",
    ) -> None:
        super().__init__(path)
        self._kept = (largest * ratio ** (-np.arange(num_classes) / (num_classes - 1))).round().astype(int)
        self._split, self._label_column, self._split_column = split, label_column, split_column

    def batches(self) -> Iterator[pa.RecordBatch]:
        """The rows that are kept, in order.

        Raises `ConfigError` where there is no such column or split, `DataError` for labels that are no class.
        """
        seen: dict[int, int] = {}
        for batch in super().batches():
            labels = named_column(batch, "label_column", self._label_column).to_pylist()
            splits = named_column(batch, "split_column", self._split_column).to_pylist()
            rows = zip(labels, splits, strict=True)
            yield batch.filter(pa.array([split != self._split or self._keeps(label, seen) for label, split in rows]))
        if not seen:
            raise ConfigError(f"data.source.split: no row is of split {self._split!r} in {self._split_column!r}")

    def _keeps(self, label: Any, seen: dict[int, int]) -> bool:
        if type(label) is not int or not 0 <= label < len(self._kept):
            raise DataError(
                f"column {self._label_column!r} has {label!r} in a row of {self._split!r}; LongTail needs whole "
                f"numbers there, from 0 to {len(self._kept) - 1} (data.source.num_classes is {len(self._kept)}). "
                "Number the classes."
            )
        seen[label] = seen.get(label, 0) + 1
        return seen[label] <= int(self._kept[label])
