"""Language modelling: rows are blocks of tokens; each position predicts the token after it.

Shapes: B rows, T positions of a block.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from torch import Tensor

from kdpipe.data.columns import Columns
from kdpipe.data.preparing import NameOf, SourceColumns, column_of
from kdpipe.data.sources import Source
from kdpipe.errors import ConfigError, DataError
from kdpipe.fingerprint import digest_file
from kdpipe.losses import cross_entropy
from kdpipe.preprocess import Preprocess
from kdpipe.preprocess.tokens import TokenIds
from kdpipe.tasks.vocabulary import BYTES, Vocabulary, open_vocabulary, tokenizer_file

_BLOCKS_AT_ONCE = 1024


class LanguageModelling:
    """Next-token prediction on documents, the text of `column`.

    Each document is tokenised by itself, `end_token` after it, and cut into rows of `block_tokens` positions: tokens
    `[T + 1]`, of which consecutive rows share one, so that every token but a document's first is predicted exactly
    once. The last row of a document is padded; what was added to or moved in the source changes no other document's
    rows. With `pack` documents of one split follow each other in a row without padding, in the order of the source; no
    position predicts a token of the next document. Tokens of `prompt_column`, which come first, are read but not
    predicted.

    `tokenizer` is `bytes` (UTF-8; the end of a document is token 256) or the path of a `tokenizer.json` or of a folder
    with one. With `vocab_size`, a byte-pair encoding of so many tokens is learnt from the source and written there,
    if there is none. `num_classes` is for models with more outputs than the tokenizer has tokens.
    """

    class_names = None

    @staticmethod
    def reads(arguments: Mapping[str, Any], root: Path) -> dict[str, str]:
        """Digest of the tokenizer's file, where there is one."""
        file = tokenizer_file(root, str(arguments.get("tokenizer", BYTES)))
        return {"tokenizer": digest_file(file)} if file.is_file() else {}

    def __init__(
        self,
        root: Path,
        *,
        tokenizer: str = "bytes",
        column: str = "text",
        prompt_column: str | None = None,
        block_tokens: int = 256,
        pack: bool = False,
        end_token: str | None = None,
        vocab_size: int | None = None,
        num_classes: int | None = None,
    ) -> None:
        """`root`: the project's folder. Raises `ConfigError`."""
        if block_tokens < 1:
            raise ConfigError(f"task.block_tokens is {block_tokens}; expected 1 or more")
        self._vocabulary: Vocabulary = open_vocabulary(root, tokenizer, end_token, vocab_size)
        if num_classes is not None and num_classes < self._vocabulary.size:
            raise ConfigError(
                f"task.num_classes is {num_classes}, but {tokenizer} has {self._vocabulary.size} tokens; expected as "
                "many or more (the models' outputs, where they are padded), or leave it out"
            )
        self.num_classes = num_classes or self._vocabulary.size
        self._column, self._prompt, self._pack = column, prompt_column, pack
        self._length = block_tokens

    @property
    def knows_its_tokens(self) -> bool:
        """Whether there is a tokenizer."""
        return self._vocabulary.is_known

    def blocks(self, source: Source, columns: SourceColumns) -> tuple[Source, SourceColumns]:
        """The source's documents as a source of rows: columns id, tokens, counted, label (0) and split."""
        texts = (text for batch in source.batches() for text in _texts(batch, self._column))
        self._vocabulary.learn(texts)
        split = "split" if columns.split is not None else None
        return _Blocks(self, source, columns), SourceColumns(id="id", label="label", split=split)

    def to_inputs(self, batch: pa.RecordBatch, name_of: NameOf) -> Columns:
        """Columns `tokens`, int32 `[B, T + 1]`, and `counted`, bool `[B, T]`: whether a prediction counts."""
        tokens, counted = (column_of(batch, name).flatten().to_numpy() for name in ("tokens", "counted"))
        return {"tokens": tokens.reshape(-1, self._length + 1), "counted": counted.reshape(-1, self._length) != 0}

    def to_labels(self, values: pa.Array, name_of: NameOf) -> NDArray[np.int64]:
        """0 `[B]`: rows carry their labels."""
        labels: NDArray[np.int64] = values.to_numpy()
        return labels

    def token_labels(self, columns: Columns) -> NDArray[np.int64]:
        """The token after each position `[B, T]`; -1 where it does not count."""
        tokens = np.asarray(columns["tokens"], np.int64)
        return np.where(np.asarray(columns["counted"]), tokens[:, 1:], -1)

    def default_preprocess(self) -> Preprocess:
        """Token ids."""
        return TokenIds(vocab_size=self.num_classes, max_length=self._length, tokens=self._vocabulary.tokens)

    def label_loss(self, logits: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
        """Cross-entropy, one value per token `[B, T]`."""
        return cross_entropy(logits, labels, smoothing)

    def documents(self, batch: pa.RecordBatch) -> Iterator[_Document]:
        """The documents of a batch of source rows."""
        prompts = self._vocabulary.encode(_texts(batch, self._prompt)) if self._prompt else [[]] * batch.num_rows
        end = [] if self._vocabulary.end is None else [self._vocabulary.end]
        for prompt, text in zip(prompts, self._vocabulary.encode(_texts(batch, self._column)), strict=True):
            counted = np.ones(len(prompt) + len(text) + len(end), np.bool_)
            counted[: max(1, len(prompt))] = False  # nothing comes before the first token
            yield _Document(np.array([*prompt, *text, *end], np.int32), counted)

    @property
    def length(self) -> int:
        """T."""
        return self._length

    @property
    def packs(self) -> bool:
        """Whether rows hold several documents."""
        return self._pack


class _Document:
    """Tokens `[L]`, and whether each is to be predicted."""

    def __init__(self, tokens: NDArray[np.int32], predicted: NDArray[np.bool_]) -> None:
        self.tokens, self.predicted = tokens, predicted


class _Blocks:
    """A source of rows made of a source of documents."""

    def __init__(self, task: LanguageModelling, documents: Source, columns: SourceColumns) -> None:
        self._task, self._documents, self._columns = task, documents, columns

    def batches(self) -> Iterator[pa.RecordBatch]:
        """Rows, a number of them at a time."""
        waiting: list[dict[str, Any]] = []
        for row in self._named():
            waiting.append(row)
            if len(waiting) == _BLOCKS_AT_ONCE:
                yield self._batch(waiting)
                waiting = []
        if waiting:
            yield self._batch(waiting)

    def _named(self) -> Iterator[dict[str, Any]]:
        """Rows with their ids: the document's and the row's place in it, or the content's digest."""
        seen: Counter[bytes] = Counter()
        for row in self._rows():
            if "id" not in row:
                content = hashlib.blake2b(row["tokens"].tobytes() + row["counted"].tobytes(), digest_size=8).digest()
                repeats = f"+{seen[content]}" if seen[content] else ""
                seen[content] += 1
                row["id"] = content.hex() + repeats
            yield row

    def _rows(self) -> Iterator[dict[str, Any]]:
        names = self._columns
        packed: dict[str | None, _Cutter] = {}
        for batch in self._documents.batches():
            keys = None if names.id is None else _keys(batch, names.id)
            if keys is not None and "" in keys:
                where = f"the {keys.index('') + 1}th of {len(keys)} documents of a block"
                raise DataError(f"column {names.id!r} must hold an id for each document; it is empty in {where}")
            splits = [None] * batch.num_rows if names.split is None else _keys(batch, names.split)
            for number, document in enumerate(self._task.documents(batch)):
                split = splits[number]
                if self._task.packs:
                    yield from self._in_split(packed.setdefault(split, _Cutter(self._task.length)).add(document), split)
                    continue
                cutter = _Cutter(self._task.length)
                rows = [*cutter.add(document), *cutter.rest()]
                for place, row in enumerate(self._in_split(rows, split)):
                    yield row if keys is None else {**row, "id": f"{keys[number]}/{place}"}
        for split, cutter in packed.items():
            yield from self._in_split(cutter.rest(), split)

    @staticmethod
    def _in_split(rows: Iterable[dict[str, Any]], split: str | None) -> Iterator[dict[str, Any]]:
        return ({**row, "split": split} for row in rows)

    def _batch(self, rows: list[dict[str, Any]]) -> pa.RecordBatch:
        length = self._task.length
        tokens = np.concatenate([row["tokens"] for row in rows])
        counted = np.concatenate([row["counted"] for row in rows]).astype(np.uint8)
        return pa.record_batch(
            {
                "id": pa.array([row["id"] for row in rows], pa.string()),
                "tokens": pa.FixedSizeListArray.from_arrays(pa.array(tokens), length + 1),
                "counted": pa.FixedSizeListArray.from_arrays(pa.array(counted), length),
                "label": pa.array(np.zeros(len(rows), np.int64)),
                "split": pa.array([row["split"] for row in rows], pa.string()),
            }
        )


class _Cutter:
    """Cuts documents that follow each other into rows of T + 1 tokens, of which neighbours share one."""

    def __init__(self, length: int) -> None:
        self._length = length
        self._tokens, self._predicted = np.empty(0, np.int32), np.empty(0, np.bool_)

    def add(self, document: _Document) -> Iterator[dict[str, Any]]:
        """Full rows."""
        self._tokens = np.concatenate([self._tokens, document.tokens])
        self._predicted = np.concatenate([self._predicted, document.predicted])
        start, length = 0, self._length
        while len(self._tokens) - start > length:
            yield self._row(start)
            start += length
        self._tokens, self._predicted = self._tokens[start:], self._predicted[start:]

    def rest(self) -> Iterator[dict[str, Any]]:
        """The last row, padded with token 0, if it predicts anything."""
        if self._predicted[1:].any():
            yield self._row(0)

    def _row(self, start: int) -> dict[str, Any]:
        tokens, counted = np.zeros(self._length + 1, np.int32), np.zeros(self._length, np.bool_)
        here = self._tokens[start : start + self._length + 1]
        tokens[: len(here)] = here
        counted[: len(here) - 1] = self._predicted[start + 1 : start + len(here)]
        return {"tokens": tokens, "counted": counted}


def _texts(batch: pa.RecordBatch, name: str) -> list[str]:
    values = column_of(batch, name)
    if pa.types.is_dictionary(values.type):
        values = values.dictionary_decode()
    if not (pa.types.is_string(values.type) or pa.types.is_large_string(values.type)):
        raise DataError(f"column {name!r} has type {values.type}; expected text. Name its column in task.column")
    if values.null_count:
        raise DataError(f"column {name!r} has no text in {values.null_count} rows of a block; remove them")
    texts: list[str] = values.to_pylist()
    return texts


def _keys(batch: pa.RecordBatch, name: str) -> list[str]:
    return ["" if each is None else str(each) for each in column_of(batch, name).to_pylist()]
