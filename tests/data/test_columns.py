from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from kdpipe.data import columns as columns_module
from kdpipe.data.columns import (
    Ragged,
    bytes_of,
    concatenate,
    fixed_bytes,
    ragged_bytes,
    take,
    text_array,
    text_column,
    text_pieces,
    texts_of,
)
from kdpipe.errors import DataError

ROWS = st.lists(st.lists(st.integers(0, 255), max_size=5), min_size=1, max_size=12)


def ragged(rows):
    return Ragged(
        values=np.array([value for row in rows for value in row], np.uint8),
        offsets=np.cumsum([0, *map(len, rows)]).astype(np.int64),
    )


def rows_of(column):
    return [column.row(index).tolist() for index in range(len(column))]


@given(ROWS, st.data())
def test_taking_ragged_rows_is_taking_them_one_by_one(rows, data):
    chosen = data.draw(st.lists(st.integers(0, len(rows) - 1), max_size=20))
    taken = ragged(rows).take(np.array(chosen, np.int64))
    assert rows_of(taken) == [rows[index] for index in chosen]
    assert taken.offsets.dtype == np.int64
    assert taken.offsets[0] == 0
    assert taken.values.dtype == np.uint8


@given(ROWS, st.data())
def test_taking_twice_is_taking_the_composition(rows, data):
    indices = st.lists(st.integers(0, len(rows) - 1), min_size=1, max_size=8)
    first = np.array(data.draw(indices), np.int64)
    second = np.array(data.draw(st.lists(st.integers(0, len(first) - 1), max_size=8)), np.int64)
    column = ragged(rows)
    assert rows_of(column.take(first).take(second)) == rows_of(column.take(first[second]))


def test_a_row_of_ragged_values_may_itself_have_axes():
    column = Ragged(values=np.arange(12).reshape(6, 2), offsets=np.array([0, 1, 1, 6], np.int64))
    taken = column.take(np.array([2, 0], np.int64))
    assert taken.row(0).tolist() == [[2, 3], [4, 5], [6, 7], [8, 9], [10, 11]]
    assert taken.row(1).tolist() == [[0, 1]]


@given(st.lists(ROWS, min_size=1, max_size=4))
def test_concatenated_ragged_parts_are_their_rows_in_order(parts):
    assert rows_of(concatenate([ragged(rows) for rows in parts])) == [row for rows in parts for row in rows]


@given(st.lists(st.integers(0, 3), min_size=1, max_size=4))
def test_concatenated_arrays_are_their_rows_in_order(lengths):
    parts = [np.random.default_rng(index).normal(size=(length, 2, 3)) for index, length in enumerate(lengths)]
    np.testing.assert_array_equal(concatenate(list(parts)), np.vstack(parts))


@given(npst.arrays(np.int32, (6, 2)), st.lists(st.integers(0, 5), max_size=9))
def test_taking_array_rows_keeps_their_order_and_repeats(values, chosen):
    np.testing.assert_array_equal(take(values, np.array(chosen, np.int64)), [values[i] for i in chosen] or values[:0])


@given(npst.arrays(np.uint8, st.tuples(st.integers(0, 9), st.integers(1, 20))))
def test_fixed_bytes_round_trip(values):
    column = fixed_bytes(values)
    assert column.to_pylist() == [row.tobytes() for row in values]
    np.testing.assert_array_equal(bytes_of(pa.chunked_array([column])), values)


@given(st.data())
def test_bytes_of_reads_chunks_and_slices(data):
    chunks, expected = [], []
    for values in data.draw(st.lists(npst.arrays(np.uint8, st.tuples(st.integers(0, 6), st.just(4))), max_size=3)):
        start = data.draw(st.integers(0, len(values)))
        stop = data.draw(st.integers(start, len(values)))
        chunks.append(fixed_bytes(values).slice(start, stop - start))
        expected.append(values[start:stop])
    found = bytes_of(pa.chunked_array(chunks, pa.binary(4)))
    np.testing.assert_array_equal(found, np.concatenate([np.empty((0, 4), np.uint8), *expected]))


def test_fixed_bytes_takes_rows_that_are_not_contiguous():
    values = np.arange(40, dtype=np.uint8).reshape(10, 4)[::3, ::-1]
    np.testing.assert_array_equal(bytes_of(pa.chunked_array([fixed_bytes(values)])), values)


@given(blocks=st.lists(st.lists(st.text(max_size=3), max_size=9), max_size=6), at_once=st.integers(1, 7))
def test_pieces_of_texts_do_not_tell_how_the_texts_came(blocks, at_once):
    texts = [text for block in blocks for text in block]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(columns_module, "_TEXTS_AT_ONCE", at_once)
        pieces = text_pieces(pa.array(["other", *block], pa.string()).slice(1) for block in blocks)
        assert [chunk.to_pylist() for chunk in pieces.chunks] == [
            texts[start : start + at_once] for start in range(0, len(texts), at_once)
        ]
        assert pieces == text_column(np.array(texts, np.str_)) or "\0" in "".join(texts)
        assert text_array(lambda: pieces.chunks).tolist() == np.array(texts, np.str_).tolist()


ARROW_KINDS = [pa.string(), pa.large_string(), pa.binary(), pa.large_binary(), pa.string_view()]


@given(st.lists(st.text(), max_size=6), st.sampled_from(ARROW_KINDS), st.data())
def test_arrow_texts_become_rows_of_bytes_and_back(texts, kind, data):
    column = pa.array([text.encode() for text in texts], pa.large_binary()).cast(kind)
    start = data.draw(st.integers(0, len(texts)))
    stop = data.draw(st.integers(start, len(texts)))
    rows = ragged_bytes(column.slice(start, stop - start))
    assert rows.offsets[0] == 0
    assert rows.values.dtype == np.uint8
    assert texts_of(rows) == texts[start:stop]
    assert texts_of(rows.take(np.arange(len(rows))[::-1])) == texts[start:stop][::-1]


def test_bytes_that_are_no_text_are_refused():
    rows = Ragged(values=np.array([0xC3, 0x41], np.uint8), offsets=np.array([0, 1, 2]))
    with pytest.raises(DataError, match="rows of text are not UTF-8"):
        texts_of(rows)
