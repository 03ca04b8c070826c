"""Rows of a table with a long tail: of each class after the first, fewer are kept in the split that is learnt from."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from kdpipe.data.sources import Table
from kdpipe.data.sources.base import named_column
from kdpipe.errors import ConfigError, DataError


class LongTail(Table):
    """The table with n r^(-c / (C - 1)) rows of class c in `split`, and at least one (Cui et al. 2019).

    r is `ratio`, between the first and the last of C classes; n is `largest`, by default the most for which every class
    has rows enough. The first rows of each class are kept. `label_column` says of which class a row is, 0 to C - 1, and
    `split_column` of which split.
    """

    def __init__(
        self,
        path: Path,
        ratio: float,
        num_classes: int,
        split: str = "train",
        largest: int | None = None,
        label_column: str = "label",
        split_column: str = "split",
    ) -> None:
        super().__init__(path)
        if ratio < 1 or num_classes < 2:
            raise ConfigError(
                f"data.source: ratio {ratio} of {num_classes} classes; expected at least 1, of at least 2"
            )
        self._shares = ratio ** (-np.arange(num_classes) / (num_classes - 1))
        self._split, self._largest = split, largest
        self._label_column, self._split_column = label_column, split_column

    def batches(self) -> Iterator[pa.RecordBatch]:
        """The rows that are kept, in order.

        Raises `ConfigError` where there is no such column or split, `DataError` for labels that are no class, and for a
        class that has too few rows.
        """
        kept = self._kept()
        seen = np.zeros_like(kept)
        for batch in super().batches():
            classes = self._classes(batch)
            keeps = classes < 0
            for c in range(len(kept)):
                of = np.flatnonzero(classes == c)
                keeps[of[: max(kept[c] - seen[c], 0)]] = True
                seen[c] += len(of)
            yield batch.filter(pa.array(keeps))

    def _kept(self) -> NDArray[np.int64]:
        """Rows to keep of each class `[C]`."""
        there = np.zeros(len(self._shares), np.int64)
        for batch in super().batches():
            classes = self._classes(batch)
            there += np.bincount(classes[classes >= 0], minlength=len(there))
        if not there.any():
            raise ConfigError(f"data.source.split: no row is of split {self._split!r} in {self._split_column!r}")
        largest = np.floor((there / self._shares).min()) if self._largest is None else self._largest
        kept = (largest * self._shares).round().astype(np.int64).clip(min=1)
        lacking = np.flatnonzero(there < kept)
        if len(lacking):
            c = lacking[0]
            raise DataError(
                f"{there[c]} rows of {self._split!r} are of class {c}, and {kept[c]} are to be kept. Give a smaller "
                "data.source.largest, or leave it out; every class needs a row"
            )
        return kept

    def _classes(self, batch: pa.RecordBatch) -> NDArray[np.int64]:
        """Of each row `[B]`; -1 in other splits."""
        labels = named_column(batch, "label_column", self._label_column).to_pylist()
        splits = named_column(batch, "split_column", self._split_column).to_pylist()
        rows = zip(labels, splits, strict=True)
        return np.array([self._class(label) if split == self._split else -1 for label, split in rows], np.int64)

    def _class(self, label: Any) -> int:
        if type(label) is not int or not 0 <= label < len(self._shares):
            raise DataError(
                f"column {self._label_column!r} has {label!r} in a row of {self._split!r}; LongTail needs whole "
                f"numbers there, from 0 to {len(self._shares) - 1} (data.source.num_classes is {len(self._shares)}). "
                "Number the classes."
            )
        return label
