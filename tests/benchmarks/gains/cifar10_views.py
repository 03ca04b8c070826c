"""CIFAR-10 under augmentation: targets of 1, 4 and 16 cached views, those of the clean row, and labels alone."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.gains import DATASETS, LABELS_ONLY, Arm, accuracies, report
from kdpipe.batches import TargetsByOutput
from kdpipe.order import Group
from kdpipe.store import TargetStore
from kdpipe.store.aligned import AlignedTargets
from kdpipe_stages import cache_teacher, prepare_data, train_teacher
from kdpipe_stages.project import write_project

VIEWS = (16, 4, 1)
CLEAN = "16 views seen, targets of the clean row"
SEEN = [{"factory": "kdpipe.transforms:PadAndCrop", "padding": 4}, {"factory": "kdpipe.transforms:Flip"}]


class CleanTargets(AlignedTargets):
    """What is often done: whatever view the student sees, the targets are those of the row as it is."""

    def read(self, rows: np.ndarray, view: int = 0) -> TargetsByOutput:
        return super().read(rows, 0)

    def read_ahead(self, groups: Iterable[tuple[int, Group]]) -> Iterator[TargetsByOutput]:
        return super().read_ahead((0, group) for _, group in groups)


@contextmanager
def clean_targets() -> Iterator[None]:
    """Students trained meanwhile get the clean rows' targets."""
    with patch("kdpipe_stages.train_student.AlignedTargets", CleanTargets):
        yield


def settings(num_seeds: int, epochs: int, teacher_epochs: int, path: Path) -> dict[str, Any]:
    """A residual network of 696,618 parameters teaches one of 78,042; labels for a tenth of the rows."""
    pixels = {"factory": "kdpipe.preprocess:ImageTensor"}
    optimise = {"batch_size": 128, "optimizer": "sgd", "weight_decay": 0.0005, "precision": "bfloat16", "threads": 1}
    return {
        "data": {
            "source": {"factory": "kdpipe.data.sources:Table"},
            "path": str(path),
            "columns": {"id": "id", "label": "label", "split": "split"},
            "splits": {"validation_fraction": 0.1, "seed": 0},
        },
        "task": {
            "factory": "kdpipe.tasks.image:ImageClassification",
            "num_classes": 10,
            "column": "image",
            "shape": [32, 32, 3],
        },
        "teachers": {
            "resnet": {
                "model": {"factory": "kdpipe.models.resnet:ResNet", "depth": 14, "width": 32, "stem_stride": 2},
                "preprocess": pixels,
                "train": {**optimise, "epochs": teacher_epochs, "learning_rate": 0.1},
            }
        },
        "targets": {"resnet": {"temperatures": [1, 2], "threads": 1}},
        "views": {
            "count": VIEWS[0],
            "seed": 17,
            "splits": ["train"],
            "transform": {"factory": "kdpipe.transforms:Compose", "transforms": SEEN},
        },
        "student": {
            "model": {"factory": "kdpipe.models.resnet:ResNet", "depth": 8, "width": 16, "stem_stride": 2},
            "preprocess": pixels,
            "distil_on": ["train"],
            "labelled_fraction": 0.1,
            "losses": [
                {"factory": "kdpipe.losses:ForwardKL", "teacher": "resnet", "temperature": 2, "weight": 0.9},
            ],
            "label_weight": 0.1,
            "train": {**optimise, "epochs": epochs, "learning_rate": 0.1},
            "seeds": num_seeds,
            "baselines": ["labels_only", "label_smoothing"],
        },
        "evaluate": {"split": "test"},
    }


def some_rows(path: Path, num_rows: int, written: Path) -> Path:
    """The first rows of the data's split `train`, and all of `test`, as a file of its own."""
    table = pq.read_table(path)
    is_train = np.array(table["split"].to_pylist()) == "train"
    wanted = ~is_train | (np.cumsum(is_train) <= num_rows)
    pq.write_table(table.filter(pa.array(wanted)), written)
    return written


def echo(folder: Path, base: dict[str, Any]) -> str:
    """How often the teacher is right about the rows that students learn from: as they are, and as view 1 shows them."""
    project = write_project({**base, "views": {**base["views"], "count": 1}}, folder)
    prepare_data.run(project)
    train_teacher.run(project, "resnet")
    cache_teacher.run(project, "resnet")
    data, store = project.prepared_data(), TargetStore.open(project.store("resnet"))
    rows = data.rows_of(project.params.student.distil_on)
    clean, view = (np.mean(store.statistics(rows, view)["top1"] == data.labels[rows]) for view in (0, 1))
    return f"The teacher is right about {clean:.1%} of the {len(rows):,} training rows, and of view 1 {view:.1%}."


def arms_of(counts: Sequence[int]) -> list[Arm]:
    """Students of so many cached views; and of the targets of the clean row, whatever view they see."""
    arms = [Arm(name=f"{count} cached views", changes={"views": {"count": count}}) for count in counts]
    # The smoothing is the baselines', so no number changes by it, but these students are trained anew.
    return [*arms, Arm(name=CLEAN, changes={"student": {"label_smoothing": 0.11}}, during=clean_targets)]


def compare(title: str, folder: Path, base: dict[str, Any], arms: Sequence[Arm], began: float) -> None:
    """Print the table of the arms, and what the teacher knows of the rows that they learn from."""
    found = accuracies(folder, base, arms)
    said = echo(folder, base)
    report(title, found, [LABELS_ONLY, CLEAN], began)
    print(said)


def main(
    num_seeds: int = 5,
    epochs: int = 16,
    teacher_epochs: int = 16,
    num_rows: int = 8000,
    path: Path = DATASETS / "cifar10_jpeg" / "cifar10_jpeg.parquet",
    folder: Path | None = None,
) -> None:
    """Print the table; few rows and epochs, as there is only a CPU."""
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        rows = some_rows(path, num_rows, Path(scratch) / "rows.parquet")
        base = settings(num_seeds, epochs, teacher_epochs, rows)
        arms = [*arms_of(VIEWS), Arm(name="no views, targets of the clean row", changes={"views": {"count": 0}})]
        compare(f"CIFAR-10, {num_rows:,} rows, labels for 10 %", Path(scratch) / "project", base, arms, began)
