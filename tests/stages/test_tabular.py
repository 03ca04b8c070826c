"""A table with missing numbers, categories and few rows of one class, from the file to metrics.json."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from kdpipe.errors import ConfigError
from kdpipe_stages import cache_teacher, check, evaluate, prepare_data, train_student, train_teacher
from projects import make_project, params, project_in, write_params

NUM_ROWS = 400


def write_passengers(folder):
    """Survival depends on sex and age; every fifth age and some decks are missing; the test split has its own deck."""
    random = np.random.default_rng(0)
    age = random.uniform(1, 80, NUM_ROWS)
    sex = random.choice(["female", "male"], NUM_ROWS)
    survived = (0.06 * (30 - age) + 1.5 * (sex == "female") + 0.3 * random.normal(size=NUM_ROWS) > 1.4).astype(int)
    split = np.where(np.arange(NUM_ROWS) % 4 == 0, "test", "train")
    deck = np.where(split == "test", random.choice(["A", "Z", ""], NUM_ROWS), random.choice(["A", "B", ""], NUM_ROWS))
    lines = ["key,age,sex,deck,class,survived,split"]
    for row in range(NUM_ROWS):
        shown = "" if row % 5 == 0 else f"{age[row]:.1f}"
        lines.append(f"{row},{shown},{sex[row]},{deck[row]},{row % 3},{survived[row]},{split[row]}")
    (folder / "passengers.csv").write_text("\n".join(lines) + "\n")


def passengers(**changed):
    encoder = {
        "factory": "kdpipe.preprocess.columns:ColumnEncoder",
        "add_missing_indicators": True,
        "transformer": None,
    }
    sections = params(
        data={
            "source": {"factory": "kdpipe.data.sources:Table"},
            "path": "passengers.csv",
            "columns": {"id": "key", "label": "survived", "split": "split"},
        },
        task={
            "factory": "kdpipe.tasks.tabular:TabularClassification",
            "num_classes": 2,
            "columns": ["age"],
            "categorical": ["sex", "deck", "class"],
            "missing": "allow",
        },
        teachers={
            "big": {
                "model": {"factory": "kdpipe.models.mlp:MLP", "hidden": [32]},
                "train": {"epochs": 30, "batch_size": 64, "learning_rate": 0.01},
            }
        },
    )
    sections["student"] |= {
        "model": {"factory": "kdpipe.models.linear:Linear"},
        "preprocess": encoder | changed,
        "train": {"epochs": 20, "batch_size": 64, "learning_rate": 0.05},
        "labelled_rows": 60,
    }
    return sections


@pytest.fixture
def folder(tmp_path):
    make_project(tmp_path)
    write_passengers(tmp_path)
    write_params(tmp_path, passengers())
    return tmp_path


def run(project):
    prepare_data.run(project)
    train_teacher.run(project, "big")
    cache_teacher.run(project, "big")
    train_student.run(project)
    return evaluate.run(project)


def test_from_the_file_to_the_metrics(folder):
    project = project_in(folder)
    check.run(project)
    metrics = run(project)
    for key in ("student", "teacher"):
        each = metrics[key]
        assert 0.75 < each["balanced_accuracy"] < each["accuracy"] < 1
        assert 0.75 < each["macro_f1"] < each["accuracy"]
        assert 0.85 < each["auc"] < 1
    kept = json.loads((folder / "data" / "models" / "student" / "student" / "seed-0" / "model.json").read_text())
    assert set(kept["preprocess_state"]) == {"scikit-learn", "skops"}
    assert math.isfinite(metrics["student"]["reverse_kl_to_teacher"])


def test_a_transformer_of_ones_own_and_its_code(folder):
    source = (
        "import numpy as np\nfrom sklearn.preprocessing import FunctionTransformer\n\n\n"
        "def make():\n    return FunctionTransformer(features)\n\n\n"
        "def features(table):\n"
        "    age = table['age'].fillna(30) / 40\n"
        "    return np.stack([age, table['sex'] == 'female'], axis=1)\n"
    )
    module = f"my_features_{folder.name}"
    (folder / f"{module}.py").write_text(source)
    own = {"transformer": {"factory": f"{module}:make"}, "trusted": [f"{module}.features"]}
    write_params(folder, passengers(**own))
    project = project_in(folder)
    assert run(project)["student"]["auc"] > 0.85
    assert train_student.run(project).trained == []
    (folder / f"{module}.py").write_text(source.replace("/ 40", "/ 50"))
    with pytest.raises(ConfigError, match=r"trained with other settings, rows or targets than today's"):
        evaluate.run(project_in(folder))


def test_check_says_which_columns_the_student_is_not_shown(folder):
    assert not any("leaves out" in line for line in check.run(project_in(folder)))
    sections = passengers()
    sections["student"]["preprocess"] = {"factory": "kdpipe.preprocess:Standardize"}
    sections["task"] |= {"columns": ["class"], "categorical": ["sex", "deck"]}
    write_params(folder, sections)
    (said,) = (line for line in check.run(project_in(folder)) if "leaves out" in line)
    assert said.endswith("; columns that its preprocess leaves out: 2 (category.sex, category.deck)")


@pytest.mark.parametrize(("key", "names"), [("columns", ["age", "survived"]), ("categorical", ["survived"])])
def test_the_label_is_no_column_of_the_rows(folder, key, names):
    sections = passengers()
    sections["task"][key] = names
    write_params(folder, sections)
    with pytest.raises(ConfigError, match=rf"task\.{key} names 'survived', which is the label"):
        check.run(project_in(folder))


@pytest.mark.parametrize("where", ["student", "teachers"])
@pytest.mark.parametrize(
    ("call", "message"),
    [("raise ValueError('bad row')", "ValueError: bad row"), ("return torch.zeros(3, 1)", r"gives \[3, 1\] for")],
)
def test_check_names_a_preprocess_that_does_wrong(folder, where, call, message):
    (folder / "own.py").write_text(
        "import torch\nfrom kdpipe.preprocess import Standardize\n\nclass Own(Standardize):\n"
        f"    def __call__(self, columns):\n        {call}\n"
    )
    sections = passengers()
    (sections["student"] if where == "student" else sections["teachers"]["big"])["preprocess"] = {
        "factory": "own.py:Own"
    }
    write_params(folder, sections)
    with pytest.raises(ConfigError, match=rf"{where}.*\.?preprocess: own\.py:Own .*{message}"):
        check.run(project_in(folder))
