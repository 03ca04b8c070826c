from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdpipe.data.columns import Ragged
from kdpipe.data.prepared import PreparedData
from kdpipe.data.preparing import RowSchema, SourceColumns, SplitPlan, column_of, prepare
from kdpipe.data.sources import Table
from kdpipe.data.sources.base import BLOCK_BYTES
from kdpipe.errors import DataError

COLUMNS = SourceColumns(id="key", label="label", split="split")
BY_CONTENT = SourceColumns(label="label", split="split")


def to_inputs(batch, name_of):
    """A fixed column and a ragged one; negative numbers are no rows."""
    numbers = column_of(batch, "number").to_numpy()
    for position in np.flatnonzero(numbers < 0):
        raise DataError(f"{name_of(int(position))} is negative")
    texts = [text.encode() for text in column_of(batch, "text").to_pylist()]
    offsets = np.cumsum([0, *map(len, texts)]).astype(np.int64)
    return {"number": numbers, "text": Ragged(values=np.frombuffer(b"".join(texts), np.uint8), offsets=offsets)}


def to_labels(values, name_of):
    return values.cast(pa.int64()).fill_null(-1).to_numpy(zero_copy_only=False)


SCHEMA = RowSchema(to_inputs=to_inputs, to_labels=to_labels)


def row(key, number=None, label=0, split="train"):
    number = int(key.strip("k")) if number is None else number
    return {"key": key, "number": number, "text": "x" * (number % 4) + str(number), "label": label, "split": split}


def rows(count, start=0, **changes):
    return [row(f"k{i}", **changes) for i in range(start, start + count)]


FIELDS = {
    "key": pa.string(),
    "number": pa.int64(),
    "text": pa.string(),
    "label": pa.int64(),
    "split": pa.string(),
}


def prepare_rows(folder, source_rows, columns=COLUMNS, plan=None, batch_rows=3):
    """Prepare rows through a real Parquet file."""
    path = folder.parent / "source.parquet"
    path.parent.mkdir(exist_ok=True)
    pq.write_table(pa.Table.from_pylist(source_rows, pa.schema(FIELDS)), path)
    return prepare(Table(path, batch_rows=batch_rows), SCHEMA, columns, plan or SplitPlan(), folder)


def table_of(folder):
    """What is prepared, row by row: (key, number, text, label, split)."""
    data = PreparedData(folder)
    everything = data.inputs.read(np.arange(len(data.inputs)))
    splits = pq.read_table(folder / "labels" / "labels.parquet")["split"].to_pylist()
    return [
        (
            str(data.inputs.sample_ids[i]).rpartition("-")[0],
            int(everything["number"][i]),
            everything["text"].row(i).tobytes().decode(),
            int(data.labels[i]),
            splits[i],
        )
        for i in range(len(data.inputs))
    ]


def as_prepared(each):
    label = -1 if each["label"] is None else each["label"]
    return (each["key"], each["number"], each["text"], label, each["split"])


