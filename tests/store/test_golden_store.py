"""A small store of format version 2 that every kdpipe must read, and that docs/store_format.md is enough to read.

The document's own snippets decode it here: NumPy, zarr-python and pyarrow only.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from kdpipe.encodings import ENCODINGS, FeaturesInt8
from kdpipe.store import TargetStream, open_store
from kdpipe.targets import OutputSpec
from projects import REPOSITORY, tree
from store.make_golden_store import GOLDEN, NUM_ROWS, NUM_VIEWS, SAID, covered, decoded, in_views, make, sample_ids

DOCUMENT = REPOSITORY / "docs" / "store_format.md"
# The golden store is never made again: a change of the format is a new format version, with a golden store of its own.
GOLDEN_SHA256 = "73f4d1454f5d9b5039d7e8accc44a80d0cd63c1435d7a01189d283da1cb6dbec"


@pytest.fixture(scope="module")
def expected():
    """`<output>.<field>` -> what this store says in view 0."""
    with np.load(GOLDEN / "expected.npz", allow_pickle=False) as file:
        return dict(file)


@pytest.fixture(scope="module")
def documented():
    """What the document's snippets find in the golden store."""
    return read_as_documented(GOLDEN / "store")


def read_as_documented(store):
    """The names that the document's snippets define, run one after the other on a store."""
    blocks = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL)
    code = "\n".join(blocks)
    assert "kdpipe" not in code
    assert code.count('Path("data/targets/big")') == 1
    names = {"__name__": "store_format"}
    exec(compile(code.replace('Path("data/targets/big")', f"Path({str(store)!r})"), DOCUMENT, "exec"), names)
    return SimpleNamespace(**names)


def close(found, wanted):
    """Equal where the format says so exactly; logarithms may differ in the last bits between machines."""
    found, wanted = np.asarray(found), np.asarray(wanted)
    assert found.shape == wanted.shape
    np.testing.assert_allclose(found, wanted, rtol=3e-6, atol=1e-6)


def test_the_golden_store_is_what_it_was():
    digest = hashlib.sha256()
    for name, content in tree(GOLDEN).items():
        digest.update(f"{name}\0{len(content)}\0".encode() + content)
    assert digest.hexdigest() == GOLDEN_SHA256


def test_it_holds_every_encoding_of_the_document():
    assert {encoding.name for encoding, _ in SAID.values()} == set(ENCODINGS)
    named = re.findall(r"^\| `(\w+)` \| (?:\(none\)|`\.ids`)", DOCUMENT.read_text(encoding="utf-8"), re.MULTILINE)
    assert set(named) == set(ENCODINGS)


def test_kdpipe_reads_it(expected):
    store = open_store(GOLDEN / "store")
    assert store.sample_ids.tolist() == sample_ids().tolist()
    assert store.missing() == []
    assert store.verify() == []
    found = decoded(store, view=0)
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert found[name].dtype == values.dtype, name
        close(found[name], values)


def test_kdpipe_streams_it(expected):
    store = open_store(GOLDEN / "store")
    seen = []
    for rows, targets in TargetStream(store, batch_size=5, seed=1):
        seen += rows.tolist()
        close(targets["logits"].values, expected["logits.values"][rows])
        close(targets["topk_compact"].head, expected["topk_compact.head"][rows])
        close(targets["sampled"].weights, expected["sampled.weights"][rows])
        assert targets["features"].covered.tolist() == expected["covered"][rows].tolist()
    assert sorted(seen) == list(range(NUM_ROWS))


