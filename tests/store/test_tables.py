"""Stores as tables and back: round trips, what other tools read, tables made elsewhere, and wrong ones."""

from __future__ import annotations

import json
import tracemalloc
import zipfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kdpipe.encodings import Dense, Features, Int8, Sampled, TopK
from kdpipe.errors import ConfigError, DataError, IncompleteStoreError, StoreError
from kdpipe.store import TargetStore, open_store
from kdpipe.store.manifest import Manifest
from kdpipe.store.tables import FORMATS, TableTargets, export_table, fill, open_table, own_rows, prepared_rows
from kdpipe.store.tables import files as table_files
from kdpipe.targets import OutputSpec

NUM_CLASSES = 7
NUM_ROWS = 50
FORMAT = pytest.mark.parametrize("table_format", FORMATS)


def manifest(encoding, shape=(NUM_CLASSES,), coverage=False, features=None, shard_rows=16):
    outputs = [OutputSpec(name="logits", shape=shape)]
    encodings = {"logits": encoding.to_json()}
    if features:
        outputs.append(OutputSpec(name="hidden", shape=features, kind="features"))
        encodings["hidden"] = Features().to_json()
    return Manifest(
        ingredients={"teacher": "test"},
        outputs=outputs,
        encodings=encodings,
        temperatures=[1.0],
        num_classes=shape[-1],
        class_names=[f"class {index}" for index in range(shape[-1])] if shape[-1] < 1000 else None,
        shard_rows=shard_rows,
        coverage=coverage,
    )


def store_of(path, encoding, shape=(NUM_CLASSES,), num_rows=NUM_ROWS, num_views=1, in_views=None, **changes):
    """A complete store of random logits; row i of view v depends on i and v only."""
    made = manifest(encoding, shape, **changes)
    ids = np.array([f"row-{index}" for index in range(num_rows)])
    store = TargetStore.create(path, made, ids, np.zeros((num_rows, 16), np.uint8), num_views)
    if in_views is not None:
        store.want_in_views(in_views)
    for view, shard in store.missing():
        generator = np.random.default_rng([shard.index, view])
        logits = torch.from_numpy(3 * generator.normal(size=(shard.num_rows, *shape)).astype(np.float32))
        keys = np.arange(shard.num_rows, dtype=np.uint64)
        arrays = {f"logits{suffix}": each for suffix, each in encoding.encode(logits, keys).items()}
        if "hidden" in store.outputs:
            arrays["hidden"] = generator.normal(size=(shard.num_rows, *store.outputs["hidden"].shape)).astype("f2")
        top = torch.log_softmax(logits, dim=-1).max(dim=-1)
        arrays["statistics"] = torch.stack([top.indices, top.values.exp(), top.values.exp()], dim=-1).numpy()
        if made.coverage:
            arrays["covered"] = generator.random((shard.num_rows, *shape[:-1])) > 0.3
        store.write(view, shard, arrays, batch_size=4)
    store.finish()
    return open_store(path)


def imported(path, said, made, memory_bytes=2**28):
    """A table as a store of its own."""
    own = own_rows(said)
    digests = np.zeros((len(own.sample_ids), 16), np.uint8)
    store = TargetStore.create(path, made, own.sample_ids, digests, own.num_views)
    store.want_in_views(own.in_views)
    fill(store, said, own.rows, store.missing(), memory_bytes=memory_bytes)
    store.finish()
    assert open_store(path).verify() == []
    return open_store(path)


def imported_as(folder, columns, encoding, **told):
    """A store of a made-up table: columns by name, or JSON's text."""
    path = folder / "table.parquet"
    pq.write_table(pa.table(columns), path)
    said = TableTargets(open_table(path), **told)
    said.check({"logits": encoding})
    shape = said.outputs[0].shape
    return imported(folder / "made", said, manifest(encoding, shape, coverage=said.has_coverage))


def same_where_covered(first, second, view, rows=None):
    """Every array but the statistics, bit by bit."""
    ids = second.sample_ids if rows is None else second.sample_ids[rows]
    ours, theirs = first.read_arrays(first.rows_of(ids), view), second.read_arrays(second.rows_of(ids), view)
    covered = ours.get("covered", np.ones(len(ids), np.bool_))
    assert covered.any()
    for name, values in ours.items():
        if name == "covered":
            np.testing.assert_array_equal(values, theirs[name])
        elif name != "statistics":
            where = covered if values.shape[: covered.ndim] == covered.shape else covered.any(axis=1)
            np.testing.assert_array_equal(values[where], theirs[name][where], err_msg=name)


CASES = {
    "dense float32": (Dense(dtype="float32"), (NUM_CLASSES,), {}),
    "dense, views": (Dense(), (NUM_CLASSES,), {"num_views": 3}),
    "dense, coverage, features": (Dense(dtype="float32"), (NUM_CLASSES,), {"coverage": True, "features": (4,)}),
    "dense per token": (Dense(dtype="float32"), (3, NUM_CLASSES), {"coverage": True, "features": (3, 4)}),
    "int8": (Int8(), (NUM_CLASSES,), {}),
    "topk": (TopK(k=3), (NUM_CLASSES,), {}),
    "topk, int8 values": (TopK(k=NUM_CLASSES, values="int8"), (NUM_CLASSES,), {}),
    "topk, temperatures, top_p": (
        TopK(k=4, temperatures=(2.0, 4.0), top_p=0.8),
        (NUM_CLASSES,),
        {"coverage": True, "num_views": 2},
    ),
    "topk, top_p": (TopK(k=NUM_CLASSES, top_p=0.999), (NUM_CLASSES,), {}),
    "topk per token": (TopK(k=2, temperatures=(4.0,), compact=True), (3, NUM_CLASSES), {"coverage": True}),
}


@FORMAT
@pytest.mark.parametrize("case", CASES)
def test_import_of_export_gives_the_same_targets(tmp_path, table_format, case):
    encoding, shape, changes = CASES[case]
    store = store_of(tmp_path / "store", encoding, shape, **changes)
    path = tmp_path / f"table{FORMATS[table_format]}"
    assert export_table(store, path) == NUM_ROWS * store.num_views
    features = ["hidden"] if "hidden" in store.outputs else []
    said = TableTargets(open_table(path), features=features)
    said.check(store.encodings)
    again = imported(tmp_path / "again", said, store.manifest)
    assert again.sample_ids.tolist() == store.sample_ids.tolist()
    for view in range(store.num_views):
        if encoding == Dense():  # (z - max) + max in float32 and back
            values = [each.targets(store.sample_ids, view).log_probs(2.0) for each in (store, again)]
            torch.testing.assert_close(*values, rtol=2**-10, atol=2**-20)
        elif isinstance(encoding, Int8) or (isinstance(encoding, TopK) and encoding.values == "int8"):
            values = [each.targets(store.sample_ids, view).log_probs(1.0) for each in (store, again)]
            torch.testing.assert_close(*values, rtol=1e-5, atol=1e-6)
        else:
            same_where_covered(store, again, view)


