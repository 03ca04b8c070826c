from __future__ import annotations

import copy
import gc
import itertools
import json
import os
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import ConcatDataset, DataLoader, Dataset

from kdpipe.encodings import Dense
from kdpipe.errors import ConfigError, CorruptStoreError, IncompleteStoreError
from kdpipe.store import TargetStore, TargetStream, WithTargets, reading
from kdpipe.store.manifest import Manifest
from kdpipe.targets import OutputSpec
from kdpipe.views import ViewSpec

C = 700
NUM_ROWS = 2603
NUM_VIEWS = 3
SMALL = 100 * 2**20
"""A budget that two pools fit in."""


def values_of(rows, view):
    """What the teacher says: a function of row and view, exact in float16."""
    return -((rows[:, None] + np.arange(C) + 5 * view) % 61).astype(np.float32)


def store_of(folder, *, compact=False, num_rows=NUM_ROWS, num_views=NUM_VIEWS, shard_rows=512):
    encoding, output = Dense(compact=compact), OutputSpec(name="logits", shape=(C,))
    manifest = Manifest(
        ingredients={"compact": compact},
        outputs=[output],
        encodings={"logits": encoding.to_json()},
        temperatures=[1.0],
        num_classes=C,
        class_names=None,
        shard_rows=shard_rows,
    )
    ids = np.array([f"row-{row}" for row in range(num_rows)])
    store = TargetStore.create(folder, manifest, ids, np.zeros((num_rows, 16), np.uint8), num_views)
    for view, shard in store.missing():
        rows = np.arange(shard.start, shard.stop)
        arrays = encoding.encode(torch.from_numpy(values_of(rows, view)))
        named = {f"logits{suffix}": each for suffix, each in arrays.items()}
        store.write(view, shard, {**named, "statistics": np.zeros((len(rows), 3), np.float32)}, 64)
    store.finish()
    return TargetStore.open(folder)


@pytest.fixture(scope="module", params=[False, True], ids=["fast", "compact"])
def store(request, tmp_path_factory):
    return store_of(tmp_path_factory.mktemp("store"), compact=request.param)


@pytest.fixture(params=["kept", "pools"])
def held(request, monkeypatch):
    """All rows in memory, or small pools that are read ahead."""
    if request.param == "kept":
        return {"ram_budget_bytes": 2**30}
    from kdpipe import order

    monkeypatch.setattr(order, "BLOCK_BYTES", 40 * (2 * C + 4))
    return {"ram_budget_bytes": 2 * 2 * 512 * (2 * C + 4)}


def check(rows, targets, view=0):
    expected = values_of(rows, view)
    assert torch.equal(targets["logits"].logits(), torch.from_numpy(expected))


def test_every_epoch_meets_every_row_once_with_its_own_targets(store, held):
    stream = TargetStream(store, batch_size=50, seed=3, **held)
    orders = []
    for _ in range(3):
        met = []
        for rows, targets in stream:
            check(rows, targets)
            met.append(rows)
        assert [len(rows) for rows in met] == [50] * (NUM_ROWS // 50) + [NUM_ROWS % 50]
        assert len(met) == len(stream)
        orders.append(np.concatenate(met))
    for order in orders:
        assert sorted(order.tolist()) == list(range(NUM_ROWS))
    assert not np.array_equal(orders[0], orders[1])


def test_kept_rows_are_placed_some_at_a_time(store, monkeypatch):
    monkeypatch.setattr("kdpipe.store.reading.PLACED_AT_ONCE", 700)
    rows = np.random.default_rng(0).integers(0, NUM_ROWS, 2000)
    for chosen in (None, rows):
        met = [check(rows, targets) or rows for rows, targets in TargetStream(store, batch_size=50, rows=chosen)]
        assert sorted(np.concatenate(met)) == sorted(range(NUM_ROWS) if chosen is None else chosen)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"batch_size": 2.5}, "batch_size is 2.5; expected a whole number"),
        ({"batch_size": "5"}, "batch_size is '5'; expected a whole number"),
        ({"batch_size": 0}, "batch_size is 0; expected a whole number, 1 or more"),
        ({"batch_size": 5, "seed": 1.5}, "seed is 1.5; expected a whole number"),
        ({"batch_size": 5, "ram_budget_bytes": -5}, "ram_budget_bytes is -5; expected 0 or more"),
    ],
)
def test_numbers_that_mean_nothing_are_refused(store, settings, named):
    with pytest.raises(ConfigError, match=named):
        TargetStream(store, **settings)


