from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kdpipe.batches import RAM_BUDGET_BYTES, Batch, BatchStream, Rows
from kdpipe.errors import ConfigError
from kdpipe.order import Shuffle
from kdpipe.store.aligned import AlignedTargets
from kdpipe.views import ViewSpec
from toy_rows import Features, key_of, lesson, prepared, said, store_of, stream_of

NUM_ROWS = 83
PATHS = pytest.mark.parametrize("ram_budget_bytes", [RAM_BUDGET_BYTES, 0], ids=["in memory", "streaming"])
WORKERS = pytest.mark.parametrize("num_workers", [0, 1, 2])


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return prepared(tmp_path_factory.mktemp("batches"), NUM_ROWS, segments=[20, 50])


@pytest.fixture(scope="module")
def taught(data, tmp_path_factory):
    """Every row but a few, with two teachers whose stores have orders of their own, and two augmented views."""
    rows = np.setdiff1d(np.arange(NUM_ROWS), [0, 7, 41])
    folder = tmp_path_factory.mktemp("stores")
    stores = {name: store_of(folder / name, data, seed, num_views=3) for seed, name in enumerate(("one", "other"))}
    targets = {name: AlignedTargets(store, data.inputs, rows) for name, store in stores.items()}
    return Rows(inputs=data.inputs, rows=rows, preprocess=Features(), labels=data.labels, targets=targets)


def row_numbers(stream: BatchStream, first: int, last: int) -> list[list[int]]:
    return [rows.tolist() for _, rows in stream.plan(first, last)]


def tensors_of(batch: Batch) -> list[torch.Tensor]:
    """Everything that a batch holds."""
    targets = [each for outputs in batch.targets.values() for each in outputs.values()]
    parts = [part for each in targets for part in (each.values, each.row_max)]
    return [torch.from_numpy(batch.rows), batch.inputs, batch.labels, *parts]


def assert_equal(found: list[Batch], expected: list[Batch]) -> None:
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert list(ours.targets) == list(theirs.targets)
        for part, wanted in zip(tensors_of(ours), tensors_of(theirs), strict=True):
            assert part.dtype == wanted.dtype
            assert torch.equal(part, wanted)


