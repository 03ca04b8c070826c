"""Augmentations of text, before any tokenizer: rows have `Ragged` UTF-8 bytes `text` and, of pairs, `pair`."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kdpipe.data.columns import Column, Columns, Ragged
from kdpipe.errors import ConfigError
from kdpipe.random_numbers import uniform
from kdpipe.transforms.checking import check_probability

_TEXTS = ("text", "pair")
_WORD = re.compile(rb"\s*\S+")  # with the space before it; of ASCII only, so UTF-8 stays whole


@dataclass(frozen=True, kw_only=True)
class WordDropout:
    """Leaves each word of a text out with `probability` (Iyyer et al. 2015), but never all of them.

    A word is what stands between ASCII spaces, and goes with the space before it.
    """

    probability: float = 0.1

    def __post_init__(self) -> None:
        check_probability(self)

    def __call__(self, columns: Columns, keys: NDArray[np.uint64], seed: int) -> Columns:
        """Draws one number per word."""
        if not isinstance(columns.get(_TEXTS[0]), Ragged):
            raise ConfigError(f"there is no column {_TEXTS[0]!r}; WordDropout is for rows of text")
        changed: dict[str, Column] = dict(columns)
        for place, name in enumerate(_TEXTS):
            column = columns.get(name)
            if isinstance(column, Ragged):
                changed[name] = self._dropped(column, keys, seed, place)
        return changed

    def _dropped(self, column: Ragged, keys: NDArray[np.uint64], seed: int, place: int) -> Ragged:
        texts = [column.row(row).tobytes() for row in range(len(column))]
        words = [_WORD.findall(text) for text in texts]
        most = max((len(each) for each in words), default=0)
        draws = uniform(keys, (place + 1, most), seed)[:, place] if most else np.empty((len(texts), 0))
        kept = [self._kept(*each) for each in zip(texts, words, draws, strict=True)]
        offsets = np.cumsum([0, *map(len, kept)])
        return Ragged(values=np.frombuffer(b"".join(kept), np.uint8), offsets=offsets)

    def _kept(self, text: bytes, words: list[bytes], draws: NDArray[np.float64]) -> bytes:
        draws = draws[: len(words)]
        stays = draws >= self.probability
        if stays.all():
            return text
        if not stays.any():
            stays[draws.argmax()] = True
        left = b"".join(word for word, stay in zip(words, stays.tolist(), strict=True) if stay)
        return left if stays[0] else left.lstrip()
