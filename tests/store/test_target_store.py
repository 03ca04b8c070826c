"""The store on its own: round trips, commit records, growth, corruption, and zarr-python as a second reader."""

from __future__ import annotations

import pickle
import shutil
from functools import partial

import numpy as np
import pandas
import pytest
import torch
import zarr
from hypothesis import given, reject
from hypothesis import strategies as st

from kdpipe import durable
from kdpipe.encodings import ArraySpec, Dense
from kdpipe.errors import (
    ConfigError,
    CorruptStoreError,
    IncompleteStoreError,
    StaleStoreError,
    StoreError,
    StoreNotFoundError,
)
from kdpipe.store import TargetStore, TargetStream, open_store
from kdpipe.store.layout import ArrayLayout, choose_shard_rows
from kdpipe.store.manifest import Manifest
from kdpipe.store.shard_file import ShardFile, write_shard
from kdpipe.store.statistics import teacher_statistics
from kdpipe.targets import OutputSpec

NUM_CLASSES = 7


def manifest(shard_rows=8, **changes):
    values = {
        "ingredients": {"teacher": "test", "encodings": {"logits": Dense().to_json()}},
        "outputs": [OutputSpec(name="logits", shape=(NUM_CLASSES,))],
        "encodings": {"logits": Dense().to_json()},
        "temperatures": [1.0, 4.0],
        "num_classes": NUM_CLASSES,
        "class_names": None,
        "shard_rows": shard_rows,
    }
    return Manifest(**(values | changes))


def rows(count):
    ids = np.array([f"row-{index}" for index in range(count)])
    digests = np.random.default_rng(0).integers(0, 256, (count, 16), dtype=np.uint8)
    return ids, digests


def arrays_for(shard, view=0):
    generator = np.random.default_rng([shard.index, view])
    values = -generator.random((shard.num_rows, NUM_CLASSES)).astype(np.float16)
    return {
        "logits": values,
        "logits.row_max": generator.random(shard.num_rows).astype(np.float32),
        "statistics": generator.random((shard.num_rows, 3)).astype(np.float32),
    }


def fill(store):
    for view, shard in store.missing():
        store.write(view, shard, arrays_for(shard, view), batch_size=4)


def complete(path, count=50, num_views=1, **changes):
    store = TargetStore.create(path, manifest(**changes), *rows(count), num_views=num_views)
    fill(store)
    store.finish()
    return TargetStore.open(path)


def everything(count, shard_rows=8, view=0):
    from kdpipe.distributed import shards_of

    parts = [arrays_for(shard, view) for shard in shards_of(count, shard_rows)]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


@given(count=st.integers(1, 60), shard_rows=st.integers(1, 20), seed=st.integers(0, 9), num_views=st.integers(1, 3))
def test_reads_what_was_written_in_any_order(tmp_path_factory, count, shard_rows, seed, num_views):
    store = complete(tmp_path_factory.mktemp("store"), count, num_views, shard_rows=shard_rows)
    wanted = np.random.default_rng(seed).integers(0, count, 40)
    for view in range(num_views):
        expected = everything(count, shard_rows, view)
        found = store.read_arrays(wanted, view)
        for name, values in expected.items():
            np.testing.assert_array_equal(found[name], values[wanted])


def test_targets_come_by_sample_id(tmp_path):
    store = complete(tmp_path)
    targets = open_store(tmp_path).targets(["row-31", "row-2", "row-31"])
    expected = everything(50)["logits"][[31, 2, 31]]
    np.testing.assert_array_equal(targets.values.numpy(), expected)
    assert set(store.read(np.array([0]))) == {"logits"}
    with pytest.raises(IncompleteStoreError, match="row-99"):
        store.targets(["row-1", "row-99"])
    with pytest.raises(IncompleteStoreError, match="row-99"):
        store.targets(pandas.Series(["row-1", "row-99"], index=[1, 0]))
    with pytest.raises(IncompleteStoreError, match=r"rows 0\.\.49; row -1 was asked"):
        store.read(np.array([-1, 3]))
    with pytest.raises(StoreError, match="it holds logits"):
        store.targets(["row-1"], output="features")
    with pytest.raises(IncompleteStoreError, match=r"views 0\.\.0"):
        store.targets(["row-1"], view=1)


