"""`kdpipe evaluate`: students, baselines and teacher beside each other -> metrics.json. The teacher is not run."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from kdpipe import durable
from kdpipe.answers import Answers, Distance, examine, teacher_answers
from kdpipe.batches import Rows
from kdpipe.checkpoint import load_weights
from kdpipe.distributed import cpu_threads
from kdpipe.errors import ConfigError
from kdpipe.evaluation import (
    answer_metrics,
    check_metrics,
    distance_metrics,
    keeps_probabilities,
    paired_gain,
    reliability,
)
from kdpipe.fingerprint import canonical_json
from kdpipe.preprocess import Preprocess
from kdpipe.store import TargetStore
from kdpipe.store.aligned import AlignedTargets
from kdpipe.tasks.base import metrics_of, token_labels
from kdpipe_stages.building import WEIGHTS, describe_model
from kdpipe_stages.lesson import ARMS, STUDENT, Lesson
from kdpipe_stages.project import Project
from kdpipe_stages.pupil import pupil_of

PerSeed = dict[str, list[dict[str, float]]]


def run(project: Project) -> dict[str, Any]:
    """Measure everything on split `evaluate.split`, view 0, T = 1; returns what metrics.json holds."""
    exam = _Exam(project)
    arms = (STUDENT, *exam.lesson.section.baselines)
    teachers = exam.teachers()
    per_seed: PerSeed = {ARMS[arm]: [] for arm in arms}
    first: dict[str, Answers] = {}
    for arm in arms:
        for seed in range(exam.lesson.section.seeds):
            answers, distances = exam.student(arm, seed)
            beside = distance_metrics(answers, teachers, distances)
            per_seed[ARMS[arm]].append(answer_metrics(answers, exam.names) | beside)
            first.setdefault(ARMS[arm], answers)
    metrics: dict[str, Any] = {key: _summary(runs) for key, runs in per_seed.items()}
    for arm in arms:
        metrics[ARMS[arm]] |= _sizes(project.student_models / arm / "seed-0")
    metrics |= _teacher_metrics(exam.lesson.stores, teachers, exam.names)
    metrics["gain"] = _gains(per_seed)
    _write(project, metrics, per_seed)
    _write_plots(
        project, first | {"teacher": next(iter(teachers.values()))}, of_tokens=exam.rows.token_labels is not None
    )
    return metrics


class _Exam:
    """The rows that everybody is measured on, and who is measured."""

    def __init__(self, project: Project) -> None:
        """Raises `ConfigError` for a metric that does not exist, and for teachers of several distributions per row."""
        self._project = project
        self.lesson = lesson = Lesson(project)
        for name, store in lesson.stores.items():
            shape = list(store.outputs["logits"].shape)
            if token_labels(lesson.task) is None and len(shape) != 1:
                raise ConfigError(
                    f"the teacher {name!r} gives logits of shape {shape} for a row; expected one per class"
                )
        self.names = metrics_of(lesson.task)
        check_metrics(self.names)
        self._keep_probabilities = keeps_probabilities(self.names, lesson.task.num_classes)
        self._batch_size = lesson.section.train.micro_batch_size or lesson.section.train.batch_size
        inputs = lesson.data.inputs
        rows = lesson.data.rows_of([project.params.evaluate.split])
        self._targets = {
            name: AlignedTargets(each, inputs, rows, outputs=["logits"]) for name, each in lesson.stores.items()
        }
        self.rows = Rows(
            inputs=inputs,
            rows=rows,
            preprocess=self._preprocess(),
            labels=lesson.data.labels,
            targets=self._targets,
            token_labels=token_labels(lesson.task),
        )

    def teachers(self) -> dict[str, Answers]:
        """What each teacher said, out of its store. Raises `ConfigError` where no token counts."""
        teachers = {
            name: teacher_answers(self.rows, each, self._batch_size, keep_probabilities=self._keep_probabilities)
            for name, each in self._targets.items()
        }
        if not any(len(each.labels) for each in teachers.values()):
            raise ConfigError(f"evaluate.split: no token of {self._project.params.evaluate.split!r} counts")
        return teachers

    def student(self, arm: str, seed: int) -> tuple[Answers, dict[str, Distance]]:
        """What a student says. Raises `ConfigError` for one of other settings, rows or targets."""
        project, lesson = self._project, self.lesson
        folder = project.student_models / arm / f"seed-{seed}"
        description = describe_model(folder, "kdpipe train-student")
        if description["fingerprint"] != lesson.fingerprint:
            raise ConfigError(
                f"{folder} was trained with other settings, rows or targets than today's. Run `kdpipe train-student`."
            )
        preprocess = self._preprocess()
        preprocess.load_state(description["preprocess_state"])
        model = lesson.spec.build(project, lesson.task, preprocess, lesson.data.inputs, seed)
        rows = replace(self.rows, preprocess=preprocess)
        pupil = pupil_of(lesson, arm, model, preprocess(lesson.data.inputs.read(rows.rows[:1])), seed)
        load_weights(pupil.model, folder / WEIGHTS)
        with cpu_threads(lesson.section.train.threads):
            return examine(pupil.model, rows, self._batch_size, pupil.head, keep_probabilities=self._keep_probabilities)

    def _preprocess(self) -> Preprocess:
        """The student's, as it is before it is fitted."""
        return self._project.preprocess(self.lesson.section.preprocess, self.lesson.task, "student.preprocess")


