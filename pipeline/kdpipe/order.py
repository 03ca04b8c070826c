"""The order in which rows are learnt from: a function of (seed, epoch) and the rows, whatever reads them.

Blocks of consecutive rows are shuffled, then rows inside a pool of blocks, so that files are read in pieces.
Shapes: N rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kdpipe.errors import ConfigError

Rows = NDArray[np.int64]

BLOCK_ROWS = 1024
BLOCK_BYTES = 2 * 2**20
POOL_BLOCKS = 16


def batches_within(lengths: NDArray[np.int64], num_rows: int, num_tokens: int) -> list[NDArray[np.int64]]:
    """Positions `[B]` of rows of these lengths `[N]` in batches that are as long as their longest row each.

    Shorter rows come first, so that rows of a batch are about as long; ties in the given order. A batch has at most
    `num_rows` rows and `num_tokens` tokens with its padding, but at least one row.
    """
    order = np.argsort(lengths, kind="stable")
    batches, start = [], 0
    for stop in range(1, len(order) + 1):
        is_full = stop - start == num_rows or stop == len(order)
        if is_full or (stop - start + 1) * lengths[order[stop]] > num_tokens:
            batches.append(order[start:stop])
            start = stop
    return batches


@dataclass(frozen=True, kw_only=True)
class Shuffle:
    """How far rows move: `block_rows` stay neighbours on disk, `pool_blocks` blocks are mixed with each other."""

    block_rows: int = BLOCK_ROWS
    pool_blocks: int = POOL_BLOCKS

    @classmethod
    def for_row_bytes(cls, row_bytes: int) -> Shuffle:
        """Blocks of at most 1024 rows and 2 MiB, so that a pool of wide rows still fits in memory."""
        rows = max(1, min(BLOCK_ROWS, BLOCK_BYTES // max(row_bytes, 1)))
        return cls(block_rows=2 ** (rows.bit_length() - 1))

    @property
    def pool_rows(self) -> int:
        """Rows that are mixed with each other."""
        return self.block_rows * self.pool_blocks

    def pools(self, rows: Rows, seed: int, epoch: int) -> Iterator[Rows]:
        """A permutation of `rows`, pool by pool."""
        generator = _generator(seed, epoch)
        size = self.block_rows
        blocks = generator.permutation(-(-len(rows) // size))
        for start in range(0, len(blocks), self.pool_blocks):
            pool = [rows[block * size : (block + 1) * size] for block in blocks[start : start + self.pool_blocks]]
            yield generator.permutation(np.concatenate(pool))


def _is_whole(value: object) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def balanced(rows: Rows, classes: NDArray[np.int64], seed: int, epoch: int) -> Rows:
    """One epoch's `rows [N]`, as many of each class as of any other, by one or less; rows of class -1 stay as they are.

    A class goes through all its rows, in a new order each time, before it shows one again: a rare one several times in
    an epoch, a frequent one over several epochs. Ascending, so that files are read in pieces.
    """
    present = np.unique(classes[classes >= 0])
    shares = np.full(len(present), int((classes >= 0).sum()) // max(1, len(present)))
    shares[: int((classes >= 0).sum()) - shares.sum()] += 1
    chosen = [rows[classes < 0]]
    for number, share in zip(present.tolist(), shares.tolist(), strict=True):
        members = rows[classes == number]
        turns = range(epoch * share // len(members), -(-(epoch + 1) * share // len(members)))
        shown = np.concatenate([_class_order(members, seed, number, turn) for turn in turns])
        first = epoch * share - turns.start * len(members)
        chosen.append(shown[first : first + share])
    return np.sort(np.concatenate(chosen))


def _class_order(members: Rows, seed: int, number: int, turn: int) -> Rows:
    """The rows of a class in the order of its `turn`-th pass; by other numbers than those that shuffle an epoch."""
    return _generator(seed, turn, number + 1).permutation(members)


def _generator(seed: int, epoch: int, stream: int = 0) -> np.random.Generator:
    key = np.array([seed, epoch], np.uint64)  # a list of large numbers would be rounded
    return np.random.Generator(np.random.Philox(key=key, counter=[0, 0, 0, stream]))


@dataclass(frozen=True, kw_only=True)
class Group:
    """Whole batches that are read together: row numbers `[N]` of each, all of one epoch.

    `tail` are rows of the same blocks that do not fill a batch: the next group begins with them.
    """

    epoch: int
    batches: Sequence[Rows]
    tail: Rows

    @property
    def rows(self) -> Rows:
        """Every batch's rows, one after the other, then the tail."""
        return np.concatenate([*self.batches, self.tail])


