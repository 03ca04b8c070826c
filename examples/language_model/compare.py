"""What a student loses by each way to store its teacher's words: beside the live teacher, and labels only.

`python compare.py [SEEDS]`, after `dvc repro`: 3 seeds of the student of params.yaml from each encoding, from the
teacher itself, which is run on every batch of every epoch, and from labels only. It prints the table of README.md and
writes every loss to comparison.json. It works below data/comparison, and goes on where it stopped.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from kdpipe.answers import examine
from kdpipe.batches import Rows, shuffle_of
from kdpipe.checkpoint import load_weights, save_weights
from kdpipe.config import load_yaml
from kdpipe.data.prepared import PreparedInputs
from kdpipe.distributed import cpu_threads
from kdpipe.evaluation import answer_metrics, mean_text, paired_gain
from kdpipe.order import BatchOrder, Group
from kdpipe.store import TargetStore
from kdpipe.store.aligned import AlignedTargets
from kdpipe.targets import DenseTargets
from kdpipe.tasks.base import token_labels
from kdpipe.teachers.base import Teacher
from kdpipe.terms import DistillTerm
from kdpipe.training import fit
from kdpipe_stages import cache_teacher, evaluate, train_student
from kdpipe_stages.building import stream_of, train_plan
from kdpipe_stages.lesson import Lesson
from kdpipe_stages.project import Project, write_project
from kdpipe_stages.teachers import build_teacher

HERE = Path(__file__).parent
TEACHER = "gpt"
SPLITS = ("validation", "test")
TOP, LIVE, LABELS = "top 16", "live teacher", "labels only"
ENCODINGS: Mapping[str, Mapping[str, Any]] = {
    TOP: {},
    "head 12, 8 draws": {"encoding": "sampled", "head": 12, "draws": 8, "stratified": True},
    "50 draws": {"encoding": "sampled", "draws": 50, "stratified": True},
    "dense": {"encoding": "dense", "dtype": "float16"},
}
"""What is stored; nothing given: as params.yaml has it. The live teacher's batches come in the order of the last."""
Losses = dict[str, list[float]]


class LiveTargets:
    """The teacher in the place of its store: it speaks about each batch when the student learns from it."""

    def __init__(self, teacher: Teacher, inputs: PreparedInputs, row_bytes: int) -> None:
        """`row_bytes` of the store whose order of rows is wanted."""
        self._teacher, self._inputs, self.row_bytes = teacher, inputs, row_bytes

    def read(self, rows: NDArray[np.int64], view: int = 0) -> dict[str, DenseTargets]:
        """The logits of row numbers `[B]`, float32."""
        said = self._teacher.predict(self._inputs.read(rows))
        return {"logits": replace(DenseTargets.of(said["logits"]), covered=said["covered"].clone())}

    def read_ahead(self, groups: Iterable[tuple[int, Group]]) -> Iterator[dict[str, DenseTargets]]:
        """One batch after the other; nothing is read ahead."""
        for view, group in groups:
            for rows in group.batches:
                yield self.read(rows, view)


