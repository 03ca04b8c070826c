"""Writing: a shard's commit against `np.save` + fsync; a capture against the bare loop over the same teacher."""

from __future__ import annotations

import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from benchmarks.measuring import cpu_s, interval_95, machine, shown
from benchmarks.read_store import BATCH_ROWS, create
from kdpipe.caching import capture
from kdpipe.data.prepared import PreparedInputs
from kdpipe.data.preparing import RowSchema, SourceColumns, SplitPlan, prepare
from kdpipe.models.mlp import MLP
from kdpipe.preprocess import Standardize
from kdpipe.store import TargetStore
from kdpipe.tasks.tabular import TabularClassification
from kdpipe.teachers.torch import TorchTeacher

NUM_FEATURES = 64
QUIET_CORES = 0.25
"""A pair is quiet when others used less of the machine; a capture overlaps only where a core is free."""


class _Table:
    """A source of one Arrow table."""

    def __init__(self, table: pa.Table) -> None:
        self._table = table

    def batches(self) -> Iterator[pa.RecordBatch]:
        return iter(self._table.to_batches(max_chunksize=4096))


def prepared(folder: Path, num_rows: int) -> PreparedInputs:
    """Rows of random float32 features, prepared on disk."""
    names = [f"x{index}" for index in range(NUM_FEATURES)]
    features = np.random.default_rng(0).normal(size=(NUM_FEATURES, num_rows)).astype(np.float32)
    rest = {"id": pa.array(range(num_rows)), "label": pa.array([0] * num_rows), "split": pa.array(["train"] * num_rows)}
    table = pa.table(rest | dict(zip(names, map(pa.array, features), strict=True)))
    task = TabularClassification(num_classes=2, columns=names)
    columns = SourceColumns(id="id", label="label", split="split")
    prepare(_Table(table), RowSchema(to_inputs=task.to_inputs, to_labels=task.to_labels), columns, SplitPlan(), folder)
    return PreparedInputs(folder / "inputs")


def teacher_of(inputs: PreparedInputs, hidden: int, num_classes: int) -> TorchTeacher:
    """An MLP of two hidden layers."""
    torch.manual_seed(0)
    model = MLP((NUM_FEATURES,), num_classes, hidden=[hidden, hidden])
    preprocess = Standardize(mean=[0.0] * NUM_FEATURES, std=[1.0] * NUM_FEATURES)
    return TorchTeacher(model, preprocess, num_classes, {}, inputs.read(np.zeros(1, np.int64)))


def run_bare(teacher: TorchTeacher, inputs: PreparedInputs, num_rows: int) -> None:
    """Read, preprocess, predict; what is said is thrown away."""
    for start in range(0, num_rows, BATCH_ROWS):
        teacher.predict(inputs.read(np.arange(start, min(start + BATCH_ROWS, num_rows))))


