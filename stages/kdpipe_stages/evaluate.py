"""`kdpipe evaluate`: students, baselines and teacher beside each other -> metrics.json. The teacher is not run."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from kdpipe import durable
from kdpipe.checkpoint import load_weights
from kdpipe.data.prepared import MISSING_LABEL, PreparedInputs
from kdpipe.distributed import cpu_threads
from kdpipe.errors import ConfigError
from kdpipe.evaluation import (
    Answers,
    Said,
    answer_metrics,
    classification_metrics,
    paired_gain,
    predict,
    reliability,
)
from kdpipe.fingerprint import canonical_json
from kdpipe.store import TargetStore
from kdpipe.store.aligned import AlignedTargets
from kdpipe_stages.building import WEIGHTS, describe_model
from kdpipe_stages.lesson import ARMS, Lesson
from kdpipe_stages.project import Project

PerSeed = dict[str, list[dict[str, float]]]


def run(project: Project) -> dict[str, Any]:
    """Measure everything on split `evaluate.split`, view 0, T = 1; returns what metrics.json holds."""
    lesson = Lesson(project)
    data, stores = lesson.data, lesson.stores
    rows = data.rows_of([project.params.evaluate.split])
    labels = data.labels[rows]
    if not (labels != MISSING_LABEL).any():
        raise ConfigError(f"evaluate.split: no row of {project.params.evaluate.split!r} has a label")
    said = {name: _said(store, data.inputs, rows) for name, store in stores.items()}
    logits = {arm: _logits_per_seed(project, lesson, rows, arm) for arm in ("student", *lesson.section.baselines)}
    per_seed = {
        ARMS[arm]: [classification_metrics(each, labels, said) for each in runs] for arm, runs in logits.items()
    }
    metrics: dict[str, Any] = {key: _summary(runs) for key, runs in per_seed.items()}
    for arm in logits:
        metrics[ARMS[arm]] |= _sizes(project.student_models / arm / "seed-0")
    metrics |= _teacher_metrics(stores, said, labels)
    metrics["gain"] = _gains(per_seed)
    _write(project, metrics, per_seed)
    _write_plots(project, logits, said, labels)
    return metrics


def _said(store: TargetStore, inputs: PreparedInputs, rows: NDArray[np.int64]) -> Said:
    aligned = AlignedTargets(store, inputs, rows, outputs=["logits"])
    targets = aligned.read(rows)["logits"]
    return Said(answers=Answers.of_statistics(aligned.statistics(rows), targets.covered), targets=targets)


def _logits_per_seed(project: Project, lesson: Lesson, rows: NDArray[np.int64], arm: str) -> list[Tensor]:
    """Logits `[N, C]` of each seed's student. Raises `ConfigError` for students of other settings, rows or targets."""
    section, inputs, fingerprint = lesson.section, lesson.data.inputs, lesson.fingerprint
    result = []
    for seed in range(section.seeds):
        folder = project.student_models / arm / f"seed-{seed}"
        description = describe_model(folder, "kdpipe train-student")
        if description["fingerprint"] != fingerprint:
            raise ConfigError(
                f"{folder} was trained with other settings, rows or targets than today's. Run `kdpipe train-student`."
            )
        preprocess = project.preprocess(section.preprocess, lesson.task, "student.preprocess")
        preprocess.load_state(description["preprocess_state"])
        model = lesson.spec.build(project, lesson.task, preprocess, inputs, seed)
        load_weights(model, folder / WEIGHTS)
        with cpu_threads(section.train.threads):
            result.append(predict(model, inputs, rows, preprocess))
    return result


def _summary(runs: list[dict[str, float]]) -> dict[str, float]:
    """Mean and standard deviation over seeds (ddof 1; 0 for one seed), two scalars per metric."""
    result = {}
    for name in runs[0]:
        values = np.array([each[name] for each in runs])
        result[name] = float(values.mean())
        result[f"{name}_std"] = float(values.std(ddof=1)) if len(values) > 1 else 0.0
    return result


def _sizes(folder: Path) -> dict[str, int]:
    description = describe_model(folder, "kdpipe train-student")
    return {key: description[key] for key in ("parameters", "size_bytes")}


def _teacher_metrics(
    stores: Mapping[str, TargetStore], said: Mapping[str, Said], labels: NDArray[np.int64]
) -> dict[str, Any]:
    """Keys `teacher` (the first one) and, of several, `teacher_<name>`; from the stores' statistics alone.

    They are those of the teacher before its targets were encoded; it agrees with itself by definition.
    """
    result = {}
    for index, (name, store) in enumerate(stores.items()):
        metrics = _summary([answer_metrics(said[name].answers, labels) | {"agreement": 1.0, "kl_to_teacher": 0.0}])
        about = store.manifest.teacher
        metrics |= {key: about[key] for key in ("parameters", "size_bytes") if key in about}
        result["teacher" if index == 0 else f"teacher_{name}"] = metrics
    return result


def _gains(per_seed: PerSeed) -> dict[str, Any]:
    """The student's accuracy above each baseline's, paired by seed."""
    ours = [each["accuracy"] for each in per_seed["student"]]
    gains = {}
    for key, runs in per_seed.items():
        if key != "student":
            gains[f"over_{key}"] = asdict(paired_gain(ours, [each["accuracy"] for each in runs]))
    return gains


def _write(project: Project, metrics: Mapping[str, Any], per_seed: PerSeed) -> None:
    for name, content in (("metrics", metrics), ("per_seed", per_seed), ("timings", _timings(project))):
        text = json.dumps(json.loads(canonical_json(_finite(content))), indent=2, sort_keys=True)
        durable.write_text(project.root / f"{name}.json", text + "\n")


def _finite(value: Any) -> Any:
    """NaN, which JSON cannot hold, as null; floats to 6 significant digits so that last bits do not show as changes."""
    if isinstance(value, Mapping):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_finite(each) for each in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


def _timings(project: Project) -> dict[str, Any]:
    """What the stages noted of their seconds on this machine, by stage and name; absent for what did not run here."""
    found: dict[str, Any] = {}
    for path in sorted(project.timings.glob("*/*.json")):
        found.setdefault(path.parent.name, {})[path.stem] = json.loads(path.read_text())
    return found


def _write_plots(
    project: Project, logits: Mapping[str, list[Tensor]], said: Mapping[str, Said], labels: NDArray[np.int64]
) -> None:
    """calibration.csv (confidence against accuracy, per model) and confusion.csv (the student's first seed)."""
    project.plots.mkdir(parents=True, exist_ok=True)
    models = {ARMS[arm]: Answers.of_logits(runs[0]) for arm, runs in logits.items()}
    student, models["teacher"] = models["student"], next(iter(said.values())).answers
    lines: list[list[object]] = [["model", "confidence", "accuracy", "share"]]
    for name, each in models.items():
        bins = reliability(*each.correct(labels))
        lines += [[name, *(f"{value:.5f}" for value in (bin_.confidence, bin_.accuracy, bin_.share))] for bin_ in bins]
    _write_csv(project.plots / "calibration.csv", lines)
    labelled = labels != MISSING_LABEL
    pairs = zip(labels[labelled].tolist(), student.top1[labelled].tolist(), strict=True)
    _write_csv(project.plots / "confusion.csv", [["actual", "predicted"], *map(list, pairs)])


def _write_csv(path: Path, lines: list[list[object]]) -> None:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(lines)
    durable.write_text(path, text.getvalue())
