"""What a folder of the work area is, and whether it is in use: told by its own files and by what is published.

No teacher is loaded.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from kdpipe import durable
from kdpipe.errors import KdpipeError, StoreError
from kdpipe.store import TargetStore
from kdpipe.store.remote import url_of
from kdpipe_stages.building import DESCRIPTION
from kdpipe_stages.lesson import Lesson
from kdpipe_stages.params import first_difference, store_sections
from kdpipe_stages.project import Project

CHECKPOINT = f"checkpoint{durable.TEMPORARY_SUFFIX}"
Kind = Literal["targets", "teacher", "student", "staging", "unknown"]
State = Literal["current", "in progress", "unfinished", "unreadable", "unknown", "earlier", "leftover"]
"""`unfinished`: its command goes on with it, should params.yaml be as it was. `leftover`: of use to nobody."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What a folder is; `why` it is in that state, and what its removal would `cost`."""

    kind: Kind
    what: str
    state: State
    why: str = ""
    cost: str = "nothing"


class InUse:
    """What is published and what today's params.yaml names: whether work is current."""

    def __init__(self, project: Project, folders: Sequence[Path]) -> None:
        self._project = project
        root = project.root / "data"
        self._stores = {path.parent: _json(path) for path in sorted(root.glob("targets/*/manifest.json"))}
        urls = {str(each.get("fingerprint")): url_of(at) for at, each in self._stores.items()}
        self._at_urls = {fingerprint: url for fingerprint, url in urls.items() if url is not None}
        self._teachers = {path.parent: _json(path) for path in sorted(root.glob(f"models/teachers/*/{DESCRIPTION}"))}
        students = project.student_models.glob(f"*/*/{DESCRIPTION}")
        self._students = {_json(path).get("fingerprint") for path in students}
        self._sections = {name: store_sections(project.params, name) for name in project.params.teachers}
        self._work_stores = {path: _json(path / "manifest.json") for path in folders}

    def of_targets(self, path: Path) -> Finding:
        """What a store's folder is."""
        kind: Kind = "targets"
        url = url_of(path)
        if url is not None:
            return Finding(
                kind=kind,
                what=f"{described(path)}, on their way to {url}",
                state="unfinished",
                why="`kdpipe cache-teacher` goes on with it, if params.yaml is as it was",
                cost="shards that were not uploaded yet",
            )
        if path.name in self._at_urls:
            why = f"its shards are at {self._at_urls[path.name]}, too"
            return Finding(kind=kind, what=described(path), state="earlier", why=why)
        published = next((at for at, each in self._stores.items() if each.get("fingerprint") == path.name), None)
        why = f"published as {published.relative_to(self._project.root)}" if published else self._difference(path)
        try:
            store = TargetStore.open(path)
            missing = len(store.missing())
        except StoreError as error:
            is_begun = any((path / each).exists() for each in ("extent.json", "commits.parquet", "commits"))
            state: State = "current" if published else "unreadable" if is_begun else "unfinished"
            why, cost = (str(error), "what is intact of it") if is_begun else ("no row was written yet", "nothing")
            return Finding(kind=kind, what=described(path), state=state, why=why, cost=cost)
        done = len(store.shards) * store.num_views - missing
        cost = _cost_of(store)
        if published or (not missing and self._is_todays(path)):
            return Finding(kind=kind, what=described(path), state="current", why=why, cost=cost)
        if missing:
            what = f"{described(path)}, {done:,} of {done + missing:,} shards"
            cost = f"those {done:,} shards"
            if self._is_todays(path):
                why = "of today's settings: `kdpipe cache-teacher` goes on with it"
                cost += " of today's settings, which are computed again"
            return Finding(kind=kind, what=what, state="unfinished", why=why, cost=cost)
        return Finding(kind=kind, what=described(path), state="earlier", why=why, cost=cost)

    def of_teacher(self, path: Path) -> Finding:
        """What a teacher model's folder is."""
        kind: Kind = "teacher"
        note = _json(path / DESCRIPTION)
        if not note:
            return Finding(kind=kind, what="teacher model", state="unfinished", cost="its checkpoint")
        published = [at for at, each in self._teachers.items() if each.get("fingerprint") == path.name]
        spoke = [at for at, manifest in self._work_stores.items() if _weights_of(manifest) == note.get("sha256")]
        names = sorted({str(self._work_stores[at].get("teacher", {}).get("name")) for at in spoke})
        what = " ".join(["teacher model", *(names[:1] or [at.name for at in published])])
        cost = "it is trained again"
        if published:
            why = f"published as {published[0].relative_to(self._project.root)}"
            return Finding(kind=kind, what=what, state="current", why=why, cost=cost)
        current = any(self._is_todays(at) for at in spoke)
        why = "its targets are current" if current else ""
        return Finding(kind=kind, what=what, state="current" if current else "earlier", why=why, cost=cost)

    def of_student(self, path: Path) -> Finding:
        """What a folder of student runs is."""
        runs = [each for each in sorted(path.glob("*/seed-*")) if each.is_dir()]
        notes = [_json(each / DESCRIPTION) for each in runs]
        arms = Counter(each.parent.name for each in runs)
        what = "student runs: " + ", ".join(f"{arm} x {count}" for arm, count in arms.items())
        trained = [note["fingerprint"] for note in notes if "fingerprint" in note]
        cost = f"{len(trained)} runs are trained again"
        if trained and trained[0] in self._students:
            why = f"published as {self._project.student_models.relative_to(self._project.root)}"
            return Finding(kind="student", what=what, state="current", why=why, cost=cost)
        if len(trained) < len(runs):
            return Finding(kind="student", what=what, state="unfinished", cost=f"{cost}, and a checkpoint is lost")
        todays, unknown = self._todays_student
        if todays is None:
            return Finding(kind="student", what=what, state="unknown", why=unknown, cost=cost)
        if trained[0] == todays:
            return Finding(kind="student", what=what, state="current", why="as params.yaml says today", cost=cost)
        return Finding(kind="student", what=what, state="earlier", cost=cost)

    def _is_todays(self, path: Path) -> bool:
        """Whether a store in the work area is published, or of today's sections while no published one is."""
        manifest = self._work_stores[path]
        if any(each.get("fingerprint") == path.name for each in self._stores.values()):
            return True
        wanted = [sections for sections in self._sections.values() if sections == manifest.get("sections")]
        return bool(wanted) and all(each.get("sections") != wanted[0] for each in self._stores.values())

    def _difference(self, path: Path) -> str:
        """How a store's settings differ from today's."""
        manifest = self._work_stores[path]
        name = manifest.get("teacher", {}).get("name")
        if name not in self._sections:
            return f"params.yaml has no teacher {name}"
        return first_difference(manifest.get("sections"), self._sections[name]) or "other code, weights or versions"

    @cached_property
    def _todays_student(self) -> tuple[str | None, str]:
        """Fingerprint of the student of today's params.yaml, or why there is none: stores that do not fit, say."""
        try:
            return Lesson(self._project).fingerprint, ""
        except (KdpipeError, OSError) as error:
            return None, f"today's student cannot be told: {error}"


