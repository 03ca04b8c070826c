"""With a ready teacher: what a change of the data or of the views costs in rows that the teacher is shown."""

from __future__ import annotations

import shutil

import numpy as np
import pyarrow as pa
import pytest
import torch

from kdpipe.caching import Share
from kdpipe.data.prepared import PreparedData
from kdpipe.errors import ConfigError, IncompleteStoreError
from kdpipe.store import open_store
from kdpipe.store.aligned import AlignedTargets
from kdpipe.teachers.torch import TorchTeacher
from kdpipe_stages import cache_teacher, evaluate, prepare_data, train_student, train_teacher
from kdpipe_stages.cache_teacher import build_teacher
from kdpipe_stages.stores import inspect
from projects import (
    DIGITS,
    cache,
    digits,
    forget_rows_shown,
    make_project,
    params,
    project_in,
    replace_digits,
    rows_shown,
    with_column,
    write_params,
)

NUM_ROWS = 1797
SHARD_ROWS = 64
NOISE = """
import numpy as np

from kdpipe.random_numbers import uniform


class Noise:
    def __init__(self, size):
        self.size = size

    def __call__(self, columns, keys, seed):
        image = columns["image"]
        drawn = uniform(keys, image.shape[1:], seed)
        return {**columns, "image": (image + self.size * drawn).clip(0, 16).astype(image.dtype)}
"""


def sections(count, splits=None, size=5):
    transform = {"factory": "noise.py:Noise", "size": size}
    pixels = {"factory": "kdpipe.preprocess:ImageTensor", "scale": 16, "mean": [0.3], "std": [0.4]}
    return {
        "teachers": {
            "big": {"model": {"factory": "teacher.py:Teacher"}, "preprocess": pixels, "weights": "big.safetensors"}
        },
        "targets": {"big": {"batch_size": 32, "shard_rows": SHARD_ROWS}},
        "views": {"count": count, "seed": 3, "transform": transform, "splits": splits},
    }


@pytest.fixture
def folder(tmp_path):
    """A cached store of a ready teacher with 4 augmented views of all rows; the count of rows shown starts at 0."""
    make_project(tmp_path)
    (tmp_path / "noise.py").write_text(NOISE)
    project = project_in(tmp_path)
    prepare_data.run(project)
    train_teacher.run(project, "big")
    (project.teacher_model("big") / "model.safetensors").rename(tmp_path / "big.safetensors")
    change(tmp_path, count=4)
    assert rows_shown(tmp_path) == 5 * NUM_ROWS
    forget_rows_shown(tmp_path)
    return tmp_path


def change(folder, **views):
    write_params(folder, params(**sections(**views)))
    return cache(folder)


def check_targets(folder, rows=None, views=None):
    """Every sample's targets are what the teacher says about its views, found by sample id."""
    project = project_in(folder)
    store, spec = open_store(project.store("big")), project.views()
    data = PreparedData(project.prepared)
    inputs = data.inputs
    rows = np.arange(len(inputs)) if rows is None else rows
    teacher, _ = build_teacher(project, "big", inputs)
    ids = inputs.sample_ids[rows].tolist()
    for view in range(spec.num_views) if views is None else views:
        live = teacher.predict(spec.of(inputs.read(rows), ids, view))["logits"]
        assert torch.allclose(store.targets(ids, view).logits(), live, atol=0.05), view
    forget_rows_shown(folder)


def rest_of_a_shard(num_views):
    return num_views * (SHARD_ROWS - 1)


def test_views_differ_and_are_what_the_teacher_says_about_them(folder):
    check_targets(folder)
    store = open_store(project_in(folder).store("big"))
    said = [store.targets(store.sample_ids[:50].tolist(), view).logits() for view in range(5)]
    for view in range(1, 5):
        assert not torch.allclose(said[0], said[view], atol=0.05)
        assert not torch.allclose(said[1 + view % 4], said[view], atol=0.05)


def test_more_views_cost_those_views_only(folder):
    before = open_store(project_in(folder).store("big")).state_digest()
    assert change(folder, count=16).rows_computed == rows_shown(folder) == 12 * NUM_ROWS
    forget_rows_shown(folder)
    check_targets(folder)
    assert change(folder, count=4).rows_computed == 0
    assert open_store(project_in(folder).store("big")).state_digest() == before


