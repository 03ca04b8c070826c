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
        generator = np.random.Generator(np.random.Philox(key=[seed, epoch]))
        size = self.block_rows
        blocks = generator.permutation(-(-len(rows) // size))
        for start in range(0, len(blocks), self.pool_blocks):
            pool = [rows[block * size : (block + 1) * size] for block in blocks[start : start + self.pool_blocks]]
            yield generator.permutation(np.concatenate(pool))


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
    exactly once per epoch, without padding.
    """

    rows: Rows
    batch_size: int
    seed: int
    shuffle: Shuffle = Shuffle()
    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        """Refuse batches of nothing and ranks that do not exist."""
        if self.batch_size < 1:
            raise ConfigError(f"batch_size is {self.batch_size}; expected 1 or more")
        if not 0 <= self.rank < self.world_size:
            raise ConfigError(f"rank {self.rank} of {self.world_size} processes does not exist (RANK, WORLD_SIZE)")

    @property
    def steps_per_epoch(self) -> int:
        """Batches per epoch."""
        return -(-len(self.rows) // self.batch_size)

    def check_budget(self, row_bytes: int, ram_budget_bytes: int) -> None:
        """Raise `ConfigError` for a budget that the pools do not fit in: one is learnt from while the next is read.

        Each may take its room twice, while somebody still holds batches of the one before.
        """
        needed = 2 * 2 * min(max(self.shuffle.pool_rows, self.batch_size), len(self.rows)) * row_bytes
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
        for pool in self.shuffle.pools(self.rows, self.seed, epoch):
            missing -= len(pool)
            ready = np.concatenate([rest, pool])
            stop = len(ready) if missing == 0 else len(ready) // self.batch_size * self.batch_size
            rest = ready[stop:]
            yield [ready[start : min(start + self.batch_size, stop)] for start in range(0, stop, self.batch_size)], rest
