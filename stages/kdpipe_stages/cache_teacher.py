"""`kdpipe cache-teacher NAME`: rows -> teacher -> encoding -> data/targets/NAME; resumable, idempotent, incremental."""

from __future__ import annotations

import platform
import re
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass

import numpy as np
import torch

from kdpipe import durable
from kdpipe.caching import WHOLE, CacheProgress, Captured, Share, capture
from kdpipe.data.prepared import PreparedInputs
from kdpipe.devices import compute_device
from kdpipe.distributed import cpu_threads
from kdpipe.errors import ConfigError, UsageError
from kdpipe.store import TargetStore
from kdpipe.store.classifier import TeacherClassifier
from kdpipe.store.layout import choose_shard_rows
from kdpipe.store.manifest import COVERED, Manifest
from kdpipe.teachers.base import Teacher, abstains
from kdpipe_stages.building import encodings_of
from kdpipe_stages.made_of import files_of
from kdpipe_stages.params import store_sections
from kdpipe_stages.project import Project
from kdpipe_stages.tables import TableTeacher
from kdpipe_stages.teachers import build_teacher
from kdpipe_stages.workplace import RemoteWorkplace, Workplace, check_url


@dataclass(frozen=True, kw_only=True)
class Cached:
    """What a run did: rows that the teacher saw now, rows in the store, and shards that other workers still owe.

    The store is published when none is owed, unless it was before. Of `rows_computed`, a table has
    `rows_read`; of other teachers the two are the same. `rows_not_covered` are those, in view 0, of which the teacher
    says nothing, known once the store is complete (at a url, of tables only); `columns_not_read` are the further ones
    of its table. `at_once`: rows at a time that the teacher was shown, where memory ran out for more.
    """

    published: bool
    rows_computed: int
    rows_read: int
    num_rows: int
    num_bytes: int
    teacher_seconds: float
    at_once: int | None
    shards_owed: int
    rows_not_covered: int
    columns_not_read: Sequence[str]


OnProgress = Callable[[CacheProgress], None]


def run(
    project: Project,
    name: str,
    on_progress: OnProgress = lambda _: None,
    *,
    repair: bool = False,
    share: Share = WHOLE,
) -> Cached:
    """Compute what is missing of one teacher's store and publish it; does nothing when it is complete.

    `repair` reads every byte first, and computes again the shards that differ from what was committed. With a `share`,
    workers in other processes compute the other shards; whoever finds the store complete publishes it. With
    `targets.<name>.url` the store is worked at and published there.
    """
    if repair and share != WHOLE:
        raise UsageError("--repair reads the whole store: run it alone, without --shards")
    by_name = durable.Workers(project.work("locks") / f"caching-{name}", f"caching teacher {name}")
    with ExitStack() as held:
        with by_name.door():  # who would get in another's way is told so before the teacher is loaded
            held.enter_context(by_name.part(share.index, share.count))
        targets = project.targets(name)
        check_url(project, name)
        inputs = project.prepared_inputs()
        teacher, description = _teacher(project, name, inputs)
        manifest = manifest_of(project, name, teacher, description, len(inputs))
        workplace: Workplace | RemoteWorkplace = (
            Workplace(project, name, manifest)
            if targets.url is None
            else RemoteWorkplace(project, name, manifest, share, targets.url)
        )
        with workplace.door():
            held.enter_context(workplace.workers.part(share.index, share.count))
            store = workplace.begin(inputs, repair)
            classifier = description.get("classifier")
            store.keep_classifier(classifier if isinstance(classifier, TeacherClassifier) else None)
        missing = {(view, shard.index) for view, shard in store.missing() if share.has(shard)}
        with cpu_threads(targets.threads):
            if isinstance(teacher, TableTeacher):
                captured = teacher.capture(store, inputs, on_progress, share)
            else:
                captured = capture(
                    store,
                    teacher,
                    inputs,
                    targets.batch_size,
                    on_progress,
                    share,
                    project.views_of(inputs),
                    targets.batch_tokens,
                )
        if captured.num_rows:
            _write_timings(project, name, share, captured)
        with workplace.door():
            if share != WHOLE or targets.url is not None:
                store = workplace.open(inputs)  # with what others committed meanwhile
            owed = len(store.missing()) if share != WHOLE else 0
            not_covered = 0
            if isinstance(teacher, TableTeacher) and targets.url is not None:
                not_covered = teacher.rows_not_covered
            elif not owed and targets.url is None:
                not_covered = _rows_not_covered(store, name)
            published = not owed and workplace.finish(store, missing, repair)
    return Cached(
        published=published,
        rows_computed=captured.num_rows,
        rows_read=teacher.rows_read if isinstance(teacher, TableTeacher) else captured.num_rows,
        num_rows=store.num_rows,
        num_bytes=store.num_bytes,
        teacher_seconds=captured.teacher_seconds,
        at_once=captured.at_once,
        shards_owed=owed,
        rows_not_covered=not_covered,
        columns_not_read=teacher.columns_not_read if isinstance(teacher, TableTeacher) else (),
    )


