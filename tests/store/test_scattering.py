from __future__ import annotations

import os

import numpy as np
import pytest

from kdpipe.encodings import ArraySpec
from kdpipe.store.layout import ArrayLayout
from kdpipe.store.scattering import MOST_ROWS, Scattered
from kdpipe.store.shard_file import ShardFile, write_shard


@pytest.fixture
def file(tmp_path):
    """Ten bytes of something else, then 3,000 rows of three numbers."""
    (tmp_path / "rows").write_bytes(b"0123456789" + np.arange(9000, dtype="<u2").tobytes())
    with (tmp_path / "rows").open("rb") as opened:
        yield opened.fileno()


@pytest.mark.parametrize("num_rows", [0, 1, 7, MOST_ROWS])
def test_each_row_comes_to_its_place(file, num_rows):
    places = np.random.default_rng(0).permutation(2000)[:num_rows]
    out = np.zeros((2000, 3), np.uint16)
    assert Scattered(out, places).read(file, 10 + 6 * 500, 0, num_rows)
    expected = np.zeros_like(out)
    expected[places] = np.arange(1500, 1500 + 3 * num_rows).reshape(-1, 3)
    assert np.array_equal(out, expected)


def test_some_of_the_rows_and_of_equal_places_the_last(file):
    out = np.zeros((5, 3), np.uint16)
    assert Scattered(out, np.array([4, 1, 3, 3, 0])).read(file, 10, 1, 4)
    assert out.tolist() == [[0] * 3, [0, 1, 2], [0] * 3, [6, 7, 8], [0] * 3]


def test_a_file_that_ends_before_is_said(file):
    assert not Scattered(np.zeros((2, 3), np.uint16), np.array([0, 1])).read(file, 10 + 6 * 2999, 0, 2)


@pytest.mark.parametrize("places", [[0, 2], [-1, 0]])
def test_places_outside_are_refused(places):
    with pytest.raises(ValueError, match="expected 0 to 1"):
        Scattered(np.zeros((2, 3), np.uint16), np.array(places))


def test_memory_that_cannot_be_written_in_rows_is_refused():
    fixed = np.zeros((2, 3), np.uint16)
    fixed.flags.writeable = False
    for out in (fixed, np.zeros((3, 2), np.uint16).T):
        with pytest.raises(ValueError, match="contiguous, writeable"):
            Scattered(out, np.array([0]))


def test_a_file_that_cannot_be_read_is_an_error(tmp_path):
    closed = os.open(tmp_path, os.O_RDONLY)
    try:
        with pytest.raises(IsADirectoryError):
            Scattered(np.zeros((2, 3), np.uint16), np.array([0])).read(closed, 0, 0, 1)
    finally:
        os.close(closed)


@pytest.mark.parametrize("chunk", [0, 1])
def test_a_chunk_of_more_rows_than_one_call_reads(tmp_path, chunk):
    layout = ArrayLayout.of("x", ArraySpec(dtype="float32", shape=(150,)), shard_rows=4096)
    rows = np.random.default_rng(0).normal(size=(3900, 150)).astype(np.float32)
    with (tmp_path / "shard").open("wb") as written:
        stored = write_shard(written, rows, layout)
    file = ShardFile(tmp_path / "shard", layout, len(rows), stored)
    assert MOST_ROWS < file.rows_of(chunk) < 2 * MOST_ROWS + 1
    out, places = np.zeros((5000, 150), np.float32), np.random.default_rng(1).permutation(5000)[: file.rows_of(chunk)]
    scattered = Scattered(out, np.concatenate([[0, 1, 2], places]))
    assert not file.scatter_chunk(chunk, scattered, 3)
    assert not out.any()
    file.read(np.array([chunk * layout.chunk_rows]))
    assert file.scatter_chunk(chunk, scattered, 3)
    assert np.array_equal(out[places], rows[chunk * layout.chunk_rows :][: len(places)])
    assert np.count_nonzero(out.any(axis=1)) == len(places)
