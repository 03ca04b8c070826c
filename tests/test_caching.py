from __future__ import annotations

import hashlib
import sys
import threading
import time
from dataclasses import replace
from unittest.mock import patch

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kdpipe.caching import WHOLE, Captured, Share, are_logits, capture, loading, writing
from kdpipe.caching.loading import LOAD_AHEAD
from kdpipe.distributed import Shard
from kdpipe.encodings import Dense, Features, FeaturesInt8, TopK
from kdpipe.errors import ConfigError, DataError, TeacherError
from kdpipe.inputs import class_logits
from kdpipe.losses import RKD, CosineFeature, ForwardKL, HintMSE, SimilarityPreserving
from kdpipe.losses.base import values_of
from kdpipe.store import TargetStore
from kdpipe.store.statistics import teacher_statistics
from kdpipe.store.tables import TableTargets, export_table, fill, open_table, own_rows
from kdpipe.targets import OutputSpec
from kdpipe.teachers.asking import OfCountedTokens
from kdpipe.teachers.base import Teacher
from kdpipe.views import row_keys
from projects import tree
from real_processes import folder_in_memory
from toy_capture import LOGITS, NUM_CLASSES, MemoryRows, ToyTeacher, manifest_for, store_for

NUM_ROWS, SHARD_ROWS, BATCH_SIZE = 150, 16, 5


def captured(folder, teacher=None, num_rows=NUM_ROWS, shard_rows=SHARD_ROWS, batch_size=BATCH_SIZE, **options):
    """A finished store."""
    teacher, rows = teacher or ToyTeacher(), MemoryRows(num_rows)
    store = store_for(folder, teacher, rows, shard_rows)
    capture(store, teacher, rows, batch_size, **options)
    store.finish()
    return TargetStore.open(folder)


def one_after_the_other(folder, num_rows, shard_rows, batch_size, num_views=1):
    """The same store without a thread: the reference."""
    teacher, rows = ToyTeacher(), MemoryRows(num_rows)
    store = store_for(folder, teacher, rows, shard_rows, num_views)
    for view, shard in store.missing():
        parts = []
        for start in range(shard.start, shard.stop, batch_size):
            logits = teacher.predict(rows.read(np.arange(start, min(start + batch_size, shard.stop))))["logits"]
            encoded = {f"logits{suffix}": values for suffix, values in Dense().encode(logits).items()}
            parts.append({**encoded, "statistics": teacher_statistics(logits)})
        store.write(
            view, shard, {name: np.concatenate([each[name] for each in parts]) for name in parts[0]}, batch_size
        )
    store.finish()


def committed(folder):
    """Rows of view 0 that have a record."""
    store = TargetStore.open(folder)
    missing = {index for _, shard in store.missing() for index in range(shard.start, shard.stop)}
    return set(range(store.num_rows)) - missing


def no_thread_is_left():
    return not [each.name for each in threading.enumerate() if each.name.startswith(("loader", "writer"))]


# What is stored


