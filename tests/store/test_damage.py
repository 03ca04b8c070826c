"""Damage anywhere in a finished store: each reader refuses it or gives the original values, and `verify` names it."""

from __future__ import annotations

import json
import os
import shutil

import numpy as np
import pytest
import torch

from kdpipe.encodings import Dense, Features, FeaturesInt8, Int8, TopK
from kdpipe.errors import ConfigError, CorruptStoreError, IncompleteStoreError, StoreError, StoreNotFoundError
from kdpipe.store import TargetStore, TargetStream, open_store
from kdpipe.store.manifest import Manifest
from kdpipe.targets import OutputSpec
from kdpipe.views import ViewSpec
from store.make_golden_store import fill, tensors

NUM_ROWS, NUM_VIEWS, SHARD_ROWS = 14, 2, 8
NUM_CLASSES, WIDTH = 7, 5
ENCODINGS = {
    "logits": TopK(k=3, temperatures=(1, 4), compact=True),
    "dense": Dense(),
    "bytes": Int8(masked_classes=True),
    "hidden": Features(compact=True),
}
OUTPUTS = [
    *(OutputSpec(name=name, shape=(NUM_CLASSES,)) for name in ("logits", "dense", "bytes")),
    OutputSpec(name="hidden", shape=(WIDTH,), kind="features"),
]
FLIPS = {"manifest": 200, "metadata": 200, "log": 200, "data": 400}
FOOTER_BYTES = 8


def ids():
    return np.array([f"row-{index}" for index in range(NUM_ROWS)])


def said(name, view, version=0):
    """What the teacher says about every row."""
    output = next(each for each in OUTPUTS if each.name == name)
    seed = 1000 * version + 100 * view + OUTPUTS.index(output)
    return 3 * torch.randn(NUM_ROWS, *output.shape, generator=torch.Generator().manual_seed(seed))


def covered(view):
    """The teacher abstains from every fifth row."""
    return np.arange(NUM_ROWS) % 5 != 0


def make_store(path, version=0, weights="0", order=slice(None)):
    """A finished store with several encodings, two views and a teacher that abstains; rows in this order."""
    encodings = {name: encoding.to_json() for name, encoding in ENCODINGS.items()}
    manifest = Manifest(
        ingredients={"teacher": {"name": "Lehrkörper", "weights": weights * 64}, "encodings": encodings},
        outputs=OUTPUTS,
        encodings=encodings,
        temperatures=[1.0, 4.0],
        num_classes=NUM_CLASSES,
        class_names=[f"class {each}" for each in range(NUM_CLASSES)],
        shard_rows=SHARD_ROWS,
        coverage=True,
        sections={"targets": {"encoding": "several"}},
        teacher={"name": "big", "parameters": 12, "size_bytes": 48},
        recorded={"torch": "2"},
    )
    digests = np.random.default_rng(0).integers(0, 256, (NUM_ROWS, 16), dtype=np.uint8)[order]
    store = TargetStore.create(path, manifest, ids()[order], digests, num_views=NUM_VIEWS)
    fill(store, lambda name, view: said(name, view, version)[order], lambda view: covered(view)[order])


def by_random_access(path):
    """View -> every tensor `[NUM_ROWS, …]` and the statistics, asked for by sample id."""
    store = open_store(path)
    wanted = ids().tolist()
    found = {}
    for view in range(NUM_VIEWS):
        found[view] = tensors({name: store.targets(wanted, view, name) for name in ENCODINGS})
        statistics = store.statistics(store.rows_of(wanted), view)
        found[view] |= {name: torch.from_numpy(values) for name, values in statistics.items()}
    return found


def by_streaming(path):
    """View -> every tensor, in row order: the clean view as it is kept in memory, the other in pools."""
    store = open_store(path)
    streams = {
        0: TargetStream(store, batch_size=6),
        1: TargetStream(store, batch_size=6, views=ViewSpec(count=NUM_VIEWS - 1)),
    }
    return {view: _in_row_order(list(stream)) for view, stream in streams.items()}


