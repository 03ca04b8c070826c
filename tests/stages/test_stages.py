"""The stages as a pipeline: what is computed again after each kind of change, and what is not."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pytest

from kdpipe.config import Factory
from kdpipe.data.prepared import PreparedInputs
from kdpipe.errors import ConfigError, DataError, StaleStoreError, StoreError
from kdpipe.store import TargetStore, open_store
from kdpipe_stages import cache_teacher, evaluate, prepare_data, stores, train_student, train_teacher
from kdpipe_stages.cli import run
from kdpipe_stages.project import write_project
from kdpipe_stages.tables import export_targets, import_targets
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

NUM_ROWS = 1797


@pytest.fixture
def folder(tmp_path):
    """A project whose teacher's targets are cached; the count of rows shown starts at 0."""
    make_project(tmp_path)
    cache(tmp_path)
    forget_rows_shown(tmp_path)
    return tmp_path


def new_digits(first_id, images, label, split):
    count = len(images)
    return pa.table(
        {
            "id": pa.array(range(first_id, first_id + count), pa.int32()),
            "image": pa.FixedSizeListArray.from_arrays(pa.array(images.ravel()), 64),
            "label": pa.array([label] * count, pa.int32()),
            "split": pa.array([split] * count),
        }
    )


def said_by_id(folder):
    store = open_store(folder / "data" / "targets" / "big")
    logits = store.targets(store.sample_ids.tolist()).logits().numpy()
    return dict(zip(store.sample_ids.tolist(), logits, strict=True))


def test_the_whole_pipeline_and_a_second_run_that_does_nothing(folder):
    project = project_in(folder)
    train_student.run(project)
    metrics = evaluate.run(project)
    assert set(metrics) == {"student", "baseline", "teacher", "gain"}
    distances = {"agreement", "kl_to_teacher", "reverse_kl_to_teacher"}
    scalars = {"accuracy", "entropy", "ece", "macro_f1", "balanced_accuracy", "auc"} | distances
    for key in ("student", "baseline", "teacher"):
        assert scalars | {f"{name}_std" for name in scalars} | {"parameters", "size_bytes"} == set(metrics[key])
        assert all(isinstance(value, int | float) for value in metrics[key].values())
    assert metrics["teacher"]["agreement"] == 1
    assert metrics["teacher"]["kl_to_teacher"] == metrics["teacher"]["reverse_kl_to_teacher"] == 0
    before = tree(folder / "data" / "targets") | tree(folder / "data" / "models")
    written = (folder / "metrics.json").read_bytes()
    assert cache(folder).rows_computed == 0
    assert train_student.run(project).trained == []
    evaluate.run(project)
    assert rows_shown(folder) == 0
    assert tree(folder / "data" / "targets") | tree(folder / "data" / "models") == before
    assert (folder / "metrics.json").read_bytes() == written


def test_targets_are_what_the_teacher_says_about_that_row(folder):
    inputs = PreparedInputs(folder / "data" / "prepared" / "inputs")
    teacher, _ = cache_teacher.build_teacher(project_in(folder), "big", inputs)
    rows = np.random.default_rng(0).permutation(len(inputs))
    live = teacher.predict(inputs.read(rows))["logits"].numpy()
    stored = open_store(folder / "data" / "targets" / "big").targets(inputs.sample_ids[rows].tolist())
    np.testing.assert_allclose(stored.logits().numpy(), live, atol=0.02)
    assert (stored.values.argmax(dim=-1).numpy() == live.argmax(axis=-1)).all()


def test_appended_rows_are_the_only_ones_shown(folder):
    before = said_by_id(folder)
    images = np.random.default_rng(0).integers(0, 17, (100, 64), dtype=np.uint8)
    replace_digits(folder, pa.concat_tables([digits(folder), new_digits(5000, images, None, "transfer")]))
    done = cache(folder)
    shard_rows = open_store(folder / "data" / "targets" / "big").manifest.shard_rows
    assert rows_shown(folder) == done.rows_computed
    assert 100 <= done.rows_computed <= 100 + shard_rows
    after = said_by_id(folder)
    assert len(after) == NUM_ROWS + 100
    assert all(np.allclose(after[key], value, atol=1e-5) for key, value in before.items())