@settings(max_examples=25)
@given(
    num_rows=st.integers(1, 60),
    shard_rows=st.integers(1, 40),
    batch_size=st.integers(1, 50),
    views=st.integers(1, 2),
    at_once=st.sampled_from([1, 200, 2**20]),
)
def test_the_bytes_are_those_of_one_thing_after_the_other(num_rows, shard_rows, batch_size, views, at_once):
    load, encode = patch.object(loading, "LOAD_BYTES", at_once), patch.object(writing, "ENCODE_BYTES", at_once)
    with folder_in_memory() as folder, load, encode:
        rows, teacher = MemoryRows(num_rows), ToyTeacher()
        one_after_the_other(folder / "expected", num_rows, shard_rows, batch_size, views)
        store = store_for(folder / "store", teacher, rows, shard_rows, views)
        done = capture(store, teacher, rows, batch_size)
        store.finish()
        assert tree(folder / "store") == tree(folder / "expected")
    assert teacher.shown == list(range(num_rows)) * views
    assert (done.num_rows, done.num_shards) == (num_rows * views, -(-num_rows // shard_rows) * views)
    assert 0 < done.teacher_seconds <= done.seconds


def test_a_batch_never_crosses_a_shard(tmp_path):
    sizes = []
    captured(tmp_path, ToyTeacher(lambda said, rows: sizes.append(len(rows)) or said), num_rows=40)
    assert sizes == [5, 5, 5, 1, 5, 5, 5, 1, 5, 3]


def test_a_complete_store_shows_the_teacher_nothing(tmp_path):
    captured(tmp_path)
    before = tree(tmp_path)
    teacher = ToyTeacher()
    captured(tmp_path, teacher)
    assert teacher.shown == []
    assert tree(tmp_path) == before


def test_only_what_is_missing_is_shown(tmp_path):
    expected = tree(captured(tmp_path / "expected").path)
    captured(tmp_path / "store", num_rows=100)
    teacher = ToyTeacher()
    captured(tmp_path / "store", teacher)
    assert teacher.shown == list(range(96, NUM_ROWS))
    assert tree(tmp_path / "store") == expected


def test_progress_counts_rows_that_the_teacher_saw(tmp_path):
    seen = []
    captured(tmp_path, num_rows=40, on_progress=seen.append)
    assert [each.rows_done for each in seen] == [5, 10, 15, 16, 21, 26, 31, 32, 37, 40]
    assert {each.rows_total for each in seen} == {40}
    assert all(each.rows_per_s > 0 for each in seen)


@pytest.mark.parametrize("at_once", [1, 2**20])
@pytest.mark.parametrize(
    "buffer",
    [
        pytest.param(lambda held, size: held.setdefault(size, torch.empty(size, NUM_CLASSES)), id="one per length"),
        pytest.param(lambda held, size: held.setdefault(0, torch.empty(BATCH_SIZE, NUM_CLASSES))[:size], id="one"),
    ],
)
def test_answers_that_the_next_ones_overwrite_are_copied(tmp_path, monkeypatch, at_once, buffer):
    """As `out=` does. They wait for more to be encoded, or are encoded while the teacher gives the next ones."""
    monkeypatch.setattr(writing, "ENCODE_BYTES", at_once)
    encode, held = Dense.encode, {}

    def encode_late(self, values, keys=None):
        time.sleep(0.002)
        return encode(self, values, keys)

    monkeypatch.setattr(Dense, "encode", encode_late)
    captured(tmp_path / "expected")
    captured(tmp_path / "store", ToyTeacher(answers(logits=lambda each, _: buffer(held, len(each)).copy_(each))))
    assert tree(tmp_path / "store") == tree(tmp_path / "expected")


# Who does what


def test_the_teacher_runs_in_the_callers_thread_and_the_rest_beside_it(tmp_path, monkeypatch):
    threads = {}

    def noting(key, function):
        def noted(*arguments):
            threads.setdefault(key, set()).add((threading.current_thread().name, torch.get_num_threads()))
            return function(*arguments)

        return noted

    teacher, rows = ToyTeacher(), MemoryRows(40)
    store = store_for(tmp_path, teacher, rows)
    monkeypatch.setattr(teacher, "predict", noting("predict", teacher.predict))
    monkeypatch.setattr(loading, "content_digests", noting("check", loading.content_digests))
    monkeypatch.setattr(writing, "teacher_statistics", noting("encode", writing.teacher_statistics))
    monkeypatch.setattr(store, "write", noting("write", store.write))
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        capture(store, teacher, rows, BATCH_SIZE)
    finally:
        torch.set_num_threads(before)
    assert threads["predict"] == {(threading.current_thread().name, 3)}
    assert threads["encode"] == threads["write"] == {("writer_0", 3)}
    assert {name for name, _ in threads["check"]} == {"loader_0"}
    assert no_thread_is_left()


@pytest.mark.parametrize("per_block", [1, 3])
def test_rows_are_read_a_few_batches_ahead(tmp_path, monkeypatch, per_block):
    rows, num_read, ahead = MemoryRows(NUM_ROWS), [0], []
    row_bytes = sum(each.nbytes for each in (rows.columns["features"], rows.columns["words"].values)) / NUM_ROWS
    monkeypatch.setattr(loading, "LOAD_BYTES", int((per_block + 0.5) * BATCH_SIZE * row_bytes))
    read = rows.read

    def note_read(wanted):
        num_read[0] = int(wanted[-1])
        return read(wanted)

    def note(said, numbers):
        time.sleep(0.002)
        ahead.append((num_read[0] - int(numbers[-1])) / BATCH_SIZE)
        return said

    rows.read, teacher = note_read, ToyTeacher(note)
    capture(store_for(tmp_path, teacher, rows, shard_rows=NUM_ROWS), teacher, rows, BATCH_SIZE)
    assert max(ahead) == per_block - 1 + per_block * LOAD_AHEAD


def test_at_most_two_shards_are_in_work(tmp_path, monkeypatch):
    """While a shard is committed the next one is computed, and no third is begun."""
    rows, writes, behind = MemoryRows(NUM_ROWS), [], []

    def note(said, numbers):
        behind.append(int(numbers[0]) // SHARD_ROWS - len(writes))
        return said

    teacher = ToyTeacher(note)
    store = store_for(tmp_path, teacher, rows)
    write = store.write

    def write_slowly(*arguments):
        time.sleep(0.02)
        write(*arguments)
        writes.append(arguments)

    monkeypatch.setattr(store, "write", write_slowly)
    capture(store, teacher, rows, BATCH_SIZE)
    assert max(behind) == 1


def test_what_waits_to_be_encoded_is_bounded(tmp_path, monkeypatch):
    batch_bytes = BATCH_SIZE * NUM_CLASSES * 4
    monkeypatch.setattr(writing, "ENCODE_BYTES", 1)
    monkeypatch.setattr(writing, "MAX_WAITING_BYTES", 2 * batch_bytes)
    rows, said_to, encoded, waiting = MemoryRows(64), [], [], []

    def note(said, numbers):
        said_to.append(numbers)
        waiting.append(len(said_to) - len(encoded))
        return said

    def encode_slowly(logits):
        time.sleep(0.005)
        encoded.append(logits)
        return teacher_statistics(logits)

    monkeypatch.setattr(writing, "teacher_statistics", encode_slowly)
    teacher = ToyTeacher(note)
    capture(store_for(tmp_path, teacher, rows, shard_rows=64), teacher, rows, BATCH_SIZE)
    assert max(waiting) == 3  # two wait, one is being said


def test_a_batch_larger_than_the_bound_is_taken(tmp_path, monkeypatch):
    monkeypatch.setattr(writing, "ENCODE_BYTES", 1)
    monkeypatch.setattr(writing, "MAX_WAITING_BYTES", 1)
    assert captured(tmp_path / "store").path
    monkeypatch.undo()
    assert tree(tmp_path / "store") == tree(captured(tmp_path / "expected").path)


def test_threads_give_way_to_the_teacher_for_as_long_as_it_works(tmp_path):
    usual, found = sys.getswitchinterval(), []
    captured(tmp_path, ToyTeacher(lambda said, _: (found.append(sys.getswitchinterval()), said)[1]))
    assert max(found) < usual / 10
    assert sys.getswitchinterval() == usual


def test_a_teacher_is_asked_without_gradients(tmp_path):
    weights = torch.ones(5, requires_grad=True)
    asked = captured(tmp_path / "asked", ToyTeacher(lambda said, _: {"logits": said["logits"] * weights}))
    assert tree(asked.path) == tree(captured(tmp_path / "expected").path)


# What goes wrong


class Wrong(Exception):
    """Something that is not kdpipe's."""


def fails_at(row, error):
    def change(said, rows):
        if row in rows:
            raise error
        return said

    return ToyTeacher(change)


def check_what_is_left(folder, shards):
    """Threads are gone, the first shards are there, and going on gives the bytes of an uninterrupted capture."""
    assert no_thread_is_left()
    there = committed(folder / "store")
    assert there == set(range(shards * SHARD_ROWS))
    teacher = ToyTeacher()
    captured(folder / "store", teacher)
    assert teacher.shown == sorted(set(range(NUM_ROWS)) - there)
    assert tree(folder / "store") == tree(captured(folder / "expected").path)


@pytest.mark.parametrize("error", [Wrong, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("row", [0, 50, 63, 64, 149])
def test_a_failing_teacher_leaves_the_shards_before_it(tmp_path, error, row):
    with pytest.raises(error):
        captured(tmp_path / "store", fails_at(row, error))
    check_what_is_left(tmp_path, row // SHARD_ROWS)


def test_ctrl_c_between_two_batches_leaves_the_shards_before(tmp_path):
    def interrupt(now):
        if now.rows_done > 80:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        captured(tmp_path / "store", on_progress=interrupt)
    check_what_is_left(tmp_path, 5)


@pytest.mark.parametrize("row", [0, 47, 48, 149])
def test_rows_that_differ_from_their_digest_are_never_shown(tmp_path, row):
    rows, teacher = MemoryRows(NUM_ROWS), ToyTeacher()
    rows.columns["features"][row, 1] += 1
    with pytest.raises(DataError, match=rf"prepared content of {row:06d} differs from its digest \(1 such"):
        capture(store_for(tmp_path / "store", teacher, rows), teacher, rows, BATCH_SIZE)
    assert row not in teacher.shown
    check_what_is_left(tmp_path, row // SHARD_ROWS)


def test_float64_beyond_float32_is_refused(tmp_path):
    """Losses compute in float32, and a row's maximum is stored so."""
    teacher = ToyTeacher(lambda said, _: {"logits": said["logits"].double() + 1e39})
    with pytest.raises(TeacherError, match="logits are NaN or infinite in float32 for "):
        captured(tmp_path / "store", teacher)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("row", [0, 47, 48, 149])
def test_nan_and_infinity_are_refused_and_their_shard_is_never_committed(tmp_path, bad, row):
    """Batches after it may be on their way to the writer already."""

    def spoil(said, rows):
        logits = said["logits"]
        logits[rows == row, 2] = bad
        return {"logits": logits}

    with pytest.raises(TeacherError, match=rf"logits are NaN or infinite for 1 of \d+ samples .* such as {row:06d}\."):
        captured(tmp_path / "store", ToyTeacher(spoil))
    check_what_is_left(tmp_path, row // SHARD_ROWS)


@pytest.mark.parametrize("shard", [0, 3, 9])
def test_a_full_disk_leaves_the_shards_before(tmp_path, monkeypatch, shard):
    rows, teacher = MemoryRows(NUM_ROWS), ToyTeacher()
    store = store_for(tmp_path / "store", teacher, rows)
    write = store.write

    def fill(view, written, arrays, batch_size):
        if written.index >= shard:
            raise OSError(28, "No space left on device")
        write(view, written, arrays, batch_size)

    monkeypatch.setattr(store, "write", fill)
    with pytest.raises(OSError, match="No space left"):
        capture(store, teacher, rows, BATCH_SIZE)
    assert max(teacher.shown) < (shard + 3) * SHARD_ROWS
    check_what_is_left(tmp_path, shard)


def answers(**said):
    """A teacher that says something else; values are made from the batch's row numbers."""
    return lambda logits, rows: {name: value(logits["logits"], rows) for name, value in said.items()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (answers(scores=lambda logits, _: logits), "gave no output 'logits'; it gave scores"),
        (answers(logits=lambda logits, _: logits[:, :1]), r"logits have shape \[5, 1\]; expected \[5, 5\]"),
        (answers(logits=lambda logits, _: logits[:1]), r"logits have shape \[1, 5\]; expected \[5, 5\]"),
        (answers(logits=lambda logits, _: logits.fill_(-torch.inf)), r"NaN or infinite for 16 of 16"),
        (
            answers(logits=lambda logits, _: logits.softmax(-1)),
            r"16 samples are numbers from 0 to 1 .* probabilities",
        ),
        (answers(logits=lambda logits, _: logits.softmax(-1).half().float()), "probabilities"),
    ],
)
def test_what_is_not_what_the_teacher_promised_is_refused(tmp_path, change, message):
    with pytest.raises(TeacherError, match=message):
        captured(tmp_path, ToyTeacher(change))
    assert committed(tmp_path) == set()


def of_two_classes(change):
    """A teacher whose single logits are `change` of a number per row from -5 to 5 (`class_logits`)."""
    two = OutputSpec(name="logits", shape=(2,))
    return ToyTeacher(
        answers(logits=lambda logits, _: class_logits(change(5 * logits[:, :1].sin()), 2)), outputs=(two,)
    )


@pytest.mark.parametrize("change", [torch.sigmoid, lambda logits: logits.sigmoid().half().float()])
def test_a_sigmoids_output_is_no_single_logit(tmp_path, change):
    with pytest.raises(TeacherError, match=r"single logits of 300 samples are numbers from 0 to 1: .* a sigmoid's"):
        captured(tmp_path, of_two_classes(change), num_rows=300, shard_rows=300)
    assert committed(tmp_path) == set()


def test_few_rows_do_not_tell():
    sigmoids = class_logits(torch.linspace(-5, 5, 300).sigmoid().unsqueeze(-1), 2)
    assert not are_logits(sigmoids[::2]), "look again"
    assert not are_logits(sigmoids.unsqueeze(0)), "one row"
    assert are_logits(torch.randn(2, 3))
    covered = torch.arange(300) % 2 == 0
    assert not are_logits(sigmoids, covered)
    with pytest.raises(TeacherError, match="single logits of 300 samples"):
        are_logits(sigmoids, torch.ones(300, dtype=torch.bool))


@pytest.mark.parametrize(
    "change",
    [
        lambda logits: logits,
        lambda logits: (logits > 0).float(),
        lambda logits: 0.2 + 0.6 * logits.sigmoid(),
        lambda logits: 1.5 * logits.sigmoid(),
    ],
)
def test_single_logits_may_be_small_or_votes(tmp_path, change):
    captured(tmp_path, of_two_classes(change), num_rows=300, shard_rows=300)
    assert committed(tmp_path)


def test_a_masked_class_is_no_error(tmp_path):
    def mask(said, rows):
        said["logits"][rows % 2 == 0, 3] = -torch.inf
        return said

    logits = captured(tmp_path, ToyTeacher(mask)).read(np.arange(NUM_ROWS))["logits"].logits()
    assert torch.isneginf(logits[::2, 3]).all()
    assert torch.isfinite(logits[1::2]).all()


# Features, tokens, abstention


HIDDEN = OutputSpec(name="hidden", shape=(2, 3), kind="features")


def hidden_of(rows):
    return torch.arange(6.0).reshape(2, 3) + rows[:, None, None]


def test_features_are_stored_beside_the_logits(tmp_path):
    change = answers(logits=lambda logits, _: logits, hidden=lambda _, rows: hidden_of(rows))
    store = captured(tmp_path, ToyTeacher(change, outputs=(LOGITS, HIDDEN)))
    rows = torch.arange(NUM_ROWS)
    assert torch.equal(torch.from_numpy(store.read_arrays(rows.numpy())["hidden"]).float(), hidden_of(rows))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_features_are_finite(tmp_path, bad):
    def spoilt(_, rows):
        return torch.where(rows[:, None, None] == 70, bad, hidden_of(rows))

    change = answers(logits=lambda logits, _: logits, hidden=spoilt)
    with pytest.raises(TeacherError, match=r"hidden are NaN or infinite for 1 of 16 .* such as 000070\."):
        captured(tmp_path, ToyTeacher(change, outputs=(LOGITS, HIDDEN)))


def test_where_the_teacher_abstains_nothing_is_looked_at_and_zeros_are_stored(tmp_path):
    def some(said, rows):
        covered = rows % 3 != 0
        said["logits"][~covered] = torch.nan
        return said | {"covered": covered, "hidden": torch.where(covered[:, None, None], hidden_of(rows), torch.inf)}

    store = captured(tmp_path, ToyTeacher(some, outputs=(LOGITS, HIDDEN), abstains=True))
    rows = np.arange(NUM_ROWS)
    arrays, covered = store.read_arrays(rows), rows % 3 != 0
    assert np.array_equal(arrays["covered"], covered)
    for name, values in arrays.items():
        assert np.isfinite(values).all()
        assert not values[~covered].any(), f"{name} of rows without an answer"
    full = captured(tmp_path / "full").read_arrays(rows)
    for name, values in full.items():
        assert np.array_equal(arrays[name][covered], values[covered])
    assert not store.verify()


def test_a_teacher_may_abstain_from_tokens(tmp_path):
    tokens = OutputSpec(name="logits", shape=(3, NUM_CLASSES))

    def some(said, rows):
        logits = said["logits"].unsqueeze(1).repeat(1, 3, 1)
        covered = torch.stack([rows % 2 == 0, rows % 3 == 0, rows < 0], dim=1)
        logits[~covered] = torch.nan
        hidden = torch.where((covered.any(dim=1))[:, None, None], hidden_of(rows), torch.nan)
        return {"logits": logits, "covered": covered, "hidden": hidden}

    store = captured(tmp_path, ToyTeacher(some, outputs=(tokens, HIDDEN), abstains=True))
    rows = np.arange(NUM_ROWS)
    arrays = store.read_arrays(rows)
    covered = np.stack([rows % 2 == 0, rows % 3 == 0, rows < 0], axis=1)
    assert np.array_equal(arrays["covered"], covered)
    assert arrays["statistics"].shape == (NUM_ROWS, 3, 3)
    assert not arrays["logits"][~covered].any()
    assert not arrays["statistics"][~covered].any()
    assert (arrays["statistics"][covered][:, 1] > 1 / NUM_CLASSES).all()
    assert not arrays["hidden"][~covered.any(axis=1)].any()
    assert arrays["hidden"][covered.any(axis=1)].any(axis=(1, 2)).all()


@pytest.mark.parametrize("encoding", [Features(dtype="float32"), FeaturesInt8()], ids=["float32", "int8"])
def test_features_as_wide_as_a_row_has_tokens_are_of_the_row(tmp_path, encoding):
    outputs = (
        OutputSpec(name="logits", shape=(4, NUM_CLASSES)),
        OutputSpec(name="pooled", shape=(4,), kind="features"),
        OutputSpec(name="of_tokens", shape=(4, 2), kind="features"),
        OutputSpec(name="maps", shape=(4, 2, 1), kind="features"),
    )
    numbers = torch.randn(NUM_ROWS, 4, 2, generator=torch.Generator().manual_seed(1)) + 5
    covered = torch.rand(NUM_ROWS, 4, generator=torch.Generator().manual_seed(2)) > 0.6

    def some(said, rows):
        logits = said["logits"].unsqueeze(1).repeat(1, 4, 1)
        return {
            "logits": logits,
            "covered": covered[rows],
            "pooled": numbers[rows, :, 0],
            "of_tokens": numbers[rows],
            "maps": numbers[rows].unsqueeze(-1),
        }

    teacher, rows = ToyTeacher(some, outputs=outputs, abstains=True), MemoryRows(NUM_ROWS)
    encodings = {"logits": Dense().to_json(), **dict.fromkeys(("pooled", "of_tokens", "maps"), encoding.to_json())}
    manifest = replace(manifest_for(teacher, SHARD_ROWS), encodings=encodings)
    store = TargetStore.create(tmp_path / "store", manifest, rows.sample_ids, rows.digests, 1)
    capture(store, teacher, rows, BATCH_SIZE)
    store.finish()
    targets, spoken = store.read(np.arange(NUM_ROWS)), covered.any(dim=1)
    torch.testing.assert_close(targets["pooled"].values[spoken], numbers[spoken][..., 0], rtol=0, atol=0.02)
    assert (targets["pooled"].values[~spoken] == 0).all()
    torch.testing.assert_close(targets["of_tokens"].values[covered], numbers[covered], rtol=0, atol=0.02)
    assert (targets["of_tokens"].values[~covered] == 0).all()
    torch.testing.assert_close(targets["maps"].values[spoken][..., 0], numbers[spoken], rtol=0, atol=0.02)
    assert (targets["maps"].values[~spoken] == 0).all()
    for loss in (HintMSE(), CosineFeature(), RKD(), SimilarityPreserving()):
        with pytest.raises(ConfigError, match="expected a vector per token"):
            loss(numbers.unsqueeze(-1), targets["maps"])
        assert loss(numbers, targets["of_tokens"]).shape == (NUM_ROWS, 4)
        with pytest.raises(ConfigError, match="expected a vector per token"):
            loss(numbers[..., 0], targets["pooled"])
    export_table(store, tmp_path / "table.parquet")
    exported = pq.read_table(tmp_path / "table.parquet")
    nan = np.isnan(np.stack(exported["pooled"].to_numpy()))
    assert np.array_equal(nan, np.broadcast_to(~spoken.numpy()[:, None], nan.shape))
    said = TableTargets(open_table(tmp_path / "table.parquet"), features=["pooled", "of_tokens", "maps"])
    again = TargetStore.create(tmp_path / "again", manifest, rows.sample_ids, rows.digests, 1)
    fill(again, said, own_rows(said).rows, again.missing())
    again.finish()
    for name in ("pooled", "of_tokens", "maps"):
        found = again.read(np.arange(NUM_ROWS))[name].values
        torch.testing.assert_close(found, targets[name].values, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("covered", "found"),
    [
        ({}, "found none"),
        ({"covered": lambda _, rows: rows}, "torch.int64 of shape"),
        ({"covered": lambda _, rows: (rows > 0)[:, None]}, r"of shape \[5, 1\]"),
    ],
)
def test_a_teacher_that_abstains_must_say_where(tmp_path, covered, found):
    teacher = ToyTeacher(answers(logits=lambda logits, _: logits, **covered), abstains=True)
    with pytest.raises(TeacherError, match=rf"must give `covered`, bool \[5\]; .*{found}"):
        captured(tmp_path, teacher)


# Statistics and keys


def test_statistics_of_known_logits():
    logits = torch.tensor([[0.0, 0.0, -torch.inf], [5.0, 1.0, 1.0], [-1e4, 1e4, 0.0]])
    found = teacher_statistics(logits)
    assert found.dtype == np.float32
    rest = 2 / (np.exp(4) + 2)
    expected = [
        [0, 0.5, np.log(2)],
        [0, 1 - rest, -(1 - rest) * np.log(1 - rest) - rest * np.log(rest / 2)],
        [1, 1, 0],
    ]
    np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("scale", [0.01, 1, 30, 1e30])
def test_statistics_are_those_of_the_definition(scale):
    logits = scale * torch.randn(50, 3, 40, generator=torch.Generator().manual_seed(0))
    logits[::2, :, 7] = -torch.inf
    log_probs = torch.log_softmax(logits.double(), dim=-1)
    entropy = -(log_probs.exp() * log_probs.clamp(min=-1e4)).sum(dim=-1)
    expected = torch.stack([logits.argmax(dim=-1).double(), log_probs.amax(dim=-1).exp(), entropy], dim=-1)
    found = teacher_statistics(logits)
    assert found.shape == (50, 3, 3)
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-6, atol=1e-6)
    assert (found[..., 2] >= 0).all()


def test_a_rows_key_depends_on_its_id_and_view_only():
    ids = MemoryRows(50).sample_ids
    keys = row_keys(ids, 0)
    assert keys.dtype == np.uint64
    assert len(set(keys.tolist()) | set(row_keys(ids, 1).tolist())) == 100
    assert np.array_equal(row_keys(ids[[7, 3]], 0), keys[[7, 3]])
    expected = hashlib.blake2b(b"000007\x000", digest_size=8).digest()
    assert keys[7] == int.from_bytes(expected, "little")


# Shares


@pytest.mark.parametrize("count", [1, 2, 3, 4, 20])
def test_every_shard_belongs_to_one_share(count):
    shares = [Share(index=index, count=count) for index in range(count)]
    for index in range(50):
        assert sum(each.has(Shard(index=index, start=0, stop=1)) for each in shares) == 1


def test_shares_together_make_the_same_store(tmp_path):
    teachers = [ToyTeacher() for _ in range(3)]
    rows = MemoryRows(NUM_ROWS)
    for index in (2, 0, 1):
        store = store_for(tmp_path / "store", teachers[index], rows)
        done = capture(store, teachers[index], rows, BATCH_SIZE, share=Share(index=index, count=3))
        assert done.num_rows == len(teachers[index].shown)
    assert sorted(row for each in teachers for row in each.shown) == list(range(NUM_ROWS))
    TargetStore.open(store.path).finish()
    assert tree(tmp_path / "store") == tree(captured(tmp_path / "expected").path)


def test_a_share_is_written_as_index_and_count():
    assert Share.parse("0/1") == WHOLE
    assert Share.parse("3/16") == Share(index=3, count=16)


@pytest.mark.parametrize(
    "text", ["", "1", "/", "1/", "/2", "2/2", "3/2", "-1/2", "0/0", "a/b", "1/2/3", "0.5/2", " 0/2"]
)
def test_what_is_no_share_is_refused(text):
    with pytest.raises(ConfigError, match=r"--shards is .*expected i/n with 0 <= i < n"):
        Share.parse(text)


def test_captured_says_what_was_done(tmp_path):
    rows, teacher = MemoryRows(40), ToyTeacher(lambda said, _: time.sleep(0.01) or said)
    done = capture(store_for(tmp_path, teacher, rows), teacher, rows, BATCH_SIZE)
    assert isinstance(done, Captured)
    assert done.teacher_seconds >= 10 * 0.01


# What fits in memory, and rows of many lengths


MEMORY_ERRORS = (
    torch.OutOfMemoryError("CUDA out of memory"),
    MemoryError("Unable to allocate 1 TiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:80] data. DefaultCPUAllocator: not enough memory: you tried"),
)


def forgetful(at_most, error=MEMORY_ERRORS[0]):
    """A teacher that has memory for so many rows."""

    def change(said, rows):
        if len(rows) > at_most:
            raise error
        return said

    return ToyTeacher(change)


@pytest.mark.parametrize("error", MEMORY_ERRORS)
@pytest.mark.parametrize(("at_most", "recorded"), [(5, 5), (4, 2), (1, 1)])
def test_a_teacher_without_memory_is_shown_fewer_rows_which_is_recorded(tmp_path, at_most, recorded, error):
    store = captured(tmp_path / "store", forgetful(at_most, error))
    whole = captured(tmp_path / "whole")
    assert {record.batch_size for record in store.records.values()} == {recorded}
    for name in ("values", "row_max"):
        found, expected = (getattr(each.targets(each.sample_ids), name) for each in (store, whole))
        torch.testing.assert_close(found, expected)


def test_memory_for_no_row_is_an_error_that_keeps_what_was_committed(tmp_path):
    def change(said, rows):
        if rows.max() >= 100:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return said

    with pytest.raises(TeacherError, match="out of memory on a single row"):
        captured(tmp_path, ToyTeacher(change))
    assert committed(tmp_path) == set(range(96))


class WordyTeacher(ToyTeacher):
    """Row k has `lengths[k]` tokens."""

    def __init__(self, change=lambda said, _: said):
        super().__init__(change)
        self.of_row = np.random.default_rng(0).integers(1, 30, NUM_ROWS)

    def lengths(self, columns):
        return self.of_row[columns["features"][:, 0].astype(int)]


def test_batches_of_a_token_budget_hold_rows_of_like_length_and_every_row_once(tmp_path):
    shown = []
    teacher = WordyTeacher(lambda said, rows: shown.append(rows.numpy()) or said)
    store = captured(tmp_path / "store", teacher, shard_rows=64, batch_size=16, batch_tokens=100)
    assert sorted(np.concatenate(shown)) == list(range(NUM_ROWS))
    longest = [teacher.of_row[rows].max() * len(rows) for rows in shown]
    assert max(longest) <= 100 < sum(longest)
    assert max(len(rows) for rows in shown) <= 16
    padding = sum(longest) / teacher.of_row.sum()
    in_order = [teacher.of_row[start : start + 7] for start in range(0, NUM_ROWS, 7)]
    assert padding < sum(each.max() * len(each) for each in in_order) / teacher.of_row.sum()
    whole = captured(tmp_path / "whole", shard_rows=64)
    found, expected = (each.targets(each.sample_ids).values for each in (store, whole))
    torch.testing.assert_close(found, expected)


def test_a_budget_of_tokens_needs_a_teacher_that_counts_them(tmp_path):
    with pytest.raises(ConfigError, match="batch_tokens: this teacher cannot tell"):
        captured(tmp_path, batch_tokens=100)


# Tokens that do not count, and teachers that know some classes only


def test_only_tokens_that_count_are_covered(tmp_path):
    tokens = OutputSpec(name="logits", shape=(3, NUM_CLASSES))

    def labels(columns):
        rows = columns["features"][:, 0].astype(np.int64)
        return np.stack([rows, np.full_like(rows, -1), np.where(rows % 2, 7, -1)], axis=1)

    speaks = ToyTeacher(lambda said, rows: {"logits": said["logits"].unsqueeze(1).expand(-1, 3, -1)}, (tokens,))
    teacher, rows = OfCountedTokens(speaks, labels), MemoryRows(NUM_ROWS)
    assert isinstance(teacher, Teacher)
    store = store_for(tmp_path, teacher, rows)
    capture(store, teacher, rows, BATCH_SIZE)
    store.finish()
    targets = TargetStore.open(tmp_path).targets(rows.sample_ids)
    assert torch.equal(targets.covered, torch.from_numpy(labels(rows.columns) != -1))
    assert (targets.values[~targets.covered] == 0).all()


def kept_by(rows, k=2):
    """What a server might say of row n: class n mod C at log 0.6, the next at log 0.3, 0.1 elsewhere."""
    first = rows % NUM_CLASSES
    ids, order = torch.stack([first, (first + 1) % NUM_CLASSES], dim=1).sort(dim=1)
    head = torch.tensor([0.6, 0.3]).log().expand(len(rows), k).gather(1, order)
    return {"class_ids": ids, "log_probs": head, "tail_log_mass": torch.full((len(rows),), 0.1).log()}


def capture_kept(folder, change=lambda said: said, **parameters):
    teacher, rows = ToyTeacher(lambda _, rows: change(kept_by(rows))), MemoryRows(NUM_ROWS)
    encoding = TopK(**{"k": 2, "temperatures": (1.0,), "values": "float16"} | parameters).to_json()
    manifest = replace(manifest_for(teacher, SHARD_ROWS), encodings={"logits": encoding})
    store = TargetStore.create(folder, manifest, rows.sample_ids, rows.digests, 1)
    capture(store, teacher, rows, BATCH_SIZE)
    store.finish()
    return TargetStore.open(folder), rows


def test_a_teacher_that_knows_some_classes_is_stored_as_it_spoke(tmp_path):
    store, rows = capture_kept(tmp_path)
    targets = store.targets(rows.sample_ids)
    first = torch.arange(NUM_ROWS) % NUM_CLASSES
    probabilities = torch.zeros(NUM_ROWS, NUM_CLASSES).scatter(1, targets.ids.long(), targets.head.exp())
    assert torch.allclose(probabilities.gather(1, first.unsqueeze(1)), torch.tensor(0.6), atol=1e-3)
    assert torch.allclose(targets.tails.exp(), torch.tensor(0.1), atol=1e-3)
    statistics = store.statistics(np.arange(NUM_ROWS))
    assert statistics["top1"].tolist() == first.tolist()
    assert statistics["confidence"] == pytest.approx(0.6)
    assert statistics["entropy"] == pytest.approx(-sum(p * np.log(p) for p in (0.6, 0.3, 0.1)))


@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize("top_p", [None, 0.8])
@pytest.mark.parametrize("values", ["float16", "int8"])
def test_whatever_stands_where_such_a_teacher_is_silent_is_not_looked_at(tmp_path, values, top_p, compact):
    covered = torch.rand(NUM_ROWS, 3, generator=torch.Generator().manual_seed(2)) > 0.6

    def some(_, rows):
        said = {name: each.unsqueeze(1).repeat(1, 3, *[1] * (each.ndim - 1)) for name, each in kept_by(rows).items()}
        silent = ~covered[rows]
        said["class_ids"][silent], said["log_probs"][silent], said["tail_log_mass"][silent] = -1, -torch.inf, torch.nan
        return {**said, "covered": covered[rows]}

    tokens = OutputSpec(name="logits", shape=(3, NUM_CLASSES))
    teacher, rows = ToyTeacher(some, outputs=(tokens,), abstains=True), MemoryRows(NUM_ROWS)
    encoding = TopK(k=2, temperatures=(1.0,), values=values, top_p=top_p, compact=compact)
    manifest = replace(manifest_for(teacher, SHARD_ROWS), encodings={"logits": encoding.to_json()})
    store = TargetStore.create(tmp_path / "store", manifest, rows.sample_ids, rows.digests, 1)
    capture(store, teacher, rows, BATCH_SIZE)
    store.finish()
    targets = store.targets(rows.sample_ids)
    assert torch.equal(targets.covered, covered)
    expected = kept_by(torch.arange(NUM_ROWS))
    for name, found in (("class_ids", targets.ids.long()), ("log_probs", targets.head)):
        said = expected[name].unsqueeze(1).expand(-1, 3, -1)
        torch.testing.assert_close(found[covered], said[covered], rtol=0, atol=2e-3)
    assert not torch.isnan(targets.head).any()
    assert torch.isfinite(targets.tails).all()
    logits = torch.randn(NUM_ROWS, 3, NUM_CLASSES, requires_grad=True)
    losses = values_of(ForwardKL(temperature=1.0), logits, targets, None)
    torch.where(covered, losses, 0.0).sum().backward()
    assert torch.isfinite(logits.grad).all()
    assert not logits.grad[~covered].any()
    assert not np.stack(list(store.statistics(np.arange(NUM_ROWS)).values()), axis=-1)[~covered.numpy()].any()


@pytest.mark.parametrize(
    ("change", "parameters", "error", "message"),
    [
        (lambda said: said, {"temperatures": (1.0, 4.0)}, ConfigError, r"at temperature 1 only.*temperatures: \[1\]"),
        (lambda said: said, {"k": 3}, TeacherError, r"class_ids have shape \[5, 2\]; expected \[5, 3\]"),
        (
            lambda said: {**said, "tail_log_mass": said["tail_log_mass"] + 1},
            {},
            TeacherError,
            "another mass than 1 for 16 of .* such as 000000",
        ),
        (lambda said: {**said, "log_probs": said["log_probs"] * np.nan}, {}, TeacherError, "another mass than 1"),
    ],
)
def test_what_such_a_teacher_may_not_say(tmp_path, change, parameters, error, message):
    with pytest.raises(error, match=message):
        capture_kept(tmp_path, change, **parameters)