def _in_row_order(batches):
    order = torch.from_numpy(np.argsort(np.concatenate([rows for rows, _ in batches])))
    parts = [tensors(targets) for _, targets in batches]
    return {name: torch.cat([part[name] for part in parts])[order] for name in parts[0]}


def same(found, expected):
    """Whether all that was read is as expected."""
    return found.keys() == expected.keys() and all(
        torch.equal(values, expected[view][name]) for view in found for name, values in found[view].items()
    )


READERS = {"random access": by_random_access, "streaming": by_streaming}


def outcome(read, path, expected):
    """`refused`, `original`, or `WRONG`; any other error than the store's own is let through."""
    try:
        return "original" if same(read(path), expected) else "WRONG"
    except StoreError:
        return "refused"


def verify_finds(path):
    try:
        return TargetStore.open(path).verify() != []
    except StoreError:
        return True


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """The undamaged store and what it says."""
    path = tmp_path_factory.mktemp("original") / "store"
    make_store(path)
    expected = by_random_access(path)
    assert same(by_streaming(path), expected)
    assert TargetStore.open(path).verify() == []
    return path, expected


@pytest.fixture
def store(original, tmp_path):
    """A copy to damage."""
    shutil.copytree(original[0], tmp_path / "store")
    return tmp_path / "store"


def files_by_kind(path):
    """Every file of a store, by what damage to it touches."""
    kinds = {kind: [] for kind in FLIPS}
    names = {"manifest.json": "manifest", "zarr.json": "metadata", "extent.json": "metadata"}
    names |= {"commits.parquet": "log", "commits.parquet.sha256": "log"}
    for file in sorted(each for each in path.rglob("*") if each.is_file()):
        kinds[names.get(file.name, "data")].append(file)
    return kinds


def one_of_each(path):
    """Every file beside the arrays; each array's metadata and its first shard."""
    return [*(each for each in path.iterdir() if each.is_file()), *path.glob("*/zarr.json"), *path.glob("*/c.0.0*")]


def flips(path, generator):
    """(file, byte, bit) of 1,000 single-bit flips; of the log every bit of the last 8 bytes, which no page covers."""
    for kind, files in files_by_kind(path).items():
        count = FLIPS[kind]
        if kind == "log":
            footer = path / "commits.parquet"
            size = footer.stat().st_size
            every = [(footer, size - 1 - byte, bit) for byte in range(FOOTER_BYTES) for bit in range(8)]
            yield from every
            count -= len(every)
        for number in range(count):
            file = files[number % len(files)]
            yield file, int(generator.integers(file.stat().st_size)), int(generator.integers(8))


def flip(file, byte, bit):
    with file.open("r+b") as content:
        content.seek(byte)
        value = content.read(1)[0]
        content.seek(byte)
        content.write(bytes([value ^ (1 << bit)]))


def test_1000_flipped_bits_are_found_by_every_reader_or_harmless(store, original):
    """Seeded flips over all files: manifest, array metadata, commit log with its footer, shards and row ids."""
    expected = original[1]
    seen = {name: {"refused": 0, "original": 0} for name in READERS}
    done = 0
    for file, byte, bit in flips(store, np.random.default_rng(20)):
        where = f"{file.relative_to(store)}: byte {byte}, bit {bit}"
        flip(file, byte, bit)
        for name, read in READERS.items():
            found = outcome(read, store, expected)
            assert found != "WRONG", f"{where}: {name}"
            seen[name][found] += 1
        assert verify_finds(store), f"{where}: verify"
        flip(file, byte, bit)
        done += 1
    assert done == 1000
    assert TargetStore.open(store).verify() == []
    # The test would be empty if damage were refused nowhere, or if nothing could be read at all.
    assert all(counts["refused"] > 500 and counts["original"] > 0 for counts in seen.values()), seen


@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_truncated_files_are_found(store, original, share):
    for file in one_of_each(store):
        content = file.read_bytes()
        file.write_bytes(content[: int(share * len(content))])
        for name, read in READERS.items():
            assert outcome(read, store, original[1]) != "WRONG", f"{file}: {name}"
        assert verify_finds(store), file
        file.write_bytes(content)


