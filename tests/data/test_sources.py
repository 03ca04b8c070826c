from __future__ import annotations

import gzip
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.feather
import pyarrow.parquet as pq
import pytest

from kdpipe.data.sources import Digits, NumPy, Table, write_digits
from kdpipe.errors import ConfigError, DataError

REPOSITORY = Path(__file__).parents[2]


def numbers(count):
    return pa.table({"id": pa.array(range(count)), "text": pa.array([f"row {i}" for i in range(count)])})


def read(source):
    return pa.Table.from_batches(list(source.batches()))


@pytest.mark.parametrize("batch_rows", [1, 7, 100])
def test_a_parquet_file_comes_in_order_in_blocks(tmp_path, batch_rows):
    pq.write_table(numbers(20), tmp_path / "rows.parquet", row_group_size=6)
    source = Table(tmp_path / "rows.parquet", batch_rows=batch_rows)
    assert all(batch.num_rows <= batch_rows for batch in source.batches())
    assert read(source) == numbers(20)


@pytest.mark.parametrize("name", ["rows.csv", "rows.csv.gz"])
def test_a_csv_file_has_a_header_and_types(tmp_path, name):
    content = b"id,text,width\n1,one,0.5\n2,two,\n3,,1.5\n"
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    assert read(Table(tmp_path / name)).to_pydict() == {
        "id": [1, 2, 3],
        "text": ["one", "two", ""],
        "width": [0.5, None, 1.5],
    }


def test_a_csv_file_may_have_other_marks(tmp_path):
    (tmp_path / "rows.csv").write_text('id;text;width\n1;"a;b";0,5\n2;c;1,25\n')
    read_so = read(Table(tmp_path / "rows.csv", delimiter=";", decimal_point=","))
    assert read_so.to_pydict() == {"id": [1, 2], "text": ["a;b", "c"], "width": [0.5, 1.25]}
    (tmp_path / "tabs.csv").write_text("id\ttext\n1\tone, two\n")
    assert read(Table(tmp_path / "tabs.csv", delimiter="\t")).to_pydict() == {"id": [1], "text": ["one, two"]}
    pq.write_table(numbers(2), tmp_path / "rows.parquet")
    with pytest.raises(ConfigError, match=r"are about CSV; rows\.parquet is none"):
        read(Table(tmp_path / "rows.parquet", delimiter=";"))
    for marks in ({"delimiter": ";;"}, {"delimiter": ""}, {"delimiter": "."}):
        with pytest.raises(ConfigError, match=r"data\.source: delimiter is .*one character each"):
            Table(tmp_path / "rows.csv", **marks)


def test_every_call_starts_from_the_first_row(tmp_path):
    pq.write_table(numbers(9), tmp_path / "rows.parquet")
    source = Table(tmp_path / "rows.parquet", batch_rows=2)
    half_read = source.batches()
    next(half_read)
    assert read(source) == numbers(9)
    assert read(source) == numbers(9)


def test_blocks_are_read_when_they_are_asked_for(tmp_path):
    """The last row group is garbage: the first ones come all the same."""
    path = tmp_path / "rows.parquet"
    pq.write_table(numbers(30_000), path, row_group_size=10_000, compression="zstd")
    last = pq.read_metadata(path).row_group(2).column(0).data_page_offset
    content = bytearray(path.read_bytes())
    content[last + 20 : last + 400] = b"x" * 380
    path.write_bytes(content)
    batches = Table(path, batch_rows=10_000).batches()
    assert next(batches).column("id")[0].as_py() == 0
    with pytest.raises(DataError, match=r"rows\.parquet cannot be read"):
        list(batches)


def test_an_absent_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"no file .*absent\.parquet"):
        next(Table(tmp_path / "absent.parquet").batches())


def test_another_ending_lists_the_choices(tmp_path):
    (tmp_path / "rows.xlsx").write_bytes(b"")
    with pytest.raises(
        DataError, match=r"rows\.xlsx: expected a name ending in \.parquet, \.csv, \.jsonl, .*\.csv\.gz"
    ):
        next(Table(tmp_path / "rows.xlsx").batches())


def feather(table, **options):
    sink = io.BytesIO()
    pa.feather.write_feather(table, sink, **options)
    return sink.getvalue()


