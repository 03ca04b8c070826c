"""Plain text: lines, paragraphs or whole files."""

from __future__ import annotations

import gzip
from collections.abc import Iterator, Sequence
from io import BufferedIOBase
from pathlib import Path
from typing import Literal

import pyarrow as pa

from kdpipe.data.sources.base import BLOCK_BYTES, BLOCK_ROWS, files_below, reading
from kdpipe.errors import DataError

_ENDINGS = (".txt", ".txt.gz")
_SCHEMA = pa.schema({"id": pa.string(), "text": pa.string()})
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class TextFile:
    """UTF-8 text (`.gz` or not), one file or a folder of `.txt` and `.txt.gz` files: each document is a row.

    A document is a line, a paragraph (lines up to an empty one) or a whole file, as `documents` says; empty ones are no
    rows. Columns: `id`, the file's name and the number of the document's first line (`a.txt:12`; for whole files
    `a.txt`), and `text`, without the line's end. Only one document is held at a time.
    """

    def __init__(
        self,
        path: Path,
        documents: Literal["lines", "paragraphs", "files"] = "lines",
        ignore: Sequence[str] = (),
    ) -> None:
        self.path = path
        self._documents = documents
        self._ignore = ignore

    def batches(self) -> Iterator[pa.RecordBatch]:
        """The documents in order. Raises `DataError` naming file and line of what is not UTF-8."""
        ids: list[str] = []
        texts: list[str] = []
        num_bytes = 0
        for key, text in self._rows():
            ids.append(key)
            texts.append(text)
            num_bytes += len(text)
            if num_bytes >= BLOCK_BYTES or len(ids) == BLOCK_ROWS:
                yield pa.record_batch([ids, texts], schema=_SCHEMA)
                ids, texts, num_bytes = [], [], 0
        if ids:
            yield pa.record_batch([ids, texts], schema=_SCHEMA)

    def _rows(self) -> Iterator[tuple[str, str]]:
        for path, name in self._files():
            with reading(path), _opened(path) as file:
                for number, content in self._split(file):
                    try:
                        text = content.decode()
                    except UnicodeDecodeError as error:
                        raise DataError(
                            f"{path}: what begins in line {number} is not UTF-8 ({error.reason}, byte {error.start} of "
                            "it). Save the file as UTF-8."
                        ) from None
                    if text.strip():
                        yield (name if self._documents == "files" else f"{name}:{number}"), text

    def _files(self) -> Iterator[tuple[Path, str]]:
        if self.path.is_dir():
            yield from ((self.path / name, name) for name in files_below(self.path, _ENDINGS, self._ignore))
        elif self.path.is_file():
            yield self.path, self.path.name
        else:
            raise DataError(f"no file {self.path}: expected the text there. Correct data.path in params.yaml.")

    def _split(self, file: BufferedIOBase) -> Iterator[tuple[int, bytes]]:
        """Line number and bytes of each document."""
        if self._documents == "files":
            yield 1, file.read().removeprefix(_BYTE_ORDER_MARK)
            return
        gathered: list[bytes] = []
        number = 0
        for number, line in enumerate(file, start=1):
            bare = (line.removeprefix(_BYTE_ORDER_MARK) if number == 1 else line).rstrip(b"\r\n")
            if self._documents == "lines":
                yield number, bare
            elif bare.strip():
                gathered.append(bare)
            elif gathered:
                yield number - len(gathered), b"\n".join(gathered)
                gathered = []
        if gathered:
            yield number + 1 - len(gathered), b"\n".join(gathered)


def _opened(path: Path) -> BufferedIOBase:
    return gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb")