@FORMAT
def test_views_of_some_rows_come_back_as_such(tmp_path, table_format):
    in_views = np.arange(NUM_ROWS) % 3 > 0
    store = store_of(tmp_path / "store", TopK(k=2), num_views=3, in_views=in_views)
    path = tmp_path / f"table{FORMATS[table_format]}"
    assert export_table(store, path) == NUM_ROWS + 2 * int(in_views.sum())
    again = imported(tmp_path / "again", TableTargets(open_table(path)), store.manifest)
    for view in range(3):
        same_where_covered(store, again, view, np.flatnonzero(in_views) if view else None)
    with pytest.raises(IncompleteStoreError, match="view 2 holds no targets"):
        again.read(np.array([0]), view=2)


@pytest.mark.parametrize("memory_bytes", [0, 2**28])
@settings(max_examples=5)
@given(seed=st.integers(0, 99))
def test_the_order_of_the_table_does_not_matter(tmp_path_factory, memory_bytes, seed):
    folder = tmp_path_factory.mktemp("tables")
    store = store_of(folder / "store", TopK(k=3), coverage=True)
    export_table(store, folder / "table.parquet")
    table = pq.read_table(folder / "table.parquet")
    generator = np.random.default_rng(seed)
    table = table.take(generator.permutation(NUM_ROWS)[: generator.integers(1, NUM_ROWS)])
    pq.write_table(table, folder / "shuffled.parquet", row_group_size=7)
    said = TableTargets(open_table(folder / "shuffled.parquet"))
    rows = prepared_rows(said, store.sample_ids)
    made = TargetStore.create(folder / "made", store.manifest, store.sample_ids, store.digests)
    fill(made, said, rows, made.missing()[1:3], memory_bytes=memory_bytes)  # as after a crash
    fill(made, said, rows, made.missing(), memory_bytes=memory_bytes)
    made.finish()
    covered = np.zeros(NUM_ROWS, np.bool_)
    covered[rows] = store.read_arrays(rows, names=["covered"])["covered"]
    found = open_store(folder / "made").read_arrays(np.arange(NUM_ROWS))
    np.testing.assert_array_equal(found["covered"], covered)
    expected = store.read_arrays(np.flatnonzero(covered))
    for name in ("logits.ids", "logits.log_probs", "logits.tails"):
        np.testing.assert_array_equal(found[name][covered], expected[name])
    assert not list((folder / "made").glob("*.tmp"))


def test_small_batches_give_the_same_files(tmp_path, monkeypatch):
    store = store_of(tmp_path / "store", TopK(k=3))
    rows = {}
    for name, batch_bytes in (("large", table_files.BATCH_BYTES), ("small", 100)):
        monkeypatch.setattr(table_files, "BATCH_BYTES", batch_bytes)
        for table_format, ending in FORMATS.items():
            export_table(store, tmp_path / (name + ending))
            table = open_table(tmp_path / (name + ending))
            batches = list(table.batches(table.names))
            assert len(batches) == 1 if name == "large" else len(batches) > 5
            rows[name, table_format] = [row for batch in batches for row in batch.to_pylist()]
    for table_format in FORMATS:
        assert rows["small", table_format] == rows["large", table_format]
    assert (tmp_path / "large.npz").read_bytes() == (tmp_path / "small.npz").read_bytes()


def test_exports_say_what_they_are(tmp_path):
    store = store_of(tmp_path / "store", TopK(k=3, temperatures=(4.0,)), coverage=True)
    export_table(store, tmp_path / "table.parquet")
    schema = pq.read_schema(tmp_path / "table.parquet")
    types = {name: str(schema.field(name).type) for name in schema.names}
    assert types == {
        "sample_id": "string",
        "view": "int32",
        "covered": "bool",
        "class_ids": "list<element: int32>",
        "log_probs": "list<element: float>",
        "tail_log_mass": "fixed_size_list<element: float>[2]",
        "top1": "int32",
        "confidence": "float",
        "entropy": "float",
    }
    about = json.loads(schema.metadata[b"kdpipe"])
    assert about["fingerprint"] == store.fingerprint
    assert about["encodings"] == {"logits": TopK(k=3, temperatures=(4.0,)).to_json()}
    assert (about["num_classes"], about["temperatures"]) == (NUM_CLASSES, [1.0, 4.0])
    assert about["class_names"][0] == "class 0"
    rows = pq.read_table(tmp_path / "table.parquet").to_pylist()
    targets = store.targets([each["sample_id"] for each in rows])
    for row, ids, head, covered in zip(rows, targets.ids, targets.head, targets.covered, strict=True):
        assert row["covered"] == bool(covered)
        if covered:
            assert row["class_ids"] == ids.tolist()
            assert row["log_probs"] == head.tolist()
        else:
            assert row["class_ids"] == []
            assert np.isnan(row["tail_log_mass"]).all()
            assert row["top1"] == -1


def test_numpy_reads_npz(tmp_path):
    store = store_of(tmp_path / "store", TopK(k=4, top_p=0.8, temperatures=(4.0,)))
    export_table(store, tmp_path / "table.npz")
    with np.load(tmp_path / "table.npz") as table:
        assert table["sample_id"].tolist() == store.sample_ids.tolist()
        assert table["temperatures"].tolist() == [1.0, 4.0]
        assert json.loads(str(table["kdpipe"]))["num_classes"] == NUM_CLASSES
        targets = store.targets(store.sample_ids)
        np.testing.assert_array_equal(table["log_probs"], targets.head.numpy())
        np.testing.assert_array_equal(table["class_ids"], targets.ids.numpy())
        assert np.isneginf(table["log_probs"]).any()


def test_draws_are_exported_and_not_imported(tmp_path):
    store = store_of(tmp_path / "store", Sampled(draws=4, head=2))
    for ending in FORMATS.values():
        export_table(store, tmp_path / f"table{ending}")
        with pytest.raises(DataError, match=r"draws from a distribution \(weights\)"):
            TableTargets(open_table(tmp_path / f"table{ending}"))
    row = pq.read_table(tmp_path / "table.parquet").to_pylist()[0]
    assert sum(row["weights"]) == pytest.approx(1, abs=1e-3)
    assert min(row["weights"]) > 0
    assert row["entropy"] > 0