def test_reordering_relabelling_and_resplitting_elsewhere_show_no_row(folder):
    table = digits(folder)
    split = np.array(table["split"].to_pylist(), dtype=object)
    label = np.array(table["label"].to_pylist())
    test_rows = np.flatnonzero(split == "test")
    label[test_rows[:50]] = (label[test_rows[:50]] + 1) % 10
    split[test_rows[50:100]] = "held_out"
    changed = with_column(with_column(table, "split", split.tolist()), "label", label.tolist())
    weights = tree(folder / "data" / "models" / "teachers")
    store = tree(folder / "data" / "targets")
    replace_digits(folder, changed.take(np.random.default_rng(0).permutation(NUM_ROWS)))
    assert cache(folder).rows_computed == 0
    assert rows_shown(folder) == 0
    assert tree(folder / "data" / "models" / "teachers") == weights
    assert tree(folder / "data" / "targets") == store


@pytest.mark.parametrize("column", ["label", "split"])
def test_no_student_learns_from_a_teacher_that_learnt_from_other_rows_or_labels(folder, column):
    """Once prepare-data has run: it may have learnt from rows that are the student's test rows now."""
    earlier = digits(folder)
    values = np.array(earlier[column].to_pylist(), dtype=object)
    learnt = np.flatnonzero(np.array(earlier["split"].to_pylist()) == "train")[:50]
    values[learnt] = "test" if column == "split" else (values[learnt] + 1) % 10
    replace_digits(folder, with_column(earlier, column, values.tolist()))
    prepare_data.run(project_in(folder))
    told = r"teachers\.big learnt from other rows, or other labels, of the split 'train' than today's"
    with pytest.raises(StaleStoreError, match=told):
        train_student.run(project_in(folder))
    replace_digits(folder, earlier)
    prepare_data.run(project_in(folder))
    train_student.run(project_in(folder))


def test_a_student_elsewhere_may_know_fewer_labels_than_its_teacher(folder):
    """Where the store is, and the teacher is not."""
    shutil.rmtree(folder / "data" / "models" / "teachers")
    table = digits(folder)
    unknown = [None if row % 2 else label for row, label in enumerate(table["label"].to_pylist())]
    replace_digits(folder, with_column(table, "label", unknown))
    prepare_data.run(project_in(folder))
    train_student.run(project_in(folder))


def test_another_seed_gives_other_targets_and_back_costs_no_pass(folder):
    first = tree(folder / "data" / "targets")
    changed = params()
    changed["teachers"]["big"]["train"]["seed"] = 1
    write_params(folder, changed)
    assert cache(folder).rows_computed == NUM_ROWS
    assert tree(folder / "data" / "targets") != first
    write_params(folder, params())
    forget_rows_shown(folder)
    assert cache(folder).rows_computed == 0
    assert rows_shown(folder) == 0
    assert tree(folder / "data" / "targets") == first


def test_a_pulled_store_is_adopted(folder):
    shutil.rmtree(folder / "data" / ".work")
    first = tree(folder / "data" / "targets")
    project = project_in(folder)
    assert cache_teacher.run(project, "big").rows_computed == 0
    assert tree(folder / "data" / "targets") == first


@pytest.mark.parametrize("is_imported", [False, True])
def test_a_store_that_another_one_replaces_is_gone_back_to(folder, is_imported):
    """Though the work area did not hold it: it was pulled, say, or imported."""
    published = folder / "data" / "targets" / "big"
    first = tree(published)
    shutil.rmtree(folder / "data" / ".work")
    if is_imported:
        table = folder / "said.parquet"
        export_targets(published, "parquet", table, "all", [], replace=False)
        shutil.rmtree(published)
        first = tree(import_targets(table, published, parameters={}).store.path)
    write_params(folder, params(targets={"big": {"encoding": "int8"}}))
    assert cache_teacher.run(project_in(folder), "big").rows_computed == NUM_ROWS
    if is_imported:
        kept = [each for each in (folder / "data" / ".work").iterdir() if tree(each) == first]
        assert len(kept) == 1
    else:
        write_params(folder, params())
        assert cache_teacher.run(project_in(folder), "big").rows_computed == 0
        assert tree(published) == first