def test_appended_rows_are_the_only_ones_shown(folder):
    table = digits(folder)
    count = NUM_ROWS // 10
    images = np.stack(table["image"].to_numpy())[:count] // 2
    new = table.slice(0, count)
    new = with_column(new, "id", list(range(5000, 5000 + count)))
    new = new.set_column(
        new.schema.get_field_index("image"), "image", pa.FixedSizeListArray.from_arrays(pa.array(images.ravel()), 64)
    )
    replace_digits(folder, pa.concat_tables([table, new.cast(table.schema)]))
    cache(folder)
    assert 5 * count <= rows_shown(folder) <= 5 * count + rest_of_a_shard(5)
    check_targets(folder)


def test_edited_rows_are_new_rows(folder):
    table = digits(folder)
    images = np.stack(table["image"].to_numpy()).copy()
    edited = np.random.default_rng(0).choice(NUM_ROWS, NUM_ROWS // 100, replace=False)
    images[edited, 0] += 1
    values = pa.FixedSizeListArray.from_arrays(pa.array(images.ravel()), 64).cast(table.schema.field("image").type)
    replace_digits(folder, table.set_column(table.schema.get_field_index("image"), "image", values))
    cache(folder)
    assert 5 * len(edited) <= rows_shown(folder) <= 5 * len(edited) + rest_of_a_shard(5)
    check_targets(folder)


def test_reordering_relabelling_and_resplitting_show_no_row(folder):
    order = np.random.default_rng(0).permutation(NUM_ROWS)
    replace_digits(folder, digits(folder).take(pa.array(order)))
    assert cache(folder).rows_computed == 0
    labels = [(label + 1) % 10 for label in digits(folder)["label"].to_pylist()]
    replace_digits(folder, with_column(digits(folder), "label", labels))
    assert cache(folder).rows_computed == 0
    splits = np.random.default_rng(1).permutation(digits(folder)["split"].to_pylist())
    replace_digits(folder, with_column(digits(folder), "split", splits.tolist()))
    assert cache(folder).rows_computed == 0
    assert rows_shown(folder) == 0
    check_targets(folder)


def test_a_run_without_new_rows_does_not_call_the_teacher_at_all(folder, monkeypatch):
    """Not even on the one row that tells what it gives: the store knows that."""
    shown, say = [], TorchTeacher._say

    def counting(self, columns):
        shown.append(len(columns["image"]))
        return say(self, columns)

    monkeypatch.setattr(TorchTeacher, "_say", counting)
    replace_digits(folder, digits(folder).take(pa.array(np.random.default_rng(0).permutation(NUM_ROWS))))
    assert cache(folder).rows_computed == 0
    assert shown == []
    outputs = {"big": {**sections(4)["targets"]["big"], "outputs": ["logits", "no_such_output"]}}
    write_params(folder, params(**{**sections(4), "targets": outputs}))
    with pytest.raises(ConfigError, match=r"targets\.big\.outputs: .*no_such_output"):
        cache(folder)
    assert shown == [1]
    shutil.rmtree(folder / "data" / "targets")  # what was computed is in the work area still
    write_params(folder, params(**sections(4)))
    assert cache(folder).rows_computed == 0
    assert shown == [1, 1]


def test_another_transform_or_seed_is_another_store(folder):
    assert change(folder, count=4, size=2).rows_computed == 5 * NUM_ROWS
    forget_rows_shown(folder)
    assert change(folder, count=4).rows_computed == 0
    (folder / "noise.py").write_text(NOISE.replace("self.size *", "-self.size *"))
    assert cache(folder).rows_computed == 5 * NUM_ROWS


def test_views_of_some_splits_only(folder):
    forget_rows_shown(folder)
    change(folder, count=2, splits=["train"])
    assert rows_shown(folder) == 0
    project = project_in(folder)
    store = open_store(project.store("big"))
    store_path = store.path
    # From nothing: the clean row of all, views of train only.
    shutil.rmtree(store_path)
    shutil.rmtree(project.work(store.fingerprint))
    cache(folder)
    data = PreparedData(project.prepared)
    train, test = data.rows_of(["train"]), data.rows_of(["test"])
    assert rows_shown(folder) == NUM_ROWS + 2 * len(train)
    made = open_store(store_path)
    assert (
        inspect(store_path)["bytes_per_row"] == made.num_bytes / made.num_answers == made.num_bytes / rows_shown(folder)
    )
    check_targets(folder, rows=test, views=[0])
    check_targets(folder, rows=train)
    store = open_store(store_path)
    with pytest.raises(IncompleteStoreError, match="view 1 holds no targets for"):
        store.targets(data.inputs.sample_ids[test].tolist(), view=1)
    with pytest.raises(IncompleteStoreError, match=r"views\.splits"):
        AlignedTargets(store, data.inputs, np.arange(len(data.inputs)), views=[0, 1])
    assert store.verify() == []
    # Rows that join the split cost the views of their shards; rows that leave it cost nothing.
    splits = np.array(digits(folder)["split"].to_pylist())
    joining = np.flatnonzero(splits == "test")[:3]
    splits[joining] = "train"
    replace_digits(folder, with_column(digits(folder), "split", splits.tolist()))
    forget_rows_shown(folder)
    cache(folder)
    assert 2 * 3 <= rows_shown(folder) <= 2 * 3 * SHARD_ROWS
    data = PreparedData(project.prepared)
    check_targets(folder, rows=data.rows_of(["train"]))
    splits[:100] = "test"
    replace_digits(folder, with_column(digits(folder), "split", splits.tolist()))
    assert cache(folder).rows_computed == 0
    # Views of all rows after those of some: the others are computed.
    assert change(folder, count=2).rows_computed > 0
    check_targets(folder)


def test_rows_that_are_prepared_while_workers_capture(folder, monkeypatch):
    """They are the next run's."""
    whole = digits(folder)
    replace_digits(folder, whole.slice(0, 600))
    shutil.rmtree(folder / "data" / "prepared")
    write_params(folder, params(**sections(count=1, splits=["train"], size=3)))
    prepare_data.run(project_in(folder))
    capture = cache_teacher.capture

    def beside(*arguments):
        captured = capture(*arguments)
        replace_digits(folder, whole)
        prepare_data.run(project_in(folder))
        return captured

    monkeypatch.setattr(cache_teacher, "capture", beside)
    first = cache_teacher.run(project_in(folder), "big", share=Share(index=0, count=2))
    assert first.shards_owed > 0
    assert first.num_rows == 600
    monkeypatch.undo()
    for index in (0, 1):
        cache_teacher.run(project_in(folder), "big", share=Share(index=index, count=2))
    assert open_store(project_in(folder).store("big")).num_rows == NUM_ROWS
    check_targets(folder, rows=PreparedData(project_in(folder).prepared).rows_of(["train"]))


def test_where_few_rows_have_views_one_that_leaves_has_no_successor(folder):
    """Fewer than a store keeps as they were shown."""
    splits = np.array(digits(folder)["split"].to_pylist(), "<U10")
    splits[10:][splits[10:] == "train"] = "other"
    splits[:10] = [*["train"] * 9, "validation"]
    write_params(folder, params(**sections(count=2, splits=["train"])))
    shutil.rmtree(folder / "data")
    (folder / "data" / "raw").mkdir(parents=True)
    shutil.copy(DIGITS, folder / "data" / "raw" / "digits.parquet")
    for number in (9, 8):
        splits[number:9] = "other"
        replace_digits(folder, with_column(digits(folder), "split", splits.tolist()))
        cache(folder)
        kept = open_store(project_in(folder).store("big")).kept_views()
        assert sorted(int(each.rpartition("-")[0]) for each in kept.sample_ids) == list(range(number))


def test_a_student_learns_from_the_views(folder):
    project = project_in(folder)
    train_student.run(project)
    first = (project.student_models / "student" / "seed-0" / "model.safetensors").read_bytes()
    metrics = evaluate.run(project)
    assert metrics["student"]["accuracy"] > 0.2
    change(folder, count=1)
    assert len(train_student.run(project_in(folder)).trained) == 4
    assert (project.student_models / "student" / "seed-0" / "model.safetensors").read_bytes() != first


def test_views_without_a_transform_or_of_other_splits_are_refused(folder):
    write_params(folder, params(**(sections(2) | {"views": {"count": 2}})))
    with pytest.raises(ConfigError, match=r"no views\.transform"):
        project_in(folder)
    write_params(folder, params(**sections(2, splits=["test"])))
    with pytest.raises(ConfigError, match=r"student\.distil_on: train is not among views\.splits"):
        project_in(folder)
    changed = sections(2)
    changed["views"]["transform"] = {"factory": "kdpipe.preprocess:ImageTensor"}
    write_params(folder, params(**changed))
    with pytest.raises(ConfigError, match="is no Transform"):
        cache_teacher.run(project_in(folder), "big")
