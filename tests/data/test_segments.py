from __future__ import annotations

import os

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from kdpipe.data.columns import Ragged, take
from kdpipe.data.prepared import ColumnLayout
from kdpipe.data.segments import ROW_GROUP, SegmentWriter, content_digests

IMAGES = npst.arrays(np.uint8, st.tuples(st.integers(1, 6), st.just(2), st.just(3)))


def ragged(texts):
    return Ragged(
        values=np.frombuffer(b"".join(texts), np.uint8), offsets=np.cumsum([0, *map(len, texts)]).astype(np.int64)
    )


@given(IMAGES, st.data())
def test_a_rows_digest_is_its_own_matter(images, data):
    """Whatever stands beside it, before it or after it."""
    rows = np.array(data.draw(st.lists(st.integers(0, len(images) - 1), min_size=1)), np.int64)
    columns = {"image": images, "text": ragged([bytes(row) for row in images[:, 0, :]])}
    taken = {name: take(column, rows) for name, column in columns.items()}
    whole = content_digests(columns)
    assert content_digests(taken) == [whole[row] for row in rows]


@given(npst.arrays(np.uint8, (2, 4)))
def test_rows_have_one_digest_when_they_have_one_content(values):
    first, second = content_digests({"x": values})
    assert (first == second) == bool((values[0] == values[1]).all())
    assert len(first) == 16


def test_a_digest_covers_name_type_shape_and_the_border_between_columns():
    row = np.arange(8, dtype=np.uint8).reshape(1, 8)
    variants = [
        {"x": row},
        {"y": row},
        {"x": row.view(np.int8)},
        {"x": row.view(np.uint16)},
        {"x": row.reshape(1, 2, 4)},
        {"x": ragged([bytes(range(8))])},
        {"x": row[:, :3], "y": row[:, 3:]},
        {"x": ragged([b"ab"]), "y": ragged([b"c"])},
        {"x": ragged([b"a"]), "y": ragged([b"bc"])},
    ]
    assert len({content_digests(each)[0] for each in variants}) == len(variants)


def test_a_digest_does_not_depend_on_how_the_array_lies_in_memory():
    values = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    assert content_digests({"x": values}) == content_digests({"x": np.asfortranarray(values)})


def test_a_segment_is_plain_numpy_files_named_by_its_rows(tmp_path):
    columns = {"x": np.arange(12, dtype=np.int16).reshape(4, 3), "text": ragged([b"a", b"", b"bcd", b"e"])}
    layouts = tuple(ColumnLayout.of(*each) for each in columns.items())
    names = []
    for cut in (1, 3):
        writer = SegmentWriter(tmp_path, layouts)
        for rows in (np.arange(cut), np.arange(cut, 4)):
            part = {name: take(column, rows) for name, column in columns.items()}
            writer.append(part, [f"id{row}" for row in rows], content_digests(part))
        names.append(writer.close())
        writer.discard()
    assert names[0] == names[1]
    assert [path.name for path in tmp_path.iterdir()] == [names[0]]
    np.testing.assert_array_equal(np.load(tmp_path / names[0] / "x.npy"), columns["x"])
    np.testing.assert_array_equal(np.load(tmp_path / names[0] / "text.values.npy"), columns["text"].values)
    np.testing.assert_array_equal(np.load(tmp_path / names[0] / "text.offsets.npy"), columns["text"].offsets)


def test_arrays_may_lie_in_memory_in_any_order(tmp_path):
    values = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    writer = SegmentWriter(tmp_path, (ColumnLayout.of("x", values),))
    for part in (np.asfortranarray(values), values[::-1, :, ::-1]):
        writer.append({"x": part}, ["a", "b"], [b"0" * 16] * 2)
    name = writer.close()
    np.testing.assert_array_equal(np.load(tmp_path / name / "x.npy"), np.concatenate([values, values[::-1, :, ::-1]]))


def test_a_segment_is_on_disk_before_it_has_its_name(tmp_path, system_calls):
    script = """
import sys
from pathlib import Path
import numpy as np
from kdpipe.data.columns import Ragged
from kdpipe.data.prepared import ColumnLayout
from kdpipe.data.segments import SegmentWriter
columns = {"x": np.zeros((1, 2)), "text": Ragged(values=np.zeros(3, np.uint8), offsets=np.array([0, 3]))}
writer = SegmentWriter(Path(sys.argv[1]), tuple(ColumnLayout.of(*each) for each in columns.items()))
writer.append(columns, ["a"], [b"0" * 16])
writer.close()
"""
    calls = system_calls(script, tmp_path, within=tmp_path)
    files = ("rows.parquet", "text.offsets.npy", "text.values.npy", "x.npy")
    assert sorted(calls[:4]) == [f"fsync {tmp_path}/segment.tmp/{name}" for name in files]
    assert calls[4:] == [f"fsync {tmp_path}/segment.tmp", f"rename {tmp_path}/segment.tmp", f"fsync {tmp_path}"]


def test_a_discarded_segment_leaves_nothing(tmp_path):
    writer = SegmentWriter(tmp_path, (ColumnLayout.of("x", np.zeros((1, 2))),))
    writer.append({"x": np.ones((3, 2))}, ["a", "b", "c"], [b"0" * 16] * 3)
    writer.discard()
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_nothing(small_disk):
    """The disk is full while the ids of a row group are written."""
    writer = SegmentWriter(small_disk, (ColumnLayout.of("x", np.zeros((1, 1), np.uint8)),))
    ids = [os.urandom(20).hex() for _ in range(ROW_GROUP)]
    with pytest.raises(OSError, match="No space left"):
        writer.append({"x": np.zeros((ROW_GROUP, 1), np.uint8)}, ids, [os.urandom(16) for _ in ids])
    writer.discard()
    assert list(small_disk.iterdir()) == []


def test_rows_beyond_a_row_group_come_back_in_order(tmp_path):
    count = 2 * ROW_GROUP + 3
    ids = [f"row {index}" for index in range(count)]
    names = []
    for block in (5000, count):
        writer = SegmentWriter(tmp_path, (ColumnLayout.of("x", np.zeros(1, np.int32)),))
        for start in range(0, count, block):
            part = np.arange(start, min(start + block, count), dtype=np.int32)
            writer.append({"x": part}, ids[start : start + block], [int(row).to_bytes(16, "little") for row in part])
        names.append(writer.close())
    rows = pq.read_table(tmp_path / names[0] / "rows.parquet")
    assert names[0] == names[1]
    assert rows["sample_id"].to_pylist() == ids
    assert [int.from_bytes(each, "little") for each in rows["digest"].to_pylist()] == list(range(count))
