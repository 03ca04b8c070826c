"""What the table is worth to the student, and what the graph network itself knows, with 30, 100 and 500 labels.

`python compare.py [DRAWS]`, after `python digits.py`, draws the labelled rows 10 times; network and student both learn
anew from each draw. It prints the table of README.md, and writes every accuracy to comparison.json. It works below
data/comparison, and goes on where it stopped.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from graph_network import write

from kdpipe.config import load_yaml
from kdpipe.evaluation import gain_text, mean_text
from kdpipe_stages import cache_teacher, evaluate, prepare_data, train_student, train_teacher
from kdpipe_stages.project import Project, write_project

HERE = Path(__file__).parent
TRAIN: Mapping[int, Mapping[str, float]] = {
    30: {},
    100: {"learning_rate": 0.003},
    500: {"learning_rate": 0.003, "weight_decay": 1.0},
}
"""By number of labels: the settings that README.md tells the choice of."""
ARMS = {"teacher": "teacher", "student": "student", "labels only": "baseline"}
Found = dict[str, dict[str, list[float]]]
"""By number of labels and arm: one accuracy per draw."""


def project_of(labels: int, draw: int) -> Project:
    """The project of params.yaml in a folder of its own, with other labels."""
    params: dict[str, Any] = load_yaml(HERE / "params.yaml")
    params["data"]["path"] = str((HERE / params["data"]["path"]).resolve())
    train = params["student"]["train"] | TRAIN[labels]
    params["student"] |= {"labelled_rows": labels, "labelled_seed": draw, "seeds": 1, "train": train}
    return write_project(params, HERE / "data" / "comparison")


def metrics(project: Project, draw: int) -> dict[str, Any]:
    """What `evaluate` finds of a network of its own and the student that learns from its table."""
    prepare_data.run(project)
    write(project, seed=draw)
    train_teacher.run(project, "graph")
    cache_teacher.run(project, "graph")
    train_student.run(project)
    return evaluate.run(project)


def compare(draws: int) -> Found:
    """Accuracies of every arm, draw by draw."""
    found: Found = {str(labels): {arm: [] for arm in ARMS} for labels in TRAIN}
    for labels in TRAIN:
        for draw in range(draws):
            here = metrics(project_of(labels, draw), draw)
            for arm, key in ARMS.items():
                found[str(labels)][arm].append(here[key]["accuracy"])
            print(f"{labels} labels, draw {draw + 1} of {draws}", file=sys.stderr)
    return found


def show(found: Found) -> None:
    """The table of README.md: % of the test rows, mean ± standard deviation over draws; points, 95 % interval."""
    print("| labels | " + " | ".join(ARMS) + " | gain | over the teacher |")
    for labels, row in found.items():
        gains = [gain_text(row["student"], row[other], digits=1) for other in ("labels only", "teacher")]
        print("| " + " | ".join([labels, *(mean_text(of, digits=1) for of in row.values()), *gains]) + " |")


if __name__ == "__main__":
    found = compare(int(sys.argv[1]) if len(sys.argv) > 1 else 10)
    (HERE / "comparison.json").write_text(json.dumps(found, indent=1) + "\n")
    show(found)
