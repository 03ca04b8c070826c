from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kdpipe.errors import ConfigError
from kdpipe.order import BatchOrder, Shuffle, balanced


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


CLASSES = np.array([0] * 60 + [1] * 7 + [2] * 2 + [-1] * 11)
UNEVEN = 5 + 3 * np.arange(len(CLASSES))


def class_of(rows):
    return CLASSES[(np.asarray(rows) - 5) // 3]


@given(seed=st.integers(0, 2**64 - 1), epoch=st.integers(0, 10_000))
def test_a_balanced_epoch_has_as_many_rows_of_each_class(seed, epoch):
    rows = balanced(UNEVEN, CLASSES, seed, epoch)
    assert len(rows) == len(UNEVEN)
    assert np.array_equal(np.sort(rows), rows)
    assert np.bincount(class_of(rows) + 1).tolist() == [11, 23, 23, 23]
    assert np.array_equal(rows[class_of(rows) == -1], UNEVEN[CLASSES == -1])


def test_no_row_of_a_class_is_shown_twice_before_each_was_shown_once():
    for number in range(3):
        shown = np.zeros(len(CLASSES), int)
        for epoch in range(40):
            rows = balanced(UNEVEN, CLASSES, 0, epoch)
            np.add.at(shown, (rows[class_of(rows) == number] - 5) // 3, 1)
            counts = shown[number == CLASSES]
            assert counts.max() - counts.min() <= 1
            assert counts.sum() == (epoch + 1) * 23


def test_balanced_epochs_differ_but_depend_on_seed_and_epoch_only():
    orders = {key: balanced(UNEVEN, CLASSES, *key) for key in itertools.product(range(3), range(3))}
    for key, order in orders.items():
        assert np.array_equal(order, balanced(UNEVEN, CLASSES, *key))
    for one, other in itertools.combinations(orders.values(), 2):
        assert not np.array_equal(one, other)


def test_classes_that_do_not_divide_the_rows_differ_by_one():
    rows = balanced(np.arange(10), np.array([0] * 8 + [4, 7]), 1, 2)
    counts = [int((rows < 8).sum()), int((rows == 8).sum()), int((rows == 9).sum())]
    assert sorted(counts) == [3, 3, 4]


def test_balanced_batches_are_the_same_from_any_step_and_for_any_ranks():
    alone = BatchOrder(rows=UNEVEN, batch_size=16, seed=3, balance=CLASSES)
    whole = steps(alone, 0, 23)
    assert len(whole) == 23
    for first in (1, 4, 5, 17):
        assert steps(alone, first, 23) == whole[first:]
    shares = [
        steps(BatchOrder(rows=UNEVEN, batch_size=16, seed=3, balance=CLASSES, rank=rank, world_size=2), 0, 23)
        for rank in range(2)
    ]
    for batch, one, other in zip(whole, *shares, strict=True):
        assert sorted(batch) == sorted(one + other)


def test_without_labels_there_is_nothing_to_balance():
    assert np.array_equal(balanced(UNEVEN, np.full(len(UNEVEN), -1), 0, 0), UNEVEN)


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_a_seed_that_no_generator_takes_is_refused(seed):
    with pytest.raises(ConfigError, match=r"seed is .*; expected a whole number from 0 to 2\^64 - 1"):
        BatchOrder(rows=np.arange(3), batch_size=1, seed=seed)
