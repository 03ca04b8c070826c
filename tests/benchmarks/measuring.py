"""How the benchmarks measure: CPU time, rounds interleaved over what is compared, medians with ranges.

A virtual machine may give up the cache of files that nobody read for a while; who reads them next pays for the disk.
"""

from __future__ import annotations

import gc
import itertools
import os
import platform
import resource
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from scipy import stats


def cpu_s() -> float:
    """CPU seconds of this process, all its threads, and its children that ended."""
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + ended.ru_utime + ended.ru_stime


def read_files(path: Path) -> None:
    """Read a file, or every file of a folder, so that it is in the page cache."""
    buffer = memoryview(bytearray(2**22))
    for each in [path] if path.is_file() else sorted(path.rglob("*")):
        if each.is_file():
            with each.open("rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass


@dataclass(frozen=True, kw_only=True)
class Reader:
    """A way to read a shuffled epoch of the files at `path`: `batches(epoch)` opens them and yields arrays `[B, C]`.

    `warmup_rows` are not part of the steady state: a reader with a buffer or threads of its own fills them first.
    With 0 the whole epoch counts, its start too.
    """

    name: str
    path: Path
    batches: Callable[[int], Iterable[Any]]
    warmup_rows: int = 0


@dataclass(frozen=True)
class Cost:
    """What a reader cost, one value per round: CPU ms until the first batch, CPU us per row after the warm-up."""

    start_ms: list[float] = field(default_factory=list)
    us_per_row: list[float] = field(default_factory=list)


def compare(readers: Sequence[Reader], num_rows: int, row_shape: tuple[int, ...], rounds: int) -> dict[str, Cost]:
    """Read one epoch with every reader in every round; each epoch must hold `num_rows` rows of floats."""
    costs = {reader.name: Cost() for reader in readers}
    for epoch in range(rounds):
        for reader in readers:
            gc.collect()
            read_files(reader.path)
            start_s, steady_s, rows, steady_rows = _read_epoch(reader, epoch, row_shape)
            if rows != num_rows:
                raise ValueError(f"{reader.name}: an epoch has {rows} rows, expected {num_rows}")
            costs[reader.name].start_ms.append(start_s * 1e3)
            costs[reader.name].us_per_row.append(steady_s / max(steady_rows, 1) * 1e6)
    return costs


def _read_epoch(reader: Reader, epoch: int, row_shape: tuple[int, ...]) -> tuple[float, float, int, int]:
    """CPU seconds to the first batch and of the steady state; rows in all and of the steady state."""
    rows = steady_rows = 0
    first_s = None
    began = cpu_s()
    steady_from = None if reader.warmup_rows else began
    for batch in reader.batches(epoch):
        if first_s is None:
            first_s = cpu_s() - began
            _check(reader.name, batch, row_shape)
        rows += len(batch)
        if steady_from is not None:
            steady_rows += len(batch)
        elif rows >= reader.warmup_rows:
            steady_from = cpu_s()
    if not steady_rows:  # fewer rows than the warm-up
        return first_s or 0.0, cpu_s() - began, rows, rows
    return first_s or 0.0, cpu_s() - (steady_from or began), rows, steady_rows


def _check(name: str, batch: Any, row_shape: tuple[int, ...]) -> None:
    if batch.shape[1:] != row_shape or "float" not in str(batch.dtype):
        raise ValueError(f"{name}: a batch is {batch.shape} {batch.dtype}, expected rows of floats {row_shape}")


def table(costs: Mapping[str, Cost], bases: Sequence[str]) -> str:
    """Markdown: medians with ranges, and the ratio to each base, round by round."""
    lines = [
        f"| reader | CPU us/row | {' | '.join(f'x {base}' for base in bases)} | CPU ms to the first batch |",
        f"| --- | --- | {'--- | ' * len(bases)}--- |",
    ]
    for name, cost in costs.items():
        ratios = [
            shown([value / base for value, base in zip(cost.us_per_row, costs[each].us_per_row, strict=True)])
            for each in bases
        ]
        lines.append(f"| {name} | {shown(cost.us_per_row)} | {' | '.join(ratios)} | {shown(cost.start_ms)} |")
    return "\n".join(lines)


def shown(values: Sequence[float]) -> str:
    """Median (min-max), three digits."""
    return f"{_digits(statistics.median(values))} ({_digits(min(values))}-{_digits(max(values))})"


def _digits(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def interval_95(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean, and its 95 % t interval."""
    mean = statistics.fmean(values)
    half = float(stats.t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / len(values) ** 0.5
    return mean, mean - half, mean + half


def machine(*packages: str) -> str:
    """One line that says where and with what a figure was measured."""
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        models = (line.split(":")[1].strip() for line in itertools.chain(file) if line.startswith("model name"))
        model = next(models, platform.machine())
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    load = "/".join(f"{each:.1f}" for each in os.getloadavg())
    return f"{model}, {os.cpu_count()} cores, load {load}, Python {platform.python_version()}, {versions}"