def test_a_store_that_is_published_anew_while_it_is_open_is_never_mixed(tmp_path):
    """Open at one path, partly read; then others' targets take its place, and nothing of them is ever given out."""
    published, other = tmp_path / "targets", tmp_path / "other"
    complete(tmp_path / "first", num_views=1)
    durable.publish({"": tmp_path / "first"}, published)
    opened, untouched = open_store(published), open_store(published)
    kept = opened.read_arrays(np.arange(8))["logits"]
    copies = [pickle.dumps(opened), pickle.dumps(untouched)]
    stream = TargetStream(opened, batch_size=10, ram_budget_bytes=0)
    begun = TargetStream(open_store(published), batch_size=10, ram_budget_bytes=0)
    assert sum(len(rows) for rows, _ in begun) == 50
    complete(other, shard_rows=16)
    durable.publish({"": other}, published)
    np.testing.assert_array_equal(opened.read_arrays(np.arange(8))["logits"], kept)  # mapped
    for read in (
        lambda: opened.read_arrays(np.arange(50)),
        lambda: list(stream),
        lambda: list(begun),
        lambda: untouched.targets(["row-1"]),
        lambda: untouched.sample_ids,
        *(partial(pickle.loads, each) for each in copies),
    ):
        with pytest.raises(StaleStoreError, match="was published anew since it was opened"):
            read()
    again = open_store(published)
    assert np.array_equal(again.read_arrays(np.arange(50))["logits"], everything(50, 16)["logits"])
    assert pickle.loads(pickle.dumps(again)).num_rows == 50  # noqa: S301


def test_a_store_that_was_moved_is_still_read(tmp_path):
    opened = complete(tmp_path / "store")
    (tmp_path / "store").rename(tmp_path / "moved")
    assert np.array_equal(opened.read_arrays(np.arange(50))["logits"], everything(50)["logits"])


def test_zarr_python_reads_the_same(tmp_path):
    complete(tmp_path, num_views=2)
    group = zarr.open_group(tmp_path, mode="r", zarr_format=3)
    for view in range(2):
        for name, values in everything(50, view=view).items():
            array = group[name]
            assert array.shape == (2, *values.shape)
            np.testing.assert_array_equal(array[view], values)


def test_our_shards_and_zarrs_hold_the_same_chunks(tmp_path):
    """zarr may order chunks its own way; size and content agree."""
    layout = ArrayLayout(name="logits", dtype="float16", shape=(3,), shard_rows=8, chunk_rows=4)
    values = np.random.default_rng(0).random((8, 3)).astype(np.float16)
    store = zarr.storage.MemoryStore()
    array = zarr.create_array(
        store, shape=(1, 8, 3), chunks=(1, 4, 3), shards=(1, 8, 3), dtype="float16", filters=None,
        compressors=[zarr.codecs.Crc32cCodec()], fill_value=0,
    )  # fmt: skip
    array[0] = values
    path = tmp_path / "shard"
    with path.open("wb") as file:
        ours = write_shard(file, values, layout)
    (theirs,) = [value.to_bytes() for key, value in store._store_dict.items() if key.startswith("c/")]
    assert ours.num_bytes == len(theirs) == path.stat().st_size
    np.testing.assert_array_equal(ShardFile(path, layout, 8, ours).read(np.arange(8)), values)


def test_what_is_not_committed_does_not_exist(tmp_path):
    store = TargetStore.create(tmp_path, manifest(), *rows(50))
    (view, first), *_ = store.missing()
    store.write(view, first, arrays_for(first), batch_size=4)
    assert [shard.index for _, shard in store.missing()] == [1, 2, 3, 4, 5, 6]
    reader = TargetStore.open(tmp_path)
    reader.read(np.arange(8))
    with pytest.raises(IncompleteStoreError, match="shard 1 of view 0 is not committed"):
        reader.read(np.arange(9))
    with pytest.raises(IncompleteStoreError, match="6 of 7 shards"):
        store.finish()


def test_files_without_a_record_are_not_believed(tmp_path):
    complete(tmp_path, count=16)
    (tmp_path / "commits.parquet").unlink()
    (tmp_path / "commits.parquet.sha256").unlink()
    assert len(TargetStore.open(tmp_path).missing()) == 2


def test_growth_computes_new_shards_and_the_unfinished_one(tmp_path):
    complete(tmp_path, count=20)
    store = TargetStore.create(tmp_path, manifest(), *rows(37))
    assert [shard.index for _, shard in store.missing()] == [2, 3, 4]
    fill(store)
    store.finish()
    assert TargetStore.open(tmp_path).verify() == []


