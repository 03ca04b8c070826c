"""CIFAR-10 under augmentation, on rows that the teacher has not learnt: what it says of them is no echo of labels."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.gains import DATASETS, cifar10_views
from benchmarks.gains.cifar10_views import arms_of, compare, settings, some_rows

TEACHERS_OWN = "teacher"


def dealt(path: Path, num_rows: int, written: Path) -> Path:
    """The rows of `some_rows` for twice `num_rows`, of which every second one of `train` is the teacher's."""
    table = pq.read_table(some_rows(path, 2 * num_rows, written))
    split = np.array(table["split"].to_pylist(), object)
    split[np.flatnonzero(split == "train")[1::2]] = TEACHERS_OWN
    column = table.schema.get_field_index("split")
    pq.write_table(table.set_column(column, "split", pa.array(split.tolist())), written)
    return written


def main(
    num_seeds: int = 5,
    epochs: int = 16,
    teacher_epochs: int = 16,
    num_rows: int = 8000,
    path: Path = DATASETS / "cifar10_jpeg" / "cifar10_jpeg.parquet",
    folder: Path | None = None,
    augmented: bool = False,
) -> None:
    """Print the table: the settings of `cifar10_views`, but for whose rows the teacher learns from.

    An `augmented` teacher is trained under the students' augmentation.
    """
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        rows = dealt(path, num_rows, Path(scratch) / "rows.parquet")
        base = settings(num_seeds, epochs, teacher_epochs, rows)
        base["teachers"]["resnet"]["train"]["split"] = TEACHERS_OWN
        if augmented:
            base["teachers"]["resnet"]["train"]["transform"] = base["views"]["transform"]
        arms = arms_of((cifar10_views.VIEWS[0], cifar10_views.VIEWS[-1]))
        title = f"CIFAR-10, {num_rows:,} rows that the teacher has not learnt"
        title += ", augmented as it is used to" if augmented else ""
        compare(title, Path(scratch) / "project", base, arms, began)
