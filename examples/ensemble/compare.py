"""What each of three teachers is worth beside the others: all of them mixed, each removed in turn, and each alone.

`python compare.py [DRAWS]` draws the labelled rows 5 times, and trains the boosting and the network with another seed
each time. It prints the table of README.md, and writes every value to comparison.json. It works below data/comparison,
and goes on where it stopped.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kdpipe.config import load_yaml
from kdpipe.evaluation import gain_text, mean_text
from kdpipe_stages import cache_teacher, evaluate, prepare_data, train_student, train_teacher
from kdpipe_stages.project import Project, write_project

HERE = Path(__file__).parent
ALL, LABELS_ONLY = "all three", "labels only"
METRICS = ("accuracy", "auc")
Found = dict[str, dict[str, list[float]]]
"""By metric and arm: one value per draw."""


class Draw:
    """The project of params.yaml in a folder of its own, with other labels and teachers of other seeds."""

    def __init__(self, number: int) -> None:
        self._folder = HERE / "data" / "comparison" / f"draw-{number}"
        self._params = load_yaml(HERE / "params.yaml")
        self._params["data"]["path"] = str((HERE / self._params["data"]["path"]).resolve())
        self._params["student"] |= {"labelled_seed": number, "seeds": 1}
        self.teachers = self._params["teachers"]
        self.teachers["boosting"]["teacher"]["estimator"]["random_state"] = number
        self.teachers["network"]["train"]["seed"] = number
        project = self._taught_by(list(self.teachers))
        prepare_data.run(project)
        for name in self.teachers:
            train_teacher.run(project, name)
            cache_teacher.run(project, name)

    def arms(self) -> dict[str, dict[str, Any]]:
        """What `evaluate` finds of every student, of labels only, and of the teachers where they speak."""
        names = list(self.teachers)
        every = self._metrics(names)
        found = {LABELS_ONLY: every["baseline"], ALL: every["student"]}
        found |= {f"without {out}": self._metrics([each for each in names if each != out])["student"] for out in names}
        alone = {name: self._metrics([name]) for name in names}
        found |= {f"{name} alone": metrics["student"] for name, metrics in alone.items()}
        return found | {f"({name} itself)": metrics["teacher"] for name, metrics in alone.items()}

    def _metrics(self, names: Sequence[str]) -> dict[str, Any]:
        project = self._taught_by(names)
        train_student.run(project)
        return evaluate.run(project)

    def _taught_by(self, names: Sequence[str]) -> Project:
        student = self._params["student"]
        losses = [loss | {"teacher": list(names)} for loss in student["losses"]]
        params = self._params | {"student": student | {"losses": losses}}
        return write_project(params, self._folder, [HERE / "rules.yaml"])


def compare(draws: int) -> Found:
    """Every metric of every arm, draw by draw."""
    found: Found = {metric: {} for metric in METRICS}
    for number in range(draws):
        for arm, metrics in Draw(number).arms().items():
            for metric, values in found.items():
                values.setdefault(arm, []).append(metrics[metric])
        print(f"draw {number + 1} of {draws}", file=sys.stderr)
    return found


def show(found: Found) -> None:
    """The table of README.md: % of the test rows, mean ± standard deviation over draws; points, 95 % interval."""
    for metric, values in found.items():
        print(f"| {metric} of the student of | | over labels only | over all three |")
        for arm, of in values.items():
            gains = [gain_text(of, values[other]) if arm != other else "" for other in (LABELS_ONLY, ALL)]
            print("| " + " | ".join([arm, mean_text(of), *gains]) + " |")


if __name__ == "__main__":
    found = compare(int(sys.argv[1]) if len(sys.argv) > 1 else 5)
    (HERE / "comparison.json").write_text(json.dumps(found, indent=1) + "\n")
    show(found)