@pytest.mark.parametrize("batch_size", [1, 7, 64, 200])
def test_every_epoch_meets_every_row_once(taught, batch_size):
    stream = stream_of(taught, batch_size, 3)
    steps = stream.steps_per_epoch
    assert steps == -(-80 // batch_size)
    for epoch in range(3):
        met = row_numbers(stream, epoch * steps, (epoch + 1) * steps)
        assert all(len(rows) == batch_size for rows in met[:-1])
        assert list(itertools.chain(*met)) == np.concatenate(list(Shuffle().pools(taught.rows, 3, epoch))).tolist()


@PATHS
@WORKERS
def test_workers_change_nothing(taught, num_workers, ram_budget_bytes):
    found = stream_of(taught, 9, 1, num_workers=num_workers, ram_budget_bytes=ram_budget_bytes).from_step(0, 20)
    expected = [taught.batch(rows, view) for view, rows in stream_of(taught, 9, 1).plan(0, 20)]
    assert_equal(list(found), expected)


@given(first=st.integers(0, 40), batch_size=st.integers(1, 90), seed=st.integers(0, 5))
def test_resuming_gives_the_tail(taught, first, batch_size, seed):
    stream = stream_of(taught, batch_size, seed)
    assert_equal(list(stream.from_step(first, 40)), list(stream.from_step(0, 40))[first:])


@pytest.mark.parametrize("num_workers", [1, 2])
def test_resuming_gives_the_tail_with_workers(taught, num_workers):
    stream = stream_of(taught, 11, 0, num_workers=num_workers)
    assert_equal(list(stream.from_step(13, 20)), list(stream.from_step(0, 20))[13:])


@PATHS
@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_partition_every_batch(taught, world_size, ram_budget_bytes):
    whole = stream_of(taught, 13, 2, ram_budget_bytes=ram_budget_bytes).from_step(0, 15)
    ranks = [
        stream_of(taught, 13, 2, ranks=(rank, world_size), ram_budget_bytes=ram_budget_bytes).from_step(0, 15)
        for rank in range(world_size)
    ]
    for batch, *parts in zip(whole, *ranks, strict=True):
        together = [row for part in parts for row in part.rows.tolist()]
        assert sorted(together) == sorted(batch.rows.tolist())
        assert max(len(part) for part in parts) - min(len(part) for part in parts) <= 1
        assert_equal(parts, [taught.batch(part.rows) for part in parts])


@WORKERS
def test_a_rank_without_rows_gets_an_empty_batch(data, num_workers):
    rows = lesson(data)
    stream = stream_of(rows, 41, 0, ranks=(1, 2), num_workers=num_workers)
    last = list(stream.from_step(0, 3))[-1]
    assert [len(part) for part in tensors_of(last)] == [0] * 5
    assert last.inputs.shape[1:] == (4,)


def test_memory_and_streaming_give_equal_batches(taught):
    in_memory = replace(taught, preprocess=Features())
    expected = list(stream_of(in_memory, 10, 4).from_step(0, 16))
    streaming = replace(taught, preprocess=Features())
    assert_equal(list(stream_of(streaming, 10, 4, ram_budget_bytes=0).from_step(0, 16)), expected)
    assert in_memory.preprocess.calls < 16 <= streaming.preprocess.calls


def test_memory_is_used_up_to_the_budget_only(taught):
    num_bytes = 80 * (4 * 4 + 8 + 2 * (5 * 2 + 4))
    small = Shuffle(block_rows=4, pool_blocks=2)
    calls = []
    for budget in (num_bytes, num_bytes - 1):
        rows = replace(taught, preprocess=Features())
        list(stream_of(rows, 10, 4, shuffle=small, ram_budget_bytes=budget).from_step(0, 16))
        calls.append(rows.preprocess.calls)
    assert calls == [2, 17]


def test_rows_that_come_once_are_not_kept(taught):
    calls = []
    for last in (8, 9):
        rows = replace(taught, preprocess=Features())
        list(stream_of(rows, 10, 4).from_step(0, last))
        calls.append(rows.preprocess.calls)
    assert calls == [8, 2]


@PATHS
@WORKERS
@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_targets_are_what_the_teacher_said_about_that_sample(taught, data, batch_size, num_workers, ram_budget_bytes):
    for seed in (0, 1, 17):
        stream = stream_of(taught, batch_size, seed, num_workers=num_workers, ram_budget_bytes=ram_budget_bytes)
        met = []
        for batch in stream.from_step(0, stream.steps_per_epoch):
            ids = data.inputs.sample_ids[batch.rows]
            keys = np.array([key_of(each) for each in ids])
            expected = said(keys)
            met += ids.tolist()
            assert batch.inputs[:, 0].tolist() == keys.tolist()
            assert batch.labels.tolist() == np.where(keys % 4 == 0, -1, keys % 5).tolist()
            assert list(batch.targets) == ["one", "other"]
            for outputs in batch.targets.values():
                targets = outputs["logits"]
                assert torch.equal(targets.logits(), expected.float())
                assert targets.values.argmax(dim=-1).tolist() == ((3 * keys + 1) % 5).tolist()
                assert targets.row_max.tolist() == (keys / 4).tolist()
        assert sorted(met) == sorted(data.inputs.sample_ids[taught.rows].tolist())


@WORKERS
def test_each_epoch_meets_its_view(taught, data, num_workers):
    rows = replace(taught, views=ViewSpec(count=2))
    stream = stream_of(rows, 30, 0, num_workers=num_workers)
    views = []
    for step, batch in enumerate(stream.from_step(0, 4 * stream.steps_per_epoch)):
        view = 1 + step // stream.steps_per_epoch % 2
        keys = np.array([key_of(each) for each in data.inputs.sample_ids[batch.rows]])
        assert torch.equal(batch.targets["one"]["logits"].logits(), said(keys, view).float())
        views.append(view)
    assert views == [1, 1, 1, 2, 2, 2] * 2


@pytest.mark.parametrize("rows", [slice(0, 5), slice(5, 6), slice(6, 20), slice(3, 3)])
def test_part_of_a_batch_is_the_batch_of_those_rows(taught, rows):
    numbers = np.array([5, 80, 3, 22, 9, 40, 81])
    assert_equal([taught.batch(numbers).part(rows)], [taught.batch(numbers[rows])])
    assert len(taught.batch(numbers).part(rows)) == len(numbers[rows])


def test_a_batch_moves_with_all_its_tensors(taught):
    batch = taught.batch(np.array([5, 80]))
    moved = batch.to(torch.device("meta"))
    assert {each.device.type for each in tensors_of(moved)[1:]} == {"meta"}
    assert moved.rows is batch.rows
    assert_equal([batch.to(torch.device("cpu"))], [batch])


@pytest.mark.parametrize("count", [0, 1, 3])
def test_views_of_epochs(count):
    spec = ViewSpec(count=count)
    met = [spec.view_of_epoch(epoch) for epoch in range(7)]
    assert spec.num_views == count + 1
    assert met == [[0] * 7, [1] * 7, [1] * 7, [1, 2, 3, 1, 2, 3, 1]][count]
    assert max(met) < spec.num_views


def test_rows_are_kept_on_the_device_where_asked_for(taught):
    expected = list(stream_of(taught, 10, 4).from_step(0, 16))
    assert_equal(list(stream_of(taught, 10, 4, device=torch.device("cpu")).from_step(0, 16)), expected)
    kept = stream_of(taught, 10, 4, device=torch.device("meta")).from_step(0, 1)
    assert {each.device.type for each in tensors_of(next(kept))[1:]} == {"meta"}
    for held in ({"ram_budget_bytes": 100}, {"ram_budget_bytes": 0}):
        with pytest.raises(ConfigError, match="keeping 80 rows on the device was asked"):
            stream_of(taught, 10, device=torch.device("cpu"), **held).from_step(0, 1)


def test_a_budget_that_reading_ahead_does_not_fit_in_is_refused(taught):
    with pytest.raises(ConfigError, match="RAM budget is 2,000 bytes"):
        list(stream_of(taught, 10, ram_budget_bytes=2000).from_step(0, 1))