@dataclass(frozen=True, kw_only=True)
class BatchOrder:
    """The batches of every epoch over `rows [N]`; the last one of an epoch may be smaller.

    Step s has the same rows on any number of ranks: each takes its share of every batch, so that each row is met
    exactly once per epoch, without padding. With `balance`, each row's class `[N]` (-1: none), an epoch has as many
    rows of each class instead: see `balanced`.
    """

    rows: Rows
    batch_size: int
    seed: int
    shuffle: Shuffle = Shuffle()
    rank: int = 0
    world_size: int = 1
    balance: NDArray[np.int64] | None = None

    def __post_init__(self) -> None:
        """Refuse batches of nothing, seeds that no generator takes and ranks that do not exist."""
        if not (_is_whole(self.batch_size) and self.batch_size >= 1):
            raise ConfigError(f"batch_size is {self.batch_size!r}; expected a whole number, 1 or more")
        if not (_is_whole(self.seed) and 0 <= self.seed < 2**64):
            raise ConfigError(f"seed is {self.seed!r}; expected a whole number from 0 to 2^64 - 1")
        if not 0 <= self.rank < self.world_size:
            raise ConfigError(f"rank {self.rank} of {self.world_size} processes does not exist (RANK, WORLD_SIZE)")
        for name in ("batch_size", "seed"):  # a narrow number of NumPy would overflow
            object.__setattr__(self, name, int(getattr(self, name)))

    @property
    def steps_per_epoch(self) -> int:
        """Batches per epoch."""
        return -(-len(self.rows) // self.batch_size)

    def bytes_ahead(self, row_bytes: int) -> int:
        """What pools of rows take at most: one is learnt from while the next is read.

        Each may take its room twice, while somebody still holds batches of the one before.
        """
        return 2 * 2 * min(max(self.shuffle.pool_rows, self.batch_size), len(self.rows)) * row_bytes

    def check_budget(self, row_bytes: int, ram_budget_bytes: int) -> None:
        """Raise `ConfigError` for a budget that the pools do not fit in."""
        needed = self.bytes_ahead(row_bytes)
        if needed > ram_budget_bytes:
            raise ConfigError(
                f"the RAM budget is {ram_budget_bytes:,} bytes; reading rows of {row_bytes:,} bytes ahead needs up to "
                f"{needed:,}. Raise it."
            )

    def groups(self, first: int, last: int) -> Iterator[Group]:
        """Batches of steps `[first, last)`, in groups of about a pool; a group ends with its last full batch."""
        if not self.steps_per_epoch:
            return
        for epoch in range(first // self.steps_per_epoch, -(-last // self.steps_per_epoch)):
            step = epoch * self.steps_per_epoch
            for whole, tail in self._batches(epoch):
                wanted = whole[max(0, first - step) : max(0, last - step)]
                step += len(whole)
                if wanted:
                    batches = [batch[self.rank :: self.world_size] for batch in wanted]
                    yield Group(epoch=epoch, batches=batches, tail=tail[self.rank :: self.world_size])

    def _batches(self, epoch: int) -> Iterator[tuple[list[Rows], Rows]]:
        rest = np.empty(0, np.int64)
        missing = len(self.rows)
        rows = self.rows if self.balance is None else balanced(self.rows, self.balance, self.seed, epoch)
        for pool in self.shuffle.pools(rows, self.seed, epoch):
            missing -= len(pool)
            ready = np.concatenate([rest, pool])
            stop = len(ready) if missing == 0 else len(ready) // self.batch_size * self.batch_size
            rest = ready[stop:]
            yield [ready[start : min(start + self.batch_size, stop)] for start in range(0, stop, self.batch_size)], rest