def test_one_view_and_one_output(tmp_path):
    store = store_of(tmp_path / "store", Dense(), num_views=3, features=(4,))
    assert export_table(store, tmp_path / "a.arrow", views=[2], outputs=["hidden"]) == NUM_ROWS
    table = pa.ipc.open_file(tmp_path / "a.arrow").read_all()
    assert table.schema.names == ["sample_id", "view", "hidden"]
    assert set(table["view"].to_pylist()) == {2}
    with pytest.raises(StoreError, match="it holds logits, hidden"):
        export_table(store, tmp_path / "b.arrow", outputs=["pooled"])
    with pytest.raises(IncompleteStoreError, match=r"views 0\.\.2"):
        export_table(store, tmp_path / "b.arrow", views=[3])
    with pytest.raises(DataError, match="exists already"):
        export_table(store, tmp_path / "a.arrow")
    assert sorted(each.name for each in tmp_path.iterdir()) == ["a.arrow", "store"]


def test_an_export_that_fails_leaves_what_was_there(tmp_path):
    store = store_of(tmp_path / "store", Dense())
    export_table(store, tmp_path / "table.parquet")
    before = (tmp_path / "table.parquet").read_bytes()
    victim = tmp_path / "store" / "logits" / "c.0.3.0"
    victim.write_bytes(victim.read_bytes()[:-9] + b"otherwise")
    with pytest.raises(StoreError):
        export_table(open_store(tmp_path / "store"), tmp_path / "table.parquet", replace=True)
    assert (tmp_path / "table.parquet").read_bytes() == before
    assert sorted(each.name for each in tmp_path.iterdir()) == ["store", "table.parquet"]


def log_softmax(logits):
    return torch.log_softmax(torch.from_numpy(logits), dim=-1).numpy()


def head_of(logits, k):
    """Ids of the k largest, largest first as servers give them, and their log-probs."""
    ids = np.argsort(-logits, axis=-1)[..., :k]
    return ids, np.take_along_axis(log_softmax(logits), ids, axis=-1)


@pytest.mark.parametrize("list_type", [pa.list_, pa.large_list])
def test_log_probs_of_a_server(tmp_path, list_type):
    """Ids in order of probability, ragged, no tail, names of one's own: what a vLLM server gives."""
    logits = np.random.default_rng(0).normal(size=(20, NUM_CLASSES)) * 3
    ids, log_probs = head_of(logits, 4)
    kept = np.arange(20) % 3 + 2
    columns = {
        "sample_id": [f"prompt {index}" for index in range(20)],
        "class_ids": pa.array([row[:k] for row, k in zip(ids, kept, strict=True)], list_type(pa.int64())),
        "log_probs": pa.array([row[:k] for row, k in zip(log_probs, kept, strict=True)], list_type(pa.float64())),
    }
    store = imported_as(tmp_path, columns, TopK(k=4), num_classes=NUM_CLASSES)
    targets = store.targets([f"prompt {index}" for index in range(20)])
    for row in range(20):
        k = kept[row]
        order = np.argsort(ids[row, :k])
        assert targets.ids[row, :k].tolist() == ids[row, :k][order].tolist()
        np.testing.assert_allclose(targets.head[row, :k], log_probs[row, :k][order], rtol=2**-11)
        assert (targets.ids[row, k:] == targets.ids[row, k - 1]).all()
        assert torch.isneginf(targets.head[row, k:]).all()
        tail = np.log(1 - np.exp(log_probs[row, :k]).sum())
        np.testing.assert_allclose(targets.tails[row], [tail], rtol=1e-6)
    said = store.statistics(np.arange(20))
    np.testing.assert_array_equal(said["top1"], logits.argmax(axis=-1))
    np.testing.assert_allclose(said["confidence"], np.exp(log_probs[:, 0]), rtol=1e-6)
    entropy = -(np.exp(log_softmax(logits)) * log_softmax(logits)).sum(axis=-1)
    assert (said["entropy"] <= entropy + 1e-6).all()
    with pytest.raises(ConfigError, match="temperature 4 is not stored"):
        targets.softened(4.0)


@pytest.mark.parametrize(
    "encoding", [TopK(k=3, temperatures=(2.0,)), TopK(k=5, temperatures=(2.0,), top_p=0.9, min_k=2)]
)
def test_classes_beyond_k_join_the_tail_exactly(tmp_path, encoding):
    """A table of more classes than are kept gives what the logits give."""
    logits = np.random.default_rng(1).normal(size=(30, NUM_CLASSES)) * 2
    ids, log_probs = head_of(logits, 6)
    rest = np.take_along_axis(log_softmax(logits), np.argsort(-logits)[:, 6:], axis=1)
    tails = np.stack([np.log(np.exp(rest / t).sum(axis=1)) for t in (2.0, 1.0)], axis=1)
    columns = {
        "sample_id": pa.array(range(30)),
        "class_ids": list(ids.astype(np.uint16)),
        "log_probs": list(log_probs),
        "tail_log_mass": list(tails),
    }
    store = imported_as(tmp_path, columns, encoding, num_classes=NUM_CLASSES, temperatures=(2.0, 1.0))
    found = store.read_arrays(np.arange(30))
    for suffix, values in encoding.encode(torch.from_numpy(logits)).items():
        np.testing.assert_allclose(found[f"logits{suffix}"], values, rtol=1e-3 if suffix == ".log_probs" else 1e-5)
    assert store.sample_ids[17] == "17"


@settings(max_examples=5)
@given(scale=st.floats(0.1, 20), seed=st.integers(0, 99))
def test_every_class_named_is_dense(tmp_path_factory, scale, seed):
    """k = C without a tail: the same distribution as the logits."""
    logits = np.random.default_rng(seed).normal(size=(5, NUM_CLASSES)) * scale
    ids, log_probs = head_of(logits, NUM_CLASSES)
    columns = {"sample_id": list("abcde"), "class_ids": list(ids), "log_probs": list(log_probs)}
    folder = tmp_path_factory.mktemp("tables")
    targets = imported_as(folder, columns, TopK(k=NUM_CLASSES), num_classes=NUM_CLASSES).targets(list("abcde"))
    assert torch.isneginf(targets.tails).all()
    np.testing.assert_allclose(targets.head, log_softmax(logits), rtol=2**-11, atol=2**-25)


