from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis.extra import numpy as npst

from kdpipe.data.prepared import PreparedData
from kdpipe.data.preparing import RowSchema, SourceColumns, SplitPlan, prepare
from kdpipe.data.sources import Table
from kdpipe.errors import DataError
from kdpipe.preprocess import Standardize
from kdpipe.tasks.base import Task
from kdpipe.tasks.tabular import TabularClassification

TASK = TabularClassification(num_classes=2, columns=["b", "a"])


def name_of(position):
    return f"row {100 + position}"


def batch_of(**columns):
    return pa.RecordBatch.from_pydict(columns)


def test_it_is_a_task():
    assert isinstance(TASK, Task)
    assert isinstance(TASK.default_preprocess(), Standardize)
    assert TASK.num_classes == 2


@given(npst.arrays(np.float32, (4, 2), elements={"allow_nan": False, "allow_infinity": False}))
def test_columns_stand_in_the_named_order_whatever_the_file_holds(values):
    batch = batch_of(a=values[:, 1], unused=["x"] * 4, b=values[:, 0])
    features = TASK.to_inputs(batch, name_of)["features"]
    assert features.dtype == np.float32
    np.testing.assert_array_equal(features, values)


@pytest.mark.parametrize(
    "kind", [pa.int8(), pa.uint16(), pa.int64(), pa.float16(), pa.float32(), pa.float64(), pa.bool_()], ids=str
)
def test_all_kinds_of_numbers_are_numbers(kind):
    batch = batch_of(a=pa.array([0, 1, 0]).cast(kind), b=pa.array([1, 0, 0]).cast(kind))
    assert TASK.to_inputs(batch, name_of)["features"].tolist() == [[1, 0], [0, 1], [0, 0]]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (pa.array([0.5, None, None]), "column 'a' has no finite number in row 101 (2 such rows in this block)"),
        (pa.array([0.5, 1.0, float("nan")]), "column 'a' has no finite number in row 102 (1 such rows"),
        (pa.array([float("-inf"), 1.0, 2.0]), "column 'a' has no finite number in row 100 (1 such rows"),
        (pa.array([1e300, 1.0, 2.0]), "column 'a' has no finite number in row 100 (1 such rows"),
        (pa.array([2**60 + 1, 1, 2]), "column 'a' has numbers too large for a feature"),
        (pa.array(["1", "2", "3"]), "column 'a' has type string; expected numbers. Leave it out of task.columns."),
        (pa.array([None, None, None]), "column 'a' has type null; expected numbers"),
    ],
)
def test_what_is_no_number_is_refused(values, message):
    with pytest.raises(DataError) as caught:
        TASK.to_inputs(batch_of(a=values, b=[1, 2, 3]), name_of)
    assert message in str(caught.value)


def test_a_missing_column_lists_those_that_exist():
    with pytest.raises(DataError, match="there is no column 'b'; the source has a, c"):
        TASK.to_inputs(batch_of(a=[1], c=[2]), name_of)


def test_a_task_without_columns_is_refused():
    with pytest.raises(DataError, match=r"task\.columns is empty"):
        TabularClassification(num_classes=2, columns=[])


def test_labels_go_by_class_names():
    task = TabularClassification(num_classes=2, columns=["a"], class_names=["no", "yes"])
    assert task.to_labels(pa.array(["yes", None, "no"]), name_of).tolist() == [1, -1, 0]
    with pytest.raises(DataError, match="found maybe in row 100"):
        task.to_labels(pa.array(["maybe"]), name_of)


def test_the_label_loss_is_cross_entropy():
    logits, labels = torch.tensor([[2.0, -1.0], [0.0, 0.0]]), torch.tensor([0, -1])
    expected = torch.tensor([-torch.log_softmax(logits[0], dim=0)[0], 0])
    torch.testing.assert_close(TASK.label_loss(logits, labels), expected)


def test_a_csv_file_becomes_prepared_rows(tmp_path):
    (tmp_path / "rows.csv").write_text("name,a,b,kind,part\nx,1,0.5,no,train\ny,2,-1,,train\nz,3,4e2,yes,test\n")
    task = TabularClassification(num_classes=2, columns=["a", "b"], class_names=["no", "yes"])
    schema = RowSchema(to_inputs=task.to_inputs, to_labels=task.to_labels)
    columns = SourceColumns(id="name", label="kind", split="part")
    prepare(Table(tmp_path / "rows.csv"), schema, columns, SplitPlan(), tmp_path / "prepared")
    data = PreparedData(tmp_path / "prepared")
    assert data.inputs.read(np.array([2, 0, 1]))["features"].tolist() == [[3, 400], [1, 0.5], [2, -1]]
    assert data.labels.tolist() == [0, -1, 1]
    assert data.rows_of(["train"]).tolist() == [0, 1]


def test_a_bad_cell_is_named_by_row_and_id(tmp_path):
    (tmp_path / "rows.csv").write_text("name,a,kind\nx,1,0\ny,,1\n")
    task = TabularClassification(num_classes=2, columns=["a"])
    schema = RowSchema(to_inputs=task.to_inputs, to_labels=task.to_labels)
    plan = SplitPlan(shares={"train": 1.0})
    with pytest.raises(DataError, match=r"column 'a' has no finite number in row 1 \(id y\)"):
        prepare(Table(tmp_path / "rows.csv"), schema, SourceColumns(id="name", label="kind"), plan, tmp_path / "out")
