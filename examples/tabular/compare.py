"""What the network is worth to a logistic regression that knows 1 %, 10 % or all of its rows' labels.

`python compare.py [DRAWS]` parts the rows between teacher and student anew 5 times, with another teacher and other
labels each time, and prints the table of README.md; every value is in comparison.json. It works below
data/comparison, and goes on where it stopped.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kdpipe.config import load_yaml
from kdpipe.evaluation import gain_text, mean_text
from kdpipe_stages import cache_teacher, evaluate, prepare_data, train_student, train_teacher
from kdpipe_stages.project import Project, write_project

HERE = Path(__file__).parent
TRAIN: Mapping[float, Mapping[str, float]] = {
    0.01: {"learning_rate": 0.003, "weight_decay": 3.0},
    0.1: {"learning_rate": 0.01, "weight_decay": 1.0},
    1.0: {"learning_rate": 0.03, "weight_decay": 0.1},
}
"""By share of the labels: the settings that README.md tells the choice of."""
METRICS = ("accuracy", "balanced_accuracy", "auc")
ARMS = {"teacher": "teacher", "student": "student", "labels only": "baseline"}
Found = dict[str, dict[str, dict[str, list[float]]]]
"""By share of the labels, metric and arm: one value per draw."""


class Draw:
    """The project of params.yaml in a folder of its own, with rows parted anew, another teacher and other labels."""

    def __init__(self, number: int) -> None:
        self._folder = HERE / "data" / "comparison" / f"draw-{number}"
        self._params = load_yaml(HERE / "params.yaml")
        data, student = self._params["data"], self._params["student"]
        data["path"] = str((HERE / data["path"]).resolve())
        data["source"]["seed"] = data["splits"]["seed"] = student["labelled_seed"] = number
        self._params["teachers"]["network"]["train"]["seed"] = number
        project = self._with()
        prepare_data.run(project)
        train_teacher.run(project, "network")
        cache_teacher.run(project, "network")

    def metrics(self, share: float, **train: float) -> dict[str, Any]:
        """What `evaluate` finds where the student knows a share of the labels, with other settings of its training."""
        project = self._with(labelled_fraction=share, train=self._params["student"]["train"] | train)
        train_student.run(project)
        return evaluate.run(project)

    def _with(self, **changes: Any) -> Project:
        student = self._params["student"] | {"seeds": 1} | changes
        return write_project(self._params | {"student": student}, self._folder, [HERE / "adult.py"])


def compare(draws: int) -> Found:
    """Every metric of every arm, draw by draw."""
    found: Found = {f"{share:.0%}": {metric: {arm: [] for arm in ARMS} for metric in METRICS} for share in TRAIN}
    for number in range(draws):
        draw = Draw(number)
        for share, train in TRAIN.items():
            metrics = draw.metrics(share, **train)
            for metric, values in found[f"{share:.0%}"].items():
                for arm, key in ARMS.items():
                    values[arm].append(metrics[key][metric])
        print(f"draw {number + 1} of {draws}", file=sys.stderr)
    return found


def show(found: Found) -> None:
    """The table of README.md: % of the test rows, mean ± standard deviation over draws; points, 95 % interval."""
    print("| labels | | " + " | ".join(ARMS) + " | gain |")
    for share, metrics in found.items():
        for metric, values in metrics.items():
            cells = [share, metric, *(mean_text(of) for of in values.values())]
            print("| " + " | ".join([*cells, gain_text(values["student"], values["labels only"])]) + " |")


if __name__ == "__main__":
    found = compare(int(sys.argv[1]) if len(sys.argv) > 1 else 5)
    (HERE / "comparison.json").write_text(json.dumps(found, indent=1) + "\n")
    show(found)