def test_json_lines(tmp_path):
    lines = [
        {"sample_id": 7, "class_ids": [3, 1], "log_probs": [-0.5, -2]},
        {"sample_id": 8, "class_ids": [], "log_probs": [], "covered": False},
        {"sample_id": 9, "class_ids": [0], "log_probs": [0]},
    ]
    path = tmp_path / "table.jsonl"
    path.write_text("\n".join(json.dumps({"covered": True, **each}) for each in lines))
    said = TableTargets(open_table(path), num_classes=5)
    assert said.widest() == 2
    targets = imported(tmp_path / "made", said, manifest(TopK(k=2), (5,), coverage=True)).targets(["9", "8", "7"])
    assert targets.covered.tolist() == [True, False, True]
    assert targets.ids.tolist() == [[0, 0], [0, 1], [1, 3]]
    assert targets.head[[0, 2]].tolist() == [[0, -float("inf")], [-2, -0.5]]
    assert torch.isneginf(targets.tails[0]).all()


def test_rows_without_answer_may_be_null(tmp_path):
    logits = [[0.5, -float("inf"), 2.0], None, [1.0, 2.0, 3.0]]
    columns = {"sample_id": list("abc"), "logits": pa.array(logits), "covered": [True, False, True]}
    store = imported_as(tmp_path, columns, Dense(dtype="float32"))
    targets = store.targets(list("abc"))
    assert targets.covered.tolist() == [True, False, True]
    assert targets.logits()[0].tolist() == [0.5, -float("inf"), 2.0]
    assert store.statistics(np.array([1]))["confidence"].tolist() == [0.0]
    assert store.statistics(np.array([2]))["top1"].tolist() == [2.0]


def ragged_tokens(num_rows, most):
    """Logits of rows of 0 to `most` tokens, the longest row last."""
    generator = np.random.default_rng(num_rows)
    lengths = [*generator.integers(0, most, num_rows - 1), most]
    return [generator.normal(size=(length, NUM_CLASSES)).astype(np.float32) * 3 for length in lengths]


@pytest.mark.parametrize("batch_bytes", [100, 2**23])
@pytest.mark.parametrize("encoding", [Dense(dtype="float32"), TopK(k=3)])
def test_rows_of_fewer_tokens_are_padded(tmp_path, monkeypatch, batch_bytes, encoding):
    """The longest row is the last one, and is met in another batch; where a row has tokens, they say what they said."""
    monkeypatch.setattr(table_files, "BATCH_BYTES", batch_bytes)
    said = ragged_tokens(40, most=6)
    columns = {"sample_id": [f"row-{index}" for index in range(40)]}
    if isinstance(encoding, Dense):
        columns["logits"] = [list(map(list, row)) for row in said]
    else:
        heads = [head_of(row, 3) for row in said]
        columns |= {"class_ids": [ids.tolist() for ids, _ in heads], "log_probs": [each.tolist() for _, each in heads]}
    store = imported_as(tmp_path, columns, encoding, num_classes=NUM_CLASSES)
    assert store.outputs["logits"].shape == (6, NUM_CLASSES)
    targets = store.targets(columns["sample_id"])
    lengths = np.array([len(row) for row in said])
    assert targets.covered.tolist() == (np.arange(6) < lengths[:, np.newaxis]).tolist()
    expected = encoding.decode(encoding.encode(torch.from_numpy(np.concatenate(said))), store.outputs["logits"])
    found = targets[torch.arange(40)].log_probs()[targets.covered]
    torch.testing.assert_close(found, expected.log_probs(), rtol=1e-3, atol=1e-5)


def test_tokens_without_an_entry_are_not_covered(tmp_path):
    """As empty lists or as null; of rows that are covered, and never of those that are not."""
    columns = {
        "sample_id": list("abcd"),
        "class_ids": [[[], [1, 2], [3]], [None, [4]], [[0]], [[1], [1]]],
        "log_probs": [[[], [-1.0, -2.0], [-0.5]], [None, [-0.1]], [[-0.2]], [[-0.3], [-0.3]]],
        "covered": [True, True, True, False],
    }
    targets = imported_as(tmp_path, columns, TopK(k=2), num_classes=NUM_CLASSES).targets(list("abcd"))
    assert targets.covered.tolist() == [[False, True, True], [False, True, False], [True, False, False], [False] * 3]
    assert targets.ids[0].tolist()[1:] == [[1, 2], [3, 3]]


def test_padding_by_hand_gives_the_same_store(tmp_path):
    """Rows of one length with `covered` per token, and ragged rows without it."""
    said = ragged_tokens(20, most=4)
    ids = [f"row-{index}" for index in range(20)]
    covered = [[place < len(row) for place in range(4)] for row in said]
    whole = [[*map(list, row), *[[0.0] * NUM_CLASSES] * (4 - len(row))] for row in said]
    for name in ("ragged", "padded"):
        (tmp_path / name).mkdir()
    ragged = {"sample_id": ids, "logits": [list(map(list, row)) for row in said]}
    stores = [
        imported_as(tmp_path / "ragged", ragged, Dense()),
        imported_as(tmp_path / "padded", {"sample_id": ids, "logits": whole, "covered": covered}, Dense()),
    ]
    for name, values in stores[0].read_arrays(np.arange(20)).items():
        np.testing.assert_array_equal(values, stores[1].read_arrays(np.arange(20))[name], err_msg=name)


def test_features_of_ragged_tokens(tmp_path):
    said = ragged_tokens(12, most=5)
    hidden = [row[:, :2].tolist() for row in said]
    columns = {"sample_id": [str(row) for row in range(12)], "logits": [row.tolist() for row in said], "hidden": hidden}
    path = tmp_path / "table.parquet"
    pq.write_table(pa.table(columns), path, row_group_size=3)
    table = TableTargets(open_table(path), features=["hidden"])
    made = manifest(Dense(), (5, NUM_CLASSES), coverage=table.has_coverage, features=(5, 2))
    store = imported(tmp_path / "made", table, made)
    values, covered = store.read_arrays(np.arange(12))["hidden"], store.targets(columns["sample_id"]).covered.numpy()
    np.testing.assert_array_equal(values[covered], np.concatenate(said)[:, :2].astype(np.float16))


def test_one_long_row_costs_no_memory_for_all(tmp_path, monkeypatch):
    """2,000 rows of a token and one of 500: together they would be 32 MB of class ids and log-probs."""
    monkeypatch.setattr(table_files, "BATCH_BYTES", 2**20)
    lengths = [1] * 2000 + [500]
    columns = {
        "sample_id": [str(row) for row in range(2001)],
        "class_ids": [[[0, 1]] * length for length in lengths],
        "log_probs": [[[-1.0, -1.0]] * length for length in lengths],
    }
    path = tmp_path / "table.parquet"
    pq.write_table(pa.table(columns), path)
    own = own_rows(said := TableTargets(open_table(path), num_classes=NUM_CLASSES))
    made = manifest(TopK(k=2), (500, NUM_CLASSES), coverage=True, shard_rows=100)
    store = TargetStore.create(tmp_path / "made", made, own.sample_ids, np.zeros((2001, 16), np.uint8))
    tracemalloc.start()
    try:
        fill(store, said, own.rows, store.missing(), memory_bytes=4 * 2**20)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 16 * 2**20
    assert int(store.read_arrays(np.array([0, 2000]), names=["covered"])["covered"].sum()) == 501


