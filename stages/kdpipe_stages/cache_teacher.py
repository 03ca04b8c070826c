"""`kdpipe cache-teacher NAME`: rows -> teacher -> encoding -> data/targets/NAME; resumable, idempotent, incremental."""

from __future__ import annotations

import platform
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch

from kdpipe import durable
from kdpipe.caching import WHOLE, CacheProgress, Share, capture
from kdpipe.checkpoint import load_weights, num_parameters
from kdpipe.data.prepared import PreparedInputs
from kdpipe.distributed import cpu_threads
from kdpipe.errors import (
    ConfigError,
    CorruptStoreError,
    KdpipeError,
    LockedError,
    StaleStoreError,
    StoreNotFoundError,
)
from kdpipe.fingerprint import digest_file
from kdpipe.store import TargetStore
from kdpipe.store.layout import choose_shard_rows
from kdpipe.store.manifest import Manifest
from kdpipe.teachers.base import Teacher, abstains
from kdpipe.teachers.torch import TorchTeacher, device
from kdpipe_stages.building import WEIGHTS, ModelSpec, describe_model, encodings_of, teacher_fingerprint
from kdpipe_stages.params import store_sections, views_identity
from kdpipe_stages.project import Project
from kdpipe_stages.tables import TableTeacher


@dataclass(frozen=True, kw_only=True)
class Cached:
    """What a run did: rows that the teacher saw now, rows in the store, and shards that other workers still owe.

    The store is published when none is owed. `rows_not_covered` are those that a teacher's table lacks.
    """

    rows_computed: int
    num_rows: int
    num_bytes: int
    teacher_seconds: float
    shards_owed: int
    rows_not_covered: int


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
    workers in other processes compute the other shards; whoever finds the store complete publishes it.
    """
    if repair and share != WHOLE:
        raise ConfigError("--repair reads the whole store: run it alone, without --shards")
    inputs = PreparedInputs(project.prepared / "inputs")
    teacher, description = _teacher(project, name, inputs)
    manifest = manifest_of(project, name, teacher, description, len(inputs))
    workplace = _Workplace(project, name, manifest)
    with ExitStack() as held:
        with workplace.door():
            held.enter_context(workplace.workers.part(share.index, share.count))
            store = workplace.begin(inputs, repair)
        targets = project.targets(name)
        with cpu_threads(targets.threads):
            if isinstance(teacher, TableTeacher):
                captured = teacher.capture(store, inputs, on_progress, share)
            else:
                captured = capture(store, teacher, inputs, targets.batch_size, on_progress, share, project.views())
        if captured.num_rows:
            note = name if share == WHOLE else f"{name}.{share.index}-of-{share.count}"
            project.write_timings("cache_teacher", note, asdict(captured))
        with workplace.door():
            if share != WHOLE:
                store = workplace.open(inputs)  # with what others committed meanwhile
            owed = len(store.missing()) if share != WHOLE else 0
            if not owed:
                workplace.finish(store, repair)
    return Cached(
        rows_computed=captured.num_rows,
        num_rows=store.num_rows,
        num_bytes=store.num_bytes,
        teacher_seconds=captured.teacher_seconds,
        shards_owed=owed,
        rows_not_covered=teacher.rows_not_covered if isinstance(teacher, TableTeacher) else 0,
    )


class _Workplace:
    """The work folder of one fingerprint, and the folder it is published to; all but `door` is called behind it."""

    def __init__(self, project: Project, name: str, manifest: Manifest) -> None:
        self._project, self._manifest, self._doing = project, manifest, f"caching teacher {name}"
        self._work, self._published = project.work(manifest.fingerprint), project.store(name)
        locks = project.work("locks")
        self.workers = durable.Workers(locks / manifest.fingerprint, self._doing)
        self._publishing = locks / f"targets-{name}"

    def door(self) -> AbstractContextManager[None]:
        """See `Workers.door`."""
        return self.workers.door()

    def begin(self, inputs: PreparedInputs, repair: bool) -> TargetStore:
        """The store to work at, as others left it; who joins others at work changes nothing of it.

        Raises `LockedError` when they work on other rows.
        """
        if len(self.workers.held()) > 1:
            return self._join(inputs)
        views = self._project.views()
        manifest = self._manifest
        if not (self._work / "manifest.json").is_file():
            self._adopt()
        if repair:
            _repair(self._work)
        if (self._work / "manifest.json").is_file():
            # A store that grows keeps the shard size that it was started with.
            manifest = replace(manifest, shard_rows=Manifest.load(self._work).shard_rows)
        TargetStore.create(self._work, manifest, inputs.sample_ids, inputs.digests, views.num_views)
        return self.open(inputs)

    def open(self, inputs: PreparedInputs) -> TargetStore:
        """The store as it stands, told which rows augmented views are about."""
        store = TargetStore.open(self._work)
        section = self._project.params.views
        if section.count:
            wanted = np.full(len(inputs), section.splits is None)
            if section.splits is not None:
                wanted[self._project.prepared_data().rows_of(section.splits)] = True
            store.want_in_views(wanted)
        return store

    def _join(self, inputs: PreparedInputs) -> TargetStore:
        store = self.open(inputs)
        num_views = self._project.views().num_views
        same_ids = np.array_equal(store.sample_ids, inputs.sample_ids)
        if not same_ids or not np.array_equal(store.digests, inputs.digests) or store.num_views != num_views:
            raise LockedError(
                f"other processes are {self._doing} for {store.num_rows:,} rows as they were prepared before, in "
                f"{store.num_views} views; now there are {len(inputs):,} rows and {num_views} views. "
                "Wait for them to end, or stop them, and run again."
            )
        return store

    def finish(self, store: TargetStore, repair: bool) -> None:
        """Finish a complete store, and publish it unless it is what was published already."""
        store.finish()
        with durable.only_writer(self._publishing, self._doing, wait=True):
            if repair or not self._is_published(store):
                self._project.publish({"": self._work}, self._published)

    def _adopt(self) -> None:
        """Go on from a published store (pulled by DVC, say), which the work area does not know."""
        with durable.only_writer(self._publishing, self._doing, wait=True):
            try:
                if TargetStore.open(self._published).fingerprint != self._manifest.fingerprint:
                    return
            except KdpipeError:
                return  # nothing there, or nothing usable: it is computed again
            shutil.rmtree(self._work, ignore_errors=True)
            self._project.publish({"": self._published}, self._work)

    def _is_published(self, store: TargetStore) -> bool:
        try:
            published = TargetStore.open(self._published)
            same = published.manifest.to_text() == store.manifest.to_text()
            return same and published.state_digest() == store.state_digest() and not published.missing()
        except KdpipeError:
            return False


def _teacher(project: Project, name: str, inputs: PreparedInputs) -> tuple[Teacher | TableTeacher, dict[str, object]]:
    """A teacher or the table of what it said, and what its store says about it."""
    if project.teacher(name).table is None:
        return build_teacher(project, name, inputs)
    teacher = TableTeacher(project, name)
    return teacher, teacher.description


def build_teacher(project: Project, name: str, inputs: PreparedInputs) -> tuple[Teacher, dict[str, object]]:
    """The teacher with its weights, and what its store says about it."""
    section, task = project.teacher(name), project.task()
    where = f"teachers.{name}"
    if section.model is None:
        raise ConfigError(f"{where}: what it said is in {section.table}; there is no model to show rows to")
    preprocess = project.preprocess(section.preprocess, task, f"{where}.preprocess")
    if section.weights is not None:
        weights = project.root / section.weights
    else:
        weights = project.teacher_model(name) / WEIGHTS
        note = describe_model(weights.parent, f"kdpipe train-teacher {name}")
        if note.get("fingerprint") != teacher_fingerprint(project, name):
            raise StaleStoreError(
                f"{weights.parent} was trained with other settings, code or rows than today's. "
                f"Run `kdpipe train-teacher {name}`."
            )
        preprocess.load_state(note["preprocess_state"])
    spec = ModelSpec(where=where, model=section.model, preprocess=section.preprocess)
    model = spec.build(project, task, preprocess, inputs, seed=0)
    load_weights(model, weights)
    identity = {**spec.to_json(), "weights": digest_file(weights), "sources": spec.sources(project)}
    targets, probe = project.targets(name), inputs.read(np.zeros(1, np.int64))
    try:
        teacher = TorchTeacher(model, preprocess, task.num_classes, identity, probe, targets.outputs, targets.precision)
    except ConfigError as error:
        raise ConfigError(f"targets.{name}.outputs: {error}") from None
    return teacher, {"name": name, "parameters": num_parameters(model), "size_bytes": weights.stat().st_size}


def manifest_of(
    project: Project, name: str, teacher: Teacher | TableTeacher, description: dict[str, object], num_rows: int
) -> Manifest:
    """What makes a teacher's store, from today's params.yaml and code."""
    targets, task = project.targets(name), project.task()
    encodings = encodings_of(targets, teacher.outputs)
    specs = [spec for output in teacher.outputs for spec in encodings[output.name].arrays(output).values()]
    encodings_json = {output: encoding.to_json() for output, encoding in encodings.items()}
    views = views_identity(project.params.views)
    if views and project.params.views.transform:
        views["sources"] = project.sources(project.params.views.transform, "views.transform")
    return Manifest(
        ingredients={
            "teacher": dict(teacher.fingerprint),
            "encodings": encodings_json,
            "views": views,
            "shard_rows": targets.shard_rows,
        },
        outputs=teacher.outputs,
        encodings=encodings_json,
        temperatures=targets.temperatures,
        num_classes=task.num_classes,
        class_names=task.class_names,
        shard_rows=targets.shard_rows or choose_shard_rows(specs, num_rows),
        coverage=isinstance(teacher, TableTeacher) or abstains(teacher),
        sections=store_sections(project.params, name),
        teacher=description,
        recorded={
            "torch": torch.__version__,
            "python": platform.python_version(),
            "machine": platform.machine(),
            "device": device(),
        },
    )


def _repair(work: Path) -> None:
    """Forget damaged shards of a store in the work area, or all of it when its own description is damaged."""
    try:
        TargetStore.open(work).repair()
    except StoreNotFoundError:
        return
    except CorruptStoreError:
        shutil.rmtree(work)
