"""views.parquet: rows of any columns come back as they were kept, and the store's description vouches for them."""

from __future__ import annotations

import json

import numpy as np
import pyarrow.parquet as pq
import pytest

from kdpipe.data.columns import Ragged
from kdpipe.errors import CorruptStoreError
from kdpipe.store import open_store
from kdpipe.store.kept import VIEWS, KeptViews
from projects import tree
from store.make_golden_store import digests, make, sample_ids
from toy_capture import ToyTeacher, manifest_for


def kept(count=5):
    """Pixels, numbers, an empty text, and no partner for some."""
    random = np.random.default_rng(0)
    lengths = np.array([0, 3, 1, 7, 2])[:count]
    return KeptViews(
        sample_ids=sample_ids()[:count],
        partners=np.array(["", "zeile-03-ä", "", "b", "c"])[:count],
        columns={
            "image": random.integers(0, 256, (count, 4, 3, 1)).astype(np.uint8),
            "features": random.normal(size=(count, 2)).astype(np.float32),
            "text": Ragged(
                values=random.integers(0, 256, lengths.sum()).astype(np.uint8), offsets=np.cumsum([0, *lengths])
            ),
        },
    )


def same(one, other):
    assert one.to_bytes() == other.to_bytes()
    assert one.sample_ids.tolist() == other.sample_ids.tolist()
    assert one.partners.tolist() == other.partners.tolist()
    assert set(one.columns) == set(other.columns)
    for name, column in one.columns.items():
        found = other.columns[name]
        if isinstance(column, Ragged):
            assert found.values.dtype == column.values.dtype
            assert found.values.tolist() == column.values.tolist()
            assert found.offsets.tolist() == column.offsets.tolist()
        else:
            assert found.dtype == column.dtype
            assert np.array_equal(found, column)


@pytest.fixture
def store(tmp_path):
    return make(tmp_path / "store")


def test_what_is_kept_comes_back(store):
    before = tree(store.path)
    assert store.kept_views() is None
    store.keep_views(kept())
    same(open_store(store.path).kept_views(), kept())
    assert store.verify() == []
    assert VIEWS in store.file_names()
    store.keep_views(None)
    assert tree(store.path) == before


def test_some_and_more(store):
    whole = kept()
    same(whole.take(np.array([0, 1])).with_more(whole.take(np.array([2, 3, 4]))), whole)
    assert len(whole.take(np.array([], np.int64)).with_more(whole)) == 5


def test_it_reads_as_the_document_says(store):
    store.keep_views(kept())
    lines = pq.read_table(store.path / VIEWS).to_pylist()
    assert [line["column"] for line in lines[:3]] == ["features", "image", "text"]
    image = next(line for line in lines if line["column"] == "image" and line["sample_id"] == sample_ids()[1])
    values = np.frombuffer(image["values"], image["dtype"]).reshape(image["shape"])
    assert np.array_equal(values, kept().columns["image"][1])
    extent = json.loads((store.path / "extent.json").read_text())
    assert len(extent["views_sha256"]) == 64


def test_a_store_that_goes_on_keeps_them(store, tmp_path):
    teacher = ToyTeacher()
    manifest = manifest_for(teacher, 8)
    begun = type(store).create(tmp_path / "begun", manifest, sample_ids(), digests(), 2)
    begun.keep_views(kept())
    grown = type(store).create(tmp_path / "begun", manifest, sample_ids(), digests(), 3)
    same(grown.kept_views(), kept())


def test_damage_is_found(store):
    store.keep_views(kept())
    content = (store.path / VIEWS).read_bytes()
    (store.path / VIEWS).write_bytes(content[:-1] + b"\0")
    with pytest.raises(CorruptStoreError, match=r"views\.parquet is absent or differs from its digest in extent\.json"):
        open_store(store.path).kept_views()
    assert [str(each) for each in open_store(store.path).verify()] == ["views.parquet is absent or was changed"]
    extent = json.loads((store.path / "extent.json").read_text())
    del extent["views_sha256"]
    (store.path / "extent.json").write_text(json.dumps(extent))
    with pytest.raises(CorruptStoreError, match=r"extent\.json differs from its own digest"):
        open_store(store.path)