def test_columns_of_ones_own_are_named(tmp_path):
    """A review is no view, and a weight, an entropy or a class beside all logits mean nothing to an import."""
    own = {"review": ["good"] * 3, "weights": [1.0] * 3, "class_id": [0] * 3, "tails": [0] * 3}
    pq.write_table(pa.table({**LOGITS, **own, "entropy": [0.0] * 3}), tmp_path / "table.parquet")
    said = TableTargets(open_table(tmp_path / "table.parquet"))
    assert said.columns_not_read == ("review", "weights", "class_id", "tails")


def lines_of(path, *lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return open_table(path)


def test_lists_in_json_may_begin_with_null(tmp_path):
    """pyarrow's reader loses such a null where it infers the list's type."""
    lines = [
        {"sample_id": "a", "class_ids": [None, [1, 2]], "log_probs": [None, [-1.0, -2.0]]},
        {"sample_id": "b", "class_ids": [None, [3]], "log_probs": [None, [-0.5]]},
    ]
    said = TableTargets(lines_of(tmp_path / "table.jsonl", *lines), num_classes=5)
    targets = imported(tmp_path / "made", said, manifest(TopK(k=2), (2, 5), coverage=True)).targets(["a", "b"])
    assert targets.covered.tolist() == [[False, True]] * 2
    assert targets.ids[:, 1].tolist() == [[1, 2], [3, 3]]


def test_rows_without_a_token_may_fill_a_batch_of_json(tmp_path, monkeypatch):
    """Where all lists are empty, JSON does not tell how deep they are."""
    monkeypatch.setattr(table_files, "BATCH_BYTES", 1)
    lines = [
        {"sample_id": "a", "class_ids": [[1]], "log_probs": [[-1.0]]},
        {"sample_id": "b", "class_ids": [], "log_probs": []},
        {"sample_id": "c", "class_ids": None, "log_probs": None},
    ]
    said = TableTargets(lines_of(tmp_path / "table.jsonl", *lines), num_classes=5)
    targets = imported(tmp_path / "made", said, manifest(TopK(k=1), (1, 5), coverage=True)).targets(list("abc"))
    assert targets.covered.tolist() == [[True], [False], [False]]


def test_keys_of_json_lines(tmp_path, monkeypatch):
    """A key that only later lines have is no key that may be left out; ids that look like dates stay what they are."""
    lines = [{"sample_id": f"2026-01-0{day}", "logits": [0.0, 1.0]} for day in (1, 2, 3)]
    table = lines_of(tmp_path / "dates.jsonl", *lines)
    assert TableTargets(table).index[0].tolist() == ["2026-01-01", "2026-01-02", "2026-01-03"]
    monkeypatch.setattr(table_files, "BATCH_BYTES", 1)
    table = lines_of(tmp_path / "late.jsonl", *lines, {**lines[0], "sample_id": "x", "covered": False})
    with pytest.raises(DataError, match="lines further down have a key 'covered' that the first ones do not have"):
        TableTargets(table).index  # noqa: B018
    table = lines_of(tmp_path / "half.jsonl", {**lines[0], "covered": True}, lines[1])
    with pytest.raises(DataError, match="covered holds null"):
        imported(tmp_path / "made", TableTargets(table), manifest(Dense(), (2,), coverage=True))


HEAD = {"sample_id": ["a", "b", "c"], "class_ids": [[0, 1]] * 3, "log_probs": [[-0.7, -1.0]] * 3}
TOKENS = {
    "sample_id": ["a", "b", "c"],
    "class_ids": [[[0], [1]], [[0], [1]], [[0]]],
    "log_probs": [[[-0.7], [-0.7]], [[-0.7], [-0.7]], [[-0.7]]],
}
LOGITS = {"sample_id": ["a", "b", "c"], "logits": [[0.0, 1.0, 2.0]] * 3}
WRONG = {
    "no ids": ({"logits": [[0.0]]}, "no column 'sample_id'; expected .*It has logits"),
    "nothing said": ({"sample_id": ["a"], "probs": [[0.1]]}, "no column 'class_ids'; expected sample_id, and logits"),
    "half": ({"sample_id": ["a"], "class_ids": [[0]]}, "no column 'log_probs'"),
    "no rows": ({"sample_id": pa.array([], pa.string()), "logits": pa.array([], pa.list_(pa.float32()))}, "has no row"),
    "numbers, no lists": ({**LOGITS, "logits": [1.0, 2.0, 3.0]}, "column logits: lists nested 0 deep; expected 1"),
    "too deep": ({**LOGITS, "logits": [[[[0.0]]]] * 3}, "nested 3 lists deep; expected 1 or 2"),
    "words": ({**LOGITS, "logits": [["x"]] * 3}, "column logits: it holds string; expected numbers"),
    "NaN": ({**LOGITS, "logits": [[0.0, 1.0, 2.0], [0.0, float("nan"), 1.0], [0.0] * 3]}, "1 rows .* such as b$"),
    "beyond float32": ({**LOGITS, "logits": [[0.0, 1.0, 2.0], [0.0, 1.0, 1e300], [0.0] * 3]}, "float32, such as b$"),
    "null in a list": ({**LOGITS, "logits": [[0.0, None, 2.0]] * 3}, "logits that are NaN.*such as a, b, c$"),
    "all masked": ({**LOGITS, "logits": [[-float("inf")] * 3] * 3}, r"all -inf"),
    "short row": ({**LOGITS, "logits": [[0.0, 1.0, 2.0], [0.0], [1.0] * 3]}, "have other than 3 logits, such as b$"),
    "long row": ({**LOGITS, "logits": [[0.0], [0.0, 1.0], [1.0]]}, "have other than 2 logits, such as a, c$"),
    "absent row": ({**LOGITS, "logits": pa.array([[0.0, 1.0], None, None])}, "have other than 2 logits, such as b, c$"),
    "id out of range": ({**HEAD, "class_ids": [[0, 1], [0, 5], [-1, 2]]}, r"outside 0\.\.4, such as b, c$"),
    "id twice": ({**HEAD, "class_ids": [[0, 1], [0, 1], [2, 2]]}, "name a class twice, such as c$"),
    "ids no integers": ({**HEAD, "class_ids": [[0.5, 1.0]] * 3}, "class_ids hold null or other things than integers"),
    "ids null": ({**HEAD, "class_ids": [[0, None]] * 3}, "class_ids hold null or other things"),
    "more ids": ({**HEAD, "class_ids": [[0, 1, 2], [0, 1], [0, 1]]}, "more class_ids than log_probs.*such as a$"),
    "log-prob NaN": ({**HEAD, "log_probs": [[-0.7, float("nan")]] * 3}, "log_probs that are NaN or above 0"),
    "log-prob above 0": ({**HEAD, "log_probs": [[-0.7, 0.2]] * 3}, "log_probs that are NaN or above 0"),
    "too much mass": ({**HEAD, "log_probs": [[-0.7, -0.5]] * 3}, "sum to more than 1 .are log_probs logits"),
    "nothing named": ({**HEAD, "log_probs": [[-0.7, -1.0], [-float("inf")] * 2, [-1.0, -1.0]]}, "no class.*such as b$"),
    "tail NaN": ({**HEAD, "tail_log_mass": [[float("nan")]] * 3}, "tail_log_mass that is NaN"),
    "below float32": ({**LOGITS, "logits": [[-1e300, 1.0, 0.0]] * 3}, "beyond float32, such as a, b, c$"),
    "tail of other mass": ({**HEAD, "tail_log_mass": [[-0.5]] * 3}, "do not sum to 1, such as a, b, c$"),
    "all classes of other mass": (
        {**HEAD, "class_ids": [[0, 1, 2, 3, 4]] * 3, "log_probs": [[-2.0] * 5] * 3},
        "have log_probs of all classes whose probabilities do not sum to 1, such as a, b, c$",
    ),
    "sample twice": ({**LOGITS, "sample_id": ["a", "b", "a"]}, "1 lines are about a sample and view .*such as 'a'$"),
    "ids null in column": ({**LOGITS, "sample_id": ["a", None, "b"]}, "sample_id holds string or null"),
    "ids are floats": ({**LOGITS, "sample_id": [1.0, 2.0, 3.0]}, "sample_id holds double or null"),
    "negative view": ({**LOGITS, "view": [0, -1, 0]}, "view holds other things"),
    "views with a gap": (
        {**LOGITS, "view": [0, 2**40, 0]},
        "has 2 views, of numbers up to 1099511627776; expected 0..1",
    ),
    "views apart": ({**LOGITS, "view": [0, 0, 1]}, "view 1 is about other samples than view 0"),
    "view of words": ({**LOGITS, "view": ["0", "0", "1"]}, "view holds other things"),
    "covered no booleans": ({**LOGITS, "covered": [1, 1, 0]}, "column covered holds int64; expected true and false"),
    "covered null": (
        {**LOGITS, "covered": [True, None, True]},
        "covered holds null; expected true or false in every row",
    ),
    "covered per token of rows": ({**LOGITS, "covered": [[True]] * 3}, "covered: lists nested 1 deep; expected 0"),
    "covered null in a list": ({**TOKENS, "covered": [[True, None]] * 3}, "bool and null; expected true and false"),
    "covered of fewer tokens": ({**TOKENS, "covered": [[True], [True] * 2, [True]]}, "than tokens, such as a$"),
    "covered without an entry": ({**TOKENS, "covered": [[True] * 2] * 3}, "name no class .*, such as c$"),
    "log_probs of more tokens": ({**TOKENS, "log_probs": [[[-0.7]] * 2] * 3}, "more class_ids than .*, such as c$"),
    "tokens of other depth": ({**TOKENS, "log_probs": [[-0.7]] * 3}, "log_probs and class_ids are lists of different"),
    "tails": ({**HEAD, "tails": [[-2.4]] * 3}, "has a column 'tails', which is not read; did you mean 'tail_log_mass'"),
    "views": ({**LOGITS, "views": [0, 1, 2]}, "a column 'views', .* did you mean 'view'"),
    "Coverage": ({**LOGITS, "Coverage": [True] * 3}, "a column 'Coverage', .* did you mean 'covered'"),
    "log_prob": (
        {"sample_id": ["a"], "class_ids": [[0]], "log_prob": [[-0.1]]},
        "no column 'log_probs'; .*; did you mean 'log_probs' by 'log_prob'",
    ),
    "Logits": ({"sample_id": ["a"], "Logits": [[0.0]]}, "no column 'class_ids'; .* did you mean 'logits' by 'Logits'"),
}


def test_probabilities_are_no_logits(tmp_path):
    said = torch.randn(20, 5, generator=torch.Generator().manual_seed(0))
    for name, logits in {"sure": said.softmax(dim=-1).round(), "logs": said.log_softmax(dim=-1)}.items():
        columns = {"sample_id": [f"{name}-{row}" for row in range(20)], "logits": logits.tolist()}
        (tmp_path / name).mkdir()
        assert imported_as(tmp_path / name, columns, Dense()).num_rows == 20
    columns["logits"] = said.softmax(dim=-1).tolist()
    with pytest.raises(DataError, match="a sum of 1: probabilities; expected logits"):
        imported_as(tmp_path, columns, Dense())


@pytest.mark.parametrize("case", WRONG)
def test_wrong_tables_are_refused(tmp_path, case):
    columns, message = WRONG[case]
    told = {"num_classes": 5} if "class_ids" in columns else {}
    with pytest.raises(DataError, match=message):
        imported_as(tmp_path, columns, TopK(k=2) if told else Dense(), **told)


def test_numbers_of_the_other_byte_order_are_read(tmp_path):
    logits = np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32)
    np.savez(tmp_path / "table.npz", sample_id=np.array(["a", "b", "c"], ">U1"), logits=logits.astype(">f4"))
    read = TableTargets(open_table(tmp_path / "table.npz"))
    store = imported(tmp_path / "made", read, manifest(Dense(dtype="float32"), (5,), coverage=read.has_coverage))
    assert np.array_equal(store.targets(["a", "b", "c"]).log_probs(), torch.from_numpy(logits).log_softmax(-1))