def test_memory_changes_nothing(store):
    small = TargetStream(store, batch_size=50, seed=3, ram_budget_bytes=SMALL, views=ViewSpec(count=1))
    kept = TargetStream(store, batch_size=50, seed=3)
    for (rows, targets), (others, _) in zip(small, kept, strict=True):
        assert np.array_equal(rows, others)
        check(rows, targets, view=1)


def test_batches_that_somebody_keeps_stay_what_they_were(store, held):
    stream = TargetStream(store, batch_size=50, **held)
    for rows, targets in [*stream, *stream]:
        check(rows, targets)


def test_each_epoch_meets_its_view(store, held):
    if held["ram_budget_bytes"] == 2**30:
        held = {}
    stream = TargetStream(store, batch_size=500, views=ViewSpec(count=2), **held)
    for epoch in range(4):
        for rows, targets in stream:
            check(rows, targets, view=1 + epoch % 2)


@pytest.mark.parametrize("share", [0.02, 0.3, 0.9])
def test_some_rows_in_any_order(store, held, share):
    wanted = np.random.default_rng(0).permutation(NUM_ROWS)[: int(share * NUM_ROWS)]
    met = []
    for rows, targets in TargetStream(store, batch_size=64, rows=wanted, **held):
        check(rows, targets)
        met += rows.tolist()
    assert sorted(met) == sorted(wanted.tolist())


@pytest.mark.parametrize("again", [copy.deepcopy, lambda stream: pickle.loads(pickle.dumps(stream))])  # noqa: S301
def test_a_copy_of_a_stream_outlives_it(tmp_path, held, again):
    """The number of a closed folder is the next one's: a copy must not go by it."""
    stream = TargetStream(store_of(tmp_path / "store", num_views=1), batch_size=64, **held)
    other = store_of(tmp_path / "other")
    list(stream)
    copied = again(stream)
    del stream
    gc.collect()
    opened = [TargetStore.open(other.path) for _ in range(3)]
    seen = []
    for rows, targets in copied:
        check(rows, targets)
        seen.extend(rows.tolist())
    assert sorted(seen) == list(range(NUM_ROWS))
    assert opened


@pytest.mark.parametrize("when", ["before an epoch", "after one"])
def test_rows_that_their_owner_changes_afterwards(store, held, when):
    rows = np.arange(900)
    stream = TargetStream(store, batch_size=64, rows=rows, **held)
    if when == "after one":
        list(stream)
    rows += 300
    seen = []
    for met, targets in stream:
        check(met, targets)
        seen.extend(met.tolist())
    assert sorted(seen) == list(range(900))


def test_ids_and_digests_of_the_store_are_not_for_writing(store):
    for values in (store.sample_ids, store.digests):
        with pytest.raises(ValueError, match="read-only"):
            np.random.default_rng(0).shuffle(values)
    assert store.rows_of(["row-5", "row-2602"]).tolist() == [5, 2602]


def test_rows_named_twice_are_met_twice(store, held):
    wanted = np.arange(NUM_ROWS) // 2
    met = []
    for rows, targets in TargetStream(store, batch_size=64, rows=wanted, **held):
        check(rows, targets)
        met += rows.tolist()
    assert sorted(met) == wanted.tolist()


@settings(max_examples=15)
@given(stop=st.integers(0, 100), batch_size=st.integers(20, 300))
def test_a_stream_goes_on_in_mid_epoch(tmp_path_factory, stop, batch_size):
    folder = tmp_path_factory.getbasetemp() / "resumed"
    store = TargetStore.open(folder) if folder.exists() else store_of(folder, num_rows=700, num_views=1)
    stream = TargetStream(store, batch_size=batch_size, seed=1)
    whole = [rows for rows, _ in itertools.chain(stream, stream)]
    begun = TargetStream(store, batch_size=batch_size, seed=1)
    first = [rows for rows, _ in itertools.islice(itertools.chain(begun, begun), stop)]
    state = json.loads(json.dumps(begun.state_dict()))
    resumed = TargetStream(store, batch_size=batch_size, seed=1)
    resumed.load_state_dict(state)
    rest = []
    while len(first) + len(rest) < len(whole):
        for rows, targets in resumed:
            check(rows, targets)
            rest.append(rows)
    assert np.array_equal(np.concatenate([*first, *rest]), np.concatenate(whole))