def test_holes_of_zeros_are_found(store, original):
    """What a file system leaves after a crash when a file's size was on disk and its content was not."""
    for file in one_of_each(store):
        content = file.read_bytes()
        for start, stop in ((0, len(content)), (len(content) // 3, 2 * len(content) // 3)):
            if any(content[start:stop]):
                file.write_bytes(content[:start] + bytes(stop - start) + content[stop:])
                for name, read in READERS.items():
                    assert outcome(read, store, original[1]) != "WRONG", f"{file}: {name}"
                assert verify_finds(store), file
        file.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("manifest.json", StoreNotFoundError),
        ("extent.json", CorruptStoreError),
        ("commits.parquet", IncompleteStoreError),
        ("commits.parquet.sha256", CorruptStoreError),
        ("dense/c.0.1.0", IncompleteStoreError),
        ("logits.id_steps/c.1.1.0", IncompleteStoreError),
        ("statistics/c.0.1.0", IncompleteStoreError),
        ("covered/c.1.0", IncompleteStoreError),
    ],
)
def test_deleted_files_are_errors_of_their_kind(store, name, error):
    (store / name).unlink()
    for read in READERS.values():
        with pytest.raises(error):
            read(store)
    assert verify_finds(store)


@pytest.mark.parametrize("name", ["rows.parquet", "zarr.json", "dense/zarr.json"])
def test_deleted_files_that_streaming_needs_not(store, original, name):
    """Row ids and Zarr's metadata are for other readers; `verify` misses each."""
    (store / name).unlink()
    assert same(by_streaming(store), original[1])
    assert any(each.what.startswith(f"{name} is absent") for each in TargetStore.open(store).verify())


def test_lost_row_ids_cost_no_targets(store, original):
    """`verify` lists what is wrong, so that a repair computes no shard again for it."""
    (store / "rows.parquet").unlink()
    damaged = TargetStore.open(store)
    assert damaged.repair() == 0
    digests = np.random.default_rng(0).integers(0, 256, (NUM_ROWS, 16), dtype=np.uint8)
    mended = TargetStore.create(store, damaged.manifest, ids(), digests, num_views=NUM_VIEWS)
    assert mended.missing() == []
    assert same(by_random_access(store), original[1])
    assert TargetStore.open(store).verify() == []


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("dense/c.0.0.0", "dense/c.0.1.0"),
        ("dense/c.0.0.0", "dense/c.1.0.0"),
        ("bytes.scale/c.0.0", "bytes.row_max/c.0.0"),
    ],
    ids=["of two shards", "of two views", "of two arrays"],
)
def test_swapped_shard_files_are_refused_and_named_by_verify(store, original, first, second):
    """Each is whole, and of the size that was committed."""
    os.rename(store / first, store / "aside")
    os.rename(store / second, store / first)
    os.rename(store / "aside", store / second)
    for name, read in READERS.items():
        assert outcome(read, store, original[1]) == "refused", name
    problems = [each.what for each in TargetStore.open(store).verify()]
    for name in (first, second):
        array, _, file = name.partition("/")
        assert f"{file} of {array} differs from its checksum" in problems


@pytest.mark.parametrize("weights", ["0", "1"], ids=["the same settings", "other weights"])
@pytest.mark.parametrize("backwards", [False, True])
def test_a_copy_over_an_older_version_that_breaks_off_is_no_mixture(store, original, tmp_path, weights, backwards):
    """After each file that came: what is read is all of the older version, or all of the newer one, or refused."""
    newer = tmp_path / "newer"
    make_store(newer, version=1, weights=weights)
    expected = by_random_access(newer)
    assert not same(expected, original[1])
    names = sorted(str(file.relative_to(newer)) for file in newer.rglob("*") if file.is_file())
    refused = dict.fromkeys(READERS, 0)
    for name in reversed(names) if backwards else names:
        shutil.copyfile(newer / name, store / name)
        for reader, read in READERS.items():
            found = {outcome(read, store, original[1]), outcome(read, store, expected)}
            assert found != {"WRONG"}, f"{reader}, after {name}"
            refused[reader] += found == {"refused"}
    assert same(by_random_access(store), expected)
    assert all(count > 0.7 * len(names) for count in refused.values()), refused