def test_tails_that_no_probabilities_have_are_refused(tmp_path):
    at_1 = float(np.log1p(-np.exp([-0.7, -1.0]).sum()))
    at_4, at_2 = (at_1 / each + (1 - 1 / each) * np.log(3) for each in (4, 2))  # of three classes that are alike
    told = {"num_classes": 5, "temperatures": [1.0, 4.0, 2.0]}
    encoding = TopK(k=2, temperatures=(2.0, 4.0))
    right = {**HEAD, "tail_log_mass": [[at_1, at_4, at_2]] * 3}
    assert imported_as(tmp_path, right, encoding, **told).num_rows == 3
    for name, tails in {"order": [at_2, at_4], "high": [at_4 + 0.1, at_2], "none": [at_4, -float("inf")]}.items():
        (tmp_path / name).mkdir()
        with pytest.raises(DataError, match=r"does not go with the one at 1; .*, such as a, b, c$"):
            imported_as(tmp_path / name, {**HEAD, "tail_log_mass": [[at_1, *tails]] * 3}, encoding, **told)
    with pytest.raises(ConfigError, match="expected each once"):
        imported_as(tmp_path, right, encoding, num_classes=5, temperatures=[1.0, 4.0, 4.0])


@pytest.mark.parametrize("temperature", [0.5, 4.0])
@pytest.mark.parametrize("log_probs", [[-0.7, -1.0], [np.log(0.6), np.log(0.4)]])
def test_tails_are_compared_with_what_is_left_at_temperature_1(tmp_path, temperature, log_probs):
    rest = max(1 - float(np.exp(log_probs).sum()), 0.0)
    one, alike = ((rest / n) ** (1 / temperature) * n for n in (1, 3))
    told = {"num_classes": 5, "temperatures": [temperature]}
    encoding = TopK(k=2, temperatures=(temperature,))

    def imported(name, tail):
        (tmp_path / name).mkdir()
        head = {**HEAD, "log_probs": [log_probs] * 3}
        return imported_as(tmp_path / name, {**head, "tail_log_mass": [[tail]] * 3}, encoding, **told)

    with np.errstate(divide="ignore"):
        for name, mass in {"one": one, "alike": alike}.items():
            assert imported(name, float(np.log(mass))).num_rows == 3
    wrong = [max(np.log(max(one, alike, 1e-2)), 0) + 2] + ([] if rest == 0 else [-30.0])
    for number, tail in enumerate(wrong):
        with pytest.raises(DataError, match=r"does not go with the one at 1; .*, such as a, b, c$"):
            imported(f"wrong-{number}", float(tail))


