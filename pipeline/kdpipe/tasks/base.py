"""The `Task` protocol, and what classification tasks share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from torch import Tensor

from kdpipe.data.columns import Columns
from kdpipe.data.prepared import MISSING_LABEL
from kdpipe.data.preparing import NameOf, SourceColumns
from kdpipe.data.sources import Source
from kdpipe.errors import DataError, some
from kdpipe.preprocess import Preprocess


@runtime_checkable
class Task(Protocol):
    """What is to be learnt. Shapes: B batch, C classes; language models have `[B, T]` labels and `[B, T, C]` logits.

    An attribute `metrics` names what is measured besides what always is: see `metrics_of`. An attribute `offers` holds
    keyword values for the factories of preprocesses (`columns`, say). A method `column_values(columns)` gives prepared
    rows by the source's column names, as labelling rules see them: numbers `[B]` (NaN where missing), or object arrays
    `[B]` of str (None where missing).
    """

    num_classes: int
    class_names: Sequence[str] | None

    def to_inputs(self, batch: pa.RecordBatch, name_of: NameOf) -> Columns:
        """Raw columns of a block of source rows. Raises `DataError` naming bad rows."""

    def to_labels(self, values: pa.Array, name_of: NameOf) -> NDArray[np.int64]:
        """Labels `[B]` of the source's label column, -1 where there is none. Raises `DataError` naming bad rows."""

    def default_preprocess(self) -> Preprocess:
        """The way from row to model input of a model that names none."""

    def label_loss(self, logits: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
        """The loss on labels, one value per row `[B]` or token `[B, T]`; 0 where the label is missing (-1)."""


@runtime_checkable
class TokenTask(Task, Protocol):
    """A task whose rows carry their labels: one per token."""

    @property
    def knows_its_tokens(self) -> bool:
        """Whether there is a vocabulary; otherwise `blocks` learns it from the documents first."""

    def blocks(self, source: Source, columns: SourceColumns) -> tuple[Source, SourceColumns]:
        """A source of documents as a source of the rows that are prepared (blocks of tokens), with its columns."""

    def token_labels(self, columns: Columns) -> NDArray[np.int64]:
        """The token that each position must predict, `[B, T]`; -1 where it does not count."""


TokenLabels = Callable[[Columns], NDArray[np.int64]]
"""Labels `[B, T]` of rows that carry them; -1 where a token does not count."""


def rows_of(task: Task, source: Source, columns: SourceColumns) -> tuple[Source, SourceColumns]:
    """The rows that a task makes of a source's: the same ones, unless it cuts documents into blocks."""
    return task.blocks(source, columns) if isinstance(task, TokenTask) else (source, columns)


def token_labels(task: Task) -> TokenLabels | None:
    """What tells the labels of a task's rows where they carry them."""
    return task.token_labels if isinstance(task, TokenTask) else None


CLASSIFICATION_METRICS = ("macro_f1", "balanced_accuracy", "auc")
TOKEN_METRICS = ("nll", "perplexity")


def metrics_of(task: Task) -> Sequence[str]:
    """Names of `kdpipe.evaluation.METRICS`: the task's own `metrics`, or those of its kind."""
    return getattr(task, "metrics", TOKEN_METRICS if isinstance(task, TokenTask) else CLASSIFICATION_METRICS)


def class_labels(
    values: pa.Array, num_classes: int, class_names: Sequence[str] | None, name_of: NameOf
) -> NDArray[np.int64]:
    """Class ids `[B]` of a label column of integers, or of `class_names`; nulls and empty text become -1."""
    if pa.types.is_dictionary(values.type):
        values = values.dictionary_decode()
    if any(is_text(values.type) for is_text in _TEXTS):
        return _ids_of_names(_as_text(values), class_names, name_of)
    is_boolean = pa.types.is_boolean(values.type)
    if is_boolean:
        values = values.cast(pa.int8())
    if pa.types.is_floating(values.type):
        values = pc.if_else(pc.is_nan(values), pa.scalar(None, values.type), values)
        broken = np.flatnonzero(pc.fill_null(pc.not_equal(values, pc.floor(values)), False).to_numpy(False))
        if len(broken):
            row = int(broken[0])
            raise DataError(f"labels must be class numbers; found {values[row].as_py()} in {name_of(row)}")
    try:
        ids: NDArray[np.int64] = pc.fill_null(values.cast(pa.int64()), MISSING_LABEL).to_numpy(zero_copy_only=False)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise DataError(f"labels of type {values.type} are no class numbers: {error}") from None
    given = ~values.is_null().to_numpy(zero_copy_only=False)
    wrong = np.flatnonzero(given & ((ids < 0) | (ids >= num_classes)))
    if len(wrong):
        raise DataError(
            f"labels must lie in 0..{num_classes - 1} (task.num_classes is {num_classes}); found "
            + some([f"{ids[i]} in {name_of(int(i))}" for i in wrong])
            + ("; a row without label has null there, or an empty cell" if (ids[wrong] < 0).any() else "")
        )
    _refuse_names_in_another_order(ids, is_boolean, class_names or (), name_of)
    return ids


def _refuse_names_in_another_order(
    ids: NDArray[np.int64], is_boolean: bool, class_names: Sequence[str], name_of: NameOf
) -> None:
    """Raise `DataError` for labels 0 to C - 1 where class_names are the same in another order: numbers, or names?"""
    names = [str(name).strip().lower() for name in class_names]
    written = ["false", "true"] if is_boolean else [str(number) for number in range(len(names))]
    if not names or sorted(names) != sorted(written):
        return
    for number in np.unique(ids[ids != MISSING_LABEL]).tolist():
        if names[number] != written[number]:
            other = names.index(written[number])
            raise DataError(
                f"the label {written[number]} in {name_of(int(np.argmax(ids == number)))} is class {number}, but "
                f"task.class_names call class {other} {class_names[other]!r}; expected them as {', '.join(written)}, "
                "or other names, or labels that are text (of CSV and JSON Lines: data.source.types: {label: string})"
            )


_TEXTS = (
    pa.types.is_string,
    pa.types.is_large_string,
    pa.types.is_string_view,
    pa.types.is_binary,
    pa.types.is_large_binary,
    pa.types.is_binary_view,
)


def _as_text(values: pa.Array) -> pa.Array:
    try:
        return values.cast(pa.large_string())
    except pa.ArrowInvalid:
        raise DataError(f"labels of type {values.type} are no text in UTF-8, and no class numbers") from None


def _ids_of_names(values: pa.Array, class_names: Sequence[str] | None, name_of: NameOf) -> NDArray[np.int64]:
    values = pc.if_else(pc.equal(values, ""), pa.scalar(None, values.type), values)
    if class_names is None and values.null_count < len(values):
        example = values.drop_null()[0]
        raise DataError(f"labels are text (such as {example}); name the classes, in order, in task.class_names")
    class_names = class_names or ()
    ids = pc.index_in(values, value_set=pa.array(class_names, values.type))
    unknown = np.flatnonzero(pc.and_(ids.is_null(), values.is_valid()).to_numpy(zero_copy_only=False))
    if len(unknown):
        found = ", ".join(f"{values[int(i)]} in {name_of(int(i))}" for i in unknown[:5])
        raise DataError(f"labels must be among {', '.join(class_names)}; found {found}")
    result: NDArray[np.int64] = pc.fill_null(ids.cast(pa.int64()), MISSING_LABEL).to_numpy(zero_copy_only=False)
    return result


def check_class_names(num_classes: int, class_names: Sequence[str] | None) -> None:
    """Raise `DataError` unless the names fit the class count."""
    if num_classes < 2:
        raise DataError(f"task.num_classes is {num_classes}; expected at least 2")
    if class_names is not None and not len(set(class_names)) == len(class_names) == num_classes:
        raise DataError(
            f"task.class_names has {len(class_names)} names, {len(set(class_names))} of them different, "
            f"for {num_classes} classes"
        )
