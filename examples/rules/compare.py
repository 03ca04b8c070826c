"""What rules are worth at 20, 100 and all labels: as targets, by vote and by label model, and as first weights.

`python compare.py [DRAWS]` splits the passengers and draws labels anew 20 times, and prints the tables of README.md;
every accuracy is in comparison.json. It works below data/comparison, and goes on where it stopped.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from initial_weights import FILE, write_weights

from kdpipe.config import load_yaml
from kdpipe.evaluation import gain_text, mean_text
from kdpipe.store import TargetStore
from kdpipe_stages import cache_teacher, evaluate, prepare_data, train_student, train_teacher
from kdpipe_stages.project import Project, write_project

HERE = Path(__file__).parent
LABELS = (20, 100, None)
VOTE, LABEL_MODEL = "rules", "learnt"
BEGINNINGS: Mapping[str, Mapping[str, Any]] = {
    "zero": {"init_from": None},
    "rules": {"init_from": str(FILE), "train": {"learning_rate": 0.003, "weight_decay": 0.0}},
}
ARMS = ("labels only", "vote", "label model")


class Draw:
    """The project of params.yaml in a folder of its own, with other splits and other labels."""

    def __init__(self, number: int) -> None:
        self._folder = HERE / "data" / "comparison" / f"draw-{number}"
        self._params = load_yaml(HERE / "params.yaml")
        data, student = self._params["data"], self._params["student"]
        data["path"] = str((HERE / data["path"]).resolve())
        data["splits"]["seed"] = student["labelled_seed"] = number
        self._project = self._with()
        prepare_data.run(self._project)
        for name in (VOTE, LABEL_MODEL):
            train_teacher.run(self._project, name)
            cache_teacher.run(self._project, name)
        write_weights(self._project)

    def coverage(self) -> float:
        """Share of the test rows that a rule votes about."""
        data = self._project.prepared_data()
        rows = data.rows_of([self._project.params.evaluate.split])
        covered = TargetStore.open(self._project.store(VOTE)).targets(data.inputs.sample_ids[rows].tolist()).covered
        assert covered is not None
        return float(covered.float().mean())

    def accuracies(self, labels: int | None, beginning: str) -> dict[str, float]:
        """By arm, and by teacher (on the rows that rules vote about), on the test split."""
        found: dict[str, float] = {}
        for arm, teacher, baselines in (("vote", VOTE, ["labels_only"]), ("label model", LABEL_MODEL, [])):
            changes = BEGINNINGS[beginning]
            train = self._params["student"]["train"] | changes.get("train", {})
            losses = [each | {"teacher": teacher} for each in self._params["student"]["losses"]]
            given = {**changes, "train": train, "losses": losses, "labelled_rows": labels, "baselines": baselines}
            project = self._with(**given)
            train_student.run(project)
            metrics = evaluate.run(project)
            found |= {arm: metrics["student"]["accuracy"], f"{arm} itself": metrics["teacher"]["accuracy"]}
            if baselines:
                found["labels only"] = metrics["baseline"]["accuracy"]
        return found

    def _with(self, **changes: Any) -> Project:
        student = self._params["student"] | {"seeds": 1} | changes
        return write_project(self._params | {"student": student}, self._folder, [HERE / "rules.yaml"])


def compare(draws: int) -> dict[str, Any]:
    """Accuracies by number of labels and beginning, a list of one per draw for each arm; and of the rules alone."""
    students: dict[str, dict[str, list[float]]] = {}
    alone: dict[str, list[float]] = {"coverage": [], "vote": [], "label model": []}
    for number in range(draws):
        draw = Draw(number)
        alone["coverage"].append(draw.coverage())
        for labels in LABELS:
            for beginning in BEGINNINGS:
                found = draw.accuracies(labels, beginning)
                row = students.setdefault(f"{labels or 'all'} labels, from {beginning}", {arm: [] for arm in ARMS})
                for arm in ARMS:
                    row[arm].append(found[arm])
        alone["vote"].append(found["vote itself"])
        alone["label model"].append(found["label model itself"])
        print(f"draw {number + 1} of {draws}", file=sys.stderr)
    return {"students": students, "rules alone": alone}


def show(comparison: Mapping[str, Any]) -> None:
    """The tables of README.md: % of the test rows, mean ± standard deviation over draws; points, 95 % interval."""
    for name, values in comparison["rules alone"].items():
        print(f"{name}: {mean_text(values, digits=1)}")
    print("\n| | labels only | vote, gain | label model, gain |")
    for name, row in comparison["students"].items():
        only = row["labels only"]
        cells = [name, mean_text(only, digits=1)]
        for arm in ARMS[1:]:
            cells.append(f"{mean_text(row[arm], digits=1)}, {gain_text(row[arm], only, digits=1)}")
        print("| " + " | ".join(cells) + " |")
    print("\nfirst weights from the rules over zero:")
    for labels in LABELS:
        zero, rules = (comparison["students"][f"{labels or 'all'} labels, from {each}"] for each in BEGINNINGS)
        gains = [gain_text(rules[arm], zero[arm], digits=1) for arm in ARMS]
        print("| " + " | ".join([str(labels or "all"), *gains]) + " |")


if __name__ == "__main__":
    comparison = compare(int(sys.argv[1]) if len(sys.argv) > 1 else 20)
    (HERE / "comparison.json").write_text(json.dumps(comparison, indent=1) + "\n")
    show(comparison)
