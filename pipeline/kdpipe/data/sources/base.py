"""The `Source` protocol, and what sources share: blocks of bounded size, the files of a folder, damaged files."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from tokenize import TokenError
from typing import Protocol, runtime_checkable
from zipfile import BadZipFile

import pyarrow as pa

from kdpipe.errors import ConfigError, DataError, KdpipeError

BLOCK_BYTES = 8 * 2**20
BLOCK_ROWS = 8192
_OF_HEADERS = (SyntaxError, TokenError)
"""What NumPy raises for a header that is none."""


@runtime_checkable
class Source(Protocol):
    """Where rows come from."""

    def batches(self) -> Iterator[pa.RecordBatch]:
        """The rows in order, in blocks of any size; every call starts from the first row."""


def rows_within(row_bytes: float, most: int = BLOCK_ROWS) -> int:
    """How many rows of so many bytes make a block: about `BLOCK_BYTES`, at least one row."""
    return int(max(1, min(most, BLOCK_BYTES // max(row_bytes, 1))))


def bounded(batch: pa.RecordBatch) -> Iterator[pa.RecordBatch]:
    """The rows of a record batch in blocks of about `BLOCK_BYTES`; none where there is no row."""
    rows = rows_within(batch.nbytes / max(1, batch.num_rows))
    yield from (batch.slice(start, rows) for start in range(0, batch.num_rows, rows))


def differences(found: pa.Schema, expected: pa.Schema) -> str:
    """In what two schemas differ, as a list; empty where they do not."""
    if found.equals(expected):
        return ""
    names = dict.fromkeys([*found.names, *expected.names])
    types = {name: (_types_of(found, name), _types_of(expected, name)) for name in names}
    differing = [f"{name!r} ({here} here, {there} there)" for name, (here, there) in types.items() if here != there]
    return ", ".join(differing) or "their order"


def _types_of(schema: pa.Schema, name: str) -> str:
    return " and ".join(str(schema.field(index).type) for index in schema.get_all_field_indices(name)) or "absent"


def named_column(batch: pa.RecordBatch, keyword: str, name: str) -> pa.Array:
    """The column that the argument `keyword` of a source names. Raises `ConfigError` unless there is one such."""
    found = batch.schema.get_all_field_indices(name)
    if len(found) != 1:
        problem = f"{len(found)} columns of that name" if found else "no column of that name"
        raise ConfigError(
            f"data.source.{keyword} is {name!r}, but the rows have {problem}; they have "
            f"{', '.join(batch.schema.names)}. Give it the name of the column that is meant."
        )
    return batch.column(found[0])


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """What goes wrong while a file is read becomes a `DataError` that names it."""
    try:
        yield
    except KdpipeError:
        raise
    except (pa.ArrowException, OSError, EOFError, ValueError, BadZipFile, zlib.error, *_OF_HEADERS) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{path} cannot be read: {reason}") from error


def files_below(folder: Path, endings: Sequence[str], ignore: Sequence[str] = ()) -> Iterator[str]:
    """Relative names (with `/`) of a folder's files, sorted folder by folder; only one folder's are held at a time.

    Left out are names beginning with `.` or `_`, and relative names that match a pattern of `ignore`. Raises
    `DataError` for a file whose name ends otherwise than `endings`, in lower or upper case.
    """
    with reading(folder):
        entries = sorted(os.scandir(folder), key=lambda each: each.name)
    for entry in entries:
        if entry.name.startswith((".", "_")) or any(fnmatch(entry.name, pattern) for pattern in ignore):
            continue
        if entry.is_dir():
            yield from (f"{entry.name}/{each}" for each in files_below(Path(entry.path), endings, ignore))
        elif not entry.name.lower().endswith(tuple(endings)):
            raise DataError(
                f"{entry.path}: expected files ending in {', '.join(endings)}. Move it elsewhere, or name it in "
                f'data.source.ignore, such as ["*{Path(entry.name).suffix or entry.name}"].'
            )
        else:
            yield entry.name


def expect_folder(path: Path, what: str) -> None:
    """Raise `DataError` unless `path` is a folder."""
    if not path.is_dir():
        found = "a file" if path.exists() else "nothing"
        raise DataError(f"{path} is {found}; expected {what}. Correct data.path in params.yaml.")
