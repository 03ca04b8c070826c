from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pytest
import safetensors.torch
import torch
import yaml

from kdpipe.data.prepared import PreparedInputs
from kdpipe.errors import KdpipeError
from kdpipe.preprocess import Standardize
from kdpipe.store import TargetStore
from kdpipe.tasks.tabular import TabularClassification
from kdpipe.teachers.rules import RulesTeacher, linear_from_rules
from kdpipe_stages import cache_teacher, evaluate, prepare_data, train_student, train_teacher
from kdpipe_stages.cli import run
from projects import fails, make_project, params, project_in, write_params

COLUMNS = ["sepal length", "sepal width", "petal length", "petal width"]
RULES = [
    {"name": "short petals", "when": {"column": "petal length", "below": 2.5}, "label": "setosa", "weight": 4},
    {"name": "narrow petals", "when": {"column": "petal width", "below": 0.6}, "label": "setosa"},
    {
        "name": "middling petals",
        "when": {"column": "petal length", "at_least": 2.5, "below": 4.6},
        "label": "versicolor",
        "weight": 3,
    },
    {
        "name": "middling widths",
        "when": {"column": "petal width", "above": 0.8, "at_most": 1.6},
        "label": "versicolor",
    },
    {"name": "long petals", "when": {"column": "petal length", "above": 5.2}, "label": "virginica", "weight": 3},
    {"name": "flowers of doubt", "function": "flowers.py:wide_petals"},
]
FUNCTIONS = """
import numpy as np

WIDE = 2.0


def wide_petals(columns):
    return np.where(columns["petal width"] > WIDE, 2, -1)
"""


def iris_project(folder):
    from sklearn.datasets import load_iris

    iris = load_iris()
    names = iris.target_names.tolist()
    columns = {name: iris.data[:, index] for index, name in enumerate(COLUMNS)}
    rows = pa.table({**columns, "species": [names[label] for label in iris.target], "key": range(len(iris.target))})
    rules = {"factory": "kdpipe.teachers.rules:RulesTeacher", "rules": "rules.yaml"}
    whole = params()
    whole["data"] = {
        "source": {"factory": "kdpipe.data.sources:Table"},
        "path": "iris.csv",
        "columns": {"id": "key", "label": "species"},
        "splits": {"shares": {"train": 0.7, "test": 0.3}},
    }
    whole["task"] = {
        "factory": "kdpipe.tasks.tabular:TabularClassification",
        "num_classes": 3,
        "columns": COLUMNS,
        "class_names": names,
    }
    whole["teachers"] = {
        "net": {"model": {"factory": "kdpipe.models.linear:Linear"}, "train": {"epochs": 2}},
        "rules": {"teacher": rules},
        "learnt": {
            "teacher": {**rules, "combine": "label_model", "class_balance": "labels"},
            "fit_on": "train",
        },
        "ruled": {
            "teacher": {
                "factory": "kdpipe.teachers.rules:ConstrainedTeacher",
                "teacher": "net",
                "rules": "rules.yaml",
                "strength": 6,
            }
        },
    }
    whole["targets"] = {name: {"dtype": "float32"} for name in whole["teachers"]}
    whole["student"] |= {
        "model": {"factory": "kdpipe.models.linear:Linear"},
        "preprocess": None,
        "labelled_rows": 5,
        "losses": [{"factory": "kdpipe.losses:ForwardKL", "teacher": "rules"}],
        "train": {"epochs": 30, "learning_rate": 0.05, "batch_size": 16},
        "baselines": [],
    }
    make_project(folder, **whole)
    pyarrow.csv.write_csv(rows, folder / "iris.csv")
    (folder / "rules.yaml").write_text(yaml.safe_dump(RULES))
    (folder / "flowers.py").write_text(FUNCTIONS)
    project = project_in(folder)
    prepare_data.run(project)
    return project


@pytest.fixture
def project(tmp_path):
    return iris_project(tmp_path)


def stored(project, name):
    """What the store of a teacher says of every row: targets, and the rows."""
    store = TargetStore.open(project.root / "data" / "targets" / name)
    inputs = PreparedInputs(project.root / "data" / "prepared" / "inputs")
    return store.targets(inputs.sample_ids.tolist()), inputs.read(np.arange(len(inputs)))


def cache(project, *names):
    for name in names:
        train_teacher.run(project, name)
        cache_teacher.run(project, name)


def test_a_store_of_rules_covers_the_rows_that_they_are_about(project):
    cache(project, "rules")
    targets, rows = stored(project, "rules")
    said = RulesTeacher("rules.yaml", project.task(), project.root).predict(rows)
    covered = said["covered"]
    assert 0 < covered.sum() < len(covered)
    assert torch.equal(targets.covered, covered)
    torch.testing.assert_close(targets.log_probs()[covered], said["logits"][covered])