def test_more_views_keep_the_old_ones(tmp_path):
    complete(tmp_path, count=20)
    store = TargetStore.create(tmp_path, manifest(), *rows(20), num_views=3)
    assert {view for view, _ in store.missing()} == {1, 2}


def test_fewer_rows_leave_no_leftovers(tmp_path):
    complete(tmp_path, count=40)
    store = TargetStore.create(tmp_path, manifest(), *rows(16))
    store.finish()
    assert TargetStore.open(tmp_path).verify() == []
    assert len(list((tmp_path / "logits").glob("c.*"))) == 2


def test_changed_content_of_a_row_invalidates_its_shard_only(tmp_path):
    complete(tmp_path, count=40)
    ids, digests = rows(40)
    digests = digests.copy()
    digests[17, 3] ^= 1
    store = TargetStore.create(tmp_path, manifest(), ids, digests)
    assert [shard.index for _, shard in store.missing()] == [2]


def test_another_manifest_is_refused_and_free_settings_are_taken(tmp_path):
    complete(tmp_path, count=20)
    with pytest.raises(StaleStoreError, match="other settings"):
        TargetStore.create(tmp_path, manifest(ingredients={"teacher": "another"}), *rows(20))
    store = TargetStore.create(tmp_path, manifest(sections={"teacher": 1}, temperatures=[2.0]), *rows(20))
    assert store.missing() == []
    assert TargetStore.open(tmp_path).manifest.temperatures == [2.0]


