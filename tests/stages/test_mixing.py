"""Views that mix rows, and rows that a store keeps as they were shown: what changes cost, and what is found out."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from kdpipe.data.prepared import PreparedData
from kdpipe.errors import ConfigError, CorruptStoreError, StaleStoreError
from kdpipe.store import open_store
from kdpipe.store.kept import KEPT_ROWS, VIEWS
from kdpipe.transforms import pixels
from kdpipe.views import PARTNER_BLOCK
from kdpipe_stages import cache_teacher, deep_verify, prepare_data, stores, train_student, train_teacher
from kdpipe_stages.cli import run
from kdpipe_stages.lesson import Lesson
from projects import (
    cache,
    digits,
    fails,
    forget_rows_shown,
    make_project,
    params,
    project_in,
    replace_digits,
    rows_shown,
    tree,
    with_column,
    write_params,
)

NUM_ROWS, SHARD_ROWS, COUNT = 1797, 128, 2
CUTMIX = [{"factory": "kdpipe.transforms:PadAndCrop", "padding": 1}, {"factory": "kdpipe.transforms:CutMix"}]
MIXUP = [{"factory": "kdpipe.transforms:Mixup", "alpha": 1}]


def sections(transforms=CUTMIX, count=COUNT, **loss):
    pixels_of = {"factory": "kdpipe.preprocess:ImageTensor", "scale": 16, "mean": [0.3], "std": [0.4]}
    transform = {"factory": "kdpipe.transforms:Compose", "transforms": transforms}
    whole = params(
        teachers={
            "big": {"model": {"factory": "teacher.py:Teacher"}, "preprocess": pixels_of, "weights": "big.safetensors"}
        },
        targets={"big": {"batch_size": 32, "shard_rows": SHARD_ROWS}},
        views={"count": count, "seed": 3, "transform": transform, "splits": ["train"]},
    )
    whole["student"] |= {"seeds": 1, "labelled_rows": 900}
    whole["student"]["losses"][0] |= loss
    return whole


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A cached store of a ready teacher, whose views are mixed."""
    folder = tmp_path_factory.mktemp("made")
    make_project(folder)
    project = project_in(folder)
    prepare_data.run(project)
    train_teacher.run(project, "big")
    (project.teacher_model("big") / "model.safetensors").rename(folder / "big.safetensors")
    write_params(folder, sections())
    cache(folder)
    return folder


