from __future__ import annotations

import gzip
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kdpipe.data.sources import Digits, Table, write_digits
from kdpipe.errors import DataError

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
    with pytest.raises(DataError, match=r"rows\.xlsx: expected a name ending in \.parquet, \.csv or \.csv\.gz"):
        next(Table(tmp_path / "rows.xlsx").batches())


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rows.parquet", b"this is no Parquet file"),
        ("rows.parquet", b""),
        ("rows.csv", b""),
        ("rows.csv", b"a,b\n1,2\n1,2,3\n"),
        ("rows.csv.gz", b"this is no gzip file"),
        ("rows.csv.gz", gzip.compress(b"a,b\n" + os.urandom(20_000).hex().encode())[:-4000]),
    ],
)
def test_a_broken_file_is_an_error_that_names_it(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=name.replace(".", r"\.") + " cannot be read"):
        list(Table(tmp_path / name).batches())


def test_a_truncated_parquet_file_is_an_error(tmp_path):
    path = tmp_path / "rows.parquet"
    pq.write_table(numbers(100), path)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(DataError, match="cannot be read"):
        list(Table(path).batches())


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


def test_digits_need_scikit_learn_only_where_the_file_is_absent(tmp_path):
    """Run with scikit-learn absent from the process."""
    script = """
import sys
sys.modules["sklearn"] = sys.modules["sklearn.datasets"] = None
from pathlib import Path
from kdpipe.data.sources import Digits
print(sum(batch.num_rows for batch in Digits(Path(sys.argv[1])).batches()))
Digits(Path(sys.argv[2])).batches()
"""
    write_digits(tmp_path / "digits.parquet")
    done = subprocess.run(
        [sys.executable, "-c", script, tmp_path / "digits.parquet", tmp_path / "absent.parquet"],
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.stdout == "1797\n"
    assert "ConfigError: the digits come with scikit-learn: pip install 'kdpipe[demo]'" in done.stderr
    assert not (tmp_path / "absent.parquet").exists()