def stream(table):
    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rows.parquet", b"this is no Parquet file"),
        ("rows.parquet", b""),
        ("rows.csv", b""),
        ("rows.csv", b"a,b\n1,2\n1,2,3\n"),
        ("rows.csv", b"a,b\n1,2\n1"),
        ("rows.csv", b"a,b\n1,\xff\xfe\n"),
        ("rows.csv", b"a,b\n" + b"1,text\n" * 3000 + b"1,\xff\xfe\n"),
        ("rows.csv", "a,b\n1,2\n".encode("utf-16")),
        ("rows.csv", b"a,b\n" + b"1,text\n" * 3000 + b"one,text\n"),
        ("rows.csv.gz", b"this is no gzip file"),
        ("rows.csv.gz", gzip.compress(b"a,b\n" + np.random.default_rng(0).bytes(20_000).hex().encode())[:-4000]),
        ("rows.jsonl", b""),
        ("rows.jsonl", b"no JSON\n"),
        ("rows.jsonl", b"[1, 2]\n"),
        ("rows.jsonl", b'{"a": 1}\n{"a": '),
        ("rows.jsonl", b'{"a": "\xff\xfe"}\n'),
        ("rows.jsonl", b'{"a": 1}\n' * 3000 + b'{"a": "one"}\n'),
        ("rows.jsonl", b'{"a": 1}\n' * 3000 + b'{"a": 1, "b": 2}\n'),
        ("rows.jsonl.gz", gzip.compress(b'{"a": 1}\n' * 3000)[:-20]),
        ("rows.arrow", b""),
        ("rows.arrow", b"this is no Arrow file"),
        ("rows.arrow", feather(numbers(5000))[:-100]),
        ("rows.feather", stream(numbers(5000))[:-5000]),
        ("rows.feather", feather(numbers(5000))[:3000]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_broken_file_is_an_error_that_names_it(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=name.replace(".", r"\.") + " cannot be read"):
        list(Table(tmp_path / name, block_bytes=4096).batches())


def test_a_truncated_parquet_file_is_an_error(tmp_path):
    path = tmp_path / "rows.parquet"
    pq.write_table(numbers(100), path)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(DataError, match="cannot be read"):
        list(Table(path).batches())


def test_text_in_parquet_that_is_not_utf_8_is_an_error(tmp_path):
    text = pa.Array.from_buffers(pa.string(), 1, pa.array([b"\xff\xfe"], pa.binary()).buffers())
    pq.write_table(pa.table({"text": text}), tmp_path / "rows.parquet")
    with pytest.raises(DataError, match=r"rows\.parquet cannot be read: .*UTF8"):
        list(Table(tmp_path / "rows.parquet").batches())


@pytest.mark.parametrize(
    ("name", "content", "advice"),
    [
        ("rows.csv", b"a\n" + b"1\n" * 3000 + b"one\n", r"data\.source\.types"),
        ("rows.jsonl", b'{"a": 1}\n' * 3000 + b'{"a": 1.5}\n', r"data\.source\.types"),
        ("rows.jsonl", b'{"a": null}\n' * 3000 + b'{"a": "x"}\n', r"data\.source\.types"),
        ("rows.csv", b"a\n" + b"x" * 9000 + b"\n", r"longer than 4096 bytes: give data\.source\.block_bytes"),
        ("rows.jsonl", b'{"a": 1}\n{"a": "' + b"x" * 9000 + b'"}\n', r"give data\.source\.block_bytes"),
        ("rows.csv", b"a,b\n1,2\n1,2,3\n", r"values between ','; see data\.source\.delimiter"),
        ("rows.csv", "a,b\n1,2\n".encode("utf-16"), r"is taken for UTF-8 text"),
        ("rows.csv", b"gr\xf6sse,b\n1,2\n", r"names of its columns are not UTF-8\. Save the file as UTF-8\."),
    ],
)
def test_what_the_first_rows_do_not_tell_is_asked_for(tmp_path, name, content, advice):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=advice):
        list(Table(tmp_path / name, block_bytes=4096).batches())


def test_types_may_be_given_where_a_file_has_none(tmp_path):
    (tmp_path / "rows.csv").write_bytes(b"id,width\n007,1\n" + b"008,1\n" * 3000 + b"x,1.5\n")
    table = read(Table(tmp_path / "rows.csv", block_bytes=4096, types={"id": "string", "width": "float64"}))
    assert table["id"].to_pylist()[:2] == ["007", "008"]
    assert table["width"].to_pylist()[-1] == 1.5
    (tmp_path / "rows.jsonl").write_bytes(b'{"a": 1}\n' * 3000 + b'{"a": 1.5, "late": true}\n')
    table = read(Table(tmp_path / "rows.jsonl", block_bytes=4096, types={"a": "float64", "late": "bool"}))
    assert table["a"].to_pylist()[-2:] == [1.0, 1.5]
    assert table["late"].to_pylist()[-2:] == [None, True]


