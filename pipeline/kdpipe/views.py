"""Which versions of a row the teacher speaks about. View 0 is the clean row; views 1, 2, … are augmented ones.

Shapes: N rows, B batch, M rows that a batch is made of: with mixing, also its rows' partners.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol, cast, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from kdpipe.config import takes
from kdpipe.data.columns import Column, Columns, Ragged, concatenate, layout_of, take
from kdpipe.errors import ConfigError
from kdpipe.random_numbers import derived_seed, uniform

PROBE_ROWS = 16
"""Rows that `ViewSpec.probe` looks at."""
PARTNER_BLOCK = 256
"""Rows that lie together, from a multiple of it on: a row is mixed with one of them."""
_KNOWN_BLOCKS = 1024
_FLOAT_STEP, _PIXELS_SHARE = 1e-5, 0.01

Read = Callable[[NDArray[np.int64]], Columns]
"""Prepared rows by number, in the given order."""


@runtime_checkable
class Transform(Protocol):
    """Makes augmented versions of rows: the same ones for the same keys, whatever the batch, order or process."""

    def __call__(self, columns: Columns, keys: NDArray[np.uint64], seed: int) -> Columns:
        """Columns of `B` prepared rows -> columns of the same layout. `keys [B]` names (row, view).

        Draw with `kdpipe.random_numbers.uniform(keys, shape, seed)`.
        """


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """Which of M rows are shown, and which others they are mixed with: places `[B]` among the M."""

    rows: NDArray[np.int64]
    partners: NDArray[np.int64]

    def of(self, columns: Columns) -> tuple[Columns, Columns]:
        """The shown rows, and their partners."""
        return taken(columns, self.rows), taken(columns, self.partners)


@runtime_checkable
class MixingTransform(Protocol):
    """Makes augmented versions of rows from the rows themselves and a partner of each: `mixes` is True."""

    mixes: bool

    def mix(
        self, columns: Columns, keys: NDArray[np.uint64], seed: int, pairs: Pairs
    ) -> tuple[Columns, NDArray[np.float64]]:
        """M prepared rows with `keys [M]` -> the `B` shown ones, mixed, and the share `[B]` of each that is its own.

        Columns keep their layout; the other share, 1 less, is the partner's. Draw by the shown rows' keys.
        """


def is_transform(value: Any) -> bool:
    """Whether something can be called as a `Transform`, or mixes as a `MixingTransform`."""
    if getattr(value, "mixes", False):
        mix = getattr(value, "mix", None)
        return callable(mix) and takes(mix, 4)
    return callable(value) and takes(value, 3)


class PartnerPlan:
    """Who is mixed with whom: those of one split in one aligned block of 256 rows, in a cycle.

    Its order is drawn from (seed, sample id, view), so a partner depends on the block's rows and their splits, and on
    nothing else. A row alone in its split and block is its own partner.
    """

    def __init__(self, sample_ids: NDArray[np.str_], splits: NDArray[np.str_]) -> None:
        """`sample_ids` and `splits`, `[N]` in row order."""
        self.sample_ids, self.splits = np.asarray(sample_ids, np.str_), np.asarray(splits, np.str_)
        self._known: dict[tuple[int, int, int], NDArray[np.int64]] = {}

    def of(self, rows: NDArray[np.int64], view: int, seed: int) -> NDArray[np.int64]:
        """The partners' row numbers `[B]` of row numbers `[B]`."""
        blocks, place = np.unique(rows // PARTNER_BLOCK, return_inverse=True)
        partners = [self._partners_in(block, view, seed) for block in blocks.tolist()]
        return np.stack(partners)[place, rows % PARTNER_BLOCK] if partners else rows

    def _partners_in(self, block: int, view: int, seed: int) -> NDArray[np.int64]:
        """Partners of a block's rows `[256]`; what stands after the last row means nothing."""
        found = self._known.get((block, view, seed))
        if found is None:
            if len(self._known) >= _KNOWN_BLOCKS:
                self._known.clear()
            found = self._known[block, view, seed] = self._drawn(block, view, seed)
        return found

    def _drawn(self, block: int, view: int, seed: int) -> NDArray[np.int64]:
        start = block * PARTNER_BLOCK
        here = slice(start, start + PARTNER_BLOCK)
        splits = self.splits[here]
        draws = uniform(row_keys(self.sample_ids[here].tolist(), view), (1,), derived_seed(seed, "partners"))[:, 0]
        partners = np.full(PARTNER_BLOCK, start, np.int64)
        for split in np.unique(splits):
            members = np.flatnonzero(splits == split)
            cycle = members[np.argsort(draws[members], kind="stable")]
            partners[cycle] = start + np.roll(cycle, -1)
        return partners


def partner_blocks(start: int, stop: int, num_rows: int) -> slice:
    """The rows, of `num_rows`, that partners of rows `[start, stop)` depend on: their blocks."""
    return slice(start // PARTNER_BLOCK * PARTNER_BLOCK, min(-(-stop // PARTNER_BLOCK) * PARTNER_BLOCK, num_rows))


@dataclass(frozen=True, kw_only=True)
class Shown:
    """What a view shows of rows; where it mixes, with which row numbers `[B]`, and each row's own share `[B]`."""

    columns: Columns
    partners: NDArray[np.int64] | None = None
    share: NDArray[np.float64] | None = None


@dataclass(frozen=True, kw_only=True)
class ViewSpec:
    """How many augmented views a store holds beside the clean row, from which transform and seed.

    `partners` are needed where the transform mixes rows; `where` is the transform's key in params.yaml, for messages.
    """

    count: int = 0
    seed: int = 0
    transform: Transform | MixingTransform | None = None
    partners: PartnerPlan | None = None
    where: str = "views.transform"

    @property
    def num_views(self) -> int:
        """Length of a store's view axis: the clean row and `count` augmented ones."""
        return 1 + self.count

    def view_of_epoch(self, epoch: int) -> int:
        """The view that a student meets in `epoch` (from 0): 1 + epoch mod count, or the clean row."""
        return 1 + epoch % self.count if self.count else 0

    @property
    def mixes(self) -> bool:
        """Whether an augmented row is made of two."""
        return bool(getattr(self.transform, "mixes", False))

    def read(self, read: Read, sample_ids: NDArray[np.str_], rows: NDArray[np.int64], view: int) -> Shown:
        """What a view shows of prepared rows, by their numbers `[B]`; `sample_ids [N]` are those of all rows.

        Partners are read as well. Raises `ConfigError` as `of`, and where the transform mixes and nothing says whom.
        """
        if view == 0:
            return Shown(columns=read(rows))
        if not self.mixes:
            return Shown(columns=self.of(read(rows), sample_ids[rows].tolist(), view))
        if self.partners is None:
            raise ConfigError(f"{self.where} mixes rows: give ViewSpec(partners=PartnerPlan(sample_ids, splits))")
        partners = self.partners.of(rows, view, self.seed)
        needed, places = np.unique(np.concatenate([rows, partners]), return_inverse=True)
        pairs = Pairs(rows=places[: len(rows)], partners=places[len(rows) :])
        keys = row_keys(sample_ids[needed].tolist(), view)
        columns, share = self._mixed(cast("MixingTransform", self.transform), read(needed), keys, pairs)
        return Shown(columns=columns, partners=partners, share=share)

    def of(self, columns: Columns, sample_ids: Iterable[str], view: int) -> Columns:
        """What a view shows of prepared rows; teacher and student see the same.

        Raises `ConfigError` when the transform fails, or gives columns of another layout: other names, another number
        or shape of rows, another dtype; or when it mixes rows, as `read` does.
        """
        if view == 0 or self.transform is None:
            return columns
        if not isinstance(self.transform, Transform) or self.mixes:
            raise ConfigError(f"{self._name} mixes rows; use ViewSpec.read")
        return self._transformed(self.transform, columns, row_keys(sample_ids, view))

    def probe(self, columns: Columns, sample_ids: Sequence[str]) -> None:
        """Show up to `PROBE_ROWS` of some rows in view 1, a second time, in another order and one by one.

        Raises `ConfigError` unless they look the same each time, but for rounding: then teacher and student, who meet
        a row in other batches, would see other rows.
        """
        if self.transform is None:
            return
        ids = np.asarray(sample_ids[:PROBE_ROWS])
        rows = np.arange(len(ids))
        views = replace(self, partners=PartnerPlan(ids, np.full(len(ids), "")))

        def shown(order: NDArray[np.int64]) -> Columns:
            found = views.read(lambda some: taken(columns, some), ids, order, view=1)
            return found.columns if found.share is None else {**found.columns, "share": found.share}

        order = np.random.default_rng(0).permutation(rows)
        first, moved, alone = shown(rows), shown(order), [shown(rows[[row]]) for row in rows]
        again: dict[str, Columns] = {
            "a second time": shown(rows),
            "in another order": taken(moved, np.argsort(order)),
            "one by one": {name: concatenate([each[name] for each in alone]) for name in first},
        }
        for way, found in again.items():
            for name, column in first.items():
                if not look_the_same(column, found[name]):
                    raise ConfigError(
                        f"{self._name} makes another {name!r} of the same {len(rows)} rows when it is "
                        f"given them {way}; expected the same row for the same key, whatever the batch. Draw with "
                        "kdpipe.random_numbers.uniform(keys, shape, seed), and let no row depend on the others (no "
                        "shuffling, no mean over the batch)."
                    )

    @property
    def _name(self) -> str:
        return f"{self.where}: {getattr(self.transform, '__name__', type(self.transform).__name__)}"

    def _transformed(self, transform: Transform, columns: Columns, keys: NDArray[np.uint64]) -> Columns:
        expected = layout_of(columns)
        with self._naming(expected):
            found = transform(columns, keys, self.seed)
        self._check_layout(found, expected)
        return found

    def _mixed(
        self, transform: MixingTransform, columns: Columns, keys: NDArray[np.uint64], pairs: Pairs
    ) -> tuple[Columns, NDArray[np.float64]]:
        expected = layout_of(taken(columns, pairs.rows))
        with self._naming(expected):
            found, share = transform.mix(columns, keys, self.seed, pairs)
            if share.shape != pairs.rows.shape or not ((share >= 0) & (share <= 1)).all():
                raise ConfigError(f"the shares are {share}; expected {len(pairs.rows)} numbers from 0 to 1")
        self._check_layout(found, expected)
        return found, share

    @contextmanager
    def _naming(self, given: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            raise ConfigError(f"{self._name} fails on {given}: {type(error).__name__}: {error}") from error

    def _check_layout(self, found: Any, expected: str) -> None:
        if layout_of(found) != expected:
            raise ConfigError(
                f"{self._name} gives {layout_of(found)}; expected the layout that it was given: {expected}"
            )


CLEAN = ViewSpec()
"""No augmented views."""


def row_keys(sample_ids: Iterable[str], view: int) -> NDArray[np.uint64]:
    """One number per row `[B]`, whatever its order and batch: BLAKE2b-8 of sample id and view."""
    hashed = [hashlib.blake2b(f"{each}\0{view}".encode(), digest_size=8).digest() for each in sample_ids]
    return np.frombuffer(b"".join(hashed), "<u8")


def taken(columns: Columns, rows: NDArray[np.int64]) -> Columns:
    """The given rows of columns, in the given order."""
    return {name: take(column, rows) for name, column in columns.items()}


def look_the_same(one: Column, other: Column) -> bool:
    """Whether two versions of a column differ by no more than rounding in batches of other sizes.

    Floats: by 1e-5 of the largest number at their place; uint8 (pixels): by a step, in 1 % of them; others: not at all.
    """
    if isinstance(one, Ragged) and isinstance(other, Ragged):
        return np.array_equal(one.offsets, other.offsets) and np.array_equal(one.values, other.values)
    assert isinstance(one, np.ndarray)
    assert isinstance(other, np.ndarray)
    if one.dtype.kind == "f":
        step = max(_FLOAT_STEP, 4 * float(np.finfo(one.dtype).eps))
        largest = np.abs(np.nan_to_num(one, posinf=0, neginf=0)).max(axis=0)
        return np.allclose(one, other, rtol=0, atol=step * largest, equal_nan=True)
    if one.dtype == np.uint8:
        apart = np.abs(one.astype(np.int16) - other)
        return bool((apart <= 1).all() and apart.sum() <= _PIXELS_SHARE * apart.size)
    return np.array_equal(one, other)
