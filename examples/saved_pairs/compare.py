"""What a student learns from pairs on synthetic inputs, beside pairs on real ones: `python compare.py [DRAWS]`.

Each of 5 draws parts the rows anew, trains another network and makes other pairs; the tables of README.md are printed,
and every value is in comparison.json. It works below data/comparison, and goes on where it stopped.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from save_pairs import FILE, save, settings_in

from kdpipe.config import load_yaml
from kdpipe.evaluation import mean_text, paired_gain
from kdpipe_stages import cache_teacher, evaluate, prepare_data, train_student, train_teacher
from kdpipe_stages.project import Project, write_project

HERE = Path(__file__).parent
REAL = "real"
METRICS = {"accuracy": 100, "agreement": 100, "kl_to_teacher": 1000, "reverse_kl_to_teacher": 1000, "entropy": 1000}
"""Metric -> what it is multiplied by: percent, and thousandths of a nat."""
Found = dict[str, dict[str, list[float]]]
"""By arm and metric: one value per draw."""


class Draw:
    """The project of params.yaml in a folder of its own, about other pairs."""

    def __init__(self, number: int) -> None:
        self._folder = HERE / "data" / "comparison" / f"draw-{number}"
        self._folder.mkdir(parents=True, exist_ok=True)
        self._params = load_yaml(HERE / "params.yaml")
        settings = settings_in(HERE) | {"seed": number}
        self.inputs = [REAL, *settings["synthetic"]]
        save(settings, self._folder / FILE)
        project = self._with()
        prepare_data.run(project)
        train_teacher.run(project, "network")
        cache_teacher.run(project, "network")

    def metrics(self, inputs: str, all_columns: bool = False) -> dict[str, Any]:
        """What `evaluate` finds of a student that learnt from pairs on these inputs."""
        changes = {"preprocess": {"factory": "kdpipe.preprocess:Standardize"}} if all_columns else {}
        project = self._with(distil_on=[inputs], **changes)
        train_student.run(project)
        return evaluate.run(project)

    def _with(self, **changes: Any) -> Project:
        student = self._params["student"] | {"seeds": 1} | changes
        return write_project(self._params | {"student": student}, self._folder, [HERE / "chosen.py"])


def compare(draws: int) -> Found:
    """Every metric of every student and of the network, draw by draw."""
    found: Found = {}
    for number in range(draws):
        draw = Draw(number)
        arms = {inputs: draw.metrics(inputs) for inputs in draw.inputs}
        students = {name: metrics["student"] for name, metrics in arms.items()}
        students["real, all columns"] = draw.metrics(REAL, all_columns=True)["student"]
        for name, metrics in {"network": arms[REAL]["teacher"], **students}.items():
            for metric in METRICS:
                found.setdefault(name, {each: [] for each in METRICS})[metric].append(metrics[metric])
        print(f"draw {number + 1} of {draws}", file=sys.stderr)
    return found


def show(found: Found) -> None:
    """The tables of README.md: mean ± standard deviation over draws, and differences to `real` with 95 % intervals."""
    print("| | " + " | ".join(METRICS) + " |")
    for name, of in found.items():
        print("| " + " | ".join([name, *(mean_text(of[metric], scale) for metric, scale in METRICS.items())]) + " |")
    print(f"\nover {REAL}:")
    for name, of in found.items():
        if name not in ("network", REAL):
            cells = [paired_gain(of[metric], found[REAL][metric]).interval(scale) for metric, scale in METRICS.items()]
            print("| " + " | ".join([name, *cells]) + " |")


if __name__ == "__main__":
    found = compare(int(sys.argv[1]) if len(sys.argv) > 1 else 5)
    (HERE / "comparison.json").write_text(json.dumps(found, indent=1) + "\n")
    show(found)
