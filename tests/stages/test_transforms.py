"""Built-in transforms named in params.yaml: checked, cached, trained on, and part of the store's fingerprint."""

from __future__ import annotations

import re
from importlib.metadata import version

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import yaml

from kdpipe.errors import ConfigError, StaleStoreError
from kdpipe.store import TargetStore
from kdpipe_stages import prepare_data, train_student, train_teacher
from kdpipe_stages.building import teacher_fingerprint
from kdpipe_stages.cli import run
from kdpipe_stages.lesson import open_checked_store
from projects import REPOSITORY, cache, fails, make_project, params, project_in, rows_shown, write_params

OWN = """
def dim(example, rng):
    return {"image": example["image"] // rng.integers(1, 3, dtype="uint8")}
"""


def views(*transforms):
    return {
        "count": 1,
        "seed": 3,
        "transform": {"factory": "kdpipe.transforms:Compose", "transforms": list(transforms)},
        "splits": ["train"],
    }


OF_DIGITS = views(
    {"factory": "kdpipe.transforms:PadAndCrop", "padding": 1},
    {"factory": "kdpipe.transforms:PerExample", "function": "own.py:dim"},
)


def test_a_project_with_transforms(tmp_path, capsys, monkeypatch):
    (tmp_path / "own.py").write_text(OWN)
    make_project(tmp_path, views=OF_DIGITS)
    monkeypatch.chdir(tmp_path)
    cache(tmp_path)
    assert rows_shown(tmp_path) > 1797
    assert run(["check"]) == 0
    train_student.run(project_in(tmp_path))
    (tmp_path / "own.py").write_text(OWN.replace("3", "4"))
    with pytest.raises(
        StaleStoreError, match=r"holds views of another views\.transform: own@ was .* cache-teacher big"
    ):
        train_student.run(project_in(tmp_path))


@pytest.mark.parametrize(
    ("library", "file", "transform", "its_own", "drawn", "by_itself"),
    [
        (
            "kornia",
            "turned.py",
            {"factory": "turned.py:Turned", "degrees": 10},
            "from kornia.augmentation import RandomRotation",
            "rotate(images, torch.from_numpy(angles).float())",
            "RandomRotation(self.degrees)(images)",
        ),
        (
            "torchvision",
            "tilted.py",
            {"factory": "kdpipe.transforms:PerExample", "function": "tilted.py:tilt"},
            "from torchvision.transforms.v2 import RandomRotation",
            "functional.rotate(image, rng.uniform(-10, 10))",
            "RandomRotation(10)(image)",
        ),
    ],
    ids=["kornia", "torchvision"],
)
def test_a_library_that_is_given_what_was_drawn(
    tmp_path, capsys, monkeypatch, library, file, transform, its_own, drawn, by_itself
):
    """The guide's transforms by kernels of libraries; a library's own random class is refused."""
    pytest.importorskip(library)
    guide = (REPOSITORY / "docs" / "guides" / "views.md").read_text()
    [code] = re.findall(rf"```python\n(# {re.escape(file)}\n.*?)```", guide, re.DOTALL)
    assert drawn in code
    (tmp_path / file).write_text(code)
    make_project(tmp_path, views={"count": 1, "transform": transform, "splits": ["train"]})
    monkeypatch.chdir(tmp_path)
    cache(tmp_path)
    store = TargetStore.open(project_in(tmp_path).store("big"))
    assert store.manifest.ingredients["views"]["sources"][library] == version(library)
    train_student.run(project_in(tmp_path))
    (tmp_path / file).write_text(f"{its_own}\n{code.replace(drawn, by_itself)}")
    assert "makes another 'image' of the same 16 rows" in fails(capsys, "check")