def test_a_label_model_is_fitted_by_train_teacher_and_anew_when_rules_change(project):
    cache(project, "learnt")
    first = project.store("learnt") / "manifest.json"
    before, model = first.read_text(), project.teacher_model("learnt") / "label_model.json"
    learnt = model.read_text()
    assert train_teacher.run(project, "learnt").skipped
    (project.root / "flowers.py").write_text(FUNCTIONS.replace("2.0", "1.9"))
    with pytest.raises(KdpipeError, match="Run `kdpipe train-teacher learnt`"):
        cache_teacher.run(project, "learnt")
    cache(project, "learnt")
    assert model.read_text() != learnt
    assert first.read_text() != before
    targets, _ = stored(project, "learnt")
    data = project.prepared_data()
    right = targets.log_probs().argmax(dim=1).numpy() == data.labels
    assert right[targets.covered.numpy()].mean() > 0.9


def test_rules_reshape_another_teacher(project):
    cache(project, "net", "ruled")
    (net, rows), (ruled, _) = stored(project, "net"), stored(project, "ruled")
    votes = RulesTeacher("rules.yaml", project.task(), project.root).predict(rows)["covered"]
    same = torch.isclose(net.log_probs(), ruled.log_probs(), rtol=0, atol=1e-4).all(dim=1)
    assert torch.equal(same, ~votes)
    assert ruled.covered is None
    labels = project.prepared_data().labels
    accuracy = [(each.log_probs().argmax(dim=1).numpy() == labels).mean() for each in (net, ruled)]
    assert accuracy[1] > accuracy[0]


def test_a_student_starts_from_rules(project):
    cache(project, "rules")
    rows = PreparedInputs(project.root / "data" / "prepared" / "inputs")
    train = rows.read(project.prepared_data().rows_of(["train"]))
    preprocess = Standardize()
    preprocess.fit([train])
    weights = linear_from_rules(RulesTeacher("rules.yaml", project.task(), project.root), preprocess, [train])
    assert set(weights.divergence) == {rule["name"] for rule in RULES}
    safetensors.torch.save_file(weights.state_dict, project.root / "rules.safetensors")
    changed = yaml.safe_load((project.root / "params.yaml").read_text())
    changed["student"] |= {"init_from": "rules.safetensors", "train": {"epochs": 1, "learning_rate": 1e-9}}
    write_params(project.root, changed)
    project = project_in(project.root)
    train_student.run(project)
    assert evaluate.run(project)["student"]["accuracy"] > 0.8


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (
            {"weight": torch.ones(3, 4)},
            "the model Linear: absent: head.bias, head.weight; unknown: weight",
        ),
        (
            {"head.weight": torch.ones(7, 4), "head.bias": torch.ones(7)},
            "of another shape: head.bias [7] for [3], head.weight [7, 4] for [3, 4]",
        ),
    ],
    ids=["names", "shapes"],
)
def test_first_weights_that_do_not_fit_are_told_by_check(project, capsys, weights, message):
    safetensors.torch.save_file(weights, project.root / "first.safetensors")
    changed = yaml.safe_load((project.root / "params.yaml").read_text())
    changed["student"] |= {"init_from": "first.safetensors"}
    write_params(project.root, changed)
    assert message in fails(capsys, "check", "--params", str(project.params_file))


def test_a_rule_about_no_column_is_one_message(project, capsys):
    (project.root / "rules.yaml").write_text(yaml.safe_dump([{**RULES[0], "when": {"column": "petal", "below": 1}}]))
    message = fails(capsys, "cache-teacher", "rules", "--params", str(project.params_file))
    assert "rules.yaml: rule 1 (short petals).when.below: there is no column 'petal'; there are sepal length" in message


def test_what_rules_cover_is_said(project, capsys):
    at = ("--params", str(project.params_file))
    (project.root / "rules.yaml").write_text(yaml.safe_dump(RULES[:1]))
    for _ in range(2):
        assert run(["cache-teacher", "rules", *at]) == 0
        assert "covers 50 of 150 rows" in capsys.readouterr().err
    (project.root / "rules.yaml").write_text(
        yaml.safe_dump([{"name": "none", "when": {"column": "petal length", "below": 0}, "label": "setosa"}])
    )
    before = (project.store("rules") / "manifest.json").read_text()
    for _ in range(2):
        assert "teacher rules covers 0 of 150 rows" in fails(capsys, "cache-teacher", "rules", *at)
    assert (project.store("rules") / "manifest.json").read_text() == before


def test_a_rule_with_a_key_twice_is_one_message(project, capsys):
    (project.root / "rules.yaml").write_text("- {name: a, label: setosa,\n   name: b}\n")
    message = fails(capsys, "cache-teacher", "rules", "--params", str(project.params_file))
    assert "rules.yaml, line 2: the key 'name' stands on line 1 already" in message


@pytest.mark.parametrize("name", ["rules", "learnt"])
def test_no_rules_are_one_message(project, capsys, name):
    changed = yaml.safe_load(project.params_file.read_text())
    del changed["teachers"][name]["teacher"]["rules"]
    write_params(project.root, changed)
    stage = "train-teacher" if name == "learnt" else "cache-teacher"
    assert "rules: " in fails(capsys, stage, name, "--params", str(project.params_file))


def test_the_task_names_the_columns():
    task = TabularClassification(num_classes=2, columns=["b", "a"])
    values = task.column_values({"features": np.array([[1, 2], [3, 4]], np.float32)})
    assert {name: column.tolist() for name, column in values.items()} == {"b": [1, 3], "a": [2, 4]}