def calibrated(inputs: PreparedInputs, num_classes: int, us_per_row: float) -> TorchTeacher:
    """A teacher whose bare loop takes about so much CPU time."""
    hidden, num_rows = 512, min(len(inputs), 8 * BATCH_ROWS)
    for _ in range(4):
        teacher = teacher_of(inputs, hidden, num_classes)
        work = partial(run_bare, teacher, inputs, num_rows)
        work()
        seconds = statistics.median(measured(work).cpu for _ in range(5))
        hidden = max(16, round(hidden * (us_per_row * 1e-6 * num_rows / seconds) ** 0.5 / 16) * 16)
    return teacher_of(inputs, hidden, num_classes)


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Wall and CPU seconds, and how many cores others used meanwhile (0 where the system does not say it)."""

    wall: float
    cpu: float
    others: float


def measured(work: Callable[[], object]) -> Cost:
    """What some work costs."""
    wall, cpu, machine_s = time.perf_counter(), cpu_s(), _machine_cpu_s()
    work()
    wall, cpu = time.perf_counter() - wall, cpu_s() - cpu
    return Cost(wall=wall, cpu=cpu, others=max(0.0, _machine_cpu_s() - machine_s - cpu) / wall)


def _machine_cpu_s() -> float:
    """CPU seconds of everybody, stolen ones too, since the machine began."""
    path = Path("/proc/stat")
    if not path.exists():
        return 0.0
    user, nice, system, _idle, _waiting, *rest = map(int, path.read_text().split("\n", 1)[0].split()[1:9])
    return (user + nice + system + sum(rest)) / os.sysconf("SC_CLK_TCK")


def write_shards(folder: Path, num_rows: int, num_classes: int, rounds: int) -> str:
    """CPU of `store.write` against `np.save` + fsync of the same float16 logits, shard by shard."""
    generator = np.random.default_rng(0)
    values = generator.standard_normal((num_rows, num_classes), np.float32).astype(np.float16)
    rest = {"logits.row_max": np.zeros(num_rows, np.float32), "statistics": np.zeros((num_rows, 3), np.float32)}
    arrays = {"logits": values, **rest}

    def by_numpy(store: TargetStore) -> None:
        for _, shard in store.missing():
            with (store.path / f"{shard.index}.npy").open("wb") as file:
                np.save(file, values[shard.start : shard.stop])
                file.flush()
                os.fsync(file.fileno())

    def by_store(store: TargetStore) -> None:
        for view, shard in store.missing():
            part = {name: each[shard.start : shard.stop] for name, each in arrays.items()}
            store.write(view, shard, part, BATCH_ROWS)

    found: dict[str, list[Cost]] = {"np.save + fsync": [], "store.write": []}
    for _ in range(rounds + 1):
        for (name, costs), write in zip(found.items(), (by_numpy, by_store), strict=True):
            store = create(folder / name, num_rows, num_classes)
            costs.append(measured(partial(write, store)))
            shutil.rmtree(folder / name)
    lines = ["| writer | CPU us/row | x np.save | wall us/row |", "| --- | --- | --- | --- |"]
    base = [each.cpu for each in found["np.save + fsync"][1:]]  # the first round warms up
    for name, costs in found.items():
        wall, cpu = [each.wall for each in costs[1:]], [each.cpu for each in costs[1:]]
        ratios = shown([each / other for each, other in zip(cpu, base, strict=True)])
        per_row = [shown([each / num_rows * 1e6 for each in values]) for values in (cpu, wall)]
        lines.append(f"| {name} | {per_row[0]} | {ratios} | {per_row[1]} |")
    return "\n".join(lines)


def capture_rows(folder: Path, num_rows: int, num_classes: int, rounds: int, us_per_row: float) -> str:
    """Wall and CPU of a capture against the bare loop, in pairs of changing order; and of the quiet pairs alone."""
    inputs = prepared(folder / "prepared", num_rows)
    manifest = create(folder / "shape", num_rows, num_classes).manifest
    teacher = calibrated(inputs, num_classes, us_per_row)

    def run_capture() -> Cost:
        shutil.rmtree(folder / "store", ignore_errors=True)
        store = TargetStore.create(folder / "store", manifest, inputs.sample_ids, inputs.digests)
        return measured(lambda: capture(store, teacher, inputs, BATCH_ROWS))

    pairs: list[tuple[Cost, Cost]] = []
    for number in range(rounds + 1):
        first = run_capture() if number % 2 else None
        bare = measured(lambda: run_bare(teacher, inputs, num_rows))
        pairs.append((bare, first or run_capture()))
    pairs = pairs[1:]  # the first warms up
    quiet = [pair for pair in pairs if max(each.others for each in pair) < QUIET_CORES]
    lines = [
        "| pairs | cores used by others | | bare us/row | capture us/row | slower by: mean (95 % interval) |",
        "| --- | --- | --- | --- | --- | --- |",
        *_lines("all", pairs, num_rows),
    ]
    return "\n".join(lines + (_lines("quiet", quiet, num_rows) if len(quiet) > 1 else []))


def _lines(name: str, pairs: Sequence[tuple[Cost, Cost]], num_rows: int) -> list[str]:
    others = shown([max(each.others for each in pair) for pair in pairs])
    lines = []
    for what in ("wall", "cpu"):
        seconds = [(getattr(bare, what), getattr(kept, what)) for bare, kept in pairs]
        per_row = [shown([each / num_rows * 1e6 for each in values]) for values in zip(*seconds, strict=True)]
        mean, low, high = interval_95([100 * (kept / bare - 1) for bare, kept in seconds])
        slower = f"{mean:.1f} % ({low:.1f} to {high:.1f})"
        lines.append(f"| {name}, {len(pairs)} | {others} | {what} | {per_row[0]} | {per_row[1]} | {slower} |")
    return lines


def main(
    num_rows: int = 65_536,
    num_classes: int = 1000,
    rounds: int = 11,
    pairs: int = 41,
    captured: Sequence[tuple[int, int]] = ((32_768, 10), (32_768, 1000)),
    us_per_row: float = 50.0,
    folder: Path | None = None,
) -> None:
    """Print the tables; `captured` are rows and classes of the captures, each in so many `pairs`: 11 leave +-4 %."""
    print(machine("numpy", "torch", "google-crc32c") + "\n")
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        print(f"{num_rows:,} rows x {num_classes:,} classes float16, {rounds} rounds\n")
        print(write_shards(Path(scratch), num_rows, num_classes, rounds))
    for rows, classes in captured:
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            print(f"\ncapture of {rows:,} rows x {classes:,} classes, batches of {BATCH_ROWS}, {pairs} pairs\n")
            print(capture_rows(Path(scratch), rows, classes, pairs, us_per_row))
