"""The student's coefficients as a table, the largest first: `python coefficients.py` writes coefficients.csv.

A coefficient is what an input adds to the log odds of the second class: of a number per standard deviation, of a
category where it holds. The mean over seeds, and the standard deviation between them (0 for one seed).
"""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file

from kdpipe.errors import ConfigError
from kdpipe_stages.building import WEIGHTS, describe_model
from kdpipe_stages.cli import plain_errors
from kdpipe_stages.project import Project

FILE = "coefficients.csv"


def coefficients(project: Project, seed: int) -> dict[str, float]:
    """By input, and `intercept`: the weights of the second class less those of the first.

    Raises `ConfigError` for a student that is no logistic regression of two classes on named inputs.
    """
    folder = project.student_models / "student" / f"seed-{seed}"
    task = project.task()
    encoder = project.preprocess(project.params.student.preprocess, task, "student.preprocess")
    note, weights = describe_model(folder, "kdpipe train-student"), load_file(folder / WEIGHTS)
    if set(weights) != {"head.weight", "head.bias"} or task.num_classes != 2 or not hasattr(encoder, "feature_names"):
        raise ConfigError(
            "student: coefficients are those of kdpipe.models.linear:Linear behind a ColumnEncoder, of two classes; "
            f"found {project.params.student.model.path} of {task.num_classes} classes"
        )
    encoder.load_state(note["preprocess_state"])
    values = [*_second_over_first(weights["head.weight"]), _second_over_first(weights["head.bias"])]
    return dict(zip([*encoder.feature_names(), "intercept"], map(float, values), strict=True))


def write(project: Project) -> None:
    """Write `FILE`: feature, coefficient, std."""
    seeds = [coefficients(project, seed) for seed in range(project.params.student.seeds)]
    values = np.array([list(each.values()) for each in seeds])
    std = values.std(axis=0, ddof=min(1, len(seeds) - 1))
    rows = zip(seeds[0], values.mean(axis=0).tolist(), std.tolist(), strict=True)
    with (project.root / FILE).open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["feature", "coefficient", "std"])
        for name, *numbers in sorted(rows, key=lambda row: -abs(row[1])):
            writer.writerow([name, *(f"{each:.4f}" for each in numbers)])


def _second_over_first(values: NDArray[np.float32]) -> NDArray[np.float32]:
    difference: NDArray[np.float32] = values[1] - values[0]
    return difference


if __name__ == "__main__":
    with plain_errors():
        write(Project(Path(__file__).with_name("params.yaml")))
