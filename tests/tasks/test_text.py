from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kdpipe.data.prepared import PreparedData
from kdpipe.data.preparing import RowSchema, SourceColumns, SplitPlan, prepare
from kdpipe.data.sources import Table
from kdpipe.errors import DataError
from kdpipe.preprocess import Utf8Bytes
from kdpipe.tasks.text import TextClassification
from kdpipe.testing import TaskContract
from toy_text import TEXTS

TASK = TextClassification(num_classes=2)
KINDS = {
    "string": lambda texts: pa.array(texts, pa.string()),
    "large_string": lambda texts: pa.array(texts, pa.large_string()),
    "string_view": lambda texts: pa.array(texts, pa.string_view()),
    "dictionary": lambda texts: pa.array(texts, pa.string()).dictionary_encode(),
    "binary": lambda texts: pa.array([text.encode() for text in texts], pa.binary()),
}
EVERY_KIND = pytest.mark.parametrize("as_column", KINDS.values(), ids=KINDS)


def name_of(position):
    return f"row {100 + position}"


def rows_of(column):
    return [column.row(index).tobytes().decode() for index in range(len(column))]


def inputs_of(column, task=TASK):
    return task.to_inputs(pa.RecordBatch.from_arrays([column], ["text"]), name_of)


def test_a_model_that_names_no_preprocess_reads_bytes():
    assert isinstance(TASK.default_preprocess(), Utf8Bytes)


class TestTexts(TaskContract):
    """The laws of every task."""

    def task(self, folder):
        return TextClassification(num_classes=2)

    def batch(self):
        labels = [row % 2 if row < 5 else None for row in range(len(TEXTS))]
        return pa.RecordBatch.from_pydict({"text": TEXTS, "label": labels})


class TestPairs(TestTexts):
    """The laws of every task, for two texts."""

    def task(self, folder):
        return TextClassification(num_classes=2, pair_column="other")

    def batch(self):
        return super().batch().append_column("other", pa.array(TEXTS[::-1]))


@EVERY_KIND
@given(texts=st.lists(st.text(), min_size=1, max_size=6), cut=st.integers(0, 5))
def test_texts_are_kept_as_they_are(as_column, texts, cut):
    column = as_column(["before", *texts])
    assert rows_of(inputs_of(column.slice(1))["text"]) == texts
    assert rows_of(inputs_of(column.slice(min(cut, len(texts))))["text"]) == ["before", *texts][min(cut, len(texts)) :]


@EVERY_KIND
def test_no_rows_are_no_rows(as_column):
    assert rows_of(inputs_of(as_column(["x"]).slice(1))["text"]) == []


def test_a_pair_is_two_columns():
    task = TextClassification(num_classes=3, column="premise", pair_column="hypothesis")
    batch = pa.RecordBatch.from_pydict({"hypothesis": ["h1", ""], "premise": ["p1", "p2"]})
    columns = task.to_inputs(batch, name_of)
    assert {name: rows_of(column) for name, column in columns.items()} == {"text": ["p1", "p2"], "pair": ["h1", ""]}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (pa.array(["a", None, None]), "column 'text' has no text in row 101 (2 such rows in this block)"),
        (pa.array([None, None]), "column 'text' has no text in row 100 (2 such rows in this block)"),
        (pa.array(["a", None]).dictionary_encode(), "column 'text' has no text in row 101 (1 such rows"),
        (pa.array([1, 2]), "column 'text' has type int64; expected text"),
        (pa.array([["a"]]), "column 'text' has type list<item: string>; expected text"),
        (pa.array([b"ok", b"caf\xe9 au lait"]), "the text of row 101 in column 'text' is not UTF-8: b'caf\\xe9 au"),
        (pa.array([b"", b"\xed\xa0\x80"]), "the text of row 101 in column 'text' is not UTF-8"),
    ],
    ids=str,
)
def test_what_is_no_text_is_refused(values, message):
    with pytest.raises(DataError) as caught:
        inputs_of(values)
    assert message in str(caught.value)


def test_a_column_that_is_called_text_but_is_not_utf_8_is_refused():
    """Parquet files may say so, and Arrow does not look."""
    binary = pa.array([b"fine", b"latin-1: \xe9"])
    pretended = pa.Array.from_buffers(pa.string(), 2, binary.buffers())
    with pytest.raises(DataError, match="the text of row 101 in column 'text' is not UTF-8"):
        inputs_of(pretended)


def test_a_pair_without_its_second_text_is_refused():
    task = TextClassification(num_classes=2, pair_column="other")
    with pytest.raises(DataError, match="column 'other' has no text in row 101"):
        task.to_inputs(pa.RecordBatch.from_pydict({"text": ["a", "b"], "other": ["x", None]}), name_of)
    with pytest.raises(DataError, match="there is no column 'other'; the source has text"):
        task.to_inputs(pa.RecordBatch.from_pydict({"text": ["a"]}), name_of)


def test_labels_go_by_class_names_and_the_loss_is_cross_entropy():
    task = TextClassification(num_classes=2, class_names=["bad", "good"])
    assert task.to_labels(pa.array(["good", None, "bad"]), name_of).tolist() == [1, -1, 0]
    logits, labels = torch.tensor([[2.0, -1.0], [0.0, 0.0]]), torch.tensor([0, -1])
    expected = torch.tensor([-torch.log_softmax(logits[0], dim=0)[0], 0])
    torch.testing.assert_close(task.label_loss(logits, labels), expected)


def prepared(folder, table, columns):
    pq.write_table(table, folder / "texts.parquet", row_group_size=3)
    schema = RowSchema(to_inputs=TASK.to_inputs, to_labels=TASK.to_labels)
    prepare(Table(folder / "texts.parquet"), schema, columns, SplitPlan(shares={"train": 1.0}), folder / "prepared")
    return PreparedData(folder / "prepared")


def test_texts_of_any_length_and_script_become_prepared_rows(tmp_path):
    table = pa.table({"key": range(len(TEXTS)), "text": TEXTS, "label": [row % 2 for row in range(len(TEXTS))]})
    data = prepared(tmp_path, table, SourceColumns(id="key", label="label"))
    order = np.array([7, 1, 5, 5, 0])
    assert rows_of(data.inputs.read(order)["text"]) == [TEXTS[row] for row in order]
    assert data.labels.tolist() == table["label"].to_pylist()


def test_a_bad_text_is_named_by_row_and_id(tmp_path):
    table = pa.table({"key": ["x", "y"], "text": ["fine", None]})
    with pytest.raises(DataError, match=r"column 'text' has no text in row 1 \(id y\)"):
        prepared(tmp_path, table, SourceColumns(id="key"))
