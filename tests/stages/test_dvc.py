"""The pipeline under real DVC in a real git repository: what runs, what does not, what comes back without a run."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from projects import LOGGING_TEACHER, REPOSITORY, forget_rows_shown, rows_shown, tree
from real_dvc import commit, git_init, repro, shell

STAGES = ["prepare_data", "train_teacher@big", "cache_teacher@big", "train_student", "evaluate"]


def change(folder, edit):
    settings = yaml.safe_load((folder / "params.yaml").read_text())
    edit(settings)
    (folder / "params.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))


def small(settings):
    """The demo's parameters with a teacher that counts its rows, and quick trainings."""
    settings["teachers"]["big"]["model"] = {"factory": "teacher.py:Teacher"}
    settings["teachers"]["big"]["train"]["epochs"] = 1
    settings["student"]["train"]["epochs"] = 1
    settings["student"] |= {"seeds": 1, "baselines": ["labels_only"]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The repository's own dvc.yaml, reproduced once and committed."""
    folder = tmp_path_factory.mktemp("dvc")
    for name in ("dvc.yaml", "params.yaml", ".gitignore", ".dvcignore"):
        shutil.copyfile(REPOSITORY / name, folder / name)
    (folder / ".gitignore").write_text((folder / ".gitignore").read_text() + "calls.log\n")
    (folder / "data" / "raw").mkdir(parents=True)
    shutil.copyfile(REPOSITORY / "data" / "raw" / "digits.parquet", folder / "data" / "raw" / "digits.parquet")
    (folder / "teacher.py").write_text(LOGGING_TEACHER)
    change(folder, small)
    git_init(folder)
    shell(folder, "dvc", "init", "--quiet")
    shell(folder, "dvc", "config", "core.analytics", "false")
    assert repro(folder) == STAGES
    commit(folder)
    forget_rows_shown(folder)
    return folder


@pytest.fixture(autouse=True)
def restored(folder):
    """Every test starts from, and goes back to, the committed state."""
    yield
    shell(folder, "git", "reset", "--quiet", "--hard")
    repro(folder)
    shell(folder, "git", "reset", "--quiet", "--hard")
    forget_rows_shown(folder)


def test_a_second_run_does_nothing(folder):
    assert repro(folder) == []
    assert "up to date" in shell(folder, "dvc", "status")


def test_another_teacher_seed_and_back(folder):
    first, metrics = tree(folder / "data" / "targets"), (folder / "metrics.json").read_bytes()
    change(folder, lambda settings: settings["teachers"]["big"]["train"].update(seed=1))
    assert repro(folder) == STAGES[1:]
    assert rows_shown(folder) == 1797
    assert tree(folder / "data" / "targets") != first
    shell(folder, "git", "checkout", "--quiet", "params.yaml")
    forget_rows_shown(folder)
    repro(folder)
    assert rows_shown(folder) == 0
    assert tree(folder / "data" / "targets") == first
    assert (folder / "metrics.json").read_bytes() == metrics


def test_student_parameters_run_the_students_stages_only(folder):
    change(folder, lambda settings: settings["student"].update(labelled_rows=100))
    assert repro(folder) == STAGES[3:]
    change(folder, lambda settings: settings["student"]["train"].update(learning_rate=0.02))
    assert repro(folder) == STAGES[3:]
    assert rows_shown(folder) == 0


def test_relabelling_outside_the_teachers_split_runs_no_teacher(folder):
    path = folder / "data" / "raw" / "digits.parquet"
    original = path.read_bytes()
    table = pq.read_table(path)
    split, label = table["split"].to_pylist(), table["label"].to_pylist()
    held_out = [index for index, name in enumerate(split) if name == "test"][:40]
    for index in held_out[:20]:
        label[index] = (label[index] + 1) % 10
    for index in held_out[20:]:
        split[index] = "transfer"
    columns = {"label": pa.array(label, pa.int32()), "split": pa.array(split)}
    for name, values in columns.items():
        table = table.set_column(table.schema.get_field_index(name), name, values)
    pq.write_table(table, path)
    try:
        ran = repro(folder)
    finally:
        path.write_bytes(original)
    assert ran == ["prepare_data", "train_student", "evaluate"]
    assert rows_shown(folder) == 0


def test_appended_rows_are_the_only_ones_that_the_teacher_sees(folder, tmp_path):
    grown = tmp_path / "grown"
    shutil.copytree(folder, grown)  # rows never leave the inputs again, so this happens in a copy
    path = grown / "data" / "raw" / "digits.parquet"
    table = pq.read_table(path)
    new = table.slice(0, 50)
    columns = {
        "id": pa.array(range(9000, 9050), pa.int32()),
        "label": pa.nulls(50, pa.int32()),
        "split": pa.array(["transfer"] * 50),
    }
    for name, values in columns.items():
        new = new.set_column(new.schema.get_field_index(name), name, values)
    pq.write_table(pa.concat_tables([table, new]), path)
    assert repro(grown) == ["prepare_data", "cache_teacher@big", "train_student", "evaluate"]
    assert 50 <= rows_shown(grown) <= 50 + 64
    assert repro(grown) == []


def test_experiments_metrics_and_plots(folder):
    assert repro(folder, "exp", "run", "-S", "student.label_weight=0.2") == STAGES[3:]
    changed = json.loads(shell(folder, "dvc", "params", "diff", "--json"))
    assert changed["params.yaml"]["student.label_weight"] | {"diff": 0} == {"old": 0.1, "new": 0.2, "diff": 0}
    shown = json.loads(shell(folder, "dvc", "metrics", "show", "--json"))[""]["data"]["metrics.json"]["data"]
    assert {"student", "baseline", "teacher", "gain"} <= set(shown)
    assert "student.accuracy" in shell(folder, "dvc", "metrics", "diff", "--all")
    page = re.search(r"file://(\S+index\.html)", shell(folder, "dvc", "plots", "show"))
    assert page is not None
    assert "calibration" in Path(page.group(1)).read_text()


def test_a_fresh_clone_reproduces_the_metrics(folder, tmp_path):
    shell(tmp_path, "git", "clone", "--quiet", str(folder), "clone")
    clone = tmp_path / "clone"
    assert repro(clone) == STAGES
    assert json.loads((clone / "metrics.json").read_text()) == json.loads((folder / "metrics.json").read_text())
    assert tree(clone / "data" / "targets") == tree(folder / "data" / "targets")


def test_an_experiment_in_a_temporary_folder(folder):
    before = tree(folder / "data" / "targets")
    shell(folder, "dvc", "exp", "run", "--temp", "-S", "student.label_weight=0.3")
    assert tree(folder / "data" / "targets") == before
