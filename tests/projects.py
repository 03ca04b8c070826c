"""Small real projects in a folder: scikit-learn's digits, a params.yaml, quick models; and what tests do with one."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from kdpipe_stages import cache_teacher, prepare_data, train_teacher
from kdpipe_stages.cache_teacher import Cached
from kdpipe_stages.cli import run
from kdpipe_stages.project import Project

REPOSITORY = Path(__file__).parents[1]
DIGITS = REPOSITORY / "data" / "raw" / "digits.parquet"

# A teacher that writes down how many rows it is shown, and takes its time over each batch.
LOGGING_TEACHER = """
import os
import time
from pathlib import Path

import torch

LOG = Path(__file__).with_name("calls.log")


class Teacher(torch.nn.Module):
    def __init__(self, input_shape, num_classes):
        super().__init__()
        self.head = torch.nn.Linear(64, num_classes)

    def forward(self, inputs):
        if not self.training and torch.is_inference_mode_enabled():
            with LOG.open("a") as log:
                log.write(f"{len(inputs)}\\n")
            time.sleep(float(os.environ.get("TEACHER_SECONDS", "0")))
        return self.head(inputs.flatten(1))
"""


def params(**sections: Any) -> dict[str, Any]:
    """A params.yaml with quick settings; keyword arguments replace whole sections."""
    pixels = {"factory": "kdpipe.preprocess:ImageTensor", "scale": 16}
    teacher = {
        "model": {"factory": "teacher.py:Teacher"},
        "preprocess": pixels,
        "train": {"epochs": 2, "batch_size": 128, "learning_rate": 0.01},
    }
    student = {
        "model": {"factory": "kdpipe.models.mlp:MLP", "hidden": [8]},
        "preprocess": pixels,
        "labelled_rows": 150,
        "losses": [{"factory": "kdpipe.losses:ForwardKL", "teacher": "big", "temperature": 4, "weight": 0.9}],
        "label_weight": 0.1,
        "train": {"epochs": 2, "batch_size": 64, "learning_rate": 0.01},
        "seeds": 2,
        "baselines": ["labels_only"],
    }
    whole = {
        "data": {
            "source": {"factory": "kdpipe.data.sources:Table"},
            "path": "data/raw/digits.parquet",
            "columns": {"id": "id", "label": "label", "split": "split"},
        },
        "task": {
            "factory": "kdpipe.tasks.image:ImageClassification",
            "num_classes": 10,
            "shape": [8, 8, 1],
        },
        "teachers": {"big": teacher},
        "targets": {"big": {"batch_size": 64}},
        "student": student,
    }
    return whole | sections


def make_project(folder: Path, **sections: Any) -> Path:
    """A project in `folder`; returns its params.yaml."""
    (folder / "data" / "raw").mkdir(parents=True, exist_ok=True)
    shutil.copyfile(DIGITS, folder / "data" / "raw" / "digits.parquet")
    (folder / "teacher.py").write_text(LOGGING_TEACHER)
    return write_params(folder, params(**sections))


def write_params(folder: Path, value: dict[str, Any]) -> Path:
    """Write params.yaml."""
    path = folder / "params.yaml"
    path.write_text(yaml.safe_dump(value, sort_keys=False))
    return path


def project_in(folder: Path) -> Project:
    """The project of a folder."""
    return Project(folder / "params.yaml")


def cache(folder: Path, **options: Any) -> Cached:
    """Every stage up to the complete store of teacher `big`; `options` are those of `cache-teacher`."""
    project = project_in(folder)
    prepare_data.run(project)
    train_teacher.run(project, "big")
    return cache_teacher.run(project, "big", **options)


def fails(capsys: pytest.CaptureFixture[str], *arguments: str, status: int = 1) -> str:
    """Run a command that must fail; returns its message."""
    capsys.readouterr()
    assert run(arguments) == status
    message = capsys.readouterr().err
    assert status == 2 or message.startswith("error: ")
    assert "Traceback" not in message
    return message


def digits(folder: Path) -> pa.Table:
    """The project's source."""
    return pq.read_table(folder / "data" / "raw" / "digits.parquet")


def replace_digits(folder: Path, table: pa.Table) -> None:
    """Write another source."""
    pq.write_table(table, folder / "data" / "raw" / "digits.parquet")


def with_column(table: pa.Table, name: str, values: list[Any]) -> pa.Table:
    """A table with other values in one column."""
    return table.set_column(table.schema.get_field_index(name), name, pa.array(values, table.schema.field(name).type))


def rows_shown(folder: Path) -> int:
    """How many rows the logging teacher was shown so far, while caching."""
    log = folder / "calls.log"
    return sum(int(line) for line in log.read_text().split()) if log.exists() else 0


def forget_rows_shown(folder: Path) -> None:
    """Start counting anew."""
    (folder / "calls.log").unlink(missing_ok=True)


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder: relative path -> bytes."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
