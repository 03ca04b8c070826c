"""Text as a model takes it: token ids, on the right padded to one length, and a mask of the real ones.

Rows have the column `text`, and `pair` where there are two texts (both UTF-8 bytes). Shapes: B batch, T tokens.
"""

from __future__ import annotations

import itertools
import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdpipe.config import package
from kdpipe.data.columns import Columns, Ragged, texts_of
from kdpipe.errors import ConfigError, DataError
from kdpipe.huggingface import Checkpoint
from kdpipe.preprocess.base import State

TEXT, PAIR = "text", "pair"
SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
_MIN_LENGTH = 5
"""Two texts of one token each, with the special tokens around them."""

# Threads of the tokenizers library do not survive the fork that makes a data loader's worker.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


class Encoded(NamedTuple):
    """Token ids of some rows, and which of two texts each token belongs to, where a model wants to know."""

    ids: Sequence[Sequence[int]]
    types: Sequence[Sequence[int]] | None


class Utf8Bytes:
    """A token per byte, as in ByT5 (Xue et al. 2022): byte b is b + 3, 1 ends each text, 0 pads. Nothing to learn.

    Longer rows are cut at `max_length`; of a pair the longer text first.
    """

    def __init__(self, max_length: int = 256) -> None:
        _check_length(max_length)
        self._max_length = max_length
        self.offers = {"vocab_size": 259, "pad_id": 0, "max_length": max_length}

    def fit(self, blocks: Iterable[Columns]) -> None:
        """Nothing."""

    def state(self) -> State:
        """Empty."""
        return {}

    def load_state(self, state: State) -> None:
        """Nothing."""

    def lengths(self, columns: Columns) -> NDArray[np.int64]:
        """Tokens per row `[B]`."""
        lengths: NDArray[np.int64] = np.sum(self._kept(columns), axis=0) + len(self._texts(columns))
        return lengths

    def __call__(self, columns: Columns) -> dict[str, Tensor]:
        """`input_ids` and `attention_mask`, int64 `[B, T]`."""
        place = np.arange(self._max_length)
        ids = np.zeros((len(self._texts(columns)[0]), self._max_length), np.int64)
        mask = np.zeros_like(ids)
        start = np.zeros((len(ids), 1), np.int64)
        for text, kept in zip(self._texts(columns), self._kept(columns), strict=True):
            end = start + kept[:, np.newaxis]
            inside = (place >= start) & (place < end)
            at = (text.offsets[:-1, np.newaxis] + place - start)[inside]
            ids[inside] = text.values[at].astype(np.int64) + 3
            ids[place == end] = 1
            mask |= place <= end
            start = end + 1
        return {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask)}

    @staticmethod
    def _texts(columns: Columns) -> list[Ragged]:
        return [_column(columns, name) for name in (TEXT, PAIR) if name == TEXT or name in columns]

    def _kept(self, columns: Columns) -> list[NDArray[np.int64]]:
        """How many bytes of each text are kept, `[B]`."""
        lengths = [np.diff(text.offsets) for text in self._texts(columns)]
        room = self._max_length - len(lengths)
        if len(lengths) == 1:
            return [np.minimum(lengths[0], room)]
        first, second = lengths
        second = np.minimum(second, np.maximum(room - first, room // 2))
        return [np.minimum(first, room - second), second]


class Tokenizer:
    """A vocabulary of at most `vocab_size` tokens, learnt from the rows that the model trains on.

    `bpe`: byte-level byte-pair encoding (Sennrich et al. 2016; GPT-2); no text is unknown to it. `wordpiece`: pieces of
    words, `##` before those inside one (Wu et al. 2016; BERT). `word`: the most frequent words and punctuation marks,
    [UNK] for the others. Rows become `[CLS] text [SEP]`, or
    `[CLS] text [SEP] pair [SEP]`; of longer ones than `max_length` the end is cut, of a pair the longer text first.
    The same rows give the same vocabulary, in any order. With `token_type_ids` a pair's rows tell which text a token
    belongs to. The state is a `tokenizer.json`. Needs the package tokenizers.
    """

    def __init__(
        self,
        vocab_size: int,
        max_length: int,
        kind: Literal["bpe", "wordpiece", "word"] = "bpe",
        lowercase: bool = False,
        token_type_ids: bool = True,
    ) -> None:
        _check_length(max_length)
        smallest = len(SPECIAL_TOKENS) + (256 if kind == "bpe" else 1)
        if vocab_size < smallest:
            raise ConfigError(
                f"preprocess: vocab_size is {vocab_size}; expected at least {smallest}: the special tokens "
                f"{', '.join(SPECIAL_TOKENS)}" + (" and 256 bytes" if kind == "bpe" else " and a word")
            )
        self._vocab_size, self._max_length, self._kind, self._lowercase = vocab_size, max_length, kind, lowercase
        self._token_type_ids = token_type_ids
        self._state: State | None = None
        self._tokenizer: Any = None

    @property
    def offers(self) -> dict[str, Any]:
        """For the model: `vocab_size` (what was learnt), `pad_id` and `max_length`."""
        size = self._learnt().get_vocab_size(with_added_tokens=True)
        return {"vocab_size": size, "pad_id": 0, "max_length": self._max_length}

    def fit(self, blocks: Iterable[Columns]) -> None:
        """Learn the vocabulary."""
        parts = (texts_of(_column(block, name)) for block in blocks for name in (TEXT, PAIR) if name in block)
        texts = itertools.chain.from_iterable(parts)
        if self._kind == "wordpiece":
            tokenizer = self._wordpiece(texts)
        else:
            tokenizer, trainer = self._untrained()
            tokenizer.train_from_iterator(texts, trainer)
        tokenizer.post_processor = package("tokenizers", "text").processors.TemplateProcessing(
            single="[CLS] $A [SEP]",
            pair="[CLS] $A [SEP] $B:1 [SEP]:1",
            special_tokens=[(token, SPECIAL_TOKENS.index(token)) for token in ("[CLS]", "[SEP]")],
        )
        self.load_state({"tokenizer": json.loads(tokenizer.to_str())})

    def state(self) -> State:
        """`tokenizer`: the content of a tokenizer.json."""
        if self._state is None:
            raise ConfigError("preprocess Tokenizer has no vocabulary yet: train the model here, or take another's")
        return self._state

    def load_state(self, state: State) -> None:
        """Take back what `state` gave."""
        self._state, self._tokenizer = state, None

    def lengths(self, columns: Columns) -> NDArray[np.int64]:
        """Tokens per row `[B]`."""
        return _lengths(self._encode(columns))

    def __call__(self, columns: Columns) -> dict[str, Tensor]:
        """`input_ids`, `attention_mask` and, of pairs, `token_type_ids`: int64 `[B, T]`."""
        return _padded(self._encode(columns), self._max_length, 0)

    def _encode(self, columns: Columns) -> Encoded:
        tokenizer, (texts, pairs) = self._learnt(), _texts(columns)
        rows = tokenizer.encode_batch_fast(texts if pairs is None else list(zip(texts, pairs, strict=True)))
        wants_types = pairs is not None and self._token_type_ids
        return Encoded([each.ids for each in rows], [each.type_ids for each in rows] if wants_types else None)

    def __getstate__(self) -> dict[str, Any]:
        # Pickled, a tokenizer of the library forgets how it takes special tokens.
        return {**vars(self), "_tokenizer": None}

    def _learnt(self) -> Any:
        state = self.state()
        if self._tokenizer is None:
            self._tokenizer = package("tokenizers", "text").Tokenizer.from_str(json.dumps(state["tokenizer"]))
            self._tokenizer.encode_special_tokens = True  # "[SEP]" in a text is a text
            self._tokenizer.enable_truncation(self._max_length)
        return self._tokenizer

    def _untrained(self) -> tuple[Any, Any]:
        """A tokenizer and its trainer. Unigram's makes another vocabulary of the same rows in each process."""
        library = package("tokenizers", "text")
        settings = {"special_tokens": list(SPECIAL_TOKENS), "vocab_size": self._vocab_size, "show_progress": False}
        if self._kind == "word":
            tokenizer = self._of_words(library.models.WordLevel(unk_token="[UNK]"))
            return tokenizer, library.trainers.WordLevelTrainer(**settings)
        tokenizer = library.Tokenizer(library.models.BPE())
        normalizers = [library.normalizers.NFC(), *([library.normalizers.Lowercase()] if self._lowercase else [])]
        tokenizer.normalizer = library.normalizers.Sequence(normalizers)
        tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=True)
        tokenizer.decoder = library.decoders.ByteLevel()
        alphabet = library.pre_tokenizers.ByteLevel.alphabet()
        return tokenizer, library.trainers.BpeTrainer(initial_alphabet=alphabet, **settings)

    def _wordpiece(self, texts: Iterable[str]) -> Any:
        """WordPiece from byte-pair merges of words, whose ties are broken by ids.

        The library's own trainer numbers the characters inside words in another order in each process; here they are
        given, as tokens of their own.
        """
        library = package("tokenizers", "text")
        result = self._of_words(library.models.WordPiece(unk_token="[UNK]"))
        words = Counter(
            word
            for text in texts
            for word, _ in result.pre_tokenizer.pre_tokenize_str(result.normalizer.normalize_str(text))
        )
        alphabet = sorted({character for word in words for character in word})
        inside = [f"##{character}" for character in alphabet]
        if self._vocab_size < len(SPECIAL_TOKENS) + 2 * len(alphabet):
            raise ConfigError(
                f"preprocess: vocab_size is {self._vocab_size}, but the rows have {len(alphabet)} different characters;"
                f" expected at least {len(SPECIAL_TOKENS) + 2 * len(alphabet)}, or use kind: bpe"
            )
        merges = library.Tokenizer(library.models.BPE(continuing_subword_prefix="##"))
        merges.pre_tokenizer = library.pre_tokenizers.WhitespaceSplit()
        trainer = library.trainers.BpeTrainer(
            vocab_size=self._vocab_size,
            special_tokens=[*SPECIAL_TOKENS, *inside],
            initial_alphabet=alphabet,
            continuing_subword_prefix="##",
            show_progress=False,
        )
        repeated = (
            f"{word} " * min(_REPEATED, count - start)
            for word, count in sorted(words.items())
            for start in range(0, count, _REPEATED)
        )
        merges.train_from_iterator(repeated, trainer)
        result.model = library.models.WordPiece(merges.get_vocab(), unk_token="[UNK]", continuing_subword_prefix="##")
        result.add_special_tokens(list(SPECIAL_TOKENS))
        result.decoder = library.decoders.WordPiece(prefix="##")
        return result

    def _of_words(self, model: Any) -> Any:
        """A tokenizer that splits at blanks and punctuation, as BERT does."""
        library = package("tokenizers", "text")
        tokenizer = library.Tokenizer(model)
        tokenizer.normalizer = library.normalizers.BertNormalizer(lowercase=self._lowercase, strip_accents=False)
        tokenizer.pre_tokenizer = library.pre_tokenizers.BertPreTokenizer()
        return tokenizer


_REPEATED = 10_000
"""How often a word stands in one text at most, while merges are learnt."""


class PretrainedTokenizer:
    """Any tokenizer of Hugging Face Transformers, as it is.

    `path` is a folder that holds one, or a tokenizer.json; `hub` is "name@commit" of the Hugging Face Hub.

    Rows are cut at `max_length` by the tokenizer's own rule. `pad_token` is for a tokenizer that names none.
    `token_type_ids`: whether pairs come with them; null: as the tokenizer says that its model wants it. The state holds
    digests of its files, and another tokenizer in the same place is refused. Needs the package transformers.
    """

    def __init__(
        self,
        max_length: int,
        path: Path | None = None,
        hub: str | None = None,
        pad_token: str | None = None,
        token_type_ids: bool | None = None,
    ) -> None:
        _check_length(max_length)
        checkpoint = Checkpoint(path=path, hub=hub)
        self._tokenizer = checkpoint.tokenizer()
        self._where, self._max_length = str(checkpoint), max_length
        self._identity = checkpoint.tokenizer_identity()
        self._pad_id = self._id_of_padding(pad_token)
        named = "token_type_ids" in self._tokenizer.model_input_names
        self._token_type_ids = named if token_type_ids is None else token_type_ids
        size = max(self._tokenizer.get_vocab().values()) + 1
        self.offers = {"vocab_size": size, "pad_id": self._pad_id, "max_length": max_length}

    @property
    def tokens(self) -> Mapping[str, int]:
        """Ids by token."""
        tokens: dict[str, int] = self._tokenizer.get_vocab()
        return tokens

    @staticmethod
    def reads(arguments: Mapping[str, Any], root: Path) -> dict[str, str]:
        """Digests of the tokenizer's files."""
        path = arguments.get("path")
        files = {} if path is None else Checkpoint(path=root / path).tokenizer_identity()
        return {f"{path}/{name}": digest for name, digest in files.items()}

    def fit(self, blocks: Iterable[Columns]) -> None:
        """Nothing: it is ready."""

    def state(self) -> State:
        """`files`: the SHA-256 of each of the tokenizer's files."""
        return {"files": self._identity}

    def load_state(self, state: State) -> None:
        """Raise `ConfigError` unless this is the tokenizer that `state` was taken of."""
        then = state["files"]
        changed = sorted(name for name in {*then, *self._identity} if then.get(name) != self._identity.get(name))
        if changed:
            raise ConfigError(
                f"the tokenizer in {self._where} is not the one that the model was trained with: {', '.join(changed)} "
                "differs. Put the earlier one back, or train the model again"
            )

    def lengths(self, columns: Columns) -> NDArray[np.int64]:
        """Tokens per row `[B]`."""
        return _lengths(self._encode(columns))

    def __call__(self, columns: Columns) -> dict[str, Tensor]:
        """`input_ids`, `attention_mask` and, of pairs where the model wants them, `token_type_ids`: int64 `[B, T]`."""
        return _padded(self._encode(columns), self._max_length, self._pad_id)

    def _encode(self, columns: Columns) -> Encoded:
        texts, pairs = _texts(columns)
        wants_types = pairs is not None and self._token_type_ids
        if not texts:  # which the library does not take
            return Encoded([], [] if wants_types else None)
        rows = self._tokenizer(
            texts, pairs, truncation=True, max_length=self._max_length, return_token_type_ids=wants_types
        )
        return Encoded(rows["input_ids"], rows["token_type_ids"] if wants_types else None)

    def _id_of_padding(self, token: str | None) -> int:
        vocabulary, token = self._tokenizer.get_vocab(), token or self._tokenizer.pad_token
        if token is None:
            raise ConfigError(
                f"the tokenizer in {self._where} names no token to pad with: give pad_token, one of its own"
            )
        if token not in vocabulary:
            raise ConfigError(f"preprocess.pad_token: the tokenizer in {self._where} has no token {token!r}")
        return int(vocabulary[token])


def _check_length(max_length: int) -> None:
    if max_length < _MIN_LENGTH:
        raise ConfigError(f"preprocess: max_length is {max_length}; expected at least {_MIN_LENGTH} tokens")


def _column(columns: Columns, name: str) -> Ragged:
    column = columns.get(name)
    if not isinstance(column, Ragged):
        raise DataError(f"the rows have no column {name!r} of text; they have {', '.join(columns)}")
    return column


def _texts(columns: Columns) -> tuple[list[str], list[str] | None]:
    """The texts of a batch, and the second ones where there are any."""
    return texts_of(_column(columns, TEXT)), texts_of(_column(columns, PAIR)) if PAIR in columns else None


def _lengths(encoded: Encoded) -> NDArray[np.int64]:
    return np.array([len(each) for each in encoded.ids], np.int64)


def _padded(encoded: Encoded, max_length: int, pad_id: int) -> dict[str, Tensor]:
    """Rows of tokens as tensors `[B, T]`, T = `max_length`."""
    real = np.arange(max_length) < _lengths(encoded)[:, np.newaxis]

    def padded(rows: Sequence[Sequence[int]], padding: int) -> Tensor:
        tensor = torch.full(real.shape, padding, dtype=torch.int64)
        tensor[torch.from_numpy(real)] = torch.tensor(list(itertools.chain.from_iterable(rows)), dtype=torch.int64)
        return tensor

    inputs = {"input_ids": padded(encoded.ids, pad_id), "attention_mask": torch.from_numpy(real.astype(np.int64))}
    return inputs if encoded.types is None else {**inputs, "token_type_ids": padded(encoded.types, 0)}
