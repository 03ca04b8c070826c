"""`kdpipe demo`: every stage in order, on real data, with a table at the end."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from kdpipe.data.sources import write_digits
from kdpipe.store import TargetStore
from kdpipe_stages import commands
from kdpipe_stages.project import Project

TEMPLATES = ("params.yaml", "dvc.yaml")
DIGITS = Path("data") / "raw" / "digits.parquet"


@dataclass(frozen=True, kw_only=True)
class Demonstrated:
    """The demo's result, and what it took on this machine."""

    title: str
    metrics: Mapping[str, Any]
    timings: Mapping[str, Any]
    notes: Sequence[str]


def scaffold(folder: Path) -> None:
    """Write the demo's params.yaml, dvc.yaml and data into a folder; what is there already stays."""
    if (folder / "params.yaml").exists():
        return
    for name in TEMPLATES:
        if not (folder / name).exists():
            with resources.as_file(resources.files("kdpipe_stages") / "templates" / "digits" / name) as template:
                shutil.copyfile(template, folder / name)
    if not (folder / ".gitignore").exists():
        (folder / ".gitignore").write_text("/data/\n/timings.json\n")
    if not (folder / DIGITS).exists():
        write_digits(folder / DIGITS)


def run(project: Project) -> Demonstrated:
    """Run the stages that `dvc repro` would run, in one process; stages that are complete do nothing."""
    commands.prepare_data(project)
    for name in project.params.teachers:
        commands.train_teacher(project, name)
        commands.cache_teacher(project, name)
    commands.train_student(project)
    commands.evaluate(project)
    written = {name: json.loads((project.root / f"{name}.json").read_text()) for name in ("metrics", "timings")}
    return Demonstrated(title=_title(project), **written, notes=_notes(project, written["timings"]))


def _title(project: Project) -> str:
    student = project.params.student
    known = "all labels of its rows"
    if student.labelled_rows is not None:
        known = f"{student.labelled_rows:,} labels"
    elif student.labelled_fraction is not None:
        known = f"{student.labelled_fraction:.3g} of the labels of its rows"
    return f"split {project.params.evaluate.split}; the student knows {known}; {student.seeds} seeds"


def _notes(project: Project, timings: Mapping[str, Any]) -> list[str]:
    notes = []
    for name in project.params.teachers:
        store = TargetStore.open(project.store(name))
        passed = timings.get("cache_teacher", {}).get(name)
        seconds = f"; teacher pass of {passed['num_rows']:,} rows: {passed['teacher_seconds']:.2f} s" if passed else ""
        notes.append(
            f"store of {name}: {store.num_rows:,} rows, {store.num_bytes:,} bytes "
            f"({store.num_bytes / store.num_rows:.0f} per row){seconds}"
        )
    return notes