def _summary(runs: list[dict[str, float]]) -> dict[str, float]:
    """Mean and standard deviation over seeds (ddof 1; 0 for one seed), or NaN; two scalars per metric."""
    result = {}
    for name in runs[0]:
        values = np.array([each[name] for each in runs])
        result[name] = float(values.mean())
        result[f"{name}_std"] = float(values.std(ddof=min(1, len(values) - 1)))
    return result


def _sizes(folder: Path) -> dict[str, int]:
    description = describe_model(folder, "kdpipe train-student")
    return {key: description[key] for key in ("parameters", "size_bytes")}


def _teacher_metrics(
    stores: Mapping[str, TargetStore], teachers: Mapping[str, Answers], names: Sequence[str]
) -> dict[str, Any]:
    """Keys `teacher` (the first one) and, of several, `teacher_<name>`; it agrees with itself by definition."""
    result = {}
    for index, (name, store) in enumerate(stores.items()):
        itself = {"agreement": 1.0, "kl_to_teacher": 0.0, "reverse_kl_to_teacher": 0.0}
        metrics = _summary([answer_metrics(teachers[name], names) | itself])
        about = store.manifest.teacher
        metrics |= {key: about[key] for key in ("parameters", "size_bytes") if key in about}
        result["teacher" if index == 0 else f"teacher_{name}"] = metrics
    return result


def _gains(per_seed: PerSeed) -> dict[str, Any]:
    """The student's accuracy above each baseline's, paired by seed; none where no row has a label."""
    ours = [each["accuracy"] for each in per_seed[ARMS[STUDENT]]]
    gains: dict[str, Any] = {}
    if np.isnan(ours).any():
        return gains
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


def _write_plots(project: Project, models: Mapping[str, Answers], of_tokens: bool) -> None:
    """calibration.csv (confidence against accuracy, per model) and confusion.csv (the student's first seed).

    The latter stays empty for tokens, which are too many of too many classes to be looked at.
    """
    project.plots.mkdir(parents=True, exist_ok=True)
    lines: list[list[object]] = [["model", "confidence", "accuracy", "share"]]
    for name, each in models.items():
        known = each.labelled()
        bins = reliability(known.confidence, known.top1 == known.labels)
        lines += [[name, *(f"{value:.5f}" for value in (bin_.confidence, bin_.accuracy, bin_.share))] for bin_ in bins]
    _write_csv(project.plots / "calibration.csv", lines)
    student = models["student"].labelled()
    pairs = [] if of_tokens else zip(student.labels.tolist(), student.top1.tolist(), strict=True)
    _write_csv(project.plots / "confusion.csv", [["actual", "predicted"], *map(list, pairs)])


def _write_csv(path: Path, lines: list[list[object]]) -> None:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(lines)
    durable.write_text(path, text.getvalue())
