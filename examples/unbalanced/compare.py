"""What makes up for rare classes: every way with cached targets and without, with labels for all rows and for 1 %.

`python compare.py` prints the tables of README.md; every accuracy is in comparison.json. It works in data/comparison,
and goes on where it stopped.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kdpipe.config import load_yaml
from kdpipe.errors import ConfigError
from kdpipe.evaluation import gain_text, mean_text
from kdpipe_stages import cache_teacher, evaluate, prepare_data, train_student, train_teacher
from kdpipe_stages.project import Project, write_project

HERE = Path(__file__).parent
SHARES = (1.0, 0.01)
TEACHERS: Mapping[str, Mapping[str, Any]] = {"plain teacher": {}, "adjusted teacher": {"logit_adjustment": 1.0}}
PLAIN = "plain"
WAYS: Mapping[str, Mapping[str, Any]] = {
    PLAIN: {},
    "class weights": {"class_weights": "balanced"},
    "logit adjustment": {"logit_adjustment": 1.0},
    "balanced sampling": {"sampling": "balanced"},
    "balanced KD": {},
}
BALANCED_KD = {"factory": "kdpipe.losses:BalancedKL", "teacher": "resnet", "temperature": 2, "weight": 0.9}
OURS = ("logit_adjustment", "class_weights", "sampling")


class Comparison:
    """The project of params.yaml in a folder of its own, again and again with other settings."""

    def __init__(self) -> None:
        self._folder = HERE / "data" / "comparison"
        self._params = load_yaml(HERE / "params.yaml")
        self._params["data"]["path"] = str((HERE / self._params["data"]["path"]).resolve())

    def accuracies(self, teacher: str, share: float, way: str) -> dict[str, list[float]]:
        """By arm, one per seed; and the teacher's. Raises `ConfigError` where a way does not serve such labels."""
        project = self._project(teacher, share, way)
        prepare_data.run(project)
        train_teacher.run(project, "resnet")
        cache_teacher.run(project, "resnet")
        train_student.run(project)
        metrics = evaluate.run(project)
        per_seed = json.loads((self._folder / "per_seed.json").read_text())
        found = {arm: [each["accuracy"] for each in per_seed[arm]] for arm in ("student", "baseline")}
        return found | {"teacher": [metrics["teacher"]["accuracy"]]}

    def _project(self, teacher: str, share: float, way: str) -> Project:
        params, student = self._params, self._params["student"]
        resnet = params["teachers"]["resnet"]
        of_teacher = _without(resnet["train"]) | TEACHERS[teacher]
        changes = {
            "labelled_fraction": share,
            "train": _without(student["train"]) | WAYS[way],
            "losses": [BALANCED_KD] if way == "balanced KD" else student["losses"],
        }
        teachers = {"resnet": resnet | {"train": of_teacher}}
        changed = params | {"teachers": teachers, "student": student | changes}
        return write_project(changed, self._folder, [HERE / "long_tail.py"])


def _without(train: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in train.items() if key not in OURS}


def compare() -> dict[str, Any]:
    """Accuracies by teacher, share of labels, way and arm; or why a way was refused."""
    comparison, found = Comparison(), {}
    for teacher in TEACHERS:
        for share in SHARES:
            for way in WAYS:
                print(f"{teacher}, labels for {share:.0%}: {way}", file=sys.stderr)
                try:
                    here: Any = comparison.accuracies(teacher, share, way)
                except ConfigError as error:
                    here = str(error)
                found[f"{teacher} | {share:.0%} | {way}"] = here
    return found


def show(found: Mapping[str, Any]) -> None:
    """The tables of README.md: % of the test rows, mean ± standard deviation over seeds; points, 95 % interval."""
    print("| teacher | labels | way | labels only | from cached targets | gain over labels only | gain over plain KD |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for name, here in found.items():
        teacher, share, way = name.split(" | ")
        if isinstance(here, str):
            print(f"| {teacher} | {share} | {way} | refused: {here} | | | |")
            continue
        plain = found[f"{teacher} | {share} | {PLAIN}"]["student"]
        cells = [mean_text(here["baseline"]), mean_text(here["student"]), gain_text(here["student"], here["baseline"])]
        cells.append("" if way == PLAIN else gain_text(here["student"], plain))
        print(f"| {teacher}, {100 * here['teacher'][0]:.2f} % | {share} | {way} | {' | '.join(cells)} |")


if __name__ == "__main__":
    comparison = compare()
    (HERE / "comparison.json").write_text(json.dumps(comparison, indent=1) + "\n")
    show(comparison)
