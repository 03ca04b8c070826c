"""Each stage as a person runs it: with a progress bar, and a closing message on stderr.

A stage is imported by its own command only: the student's commands reach no teacher.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from kdpipe_stages.terminal import progress_bar, say

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from kdpipe.caching import CacheProgress
    from kdpipe.training import Progress
    from kdpipe_stages.project import Project
    from kdpipe_stages.train_student import StudentProgress


def prepare_data(project: Project) -> None:
    """`kdpipe prepare-data`."""
    from kdpipe_stages import prepare_data as stage

    done = stage.run(project)
    splits = ", ".join(
        f"{name} {count['rows']:,} ({count['labelled']:,} labelled)" for name, count in done.splits.items()
    )
    unused = done.num_rows - sum(count["rows"] for count in done.splits.values())
    rest = f"; {unused:,} of no split, which are not used" if unused else ""
    say(f"prepare-data   {done.num_rows:,} rows, {done.num_new:,} of them new: {splits}{rest}")
    for warning in stage.warnings(project):
        say(f"warning: {warning}")


def train_teacher(project: Project, name: str) -> None:
    """`kdpipe train-teacher NAME`."""
    from kdpipe_stages import train_teacher as stage

    with progress_bar(f"train-teacher {name}") as advance:

        def on_progress(now: Progress) -> None:
            advance(now.step, now.steps, f"loss {now.loss:.3f}, {now.rows_per_s:,.0f} rows/s")

        done = stage.run(project, name, on_progress)
    what = f"nothing to do, {done.skipped}" if done.skipped else f"trained in {done.seconds:.1f} s"
    say(f"train-teacher  {name}: {what}")


def cache_teacher(project: Project, name: str, repair: bool = False, shards: str | None = None) -> None:
    """`kdpipe cache-teacher NAME`."""
    from kdpipe.caching import WHOLE, Share
    from kdpipe_stages import cache_teacher as stage

    share = WHOLE if shards is None else Share.parse(shards)
    with progress_bar(f"cache-teacher {name}") as advance:

        def on_progress(now: CacheProgress) -> None:
            advance(now.rows_done, now.rows_total, f"{now.rows_per_s:,.0f} rows/s")

        done = stage.run(project, name, on_progress, repair=repair, share=share)
    table = project.teacher(name).table
    some = "" if done.rows_read == done.rows_computed else f"{done.rows_read:,} of "
    computed = f"{some}{done.rows_computed:,} rows "
    computed += f"read from {table}" if table else f"computed in {done.teacher_seconds:.2f} s of teacher"
    if done.at_once is not None:
        computed += f", {done.at_once:,} rows at a time as memory ran out"
    if done.shards_owed:
        say(
            f"cache-teacher  {name}: shards {shards}: {computed}; others still owe {done.shards_owed:,} shards, "
            "and the last of them publishes the store"
        )
        return
    intact = "every shard is as committed" if repair else "complete already"
    nothing = f"{intact}, {'published' if done.published else 'nothing to do'}"
    what = computed if done.rows_computed else nothing
    url = project.targets(name).url
    where = "" if url is None else f", at {url}"
    say(f"cache-teacher  {name}: {what}; store of {done.num_rows:,} rows, {done.num_bytes:,} bytes{where}")
    if done.rows_computed and done.columns_not_read:
        say(f"cache-teacher  {name}: columns of its table that are not read: {', '.join(done.columns_not_read)}")
    if done.rows_not_covered:
        say(f"cache-teacher  {name}: covers {done.num_rows - done.rows_not_covered:,} of {done.num_rows:,} rows")


def train_student(project: Project) -> None:
    """`kdpipe train-student`."""
    from kdpipe_stages import train_student as stage

    with progress_bar("train-student") as advance:

        def on_progress(at: StudentProgress) -> None:
            now = at.now
            done = (at.number - 1) * now.steps + now.step
            note = f"{at.number}/{at.of} {at.run.arm}: loss {now.loss:.3f}, {now.rows_per_s:,.0f} rows/s"
            advance(done, at.of * now.steps, note)

        done = stage.run(project, on_progress)
    say(f"train-student  {len(done.trained)} trained, {len(done.skipped)} were ready")


def evaluate(project: Project) -> dict[str, Any]:
    """`kdpipe evaluate`."""
    from kdpipe_stages import evaluate as stage

    metrics = stage.run(project)
    student, split = metrics["student"], project.params.evaluate.split
    what, of_what = "accuracy", ""
    if math.isnan(student["accuracy"]):
        what, of_what = "agreement", ", where no row has a label"
    say(f"evaluate       student {what} {student[what]:.4f} on {split}{of_what}; the rest in metrics.json")
    return metrics


def estimate(project: Project, name: str, rows: int | None = None) -> dict[str, Any]:
    """`kdpipe estimate NAME`."""
    from kdpipe_stages import estimate as stage

    with progress_bar(f"estimate {name}") as advance:
        return stage.run(project, name, stage.SAMPLE_ROWS if rows is None else rows, advance)


def verify_deep(store: Path | str, project: Project, rows: int | None = None) -> Sequence[str]:
    """`kdpipe verify STORE --deep`, after the store's bytes were verified."""
    from kdpipe_stages import deep_verify as stage

    with progress_bar("verify --deep") as advance:
        return stage.run(project, store, stage.SAMPLE_ROWS if rows is None else rows, advance)
