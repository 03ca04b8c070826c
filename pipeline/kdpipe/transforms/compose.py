"""Transforms one after the other, and a function of one's own as a transform.

Shapes: B rows.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from kdpipe.config import FactoryField, bind, load_module, parse, resolve, takes
from kdpipe.data.columns import Array, Column, Columns, Ragged
from kdpipe.errors import ConfigError, at
from kdpipe.fingerprint import joined, source_digests
from kdpipe.random_numbers import derived_seed
from kdpipe.views import MixingTransform, Pairs, Transform, is_transform

_WHERE = "views.transform"

PerRow = Callable[[Mapping[str, Array], np.random.Generator], Mapping[str, Array]]
"""`(example, rng) -> example`: one row's values by column name."""


class Compose:
    """Transforms in their order; each draws from a stream of its own, which its place in the list names.

    One of them may mix rows: those before it change a row and its partner, those after it what became of both.
    """

    def __init__(self, transforms: Sequence[Any], root: Path = Path(), where: str = _WHERE) -> None:
        """`transforms`: each a `Transform`, or its factory as params.yaml has it; files are relative to `root`.

        `where` is its own key in params.yaml, for messages. Raises `ConfigError`.
        """
        where = f"{where}.transforms"
        if isinstance(transforms, str | Mapping) or not isinstance(transforms, Sequence) or not transforms:
            raise ConfigError(f"{where}: expected a list of transforms (found {transforms!r})")
        self._transforms = [_made(each, root, f"{where}.{place}") for place, each in enumerate(transforms)]
        mixing = [place for place, each in enumerate(self._transforms) if getattr(each, "mixes", False)]
        if len(mixing) > 1:
            names = ", ".join(type(self._transforms[place]).__name__ for place in mixing)
            raise ConfigError(f"{where}: {names} all mix rows; a row has one partner, so name one of them")
        self._mixing = mixing[0] if mixing else None

    @property
    def mixes(self) -> bool:
        """Whether one of the transforms makes a row of two."""
        return self._mixing is not None

    @staticmethod
    def reads(arguments: Mapping[str, Any], root: Path) -> dict[str, str]:
        """Digests of the code that the transforms reach."""
        digests: list[Mapping[str, str]] = []
        for value in arguments["transforms"]:
            factory = parse(FactoryField, value, _WHERE)
            target = resolve(factory.path, root, _WHERE)
            digests.append(source_digests(target, load_module(factory.path, root, _WHERE).__name__))
            digests.append(target.reads(factory.arguments, root) if hasattr(target, "reads") else {})
        return joined(*digests)

    def __call__(self, columns: Columns, keys: NDArray[np.uint64], seed: int) -> Columns:
        """Columns of the same layout, if every transform keeps it."""
        return self._changed(columns, keys, seed, range(len(self._transforms)))

    def mix(
        self, columns: Columns, keys: NDArray[np.uint64], seed: int, pairs: Pairs
    ) -> tuple[Columns, NDArray[np.float64]]:
        """As `MixingTransform.mix`."""
        assert self._mixing is not None
        mixing = cast("MixingTransform", self._transforms[self._mixing])
        columns = self._changed(columns, keys, seed, range(self._mixing))
        mixed, share = mixing.mix(columns, keys, derived_seed(seed, self._mixing), pairs)
        after = range(self._mixing + 1, len(self._transforms))
        return self._changed(mixed, keys[pairs.rows], seed, after), share

    def _changed(self, columns: Columns, keys: NDArray[np.uint64], seed: int, places: range) -> Columns:
        for place in places:
            transform = cast("Transform", self._transforms[place])
            columns = transform(columns, keys, derived_seed(seed, place))
        return columns


class PerExample:
    """A function `(example, rng)` of one row at a time as a transform: slower than one of whole batches.

    `example` maps a column's name to the row's values, which may be changed in place: an array such as uint8
    `[H, W, C]`; of text its UTF-8 bytes, uint8 `[n]`. It gives such a mapping back, with arrays of the same dtypes.
    `rng` is the row's and the view's own; everything random must come from it.
    """

    def __init__(self, function: str | PerRow, root: Path = Path(), where: str = _WHERE) -> None:
        """`function`: "package.module:name" or "file.py:name", relative to `root`; a class is called first.

        `where` is its own key in params.yaml, for messages. Raises `ConfigError`.
        """
        self._where = f"{where}.function"
        found: Any = resolve(function, root, self._where) if isinstance(function, str) else function
        self._function: PerRow = cast("PerRow", found() if inspect.isclass(found) else found)
        if not takes(self._function, 2):
            raise ConfigError(f"{self._where}: {function} does not take (example, rng)")

    @staticmethod
    def reads(arguments: Mapping[str, Any], root: Path) -> dict[str, str]:
        """Digests of the code that the function reaches."""
        path = arguments["function"]
        return source_digests(resolve(path, root, _WHERE), load_module(path, root, _WHERE).__name__)

    def __call__(self, columns: Columns, keys: NDArray[np.uint64], seed: int) -> Columns:
        """What the function gives, row by row. Raises `ConfigError` where that lacks a column."""
        rows = [
            self._function(
                {name: _row(column, row).copy() for name, column in columns.items()},
                np.random.Generator(np.random.Philox(key=[key, seed])),
            )
            for row, key in enumerate(keys)
        ]
        for given in rows:
            if not isinstance(given, Mapping) or not columns.keys() <= given.keys():
                found = type(given).__name__
                if isinstance(given, Mapping):
                    found = f"a mapping of {', '.join(map(str, given)) or 'nothing'}"
                raise ConfigError(
                    f"{self._where}: PerExample's function gave {found}; expected a mapping with {', '.join(columns)}"
                )
        return {name: _joined(column, [each[name] for each in rows]) for name, column in columns.items()}


def _made(value: Any, root: Path, where: str) -> Transform | MixingTransform:
    if isinstance(value, Mapping):
        factory = parse(FactoryField, value, where)
        bound = bind(factory, root, where, root=root, where=where)
        with at(where):
            value = bound.make()
    if not is_transform(value):
        raise ConfigError(f"{where}: {value!r} is no Transform: it must take (columns, keys, seed)")
    transform: Transform | MixingTransform = value
    return transform


def _row(column: Column, row: int) -> Array:
    values: Array = column.row(row) if isinstance(column, Ragged) else column[row]
    return values


def _joined(column: Column, rows: list[Array]) -> Column:
    if not isinstance(column, Ragged):
        return np.stack(rows) if rows else column
    offsets = np.cumsum([0, *map(len, rows)])
    return Ragged(values=np.concatenate([column.values[:0], *rows]), offsets=offsets)
