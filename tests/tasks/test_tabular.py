from __future__ import annotations

from decimal import Decimal

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis.extra import numpy as npst

from kdpipe.data.prepared import PreparedData
from kdpipe.data.preparing import RowSchema, SourceColumns, SplitPlan, prepare
from kdpipe.data.segments import content_digests
from kdpipe.data.sources import Table
from kdpipe.errors import DataError
from kdpipe.preprocess import Standardize
from kdpipe.preprocess.columns import ColumnEncoder
from kdpipe.tasks.base import Task
from kdpipe.tasks.tabular import TabularClassification
from kdpipe.testing import TaskContract

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
    "kind",
    [pa.int8(), pa.uint16(), pa.int64(), pa.float16(), pa.float32(), pa.float64(), pa.bool_(), pa.decimal128(21, 2)],
    ids=str,
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
        (pa.array([2**60 + 1, 1, 2]), "Where they are names and no amounts, name the column in task.categorical"),
        (pa.array(["1", "2", "3"]), "column 'a' has type string; expected numbers. Leave it out of task.columns."),
        (pa.array([None, None, None]), "column 'a' has type null; expected numbers"),
        (pa.array([[1.0, 2.0]] * 3, pa.list_(pa.float64(), 2)), "Of lists and matrices, make a column per number"),
        (pa.array([None, "1,5", "2"]), "expected numbers. Of a decimal comma, as in 1,5, data.source.decimal_point: "),
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
    with pytest.raises(DataError, match=r"task\.columns and task\.categorical name 'a' 2 times"):
        TabularClassification(num_classes=2, columns=["b", "a"], categorical=["a"])


MIXED = TabularClassification(num_classes=2, columns=["b", "a"], categorical=["kind", "and/or"], missing="allow")


def test_missing_numbers_are_nan_where_they_are_allowed():
    payload = np.frombuffer(np.array([0x7FF8000000000001], np.uint64).tobytes(), np.float64)
    batch = batch_of(
        a=pa.array([1, None, 3]), b=pa.array([payload[0], 0.5, None]), kind=["x"] * 3, **{"and/or": ["y"] * 3}
    )
    features = MIXED.to_inputs(batch, name_of)["features"]
    np.testing.assert_array_equal(features, np.array([[np.nan, 1], [0.5, np.nan], [np.nan, 3]], np.float32))
    assert len({each.tobytes() for each in features[np.isnan(features)]}) == 1
    nothing = batch_of(a=pa.nulls(1), b=[1.0], kind=["x"], **{"and/or": ["y"]})
    np.testing.assert_array_equal(MIXED.to_inputs(nothing, name_of)["features"], [[1, np.nan]])


@pytest.mark.parametrize("value", [float("inf"), -float("inf"), 1e300])
def test_infinite_numbers_are_refused_even_then(value):
    batch = batch_of(a=[1.0, value], b=[None, 0.5], kind=["x", "y"], **{"and/or": ["", None]})
    with pytest.raises(DataError, match=r"column 'a' has an infinite number in row 101 \(1 such rows"):
        MIXED.to_inputs(batch, name_of)


@pytest.mark.parametrize(
    ("values", "texts"),
    [
        (pa.array(["x", None, "", "é ü"]), ["x", None, None, "é ü"]),
        (pa.array(["x", None, "", "z"], pa.large_string()), ["x", None, None, "z"]),
        (pa.array(["x", None, "", "x"]).dictionary_encode(), ["x", None, None, "x"]),
        (pa.array([3, None, -1, 3], pa.int16()), ["3", None, "-1", "3"]),
        (pa.array([3, None, float("nan"), 0.0]), ["3", None, None, "0"]),
        (pa.array(np.array([3, 1, 2, 0], np.float16)), ["3", "1", "2", "0"]),
        (pa.array([Decimal(10**20), None, Decimal(10**20 + 1), Decimal(7)]), [f"{10**20}", None, f"{10**20 + 1}", "7"]),
        (pa.array([Decimal("3.00"), None, Decimal("-1.00"), Decimal("12.00")]), ["3", None, "-1", "12"]),
        (pa.array([True, None, False, True]), ["true", None, "false", "true"]),
        (pa.nulls(4), [None] * 4),
    ],
    ids=lambda each: str(each.type) if isinstance(each, pa.Array) else "",
)
def test_categories_are_text(values, texts):
    numbers = [0.5, 1.5, 2.5, 3.5]
    for part in (slice(0, 4), slice(1, 3)):
        columns = MIXED.to_inputs(
            batch_of(a=numbers[part], b=numbers[part], kind=values[part], **{"and/or": ["?"] * len(texts[part])}),
            name_of,
        )
        found = MIXED.column_values(columns)
        assert list(found) == ["b", "a", "kind", "and/or"]
        assert found["kind"].tolist() == texts[part]
        assert found["kind"].dtype == object
        assert found["a"].tolist() == numbers[part]