def files_of(folder):
    """Every file's bytes and inode."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_ino) for path in paths}


def contents_of(folder):
    return {name: content for name, (content, _) in files_of(folder).items()}


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "prepared"


# Rows keep their numbers


def test_a_first_preparation_holds_the_source_in_order(folder):
    source = [row("k0"), row("k1", label=None, split="test"), row("k2", label=4, split=None), row("k3")]
    done = prepare_rows(folder, source)
    assert table_of(folder) == [as_prepared(each) for each in source]
    assert (done.num_rows, done.num_new) == (4, 4)
    assert done.splits == {"train": {"rows": 2, "labelled": 2}, "test": {"rows": 1, "labelled": 0}}


def test_a_reordered_source_changes_no_row(folder):
    prepare_rows(folder, rows(7))
    before = files_of(folder / "inputs"), contents_of(folder)
    assert prepare_rows(folder, rows(7)[::-1]).num_new == 0
    assert (files_of(folder / "inputs"), contents_of(folder)) == before


def test_new_rows_are_appended_wherever_they_stand_in_the_source(folder):
    prepare_rows(folder, rows(4))
    done = prepare_rows(folder, [*rows(2, start=8), *rows(4), *rows(1, start=5)])
    assert (done.num_rows, done.num_new) == (7, 3)
    assert [key for key, *_ in table_of(folder)] == ["k0", "k1", "k2", "k3", "k8", "k9", "k5"]


def test_an_edited_row_is_a_new_row_and_its_old_self_loses_split_and_label(folder):
    prepare_rows(folder, rows(3))
    edited = [row("k0"), row("k1", number=77, label=5), row("k2")]
    assert prepare_rows(folder, edited).num_new == 1
    old = (*as_prepared(row("k1"))[:3], -1, None)
    assert table_of(folder) == [as_prepared(row("k0")), old, as_prepared(row("k2")), as_prepared(edited[1])]


def test_a_row_edited_back_is_its_old_self_again(folder):
    prepare_rows(folder, rows(3))
    prepare_rows(folder, [row("k0"), row("k1", number=77), row("k2")])
    assert prepare_rows(folder, rows(3)).num_new == 0
    assert table_of(folder)[:3] == [as_prepared(each) for each in rows(3)]
    assert table_of(folder)[3][3:] == (-1, None)


def test_a_removed_row_keeps_its_number_and_loses_its_split(folder):
    prepare_rows(folder, rows(4))
    prepare_rows(folder, [row("k3"), row("k0")])
    assert [(key, split) for key, _, _, _, split in table_of(folder)] == [
        ("k0", "train"),
        ("k1", None),
        ("k2", None),
        ("k3", "train"),
    ]


VERSIONS = st.lists(
    st.dictionaries(
        st.integers(0, 5),
        st.tuples(st.integers(0, 2), st.one_of(st.none(), st.integers(0, 3)), st.sampled_from(["train", "test"])),
        min_size=1,
    ).flatmap(lambda version: st.permutations(sorted(version.items()))),
    min_size=1,
    max_size=4,
)


@settings(max_examples=15)
@given(VERSIONS, st.integers(1, 4))
def test_whatever_a_source_goes_through_rows_are_appended_only(versions, batch_rows):
    """Against a model: a list of (key, content), started anew by a source that shares nothing with it."""
    known = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "prepared"
        for version in versions:
            source = [
                row(f"k{key}", number=10 * key + edition, label=label, split=split)
                for key, (edition, label, split) in version
            ]
            prepare_rows(folder, source, batch_rows=batch_rows)
            now = {as_prepared(each)[:3]: as_prepared(each) for each in source}
            if not any(each in now for each in known):
                known = []
            known += [each for each in now if each not in known]
            assert table_of(folder) == [now.get(each, (*each, -1, None)) for each in known]


def test_preparing_again_changes_no_byte_and_no_file_of_the_inputs(folder):
    prepare_rows(folder, rows(5))
    prepare_rows(folder, rows(8))
    before, everything = files_of(folder / "inputs"), contents_of(folder)
    assert prepare_rows(folder, rows(8)).num_new == 0
    assert files_of(folder / "inputs") == before
    assert contents_of(folder) == everything


def test_growth_leaves_the_files_of_earlier_rows_alone(folder):
    prepare_rows(folder, rows(5))
    before = files_of(folder / "inputs")
    prepare_rows(folder, rows(8))
    after = files_of(folder / "inputs")
    del before["manifest.json"]
    assert {name: after[name] for name in before} == before


@pytest.mark.parametrize("batch_rows", [1, 4, 100])
def test_bytes_do_not_depend_on_the_blocks(tmp_path, batch_rows):
    for name, size in (("one", batch_rows), ("other", 5)):
        prepare_rows(tmp_path / name / "prepared", rows(11), batch_rows=size)
    assert contents_of(tmp_path / "one" / "prepared") == contents_of(tmp_path / "other" / "prepared")


def test_a_source_with_no_known_row_starts_anew(folder):
    prepare_rows(folder, rows(5))
    prepare_rows(folder, rows(6))
    done = prepare_rows(folder, rows(3, start=20))
    assert (done.num_rows, done.num_new) == (3, 3)
    assert table_of(folder) == [as_prepared(each) for each in rows(3, start=20)]
    assert len(list((folder / "inputs").glob("segment-*"))) == 1


def test_another_row_schema_starts_anew(folder):
    prepare_rows(folder, rows(3))

    def narrower(batch, name_of):
        return {"number": column_of(batch, "number").to_numpy().astype(np.int16)}

    source = Table(folder.parent / "source.parquet")
    done = prepare(source, RowSchema(to_inputs=narrower, to_labels=to_labels), COLUMNS, SplitPlan(), folder)
    assert (done.num_rows, done.num_new) == (3, 3)
    assert PreparedData(folder).inputs.read(np.arange(3))["number"].dtype == np.int16


def test_without_a_key_the_content_is_the_id(folder):
    prepare_rows(folder, rows(3), BY_CONTENT)
    ids = PreparedData(folder).inputs.sample_ids.tolist()
    assert prepare_rows(folder, [*rows(3), row("k9")][::-1], BY_CONTENT).num_new == 1
    data = PreparedData(folder)
    assert data.inputs.sample_ids.tolist()[:3] == ids
    assert [bytes(each).hex() for each in data.inputs.digests[:3]] == ids


def test_rows_of_one_content_are_two_rows_where_they_have_keys(folder):
    prepare_rows(folder, [row("a", number=1), row("b", number=1)])
    data = PreparedData(folder)
    assert len(set(data.inputs.sample_ids.tolist())) == 2
    assert np.array_equal(data.inputs.digests[0], data.inputs.digests[1])


def test_keys_may_be_numbers(folder):
    source = pa.table({"key": [3, 1], "number": [5, 6], "text": ["", ""], "label": [0, 0], "split": ["a", "a"]})
    pq.write_table(source, folder.parent / "source.parquet")
    prepare(Table(folder.parent / "source.parquet"), SCHEMA, COLUMNS, SplitPlan(), folder)
    assert [key for key, *_ in table_of(folder)] == ["3", "1"]


def test_blocks_without_rows_are_no_matter(folder):
    class Source:
        def batches(self):
            for block in ([], rows(1), [], rows(1, start=1)):
                yield pa.RecordBatch.from_pylist(block, pa.schema(FIELDS))

    def stacking(batch, name_of):
        return {"number": np.stack([np.array(value.as_py()) for value in column_of(batch, "number")])}

    schema = RowSchema(to_inputs=stacking, to_labels=to_labels)
    assert prepare(Source(), schema, COLUMNS, SplitPlan(), folder).num_rows == 2


def test_rows_that_grow_while_they_are_prepared_come_in_small_blocks(folder):
    """One batch of small rows, as of images that are well compressed."""
    sizes = []

    def unpacked(batch, name_of):
        sizes.append(batch.num_rows)
        return {
            "pixels": np.broadcast_to(column_of(batch, "number").to_numpy()[:, None], (batch.num_rows, 2**12)).copy()
        }

    class OneBatch:
        def batches(self):
            yield pa.Table.from_pylist(rows(500), pa.schema(FIELDS)).combine_chunks().to_batches()[0]

    schema = RowSchema(to_inputs=unpacked, to_labels=to_labels)
    assert prepare(OneBatch(), schema, COLUMNS, SplitPlan(), folder).num_rows == 500
    assert max(sizes[1:]) * 2**12 * 8 <= BLOCK_BYTES
    assert PreparedData(folder).inputs.read(np.array([499]))["pixels"][0, 0] == 499


# Labels


def test_labels_may_be_missing_here_and_there_or_everywhere(folder):
    prepare_rows(folder, [row("k0", label=None), row("k1", label=2)])
    assert PreparedData(folder).labels.tolist() == [-1, 2]
    assert pq.read_table(folder / "labels" / "labels.parquet")["label"].to_pylist() == [None, 2]
    prepare_rows(folder, rows(2), SourceColumns(id="key", split="split"))
    assert PreparedData(folder).labels.tolist() == [-1, -1]


def test_classes_are_counted_per_split(folder):
    labels = [1, 1, 0, None, 2]
    source = [row(f"k{i}", label=label, split="train" if i < 4 else "test") for i, label in enumerate(labels)]
    prepare_rows(folder, source)
    classes = json.loads((folder / "labels" / "classes.json").read_text())
    assert classes == {"test": {"2": 1}, "train": {"0": 1, "1": 2}}


def test_a_new_label_changes_no_row(folder):
    prepare_rows(folder, rows(3))
    before = files_of(folder / "inputs")
    prepare_rows(folder, rows(3, label=2))
    assert files_of(folder / "inputs") == before
    assert PreparedData(folder).labels.tolist() == [2, 2, 2]


# Split files


def three_splits():
    return [*rows(3, split="train"), *rows(3, start=3, split="test"), *rows(2, start=6, split="transfer")]


def changed_splits(folder, source):
    """Names of the splits whose file is other, new or gone after preparing `source`."""
    before = contents_of(folder / "splits")
    prepare_rows(folder, source)
    after = contents_of(folder / "splits")
    return {name.removesuffix(".json") for name in before.keys() | after.keys() if before.get(name) != after.get(name)}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        pytest.param(lambda source: source[::-1], set(), id="reordered"),
        pytest.param(lambda source: [{**source[0], "label": 3}, *source[1:]], {"train"}, id="relabelled"),
        pytest.param(lambda source: [{**source[0], "label": None}, *source[1:]], {"train"}, id="label lost"),
        pytest.param(lambda source: [*source[:4], {**source[4], "text": "?"}, *source[5:]], {"test"}, id="edited"),
        pytest.param(lambda source: [*source, row("k9", split="transfer")], {"transfer"}, id="grown"),
        pytest.param(lambda source: source[1:], {"train"}, id="removed"),
        pytest.param(lambda source: [*source, row("k9", split=None)], set(), id="grown outside of splits"),
        pytest.param(lambda source: [*source, row("k9", split="new")], {"new"}, id="new split"),
        pytest.param(lambda source: source[:6], {"transfer"}, id="split gone"),
        pytest.param(
            lambda source: [{**source[0], "split": "test"}, *source[1:]], {"train", "test"}, id="moved between splits"
        ),
        pytest.param(
            lambda source: [{**source[0], "key": "other"}, *source[1:]], {"train"}, id="same content under another id"
        ),
    ],
)
def test_a_split_file_changes_only_with_its_own_rows(folder, change, expected):
    prepare_rows(folder, three_splits())
    assert changed_splits(folder, change(three_splits())) == expected


def test_split_files_are_those_of_a_clone_with_another_history(tmp_path):
    grown, fresh = tmp_path / "one" / "prepared", tmp_path / "other" / "prepared"
    prepare_rows(grown, three_splits()[4:])
    prepare_rows(grown, [*three_splits()[2:], row("k1", number=99)])
    prepare_rows(grown, three_splits())
    prepare_rows(fresh, three_splits())
    assert contents_of(grown / "splits") == contents_of(fresh / "splits")
    assert [key for key, *_ in table_of(grown)] != [key for key, *_ in table_of(fresh)]


def test_a_split_file_says_what_the_prepared_rows_say(folder):
    done = prepare_rows(folder, three_splits())
    data = PreparedData(folder)
    assert data.split_names == ["test", "train", "transfer"]
    for name in data.split_names:
        content = json.loads((folder / "splits" / f"{name}.json").read_text())
        assert content == {"split": name, **done.splits[name], "digest": data.split_digest(name)}


# Shares and validation


NO_SPLIT = SourceColumns(id="key", label="label")


def splits_by_key(folder):
    return {key: split for key, _, _, _, split in table_of(folder) if split is not None}


def test_shares_are_drawn_by_id_and_do_not_move_under_growth(folder):
    plan = SplitPlan(shares={"train": 0.7, "validation": 0.1, "test": 0.2})
    prepare_rows(folder, rows(300), NO_SPLIT, plan, batch_rows=1000)
    before = splits_by_key(folder)
    counts = {name: list(before.values()).count(name) for name in plan.shares}
    assert sum(counts.values()) == 300
    assert {name: abs(counts[name] - 300 * share) < 30 for name, share in plan.shares.items()} == dict.fromkeys(
        plan.shares, True
    )
    prepare_rows(folder, [*rows(100, start=300), *rows(300)[::-1]], NO_SPLIT, plan, batch_rows=1000)
    after = splits_by_key(folder)
    assert len(after) == 400
    assert {key: after[key] for key in before} == before


def test_another_seed_draws_other_splits(folder):
    drawn = []
    for seed in (0, 1):
        plan = SplitPlan(shares={"train": 0.5, "test": 0.5}, seed=seed)
        prepare_rows(folder, rows(50), NO_SPLIT, plan, batch_rows=1000)
        drawn.append(splits_by_key(folder))
    assert drawn[0] != drawn[1]


def test_rows_that_the_source_no_longer_has_get_no_share(folder):
    plan = SplitPlan(shares={"train": 0.5, "test": 0.5})
    prepare_rows(folder, rows(4), NO_SPLIT, plan)
    prepare_rows(folder, [row("k0"), row("k1", number=70), row("k2")], NO_SPLIT, plan)
    assert [(number, split is None) for _, number, _, _, split in table_of(folder)] == [
        (0, False),
        (1, True),
        (2, False),
        (3, True),
        (70, False),
    ]


@pytest.mark.parametrize(
    "shares", [{}, {"train": 0.5}, {"train": 0.9, "test": 0.2}, {"train": 1.5, "test": -0.5}], ids=str
)
def test_shares_that_are_no_shares_are_refused(folder, shares):
    with pytest.raises(DataError, match=r"data\.splits\.shares must be shares from 0 to 1 whose sum is 1"):
        prepare_rows(folder, rows(3), NO_SPLIT, SplitPlan(shares=shares))


def test_validation_is_carved_from_one_split_and_does_not_move_under_growth(folder):
    plan = SplitPlan(validation_fraction=0.2)
    source = [*rows(150), *rows(50, start=500, split="test")]
    prepare_rows(folder, source, plan=plan, batch_rows=1000)
    before = splits_by_key(folder)
    validation = {key for key, split in before.items() if split == "validation"}
    assert 15 < len(validation) < 45
    assert all(int(key[1:]) < 150 for key in validation)
    assert sum(split == "test" for split in before.values()) == 50
    prepare_rows(folder, [*rows(60, start=200), *source[::-1]], plan=plan, batch_rows=1000)
    after = splits_by_key(folder)
    assert {key: after[key] for key in before} == before
    assert any(after[f"k{i}"] == "validation" for i in range(200, 260))


def test_nothing_is_carved_where_the_source_has_validation_rows(folder):
    source = [*rows(40), row("k99", split="validation")]
    prepare_rows(folder, source, plan=SplitPlan(validation_fraction=0.5))
    assert splits_by_key(folder) == {each["key"]: each["split"] for each in source}


def test_validation_may_be_carved_from_a_split_of_another_name(folder):
    source = [*rows(40, split="fit"), *rows(10, start=100)]
    prepare_rows(folder, source, plan=SplitPlan(validation_fraction=0.5, carve_from="fit"))
    assert {split for key, split in splits_by_key(folder).items() if int(key[1:]) < 40} == {"fit", "validation"}
    assert {split for key, split in splits_by_key(folder).items() if int(key[1:]) >= 100} == {"train"}


# What is refused, and what a failure leaves


def broken_by(change):
    """The second block of three rows is broken."""
    source = rows(9)
    source[4] = {**source[4], **change}
    return source


BROKEN = {
    "duplicate id": (broken_by({"key": "k1"}), COLUMNS, SplitPlan(), "row 1 and row 4 (id k1) have the same id"),
    "duplicate content": (
        broken_by({"number": 1, "text": "x1"}),
        BY_CONTENT,
        SplitPlan(),
        "row 1 and row 4 have the same content",
    ),
    "no id": (broken_by({"key": None}), COLUMNS, SplitPlan(), "it is empty in row 4"),
    "empty id": (broken_by({"key": ""}), COLUMNS, SplitPlan(), "it is empty in row 4"),
    "bad content": (broken_by({"number": -1}), COLUMNS, SplitPlan(), "row 4 (id k4) is negative"),
    "id column": (rows(9), SourceColumns(id="name"), SplitPlan(shares={"a": 1}), "there is no column 'name'"),
    "label column": (rows(9), SourceColumns(label="class"), SplitPlan(shares={"a": 1}), "there is no column 'class'"),
    "split column": (
        rows(9),
        SourceColumns(split="part"),
        SplitPlan(),
        "there is no column 'part'; the source has key, number, text, label, split",
    ),
    "no rows": ([], COLUMNS, SplitPlan(), "the source has no rows"),
    "no splits": (rows(9, split=""), COLUMNS, SplitPlan(), "no row has a split"),
    "split that is no name": (
        rows(9, split="../up"),
        COLUMNS,
        SplitPlan(),
        "the split '../up' cannot be a file's name",
    ),
    "nothing to carve": (
        rows(9),
        COLUMNS,
        SplitPlan(validation_fraction=0.1, carve_from="fit"),
        "taking 0.1 of the 0 rows of split 'fit' as validation takes 0",
    ),
    "carved from no split": (
        rows(9),
        COLUMNS,
        SplitPlan(validation_fraction=0.1, carve_from="fit"),
        "is empty. Change data.splits.carve_from; there are train.",
    ),
    "everything carved": (
        rows(9),
        COLUMNS,
        SplitPlan(validation_fraction=0.999999),
        "of the 9 rows of split 'train' as validation takes 9",
    ),
    "shares": (rows(9), NO_SPLIT, SplitPlan(shares={"a": 0.3}), "found {'a': 0.3}"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_source_is_an_error_that_names_rows_and_leaves_what_was_there(folder, what):
    source, columns, plan, message = BROKEN[what]
    prepare_rows(folder, rows(4))
    before = files_of(folder)
    with pytest.raises(DataError) as caught:
        prepare_rows(folder, source, columns, plan)
    assert message in str(caught.value)
    assert files_of(folder) == before
    assert table_of(folder) == [as_prepared(each) for each in rows(4)]


def test_a_broken_source_leaves_nothing_where_nothing_was(folder):
    source, columns, plan, _ = BROKEN["duplicate id"]
    with pytest.raises(DataError):
        prepare_rows(folder, source, columns, plan)
    assert files_of(folder) == {}
    with pytest.raises(DataError, match="kdpipe prepare-data"):
        PreparedData(folder)


def test_long_lists_of_rows_are_cut_short(folder):
    with pytest.raises(DataError, match=r"it is empty in row 0, row 1, row 2, row 3, row 4 and 3 more$"):
        prepare_rows(folder, [row("", number=i) for i in range(8)], batch_rows=8)


@pytest.mark.parametrize(
    ("types", "message"),
    [
        ([np.int64, np.int32, np.int32], "new rows have the columns"),
        ([np.int64, np.int64, np.int32], "column 'number' changes its layout within the source"),
    ],
)
def test_rows_of_another_layout_are_refused(folder, types, message):
    prepare_rows(folder, rows(3))
    before = files_of(folder)
    type_of_block = iter(types)

    def changing(batch, name_of):
        columns = to_inputs(batch, name_of)
        return {**columns, "number": columns["number"].astype(next(type_of_block))}

    path = folder.parent / "source.parquet"
    pq.write_table(pa.Table.from_pylist(rows(9), pa.schema(FIELDS)), path)
    with pytest.raises(DataError, match=message):
        prepare(
            Table(path, batch_rows=3), RowSchema(to_inputs=changing, to_labels=to_labels), COLUMNS, SplitPlan(), folder
        )
    assert files_of(folder) == before


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (pa.array([[1], [2]]), "column 'key' has type list<element: int64>; expected text or numbers"),
        (pa.array([b"\xff", b"a"]), "column 'key' has type binary; expected text or numbers"),
        (pa.array([1.0, 1e23]), "column 'key' has type double and numbers that are not finite, or so large"),
        (pa.array([123456789.0, 1.0], pa.float32()), "look alike (from 16777216 on). Write them as text"),
        (pa.array([float("nan"), 1.0]), "column 'key' has type double and numbers that are not finite"),
    ],
)
def test_a_key_that_is_no_text_is_refused(folder, keys, message):
    table = pa.table({"key": keys, "number": [1, 2], "text": ["", ""], "label": [0, 0], "split": ["a", "a"]})
    pq.write_table(table, folder.parent / "source.parquet")
    with pytest.raises(DataError) as caught:
        prepare(Table(folder.parent / "source.parquet"), SCHEMA, COLUMNS, SplitPlan(), folder)
    assert message in str(caught.value)


def test_two_columns_of_one_name_are_refused(folder):
    (folder.parent / "source.csv").write_text("key,number,number,text,label,split\n1,2,3,x,0,train\n")
    with pytest.raises(DataError, match="there are 2 columns 'number'; the source has key, number, number, text"):
        prepare(Table(folder.parent / "source.csv"), SCHEMA, COLUMNS, SplitPlan(), folder)


def test_a_full_disk_leaves_what_was_there(small_disk):
    folder = small_disk / "prepared"
    prepare_rows(folder, rows(20))
    before, expected = files_of(folder), table_of(folder)
    big = [{**row(f"k{i}"), "text": os.urandom(2000).hex()} for i in range(20, 220)]
    source = folder.parent / "source.parquet"
    table = pa.Table.from_pylist([*rows(20), *big], pa.schema(FIELDS))

    class InMemory:
        def batches(self):
            yield from table.to_batches(max_chunksize=5)

    source.unlink()
    with pytest.raises(OSError, match="No space left"):
        prepare(InMemory(), SCHEMA, COLUMNS, SplitPlan(), folder)
    assert files_of(folder) == before
    assert table_of(folder) == expected


def test_inputs_of_a_new_source_never_meet_the_labels_of_the_old_one(folder):
    """Writing the labels fails, after the inputs were replaced by as many other rows."""
    prepare_rows(folder, rows(3))
    (folder / "labels" / "labels.parquet.tmp").mkdir()
    with pytest.raises(OSError, match=r"labels\.parquet\.tmp"):
        prepare_rows(folder, rows(3, start=10, label=1))
    with pytest.raises(DataError, match=r"no labels in .*kdpipe prepare-data"):
        PreparedData(folder)
    (folder / "labels" / "labels.parquet.tmp").rmdir()
    prepare_rows(folder, rows(3, start=10, label=1))
    assert table_of(folder) == [as_prepared(each) for each in rows(3, start=10, label=1)]


def test_labels_of_fewer_rows_than_the_inputs_are_refused(folder):
    prepare_rows(folder, rows(3))
    (folder / "labels" / "labels.parquet.tmp").mkdir()
    with pytest.raises(OSError, match=r"labels\.parquet\.tmp"):
        prepare_rows(folder, rows(5))
    with pytest.raises(DataError, match=r"labels\.parquet has 3 rows, the inputs 5\. Run `kdpipe prepare-data` again"):
        PreparedData(folder)


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import test_preparing as t
from kdpipe.data.preparing import SplitPlan, prepare
from kdpipe.data.sources import Table

class Killed(Table):
    def batches(self):
        for number, batch in enumerate(super().batches()):
            if number == 3:
                os.kill(os.getpid(), signal.SIGKILL)
            yield batch

folder = Path(sys.argv[2])
prepare(Killed(folder.parent / "source.parquet", batch_rows=3), t.SCHEMA, t.COLUMNS, SplitPlan(), folder)
"""


def test_a_killed_preparation_leaves_what_was_there_and_the_next_one_cleans_up(tmp_path):
    killed, calm = tmp_path / "one" / "prepared", tmp_path / "other" / "prepared"
    for folder in (killed, calm):
        prepare_rows(folder, rows(4))
    before = contents_of(killed)
    pq.write_table(pa.Table.from_pylist(rows(30), pa.schema(FIELDS)), killed.parent / "source.parquet")
    done = subprocess.run([sys.executable, "-c", KILLED, Path(__file__).parent, killed], check=False)
    assert done.returncode == -signal.SIGKILL
    assert (killed / "inputs" / "segment.tmp").is_dir()
    after = contents_of(killed)
    assert {name: after[name] for name in before} == before
    assert table_of(killed) == [as_prepared(each) for each in rows(4)]
    for folder in (killed, calm):
        prepare_rows(folder, rows(30))
    assert contents_of(killed) == contents_of(calm)
