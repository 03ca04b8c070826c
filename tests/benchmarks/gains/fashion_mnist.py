"""Fashion-MNIST with labels for 1 %, 10 % and all rows: teacher and student of examples/fashion_mnist."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.gains import DATASETS, LABELS_ONLY, REPOSITORY, SMOOTHED, Arm, accuracies, report
from kdpipe.config import load_yaml

SHARES = (0.01, 0.1, 1.0)


def settings(num_seeds: int, epochs: int, teacher_epochs: int, path: Path) -> dict[str, Any]:
    """The example's settings, with more seeds."""
    found: dict[str, Any] = load_yaml(REPOSITORY / "examples" / "fashion_mnist" / "params.yaml")
    found["data"]["path"] = str(path)
    found["student"] |= {"seeds": num_seeds}
    found["student"]["train"] |= {"epochs": epochs}
    found["teachers"]["resnet"]["train"] |= {"epochs": teacher_epochs}
    return found


def main(
    num_seeds: int = 5,
    epochs: int = 30,
    teacher_epochs: int = 8,
    path: Path = DATASETS / "fashion_mnist" / "fashion_mnist.parquet",
    folder: Path | None = None,
) -> None:
    """Print a table per share of labels."""
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        for share in SHARES:
            began = time.perf_counter()
            changed = settings(num_seeds, epochs, teacher_epochs, path)
            changed["student"]["labelled_fraction"] = share
            found = accuracies(Path(scratch), changed, [Arm(name="cached targets")])
            report(f"Fashion-MNIST, labels for {share:.0%} of the rows", found, [LABELS_ONLY, SMOOTHED], began)