@pytest.mark.parametrize("view", range(NUM_VIEWS))
def test_the_document_is_enough_to_decode_it(documented, expected, view):
    """Its formulas on what zarr-python reads, against what kdpipe reads and against what was expected for ever."""
    read = expected if view == 0 else decoded(open_store(GOLDEN / "store"), view)
    rows = np.flatnonzero(in_views()) if view else np.arange(NUM_ROWS)
    for name, (encoding, _) in SAID.items():
        if encoding.name in ("dense", "int8"):
            decode = documented.dense if encoding.name == "dense" else documented.int8
            close(decode(name, view)[rows], read[f"{name}.values"])
            close(documented.stored[f"{name}.row_max"][view][rows], read[f"{name}.row_max"])
        elif encoding.name == "topk":
            head, tails = documented.topk(name, view)
            close(documented.ids(name, view)[rows], read[f"{name}.ids"])
            close(head[rows], read[f"{name}.head"])
            close(tails[rows], read[f"{name}.tails"])
        elif encoding.name == "sampled":
            classes, weights = documented.sampled(name, view)
            close(classes[rows], read[f"{name}.ids"])
            close(weights[rows], read[f"{name}.weights"])
            close(documented.stored[f"{name}.entropy"][view][rows], read[f"{name}.entropy"])
        else:
            close(documented.features(name, view)[rows], read[f"{name}.values"])
    close(documented.stored["covered"][view][rows], read["covered"])
    close(documented.stored["covered"][view], covered(view))
    for column, name in enumerate(documented.manifest["statistics"]):
        close(documented.stored["statistics"][view][rows][..., column], read[name])


@pytest.mark.parametrize("shape", [(3, 4, 5), (NUM_ROWS, 3), (NUM_ROWS, 4, 5)])
@pytest.mark.parametrize("whole_row", [False, True])
def test_the_document_is_enough_to_decode_maps(tmp_path, monkeypatch, shape, whole_row):
    """As a store of this version may hold them; `whole_row` is younger than the golden one."""
    maps = OutputSpec(name="maps", shape=shape, kind="features")
    monkeypatch.setitem(SAID, "maps", (FeaturesInt8(whole_row=whole_row), maps))
    read = decoded(make(tmp_path / "store"), view=0)
    close(read_as_documented(tmp_path / "store").features("maps"), read["maps.values"])


def test_the_documents_temperatures_are_kdpipes(documented):
    store = open_store(GOLDEN / "store")
    targets = store.read(np.arange(NUM_ROWS))
    close(documented.probabilities, targets["logits"].log_probs(4).exp())
    close(documented.logits, targets["logits"].logits())
    for name in ("topk", "topk_compact"):
        for index, temperature in enumerate(store.encodings[name].temperatures):
            close(documented.softened_buckets(name, index), targets[name].log_probs(temperature))


def test_the_documents_digests_are_kdpipes(documented):
    """Its loop over the records asserted the rest."""
    store = open_store(GOLDEN / "store")
    assert documented.manifest["format_version"] == 2
    assert documented.identity == store.manifest.identity()
    assert documented.fingerprint == store.fingerprint == documented.manifest["fingerprint"]
    whole = {key: value for key, value in documented.manifest.items() if key != "digest"}
    assert documented.manifest["digest"] == documented.digest(whole)
    computed = []
    for record in documented.pq.read_table(GOLDEN / "store" / "commits.parquet").to_pylist():
        if record["view"] == 1:
            num_rows = record["stop"] - record["start"]
            bits = np.unpackbits(np.frombuffer(bytes.fromhex(record["computed"]), np.uint8))[:num_rows]
            computed += bits.tolist() if record["computed"] else [1] * num_rows
    assert computed == in_views().astype(int).tolist()


def test_the_document_describes_what_is_written_today(tmp_path):
    """The golden store's records are older than their checksums."""
    store = make(tmp_path / "store")
    assert all(file.checksums for record in store.records.values() for file in record.files.values())
    assert read_as_documented(store.path).identity == store.manifest.identity()


def test_the_documents_shard_reader_reads_what_zarr_reads(documented):
    arrays = documented.manifest["arrays"]
    assert {True, False} == {array["compressed"] for array in arrays}
    for array in arrays:
        for view in range(NUM_VIEWS):
            wanted = documented.stored[array["name"]][view]
            for shard in range(-(-NUM_ROWS // array["shard_rows"])):
                part = wanted[shard * array["shard_rows"] :][: array["shard_rows"]]
                np.testing.assert_array_equal(documented.read_shard(array, view, shard)[: len(part)], part)


def test_making_it_again_gives_the_same_bytes(tmp_path):
    """In one environment; another version of Blosc or Parquet may write other bytes of the same values."""
    make(tmp_path / "first")
    make(tmp_path / "second")
    first = tree(tmp_path / "first")
    assert first == tree(tmp_path / "second")
    golden = tree(GOLDEN / "store")
    assert first.keys() == golden.keys()
    assert all(first[name] == golden[name] for name in golden if Path(name).name in ("manifest.json", "zarr.json"))