@pytest.fixture
def folder(made, tmp_path):
    """A copy; the count of rows shown starts at 0."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    forget_rows_shown(tmp_path)
    return tmp_path


def data_of(folder):
    return PreparedData(project_in(folder).prepared)


def store_in(folder):
    return open_store(project_in(folder).store("big"))


def resplit(folder, change):
    """Prepare with other splits: `change` is given those of the source `[N]`, in its order."""
    splits = np.array(digits(folder)["split"].to_pylist(), "<U10")
    change(splits)
    replace_digits(folder, with_column(digits(folder), "split", splits.tolist()))
    prepare_data.run(project_in(folder))


def show_again(folder):
    """Every row of every view gives the bytes that are stored, so the plan of partners is that of the capture."""
    lines = deep_verify.run(project_in(folder), project_in(folder).store("big"), 10**6)
    expected = len(data_of(folder).inputs) + COUNT * len(data_of(folder).rows_of(["train"]))
    assert f"{expected:,} rows give identical bytes" in lines[0]


def test_the_student_meets_what_the_teacher_saw(folder):
    show_again(folder)
    store, lesson = store_in(folder), Lesson(project_in(folder))
    teacher, _ = cache_teacher.build_teacher(project_in(folder), "big", lesson.data.inputs)
    rows = lesson.rows[::7]
    shown = lesson.views.read(lesson.data.inputs.read, lesson.data.inputs.sample_ids, rows, 1)
    said = store.targets(lesson.data.inputs.sample_ids[rows].tolist(), view=1)
    assert torch.allclose(said.logits(), teacher.predict(shown.columns)["logits"], atol=0.05)
    assert set(shown.partners) <= set(lesson.rows)
    assert [each.arm for each in train_student.run(project_in(folder)).trained] == ["student", "labels_only"]


def test_baselines_mix_rows_whose_label_they_know(folder):
    lesson = Lesson(project_in(folder))
    ids = lesson.data.inputs.sample_ids
    shown = lesson.views_of_labelled.read(lesson.data.inputs.read, ids, lesson.labelled, 1)
    assert set(shown.partners) == set(lesson.labelled)
    unknown = lesson.labels[lesson.views.partners.of(lesson.labelled, 1, lesson.views.seed)] < 0
    assert unknown.any()


def test_other_labels_and_other_unwanted_splits_cost_nothing(folder):
    labels = [(label + 1) % 10 for label in digits(folder)["label"].to_pylist()]
    replace_digits(folder, with_column(digits(folder), "label", labels))

    def move(splits):
        splits[np.flatnonzero(splits == "test")[:5]] = "other"

    resplit(folder, move)
    train_student.run(project_in(folder))
    assert cache(folder).rows_computed == rows_shown(folder) == 0


@pytest.mark.parametrize("joins", [True, False])
def test_a_row_that_joins_or_leaves_costs_the_views_of_its_block(folder, joins):
    before = store_in(folder)
    records = {key: record.inputs for key, record in before.records.items()}
    places = []

    def move(splits):
        places.append(np.flatnonzero(splits == ("test" if joins else "train"))[30])
        splits[places[0]] = "train" if joins else "test"

    resplit(folder, move)
    for stage in (
        lambda: train_student.run(project_in(folder)),
        lambda: deep_verify.run(project_in(folder), before.path),
    ):
        with pytest.raises(
            StaleStoreError, match=r"about other splits than data/prepared. Run `kdpipe cache-teacher big"
        ):
            stage()
    cache(folder)
    data = data_of(folder)
    key = str(digits(folder)["id"][int(places[0])].as_py())
    (row,) = [row for row, each in enumerate(data.inputs.sample_ids) if each.rpartition("-")[0] == key]
    block = row // PARTNER_BLOCK
    train = data.rows_of(["train"])
    assert rows_shown(folder) == COUNT * (train // PARTNER_BLOCK == block).sum()
    changed = {key for key, record in store_in(folder).records.items() if record.inputs != records[key]}
    per_block = PARTNER_BLOCK // SHARD_ROWS
    assert {shard // per_block for _, shard in changed} == {block}
    assert {view for view, _ in changed} == {1, 2}
    show_again(folder)


def test_appended_rows_cost_the_views_of_the_last_block(folder):
    table, count = digits(folder), 40
    images = np.stack(table["image"].to_numpy())[:count] // 2
    new = with_column(table.slice(0, count), "id", list(range(5000, 5000 + count)))
    new = new.set_column(
        new.schema.get_field_index("image"), "image", pa.FixedSizeListArray.from_arrays(pa.array(images.ravel()), 64)
    )
    kept = store_in(folder).kept_views()
    replace_digits(folder, pa.concat_tables([table, new.cast(table.schema)]))
    cache(folder)
    in_last_block = NUM_ROWS % PARTNER_BLOCK + count
    assert count <= rows_shown(folder) <= (1 + COUNT) * in_last_block
    assert store_in(folder).kept_views().to_bytes() == kept.to_bytes()
    show_again(folder)


def test_losses_that_need_the_rows_label_are_refused(folder, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    write_params(folder, sections(factory="kdpipe.losses:DKD"))
    message = fails(capsys, "check")
    assert "student.losses.0: DKD needs a row's label, and views.transform mixes rows" in message
    with pytest.raises(ConfigError, match="DKD needs a row's label"):
        train_student.run(project_in(folder))


def test_rows_of_another_order_are_refused_by_the_student(folder):
    replace_digits(folder, digits(folder).take(pa.array(np.random.default_rng(0).permutation(NUM_ROWS))))
    project = project_in(folder)
    shutil.rmtree(project.prepared)
    prepare_data.run(project)
    with pytest.raises(StaleStoreError, match="about other rows, or another order of them, than data/prepared"):
        train_student.run(project_in(folder))


# Kept views


def test_sixteen_rows_are_kept_as_they_were_shown(folder):
    store, project = store_in(folder), project_in(folder)
    kept, inputs = store.kept_views(), data_of(folder).inputs
    assert len(set(kept.sample_ids)) == KEPT_ROWS
    number = {each: row for row, each in enumerate(inputs.sample_ids.tolist())}
    rows = np.array([number[each] for each in kept.sample_ids])
    assert set(rows) <= set(data_of(folder).rows_of(["train"]))
    shown = project.views_of(inputs).read(inputs.read, inputs.sample_ids, rows, 1)
    assert np.array_equal(kept.columns["image"], shown.columns["image"])
    assert inputs.sample_ids[shown.partners].tolist() == kept.partners.tolist()
    extent = json.loads((store.path / "extent.json").read_text())
    assert set(extent) == {"num_rows", "num_views", "rows_sha256", "views_sha256", "digest"}
    before = tree(store.path)
    shutil.rmtree(folder / "data" / "targets")
    shutil.rmtree(folder / "data" / ".work")
    cache(folder)
    assert tree(store.path) == before


def test_a_changed_library_is_detected(folder, monkeypatch):
    """CutMix pastes one line less, as another version of a library might."""
    pasted = pixels.pasted
    monkeypatch.setattr(
        pixels,
        "pasted",
        lambda images, others, top, left, height, width: pasted(images, others, top, left, (height - 1).clip(0), width),
    )
    message = (
        rf"keeps {KEPT_ROWS} rows as its teacher was shown them, and views\.transform shows others today: in view 1, "
        r"'image' of \d+-\w+ differs by up to \d+ \(allowed: .*remove data/targets/big and data/\.work/\w+"
    )
    with pytest.raises(StaleStoreError, match=message):
        train_student.run(project_in(folder))
    with pytest.raises(StaleStoreError, match=message):
        deep_verify.run(project_in(folder), project_in(folder).store("big"))
    with pytest.raises(StaleStoreError, match=message):
        cache_teacher.run(project_in(folder), "big")
    monkeypatch.undo()
    assert cache_teacher.run(project_in(folder), "big").rows_computed == 0
    train_student.run(project_in(folder))


def test_a_step_in_few_pixels_is_no_change(folder, monkeypatch):
    pasted = pixels.pasted

    def rounded_otherwise(images, *others):
        found = pasted(images, *others)
        found[0, 0, 0] ^= 1
        return found

    monkeypatch.setattr(pixels, "pasted", rounded_otherwise)
    train_student.run(project_in(folder))


def test_kept_rows_that_left_make_room_for_others(folder):
    before = store_in(folder).kept_views()
    gone = before.sample_ids[3].rpartition("-")[0]

    def move(splits):
        splits[digits(folder)["id"].to_pylist().index(int(gone))] = "test"

    resplit(folder, move)
    cache(folder)
    after = store_in(folder).kept_views()
    assert len(set(after.sample_ids)) == KEPT_ROWS
    assert before.sample_ids[3] not in after.sample_ids
    assert set(before.sample_ids) & set(after.sample_ids)
    train_student.run(project_in(folder))


def test_a_store_without_views_keeps_none(folder):
    write_params(folder, sections(count=0))
    cache(folder)
    store = store_in(folder)
    assert store.kept_views() is None
    assert not (store.path / VIEWS).exists()
    assert set(json.loads((store.path / "extent.json").read_text())) == {
        "num_rows",
        "num_views",
        "rows_sha256",
        "digest",
    }
    assert pq.read_schema(store.path / "rows.parquet").names == ["sample_id", "digest"]
    write_params(folder, sections())
    forget_rows_shown(folder)
    cache(folder)
    assert rows_shown(folder) == COUNT * len(data_of(folder).rows_of(["train"]))
    assert len(store_in(folder).kept_views()) == KEPT_ROWS


def test_damaged_kept_views_are_found_and_repaired(folder, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    store = store_in(folder)
    content = (store.path / VIEWS).read_bytes()
    for damage in (lambda path: path.write_bytes(content[:-1] + b"\0"), lambda path: path.unlink()):
        path = store.path / VIEWS
        path.unlink(missing_ok=True)  # it is a hard link of the work folder's
        path.write_bytes(content)
        damage(path)
        with pytest.raises(CorruptStoreError, match=r"views\.parquet is absent or was changed"):
            stores.verify(store.path)
        assert "views.parquet is absent or differs from its digest" in fails(capsys, "train-student")
    assert run(["cache-teacher", "big", "--repair"]) == 0
    assert (store.path / VIEWS).read_bytes() == content
    assert stores.verify(store.path)
    work = project_in(folder).work(store.fingerprint)
    (work / VIEWS).unlink()
    assert "--repair" in fails(capsys, "cache-teacher", "big")
    assert run(["cache-teacher", "big", "--repair"]) == 0
    assert (store.path / VIEWS).read_bytes() == content


def test_mixup_in_a_project(folder):
    write_params(folder, sections(MIXUP))
    cache(folder)
    show_again(folder)
    train_student.run(project_in(folder))


def test_a_store_at_a_url_keeps_them_too(folder, monkeypatch):
    """Its work folder goes when it is published, and the description of the published store stays."""
    # A url of this process's memory, which params.yaml may not name, as it is gone with the process.
    monkeypatch.setattr("kdpipe_stages.params_checks._check_urls", lambda params: None)
    at_url = sections()
    at_url["targets"]["big"]["url"] = f"memory://{folder.name}/big"
    write_params(folder, at_url)
    kept = store_in(folder).kept_views().to_bytes()
    cache(folder)
    assert rows_shown(folder) == 0
    assert store_in(folder).kept_views().to_bytes() == kept
    train_student.run(project_in(folder))
    monkeypatch.setattr(pixels, "pasted", lambda images, *box: images)
    for stage in (train_student.run, lambda project: cache_teacher.run(project, "big")):
        with pytest.raises(StaleStoreError, match=r"views\.transform shows others today"):
            stage(project_in(folder))
