"""Tabular classification: rows are numeric columns."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from torch import Tensor

from kdpipe.data.columns import Columns
from kdpipe.data.preparing import NameOf, column_of
from kdpipe.errors import DataError
from kdpipe.preprocess import Preprocess, Standardize
from kdpipe.tasks.base import check_class_names, class_labels, cross_entropy


class TabularClassification:
    """One label per row of the numeric `columns`; each must be finite in every row."""

    def __init__(self, num_classes: int, columns: Sequence[str], class_names: Sequence[str] | None = None) -> None:
        check_class_names(num_classes, class_names)
        if not columns:
            raise DataError("task.columns is empty; expected the names of the numeric columns")
        self.num_classes = num_classes
        self.class_names = class_names
        self._columns = columns

    def to_inputs(self, batch: pa.RecordBatch, name_of: NameOf) -> Columns:
        """Column `features`: float32 `[B, D]`, in the order of `columns`. Raises `DataError` naming bad rows."""
        return {"features": np.stack([self._numbers(batch, name, name_of) for name in self._columns], axis=1)}

    def to_labels(self, values: pa.Array, name_of: NameOf) -> NDArray[np.int64]:
        """Class ids `[B]`, -1 where there is none."""
        return class_labels(values, self.num_classes, self.class_names, name_of)

    def default_preprocess(self) -> Preprocess:
        """Columns standardised with the training rows' mean and standard deviation."""
        return Standardize()

    def label_loss(self, logits: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
        """Cross-entropy, one value per row `[B]`."""
        return cross_entropy(logits, labels, smoothing)

    @staticmethod
    def _numbers(batch: pa.RecordBatch, name: str, name_of: NameOf) -> NDArray[np.float32]:
        values = column_of(batch, name)
        kind = values.type
        if not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)):
            raise DataError(f"column {name!r} has type {kind}; expected numbers. Leave it out of task.columns.")
        try:
            wide = values.cast(pa.float64()).to_numpy(zero_copy_only=False)
        except pa.ArrowInvalid as error:
            raise DataError(f"column {name!r} has numbers too large for a feature: {error}") from None
        with np.errstate(over="ignore"):  # infinite then, and refused below
            numbers: NDArray[np.float32] = wide.astype(np.float32)
        wrong = np.flatnonzero(~np.isfinite(numbers))
        if len(wrong):
            raise DataError(
                f"column {name!r} has no finite number in {name_of(int(wrong[0]))} ({len(wrong)} such rows in this "
                "block). Fill or remove them first."
            )
        return numbers
