from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdpipe.errors import DataError
from kdpipe.tasks.base import check_class_names, class_labels

NAMES = ["cat", "dog", "emu"]


def name_of(position):
    return f"row {100 + position}"


def ids(values, class_names=None, num_classes=3):
    return class_labels(values, num_classes, class_names, name_of)


@given(st.lists(st.none() | st.integers(0, 2)), st.sampled_from([pa.int8(), pa.uint8(), pa.int64(), pa.float64()]))
def test_numbers_are_class_ids_and_nulls_are_missing(labels, kind):
    found = ids(pa.array(labels, kind))
    assert found.tolist() == [-1 if label is None else label for label in labels]
    assert found.dtype == np.int64


def test_nan_is_a_missing_label():
    assert ids(pa.array([2.0, float("nan"), None, 0.0])).tolist() == [2, -1, -1, 0]


TEXTS = [pa.string(), pa.large_string(), pa.string_view(), pa.binary(), pa.large_binary(), pa.binary_view()]


@given(st.lists(st.none() | st.sampled_from(["", *NAMES])), st.sampled_from(TEXTS))
def test_names_are_numbered_in_their_order_and_empty_text_is_missing(labels, kind):
    expected = [NAMES.index(label) if label else -1 for label in labels]
    assert ids(pa.array(labels, kind), NAMES).tolist() == expected
    assert ids(pa.array(labels, pa.string()).dictionary_encode(), NAMES).tolist() == expected


def test_booleans_are_two_classes():
    assert ids(pa.array([True, None, False]), num_classes=2).tolist() == [1, -1, 0]


@pytest.mark.parametrize(
    ("labels", "names", "message"),
    [
        (
            [True, False],
            ["True", "False"],
            "the label false in row 101 is class 0, but task.class_names call class 1 'False'",
        ),
        ([0, None, 1], ["1", "0"], "the label 0 in row 100 is class 0, but task.class_names call class 1 '0'"),
        ([None, 2.0], ["2", "0", "1"], "the label 2 in row 101 is class 2, but task.class_names call class 0 '2'"),
    ],
)
def test_names_of_numbers_in_another_order_are_refused(labels, names, message):
    with pytest.raises(DataError, match=message):
        ids(pa.array(labels), names, num_classes=len(names))


def test_numbers_may_have_names_of_their_own():
    assert ids(pa.array([0, 1, 2]), ["0", "1", "2"]).tolist() == [0, 1, 2]
    assert ids(pa.array([False, True]), ["no", "yes"], num_classes=2).tolist() == [0, 1]
    assert ids(pa.array([False, True]), ["False", "True"], num_classes=2).tolist() == [0, 1]
    assert ids(pa.array([1, 2]), ["1", "2", "3"]).tolist() == [1, 2]


def test_dictionaries_of_numbers_are_numbers():
    assert ids(pa.array([2, None, 0]).dictionary_encode()).tolist() == [2, -1, 0]


@pytest.mark.parametrize("kind", [pa.null(), pa.string(), pa.int64(), pa.dictionary(pa.int32(), pa.string())])
@pytest.mark.parametrize("class_names", [None, NAMES])
def test_labels_may_all_be_missing(kind, class_names):
    assert ids(pa.array([None, None], pa.null()).cast(kind), class_names).tolist() == [-1, -1]


def test_a_slice_is_its_own_rows():
    assert ids(pa.array([0, 1, None, 2]).slice(1, 2)).tolist() == [1, -1]
    assert ids(pa.array(["cat", "dog", None]).slice(1), NAMES).tolist() == [1, -1]


@pytest.mark.parametrize(
    ("values", "class_names", "message"),
    [
        (
            pa.array([0, 3, None, -1, 2]),
            None,
            "labels must lie in 0..2 (task.num_classes is 3); found 3 in row 101, -1 in row 103; "
            "a row without label has null there",
        ),
        (pa.array([9] * 7), None, "9 in row 103, 9 in row 104 and 2 more"),
        (pa.array(["cat", "cow", "", None, "Dog"]), NAMES, "must be among cat, dog, emu; found cow in row 101, Dog in"),
        (
            pa.array([None, "cat"]),
            None,
            "labels are text (such as cat); name the classes, in order, in task.class_names",
        ),
        (pa.array([0.0, None, 1.5]), None, "labels must be class numbers; found 1.5 in row 102"),
        (pa.array([[0], [1]]), None, "labels of type list<item: int64> are no class numbers"),
        (pa.array([2**63], pa.uint64()), None, "labels of type uint64 are no class numbers"),
    ],
)
def test_what_is_no_label_is_refused(values, class_names, message):
    with pytest.raises(DataError) as caught:
        ids(values, class_names)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("num_classes", "class_names", "message"),
    [
        (1, None, "task.num_classes is 1; expected at least 2"),
        (3, ["a", "b"], "2 names, 2 of them different, for 3 classes"),
        (2, ["a", "b", "c"], "3 names, 3 of them different, for 2 classes"),
        (2, ["a", "a", "b"], "3 names, 2 of them different, for 2 classes"),
        (2, ["a", "a"], "2 names, 1 of them different, for 2 classes"),
    ],
)
def test_class_names_must_fit_the_class_count(num_classes, class_names, message):
    with pytest.raises(DataError, match=message):
        check_class_names(num_classes, class_names)


@pytest.mark.parametrize("class_names", [None, NAMES])
def test_fitting_class_names_are_accepted(class_names):
    check_class_names(3, class_names)