def _rows_not_covered(store: TargetStore, name: str) -> int:
    """How many rows a teacher says nothing about in view 0. Raises `ConfigError` where that is every row."""
    if not store.manifest.coverage:
        return 0
    num_covered = 0
    for start in range(0, store.num_rows, store.manifest.shard_rows):
        rows = np.arange(start, min(start + store.manifest.shard_rows, store.num_rows))
        covered = store.read_arrays(rows, 0, [COVERED])[COVERED]
        num_covered += int(covered.reshape(len(rows), -1).any(axis=1).sum())
    if not num_covered:
        raise ConfigError(
            f"teacher {name} covers 0 of {store.num_rows:,} rows: it abstains from all of them, so a student would "
            f"learn nothing from it, and its store was not published. Correct teachers.{name}, or what it reads."
        )
    return store.num_rows - num_covered


def _write_timings(project: Project, name: str, share: Share, captured: Captured) -> None:
    """Note what a worker's part took; notes of an earlier capture by another number of workers go."""
    this_capture = re.escape(name) + ("" if share == WHOLE else rf"\.\d+-of-{share.count}")
    for note in project.timings.glob("cache_teacher/*.json"):
        of_this_teacher = re.fullmatch(rf"{re.escape(name)}(\.\d+-of-\d+)?", note.stem)
        if of_this_teacher and not re.fullmatch(this_capture, note.stem):
            note.unlink(missing_ok=True)
    part = name if share == WHOLE else f"{name}.{share.index}-of-{share.count}"
    project.write_timings("cache_teacher", part, asdict(captured))


def _teacher(project: Project, name: str, inputs: PreparedInputs) -> tuple[Teacher | TableTeacher, dict[str, object]]:
    """A teacher or the table of what it said, and what its store says about it."""
    if project.teacher(name).table is None:
        return build_teacher(project, name, inputs)
    teacher = TableTeacher(project, name, inputs)
    return teacher, teacher.description


def manifest_of(
    project: Project, name: str, teacher: Teacher | TableTeacher, description: dict[str, object], num_rows: int
) -> Manifest:
    """What makes a teacher's store, from today's params.yaml and code."""
    targets, task = project.targets(name), project.task()
    encodings = encodings_of(targets, teacher.outputs)
    specs = [spec for output in teacher.outputs for spec in encodings[output.name].arrays(output).values()]
    encodings_json = {output: encoding.to_json() for output, encoding in encodings.items()}
    files = files_of(project, name, teacher.fingerprint)
    coverage = isinstance(teacher, TableTeacher) or abstains(teacher)
    return Manifest(
        ingredients={
            "teacher": dict(teacher.fingerprint),
            "outputs": [asdict(output) for output in teacher.outputs],
            "num_classes": task.num_classes,
            "coverage": coverage,
            "encodings": encodings_json,
            "views": project.views_ingredient(),
            "shard_rows": targets.shard_rows,
        },
        outputs=teacher.outputs,
        encodings=encodings_json,
        temperatures=targets.temperatures,
        num_classes=task.num_classes,
        class_names=task.class_names,
        shard_rows=targets.shard_rows or choose_shard_rows(specs, num_rows),
        coverage=coverage,
        sections=store_sections(project.params, name),
        teacher={
            **{
                key: each.to_json() if isinstance(each, TeacherClassifier) else each
                for key, each in description.items()
            },
            **({"files": files} if files else {}),
        },
        recorded={
            "torch": torch.__version__,
            "python": platform.python_version(),
            "machine": platform.machine(),
            "device": compute_device().type,
        },
    )
