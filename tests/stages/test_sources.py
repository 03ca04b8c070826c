"""Sources as params.yaml names them: with and without data.path, a user's own, and what is wrong with them."""

from __future__ import annotations

import copy
import io
import json

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from kdpipe.data.prepared import PreparedData
from kdpipe_stages import train_student
from kdpipe_stages.cli import run
from kdpipe_stages.params import to_json
from kdpipe_stages.terminal import result_table
from projects import cache, fails, make_project, params, project_in, rows_shown, write_params

OWN_SOURCE = """
import pyarrow as pa

class Own:
    def __init__(self, count):
        self.count = count

    def batches(self):
        for number in range(self.count):
            yield pa.record_batch({"id": [number], "image": pa.array([[number] * 64], pa.list_(pa.uint8(), 64))})

class Gives:
    def __init__(self, what):
        self.what = what

    def batches(self):
        table = pa.table({"id": [1]})
        return {"dicts": iter([{"id": [1]}]), "numbers": [1, 2], "table": table, "dict": {"id": [1]}}.get(self.what)

class NoSource:
    pass
"""

NOISE = {
    "source": {
        "factory": "kdpipe.data.sources:Synthetic",
        "num_rows": 60,
        "columns": {"image": {"kind": "image", "shape": [8, 8, 1]}},
    },
    "columns": {"id": "id"},
    "splits": {"shares": {"train": 0.5, "test": 0.5}},
}


def with_source(**source):
    return {**NOISE, "source": source}


def without_labels():
    """Random rows, of which nobody knows a label, and a student that learns from the teacher alone."""
    whole = params(data=copy.deepcopy(NOISE))
    pixels = {"factory": "kdpipe.preprocess:ImageTensor", "mean": [0.5], "std": [0.25]}
    whole["teachers"]["big"]["preprocess"] = whole["student"]["preprocess"] = pixels
    whole["student"] |= {"labelled_rows": 0, "label_weight": 0, "baselines": []}
    return whole


def assert_measured_without_labels(folder):
    """What is about the teacher is known, what is about labels is null."""
    metrics, per_seed = (json.loads((folder / name).read_text()) for name in ("metrics.json", "per_seed.json"))
    assert metrics["gain"] == {}
    for name in ("accuracy", "ece", "macro_f1", "balanced_accuracy", "auc"):
        assert metrics["student"][name] is None
        assert metrics["student"][f"{name}_std"] is None
        assert metrics["teacher"].get(name) is None
        assert [each[name] for each in per_seed["student"]] == [None, None]
    for name in ("agreement", "kl_to_teacher", "reverse_kl_to_teacher", "entropy"):
        assert metrics["student"][name] > 0
    assert metrics["teacher"]["entropy"] > 0
    assert (folder / "data" / "plots" / "confusion.csv").read_text() == "actual,predicted\n"
    assert (folder / "data" / "plots" / "calibration.csv").read_text() == "model,confidence,accuracy,share\n"
    shown = Console(file=io.StringIO(), width=120)
    shown.print(result_table(metrics, {}, "result"))
    assert "nan" not in shown.file.getvalue()
    assert f"{100 * metrics['student']['agreement']:.2f}" in shown.file.getvalue()


def test_a_teacher_speaks_about_random_rows(tmp_path, capsys):
    """Distillation without data: a ready teacher, no file of rows anywhere."""
    make_project(tmp_path)
    cache(tmp_path)  # gives the weights
    weights = next((tmp_path / "data" / "models" / "teachers" / "big").glob("*.safetensors"))
    weights.rename(tmp_path / "ready.safetensors")
    (tmp_path / "data" / "raw" / "digits.parquet").unlink()
    whole = without_labels()
    del whole["teachers"]["big"]["train"]
    whole["teachers"]["big"]["weights"] = "ready.safetensors"
    write_params(tmp_path, whole)
    shown = rows_shown(tmp_path)
    cache(tmp_path)
    assert rows_shown(tmp_path) - shown == 60
    train_student.run(project_in(tmp_path))
    assert list((tmp_path / "data" / "models" / "student" / "student").glob("seed-*/model.safetensors"))
    capsys.readouterr()
    assert run(["evaluate", "--params", str(tmp_path / "params.yaml")]) == 0
    said = capsys.readouterr().err
    assert "student agreement 0." in said
    assert "on test, where no row has a label" in said
    assert_measured_without_labels(tmp_path)
    data = PreparedData(project_in(tmp_path).prepared)
    assert (data.labels == -1).all()
    whole["data"]["source"]["num_rows"] = 100
    write_params(tmp_path, whole)
    cache(tmp_path)
    assert (
        PreparedData(project_in(tmp_path).prepared).inputs.sample_ids.tolist()[:60] == data.inputs.sample_ids.tolist()
    )


