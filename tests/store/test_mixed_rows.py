"""What a shard of mixed rows was computed from: rows of its blocks and their splits, as docs/store_format.md says."""

from __future__ import annotations

import hashlib

import numpy as np
import pyarrow.parquet as pq
import pytest

from kdpipe.store import TargetStore, open_store
from toy_capture import NUM_CLASSES, MemoryRows, ToyTeacher, manifest_for

NUM_ROWS, NUM_VIEWS, SHARD_ROWS = 700, 3, 64
BLOCK = 256


def begun(folder, splits, num_rows=NUM_ROWS, shard_rows=SHARD_ROWS):
    rows = MemoryRows(num_rows)
    manifest = manifest_for(ToyTeacher(), shard_rows)
    return TargetStore.create(folder, manifest, rows.sample_ids, rows.digests, NUM_VIEWS, splits=splits)


def filled(store):
    for view, shard in store.missing():
        arrays = {
            "logits": np.zeros((shard.num_rows, NUM_CLASSES), np.float16),
            "logits.row_max": np.zeros(shard.num_rows, np.float32),
            "statistics": np.zeros((shard.num_rows, 3), np.float32),
        }
        store.write(view, shard, arrays, batch_size=16)
    store.finish()
    return store


def splits_of(num_rows=NUM_ROWS):
    return np.where(np.arange(num_rows) % 5 == 0, "", "train")


@pytest.mark.parametrize("shard_rows", [64, 100, 512])
def test_its_digest_covers_its_blocks_and_their_splits(tmp_path, shard_rows):
    store = filled(begun(tmp_path, splits_of(), shard_rows=shard_rows))
    assert open_store(tmp_path).verify() == []
    assert open_store(tmp_path).rows.splits.tolist() == splits_of().tolist()
    rows = pq.read_table(tmp_path / "rows.parquet").to_pylist()
    for record in store.records.values():
        here, splits = rows[record.start : record.stop], ""
        if record.view:
            last = -(-record.stop // BLOCK) * BLOCK
            here = rows[record.start // BLOCK * BLOCK : last]
            splits = "\0".join(each["split"] for each in here)
        ids = "\0".join(each["sample_id"] for each in here)
        content = ids.encode() + b"".join(each["digest"] for each in here) + splits.encode()
        assert record.inputs == hashlib.sha256(content).hexdigest()


def test_another_split_costs_the_views_of_its_block(tmp_path):
    filled(begun(tmp_path, splits_of()))
    splits = splits_of()
    splits[300] = "train"
    missing = {(view, shard.index) for view, shard in begun(tmp_path, splits).missing()}
    assert missing == {(view, shard) for view in (1, 2) for shard in (4, 5, 6, 7)}
    filled(begun(tmp_path, splits))
    assert begun(tmp_path, splits).missing() == []


def test_growth_costs_the_views_of_the_last_block_and_view_0_its_last_shard(tmp_path):
    filled(begun(tmp_path, splits_of()))
    grown = begun(tmp_path, splits_of(NUM_ROWS + 3), NUM_ROWS + 3)
    missing = {(view, shard.index) for view, shard in grown.missing()}
    assert missing == {(0, 10)} | {(view, shard) for view in (1, 2) for shard in (8, 9, 10)}


def test_no_more_mixing_leaves_view_0(tmp_path):
    filled(begun(tmp_path, splits_of()))
    store = begun(tmp_path, None)
    assert store.rows.splits is None
    assert {view for view, _ in store.missing()} == {1, 2}


def test_a_changed_split_in_the_file_is_found(tmp_path):
    filled(begun(tmp_path, splits_of()))
    table = pq.read_table(tmp_path / "rows.parquet")
    pq.write_table(
        table.set_column(2, "split", table["split"].combine_chunks().take(np.arange(NUM_ROWS)[::-1])),
        tmp_path / "rows.parquet",
    )
    assert "rows.parquet is absent or was changed" in [str(each) for each in open_store(tmp_path).verify()]
