from __future__ import annotations

import io

import numpy as np
import pyarrow as pa
import pytest

from kdpipe.data.sources import NumPy
from kdpipe.errors import DataError

ARRAYS = {
    "image": np.arange(24, dtype=np.uint8).reshape(2, 3, 4),
    "label": np.array([1, 0], ">i4"),
    "name": np.array(["é", "longer"]),
    "is_new": np.array([True, False]),
    "weight": np.array([0.5, np.nan], np.float16),
}


def read(path, **options):
    return pa.Table.from_batches(list(NumPy(path, **options).batches()))


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_arrays_of_an_npz_file_are_columns(tmp_path, save):
    save(tmp_path / "rows.npz", **ARRAYS)
    table = read(tmp_path / "rows.npz")
    assert table.column_names == list(ARRAYS)
    assert table["image"].type == pa.list_(pa.uint8(), 12)
    assert table["image"].to_pylist() == ARRAYS["image"].reshape(2, 12).tolist()
    assert table["label"].to_pylist() == [1, 0]
    assert table["name"].to_pylist() == ["é", "longer"]
    assert table["is_new"].to_pylist() == [True, False]
    np.testing.assert_array_equal(table["weight"].to_numpy(), ARRAYS["weight"])


def test_npy_files_of_a_folder_are_columns(tmp_path):
    for name, array in ARRAYS.items():
        np.save(tmp_path / f"{name}.npy", array)
    assert sorted(read(tmp_path).column_names) == sorted(ARRAYS)
    table = read(tmp_path, columns={"class": "label"})
    assert table.to_pydict() == {"class": [1, 0]}


def test_one_npy_file_is_one_column(tmp_path):
    np.save(tmp_path / "pixels.npy", ARRAYS["image"])
    assert read(tmp_path / "pixels.npy").column_names == ["pixels"]


def test_an_array_in_a_files_last_bytes_is_read_late(tmp_path):
    """The last block is truncated: the first ones come all the same."""
    np.save(tmp_path / "x.npy", np.zeros((5000, 4096), np.uint8))
    path = tmp_path / "x.npy"
    path.write_bytes(path.read_bytes()[:-10])
    batches = NumPy(path).batches()
    assert next(batches).num_rows == 2048
    with pytest.raises(DataError, match=r"x\.npy cannot be read: x ends before its last row"):
        list(batches)


def npy(array, **options):
    file = io.BytesIO()
    np.save(file, array, **options)
    return file.getvalue()


BROKEN = {
    "empty.npy": (b"", "cannot be read"),
    "other.npy": (b"something else altogether", "cannot be read: the magic string is not correct"),
    "header.npy": (npy(ARRAYS["image"])[:40], "cannot be read"),
    "objects.npy": (npy(np.array([{}, []], object), allow_pickle=True), "expected rows of numbers or text"),
    "fortran.npy": (npy(np.asfortranarray(np.zeros((2, 3)))), "in Fortran order; expected .* in C order"),
    "scalar.npy": (npy(np.float32(1)), "expected rows of numbers or text"),
    "complex.npy": (npy(np.zeros(3, np.complex64)), "complex64, .* expected rows of numbers or text"),
    "record.npy": (npy(np.zeros(3, [("a", "i4"), ("b", "f4")])), "expected rows of numbers or text"),
    "other.npz": (b"something else", "cannot be read: File is not a zip file"),
    "empty.npz": (b"", "cannot be read"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_named(tmp_path, name):
    content, message = BROKEN[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=name.replace(".", r"\.") + f".*{message}"):
        read(tmp_path / name)


def test_a_damaged_member_is_found_by_its_checksum(tmp_path):
    path = tmp_path / "rows.npz"
    np.savez(path, x=np.zeros(1000, np.uint8))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"rows\.npz cannot be read: Bad CRC-32"):
        read(path)


def test_a_truncated_npz_file_is_named(tmp_path):
    np.savez(tmp_path / "rows.npz", **ARRAYS)
    (tmp_path / "rows.npz").write_bytes((tmp_path / "rows.npz").read_bytes()[:-30])
    with pytest.raises(DataError, match=r"rows\.npz cannot be read"):
        read(tmp_path / "rows.npz")


def test_arrays_of_different_lengths_are_refused(tmp_path):
    np.savez(tmp_path / "rows.npz", x=np.zeros(3), y=np.zeros(2))
    with pytest.raises(DataError, match="different numbers of rows: 3 in x, 2 in y"):
        read(tmp_path / "rows.npz")


def test_an_absent_array_lists_those_that_exist(tmp_path):
    np.savez(tmp_path / "rows.npz", x=np.zeros(3), y=np.zeros(3))
    with pytest.raises(DataError, match="has no array z; there are x, y"):
        read(tmp_path / "rows.npz", columns={"x": "x", "label": "z"})
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="has no array at all; there are none"):
        read(tmp_path / "empty")
    with pytest.raises(DataError, match=r"no file .*absent\.npz"):
        read(tmp_path / "absent.npz")


def test_arrays_without_rows_give_none(tmp_path):
    np.savez(tmp_path / "rows.npz", x=np.zeros((0, 4)))
    assert list(NumPy(tmp_path / "rows.npz").batches()) == []
