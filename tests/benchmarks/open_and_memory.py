"""How long a store of many shards takes to open, and how much memory a long stream takes."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import torch

from benchmarks.measuring import machine, shown
from benchmarks.read_store import BATCH_ROWS, create, stored
from kdpipe.order import Shuffle
from kdpipe.store import TargetStore, TargetStream
from kdpipe.store.stream import RAM_BUDGET_BYTES

MB = 1e6


@contextmanager
def without_fsync() -> Iterator[None]:
    """What is built here need not survive a power cut."""
    with mock.patch.object(os, "fsync", return_value=None):
        yield


def build(folder: Path, num_rows: int, num_classes: int, shard_rows: int | None = None) -> TargetStore:
    """A store whose shards all hold the same random rows."""
    store = create(folder, num_rows, num_classes, shard_rows)
    generator = torch.Generator().manual_seed(0)
    with without_fsync():
        longest = max(shard.num_rows for _, shard in store.missing())
        arrays = stored(3 * torch.randn(longest, num_classes, generator=generator))
        for view, shard in store.missing():
            store.write(view, shard, {name: each[: shard.num_rows] for name, each in arrays.items()}, BATCH_ROWS)
        store.finish()
    return TargetStore.open(folder)


def opening(folder: Path, num_shards: int, shard_rows: int, rounds: int) -> None:
    """Print how long it takes to open a store, and to have its first batch."""
    path = build(folder / "many", num_shards * shard_rows, 10, shard_rows).path

    def first_batch() -> None:
        next(iter(TargetStream(TargetStore.open(path), batch_size=BATCH_ROWS)))

    rows = {
        "`TargetStore.open`": lambda: TargetStore.open(path),
        "`open` and `check_complete`": lambda: TargetStore.open(path).check_complete(),
        "`open` and the first batch of a stream": first_batch,
    }
    print(f"{num_shards:,} shards of {shard_rows} rows, {rounds} rounds, warm\n")
    print("| what | wall ms | CPU ms |\n| --- | --- | --- |")
    for name, call in rows.items():
        wall, cpu = zip(*(_milliseconds(call) for _ in range(rounds)), strict=True)
        print(f"| {name} | {shown(wall)} | {shown(cpu)} |")


def _milliseconds(call: Callable[[], object]) -> tuple[float, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    return (time.perf_counter() - wall) * 1e3, (time.process_time() - cpu) * 1e3


def memory(folder: Path, num_rows: int, num_classes: int, rounds: int) -> None:
    """Print by how much RSS grows while a store is opened and streamed once, in fresh processes."""
    store = build(folder / "long", num_rows, num_classes)
    least = 4 * Shuffle.for_row_bytes(store.row_bytes()).pool_rows * store.row_bytes()
    print(f"{num_rows:,} rows, {store.num_bytes / 1e9:.2f} GB of shards, {rounds} fresh processes each\n")
    print("| RAM budget, MB | RSS grew by at most, MB | anonymous part, MB |\n| --- | --- | --- |")
    for budget in (least, RAM_BUDGET_BYTES):
        grown = []
        for _ in range(rounds):
            with multiprocessing.get_context("spawn").Pool(1) as fresh:
                grown.append(fresh.apply(growth, (store.path, budget)))
        columns = [shown([each[column] / MB for each in grown]) for column in range(2)]
        print(f"| {budget / MB:.0f} | {' | '.join(columns)} |")


def growth(path: Path, ram_budget_bytes: int) -> tuple[int, int]:
    """Bytes by which RSS exceeded what it was before the store was opened; its anonymous part, too."""
    before = _resident()
    peak = [0, 0]
    for rows, targets in TargetStream(TargetStore.open(path), batch_size=BATCH_ROWS, ram_budget_bytes=ram_budget_bytes):
        assert len(targets["logits"].values) == len(rows)
        peak = [max(most, now) for most, now in zip(peak, _resident(), strict=True)]
    return peak[0] - before[0], peak[1] - before[1]


def _resident() -> tuple[int, int]:
    """Bytes of VmRSS (anonymous, file-backed and shared pages) and of RssAnon."""
    with open("/proc/self/status", encoding="utf-8") as file:
        lines = dict(line.split(":", 1) for line in file)
    return int(lines["VmRSS"].split()[0]) * 1024, int(lines["RssAnon"].split()[0]) * 1024


def main(
    num_shards: int = 10_000,
    shard_rows: int = 16,
    num_rows: int = 2_500_000,
    num_classes: int = 1000,
    rounds: int = 5,
    folder: Path | None = None,
) -> None:
    """Print both tables."""
    print(machine("numpy", "torch") + "\n")
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        opening(Path(scratch), num_shards, shard_rows, 4 * rounds)
        print()
        memory(Path(scratch), num_rows, num_classes, rounds)