def test_a_stream_goes_on_with_another_number_of_ranks_and_more_memory(store, monkeypatch):
    views = ViewSpec(count=1)
    begun = TargetStream(store, batch_size=100, seed=2, views=views, ram_budget_bytes=SMALL)
    whole = [rows for rows, _ in itertools.islice(begun, 7)]
    state = begun.state_dict()
    whole += [rows for rows, _ in begun]
    parts = []
    for rank in range(2):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "2")
        stream = TargetStream(store, batch_size=100, seed=2, views=views, ram_budget_bytes=0)
        stream.load_state_dict(state)
        parts.append([rows for rows, _ in stream])
    for batch, *shares in zip(whole[7:], *parts, strict=True):
        assert sorted(np.concatenate(shares).tolist()) == sorted(batch.tolist())


@pytest.mark.parametrize(
    ("other", "named"),
    [
        ({"batch_size": 49}, "batch_size 50, here 49"),
        ({"seed": 4}, "seed 3, here 4"),
        ({"rows": np.arange(NUM_ROWS - 1)}, "rows '"),
        ({"rows": np.arange(NUM_ROWS)[::-1]}, "rows '"),
        ({"views": ViewSpec(count=2)}, "views 0, here 2"),
    ],
    ids=lambda each: next(iter(each)) if isinstance(each, dict) else "",
)
def test_the_state_of_a_stream_of_other_batches_is_refused(store, other, named):
    arguments = {"batch_size": 50, "seed": 3}
    state = TargetStream(store, **arguments).state_dict()
    stream = TargetStream(store, **(arguments | other))
    with pytest.raises(ConfigError, match=named) as error:
        stream.load_state_dict(state)
    assert str(error.value).count(", here ") == 1
    assert stream.state_dict()["step"] == 0
    TargetStream(store, **arguments).load_state_dict(state)


def test_the_state_of_other_outputs_is_refused_where_they_change_the_order(store, monkeypatch):
    from kdpipe import order

    state = TargetStream(store, batch_size=50).state_dict()
    monkeypatch.setattr(order, "BLOCK_BYTES", 40 * (2 * C + 4))
    with pytest.raises(ConfigError, match="block_rows 1024, here 32"):
        TargetStream(store, batch_size=50).load_state_dict(state)


@pytest.mark.parametrize(
    "change", [None, {"step": -1}, {"step": 10**30}, {"step": 1.5}, {"step": None}, {"step": True}, {"more": 1}]
)
def test_what_is_no_state_is_refused(store, change):
    stream = TargetStream(store, batch_size=50)
    with pytest.raises(ConfigError, match="expected what a stream's"):
        stream.load_state_dict(None)
    state = {} if change is None else stream.state_dict() | change
    with pytest.raises(ConfigError, match="expected what a stream's"):
        stream.load_state_dict(state)
    with pytest.raises(ConfigError, match="epoch is -1"):
        stream.set_epoch(-1)


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_ranks_and_workers_meet_each_row_once(store, held, world_size, num_workers, monkeypatch):
    whole = [rows for rows, _ in TargetStream(store, batch_size=100, seed=2, **held)]
    parts = []
    for rank in range(world_size):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", str(world_size))
        stream = TargetStream(store, batch_size=100, seed=2, **held)
        stream.set_epoch(0)
        met = []
        for rows, targets in DataLoader(stream, batch_size=None, num_workers=num_workers):
            check(np.asarray(rows), targets)
            met.append(np.asarray(rows))
        parts.append(met)
    for batch, *shares in zip(whole, *parts, strict=True):
        assert sorted(np.concatenate(shares).tolist()) == sorted(batch.tolist())


@pytest.mark.parametrize("persistent", [False, True])
def test_loader_workers_go_through_the_epochs(store, persistent):
    options = {"batch_size": 400, "views": ViewSpec(count=2), "ram_budget_bytes": SMALL}
    expected = TargetStream(store, **options)
    stream = TargetStream(store, **options)
    loader = DataLoader(stream, batch_size=None, num_workers=2, persistent_workers=persistent)
    with pytest.raises(ConfigError, match="set_epoch"):
        list(DataLoader(stream, batch_size=None, num_workers=1))
    for epoch in range(3):
        stream.set_epoch(epoch)
        for (rows, targets), (wanted, _) in zip(loader, expected, strict=True):
            assert np.array_equal(rows, wanted)
            check(np.asarray(rows), targets, view=1 + epoch % 2)