@pytest.mark.parametrize(
    "about", [{"encodings": 5}, {"temperatures": 1.0}, {"temperatures": ["x"]}, {"temperatures": [True]}]
)
def test_metadata_that_mean_nothing_are_told(tmp_path, about):
    path = tmp_path / "table.parquet"
    columns = pa.table({**HEAD, "tail_log_mass": [[-2.4]] * 3})
    pq.write_table(columns.replace_schema_metadata({"kdpipe": json.dumps(about)}), path)
    with pytest.raises(DataError, match="expected"):
        open_table(path)
    np.savez(tmp_path / "table.npz", sample_id=["a"], temperatures=np.array(about.get("temperatures", 1.0)))
    with pytest.raises(DataError, match="expected a list of numbers"):
        open_table(tmp_path / "table.npz")


def test_large_offsets_cost_nothing(tmp_path):
    """Logits in float64 are told apart where float32 would round them together."""
    columns = {"sample_id": ["a"], "logits": [[1e8, 1e8 + 1, 1e8 + 2]]}
    store = imported_as(tmp_path, columns, Dense())
    expected = torch.log_softmax(torch.tensor([0.0, 1.0, 2.0]), dim=-1)
    torch.testing.assert_close(store.targets(["a"]).log_probs()[0], expected, rtol=0, atol=1e-3)
    said = store.statistics(np.array([0]))
    assert said["top1"] == 2
    assert said["confidence"] == pytest.approx(float(expected.exp()[2]), abs=1e-6)


@FORMAT
@pytest.mark.parametrize("encoding", [Dense(dtype="float32"), Int8()])
def test_large_offsets_come_back(tmp_path, encoding, table_format):
    """A table has in float64 what float32 would round together, and in float32 what it does not."""
    near = store_of(tmp_path / "near", encoding)
    ids = near.sample_ids.tolist()
    logits = near.targets(ids).logits().double() + 1e9
    far = imported_as(tmp_path, {"sample_id": ids, "logits": logits.tolist()}, encoding, num_classes=NUM_CLASSES)
    for store, dtype in ((near, pa.float32()), (far, pa.float64())):
        path = tmp_path / f"{dtype}{FORMATS[table_format]}"
        export_table(store, path)
        (first, *_) = open_table(path).batches(["logits"])
        assert first["logits"].type.value_type == dtype
        back = imported(tmp_path / str(dtype), TableTargets(open_table(path)), store.manifest)
        same_where_covered(store, back, 0)


@pytest.mark.parametrize("encoding", [Dense(), Sampled(draws=3), TopK(k=2, temperatures=(4.0,)), TopK(k=9)])
def test_encodings_that_a_head_cannot_fill(tmp_path, encoding):
    with pytest.raises(ConfigError, match=r"cannot be stored as|no tail_log_mass at temperature 4|k is 9"):
        imported_as(tmp_path, HEAD, encoding, num_classes=5)


def test_class_counts_and_temperatures_must_be_told(tmp_path):
    with pytest.raises(ConfigError, match="give --num-classes"):
        imported_as(tmp_path, HEAD, TopK(k=2))
    with pytest.raises(ConfigError, match="is about 3 classes; 5 are expected"):
        imported_as(tmp_path, LOGITS, Dense(), num_classes=5)
    with pytest.raises(ConfigError, match="tail_log_mass has 2 values per row, but there are 1 temperatures"):
        imported_as(tmp_path, {**HEAD, "tail_log_mass": [[-2.0, 1.0]] * 3}, TopK(k=2), num_classes=5)


