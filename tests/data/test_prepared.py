from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdpipe.data import prepared
from kdpipe.data.columns import Ragged
from kdpipe.data.prepared import ColumnLayout, PreparedData, PreparedInputs, digest_split
from kdpipe.data.preparing import RowSchema, SourceColumns, SplitPlan, column_of, prepare
from kdpipe.data.segments import SegmentWriter
from kdpipe.errors import DataError

SEGMENT_ROWS = (4, 1, 7, 3)
NUM_ROWS = sum(SEGMENT_ROWS)
PIXELS = np.random.default_rng(0).integers(0, 256, (NUM_ROWS, 2, 3, 1), np.uint8)
TEXTS = [f"{'é' * (i % 4)}{i}" if i % 5 else "" for i in range(NUM_ROWS)]
LABELS = [None if i % 3 == 0 else i % 4 for i in range(NUM_ROWS)]
SPLITS = ["train" if i % 2 else ("test" if i % 4 else None) for i in range(NUM_ROWS)]


class Blocks:
    """The first `stop` rows, in blocks of two."""

    def __init__(self, stop):
        self._table = pa.table(
            {"id": [f"r{i}" for i in range(stop)], "label": pa.array(LABELS[:stop], pa.int64()), "split": SPLITS[:stop]}
        )

    def batches(self):
        yield from self._table.to_batches(max_chunksize=2)


def to_inputs(batch, name_of):
    numbers = [int(key[1:]) for key in column_of(batch, "id").to_pylist()]
    texts = [TEXTS[number].encode() for number in numbers]
    return {
        "pixels": PIXELS[numbers],
        "weight": np.array(numbers, np.float64) / 7,
        "text": Ragged(
            values=np.frombuffer(b"".join(texts), np.uint8), offsets=np.cumsum([0, *map(len, texts)]).astype(np.int64)
        ),
    }