@pytest.mark.parametrize(
    ("name", "types", "message"),
    [
        (
            "rows.csv",
            {"text": "words"},
            r"data\.source\.types\.text: there is no type 'words'; expected .* string, int64",
        ),
        ("rows.csv", {"txt": "string"}, r"data\.source\.types\.txt: .*rows\.csv has no such column; it has id, text"),
        ("rows.parquet", {"text": "string"}, r"data\.source\.types: rows\.parquet has types of its own"),
    ],
)
def test_types_that_cannot_be(tmp_path, name, types, message):
    pq.write_table(numbers(2), tmp_path / "rows.parquet")
    pa.csv.write_csv(numbers(2), tmp_path / "rows.csv")
    with pytest.raises(ConfigError, match=message):
        list(Table(tmp_path / name, types=types).batches())


def test_json_lines_are_what_json_says(tmp_path):
    """A string that looks like a date is a string, a list keeps its nulls, a key may be absent."""
    lines = [
        {"id": "2020-01-01", "tags": [None, "a"], "talk": [{"role": "user", "when": "2020-01-01T10:00:00"}]},
        {"id": "2020-01-02", "talk": []},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert read(Table(tmp_path / "rows.jsonl")).to_pylist() == [lines[0], {**lines[1], "tags": None}]


def test_csv_values_may_hold_line_ends(tmp_path):
    rows = [{"id": i, "text": "a line\nand another, " * (i % 7)} for i in range(500)]
    pa.csv.write_csv(pa.Table.from_pylist(rows), tmp_path / "rows.csv")
    assert read(Table(tmp_path / "rows.csv", block_bytes=1024)).to_pylist() == rows


@pytest.mark.parametrize("write", [feather, stream])
def test_arrow_files_and_streams(tmp_path, write):
    (tmp_path / "rows.arrow").write_bytes(write(numbers(70_000)))
    batches = list(Table(tmp_path / "rows.arrow").batches())
    assert pa.Table.from_batches(batches) == numbers(70_000)


# Folders


def test_files_of_a_folder_come_in_the_order_of_their_names(tmp_path):
    for name, start in {"b.parquet": 5, "a/2.parquet": 2, "a/1.parquet": 0, "c.parquet": 7}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        pq.write_table(numbers(10).slice(start, {5: 2, 2: 3, 0: 2, 7: 3}[start]), tmp_path / name)
    (tmp_path / "_SUCCESS").touch()
    (tmp_path / ".part.crc").touch()
    assert read(Table(tmp_path)) == numbers(10)


@pytest.mark.parametrize("ending", ["csv", "jsonl"])
def test_the_first_file_says_the_types_of_all(tmp_path, ending):
    """The second file alone would be read otherwise."""
    first, second = [{"a": 1.5, "b": "x"}], [{"a": 2, "b": None}]
    for name, rows in (("1", first), ("2", second)):
        path = tmp_path / f"{name}.{ending}"
        if ending == "csv":
            path.write_text("a,b\n" + "".join(f"{row['a']},{row['b'] or ''}\n" for row in rows))
        else:
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    table = read(Table(tmp_path))
    assert table["a"].to_pylist() == [1.5, 2.0]
    assert table["b"].to_pylist() == ["x", "" if ending == "csv" else None]


def test_files_of_other_columns_are_refused(tmp_path):
    pq.write_table(numbers(3), tmp_path / "a.parquet")
    pq.write_table(pa.table({"id": ["x"], "text": ["y"], "more": [1]}), tmp_path / "b.parquet")
    batches = Table(tmp_path).batches()
    assert next(batches).num_rows == 3
    with pytest.raises(DataError) as caught:
        next(batches)
    assert "b.parquet has other columns than the first of 2 files: 'id' (string here, int64 there), 'more'" in str(
        caught.value
    )
    assert "(int64 here, absent there)" in str(caught.value)


def test_columns_in_another_order_are_refused(tmp_path):
    pq.write_table(numbers(3), tmp_path / "a.parquet")
    pq.write_table(numbers(3).select(["text", "id"]), tmp_path / "b.parquet")
    with pytest.raises(DataError, match=r"b\.parquet has other columns than the first of 2 files: their order"):
        list(Table(tmp_path).batches())


def test_files_of_several_kinds_are_refused(tmp_path):
    pq.write_table(numbers(3), tmp_path / "a.parquet")
    pa.csv.write_csv(numbers(3), tmp_path / "b.csv")
    with pytest.raises(DataError, match=r"expected files of one kind .*; found a\.parquet and b\.csv"):
        list(Table(tmp_path).batches())


def test_a_folder_without_files_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"expected files of one kind .*; found none"):
        list(Table(tmp_path).batches())


def test_another_file_in_the_folder_is_refused_unless_it_is_ignored(tmp_path):
    pq.write_table(numbers(3), tmp_path / "a.parquet")
    (tmp_path / "README.md").touch()
    with pytest.raises(
        DataError, match=r'README\.md: expected files ending in .*data\.source\.ignore, such as \["\*\.md"'
    ):
        list(Table(tmp_path).batches())
    assert read(Table(tmp_path, ignore=["*.md"])) == numbers(3)


