"""`kdpipe cache-teacher NAME`: rows -> teacher -> encoding -> data/targets/NAME; resumable, idempotent, incremental."""

from __future__ import annotations

import platform
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from kdpipe.caching import CacheProgress, capture
from kdpipe.checkpoint import load_weights, num_parameters
from kdpipe.data.prepared import PreparedInputs
from kdpipe.distributed import cpu_threads
from kdpipe.encodings import Dense
from kdpipe.errors import CorruptStoreError, KdpipeError, StaleStoreError, StoreNotFoundError
from kdpipe.fingerprint import digest_file
from kdpipe.store import TargetStore
from kdpipe.store.layout import choose_shard_rows
from kdpipe.store.manifest import Manifest
from kdpipe.teachers.base import Teacher
from kdpipe.teachers.torch import TorchTeacher, device
from kdpipe_stages.building import WEIGHTS, ModelSpec, describe_model, teacher_fingerprint
from kdpipe_stages.params import store_sections
from kdpipe_stages.project import Project


@dataclass(frozen=True, kw_only=True)
class Cached:
    """What a run did: rows that the teacher saw now, rows in the store, and where it is."""

    rows_computed: int
    num_rows: int
    num_bytes: int
    teacher_seconds: float


OnProgress = Callable[[CacheProgress], None]


def run(project: Project, name: str, on_progress: OnProgress = lambda _: None, *, repair: bool = False) -> Cached:
    """Compute what is missing of one teacher's store and publish it; does nothing when it is complete.

    `repair` reads every byte first, and computes again the shards that differ from what was committed.
    """
    with project.only_writer(f"targets-{name}", f"caching teacher {name}"):
        return _run(project, name, on_progress, repair)


def _run(project: Project, name: str, on_progress: OnProgress, repair: bool) -> Cached:
    inputs = PreparedInputs(project.prepared / "inputs")
    teacher, description = build_teacher(project, name, inputs)
    manifest = _manifest(project, name, teacher, description, len(inputs))
    work, destination = project.work(manifest.fingerprint), project.store(name)
    with project.only_writer(manifest.fingerprint, f"caching teacher {name}"):
        _adopt(project, destination, work, manifest.fingerprint)
        if repair:
            _repair(work)
        if (work / "manifest.json").is_file():
            # A store that grows keeps the shard size that it was started with.
            manifest = replace(manifest, shard_rows=Manifest.load(work).shard_rows)
        store = TargetStore.create(work, manifest, inputs.sample_ids, inputs.digests)
        batch_size = project.targets(name).batch_size
        with cpu_threads(project.targets(name).threads):
            captured = capture(store, teacher, inputs, batch_size, on_progress)
        if captured.num_rows:
            project.write_timings("cache_teacher", name, asdict(captured))
        store.finish()
        if repair or not _is_published(store, destination):
            project.publish({"": work}, destination)
    return Cached(
        rows_computed=captured.num_rows,
        num_rows=store.num_rows,
        num_bytes=store.num_bytes,
        teacher_seconds=captured.teacher_seconds,
    )


def build_teacher(project: Project, name: str, inputs: PreparedInputs) -> tuple[Teacher, dict[str, object]]:
    """The teacher with its weights, and what its store says about it."""
    section, task = project.teacher(name), project.task()
    where = f"teachers.{name}"
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
    teacher = TorchTeacher(model, preprocess, task.num_classes, identity, project.targets(name).precision)
    return teacher, {"name": name, "parameters": num_parameters(model), "size_bytes": weights.stat().st_size}


def _manifest(project: Project, name: str, teacher: Teacher, description: dict[str, object], num_rows: int) -> Manifest:
    targets, task = project.targets(name), project.task()
    encoding = Dense(dtype=targets.dtype)
    specs = [spec for output in teacher.outputs for spec in encoding.arrays(output).values()]
    encodings = {output.name: encoding.to_json() for output in teacher.outputs}
    views = {"seed": project.params.views.seed, "transform": None} if project.params.views.count else None
    return Manifest(
        ingredients={
            "teacher": dict(teacher.fingerprint),
            "encodings": encodings,
            "views": views,
            "shard_rows": targets.shard_rows,
        },
        outputs=teacher.outputs,
        encodings=encodings,
        temperatures=targets.temperatures,
        num_classes=task.num_classes,
        class_names=task.class_names,
        shard_rows=targets.shard_rows or choose_shard_rows(specs, num_rows),
        sections=store_sections(project.params, name),
        teacher=description,
        recorded={
            "torch": torch.__version__,
            "python": platform.python_version(),
            "machine": platform.machine(),
            "device": device(),
        },
    )


def _adopt(project: Project, published: Path, work: Path, fingerprint: str) -> None:
    """Go on from a published store (pulled by DVC, say) when the work area does not know it."""
    if (work / "manifest.json").is_file():
        return
    try:
        if TargetStore.open(published).fingerprint != fingerprint:
            return
    except KdpipeError:
        return  # nothing there, or nothing usable: it is computed again
    shutil.rmtree(work, ignore_errors=True)
    project.publish({"": published}, work)


def _repair(work: Path) -> None:
    """Forget damaged shards of a store in the work area, or all of it when its own description is damaged."""
    try:
        TargetStore.open(work).repair()
    except StoreNotFoundError:
        return
    except CorruptStoreError:
        shutil.rmtree(work)


def _is_published(store: TargetStore, destination: Path) -> bool:
    try:
        published = TargetStore.open(destination)
        same = published.manifest.to_text() == store.manifest.to_text()
        return same and published.state_digest() == store.state_digest() and not published.missing()
    except KdpipeError:
        return False