def test_no_part_of_a_store_of_other_rows_is_read(store, original, tmp_path):
    """The same answers to the same ids, prepared in another order: all mixtures of rows, extent, log and shards."""
    order = np.random.default_rng(3).permutation(NUM_ROWS)
    make_store(tmp_path / "other", order=order)
    assert same(by_random_access(tmp_path / "other"), original[1])
    names = {str(file.relative_to(store)) for file in store.rglob("*") if file.is_file()}
    parts = [["rows.parquet"], ["extent.json"], ["commits.parquet", "commits.parquet.sha256"]]
    parts.append(sorted(names - {name for part in parts for name in part}))
    for taken in range(2 ** len(parts)):
        shutil.copytree(store, tmp_path / f"mixed-{taken}")
        for name in (name for number, part in enumerate(parts) if taken >> number & 1 for name in part):
            shutil.copyfile(tmp_path / "other" / name, tmp_path / f"mixed-{taken}" / name)
        found = outcome(by_random_access, tmp_path / f"mixed-{taken}", original[1])
        assert found == ("original" if taken in (0, 2 ** len(parts) - 1) else "refused"), taken
        assert verify_finds(tmp_path / f"mixed-{taken}") == (found == "refused"), taken


def test_a_log_of_other_rows_is_none_of_work_in_progress(store, original):
    """Rows that come in another order go on with the store that they find."""
    assert TargetStore.open(store).records.rows_sha256 == TargetStore.open(store).extent.rows_sha256
    for order in (np.random.default_rng(3).permutation(NUM_ROWS), slice(None)):
        make_store(store, order=order)
        finished = TargetStore.open(store)
        assert finished.records.rows_sha256 == finished.extent.rows_sha256
        assert finished.verify() == []
        assert same(by_random_access(store), original[1])


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["block", "block.scale"], r"arrays of one name, 'block\.scale'"),
        (["entropy"], "'entropy' cannot be stored under this name"),
        (["commits"], "'commits' cannot be stored"),
        (["a/b"], "'a/b' cannot be stored"),
        ([".."], "cannot be stored"),
        (["rows.parquet"], "cannot be stored"),
    ],
)
def test_outputs_that_would_take_the_place_of_others_are_refused(tmp_path, names, message):
    outputs = [OutputSpec(name="logits", shape=(3,))]
    outputs += [OutputSpec(name=name, shape=(WIDTH,), kind="features") for name in names]
    with pytest.raises(ConfigError, match=message):
        TargetStore.create(tmp_path / "store", manifest_of(outputs), ids(), np.zeros((NUM_ROWS, 16), np.uint8))
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("shape", [(), (0,), (3, 0)])
def test_outputs_without_numbers_along_an_axis_are_refused(tmp_path, shape):
    outputs = [OutputSpec(name="logits", shape=(3,)), OutputSpec(name="value", shape=shape, kind="features")]
    with pytest.raises(ConfigError, match="output 'value' has shape"):
        TargetStore.create(tmp_path / "store", manifest_of(outputs), ids(), np.zeros((NUM_ROWS, 16), np.uint8))


def manifest_of(outputs):
    """Of a store of logits and int8 features."""
    encodings = {each.name: (Dense() if each.kind == "logits" else FeaturesInt8()).to_json() for each in outputs}
    return Manifest(
        ingredients={},
        outputs=outputs,
        encodings=encodings,
        temperatures=[1.0],
        num_classes=3,
        class_names=None,
        shard_rows=SHARD_ROWS,
    )


@pytest.mark.parametrize(
    ("field", "value"), [("num_rows", 8), ("num_rows", 16), ("num_rows", 0), ("num_views", 1), ("num_views", 3)]
)
def test_an_extent_that_was_changed_is_refused(store, field, value):
    """Fewer rows would otherwise be streamed without a word."""
    path = store / "extent.json"
    path.write_text(
        path.read_text().replace(f'"{field}":{len(ids()) if field == "num_rows" else 2}', f'"{field}":{value}')
    )
    assert json.loads(path.read_text())[field] == value
    with pytest.raises(CorruptStoreError, match=r"extent\.json"):
        open_store(store)
