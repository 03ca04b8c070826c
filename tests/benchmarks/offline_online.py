"""Cached targets against the live teacher: the same student on the same views and batches; digits, augmented."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.gains import REPOSITORY
from benchmarks.measuring import machine, shown
from kdpipe.batches import BatchStream, Rows, TargetsByOutput
from kdpipe.config import load_yaml
from kdpipe.data.prepared import PreparedInputs
from kdpipe.evaluation import paired_gain
from kdpipe.losses import ForwardKL, values_of
from kdpipe.order import BatchOrder, Group
from kdpipe.store import TargetStore
from kdpipe.store.aligned import AlignedTargets
from kdpipe.targets import DenseTargets
from kdpipe.teachers.base import Teacher
from kdpipe_stages import cache_teacher, evaluate, prepare_data, train_student, train_teacher
from kdpipe_stages.building import fit_preprocess
from kdpipe_stages.lesson import Lesson
from kdpipe_stages.project import Project, write_project
from kdpipe_stages.teachers import build_teacher

TEACHER, TEMPERATURE = "big", 4.0
SEEN = [{"factory": "kdpipe.transforms:PadAndCrop", "padding": 1}, {"factory": "kdpipe.transforms:Erasing"}]


class LiveTargets(AlignedTargets):
    """The teacher itself, asked about each batch as the student is shown it."""

    teacher: Teacher
    inputs: PreparedInputs
    project: Project

    def read(self, rows: NDArray[np.int64], view: int = 0) -> TargetsByOutput:
        columns = self.project.views().read(self.inputs.read, self.inputs.sample_ids, rows, view).columns
        logits = self.teacher.predict(columns)["logits"].float()
        highest = logits.amax(dim=-1, keepdim=True)
        return {"logits": DenseTargets(values=logits - highest, row_max=highest.squeeze(-1))}

    def read_ahead(self, groups: Iterable[tuple[int, Group]]) -> Iterator[TargetsByOutput]:
        return (self.read(rows, view) for view, group in groups for rows in group.batches)


def settings(num_seeds: int, epochs: int, dtype: str) -> dict[str, Any]:
    """The demo's, under augmentation; four cached views."""
    found: dict[str, Any] = load_yaml(REPOSITORY / "params.yaml")
    found["data"]["path"] = str(REPOSITORY / found["data"]["path"])
    found["targets"][TEACHER]["dtype"] = dtype
    transform = {"factory": "kdpipe.transforms:Compose", "transforms": SEEN}
    found["views"] = {"count": 4, "seed": 17, "splits": ["train"], "transform": transform}
    found["student"] |= {"seeds": num_seeds, "baselines": []}
    found["student"]["train"] |= {"epochs": epochs}
    return found


def project_of(folder: Path, params: dict[str, Any]) -> Project:
    """A project with its teacher's store."""
    project = write_project(params, folder)
    prepare_data.run(project)
    train_teacher.run(project, TEACHER)
    cache_teacher.run(project, TEACHER)
    return project


def live_of(project: Project) -> type[LiveTargets]:
    """`LiveTargets` of a project's teacher."""
    inputs = PreparedInputs(project.prepared / "inputs")
    teacher, _ = build_teacher(project, TEACHER, inputs)
    return type("LiveTargets", (LiveTargets,), {"teacher": teacher, "inputs": inputs, "project": project})


def differences(project: Project, steps: int) -> list[float]:
    """How far the two losses of each step are apart, at identical weights; the student follows the cached one."""
    lesson, live = Lesson(project), live_of(project)
    inputs, views = lesson.data.inputs, project.views()
    store = TargetStore.open(project.store(TEACHER))
    cached = AlignedTargets(store, inputs, lesson.rows, range(1, views.num_views))
    asked = live(store, inputs, lesson.rows, range(1, views.num_views))
    preprocess = project.preprocess(lesson.section.preprocess, lesson.task, "student.preprocess")
    fit_preprocess(preprocess, inputs, lesson.rows)
    rows = Rows(
        inputs=inputs,
        rows=lesson.rows,
        preprocess=preprocess,
        labels=np.full(len(inputs), -1),
        targets={"cached": cached, "live": asked},
        views=views,
    )
    stream = BatchStream(rows, BatchOrder(rows=lesson.rows, batch_size=64, seed=0))
    student = lesson.spec.build(project, lesson.task, preprocess, inputs, 0)
    optimizer, loss = torch.optim.AdamW(student.parameters(), lr=0.005), ForwardKL(temperature=TEMPERATURE)
    found = []
    for batch in stream.from_step(0, steps):
        logits = student(batch.inputs)
        one, other = (values_of(loss, logits, batch.targets[each]["logits"], None).mean() for each in batch.targets)
        found.append(abs(float(one.detach()) - float(other.detach())))
        optimizer.zero_grad()
        one.backward()
        optimizer.step()
    return found


Trained = list[dict[str, float]]
"""Metrics of each seed."""


def trained(project: Project) -> Trained:
    """The students of `student.seeds`, none of which may be there before."""
    if train_student.run(project).skipped:
        raise ValueError("students were trained before; what is compared must be trained")
    evaluate.run(project)
    found: dict[str, Trained] = json.loads((project.root / "per_seed.json").read_text())
    return found["student"]


def trained_both_ways(folder: Path, params: dict[str, Any]) -> tuple[Trained, Trained]:
    """From cached targets, and with the live teacher."""
    project = project_of(folder, params)
    cached = trained(project)
    # The smoothing is that of baselines, which are not trained: these students are trained anew.
    changed = {**params, "student": {**params["student"], "label_smoothing": 0.11}}
    project = write_project(changed, folder)
    with patch("kdpipe_stages.train_student.AlignedTargets", live_of(project)):
        return cached, trained(project)


def _apart(cached: Trained, live: Trained) -> str:
    return paired_gain(*([each["accuracy"] for each in run] for run in (cached, live))).interval(digits=3)


def main(num_seeds: int = 3, epochs: int = 60, steps: int = 50, folder: Path | None = None) -> None:
    """Print how far losses and accuracies are apart."""
    began = time.perf_counter()
    print(machine("numpy", "torch") + "\n")
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        exact = project_of(Path(scratch) / "float32", settings(num_seeds, epochs, "float32"))
        found = differences(exact, steps)
        print(f"loss, {steps} steps, float32 targets: |cached - live| {shown(found)}\n")
        cached, live = trained_both_ways(Path(scratch) / "float16", settings(num_seeds, epochs, "float16"))
    print("| targets | accuracy of each seed, % | KL(teacher, student), nats |\n| --- | --- | --- |")
    for name, runs in (("cached, float16", cached), ("live teacher", live)):
        points = ", ".join(f"{100 * each['accuracy']:.2f}" for each in runs)
        kl = [f"{each['kl_to_teacher']:.7f}" for each in runs]
        print(f"| {name} | {points} | {', '.join(kl)} |")
    print(f"\ncached - live, points: {_apart(cached, live)}; {(time.perf_counter() - began) / 60:.1f} min in all")