def test_a_folder_of_other_things_is_not_published_over(folder, capsys):
    published = folder / "data" / "targets" / "big"
    shutil.rmtree(published)
    published.mkdir()
    (published / "mine.txt").write_text("of somebody")
    message = fails(capsys, "cache-teacher", "big", "--params", str(folder / "params.yaml"))
    assert "data/targets/big holds mine.txt, and no target store" in message
    assert tree(published) == {"mine.txt": b"of somebody"}


def test_a_damaged_shard_is_found_and_repaired(folder):
    first = tree(folder / "data" / "targets")
    victim = folder / "data" / "targets" / "big" / "logits" / "c.0.3.0"
    content = bytearray(victim.read_bytes())
    content[20] ^= 4
    victim.write_bytes(content)
    with pytest.raises(StoreError, match=r"view 0, shard 3: .*c\.0\.3\.0 of logits differs"):
        stores.verify(folder / "data" / "targets" / "big")
    shard_rows = open_store(folder / "data" / "targets" / "big").manifest.shard_rows
    assert cache(folder, repair=True).rows_computed == shard_rows
    assert rows_shown(folder) == shard_rows
    assert tree(folder / "data" / "targets") == first
    assert "every checksum matches" in stores.verify(folder / "data" / "targets" / "big")[0]


def test_damaged_inputs_are_never_shown_to_the_teacher(folder):
    """Targets are committed under the digest of the content, so the content is checked against it."""
    shutil.rmtree(folder / "data" / ".work")
    shutil.rmtree(folder / "data" / "targets")
    project = project_in(folder)
    train_teacher.run(project, "big")
    (segment,) = (folder / "data" / "prepared" / "inputs").glob("segment-*")
    path = segment / "image.npy"
    content = bytearray(path.read_bytes())
    content[5000] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"differs from its digest \(1 such rows.*prepare-data"):
        cache_teacher.run(project, "big")
    path.write_bytes(content[:200])
    with pytest.raises(DataError, match=r"image\.npy is absent or damaged.*prepare-data"):
        cache_teacher.run(project, "big")
    path.write_bytes(content)
    (segment / "rows.parquet").unlink()
    with pytest.raises(DataError, match=r"rows\.parquet is absent or damaged.*prepare-data"):
        cache_teacher.run(project, "big")


def test_rows_prepared_with_other_settings_are_refused(folder):
    changed = params()
    changed["data"]["splits"] = {"seed": 5}
    write_params(folder, changed)
    with pytest.raises(DataError, match=r"data\.splits\.seed was 0, params\.yaml says 5.*prepare-data"):
        train_student.run(project_in(folder))


def test_published_models_are_adopted(folder):
    train_student.run(project_in(folder))
    models = tree(folder / "data" / "models")
    shutil.rmtree(folder / "data" / ".work")
    project = project_in(folder)
    assert train_teacher.run(project, "big").skipped
    assert cache_teacher.run(project, "big").rows_computed == 0
    assert train_student.run(project).trained == []
    assert tree(folder / "data" / "models") == models


def test_the_demo_overwrites_nothing(tmp_path):
    from kdpipe_stages.demo import scaffold

    (tmp_path / "dvc.yaml").write_text("stages: {}")
    scaffold(tmp_path)
    assert (tmp_path / "dvc.yaml").read_text() == "stages: {}"
    assert (tmp_path / "params.yaml").is_file()
    assert (tmp_path / "data" / "raw" / "digits.parquet").is_file()


