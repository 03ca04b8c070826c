"""Text to token ids, for tasks whose rows are tokens."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from kdpipe import durable
from kdpipe.config import package
from kdpipe.errors import ConfigError

BYTES = "bytes"


class Vocabulary(Protocol):
    """What a tokenizer does for a task. `end` is the token after a document, or None."""

    @property
    def size(self) -> int:
        """The largest token id + 1: ids may have holes."""

    @property
    def end(self) -> int | None:
        """The token after a document."""

    @property
    def is_known(self) -> bool:
        """Whether there is nothing to learn."""

    def learn(self, texts: Iterable[str]) -> None:
        """Learn the vocabulary, where there is none yet."""

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text."""

    def tokens(self) -> Mapping[str, int]:
        """Ids by token."""


def tokenizer_file(root: Path, name: str) -> Path:
    """The file of a tokenizer below `root`, or of the folder that holds it."""
    path = root / name
    return path / "tokenizer.json" if path.is_dir() else path


def open_vocabulary(root: Path, name: str, end_token: str | None, vocab_size: int | None) -> Vocabulary:
    """`bytes`, or a tokenizer's file or folder below `root`. Raises `ConfigError` when it is absent or unreadable."""
    if name != BYTES:
        return _Tokenizer(tokenizer_file(root, name), end_token, vocab_size)
    if end_token is not None or vocab_size is not None:
        raise ConfigError(
            "task.tokenizer: bytes have 257 tokens, the last after each document; leave end_token and vocab_size out"
        )
    return _Bytes()


class _Bytes:
    """UTF-8 bytes, and 256 after each document."""

    size = 257
    end = 256
    is_known = True

    def learn(self, texts: Iterable[str]) -> None:
        """Nothing."""

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Bytes of each text."""
        return [list(text.encode()) for text in texts]

    def tokens(self) -> Mapping[str, int]:
        """Under names that no other tokenizer has."""
        return {f"byte {number}": number for number in range(256)}


class _Tokenizer:
    """A `tokenizer.json`; one that is absent is learnt where `vocab_size` says how large."""

    def __init__(self, path: Path, end_token: str | None, vocab_size: int | None) -> None:
        self._path, self._end_token, self._vocab_size = path, end_token, vocab_size
        self._tokenizer: Any = None
        self._known_size = 0
        if path.is_file():
            self._open()
        elif vocab_size is None:
            raise ConfigError(
                f"task.tokenizer: there is no file {path}. Put a tokenizer.json there, or say how large a vocabulary "
                "is to be learnt from the source: vocab_size"
            )
        elif path.suffix != ".json":
            raise ConfigError(f"task.tokenizer: {path} is to be written; expected a name that ends in .json")

    @property
    def size(self) -> int:
        """Of the file, or of the one that is going to be."""
        if self._tokenizer is None:
            assert self._vocab_size is not None
            return self._vocab_size
        return max(self._known_size, self._vocab_size or 0)

    @property
    def end(self) -> int | None:
        """`end_token`."""
        if self._end_token is None:
            return None
        found: int | None = self._tokenizer.token_to_id(self._end_token)
        if found is None:
            raise ConfigError(f"task.end_token: {self._path} has no token {self._end_token!r}")
        return found

    @property
    def is_known(self) -> bool:
        """Whether there is a file."""
        return self._tokenizer is not None

    def learn(self, texts: Iterable[str]) -> None:
        """Byte-pair encoding of `vocab_size` tokens, bytes among them, so that nothing is unknown."""
        if self._tokenizer is not None:
            return
        tokenizers = _library()
        tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = tokenizers.decoders.ByteLevel()
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=self._vocab_size,
            special_tokens=[] if self._end_token is None else [self._end_token],
            initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        tokenizer.train_from_iterator(texts, trainer)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        durable.write_text(self._path, tokenizer.to_str())
        self._use(tokenizer)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, all of them, without special tokens."""
        return [each.ids for each in self._tokenizer.encode_batch(list(texts), add_special_tokens=False)]

    def tokens(self) -> Mapping[str, int]:
        """Of the file."""
        tokens: dict[str, int] = self._tokenizer.get_vocab(with_added_tokens=True)
        return tokens

    def _open(self) -> None:
        tokenizers = _library()
        try:
            tokenizer = tokenizers.Tokenizer.from_file(str(self._path))
        except Exception as error:  # the library raises bare exceptions
            raise ConfigError(f"task.tokenizer: {self._path} is no tokenizer.json ({error})") from None
        # A file may hold the length that rows were cut at and filled up to when it was saved.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._use(tokenizer)

    def _use(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._known_size = max(self.tokens().values(), default=-1) + 1


def _library() -> Any:
    return package("tokenizers", "text")
