from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kdpipe.order import BatchOrder, Shuffle


def shuffled(rows, seed, epoch, shuffle=None):
    shuffle = shuffle or Shuffle()
    return np.concatenate(list(shuffle.pools(rows, seed, epoch)))


def steps(order: BatchOrder, first: int, last: int) -> list[list[int]]:
    return [rows.tolist() for group in order.groups(first, last) for rows in group.batches]


@given(num_rows=st.integers(1, 40_000), seed=st.integers(0, 2**31), epoch=st.integers(0, 1000))
def test_order_is_a_permutation(num_rows, seed, epoch):
    rows = 3 * np.arange(num_rows) + 7
    assert np.array_equal(np.sort(shuffled(rows, seed, epoch)), rows)


def test_order_depends_on_seed_and_epoch_only():
    rows = np.arange(5000)
    orders = {}
    for seed, epoch in itertools.product(range(3), range(3)):
        np.random.seed(seed + epoch)
        torch.manual_seed(epoch)
        orders[seed, epoch] = shuffled(rows, seed, epoch)
    for key, order in orders.items():
        assert np.array_equal(order, shuffled(rows, *key))
    for one, other in itertools.combinations(orders.values(), 2):
        assert (one == other).mean() < 0.01


def test_order_has_few_blocks_open_at_a_time():
    block_of = shuffled(np.arange(200), 0, 0, Shuffle(block_rows=8, pool_blocks=3)) // 8
    begun = {block: int(np.flatnonzero(block_of == block)[0]) for block in range(25)}
    ended = {block: int(np.flatnonzero(block_of == block)[-1]) for block in range(25)}
    num_open = [sum(begun[block] <= at <= ended[block] for block in range(25)) for at in range(200)]
    assert max(num_open) == 3
    assert set(block_of[: 3 * 8].tolist()) != {0, 1, 2}


@pytest.mark.parametrize(
    ("row_bytes", "block_rows"), [(0, 1024), (4, 1024), (2048, 1024), (2049, 512), (100_000, 16), (2**30, 1)]
)
def test_pools_of_wide_rows_fit_in_memory(row_bytes, block_rows):
    shuffle = Shuffle.for_row_bytes(row_bytes)
    assert shuffle.block_rows == block_rows
    assert shuffle.pool_rows * row_bytes <= 32 * 2**20 or block_rows == 1


@given(
    num_rows=st.integers(1, 300),
    batch_size=st.integers(1, 90),
    block_rows=st.integers(1, 40),
    first=st.integers(0, 30),
    length=st.integers(0, 30),
)
def test_groups_hold_whole_batches_of_one_order(num_rows, batch_size, block_rows, first, length):
    shuffle = Shuffle(block_rows=block_rows, pool_blocks=3)
    order = BatchOrder(rows=5 * np.arange(num_rows), batch_size=batch_size, seed=1, shuffle=shuffle)
    expected = []
    for epoch in range(-(-(first + length) // order.steps_per_epoch)):
        rows = shuffled(order.rows, 1, epoch, shuffle).tolist()
        expected += [rows[start : start + batch_size] for start in range(0, num_rows, batch_size)]
    assert steps(order, first, first + length) == expected[first : first + length]
    for group in order.groups(first, first + length):
        assert len(group.rows) <= shuffle.pool_rows + batch_size


@given(num_rows=st.integers(1, 100), batch_size=st.integers(1, 40), world_size=st.integers(1, 5))
def test_ranks_share_every_batch(num_rows, batch_size, world_size):
    whole = BatchOrder(rows=np.arange(num_rows), batch_size=batch_size, seed=0)
    num_steps = 2 * whole.steps_per_epoch
    shares = [
        steps(
            BatchOrder(rows=whole.rows, batch_size=batch_size, seed=0, rank=rank, world_size=world_size), 0, num_steps
        )
        for rank in range(world_size)
    ]
    for batch, *parts in zip(steps(whole, 0, num_steps), *shares, strict=True):
        assert sorted(itertools.chain(*parts)) == sorted(batch)
        assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_no_rows_no_steps():
    order = BatchOrder(rows=np.empty(0, np.int64), batch_size=4, seed=0)
    assert (order.steps_per_epoch, list(order.groups(0, 7))) == (0, [])
