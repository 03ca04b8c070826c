"""Three teachers of different kinds against the best of them: digits, labels for 150 rows, a hidden layer of 16."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.gains import LABELS_ONLY, Arm, accuracies, digits, report

PIXELS = {"factory": "kdpipe.preprocess:ImageTensor", "scale": 16}
OTHERS: dict[str, dict[str, Any]] = {
    "residual": {
        "model": {"factory": "kdpipe.models.resnet:ResNet", "depth": 8, "width": 8},
        "preprocess": PIXELS,
        "train": {"epochs": 30, "batch_size": 64, "learning_rate": 0.01, "weight_decay": 0.01, "threads": 1},
    },
    "linear": {
        "model": {"factory": "kdpipe.models.linear:Linear"},
        "preprocess": PIXELS,
        "train": {"epochs": 60, "batch_size": 64, "learning_rate": 0.01, "weight_decay": 0.01, "threads": 1},
    },
}
"""Beside the demo's `big`, a network of two hidden layers of 512."""


def settings(num_seeds: int, epochs: int, teacher_epochs: int | None = None) -> dict[str, Any]:
    """Those of `digits`, with three teachers."""
    found = digits.settings(num_seeds, epochs)
    found["teachers"] = {**found["teachers"], **OTHERS}
    found["targets"] = dict.fromkeys(found["teachers"], found["targets"]["big"])
    if teacher_epochs is not None:
        found["teachers"] = {
            name: {**each, "train": {**each["train"], "epochs": teacher_epochs}}
            for name, each in found["teachers"].items()
        }
    return found


def arm(name: str, teachers: Sequence[str], **mix: Any) -> Arm:
    """A student of one teacher, or of several as one."""
    loss = {"factory": "kdpipe.losses:ForwardKL", "teacher": list(teachers), "temperature": 4, "weight": 0.9, **mix}
    return Arm(name=name, changes={"student": {"losses": [loss]}})


def arms() -> list[Arm]:
    """Each teacher, all of them mixed in two ways, and all but one."""
    names = ["big", *OTHERS]
    without = [arm(f"mean of all but {name}", [each for each in names if each != name]) for name in names]
    return [
        *(arm(f"{name} alone", [name]) for name in names),
        arm("mean of all", names, mix="mean"),
        arm("all by confidence", names, mix="confidence"),
        *without,
    ]


def main(num_seeds: int = 40, epochs: int = 60, teacher_epochs: int | None = None, folder: Path | None = None) -> None:
    """Print the table."""
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        found = accuracies(Path(scratch), settings(num_seeds, epochs, teacher_epochs), arms())
    report(
        "digits, 150 labels, three teachers",
        found,
        [LABELS_ONLY, *(f"{name} alone" for name in ("big", *OTHERS))],
        began,
    )
