from __future__ import annotations

import gzip

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdpipe.data.sources import TextFile
from kdpipe.data.sources.base import BLOCK_BYTES
from kdpipe.errors import DataError


def rows(path, **options):
    table = pa.Table.from_batches(list(TextFile(path, **options).batches()))
    return list(zip(table["id"].to_pylist(), table["text"].to_pylist(), strict=True))


CONTENT = "one\n\n  \nfour é\r\nfive".encode()


def test_lines_are_rows_and_empty_ones_are_none(tmp_path):
    (tmp_path / "a.txt").write_bytes(CONTENT)
    assert rows(tmp_path / "a.txt") == [("a.txt:1", "one"), ("a.txt:4", "four é"), ("a.txt:5", "five")]


def test_paragraphs_are_lines_up_to_an_empty_one(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\n" + CONTENT)
    expected = [("a.txt:2", "one"), ("a.txt:5", "four é\nfive")]
    assert rows(tmp_path / "a.txt", documents="paragraphs") == expected


def test_whole_files_keep_every_character(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "a.txt").write_bytes(CONTENT)
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfbyte order mark\n")
    (tmp_path / "empty.txt").touch()
    expected = [("a.txt", "byte order mark\n"), ("b/a.txt", CONTENT.decode())]
    assert rows(tmp_path, documents="files") == expected


def test_lines_of_a_folder_and_of_packed_files(tmp_path):
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(b"three\n"))
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\ntwo")
    expected = [("a.txt:1", "one"), ("a.txt:2", "two"), ("b.txt.gz:1", "three")]
    assert rows(tmp_path) == expected


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\n\r"), min_size=1)))
def test_lines_come_back(tmp_path_factory, lines):
    path = tmp_path_factory.mktemp("text") / "a.txt"
    path.write_bytes("\n".join(lines).encode())
    found = [text for batch in TextFile(path).batches() for text in batch["text"].to_pylist()]
    assert found == [
        line.removeprefix("\ufeff") if number == 0 else line
        for number, line in enumerate(lines)
        if (line.removeprefix("\ufeff") if number == 0 else line).strip()
    ]


def test_lines_are_read_when_they_are_asked_for(tmp_path):
    line = b"x" * (BLOCK_BYTES // 4) + b"\n"
    (tmp_path / "a.txt").write_bytes(line * 6 + b"\xff\n")
    batches = TextFile(tmp_path / "a.txt").batches()
    assert next(batches).num_rows == 4
    with pytest.raises(DataError, match=r"a\.txt: what begins in line 7 is not UTF-8"):
        next(batches)


@pytest.mark.parametrize(
    ("documents", "message"),
    [
        ("lines", r"a\.txt: what begins in line 3 is not UTF-8 \(invalid start byte, byte 4 of it\)"),
        ("paragraphs", r"a\.txt: what begins in line 2 is not UTF-8 \(invalid start byte, byte 9 of it\)"),
        ("files", r"a\.txt: what begins in line 1 is not UTF-8 \(invalid start byte, byte 10 of it\)"),
    ],
)
def test_bytes_that_are_not_utf_8_are_named(tmp_path, documents, message):
    (tmp_path / "a.txt").write_bytes(b"\nnext\ntext\xff")
    with pytest.raises(DataError, match=message):
        rows(tmp_path / "a.txt", documents=documents)


@pytest.mark.parametrize("cut", [-10, 5])
def test_a_truncated_packed_file_is_named(tmp_path, cut):
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"text\n" * 100)[:cut])
    with pytest.raises(DataError, match=r"a\.txt\.gz cannot be read"):
        rows(tmp_path / "a.txt.gz")


def test_what_is_not_packed_and_what_is_absent_are_named(tmp_path):
    (tmp_path / "a.txt.gz").write_bytes(b"plain")
    with pytest.raises(DataError, match=r"a\.txt\.gz cannot be read: Not a gzipped file"):
        rows(tmp_path / "a.txt.gz")
    with pytest.raises(DataError, match=r"no file .*absent\.txt: expected the text there"):
        rows(tmp_path / "absent.txt")


def test_a_file_without_text_has_no_rows(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\n \n")
    assert list(TextFile(tmp_path / "a.txt").batches()) == []