def test_check_and_prepare_take_a_source_without_a_path(tmp_path, capsys):
    make_project(tmp_path)
    write_params(tmp_path, without_labels())
    assert run(["prepare-data", "--params", str(tmp_path / "params.yaml")]) == 0
    assert "60 rows, 60 of them new" in capsys.readouterr().err
    assert run(["check", "--params", str(tmp_path / "params.yaml")]) == 0
    assert "kdpipe.data.sources:Synthetic" in "".join(capsys.readouterr())
    assert to_json(project_in(tmp_path).params.data)["path"] is None


@pytest.mark.parametrize("command", ["check", "prepare-data"])
@pytest.mark.parametrize(
    ("data", "message"),
    [
        (with_source(factory="kdpipe.data.sources:Table"), "data.path: missing; kdpipe.data.sources:Table needs it"),
        (with_source(factory="own.py:NoSource"), "data.source: own.py:NoSource is no Source"),
        (with_source(factory="kdpipe.data.sources:Synthetic", columns={}), "data.source.num_rows: missing"),
        (
            with_source(factory="own.py:Own", number=3),
            "data.source.number: own.py:Own does not take it; it takes count",
        ),
        *(
            (with_source(factory="own.py:Gives", what=what), f"own.py:Gives: batches() gave {found}; expected pyarrow")
            for what, found in {
                "dicts": "dict",
                "numbers": "int",
                "table": "Table",
                "dict": "dict",
                "none": "nothing",
            }.items()
        ),
        (with_source(factory="kdpipe.data.sources:HuggingFace"), "give either data.path"),
        (
            {**with_source(factory="kdpipe.data.sources:TextFile", documents="words"), "path": "rows.txt"},
            "data.source.documents",
        ),
        ({**with_source(factory="kdpipe.data.sources:ImageFolder"), "path": "absent"}, "absent"),
    ],
)
def test_what_is_wrong_with_a_source_is_one_message(tmp_path, capsys, command, data, message):
    make_project(tmp_path, data=data)
    (tmp_path / "own.py").write_text(OWN_SOURCE)
    assert message in fails(capsys, command, "--params", str(tmp_path / "params.yaml"))


def test_the_path_is_a_key_of_data_not_of_the_source(tmp_path, capsys):
    data = with_source(factory="kdpipe.data.sources:Table", path="data/raw/digits.parquet")
    make_project(tmp_path, data=data)
    assert "data.path: missing" in fails(capsys, "prepare-data", "--params", str(tmp_path / "params.yaml"))


def test_a_source_of_ones_own_needs_no_path(tmp_path):
    make_project(tmp_path, data=with_source(factory="own.py:Own", count=12))
    (tmp_path / "own.py").write_text(OWN_SOURCE)
    assert run(["prepare-data", "--params", str(tmp_path / "params.yaml")]) == 0
    assert len(PreparedData(project_in(tmp_path).prepared).inputs) == 12


def test_a_folder_of_images_is_prepared(tmp_path, capsys):
    names = ["cat", "dog"]
    for number in range(40):
        path = tmp_path / "photos" / ("test" if number % 4 == 0 else "train") / names[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8), number, np.uint8)).save(path)
    data = {
        "source": {"factory": "kdpipe.data.sources:ImageFolder", "split_folders": True},
        "path": "photos",
        "columns": {"id": "id", "label": "label", "split": "split"},
    }
    task = {"factory": "kdpipe.tasks.image:ImageClassification", "num_classes": 2, "class_names": names}
    make_project(tmp_path, data=data, task=task)
    assert run(["prepare-data", "--params", str(tmp_path / "params.yaml")]) == 0
    prepared = PreparedData(project_in(tmp_path).prepared)
    assert sorted(prepared.split_names) == ["test", "train", "validation"]
    assert np.bincount(prepared.labels).tolist() == [20, 20]
    (tmp_path / "photos" / "train" / "dog" / "3.png").write_bytes(b"no image")
    message = fails(capsys, "prepare-data", "--params", str(tmp_path / "params.yaml"))
    assert "(id train/dog/3.png) cannot be decoded" in message