def test_prepared_categories_come_back_in_any_order(tmp_path):
    (tmp_path / "rows.csv").write_text("a,b,kind,and/or,label\n1,,x,p,0\n2,5,,q,1\n,6,yy,,0\n")
    schema = RowSchema(to_inputs=MIXED.to_inputs, to_labels=MIXED.to_labels)
    plan = SplitPlan(shares={"train": 1.0})
    prepare(Table(tmp_path / "rows.csv"), schema, SourceColumns(label="label"), plan, tmp_path / "prepared")
    values = MIXED.column_values(PreparedData(tmp_path / "prepared").inputs.read(np.array([2, 0, 1, 0])))
    assert values["kind"].tolist() == ["yy", "x", None, "x"]
    assert values["and/or"].tolist() == [None, "p", "q", "p"]
    np.testing.assert_array_equal(values["a"], np.array([np.nan, 1, 2, 1], np.float32))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (pa.array(["x", None, ""]), "column 'kind' has no category in row 101 (2 such rows"),
        (
            pa.array([0.5, 1.5, 2.5]),
            "column 'kind' is among task.categorical and has a number that is not whole in row",
        ),
        (pa.array([1.0, float("inf"), 2.0]), "has a number that is not whole in row 101"),
        (pa.array([1.0, 1e20, 2.0]), "has a number that is not whole in row 101"),
        (pa.array([1.0, 2.0**54, 2.0]), "whole floats from 2^53 on are not exact, write them as text"),
        (pa.array([Decimal("1.00"), Decimal("2.50")]), "has a number that is not whole in row 101"),
        (pa.array([Decimal(1), Decimal(f"1.{'0' * 19}1")]), "has a number that is not whole in row 101"),
        (pa.array([b"x", b"y", b"z"]), "column 'kind' has type binary; expected categories"),
        (pa.array([b"\xff", b"y", b"z"]).view(pa.string()), "column 'kind' holds text that is not UTF-8"),
    ],
)
def test_what_is_no_category_is_refused(values, message):
    task = TabularClassification(num_classes=2, categorical=["kind"])
    with pytest.raises(DataError) as caught:
        task.to_inputs(batch_of(kind=values), name_of)
    assert message in str(caught.value)


def test_missing_values_are_refused_with_the_way_to_allow_them():
    for task in (TASK, TabularClassification(num_classes=2, columns=["a"], categorical=["b"])):
        with pytest.raises(DataError, match=r"Fill or remove them first, or set task\.missing: allow"):
            task.to_inputs(batch_of(a=pa.array([1, 2]), b=pa.array([1, None])), name_of)


def test_a_table_of_categories_alone_has_no_numbers():
    task = TabularClassification(num_classes=2, categorical=["kind"])
    columns = task.to_inputs(batch_of(kind=["x", "y"]), name_of)
    assert list(columns) == ["category.kind"]
    assert task.column_values(columns)["kind"].tolist() == ["x", "y"]


def test_the_default_preprocess_takes_what_the_task_allows():
    assert isinstance(MIXED.default_preprocess(), ColumnEncoder)
    assert isinstance(
        TabularClassification(num_classes=2, columns=["a"], missing="allow").default_preprocess(), ColumnEncoder
    )
    assert MIXED.offers == {"columns": ["b", "a"]}


def test_rows_of_numbers_alone_keep_their_digests(tmp_path):
    """As they were before there were categories: a store made then serves the same rows."""
    columns = TASK.to_inputs(batch_of(a=[1.5, 2.5], b=[-1.0, 0.25]), name_of)
    assert [each.hex() for each in content_digests(columns)] == [
        "c42effd5ef5c7b9e0f0fdb7528246469",
        "dd5755325070f253ba184721ac20d5b9",
    ]


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


class TestMixedTable(TaskContract):
    """The laws of every task, for numbers and categories of which some are missing."""

    def task(self, folder):
        return TabularClassification(num_classes=2, columns=["a"], categorical=["kind", "flag"], missing="allow")

    def batch(self):
        kinds, flags = ["x", None, "", "y", "z"], [True, False, None, True, True]
        return batch_of(a=[1.5, None, 2.5, float("nan"), 0.0], kind=kinds, flag=flags, label=[0, 1, None, 1, None])