def test_what_does_not_fit_is_told_by_check(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_project(tmp_path, views=views({"factory": "kdpipe.transforms:WordDropout"}))
    message = fails(capsys, "check")
    assert "views.transform: Compose fails on image uint8" in message
    assert "there is no column 'text'; WordDropout is for rows of text" in message
    write_params(tmp_path, params(views=views({"factory": "kdpipe.transforms:PadAndCrop", "pading": 1})))
    message = fails(capsys, "check")
    assert "views.transform.transforms.0.pading: kdpipe.transforms:PadAndCrop does not take it" in message
    assert "did you mean 'padding'?" in message


MIRROR = """
class Mirror:
    def __call__(self, columns, keys, seed):
        return {**columns, "image": columns["image"][:, :, ::-1].copy()}
"""

SHADED = """
def shaded(table, root):
    divisor = int((root / table).read_text())
    return lambda columns, keys, seed: {**columns, "image": columns["image"] // divisor}
"""


def taught(folder, transform, **options):
    """A project whose teacher is trained on what `transform` shows."""
    train = {"epochs": 3, "batch_size": 128, "learning_rate": 0.01, **({"transform": transform} if transform else {})}
    teacher = {**params()["teachers"]["big"], "train": train}
    make_project(folder, teachers={"big": teacher}, **options)
    (folder / "own.py").write_text(OWN + MIRROR + SHADED)
    return project_in(folder)


def trained(folder, transform, **options):
    project = taught(folder, transform, **options)
    prepare_data.run(project)
    assert not train_teacher.run(project, "big").skipped
    return (folder / "data" / "models" / "teachers" / "big" / "model.safetensors").read_bytes()


def test_a_teacher_is_trained_on_what_its_transform_shows(tmp_path):
    """Mirrored in every epoch, it learns what it learns of a source whose rows are mirrored."""
    mirrored, data = tmp_path / "mirrored", {**params()["data"], "splits": {"validation_fraction": 0}}
    weights = trained(tmp_path / "shown", {"factory": "own.py:Mirror"}, data=data)
    project = taught(mirrored, None, data=data)
    source = mirrored / "data" / "raw" / "digits.parquet"
    table = pq.read_table(source)
    pixels = np.array(table["image"].to_pylist(), np.uint8).reshape(-1, 8, 8)[:, :, ::-1].reshape(len(table), -1)
    column = pa.array(pixels.tolist(), table.schema.field("image").type)
    pq.write_table(table.set_column(table.column_names.index("image"), "image", column), source)
    prepare_data.run(project)
    train_teacher.run(project, "big")
    assert (project.teacher_model("big") / "model.safetensors").read_bytes() == weights
    assert trained(tmp_path / "plain", None, data=data) != weights


def test_a_teacher_whose_transform_reads_another_file_is_trained_again(tmp_path):
    project = taught(tmp_path, {"factory": "own.py:shaded", "table": "table.txt"})
    for number, (content, is_new) in enumerate([("1", True), ("1", False), ("3", True)]):
        (tmp_path / "table.txt").write_text(content)
        if number == 0:
            prepare_data.run(project)
        assert bool(train_teacher.run(project, "big").skipped) is not is_new, content


@pytest.mark.parametrize(
    "transforms",
    [
        [{"factory": "kdpipe.transforms:PadAndCrop", "padding": 1}],
        [{"factory": "kdpipe.transforms:PadAndCrop", "padding": 1}, {"factory": "kdpipe.transforms:Mixup"}],
    ],
)
def test_each_epoch_of_a_teacher_is_another_view_that_no_store_holds(tmp_path, transforms):
    project = taught(tmp_path, views(*transforms)["transform"], views=views(*transforms))
    prepare_data.run(project)
    training, cached = project.views_of_training("big"), project.views()
    assert [training.view_of_epoch(epoch) for epoch in range(3)] == [1, 2, 3]
    assert training.seed != cached.seed
    train_teacher.run(project, "big")
    assert train_teacher.run(project, "big").skipped == "it was trained with these settings and rows before"


def test_other_code_of_its_transform_is_another_teacher(tmp_path):
    transform = {"factory": "kdpipe.transforms:PerExample", "function": "own.py:dim"}
    first = trained(tmp_path, transform)
    (tmp_path / "own.py").write_text(OWN.replace("3", "4"))
    assert not train_teacher.run(project_in(tmp_path), "big").skipped
    assert project_in(tmp_path).teacher_model("big").joinpath("model.safetensors").read_bytes() != first


def test_check_tries_the_transform_of_a_teachers_training(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    where = r"teachers.big.train.transform"
    taught(tmp_path, {"factory": "kdpipe.transforms:WordDropout"})
    assert f"{where}: WordDropout fails on image uint8" in fails(capsys, "check")
    taught(tmp_path, views({"factory": "kdpipe.transforms:PadAndCrop", "pading": 1})["transform"])
    assert f"{where}.transforms.0.pading: kdpipe.transforms:PadAndCrop does not take it" in fails(capsys, "check")
    taught(tmp_path, {"factory": "kdpipe.models.linear:Linear"})
    assert where in fails(capsys, "check")


def test_a_store_of_a_teacher_that_saw_rows_otherwise_is_told(tmp_path):
    """The code through which it saw them has changed since, and it has not learnt again yet."""
    train = {"factory": "kdpipe.transforms:PerExample", "function": "own.py:dim"}
    trained(tmp_path, train)
    cache(tmp_path)
    open_checked_store(project_in(tmp_path), "big")
    (tmp_path / "own.py").write_text(OWN.replace("3", "4"))
    with pytest.raises(StaleStoreError, match=r"was made from another \S+own\.py than today's, of which teachers\.big"):
        open_checked_store(project_in(tmp_path), "big")


@pytest.mark.parametrize("mixes", [True, False])
def test_who_was_mixed_with_whom_is_part_of_a_teacher(tmp_path, mixes):
    """Without rows between those that it learns from, these are in other blocks, and have other partners."""
    transform = views({"factory": "kdpipe.transforms:Mixup" if mixes else "kdpipe.transforms:PadAndCrop"})["transform"]
    projects = [taught(tmp_path / name, transform, evaluate={"split": "validation"}) for name in ("all", "fewer")]
    source = tmp_path / "fewer" / "data" / "raw" / "digits.parquet"
    table = pq.read_table(source)
    pq.write_table(table.filter(pc.not_equal(table["split"], "test")), source)
    for project in projects:
        prepare_data.run(project)
    one, other = (teacher_fingerprint(project, "big") for project in projects)
    assert (one != other) == mixes
    settings = yaml.safe_load((tmp_path / "all" / "params.yaml").read_text())
    settings["teachers"]["big"]["train"]["split"] = "trian"
    write_params(tmp_path / "all", settings)
    with pytest.raises(ConfigError, match=r"teachers\.big\.train\.split: there is no split 'trian'"):
        teacher_fingerprint(project_in(tmp_path / "all"), "big")


def test_rows_that_change_in_every_epoch_are_not_kept_on_a_device(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_project(tmp_path, views=views({"factory": "kdpipe.transforms:PadAndCrop"}))
    settings = yaml.safe_load((tmp_path / "params.yaml").read_text())
    settings["student"]["train"]["keep_on_device"] = True
    write_params(tmp_path, settings)
    assert "student.train.keep_on_device: rows that a transform changes" in fails(capsys, "check")
    del settings["student"]["train"]["keep_on_device"]
    settings["teachers"]["big"]["train"] |= {"keep_on_device": True, "transform": settings["views"]["transform"]}
    write_params(tmp_path, settings)
    assert "teachers.big.train.keep_on_device: rows that a transform changes" in fails(capsys, "check")


def test_rows_that_are_all_new_are_captured(tmp_path, capsys, monkeypatch):
    """None of those that the store keeps is among them."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.py").write_text(
        "import numpy as np\n\n\ndef speak(columns):\n    return columns['image'].reshape(-1, 64)[:, 20:30]\n"
    )
    function = {"teacher": {"factory": "kdpipe.teachers.ensemble:FunctionTeacher", "function": "own.py:speak"}}
    make_project(tmp_path, teachers={"big": function}, views=views({"factory": "kdpipe.transforms:PadAndCrop"}))
    for command in ("prepare-data", "cache-teacher"):
        assert run([command]) == 0
    settings = yaml.safe_load((tmp_path / "params.yaml").read_text())
    settings["data"]["columns"]["id"] = None
    write_params(tmp_path, settings)
    assert run(["prepare-data"]) == 0
    assert "has no targets for" in fails(capsys, "train-student")
    assert run(["cache-teacher"]) == 0
    assert run(["train-student"]) == 0
