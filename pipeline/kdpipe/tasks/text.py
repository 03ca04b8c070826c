"""Text classification: rows are a text, or a pair of texts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from torch import Tensor

from kdpipe.data.columns import Array, Columns, Ragged, ragged_bytes, texts_of
from kdpipe.data.preparing import NameOf, column_of
from kdpipe.errors import DataError
from kdpipe.losses import cross_entropy
from kdpipe.preprocess import Preprocess, Utf8Bytes
from kdpipe.tasks.base import check_class_names, class_labels


class TextClassification:
    """One label per text in `column`, or per pair of it and the text in `pair_column` (a premise and a hypothesis).

    Rows are kept as UTF-8 bytes, as they stand in the source. An empty text is a text; a missing one is refused.
    """

    def __init__(
        self,
        num_classes: int,
        column: str = "text",
        pair_column: str | None = None,
        class_names: Sequence[str] | None = None,
    ) -> None:
        check_class_names(num_classes, class_names)
        self.num_classes = num_classes
        self.class_names = class_names
        self._column, self._pair_column = column, pair_column

    def to_inputs(self, batch: pa.RecordBatch, name_of: NameOf) -> Columns:
        """Columns `text` and, of pairs, `pair`: `Ragged` UTF-8 bytes. Raises `DataError` naming bad rows."""
        columns = {"text": _utf8(batch, self._column, name_of)}
        if self._pair_column is not None:
            columns["pair"] = _utf8(batch, self._pair_column, name_of)
        return columns

    def to_labels(self, values: pa.Array, name_of: NameOf) -> NDArray[np.int64]:
        """Class ids `[B]`, -1 where there is none."""
        return class_labels(values, self.num_classes, self.class_names, name_of)

    def default_preprocess(self) -> Preprocess:
        """Bytes as tokens, up to 256 of them; name a `Tokenizer` (kdpipe.preprocess) for words."""
        return Utf8Bytes()

    def label_loss(self, logits: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
        """Cross-entropy, one value per row `[B]`."""
        return cross_entropy(logits, labels, smoothing)

    def column_values(self, columns: Columns) -> dict[str, Array]:
        """Prepared rows by column name: objects of str, `[B]` each."""
        names = {"text": self._column, "pair": self._pair_column or "pair"}
        texts = {names[kept]: column for kept, column in columns.items() if isinstance(column, Ragged)}
        return {name: np.array(texts_of(column), dtype=object) for name, column in texts.items()}


def _utf8(batch: pa.RecordBatch, name: str, name_of: NameOf) -> Ragged:
    """A column of text, dictionary-encoded or not, or of bytes that are UTF-8."""
    values = column_of(batch, name)
    if pa.types.is_dictionary(values.type):
        values = values.dictionary_decode()
    if values.null_count:
        rows = np.flatnonzero(values.is_null().to_numpy(zero_copy_only=False))
        raise DataError(
            f"column {name!r} has no text in {name_of(int(rows[0]))} ({len(rows)} such rows in this block). Fill or "
            "remove them first."
        )
    try:
        texts = values.cast(pa.large_binary())
    except pa.ArrowNotImplementedError:
        raise DataError(f"column {name!r} has type {values.type}; expected text") from None
    try:
        texts.cast(pa.large_string())  # reads every byte, which a file's own word for it does not
    except pa.ArrowInvalid:
        row = next(row for row, text in enumerate(texts.to_pylist()) if not _is_utf8(text))
        raise DataError(
            f"the text of {name_of(row)} in column {name!r} is not UTF-8: {texts[row].as_py()[:20]!r}. Convert the "
            "source to UTF-8."
        ) from None
    return ragged_bytes(texts)


def _is_utf8(text: bytes) -> bool:
    try:
        text.decode()
    except UnicodeDecodeError:
        return False
    return True