def test_persistent_workers_left_in_the_middle_are_refused(store):
    """They have read ahead, each to another batch: going on would meet rows twice, and others never."""
    stream = TargetStream(store, batch_size=50)
    stream.set_epoch(0)
    loader = DataLoader(stream, batch_size=None, num_workers=2, persistent_workers=True)
    for number, _ in enumerate(loader):
        if number == 3:
            break
    with pytest.raises(ConfigError, match="left in the middle"):
        list(loader)


def test_two_iterations_at_once_are_refused(store):
    """Each would move the other's place: rows twice, and others never."""
    stream = TargetStream(store, batch_size=50)
    with pytest.raises(ConfigError, match="another iteration of this stream has begun"):
        list(zip(stream, stream, strict=True))
    stream.set_epoch(0)
    assert sum(len(rows) for rows, _ in stream) == store.num_rows


@pytest.mark.parametrize("set_place", [lambda stream, _: stream.set_epoch(5), TargetStream.load_state_dict])
def test_a_place_that_is_set_within_an_iteration_is_kept(store, set_place):
    stream = TargetStream(store, batch_size=50)
    state = stream.state_dict()
    iterator = iter(stream)
    next(iterator)
    set_place(stream, state)
    step = stream.state_dict()["step"]
    with pytest.raises(ConfigError, match="its place was set meanwhile"):
        next(iterator)
    assert stream.state_dict()["step"] == step


def test_numbers_of_numpy_are_numbers(store):
    stream = TargetStream(store, batch_size=np.uint8(200), seed=np.int64(3))
    stream.set_epoch(np.int64(1))
    state = json.loads(json.dumps(stream.state_dict()))
    same = TargetStream(store, batch_size=200, seed=3)
    same.load_state_dict(state)
    for (rows, _), (others, _) in zip(stream, same, strict=True):
        assert np.array_equal(rows, others)
    for wrong in (1.5, True, -1):
        with pytest.raises(ConfigError, match="expected a whole number, 0 or more"):
            stream.set_epoch(wrong)


def test_the_store_is_read_while_a_stream_of_it_reads_ahead(tmp_path, monkeypatch):
    """The stream's thread goes through the files that are mapped, while others are mapped for its owner."""
    from kdpipe import order

    monkeypatch.setattr(order, "BLOCK_BYTES", 8 * (2 * C + 4))
    store_of(tmp_path, num_rows=8000, num_views=1, shard_rows=16)
    for epoch in range(3):
        store = TargetStore.open(tmp_path)
        for step, (rows, targets) in enumerate(TargetStream(store, batch_size=32, seed=epoch, ram_budget_bytes=0)):
            check(rows, targets)
            others = (rows * 7 + 31 * step) % 8000
            check(others, store.read(others))


def test_files_that_are_mapped_for_long_make_room(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "MAX_MAPPED", 5)
    store = store_of(tmp_path, num_views=1, shard_rows=64)
    before = len(os.listdir("/proc/self/fd"))
    for start in range(5):
        rows = np.arange(start, NUM_ROWS, 29)
        check(rows, store.read(rows))
        assert len(os.listdir("/proc/self/fd")) <= before + 5


def test_files_of_all_stores_that_are_mapped_make_room(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "MAX_MAPPED", 5)
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    stores = [store_of(tmp_path / str(number), num_views=1, shard_rows=64) for number in range(3)]
    rows = np.arange(0, NUM_ROWS, 29)
    for store in stores * 2:
        check(rows, store.read(rows))
        assert len(os.listdir("/proc/self/fd")) <= before + 5 + len(stores)  # each holds its folder, too
    del store, stores
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) <= before


def test_pages_of_chunks_of_which_little_is_wanted_are_given_back(tmp_path, monkeypatch):
    """Verifying a chunk touches all of its pages; those of 44 MB must not be this process's at one time."""
    taken, resident = reading._rows_of, []

    def watched(file, rows):
        values = taken(file, rows)
        with open("/proc/self/smaps") as maps:
            names = [line.split() for line in maps]
        sizes, inside = 0, False
        for words in names:
            if "-" in words[0] and ":" not in words[0]:
                inside = words[-1].startswith(str(tmp_path))
            elif inside and words[0] == "Rss:":
                sizes += int(words[1]) * 1024
        resident.append(sizes)
        return values

    store = store_of(tmp_path, num_views=1, num_rows=2**15, shard_rows=2**12)
    monkeypatch.setattr(reading, "_rows_of", watched)
    for rows, targets in TargetStream(store, batch_size=50, rows=np.arange(0, 2**15, 20)):
        check(rows, targets)
    assert len(resident) > 2 * 16
    assert 0 < max(resident) <= 8 * 2**20


