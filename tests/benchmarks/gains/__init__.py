"""What a student gains from cached targets, on real data: arms that share rows, steps and seeds, compared seed by seed.

A module each: digits, fashion_mnist, cifar10_views, cifar10_unseen, teachers, features. Settings were fixed before the
runs; the last epoch counts; every arm takes the same number of optimiser steps. Accuracy is that of split `test`.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.measuring import machine
from kdpipe.evaluation import gain_text, mean_text
from kdpipe_stages import cache_teacher, evaluate, prepare_data, train_student, train_teacher
from kdpipe_stages.project import write_project

REPOSITORY = Path(__file__).parents[3]
DATASETS = Path(os.environ.get("KDPIPE_DATASETS", REPOSITORY.parent / "shared" / "datasets"))
LABELS_ONLY, SMOOTHED = "labels only", "labels only, smoothed by 0.1"
_BASELINES = {LABELS_ONLY: "baseline", SMOOTHED: "baseline_label_smoothing"}


@dataclass(frozen=True, kw_only=True)
class Arm:
    """A student: sections of params.yaml that it changes keys of, and what is different while it is trained."""

    name: str
    changes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    during: Callable[[], AbstractContextManager[object]] = nullcontext


def accuracies(folder: Path, settings: dict[str, Any], arms: Sequence[Arm]) -> dict[str, list[float]]:
    """Accuracy in points, one per seed, of every arm, of the baselines (once, with the first arm) and of the teachers.

    `settings` has every section that an arm changes.
    """
    found: dict[str, list[float]] = {}
    for arm in arms:
        changed = {name: {**section, **arm.changes.get(name, {})} for name, section in settings.items()}
        if found:
            changed["student"]["baselines"] = []
        project = write_project(changed, folder)
        prepare_data.run(project)
        for name in changed["teachers"]:
            train_teacher.run(project, name)
            cache_teacher.run(project, name)
        with arm.during():
            train_student.run(project)
        metrics = evaluate.run(project)
        per_seed = json.loads((folder / "per_seed.json").read_text())
        keys = {arm.name: "student", **({} if found else _BASELINES)}
        values = {name: per_seed[key] for name, key in keys.items() if key in per_seed}
        found |= {name: [100 * each["accuracy"] for each in runs] for name, runs in values.items()}
        teachers = [name for loss in project.params.student.losses for name in loss.teachers]
        for place, name in enumerate(dict.fromkeys(teachers)):
            said = metrics[f"teacher_{name}" if place else "teacher"]
            found[f"teacher {name}"] = [100 * said["accuracy"]]
    return found


def table(found: Mapping[str, Sequence[float]], against: Sequence[str]) -> str:
    """Markdown: mean and deviation over seeds, and the paired gain over some arms in points, with its 95 % interval."""
    lines = [
        f"| student | accuracy, % | {' | '.join(f'gain over {each}' for each in against)} |",
        f"| --- | --- |{' --- |' * len(against)}",
    ]
    for name, values in found.items():
        others = [found[each] if name != each and len(found[each]) == len(values) else None for each in against]
        cells = ["" if theirs is None else gain_text(values, theirs, scale=1) for theirs in others]
        lines.append(f"| {name} | {mean_text(values, scale=1)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def report(title: str, found: Mapping[str, Sequence[float]], against: Sequence[str], began: float) -> None:
    """Print one table with its circumstances."""
    seeds = max(map(len, found.values()))
    print(f"{title}; n = {seeds} seeds, {(time.perf_counter() - began) / 60:.1f} min in all")
    print(machine("numpy", "torch") + "\n")
    print(table(found, against) + "\n", flush=True)
