"""`make recipes`, or `python -m benchmarks.recipes NAME ...`: `dvc repro` in folders of examples/, and what it came to.

Two tables, as Markdown: results, read from what `dvc repro` left (metrics.json, per_seed.json, timings.json, the
stores); and the seconds of each stage that it ran. A recipe that fails is named after them, and the status is 1.
"""

from __future__ import annotations

import json
import re
import resource
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kdpipe_stages import stores
from kdpipe_stages.lesson import teachers_of
from kdpipe_stages.project import Project

EXAMPLES = Path(__file__).parents[2] / "examples"
COLUMNS = (
    "recipe",
    "teacher, %",
    "student, %",
    "labels only, %",
    "gain, points",
    "seeds",
    "parameters of teacher",
    "of student",
    "bytes per row",
    "s to train the teacher",
    "s of its pass",
    "s per epoch of the student",
)
STAGES = ("prepare_data", "train_teacher", "cache_teacher", "train_student", "evaluate")
RUNNING = re.compile(r"Running stage '(\w+)")
OVER = re.compile(r"Running stage '|Stage '|'.+' didn't change")


def reproduce(folder: Path) -> dict[str, float]:
    """Run `dvc repro`: seconds by stage that ran (`foreach` stages together), of all as `dvc repro`, and of CPU.

    Raises `subprocess.CalledProcessError` where it fails.
    """
    seconds: dict[str, float] = {}
    begun, spent, stage = time.perf_counter(), _cpu_seconds(), None
    since = begun
    with subprocess.Popen(
        ["dvc", "repro"], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", file=sys.stderr, flush=True)
            if OVER.match(line):
                _add(seconds, stage, since)
                running, since = RUNNING.match(line), time.perf_counter()
                stage = running[1] if running else None
    _add(seconds, stage, since)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, process.args)
    return seconds | {"dvc repro": time.perf_counter() - begun, "CPU": _cpu_seconds() - spent}


def _add(seconds: dict[str, float], stage: str | None, since: float) -> None:
    if stage is not None:
        seconds[stage] = seconds.get(stage, 0.0) + time.perf_counter() - since


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def row(folder: Path) -> list[str]:
    """A recipe's cells: accuracies with deviations over seeds, and the gain paired by seed with its 95 % interval."""
    project = Project(folder / "params.yaml")
    metrics, per_seed, timings = (
        json.loads((folder / f"{name}.json").read_text()) for name in ("metrics", "per_seed", "timings")
    )
    names = teachers_of(project.params.student)
    teachers = [metrics["teacher"], *(metrics[f"teacher_{name}"] for name in names[1:])]
    trained, passes = timings.get("train_teacher", {}), timings.get("cache_teacher", {})
    epoch = timings.get("train_student", {}).get("student", {})
    return [
        folder.name,
        _each(names, [_percent(each) for each in teachers]),
        f"{project.params.student.model.path.rpartition(':')[2]}: {_percent(metrics['student'])}",
        _percent(metrics.get("baseline", {})),
        _gain(metrics["gain"].get("over_baseline")),
        str(len(per_seed["student"])),
        _each(names, [f"{each['parameters']:,}" if "parameters" in each else "" for each in teachers]),
        f"{metrics['student']['parameters']:,}",
        _each(names, [f"{stores.inspect(project.store(name))['bytes_per_row']:.2f}" for name in names]),
        _each(names, [_seconds(trained.get(name, {}), "seconds") for name in names]),
        _each(names, [_seconds(passes.get(name, {}), "teacher_seconds") for name in names]),
        _seconds(epoch, "seconds_per_epoch"),
    ]


def _each(names: Sequence[str], values: Sequence[str]) -> str:
    """Of several teachers each by its name."""
    pairs = zip(names, values, strict=True)
    return values[0] if len(names) == 1 else ", ".join(f"{name} {value}" for name, value in pairs if value)


def _percent(metrics: Mapping[str, Any]) -> str:
    if metrics.get("accuracy") is None:
        return ""
    spread = f" ± {100 * metrics['accuracy_std']:.2f}" if metrics["accuracy_std"] else ""
    return f"{100 * metrics['accuracy']:.2f}{spread}"


def _gain(gain: Mapping[str, Any] | None) -> str:
    if gain is None:
        return ""
    interval = "" if gain["low"] is None else f" [{100 * gain['low']:.2f}, {100 * gain['high']:.2f}]"
    return f"{100 * gain['mean']:+.2f}{interval}: {gain['verdict']}"


def _seconds(noted: Mapping[str, float], key: str) -> str:
    return f"{noted[key]:,.2f}" if key in noted else ""


def show_results(rows: Sequence[Sequence[str]]) -> None:
    """Print the table of results, a `row` each."""
    _table(COLUMNS, rows)


def show_seconds(seconds: Mapping[str, Mapping[str, float]]) -> None:
    """Print the table of seconds, by recipe; a stage that did not run is left out."""
    rows = []
    for name, of in seconds.items():
        own = [stage for stage in of if stage not in (*STAGES, "dvc repro", "CPU")]
        cells = [f"{of[stage]:.1f}" if stage in of else "" for stage in (*STAGES, "dvc repro", "CPU")]
        rows.append([name, ", ".join(f"{stage} {of[stage]:.1f}" for stage in own), *cells])
    _table(["recipe", "stages of its own, s", *(f"{stage}, s" for stage in (*STAGES, "dvc repro", "CPU"))], rows)


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    print(f"| {' | '.join(columns)} |\n|{' --- |' * len(columns)}")
    for cells in rows:
        print(f"| {' | '.join(cells)} |")


def main(names: Sequence[str]) -> int:
    """Reproduce recipes, show what those that did not fail came to, and name the others: the exit status."""
    known = sorted(path.parent.name for path in EXAMPLES.glob("*/dvc.yaml"))
    unknown = [name for name in names if name not in known]
    if unknown:
        print(f"there is no recipe {', '.join(unknown)}; there are {', '.join(known)}", file=sys.stderr)
        return 1
    seconds, rows, failed = {}, [], {}
    for name in names:
        try:
            seconds[name] = reproduce(EXAMPLES / name)
            rows.append(row(EXAMPLES / name))
        except Exception as error:  # whatever it is, it must not lose what the other recipes came to
            failed[name] = f"{type(error).__name__}: {error}"
    show_results(rows)
    print()
    show_seconds(seconds)
    for name, reason in failed.items():
        print(f"{name} failed: {reason}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
