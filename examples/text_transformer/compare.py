"""What the store is worth to two students, an LSTM and a tiny Transformer, with few labels and with all of them.

`python compare.py [DRAWS] [SEEDS]`, after `dvc repro`: with few labels, 3 draws of the rows whose labels are known;
with all labels, 3 seeds. It prints the table of README.md and writes every accuracy to comparison.json. It works below
data/comparison, without the teacher, and goes on where it stopped.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from kdpipe.config import load_yaml
from kdpipe.evaluation import gain_text, mean_text
from kdpipe_stages import evaluate, train_student
from kdpipe_stages.project import write_project

HERE = Path(__file__).parent
ARMS = ("student", "baseline")
FEW, ALL = 0.01, 1.0
TRANSFORMER = {"factory": "kdpipe.models.transformer:Transformer", "width": 32, "heads": 2, "layers": 1}
STUDENTS = ("LSTM", "Transformer")
TRAIN: Mapping[float, Mapping[str, float]] = {FEW: {}, ALL: {"learning_rate": 0.01, "weight_decay": 0.01}}
DROPOUT = {FEW: 0.3, ALL: 0.0}


class Comparison:
    """The prepared rows and the store of params.yaml in a folder of their own, and other students."""

    def __init__(self) -> None:
        self._folder = HERE / "data" / "comparison"
        self._params = load_yaml(HERE / "params.yaml")
        for part in ("prepared", "targets", "models/student"):
            shutil.rmtree(self._folder / "data" / part, ignore_errors=True)
            shutil.copytree(HERE / "data" / part, self._folder / "data" / part)

    def accuracies(self, name: str, labelled: float, draws: int, seeds: int) -> dict[str, list[float]]:
        """By arm, on the test split: one value per draw of few labels, or per seed with all of them."""
        found: dict[str, list[float]] = {arm: [] for arm in ARMS}
        for runs in self._runs(name, labelled, draws, seeds):
            for arm in ARMS:
                found[arm] += [each["accuracy"] for each in runs[arm]]
        return found

    def _runs(self, name: str, labelled: float, draws: int, seeds: int) -> Iterator[Mapping[str, Any]]:
        student = self._params["student"]
        model, preprocess = self._reader(name)
        changed = {
            "model": model | {"dropout": DROPOUT[labelled]},
            "preprocess": preprocess,
            "train": student["train"] | TRAIN[labelled],
            "labelled_fraction": labelled,
            "baselines": ["labels_only"],
            "seeds": 1 if labelled == FEW else seeds,
        }
        for draw in range(draws if labelled == FEW else 1):
            drawn = student | changed | {"labelled_seed": draw}
            project = write_project(self._params | {"student": drawn}, self._folder)
            train_student.run(project)
            evaluate.run(project)
            print(f"{name}, {labelled:.0%} of the labels, draw {draw}", file=sys.stderr)
            yield json.loads((self._folder / "per_seed.json").read_text())

    def _reader(self, name: str) -> tuple[dict[str, Any], dict[str, Any]]:
        """Model and preprocess: the LSTM reads words; the Transformer learns word pieces as the teacher has them."""
        if name == "LSTM":
            return self._params["student"]["model"], self._params["student"]["preprocess"]
        return TRANSFORMER, self._params["teachers"]["bert"]["preprocess"]


def compare(draws: int, seeds: int) -> dict[str, dict[str, list[float]]]:
    """Accuracies by student and labels, and by arm."""
    comparison = Comparison()
    return {
        f"{name}, {labelled:.0%}": comparison.accuracies(name, labelled, draws, seeds)
        for labelled in (FEW, ALL)
        for name in STUDENTS
    }


def show(compared: Mapping[str, Mapping[str, Sequence[float]]]) -> None:
    """The table of README.md: % of the test rows, mean ± standard deviation; points, 95 % interval."""
    print("| student, labels | labels only | with targets | gain | n |")
    for name, row in compared.items():
        only, taught = row["baseline"], row["student"]
        cells = [name, mean_text(only, digits=1), mean_text(taught, digits=1), gain_text(taught, only, digits=1)]
        cells.append(str(len(taught)))
        print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    given = [int(each) for each in sys.argv[1:3]]
    compared = compare(*given, *(3, 3)[len(given) :])
    (HERE / "comparison.json").write_text(json.dumps(compared, indent=1) + "\n")
    show(compared)