def replaced(path, content):
    """As rsync does: written beside, then renamed."""
    (path.parent / ".other").write_bytes(content)
    (path.parent / ".other").rename(path)


def test_a_shard_that_was_fetched_again_is_read_again(tmp_path):
    store = store_of(tmp_path, num_views=1)
    path = tmp_path / "logits" / "c.0.2.0"
    good = path.read_bytes()
    bad = bytes([good[0] ^ 4]) + good[1:]
    replaced(path, bad)
    rows = np.arange(1024, 1034)
    with pytest.raises(CorruptStoreError, match="differs from its checksum"):
        store.read(rows)
    replaced(path, good)
    check(rows, store.read(rows))
    assert sum(len(met) for met, _ in TargetStream(store, batch_size=64, ram_budget_bytes=0)) == NUM_ROWS
    check(rows, store.read(rows))
    replaced(path, bad)
    with pytest.raises(CorruptStoreError, match="differs from its checksum"):
        list(TargetStream(store, batch_size=64, ram_budget_bytes=0))


@pytest.mark.parametrize("step", [1, 40])
def test_verify_always_reads_no_row_that_it_has_not_verified(tmp_path, step):
    store = store_of(tmp_path, num_views=1)
    stream = TargetStream(
        store, batch_size=50, rows=np.arange(0, NUM_ROWS, step), ram_budget_bytes=0, verify_always=True
    )
    assert sum(len(rows) for rows, _ in stream) == -(-NUM_ROWS // step)
    with next((tmp_path / "logits").glob("c.*")).open("r+b") as file:
        file.write(b"\1" * 10)
    with pytest.raises(CorruptStoreError, match="differs from its checksum"):
        list(stream)


def test_a_budget_of_nothing_keeps_two_pools_only(store):
    found, expected = TargetStream(store, batch_size=50, ram_budget_bytes=0), TargetStream(store, batch_size=50)
    for (rows, targets), (wanted, _) in zip(found, expected, strict=True):
        assert np.array_equal(rows, wanted)
        check(rows, targets)


def test_a_budget_below_two_pools_is_refused(store):
    with pytest.raises(ConfigError, match="RAM budget is 1,000 bytes"):
        TargetStream(store, batch_size=8, ram_budget_bytes=1000)


@pytest.mark.parametrize("batch_size", [8, 64])
def test_few_rows_need_a_budget_for_themselves_only(store, batch_size):
    options = {"batch_size": batch_size, "rows": np.arange(20), "views": ViewSpec(count=1)}
    needed = 2 * 2 * 20 * store.row_bytes()
    with pytest.raises(ConfigError, match=rf"needs up to {needed:,}\."):
        TargetStream(store, ram_budget_bytes=needed - 1, **options)
    met = []
    for rows, targets in TargetStream(store, ram_budget_bytes=needed, **options):
        check(rows, targets, view=1)
        met += rows.tolist()
    assert sorted(met) == list(range(20))


@pytest.mark.parametrize("rows", [np.ones(NUM_ROWS, np.bool_), [0.0, 1.0], [[1, 2]]], ids=["mask", "floats", "axes"])
def test_what_is_no_row_number_is_refused(store, rows):
    for read in (store.read, store.read_arrays, store.statistics):
        with pytest.raises(ConfigError, match="expected row numbers"):
            read(rows)
    with pytest.raises(ConfigError, match="expected row numbers"):
        TargetStream(store, batch_size=8, rows=rows)


def test_no_rows_are_no_batches(store):
    assert list(TargetStream(store, batch_size=8, rows=[])) == []


def test_rows_and_views_that_the_store_lacks(store):
    with pytest.raises(IncompleteStoreError, match="row 9999 was asked"):
        TargetStream(store, batch_size=8, rows=np.array([3, 9999]))
    with pytest.raises(IncompleteStoreError, match="view 3 was asked"):
        TargetStream(store, batch_size=8, views=ViewSpec(count=5))


@pytest.mark.parametrize("compact", [False, True])
def test_a_damaged_chunk_is_found_when_it_is_streamed(tmp_path, compact):
    store_of(tmp_path, compact=compact, num_views=1)
    path = tmp_path / "logits" / "c.0.2.0"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)
    for budget in (SMALL, 2**30):
        with pytest.raises(CorruptStoreError, match=r"c\.0\.2\.0"):
            for _ in TargetStream(TargetStore.open(tmp_path), batch_size=64, ram_budget_bytes=budget):
                pass


