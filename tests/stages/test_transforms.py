"""Built-in transforms named in params.yaml: checked, cached, trained on, and part of the store's fingerprint."""

from __future__ import annotations

import re
from importlib.metadata import version

import pytest

from kdpipe.errors import StaleStoreError
from kdpipe.store import TargetStore
from kdpipe_stages import train_student
from kdpipe_stages.cli import run
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