# How much is held


@pytest.mark.parametrize("as_one_row_group", [True, False])
def test_large_rows_come_in_small_blocks(tmp_path, as_one_row_group):
    """Whatever the row groups: less is held than a third of the file."""
    rows, size = 24_000, 2**12
    table = pa.table({"image": [os.urandom(size) for _ in range(rows)]})
    pq.write_table(
        table, tmp_path / "rows.parquet", row_group_size=rows if as_one_row_group else 1000, compression="none"
    )
    del table
    script = """
import sys
import pyarrow as pa
from pathlib import Path
from kdpipe.data.sources import Table
print(sum(batch.num_rows for batch in Table(Path(sys.argv[1])).batches()), pa.default_memory_pool().max_memory())
"""
    command = [sys.executable, "-c", script, tmp_path / "rows.parquet"]
    count, peak = map(int, subprocess.run(command, check=True, capture_output=True, text=True).stdout.split())
    assert count == rows
    assert peak < rows * size / 3


def test_digits_are_what_they_say(tmp_path):
    table = read(Digits(tmp_path / "raw" / "digits.parquet"))
    assert table.column_names == ["id", "image", "label", "split"]
    assert table["id"].to_pylist() == list(range(1797))
    assert sorted(set(table["label"].to_pylist())) == list(range(10))
    splits = table["split"].to_pylist()
    assert (splits.count("train"), splits.count("test"), len(splits)) == (1197, 600, 1797)
    assert table["image"].type == pa.list_(pa.uint8(), 64)
    pixels = table["image"].combine_chunks().flatten().to_numpy()
    assert (pixels.min(), pixels.max()) == (0, 16)


def test_digits_equal_what_scikit_learn_ships(tmp_path):
    from sklearn.datasets import load_digits

    write_digits(tmp_path / "digits.parquet")
    table, bunch = pq.read_table(tmp_path / "digits.parquet"), load_digits()
    pixels = table["image"].combine_chunks().flatten().to_numpy().reshape(-1, 64)
    np.testing.assert_array_equal(pixels, bunch.data)
    np.testing.assert_array_equal(table["label"].to_numpy(), bunch.target)


def test_the_digits_in_the_repository_are_what_write_digits_writes_now(tmp_path):
    write_digits(tmp_path / "digits.parquet")
    assert pq.read_table(REPOSITORY / "data" / "raw" / "digits.parquet").equals(
        pq.read_table(tmp_path / "digits.parquet")
    )


def test_digits_are_written_once_and_whole(tmp_path):
    path = tmp_path / "raw" / "digits.parquet"
    list(Digits(path).batches())
    assert [each.name for each in path.parent.iterdir()] == ["digits.parquet"]
    first_five = pq.read_table(path).slice(0, 5)
    pq.write_table(first_five, path)
    assert read(Digits(path)) == first_five


def marked(folder, kind):
    """Three rows of a name and a number, in two files, some of them unknown."""
    folder.mkdir()
    for number, rows in enumerate([[("a", "1"), ("?", "?")], [("", "3"), ("-", "4")]]):
        if kind == "csv":
            lines = [",".join(row) for row in [("name", "count"), *rows]]
            (folder / f"{number}.csv").write_text("\n".join(lines) + "\n")
        else:
            columns = {"name": [name for name, _ in rows], "count": [None if n == "?" else int(n) for _, n in rows]}
            pq.write_table(pa.table(columns), folder / f"{number}.parquet")
    return folder


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_marks_of_missing_values_and_row_numbers(tmp_path, kind):
    source = Table(marked(tmp_path / "rows", kind), batch_rows=1, null_values=["?", "-"], number_as="row")
    assert read(source).to_pydict() == {"row": [0, 1, 2, 3], "name": ["a", None, "", None], "count": [1, None, 3, 4]}
    assert read(source).to_pydict() == read(source).to_pydict()


def test_a_row_number_takes_no_columns_place(tmp_path):
    with pytest.raises(ConfigError, match="has a column 'count' already; give another name"):
        read(Table(marked(tmp_path / "rows", "parquet"), number_as="count"))


def test_a_numpy_header_that_is_none_is_named(tmp_path):
    np.save(tmp_path / "rows.npy", np.zeros((3, 2)))
    content = bytearray((tmp_path / "rows.npy").read_bytes())
    content[10:20] = b"{'descr': "
    content[40:60] = b"(((((((((((((((((((("
    (tmp_path / "rows.npy").write_bytes(bytes(content))
    with pytest.raises(DataError, match=r"rows\.npy cannot be read"):
        list(NumPy(tmp_path / "rows.npy").batches())