class Comparison:
    """A copy of what `dvc repro` made, in a folder of its own, with other targets."""

    def __init__(self, seeds: int) -> None:
        self._seeds, self._folder = seeds, HERE / "data" / "comparison"
        self._params = load_yaml(HERE / "params.yaml")
        for part in ("prepared", "models", "targets"):
            shutil.rmtree(self._folder / "data" / part, ignore_errors=True)
            shutil.copytree(HERE / "data" / part, self._folder / "data" / part)

    def stored(self, name: str) -> tuple[dict[str, Losses], float]:
        """Losses of the students of an encoding by arm and split, one per seed, and the store's bytes per token."""
        project = self._project(name)
        cache_teacher.run(project, TEACHER)
        train_student.run(project)
        arms = {name: "student"} | ({LABELS: "baseline"} if name == TOP else {})
        found: dict[str, Losses] = {arm: {} for arm in arms}
        for split in SPLITS:
            evaluate.run(self._project(name, split))
            per_seed = json.loads((self._folder / "per_seed.json").read_text())
            for arm, key in arms.items():
                found[arm][split] = [each["nll"] for each in per_seed[key]]
        return found, bytes_per_token(project)

    def live(self) -> Losses:
        """Losses of the live teacher's students by split, one per seed; of those of the last encoding but for that."""
        lesson = Lesson(project := self._project(list(ENCODINGS)[-1]))
        models = [self._live_student(project, lesson, seed) for seed in range(self._seeds)]
        return {split: [loss(lesson, model, split) for model in models] for split in SPLITS}

    def _live_student(self, project: Project, lesson: Lesson, seed: int) -> nn.Module:
        inputs, plan, preprocess = lesson.data.inputs, lesson.section.train, lesson.task.default_preprocess()
        model = lesson.spec.build(project, lesson.task, preprocess, inputs, seed)
        folder = self._folder / "live" / lesson.fingerprint
        weights = folder / f"seed-{seed}.safetensors"
        if weights.is_file():
            load_weights(model, weights)
            return model
        folder.mkdir(parents=True, exist_ok=True)
        dense = AlignedTargets(lesson.stores[TEACHER], inputs, lesson.rows)
        live = LiveTargets(build_teacher(project, TEACHER, inputs)[0], inputs, dense.row_bytes)
        learnt = Rows(
            inputs=inputs,
            rows=lesson.rows,
            preprocess=preprocess,
            labels=lesson.labels,
            targets={TEACHER: live},
            token_labels=token_labels(lesson.task),
        )
        order = BatchOrder(rows=lesson.rows, batch_size=plan.batch_size, seed=seed, shuffle=shuffle_of([live]))
        optimise = train_plan(plan, plan.epochs * order.steps_per_epoch, seed)
        terms = [DistillTerm(term=term) for term in lesson.terms]
        fit(model, stream_of(plan, learnt, order), terms, optimise, folder / f"seed-{seed}.tmp")
        save_weights(model, weights)
        return model

    def _project(self, name: str, split: str = "test") -> Project:
        baselines = ["labels_only"] if name == TOP else []
        student = self._params["student"] | {"seeds": self._seeds, "baselines": baselines}
        stored = self._params["targets"][TEACHER]
        targets = dict(ENCODINGS[name]) or stored
        kept = {key: stored[key] for key in ("profile", "batch_size", "threads") if key in stored}
        changed = {"student": student, "targets": {TEACHER: kept | targets}, "evaluate": {"split": split}}
        return write_project(self._params | changed, self._folder)


def loss(lesson: Lesson, model: nn.Module, split: str) -> float:
    """Nats per counted token of a split."""
    rows = Rows(
        inputs=lesson.data.inputs,
        rows=lesson.data.rows_of([split]),
        preprocess=lesson.task.default_preprocess(),
        labels=lesson.data.labels,
        token_labels=token_labels(lesson.task),
    )
    plan = lesson.section.train
    with cpu_threads(plan.threads):
        answers, _ = examine(model, rows, plan.batch_size, lesson.spec.head(lesson.task))
    return answer_metrics(answers, ["nll"])["nll"]


def bytes_per_token(project: Project) -> float:
    """Bytes of the logits as stored, checksums and the teacher's statistics counted, per position of a block."""
    store = TargetStore.open(project.store(TEACHER))
    return store.num_bytes / (store.num_rows * store.outputs["logits"].shape[0])


def compare(seeds: int) -> dict[str, Any]:
    """Losses by arm and split, a list of one per seed each; bytes per token by encoding."""
    comparison = Comparison(seeds)
    losses: dict[str, Losses] = {}
    sizes: dict[str, float] = {}
    for name in ENCODINGS:
        found, sizes[name] = comparison.stored(name)
        losses |= found
        print(f"{name}: done", file=sys.stderr)
    losses[LIVE] = comparison.live()
    return {"losses": losses, "bytes per token": sizes}


def show(compared: Mapping[str, Any]) -> None:
    """The table of README.md: nats per token, mean ± standard deviation; above the live teacher, 95 % interval."""
    print("| | validation | above live | test | above live | bytes per token |")
    losses = compared["losses"]
    for name, found in losses.items():
        cells = [name]
        for split in SPLITS:
            above = paired_gain(found[split], losses[LIVE][split]).interval(1, 4)
            cells += [mean_text(found[split], 1, 4), "" if name == LIVE else above]
        size = compared["bytes per token"].get(name)
        print("| " + " | ".join([*cells, "" if size is None else f"{size:.1f}"]) + " |")


if __name__ == "__main__":
    compared = compare(int(sys.argv[1]) if len(sys.argv) > 1 else 3)
    (HERE / "comparison.json").write_text(json.dumps(compared, indent=1) + "\n")
    show(compared)
