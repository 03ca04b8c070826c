"""Tabular classification: rows are numeric and categorical columns."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from torch import Tensor

from kdpipe.data.columns import Array, Columns, Ragged, ragged_bytes
from kdpipe.data.preparing import NameOf, column_of
from kdpipe.errors import DataError
from kdpipe.losses import cross_entropy
from kdpipe.preprocess import Preprocess, Standardize
from kdpipe.preprocess.columns import FEATURES, ColumnEncoder, category_column, values_by_name
from kdpipe.tasks.base import check_class_names, class_labels


class TabularClassification:
    """One label per row of the numeric `columns` and the `categorical` ones: text, whole numbers, true and false.

    With `missing: allow` a value may be missing: null, a number NaN, a category an empty text; otherwise such rows are
    refused. Infinite numbers always are.
    """

    def __init__(
        self,
        num_classes: int,
        columns: Sequence[str] = (),
        categorical: Sequence[str] = (),
        missing: Literal["refuse", "allow"] = "refuse",
        class_names: Sequence[str] | None = None,
    ) -> None:
        check_class_names(num_classes, class_names)
        names = [*columns, *categorical]
        if not names:
            raise DataError("task.columns is empty; expected the names of the numeric columns, or task.categorical")
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise DataError(f"task.columns and task.categorical name {twice[0]!r} {names.count(twice[0])} times")
        self.num_classes = num_classes
        self.class_names = class_names
        self._columns, self._categorical, self._missing = columns, categorical, missing

    @property
    def offers(self) -> Mapping[str, Any]:
        """`columns`: the names of the numeric ones, in order."""
        return {"columns": self._columns}

    def to_inputs(self, batch: pa.RecordBatch, name_of: NameOf) -> Columns:
        """`features`, float32 `[B, D]` in the order of `columns` (NaN: missing), and `Ragged` UTF-8 per category.

        A category's column is `category.NAME`; an empty text is a missing one. Raises `DataError` naming bad rows.
        """
        numbers = [self._numbers(batch, name, name_of) for name in self._columns]
        categories = {category_column(name): self._texts(batch, name, name_of) for name in self._categorical}
        return {FEATURES: np.stack(numbers, axis=1), **categories} if numbers else categories

    def to_labels(self, values: pa.Array, name_of: NameOf) -> NDArray[np.int64]:
        """Class ids `[B]`, -1 where there is none."""
        return class_labels(values, self.num_classes, self.class_names, name_of)

    def default_preprocess(self) -> Preprocess:
        """Numbers standardised; a `ColumnEncoder` where there are categories or missing numbers."""
        if self._categorical or self._missing == "allow":
            return ColumnEncoder(self._columns)
        return Standardize()

    def label_loss(self, logits: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
        """Cross-entropy, one value per row `[B]`."""
        return cross_entropy(logits, labels, smoothing)

    def column_values(self, columns: Columns) -> dict[str, Array]:
        """Prepared rows by column name, `[B]` each: numbers (NaN: missing), or objects of str (None: missing)."""
        return values_by_name(columns, self._columns)

    def _numbers(self, batch: pa.RecordBatch, name: str, name_of: NameOf) -> NDArray[np.float32]:
        values = column_of(batch, name)
        kind = values.type
        is_empty = pa.types.is_null(kind) and self._missing == "allow"
        is_number = pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind)
        if not (is_number or pa.types.is_boolean(kind) or is_empty):
            first = next((str(each) for each in values.to_pylist() if each is not None), "")
            advice = "Leave it out of task.columns. A category belongs in task.categorical."
            if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
                advice = "Of lists and matrices, make a column per number, and name those in task.columns."
            elif re.fullmatch(r"[+-]?\d*,\d+", first):
                advice = f'Of a decimal comma, as in {first}, data.source.decimal_point: "," makes numbers.'
            raise DataError(f"column {name!r} has type {kind}; expected numbers. {advice}")
        try:
            wide = values.cast(pa.float64()).to_numpy(zero_copy_only=False)
        except pa.ArrowInvalid as error:
            raise DataError(
                f"column {name!r} has numbers too large for a feature: {error}. Where they are names and no amounts, "
                "name the column in task.categorical"
            ) from None
        with np.errstate(over="ignore"):  # infinite then, and refused below
            numbers: NDArray[np.float32] = wide.astype(np.float32)
        missing = np.isnan(numbers)
        if self._missing == "allow":
            numbers[missing] = np.nan  # one and the same, so that rows of the same content have the same digest
            _refuse(
                np.isinf(numbers), f"column {name!r} has an infinite number", "Change or remove them first.", name_of
            )
        else:
            _refuse(~np.isfinite(numbers), f"column {name!r} has no finite number", _HOW_TO_ALLOW, name_of)
        return numbers

    def _texts(self, batch: pa.RecordBatch, name: str, name_of: NameOf) -> Ragged:
        values = column_of(batch, name)
        if pa.types.is_dictionary(values.type):
            values = values.dictionary_decode()
        if pa.types.is_floating(values.type) or pa.types.is_decimal(values.type):
            values = _whole(values, name, name_of)
        kind = values.type
        is_text = pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
        if not (is_text or pa.types.is_integer(kind) or pa.types.is_boolean(kind) or pa.types.is_null(kind)):
            raise DataError(
                f"column {name!r} has type {kind}; expected categories: text, whole numbers, or true and false"
            )
        try:
            values.validate(full=True)
        except pa.ArrowInvalid as error:
            raise DataError(f"column {name!r} holds text that is not UTF-8: {error}") from None
        texts = pc.fill_null(values.cast(pa.large_string()), "")
        if self._missing == "refuse":
            empty = pc.equal(texts, "").to_numpy(zero_copy_only=False)
            _refuse(empty, f"column {name!r} has no category", _HOW_TO_ALLOW, name_of)
        return ragged_bytes(texts)


_EXACT = 2.0**53
"""From here on a float64 is not every whole number."""
_ALL_DIGITS = pa.decimal256(76, 0)


def _whole(values: pa.Array, name: str, name_of: NameOf) -> pa.Array:
    """Categories that are floats (as whole numbers with gaps become) or decimals, as whole numbers or their text.

    Raises `DataError`.
    """
    is_float = pa.types.is_floating(values.type)
    if is_float:
        values = values.cast(pa.float64())
        values = pc.if_else(pc.is_nan(values), pa.scalar(None, values.type), values)
    broken = pc.not_equal(values, pc.floor(values))
    if is_float:
        broken = pc.or_(broken, pc.greater_equal(pc.abs(values), _EXACT))
    _refuse(
        pc.fill_null(broken, False).to_numpy(zero_copy_only=False),
        f"column {name!r} is among task.categorical and has a number that is not whole",
        "Numbers belong in task.columns; whole floats from 2^53 on are not exact, write them as text.",
        name_of,
    )
    return values.cast(pa.int64()) if is_float else values.cast(_ALL_DIGITS).cast(pa.string())


_HOW_TO_ALLOW = "Fill or remove them first, or set task.missing: allow."


def _refuse(wrong: NDArray[np.bool_], what: str, remedy: str, name_of: NameOf) -> None:
    """Raise `DataError` where a row `[B]` is wrong."""
    rows = np.flatnonzero(wrong)
    if len(rows):
        raise DataError(f"{what} in {name_of(int(rows[0]))} ({len(rows)} such rows in this block). {remedy}")
