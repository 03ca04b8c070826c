"""A shuffled epoch from the store against `np.memmap` shuffled by the same blocks: CPU time per row, and its ratio."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from benchmarks.measuring import Reader, compare, machine, table
from kdpipe.encodings import Dense
from kdpipe.order import Shuffle
from kdpipe.store import TargetStore, TargetStream
from kdpipe.store.layout import choose_shard_rows
from kdpipe.store.manifest import Manifest
from kdpipe.targets import OutputSpec

BATCH_ROWS = 256
BASE = "np.memmap, by blocks"
STREAM = "store"
CHECKED = "store, checksums verified"
ANEW = "store, opened anew"
KEPT = "store, kept in memory"
NAMES = [BASE, "np.memmap, by rows", "np.memmap, by blocks, opened anew", STREAM, CHECKED, ANEW, KEPT]


@dataclass(frozen=True, kw_only=True)
class Layouts:
    """The same float16 values as a store and as one .npy file, memory-mapped."""

    store: TargetStore
    flat_path: Path
    flat: np.memmap

    @property
    def num_rows(self) -> int:
        return len(self.flat)


def create(folder: Path, num_rows: int, num_classes: int, shard_rows: int | None = None) -> TargetStore:
    """An empty store for one output of float16 logits."""
    output, encoding = OutputSpec(name="logits", shape=(num_classes,)), Dense()
    manifest = Manifest(
        ingredients={"teacher": "random"},
        outputs=[output],
        encodings={"logits": encoding.to_json()},
        temperatures=[1.0],
        num_classes=num_classes,
        class_names=None,
        shard_rows=shard_rows or choose_shard_rows(encoding.arrays(output).values(), num_rows),
    )
    ids = np.array([f"{index:09d}" for index in range(num_rows)])
    return TargetStore.create(folder, manifest, ids, np.zeros((num_rows, 16), np.uint8))


def stored(logits: torch.Tensor) -> dict[str, np.ndarray]:
    """The arrays of a shard with these logits `[N, C]`."""
    arrays = {f"logits{suffix}": each for suffix, each in Dense().encode(logits).items()}
    return {**arrays, "statistics": np.zeros((len(logits), 3), np.float32)}


def build(folder: Path, num_rows: int, num_classes: int) -> Layouts:
    """A store of random logits, and its values in one .npy file."""
    store = create(folder / "store", num_rows, num_classes)
    flat = np.lib.format.open_memmap(folder / "flat.npy", "w+", np.float16, (num_rows, num_classes))
    generator = torch.Generator().manual_seed(0)
    for view, shard in store.missing():
        arrays = stored(3 * torch.randn(shard.num_rows, num_classes, generator=generator))
        flat[shard.start : shard.stop] = arrays["logits"]
        store.write(view, shard, arrays, BATCH_ROWS)
    store.finish()
    flat.flush()
    path = folder / "flat.npy"
    return Layouts(store=TargetStore.open(store.path), flat_path=path, flat=np.load(path, mmap_mode="r"))


def from_blocks(read: Callable[[int, int], np.ndarray], num_rows: int, epoch: int) -> Iterator[np.ndarray]:
    """Batches in the store's order: `read(start, stop)` of shuffled blocks, a pool of them, its rows permuted."""
    shuffle = Shuffle()
    generator = np.random.Generator(np.random.Philox(key=[0, epoch]))
    starts = shuffle.block_rows * generator.permutation(-(-num_rows // shuffle.block_rows))
    pool = None
    for first in range(0, len(starts), shuffle.pool_blocks):
        chosen = starts[first : first + shuffle.pool_blocks].tolist()
        blocks = [read(start, min(start + shuffle.block_rows, num_rows)) for start in chosen]
        if pool is None:
            pool = np.empty((shuffle.pool_rows, *blocks[0].shape[1:]), blocks[0].dtype)
        order = generator.permutation(sum(len(block) for block in blocks))
        np.concatenate(blocks, out=pool[: len(order)])
        for start in range(0, len(order), BATCH_ROWS):
            yield pool.take(order[start : start + BATCH_ROWS], axis=0)


def readers(layouts: Layouts) -> list[Reader]:
    """One reader for each of `NAMES`, all in the same order."""
    path, flat, num_rows = layouts.store.path, layouts.flat, layouts.num_rows

    def by_rows(epoch: int) -> Iterator[np.ndarray]:
        order = np.concatenate(list(Shuffle().pools(np.arange(num_rows), seed=0, epoch=epoch)))
        return (np.asarray(flat[order[start : start + BATCH_ROWS]]) for start in range(0, num_rows, BATCH_ROWS))

    def by_blocks_anew(epoch: int) -> Iterator[np.ndarray]:
        anew = np.load(layouts.flat_path, mmap_mode="r")
        return from_blocks(lambda start, stop: anew[start:stop], num_rows, epoch)

    def stream(store: TargetStore, ram_budget_bytes: int, verify_always: bool = False) -> TargetStream:
        return TargetStream(
            store, batch_size=BATCH_ROWS, ram_budget_bytes=ram_budget_bytes, verify_always=verify_always
        )

    def epochs(of: TargetStream) -> Iterator[torch.Tensor]:
        return (targets["logits"].values for _, targets in of)

    pools_only = 4 * Shuffle().pool_rows * layouts.store.row_bytes()  # two pools, read ahead; not all rows
    known, checked = (stream(TargetStore.open(path), pools_only, verify_always=each) for each in (False, True))
    everything = stream(TargetStore.open(path), 2 * flat.nbytes)
    for each in (known, checked, everything):
        for _ in each:
            pass
    ways = [
        lambda epoch: from_blocks(lambda start, stop: flat[start:stop], num_rows, epoch),
        by_rows,
        by_blocks_anew,
        lambda epoch: epochs(known),
        lambda epoch: epochs(checked),
        lambda epoch: epochs(stream(TargetStore.open(path), pools_only)),
        lambda epoch: epochs(everything),
    ]
    paths = [layouts.flat_path] * 3 + [path] * 4
    return [
        Reader(name=name, path=where, batches=batches) for name, where, batches in zip(NAMES, paths, ways, strict=True)
    ]


def main(num_rows: int = 200_000, num_classes: int = 1000, rounds: int = 25, folder: Path | None = None) -> None:
    """Print the table."""
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        layouts = build(Path(scratch), num_rows, num_classes)
        costs = compare(readers(layouts), num_rows, (num_classes,), rounds)
    print(f"{num_rows:,} rows x {num_classes:,} classes float16, batches of {BATCH_ROWS}, {rounds} rounds")
    print(machine("numpy", "torch", "google-crc32c") + "\n")
    print(table(costs, NAMES[:3]))