def test_a_stream_that_broke_off_serves_nothing_that_it_has_not_read(tmp_path, held):
    store = store_of(tmp_path, num_views=1)
    stream = TargetStream(store, batch_size=50, **held)
    path = tmp_path / "logits.row_max" / "c.0.5"
    content = path.read_bytes()
    path.write_bytes(bytes([content[0] ^ 4]) + content[1:])
    for _ in range(2):
        with pytest.raises(CorruptStoreError, match="differs from its checksum"):
            list(stream)
    path.write_bytes(content)
    seen = []
    for rows, targets in stream:
        check(rows, targets)
        seen.extend(rows.tolist())
    assert set(range(5 * 512, NUM_ROWS)) <= set(seen)


def test_a_shard_that_is_cut_off_between_epochs(tmp_path):
    store = store_of(tmp_path / "store")
    stream = TargetStream(store, batch_size=50, views=ViewSpec(count=1))
    for rows, targets in stream:
        check(rows, targets, view=1)
    path = store.path / store.layouts["logits"].shard_path(1, 2)
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(CorruptStoreError, match=f"{path.name} ends within chunk 0"):
        list(stream)


def test_leaving_a_stream_early_leaves_no_thread(store):
    import threading

    stream = TargetStream(store, batch_size=10, ram_budget_bytes=SMALL, views=ViewSpec(count=1))
    for _ in range(3):
        iterator = iter(stream)
        next(iterator)
        iterator.close()
    assert not [thread for thread in threading.enumerate() if "read-ahead" in thread.name]


class Squares(Dataset):
    def __init__(self, keys):
        self.keys = keys

    def __len__(self):
        return len(self.keys)

    def __getitem__(self, index):
        return {"key": self.keys[index], "square": float(self.keys[index] ** 2)}


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_dataset_of_ones_own_gets_the_targets_of_its_samples(store, num_workers):
    keys = np.random.default_rng(1).permutation(NUM_ROWS)[:300].tolist()
    data = WithTargets(Squares(keys), store, [f"row-{key}" for key in keys])
    generator = torch.Generator().manual_seed(0)
    loader = DataLoader(
        data, batch_size=32, shuffle=True, collate_fn=data.collate, num_workers=num_workers, generator=generator
    )
    for view in (0, 2):
        data.view = view
        met = []
        for batch, targets in loader:
            check(batch["key"].numpy(), {"logits": targets}, view)
            assert torch.equal(batch["square"], batch["key"].double() ** 2)
            met += batch["key"].tolist()
        assert sorted(met) == sorted(keys)
    example, targets = data[7]
    assert example["key"] == keys[7]
    check(np.array([keys[7]]), {"logits": targets}, data.view)


def test_batches_that_are_none_of_its_own_are_refused(store):
    data = WithTargets(Squares([1, 2]), store, ["row-1", "row-2"])
    for loader in (
        DataLoader(ConcatDataset([data, data]), batch_size=3, collate_fn=data.collate),
        DataLoader(data, batch_size=None, collate_fn=data.collate),
    ):
        with pytest.raises(ConfigError, match="expected a batch that WithTargets gave as a whole"):
            next(iter(loader))


def test_torchs_own_collate_is_not_for_targets(store):
    data = WithTargets([0, 1], store, store.sample_ids[:2])
    with pytest.raises(ConfigError, match=r"the DataLoader lacks collate_fn=data.collate"):
        next(iter(DataLoader(data, batch_size=2)))


def test_a_dataset_of_another_length_is_refused(store):
    with pytest.raises(ConfigError, match="has 3 examples, but 2 sample ids"):
        WithTargets(Squares([1, 2, 3]), store, ["row-1", "row-2"])
    with pytest.raises(IncompleteStoreError, match="no targets for 1 of 2"):
        WithTargets(Squares([1, 2]), store, ["row-1", "row-no"])
