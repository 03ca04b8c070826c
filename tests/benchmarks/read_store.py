"""A shuffled epoch from the store against `np.memmap` in the same order: CPU time per row, and its ratio."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from kdpipe.batches import shuffled
from kdpipe.encodings import Dense
from kdpipe.store import TargetStore
from kdpipe.store.layout import choose_shard_rows
from kdpipe.store.manifest import Manifest
from kdpipe.targets import OutputSpec

BATCH_ROWS = 256


def build(folder: Path, num_rows: int, num_classes: int) -> tuple[TargetStore, np.memmap]:
    """A store of random logits, and the same values in one .npy file."""
    output, encoding = OutputSpec(name="logits", shape=(num_classes,)), Dense()
    manifest = Manifest(
        ingredients={"teacher": "random"},
        outputs=[output],
        encodings={"logits": encoding.to_json()},
        temperatures=[1.0],
        num_classes=num_classes,
        class_names=None,
        shard_rows=choose_shard_rows(encoding.arrays(output).values(), num_rows),
    )
    ids = np.array([f"{index:09d}" for index in range(num_rows)])
    store = TargetStore.create(folder / "store", manifest, ids, np.zeros((num_rows, 16), np.uint8))
    flat = np.lib.format.open_memmap(folder / "flat.npy", "w+", np.float16, (num_rows, num_classes))
    generator = torch.Generator().manual_seed(0)
    for view, shard in store.missing():
        arrays = encoding.encode(3 * torch.randn(shard.num_rows, num_classes, generator=generator))
        flat[shard.start : shard.stop] = arrays[""]
        statistics_ = np.zeros((shard.num_rows, 3), np.float32)
        named = {f"logits{suffix}": each for suffix, each in arrays.items()}
        store.write(view, shard, {**named, "statistics": statistics_}, BATCH_ROWS)
    store.finish()
    flat.flush()
    return TargetStore.open(folder / "store"), np.load(folder / "flat.npy", mmap_mode="r")


def cpu_us_per_row(read: Callable[[np.ndarray], object], order: np.ndarray) -> float:
    """CPU microseconds per row of one pass in the given order."""
    began = time.process_time()
    for start in range(0, len(order), BATCH_ROWS):
        read(order[start : start + BATCH_ROWS])
    return (time.process_time() - began) / len(order) * 1e6


def measure(num_rows: int, num_classes: int, rounds: int) -> dict[str, list[float]]:
    """CPU us per row of each way to read, one value per round; rounds are interleaved."""
    found: dict[str, list[float]] = {"np.memmap": [], "store, first touch": [], "store": []}
    with tempfile.TemporaryDirectory() as folder:
        store, flat = build(Path(folder), num_rows, num_classes)
        for epoch in range(rounds):
            order = shuffled(np.arange(num_rows), seed=0, epoch=epoch)
            fresh = TargetStore.open(store.path)
            found["np.memmap"].append(cpu_us_per_row(lambda rows: np.asarray(flat[rows]), order))
            found["store, first touch"].append(cpu_us_per_row(lambda rows, at=fresh: at.read(rows), order))
            found["store"].append(cpu_us_per_row(lambda rows, at=fresh: at.read(rows), order))
    return found


def table(found: dict[str, Sequence[float]]) -> str:
    """Markdown: median, range, and the median of the rounds' ratios to np.memmap."""
    lines = ["| reader | CPU us/row: median (min-max) | ratio to np.memmap: median (min-max) |", "| --- | --- | --- |"]
    for name, values in found.items():
        ratios = [value / base for value, base in zip(values, found["np.memmap"], strict=True)]
        shown = [f"{statistics.median(each):.2f} ({min(each):.2f}-{max(each):.2f})" for each in (values, ratios)]
        lines.append(f"| {name} | {shown[0]} | {shown[1]} |")
    return "\n".join(lines)


def main(num_rows: int = 100_000, num_classes: int = 1000, rounds: int = 7) -> None:
    """Print the table."""
    print(f"{num_rows:,} rows x {num_classes:,} classes float16, batches of {BATCH_ROWS}, {rounds} rounds\n")
    print(table(measure(num_rows, num_classes, rounds)))
