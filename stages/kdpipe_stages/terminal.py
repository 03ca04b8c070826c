"""What a person sees: progress bars and messages on stderr, tables and answers on stdout."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich import box
from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

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


def answer_table(table: Table) -> None:
    """A wide table of the command's answer: a narrow terminal wraps its lines, but no number is cut off."""
    Console(file=answers.file, width=1000, highlight=False).print(table)


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
        if key == "encodings":
            shown = "\n".join(f"{output}: {_encoding(each)}" for output, each in value.items())
        elif isinstance(value, Mapping):
            shown = ", ".join(f"{name} {_short(each)}" for name, each in value.items())
        else:
            shown = _short(value)
        table.add_row(key.replace("_", " "), shown)
    return table


def _encoding(value: Mapping[str, Any]) -> str:
    """An encoding as in params.yaml."""
    given = {"encoding": value["name"], **{key: each for key, each in value.items() if key != "name"}}
    return ", ".join(f"{key}: {_short(each)}" for key, each in given.items() if each is not None)


def _short(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:.4g}"
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
        accuracy, spread = _percent(each, "accuracy"), _percent(each, "accuracy_std")
        table.add_row(
            label,
            accuracy if key.startswith("teacher") or not spread else f"{accuracy} ± {spread}",
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


def estimate_table(estimate: Mapping[str, Any]) -> Table:
    """`kdpipe estimate` for a person: an encoding per line, three columns per temperature."""
    title = (
        f"{estimate['teacher']}: {estimate['rows_to_show']:,} targets (rows x views) of {estimate['num_classes']:,} "
        f"classes; measured on {estimate['sample']['rows']:,} rows"
    )
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=0, show_edge=False)
    table.add_column("", no_wrap=True)
    headers = ["bytes\n/row", "\ncompact", "\ntotal", "needed\nMB/s", "top-1\nsame %"]
    for each in estimate["temperatures"]:
        headers += [f"T = {each:g}\nKL", "\nhead %", "\ngrad %"]
    for header in headers:
        table.add_column(header, justify="right", no_wrap=True)
    for each in estimate["encodings"]:
        marks = (">" if each["name"] == estimate["recommended"]["name"] else " ") + "* "[not each["in_params"]]
        cells = [
            f"{each['bytes_per_row']:,.0f}",
            f"{each['bytes_per_row_compact']:,.0f}",
            decimal(round(each["bytes"])),
            f"{each['needed_mb_per_s']:,.3g}",
            f"{100 * each['top1_agreement']:.1f}",
        ]
        for at in each["at"]:
            cells += [
                _or_dash(at["kl"], ".1e"),
                _or_dash(at["head_mass"], ".1%"),
                _or_dash(at["gradient_error"], ".2%"),
            ]
        table.add_row(f"{marks} {each['name']}", *cells)
    return table


def _or_dash(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form).rstrip("%")


def estimate_lines(estimate: Mapping[str, Any]) -> list[str]:
    """What stands below the table: the marks, seconds, break-even, the disk, and the recommendation."""
    hours, pays, disk = estimate["teacher_hours"], estimate["break_even"], estimate["disk"]
    speed, recommended = disk["write_mb_per_s"], estimate["recommended"]
    settings = ", ".join(f"{key}: {value}" for key, value in (recommended["settings"] or {}).items())
    refusals: dict[str, list[str]] = {}
    for each in estimate["encodings"]:
        refusals.setdefault(each["refused"], []).append(each["name"])
    return [
        "> recommended   * in params.yaml   - not served at this T   beside each: "
        f"{estimate['other_bytes_per_row']} bytes per row of statistics, coverage, features",
        "KL: teacher || targets, nats; topk's is over k + 1 buckets, so it belongs to head %, the kept classes' mass",
        "grad %: error of the gradient that a student would see; that of draws averages out over many of them",
        f"teacher: {estimate['teacher_rows_per_s']:,.0f} rows/s, {_in_time(hours)} for {estimate['rows_to_show']:,} "
        f"targets. Without a cache each student needs {_in_time(pays['teacher_hours_per_student'])} of it "
        f"({pays['epochs']} epochs x {pays['rows']:,} rows): caching has paid after {pays['students']:,} "
        f"student{'s' * (pays['students'] > 1)}; `train-student` trains {pays['students_per_run']}",
        f"disk of data/: {speed['median']:,.0f} MB/s ({speed['lowest']:,.0f} to {speed['highest']:,.0f} in "
        f"{disk['writes']} writes of {decimal(disk['bytes_per_write'])}), {decimal(disk['free_bytes'])} free",
        *(f"cannot serve the student: {', '.join(names)}: {why}" for why, names in refusals.items() if why),
        *(f"cannot store this teacher: {name}: {why}" for name, why in estimate["excluded"].items()),
        f"recommended: {recommended['name'] or 'nothing'}: {recommended['reason']}",
        *([f"targets: {{{estimate['teacher']}: {{{settings}}}}}"] if settings else []),
    ]


def _in_time(hours: float) -> str:
    """Hours as a person says them."""
    if hours >= 1:
        return f"{hours:,.1f} h"
    return f"{60 * hours:.1f} min" if hours * 60 >= 1 else f"{3600 * hours:.3g} s"


def holdings_table(holdings: Sequence[Mapping[str, Any]]) -> Table:
    """`kdpipe gc` for a person."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("fingerprint", no_wrap=True)
    table.add_column("", no_wrap=True)
    for header in ("size", "frees"):
        table.add_column(header, justify="right", no_wrap=True)
    table.add_column("what, why, and what removal costs", overflow="fold")
    for each in holdings:
        cost = "" if each["state"] in ("current", "in progress", "leftover") else f"costs: {each['cost']}"
        leftovers = f"leftover files: {len(each['leftovers'])}" if each["leftovers"] else ""
        text = "\n".join(line for line in (each["what"], each["why"], cost, leftovers) if line)
        sizes = (decimal(each["num_bytes"]), decimal(each["freed_bytes"]))
        table.add_row(each["fingerprint"][:12], each["state"], *sizes, Text(text))
    return table


def holdings_summary(holdings: Sequence[Mapping[str, Any]], path: str) -> str:
    """The closing line of `kdpipe gc`."""
    cleared = [each for each in holdings if each["state"] in ("earlier", "leftover")]
    freed = decimal(sum(each["freed_bytes"] for each in cleared))
    swept = sum(len(each["leftovers"]) for each in holdings if each not in cleared)
    leftovers = f", {swept} leftover file{'s' * (swept > 1)} in others" if swept else ""
    return (
        f"{path}: {decimal(sum(each['num_bytes'] for each in holdings))} in {len(holdings)} folders; --remove-earlier "
        f"would remove {len(cleared)} of them{leftovers}, and free {freed}"
    )


def removal_lines(done: Mapping[str, Any]) -> list[str]:
    """What `kdpipe gc --remove` did."""
    lines = [f"removed {each}" for each in done["removed"]]
    lines += [f"left as it is: {each}" for each in done["left"]]
    return [*lines, f"{len(done['removed'])} removed, {decimal(done['freed_bytes'])} freed"]