def kind_of(path: Path) -> Kind:
    """What a folder of the work area is, by the files in it."""
    if (path / "manifest.json").is_file():
        return "targets"
    if (path / DESCRIPTION).is_file() or (path / CHECKPOINT).is_file():
        return "teacher"
    return "student" if any(path.glob("*/seed-*")) else "unknown"


def _cost_of(store: TargetStore) -> str:
    """What it takes to make a store again; rows are counted once per view."""
    table = store.manifest.teacher.get("table")
    if table:
        return f"{table} is read again"
    shown = sum(int(record.rows_computed.sum()) for record in store.records.values())
    views = f", in {store.num_views} views" if store.num_views > 1 else ""
    return f"the teacher runs on {shown:,} rows again{views}"


def described(path: Path) -> str:
    """A store in a few words, from its manifest; also while others write it."""
    manifest, extent = _json(path / "manifest.json"), _json(path / "extent.json")
    if not manifest:
        return "targets"
    encodings = ", ".join(f"{name} {each.get('name')}" for name, each in manifest.get("encodings", {}).items())
    name = manifest.get("teacher", {}).get("name", "a teacher")
    return f"targets of {name}: {extent.get('num_rows', 0):,} rows, {encodings}"


def _weights_of(manifest: Mapping[str, Any]) -> Any:
    return manifest.get("ingredients", {}).get("teacher", {}).get("weights", "")


def _json(path: Path) -> dict[str, Any]:
    """A JSON object; empty where there is none that can be read."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