def to_labels(values, name_of):
    return values.fill_null(-1).to_numpy(zero_copy_only=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Rows in four segments."""
    folder = tmp_path_factory.mktemp("data") / "prepared"
    columns = SourceColumns(id="id", label="label", split="split")
    schema = RowSchema(to_inputs=to_inputs, to_labels=to_labels)
    for stop in np.cumsum(SEGMENT_ROWS):
        prepare(Blocks(int(stop)), schema, columns, SplitPlan(), folder)
    return folder


def assert_rows(columns, rows):
    np.testing.assert_array_equal(columns["pixels"], PIXELS[rows])
    np.testing.assert_array_equal(columns["weight"], np.array(rows, np.float64) / 7)
    assert [columns["text"].row(i).tobytes().decode() for i in range(len(rows))] == [TEXTS[row] for row in rows]
    assert len(columns["text"]) == len(rows)
    assert (columns["pixels"].dtype, columns["weight"].dtype) == (np.uint8, np.float64)


def test_there_are_several_segments(folder):
    manifest = json.loads((folder / "inputs" / "manifest.json").read_text())
    assert [segment["rows"] for segment in manifest["segments"]] == list(SEGMENT_ROWS)
    assert len(PreparedInputs(folder / "inputs")) == NUM_ROWS


@given(rows=st.lists(st.integers(0, NUM_ROWS - 1), max_size=30))
def test_read_gives_any_rows_in_any_order_with_repeats(folder, rows):
    assert_rows(PreparedInputs(folder / "inputs").read(np.array(rows, np.int64)), rows)


def test_one_reader_reads_again_and_again(folder):
    inputs = PreparedInputs(folder / "inputs")
    for seed in range(5):
        rows = np.random.default_rng(seed).permutation(NUM_ROWS)[: 1 + 3 * seed]
        assert_rows(inputs.read(rows), rows.tolist())


def test_what_was_read_can_be_changed_without_changing_the_files(folder):
    inputs = PreparedInputs(folder / "inputs")
    rows = np.arange(NUM_ROWS)
    for columns in (inputs.read(rows), inputs.read(rows[:3])):
        columns["pixels"][:] = 0
        columns["weight"][:] = -1
    assert_rows(inputs.read(rows), rows.tolist())


def resident_bytes(path):
    """Bytes of a mapped file that count as this process's memory."""
    maps = Path("/proc/self/smaps")
    if not maps.is_file():
        pytest.skip("needs Linux's /proc")
    found = re.findall(rf"{re.escape(str(path.resolve()))}\n(?:\w+: .*\n)*?Rss: +(\d+) kB", maps.read_text())
    return sum(map(int, found)) * 1024


@pytest.mark.parametrize("limit", [2**20, 2**40])
def test_a_long_pass_lets_go_of_what_it_has_read(tmp_path, monkeypatch, limit):
    monkeypatch.setattr(prepared, "_RESIDENT_BYTES", limit)
    writer = SegmentWriter(tmp_path, (ColumnLayout(name="x", kind="fixed", dtype="<f4", shape=(256,)),))
    values = np.arange(2**14 * 256, dtype=np.float32).reshape(-1, 256)  # 16 MiB
    ids = [f"{i}" for i in range(len(values))]
    writer.append({"x": values}, ids, [bytes(16)] * len(values))
    name = writer.close()
    segments = [{"name": name, "rows": len(values)}]
    columns = [each.to_json() for each in writer.layouts]
    manifest = {"format_version": prepared.FORMAT_VERSION, "columns": columns, "segments": segments}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    inputs = PreparedInputs(tmp_path)
    for start in range(0, len(values), 512):
        rows = np.arange(start, start + 512)
        np.testing.assert_array_equal(inputs.read(rows)["x"], values[rows])
    kept = resident_bytes(tmp_path / name / "x.npy")
    assert kept < 2**21 if limit == 2**20 else kept > 2**23


def test_ids_digests_labels_and_splits_are_in_row_order(folder):
    data = PreparedData(folder)
    assert [each.partition("-")[0] for each in data.inputs.sample_ids.tolist()] == [f"r{i}" for i in range(NUM_ROWS)]
    for sample_id, digest in zip(data.inputs.sample_ids.tolist(), data.inputs.digests, strict=True):
        assert bytes(digest).hex().startswith(sample_id.partition("-")[2])
    assert data.inputs.digests.shape == (NUM_ROWS, 16)
    assert data.inputs.id_column().to_pylist() == data.inputs.sample_ids.tolist()
    assert data.labels.tolist() == [-1 if label is None else label for label in LABELS]
    assert data.split_names == ["test", "train"]


def test_rows_of_splits_ascend_and_unused_rows_are_in_none(folder):
    data = PreparedData(folder)
    train = [i for i, split in enumerate(SPLITS) if split == "train"]
    either = [i for i, split in enumerate(SPLITS) if split]
    assert data.rows_of(["train"]).tolist() == train
    assert data.rows_of(["train", "test"]).tolist() == data.rows_of(["test", "train"]).tolist() == either


@pytest.mark.parametrize("name", ["transfer", ""])
def test_a_split_without_rows_lists_the_choices(folder, name):
    with pytest.raises(DataError, match=rf"split '{name}' has no rows; the splits here are test, train"):
        PreparedData(folder).rows_of(["train", name])


@given(data=st.data())
def test_the_digest_of_a_split_does_not_depend_on_the_order_of_rows(folder, data):
    inputs, labels = PreparedInputs(folder / "inputs"), np.arange(NUM_ROWS)
    rows = np.array(data.draw(st.lists(st.integers(0, NUM_ROWS - 1), unique=True, min_size=1)), np.int64)
    shuffled = np.array(data.draw(st.permutations(rows.tolist())), np.int64)
    assert digest_split(inputs, labels, rows) == digest_split(inputs, labels, shuffled)
    others = np.setdiff1d(np.arange(NUM_ROWS), rows)
    if len(others):
        assert digest_split(inputs, labels, rows) != digest_split(inputs, labels, np.append(rows[1:], others[0]))
    relabelled = labels.copy()
    relabelled[rows[0]] += 1
    assert digest_split(inputs, labels, rows) != digest_split(inputs, relabelled, rows)


def test_labelled_rows_of_a_split_are_counted(folder):
    data = PreparedData(folder)
    rows = data.rows_of(["train"])
    _, counts = digest_split(data.inputs, data.labels, rows)
    labelled = [i for i in rows.tolist() if LABELS[i] is not None]
    assert counts == {"rows": len(rows), "labelled": len(labelled)}


@pytest.mark.parametrize(
    ("column", "expected"),
    [
        (np.zeros((5, 2, 3), np.float32), ColumnLayout(name="x", kind="fixed", dtype="<f4", shape=(2, 3))),
        (
            Ragged(values=np.zeros((5, 2), np.int16), offsets=np.array([0, 5])),
            ColumnLayout(name="x", kind="ragged", dtype="<i2", shape=(2,)),
        ),
    ],
)
def test_a_layout_says_what_the_column_is(column, expected):
    assert ColumnLayout.of("x", column) == expected
    assert ColumnLayout.from_json(json.loads(json.dumps(expected.to_json()))) == expected


def test_a_ragged_column_of_empty_rows_can_be_read(tmp_path):
    def nothing(batch, name_of):
        return {"text": Ragged(values=np.empty(0, np.uint8), offsets=np.zeros(batch.num_rows + 1, np.int64))}

    schema = RowSchema(to_inputs=nothing, to_labels=to_labels)
    prepare(Blocks(4), schema, SourceColumns(id="id", split="split"), SplitPlan(), tmp_path)
    columns = PreparedInputs(tmp_path / "inputs").read(np.array([3, 0]))
    assert [columns["text"].row(i).size for i in range(2)] == [0, 0]


def test_where_nothing_was_prepared_the_command_is_named(tmp_path):
    with pytest.raises(DataError, match=r"no prepared inputs in .*inputs\. Run `kdpipe prepare-data`"):
        PreparedData(tmp_path)


def test_inputs_of_another_format_are_refused(tmp_path):
    (tmp_path / "inputs").mkdir()
    (tmp_path / "inputs" / "manifest.json").write_text('{"format_version": 99}')
    with pytest.raises(DataError, match="has format version 99; this kdpipe reads 1"):
        PreparedInputs(tmp_path / "inputs")
