"""What a person sees: progress bars and messages on stderr, tables and answers on stdout."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

errors = Console(stderr=True, soft_wrap=True, highlight=False)
answers = Console(soft_wrap=True, highlight=False)

REFRESH_S = 0.1
LINE_EVERY_S = 30.0


def say(message: str) -> None:
    """A message to the person at the terminal."""
    errors.print(message, markup=False)


def answer(text: str) -> None:
    """A line of the command's answer."""
    answers.print(text, markup=False)


def answer_json(value: Any) -> None:
    """The command's answer for a program."""
    print(json.dumps(value, indent=2, sort_keys=True))  # noqa: T201


Advance = Callable[[int, int, str], None]
"""(done, total, note) -> moves the bar."""


@contextmanager
def progress_bar(title: str) -> Iterator[Advance]:
    """A bar with time left and a note, 80 columns wide; on a pipe or a log file a line now and then."""
    if not errors.is_terminal:
        yield _lines(title)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=7),
        TaskProgressColumn(),
        TimeRemainingColumn(compact=True),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=errors, transient=True, auto_refresh=False) as progress:
        bar: TaskID = progress.add_task(title, total=None, note="")
        shown = 0.0

        def advance(done: int, total: int, note: str) -> None:
            nonlocal shown
            now = time.monotonic()
            if now - shown < REFRESH_S and done < total:
                return
            shown = now
            progress.update(bar, completed=done, total=total, note=note, refresh=True)

        yield advance


def _lines(title: str) -> Advance:
    """For a pipe or a log file: a line now and then."""
    said = time.monotonic()

    def advance(done: int, total: int, note: str) -> None:
        nonlocal said
        if time.monotonic() - said >= LINE_EVERY_S:
            said = time.monotonic()
            say(f"{title} {done / max(1, total):.0%} {note}")

    return advance


def store_table(description: Mapping[str, Any]) -> Table:
    """`kdpipe inspect` for a person."""
    table = Table(title=description["path"], show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for key, value in description.items():
        if key == "path":
            continue
        if isinstance(value, Mapping):
            shown = ", ".join(f"{name} {_short(each)}" for name, each in value.items())
        else:
            shown = _short(value)
        table.add_row(key.replace("_", " "), shown)
    return table


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        return " ".join(str(each) for each in value.values())
    return f"{value:,}" if isinstance(value, int) else str(value)


_ROWS = {
    "student": "student",
    "baseline": "labels only",
    "baseline_label_smoothing": "label smoothing",
}


def result_table(metrics: Mapping[str, Any], timings: Mapping[str, Any], title: str) -> Table:
    """The pipeline's result: teacher, student from cached targets, the same student from labels only."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("", no_wrap=True)
    for header in ("accuracy %", "agrees %", "ECE %", "parameters", "kB", "s/epoch"):
        table.add_column(header, justify="right", no_wrap=True)
    teachers = {key: key.replace("_", " ", 1) for key in metrics if key.startswith("teacher_")}
    for key, label in {"teacher": "teacher", **teachers, **_ROWS}.items():
        if key not in metrics:
            continue
        each = metrics[key]
        seconds = timings.get("train_student", {}).get(key)
        spread = "" if key.startswith("teacher") else f" ± {100 * each['accuracy_std']:.2f}"
        table.add_row(
            label,
            f"{100 * each['accuracy']:.2f}{spread}",
            _percent(each, "agreement"),
            _percent(each, "ece"),
            f"{each.get('parameters', 0):,}",
            f"{each.get('size_bytes', 0) / 1000:,.1f}",
            f"{seconds['seconds_per_epoch']:.3f}" if seconds else "",
        )
    return table


def _percent(metrics: Mapping[str, Any], key: str) -> str:
    return f"{100 * metrics[key]:.2f}" if metrics.get(key) is not None else ""


def gain_lines(gains: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """One sentence per comparison."""
    lines = []
    for key, gain in gains.items():
        what = _ROWS[key.removeprefix("over_")]
        interval = (
            f" (95 % paired interval {100 * gain['low']:+.2f} to {100 * gain['high']:+.2f})"
            if gain["low"] is not None
            else ""
        )
        lines.append(f"student over {what}: {100 * gain['mean']:+.2f} points{interval}: {gain['verdict']}")
    return lines
