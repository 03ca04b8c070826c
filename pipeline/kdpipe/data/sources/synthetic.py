"""Random rows: distillation without data, and trials of any size.

Shapes: B rows of a block, K draws per row.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from hashlib import blake2b
from pathlib import Path
from typing import Annotated, Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from pydantic import AfterValidator, ConfigDict, Field
from pydantic.dataclasses import dataclass
from scipy.special import ndtri

from kdpipe.config import parse
from kdpipe.data.sources.base import reading, rows_within
from kdpipe.errors import ConfigError
from kdpipe.random_numbers import uniform

_STRICT = ConfigDict(extra="forbid")


class Synthetic:
    """`num_rows` random rows: a column `id` (the row's number) and those of `columns`, each of one kind.

        columns:
          x: {kind: normal, mean: 0, std: 1}
          width: {kind: uniform, low: 0, high: 5}
          colour: {kind: categorical, values: [red, green], weights: [0.9, 0.1]}
          image: {kind: image, shape: [28, 28, 1]}                   # uint8 pixels, evenly drawn
          tokens: {kind: tokens, vocabulary: 32000, length: [8, 128]}
          text: {kind: text, length: 12, words: [some, words]}

    `length` is a number or a range, ends included. Text takes evenly drawn words from `words`, or from the words of the
    file at data.path. A row depends on its number, the seed and its columns' names and settings only: with a
    larger `num_rows` the rows before stay what they are.
    """

    def __init__(
        self, num_rows: int, columns: Mapping[str, Mapping[str, Any]], seed: int = 0, path: Path | None = None
    ) -> None:
        if num_rows < 1 or not columns:
            raise ConfigError(
                f"data.source: num_rows is {num_rows} of {len(columns)} columns; expected at least 1 each"
            )
        if "id" in columns:
            raise ConfigError("data.source.columns.id: `id` is the row's number; give the column another name")
        self._num_rows, self._seed = num_rows, seed
        self._columns = {name: _kind(name, settings, path) for name, settings in columns.items()}

    def batches(self) -> Iterator[pa.RecordBatch]:
        """The rows in order, drawn when they are asked for."""
        size = rows_within(sum(each.row_bytes for each in self._columns.values()))
        for start in range(0, self._num_rows, size):
            rows = np.arange(start, min(start + size, self._num_rows), dtype=np.uint64)
            yield pa.RecordBatch.from_pydict(
                {
                    "id": rows.astype(np.int64),
                    **{
                        name: kind.column(uniform(rows, (kind.num_draws,), self._seed_of(name)))
                        for name, kind in self._columns.items()
                    },
                }
            )

    def _seed_of(self, column: str) -> int:
        return int.from_bytes(blake2b(f"{self._seed}\0{column}".encode(), digest_size=8).digest(), "little")


def _checked_range(length: int | tuple[int, int]) -> int | tuple[int, int]:
    least, most = _range(length)
    if not 0 <= least <= most or most == 0:
        raise ValueError("expected a length above 0, or a range such as [8, 128]")
    return length


Positive = Annotated[int, Field(gt=0)]
Length = Annotated[int | tuple[int, int], AfterValidator(_checked_range)]


class Kind(Protocol):
    """What a column holds, made of `num_draws` even numbers in [0, 1) per row."""

    @property
    def num_draws(self) -> int:
        """K."""

    @property
    def row_bytes(self) -> int:
        """Bytes of a row, before or after, whichever are more."""

    def column(self, draws: NDArray[np.float64]) -> pa.Array:
        """Values of a block `[B]` from draws `[B, K]`."""


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class Uniform:
    """Numbers from `low` to `high`, evenly drawn."""

    low: float = 0.0
    high: float = 1.0

    num_draws = 1
    row_bytes = 8

    def column(self, draws: NDArray[np.float64]) -> pa.Array:
        """float64."""
        return pa.array(self.low + (self.high - self.low) * draws[:, 0])


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class Normal:
    """Normally distributed numbers."""

    mean: float = 0.0
    std: float = 1.0

    num_draws = 1
    row_bytes = 8

    def column(self, draws: NDArray[np.float64]) -> pa.Array:
        """float64, by the inverse of the distribution function; 0 is drawn as half the least step above it."""
        return pa.array(self.mean + self.std * ndtri(np.maximum(draws[:, 0], 2.0**-54)))


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class Categorical:
    """One of `values` (text, numbers or booleans), evenly drawn or by `weights`."""

    values: list[Any]
    weights: list[float] | None = None

    num_draws = 1
    row_bytes = 8

    def __post_init__(self) -> None:
        weights = self._weights
        if len(weights) != len(self.values) or min(weights, default=0.0) <= 0:
            raise ValueError(f"{len(self.values)} values with weights {weights}; expected a weight above 0 for each")
        pa.array(self.values)  # of one type

    @property
    def _weights(self) -> list[float]:
        return self.weights if self.weights is not None else [1.0] * len(self.values)

    def column(self, draws: NDArray[np.float64]) -> pa.Array:
        """Of the type of the values."""
        shares = np.cumsum(self._weights)
        chosen = np.searchsorted(shares / shares[-1], draws[:, 0], side="right")
        return pa.array(self.values).take(pa.array(np.minimum(chosen, len(self.values) - 1)))


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class Image:
    """Pixels of `shape` (height, width, channels), every value as likely as any other."""

    shape: tuple[Positive, Positive, Positive]

    @property
    def num_draws(self) -> int:
        """One for six values."""
        return -(-int(np.prod(self.shape)) // 6)

    @property
    def row_bytes(self) -> int:
        """Of the draws."""
        return 8 * self.num_draws

    def column(self, draws: NDArray[np.float64]) -> pa.Array:
        """Lists of uint8, row-major: the upper 48 bits of each draw."""
        num_values = int(np.prod(self.shape))
        octets = (draws * 2.0**48).astype("<u8").view(np.uint8).reshape(*draws.shape, 8)[..., :6]
        pixels = octets.reshape(len(draws), -1)[:, :num_values]
        return pa.FixedSizeListArray.from_arrays(pa.array(pixels.ravel()), num_values)


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class Tokens:
    """Token ids below `vocabulary`, evenly drawn; `length` of them, or as many as are drawn from a range."""

    vocabulary: Positive
    length: Length

    @property
    def num_draws(self) -> int:
        """The length, and the most tokens."""
        return 1 + _range(self.length)[1]

    @property
    def row_bytes(self) -> int:
        """Of the draws."""
        return 8 * self.num_draws

    def column(self, draws: NDArray[np.float64]) -> pa.Array:
        """Lists of int32."""
        return _lists(pa.array(np.arange(self.vocabulary, dtype=np.int32)), self.length, draws)


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class Text:
    """Evenly drawn words with a space between them; `length` of them, or as many as are drawn from a range."""

    words: list[str] = Field(min_length=1)
    length: Length

    @property
    def num_draws(self) -> int:
        """The length, and the most words."""
        return 1 + _range(self.length)[1]

    @property
    def row_bytes(self) -> int:
        """Of the draws and the longest words."""
        return self.num_draws * (8 + max(len(word.encode()) for word in self.words))

    def column(self, draws: NDArray[np.float64]) -> pa.Array:
        """Text."""
        return pc.binary_join(_lists(pa.array(self.words, pa.string()), self.length, draws), " ")


def _range(length: Length) -> tuple[int, int]:
    return (length, length) if isinstance(length, int) else length


def _lists(values: pa.Array, length: Length, draws: NDArray[np.float64]) -> pa.ListArray:
    """Lists of drawn values: the first draw `[B, 1 + K]` of a row is for its length."""
    least, most = _range(length)
    lengths = least + np.floor(draws[:, 0] * (most - least + 1)).astype(np.int64)
    is_used = np.arange(most) < lengths[:, None]
    chosen = np.floor(draws[:, 1:][is_used] * len(values)).astype(np.int64)
    offsets = np.concatenate([np.zeros(1, np.int32), np.cumsum(lengths, dtype=np.int32)])
    return pa.ListArray.from_arrays(pa.array(offsets), values.take(pa.array(chosen)))


KINDS: Mapping[str, type[Kind]] = {
    "uniform": Uniform,
    "normal": Normal,
    "categorical": Categorical,
    "image": Image,
    "tokens": Tokens,
    "text": Text,
}


def _kind(name: str, settings: Mapping[str, Any], words: Path | None) -> Kind:
    """The kind of one column. Raises `ConfigError` with the choices."""
    where = f"data.source.columns.{name}"
    given = {key: value for key, value in settings.items() if key != "kind"}
    kind = str(settings.get("kind"))
    if kind not in KINDS:
        raise ConfigError(f"{where}.kind: there is no kind {kind!r}; the kinds are {', '.join(KINDS)}")
    if KINDS[kind] is Text and "words" not in given and words is not None:
        with reading(words):
            given["words"] = words.read_text(encoding="utf-8").split()
    return parse(KINDS[kind], given, where)