def test_inspect_shows_encodings_as_they_stand_in_params(folder, capsys):
    changed = params()
    changed["targets"]["big"] |= {"encoding": "topk", "k": 3, "temperatures": [1, 4], "outputs": ["logits", "head"]}
    write_params(folder, changed)
    cache(folder)
    store = str(folder / "data" / "targets" / "big")
    assert run(["inspect", store]) == 0
    shown = capsys.readouterr().out
    assert "logits: encoding: topk, k: 3, " in shown
    assert "head: encoding: features, dtype: float16" in shown
    assert "temperatures: [1.0, 4.0]" in " ".join(shown.replace("│", " ").split())
    assert run(["inspect", store, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["encodings"]["logits"]["k"] == 3


def test_swapped_shards_are_found(folder):
    logits = folder / "data" / "targets" / "big" / "logits"
    first, second = (logits / "c.0.0.0").read_bytes(), (logits / "c.0.1.0").read_bytes()
    (logits / "c.0.0.0").write_bytes(second)
    (logits / "c.0.1.0").write_bytes(first)
    with pytest.raises(StoreError, match="2 problems"):
        stores.verify(folder / "data" / "targets" / "big")


def test_a_student_change_trains_the_student_only_and_resumes_nothing_old(folder):
    project = project_in(folder)
    train_student.run(project)
    first = tree(folder / "data" / "models" / "student")
    changed = params()
    changed["student"]["labelled_rows"] = 100
    write_params(folder, changed)
    project = project_in(folder)
    assert train_teacher.run(project, "big").skipped
    assert cache_teacher.run(project, "big").rows_computed == 0
    with pytest.raises(ConfigError, match="other settings"):
        evaluate.run(project)
    assert len(train_student.run(project).trained) == 4
    assert tree(folder / "data" / "models" / "student").keys() == first.keys()
    assert tree(folder / "data" / "models" / "student") != first
    more = params()
    more["student"]["seeds"] = 3
    write_params(folder, more)
    assert [each.folder for each in train_student.run(project_in(folder)).trained] == [
        "student/seed-2",
        "labels_only/seed-2",
    ]


def test_a_store_of_other_settings_names_the_difference_and_the_command(folder):
    changed = params()
    changed["teachers"]["big"]["train"]["seed"] = 7
    write_params(folder, changed)
    with pytest.raises(StaleStoreError, match=r"teacher\.train\.seed was 0, params\.yaml says 7.*cache-teacher big"):
        train_student.run(project_in(folder))
    with pytest.raises(StaleStoreError, match="Run `kdpipe train-teacher big`"):
        cache_teacher.run(project_in(folder), "big")


def test_the_teachers_own_source_is_part_of_the_fingerprint(folder):
    path = folder / "teacher.py"
    path.write_text(path.read_text().replace("self.head(inputs.flatten(1))", "2 * self.head(inputs.flatten(1))"))
    with pytest.raises(StaleStoreError, match="other settings, code or rows"):
        cache_teacher.run(project_in(folder), "big")
    assert cache(folder).rows_computed == NUM_ROWS


def test_a_factory_that_is_made_elsewhere_counts_with_its_own_file(folder):
    """`functools.partial(…)` says it is defined in functools."""
    path = folder / "wide.py"
    sources = []
    for width in (8, 9):
        path.write_text(f"import functools\nfrom teacher import Teacher\nWide = functools.partial(Teacher, {width})\n")
        sources.append(project_in(folder).sources(Factory(path="wide.py:Wide"), "model"))
    assert sources[0] != sources[1]
    assert sources[0].keys() == sources[1].keys() >= {"teacher"}


def test_numbers_that_change_nothing_leave_the_store_alone(folder):
    changed = params()
    changed["targets"]["big"]["batch_size"] = 100
    changed["targets"]["big"]["temperatures"] = [1, 8]
    changed["teachers"]["big"]["train"]["num_workers"] = 0
    write_params(folder, changed)
    assert cache(folder).rows_computed == 0
    assert open_store(folder / "data" / "targets" / "big").manifest.temperatures == [1, 8]


def test_a_ready_teacher_needs_no_training(folder):
    shutil.copyfile(folder / "data" / "models" / "teachers" / "big" / "model.safetensors", folder / "ready.safetensors")
    state = json.loads((folder / "data" / "models" / "teachers" / "big" / "model.json").read_text())["preprocess_state"]
    changed = params()
    changed["teachers"]["big"].pop("train")
    changed["teachers"]["big"]["weights"] = "ready.safetensors"
    changed["teachers"]["big"]["preprocess"] |= state
    first = said_by_id(folder)
    write_params(folder, changed)
    project = project_in(folder)
    assert "ready" in train_teacher.run(project, "big").skipped
    assert cache_teacher.run(project, "big").rows_computed == NUM_ROWS
    second = said_by_id(folder)
    assert all(np.array_equal(second[key], value) for key, value in first.items())


def test_two_teachers_with_their_own_preprocess_and_one_student(tmp_path):
    changed = params()
    changed["teachers"]["small"] = {
        "model": {"factory": "kdpipe.models.linear:Linear"},
        "preprocess": {"factory": "kdpipe.preprocess:ImageTensor", "scale": 4, "size": [4, 4]},
        "train": {"epochs": 1},
    }
    changed["student"]["losses"].append({"factory": "kdpipe.losses:ForwardKL", "teacher": "small", "weight": 0.2})
    make_project(tmp_path, **changed)
    project = project_in(tmp_path)
    prepare_data.run(project)
    for name in project.params.teachers:
        train_teacher.run(project, name)
        cache_teacher.run(project, name)
    train_student.run(project)
    metrics = evaluate.run(project)
    assert {"teacher", "teacher_small"} <= set(metrics)
    assert {"agreement", "agreement_small"} <= set(metrics["student"])


def test_a_project_is_written_as_it_is_read(tmp_path):
    (tmp_path / "own.py").write_text("A = 1\n")
    whole = params(teachers={"no": params()["teachers"]["big"] | {"train": {"epochs": 1, "learning_rate": 1e-05}}})
    whole["student"]["losses"][0]["teacher"] = "no"
    whole["task"]["class_names"] = ["no", "yes", "1e3", "1:30", "010", "0o17", "on", "~", "é", "true"]
    whole["targets"] = {}
    project = write_project(whole, tmp_path / "of" / "its own", [tmp_path / "own.py"])
    assert project.root == tmp_path / "of" / "its own"
    assert (project.root / "own.py").read_text() == "A = 1\n"
    assert project.params.task.arguments["class_names"] == whole["task"]["class_names"]
    assert project.teacher("no").train.learning_rate == 1e-05
    with pytest.raises(ConfigError, match=r"params\.yaml: student\.seeds"):
        write_project(whole | {"student": whole["student"] | {"seeds": "x"}}, tmp_path / "wrong")


def test_tables_run_from_csv_with_text_labels(tmp_path):
    from sklearn.datasets import load_iris

    iris = load_iris()
    names = iris.target_names.tolist()
    columns = {name: iris.data[:, index] for index, name in enumerate("abcd")}
    rows = pa.table({**columns, "species": [names[label] for label in iris.target], "key": range(len(iris.target))})
    table = params()
    table["data"] = {
        "source": {"factory": "kdpipe.data.sources:Table"},
        "path": "iris.csv",
        "columns": {"id": "key", "label": "species"},
        "splits": {"shares": {"train": 0.6, "transfer": 0.2, "test": 0.2}},
    }
    table["task"] = {
        "factory": "kdpipe.tasks.tabular:TabularClassification",
        "num_classes": 3,
        "columns": ["a", "b", "c", "d"],
        "class_names": names,
    }
    table["teachers"]["big"] = {
        "model": {"factory": "kdpipe.models.mlp:MLP", "hidden": [16]},
        "train": {"epochs": 30, "learning_rate": 0.02, "batch_size": 16},
    }
    table["student"] |= {
        "model": {"factory": "kdpipe.models.linear:Linear"},
        "preprocess": None,
        "distil_on": ["train", "transfer"],
        "labelled_rows": None,
        "labelled_fraction": 0.2,
        "train": {"epochs": 30, "learning_rate": 0.05, "batch_size": 16},
    }
    make_project(tmp_path, **table)
    pyarrow.csv.write_csv(rows, tmp_path / "iris.csv")
    project = project_in(tmp_path)
    prepare_data.run(project)
    train_teacher.run(project, "big")
    cache_teacher.run(project, "big")
    train_student.run(project)
    assert evaluate.run(project)["student"]["accuracy"] > 0.8
    assert TargetStore.open(tmp_path / "data" / "targets" / "big").manifest.class_names == names
