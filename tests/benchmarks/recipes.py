"""`make recipes`, or `python -m benchmarks.recipes NAME ...`: what each recipe of examples/ came to, as Markdown.

`dvc repro` has run there; everything is read from what it left: metrics.json, per_seed.json, timings.json, the stores.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kdpipe_stages import stores
from kdpipe_stages.lesson import teachers_of
from kdpipe_stages.project import Project

EXAMPLES = Path(__file__).parents[2] / "examples"
COLUMNS = (
    "recipe",
    "teacher, %",
    "student, %",
    "labels only, %",
    "gain, points",
    "seeds",
    "parameters of teacher",
    "of student",
    "bytes per row",
    "s to train the teacher",
    "s of its pass",
    "s per epoch of the student",
)


def row(folder: Path) -> list[str]:
    """A recipe's cells: accuracies with deviations over seeds, and the gain paired by seed with its 95 % interval."""
    project = Project(folder / "params.yaml")
    metrics, per_seed, timings = (
        json.loads((folder / f"{name}.json").read_text()) for name in ("metrics", "per_seed", "timings")
    )
    names = teachers_of(project.params.student)
    teachers = [metrics["teacher"], *(metrics[f"teacher_{name}"] for name in names[1:])]
    trained, passes = timings.get("train_teacher", {}), timings.get("cache_teacher", {})
    epoch = timings.get("train_student", {}).get("student", {})
    return [
        folder.name,
        _each(names, [_percent(each) for each in teachers]),
        f"{project.params.student.model.path.rpartition(':')[2]}: {_percent(metrics['student'])}",
        _percent(metrics.get("baseline", {})),
        _gain(metrics["gain"].get("over_baseline")),
        str(len(per_seed["student"])),
        _each(names, [f"{each['parameters']:,}" if "parameters" in each else "" for each in teachers]),
        f"{metrics['student']['parameters']:,}",
        _each(names, [f"{stores.inspect(project.store(name))['bytes_per_row']:.2f}" for name in names]),
        _each(names, [_seconds(trained.get(name, {}), "seconds") for name in names]),
        _each(names, [_seconds(passes.get(name, {}), "teacher_seconds") for name in names]),
        _seconds(epoch, "seconds_per_epoch"),
    ]


def _each(names: Sequence[str], values: Sequence[str]) -> str:
    """Of several teachers each by its name."""
    pairs = zip(names, values, strict=True)
    return values[0] if len(names) == 1 else ", ".join(f"{name} {value}" for name, value in pairs if value)


def _percent(metrics: Mapping[str, Any]) -> str:
    if metrics.get("accuracy") is None:
        return ""
    spread = f" ± {100 * metrics['accuracy_std']:.2f}" if metrics["accuracy_std"] else ""
    return f"{100 * metrics['accuracy']:.2f}{spread}"


def _gain(gain: Mapping[str, Any] | None) -> str:
    if gain is None:
        return ""
    interval = "" if gain["low"] is None else f" [{100 * gain['low']:.2f}, {100 * gain['high']:.2f}]"
    return f"{100 * gain['mean']:+.2f}{interval}: {gain['verdict']}"


def _seconds(noted: Mapping[str, float], key: str) -> str:
    return f"{noted[key]:,.2f}" if key in noted else ""


def main(folders: Sequence[Path]) -> None:
    """Print the table."""
    print(f"| {' | '.join(COLUMNS)} |\n|{' --- |' * len(COLUMNS)}")
    for folder in folders:
        print(f"| {' | '.join(row(folder))} |")


if __name__ == "__main__":
    main([EXAMPLES / name for name in sys.argv[1:]])