def test_equal_histories_give_equal_bytes(tmp_path):
    complete(tmp_path / "a", count=37)
    complete(tmp_path / "b", count=20)
    grown = TargetStore.create(tmp_path / "b", manifest(), *rows(37))
    for view, shard in reversed(grown.missing()):
        grown.write(view, shard, arrays_for(shard, view), batch_size=4)
    grown.finish()
    files = {path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*") if path.is_file()}
    assert files == {path.relative_to(tmp_path / "b") for path in (tmp_path / "b").rglob("*") if path.is_file()}
    for path in files:
        assert (tmp_path / "a" / path).read_bytes() == (tmp_path / "b" / path).read_bytes(), path


def test_every_flipped_bit_is_found_or_harmless(tmp_path):
    """Flip bits anywhere in a store: open and read raise, or give what was written; `verify` finds every flip."""
    complete(tmp_path, count=20)
    expected = everything(20)
    generator = np.random.default_rng(3)
    files = sorted(path for path in tmp_path.rglob("*") if path.is_file())
    for path in files:
        original = path.read_bytes()
        for _ in range(8):
            position, bit = generator.integers(len(original)), generator.integers(8)
            flipped = bytearray(original)
            flipped[position] ^= 1 << bit
            path.write_bytes(flipped)
            assert _read_or_refuse(tmp_path, expected), f"{path.name}: byte {position}, bit {bit}"
            assert _verify_finds(tmp_path), f"{path.name}: byte {position}, bit {bit}"
        path.write_bytes(original)
    assert TargetStore.open(tmp_path).verify() == []


def _read_or_refuse(path, expected):
    try:
        found = TargetStore.open(path).read_arrays(np.arange(20))
    except (StoreError, CorruptStoreError):
        return True
    return all(np.array_equal(found[name], values) for name, values in expected.items())


def _verify_finds(path):
    try:
        return TargetStore.open(path).verify() != []
    except StoreError:
        return True


def test_truncated_and_lost_files_are_named(tmp_path):
    store = complete(tmp_path, count=20)
    victim = tmp_path / "logits" / "c.0.1.0"
    content = victim.read_bytes()
    victim.write_bytes(content[:-1])
    (problem,) = store.verify()
    assert str(problem).startswith("view 0, shard 1: c.0.1.0 of logits has ")
    with pytest.raises(IncompleteStoreError, match="shard 1 of view 0"):
        TargetStore.open(tmp_path).read(np.array([9]))
    victim.unlink()
    assert [str(each) for each in TargetStore.open(tmp_path).verify()] == [
        "view 0, shard 1: c.0.1.0 of logits is absent"
    ]
    with pytest.raises(StoreNotFoundError, match="no target store"):
        TargetStore.open(tmp_path / "nowhere")


def test_answers_are_counted_as_they_are_committed(tmp_path):
    store = TargetStore.create(tmp_path, manifest(), *rows(20), num_views=2)
    answers = [store.num_answers]
    for view, shard in store.missing():
        store.write(view, shard, arrays_for(shard, view), batch_size=4)
        answers.append(TargetStore.open(tmp_path).num_answers)
    assert answers == [0, 8, 16, 20, 28, 36, 40]


def test_a_file_in_the_place_of_an_arrays_folder(tmp_path):
    store = complete(tmp_path, count=20)
    shutil.rmtree(tmp_path / "logits")
    (tmp_path / "logits").write_bytes(b"")
    assert "view 0, shard 1: c.0.1.0 of logits is absent" in [str(each) for each in store.verify()]
    with pytest.raises(IncompleteStoreError, match="shard 1 of view 0"):
        TargetStore.open(tmp_path).read(np.array([9]))


def test_a_shard_without_a_record_is_one_problem(tmp_path):
    complete(tmp_path, count=20)
    store = TargetStore.create(tmp_path, manifest(), *rows(24))
    assert [str(each) for each in store.verify()] == ["view 0, shard 2: no valid commit record"]


def test_trusted_shards_are_not_read_again(tmp_path):
    store = complete(tmp_path, count=20)
    for shard in (0, 2):
        path = tmp_path / "logits" / f"c.0.{shard}.0"
        content = bytearray(path.read_bytes())
        content[3] ^= 1
        path.write_bytes(content)
    assert [each.shard for each in store.verify()] == [0, 2]
    assert [each.shard for each in store.verify(trusted={(0, 2)})] == [0]
    assert store.verify(trusted={(0, 0), (0, 2)}) == []


@pytest.mark.parametrize(
    "name", ["manifest.json", "extent.json", "rows.parquet", "commits.parquet", "commits.parquet.sha256"]
)
def test_errors_of_a_damaged_description_name_the_repair(tmp_path, name):
    complete(tmp_path, count=20)
    path = tmp_path / name
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(CorruptStoreError, match=rf"{name}.* Run `kdpipe cache-teacher NAME --repair`"):
        _ = TargetStore.open(tmp_path).sample_ids


def test_a_store_of_another_format_version_is_refused(tmp_path):
    complete(tmp_path, count=8)
    path = tmp_path / "manifest.json"
    path.write_text(path.read_text().replace('"format_version": 2', '"format_version": 1'))
    with pytest.raises(StoreError, match="format version 1"):
        TargetStore.open(tmp_path)


@given(row_bytes=st.integers(1, 200_000), shard_rows=st.integers(1, 100_000))
def test_chunks_divide_shards_and_stay_small(row_bytes, shard_rows):
    try:
        layout = ArrayLayout.of("x", ArraySpec(dtype="uint8", shape=(row_bytes,)), shard_rows)
    except ConfigError:
        reject()
    assert layout.shard_rows % layout.chunk_rows == 0
    assert layout.chunk_rows == 1 or layout.chunk_bytes <= 2 * 2**20


def test_a_shard_size_without_even_chunks_is_refused():
    with pytest.raises(ConfigError, match=r"10007, which cannot be divided .* such as 8192"):
        ArrayLayout.of("x", ArraySpec(dtype="uint8", shape=()), 10007)


@given(num_rows=st.integers(1, 10**7), classes=st.integers(2, 50_000))
def test_shards_are_bounded_and_many(num_rows, classes):
    spec = ArraySpec(dtype="float16", shape=(classes,))
    shard_rows = choose_shard_rows([spec], num_rows)
    assert shard_rows * spec.row_bytes <= 32 * 2**20
    assert num_rows < 16 or num_rows / shard_rows >= 16


def test_per_token_targets_fit(tmp_path):
    """Logits `[T, C]` per row, as language models have them."""
    output = OutputSpec(name="logits", shape=(5, NUM_CLASSES))
    store = TargetStore.create(tmp_path, manifest(outputs=[output]), *rows(20))
    logits = torch.randn(20, 5, NUM_CLASSES, generator=torch.Generator().manual_seed(0))
    for view, shard in store.missing():
        part = logits[shard.start : shard.stop]
        arrays = {f"logits{suffix}": each for suffix, each in Dense().encode(part).items()}
        store.write(view, shard, {**arrays, "statistics": teacher_statistics(part)}, batch_size=4)
    store.finish()
    found = TargetStore.open(tmp_path)
    assert found.read(np.array([7, 3]))["logits"].log_probs(2.0).shape == (2, 5, NUM_CLASSES)
    np.testing.assert_array_equal(found.statistics(np.arange(20))["top1"], logits.argmax(dim=-1).numpy())