@FORMAT
def test_damaged_files(tmp_path, table_format):
    store = store_of(tmp_path / "store", Dense(dtype="float32"), num_rows=500)
    path = tmp_path / f"table{FORMATS[table_format]}"
    export_table(store, path)
    content = path.read_bytes()
    for size in (7, len(content) // 2, len(content) - 3):
        path.write_bytes(content[:size])
        with pytest.raises(DataError, match="is damaged or no table"):
            imported(tmp_path / "made", TableTargets(open_table(path)), store.manifest)


def test_no_table_at_all(tmp_path):
    with pytest.raises(DataError, match="there is no table at"):
        open_table(tmp_path / "nothing.parquet")
    (tmp_path / "text.parquet").write_text("sample_id,logits\n")
    with pytest.raises(DataError, match="expected Parquet, Arrow IPC or npz"):
        open_table(tmp_path / "text.parquet")
    (tmp_path / "text.jsonl").write_text("no json\n")
    with pytest.raises(DataError, match="damaged or no table"):
        open_table(tmp_path / "text.jsonl")
    with zipfile.ZipFile(tmp_path / "pickled.npz", "w") as archive, archive.open("sample_id.npy", "w") as member:
        np.lib.format.write_array(member, np.array(["a", None], object), allow_pickle=True)
    np.savez(tmp_path / "odd.npz", sample_id=np.array(["a", "b"]), logits=np.zeros((3, 2)))
    with pytest.raises(DataError, match="no column 'class_ids'"):
        TableTargets(open_table(tmp_path / "pickled.npz"))
    said = TableTargets(open_table(tmp_path / "odd.npz"))
    with pytest.raises(DataError, match="2 sample ids, and columns of another length"):
        imported(tmp_path / "made", said, manifest(Dense(), (2,)))


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        (["k2-00000000000000aa", "k0"], [2, 0]),
        (["plain", "k0-00000000000000aa"], [3, 0]),
        (
            ["k1"],
            "1 of 1 sample ids are keys of several of the 5 prepared rows, such as 'k1'; .* 'k1' is the key of "
            "k1-00000000000000aa, k1-00000000000000ab: a row that was edited is two, .* remove data/prepared",
        ),
        (["k0", "k9", "k2-00000000000000ab"], "2 of 3 sample ids are none of the 5 prepared rows, such as 'k9', 'k2-0"),
        (["k0", "k0-00000000000000aa"], "1 lines are about a sample and view that an earlier line is about"),
    ],
)
def test_lines_find_their_prepared_rows(tmp_path, ids, expected):
    prepared = np.array(
        ["k0-00000000000000aa", "k1-00000000000000aa", "k2-00000000000000aa", "plain", "k1-00000000000000ab"]
    )
    columns = {"sample_id": ids, "logits": [[0.0, 1.0]] * len(ids)}
    pq.write_table(pa.table(columns), tmp_path / "table.parquet")
    said = TableTargets(open_table(tmp_path / "table.parquet"))
    if isinstance(expected, list):
        assert prepared_rows(said, prepared).tolist() == expected
    else:
        with pytest.raises(DataError, match=expected):
            prepared_rows(said, prepared)


@pytest.mark.parametrize("shuffled", [False, True])
def test_memory_does_not_grow_with_the_store(tmp_path, monkeypatch, shuffled):
    """A store of 24 MB through batches of 1 MB and a desk of 4 MB."""
    monkeypatch.setattr(table_files, "BATCH_BYTES", 2**20)
    store = store_of(tmp_path / "store", Dense(dtype="float32"), (1000,), num_rows=6000, shard_rows=256)
    path = tmp_path / "table.parquet"
    export_table(store, path)
    if shuffled:
        table = pq.read_table(path, use_threads=False)
        pq.write_table(table.take(np.random.default_rng(0).permutation(6000)), path, row_group_size=256)
        del table
    pool = pa.default_memory_pool()
    before = pool.bytes_allocated()
    tracemalloc.start()
    try:
        for ending in FORMATS.values():
            export_table(store, tmp_path / f"again{ending}")
        own = own_rows(said := TableTargets(open_table(path)))
        made = TargetStore.create(tmp_path / "made", store.manifest, own.sample_ids, np.zeros((6000, 16), np.uint8))
        fill(made, said, own.rows, made.missing(), memory_bytes=4 * 2**20)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 18 * 2**20
    assert pool.bytes_allocated() - before < 8 * 2**20
    rows = np.arange(0, 6000, 997)
    ids = store.sample_ids[rows]
    assert torch.equal(made.targets(ids).values, store.targets(ids).values)


def exported(folder, encoding, **changes):
    store = store_of(folder / "store", encoding, **changes)
    for ending in FORMATS.values():
        export_table(store, folder / f"table{ending}")
    return store, store.targets(store.sample_ids)


def test_pandas_reads_them(tmp_path):
    import pandas

    _, targets = exported(tmp_path, Dense())
    frame = pandas.read_parquet(tmp_path / "table.parquet")
    np.testing.assert_array_equal(np.stack(frame["logits"]), targets.logits().numpy())
    assert frame["sample_id"].iloc[3] == "row-3"
    frame.rename(columns={"confidence": "sure"}).to_parquet(tmp_path / "theirs.parquet")
    again = imported(tmp_path / "made", TableTargets(open_table(tmp_path / "theirs.parquet")), manifest(Dense()))
    assert torch.equal(again.targets(["row-7"]).log_probs(), targets[7:8].log_probs())


def test_duckdb_reads_them(tmp_path):
    import duckdb

    _, targets = exported(tmp_path, TopK(k=3), coverage=True)
    path = tmp_path / "table.parquet"
    query = f"select sample_id, class_ids[1], list_sum([exp(x) for x in log_probs]) from '{path}' where covered"
    rows = duckdb.sql(query).fetchall()
    assert len(rows) == int(targets.covered.sum())
    np.testing.assert_array_equal([row[1] for row in rows], targets.ids[targets.covered, 0])
    np.testing.assert_allclose([row[2] for row in rows], targets.head[targets.covered].exp().sum(dim=-1), rtol=1e-5)
    key = duckdb.sql(f"select decode(value) from parquet_kv_metadata('{path}') where decode(key) = 'kdpipe'").fetchall()
    assert json.loads(key[0][0])["num_classes"] == NUM_CLASSES


@pytest.mark.parametrize("table_format", ["parquet", "arrow"])
def test_hf_datasets_reads_them(tmp_path, monkeypatch, table_format):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import datasets

    store, targets = exported(tmp_path, Dense())
    files = str(tmp_path / f"table{FORMATS[table_format]}")
    loaded = datasets.load_dataset(table_format, data_files=files, split="train", cache_dir=str(tmp_path / "cache"))
    np.testing.assert_array_equal(np.array(loaded["logits"]), targets.logits().numpy())
    loaded.save_to_disk(str(tmp_path / "saved"))
    (saved,) = (tmp_path / "saved").glob("*.arrow")
    again = imported(tmp_path / "made", TableTargets(open_table(saved)), store.manifest)
    assert torch.equal(again.targets(["row-7"]).log_probs(), targets[7:8].log_probs())


def test_tables_of_as_many_classes_as_ids_can_name(tmp_path):
    """Tokens that the table says nothing about take no number per class."""
    most = 2**31
    columns = {
        "sample_id": ["one", "two"],
        "class_ids": [[[5, most - 1], [0]], [[7]]],
        "log_probs": [[[-1.0, -0.5], [-0.1]], [[-2.0]]],
    }
    store = imported_as(tmp_path, columns, TopK(k=2), num_classes=most)
    targets = store.targets(["one", "two"])
    assert targets.covered.tolist() == [[True, True], [True, False]]
    assert targets.ids[0, 0].tolist() == [5, most - 1]
    assert targets.head[0, 0].tolist() == [-1.0, -0.5]
    assert targets.ids[1, 0, 0] == 7
