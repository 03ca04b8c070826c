"""The same shuffled epoch from the packages that people use for cached targets, side by side with the store.

A package's own shuffling is used where it has one, with its defaults and a buffer of the same rows where it takes one.
Formats without one read blocks of 1,024 rows in the store's order.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import sys
import tempfile
import types
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import read_store
from benchmarks.measuring import Reader, compare, machine, table
from benchmarks.read_store import BATCH_ROWS, Layouts, from_blocks
from kdpipe.order import BLOCK_ROWS, POOL_BLOCKS

BUFFER_ROWS = BLOCK_ROWS * POOL_BLOCKS


@dataclass(frozen=True, kw_only=True)
class Peer:
    """A package: the modules that it needs, and its readers of the data in `Layouts`, written to a folder first."""

    modules: tuple[str, ...]
    prepare: Callable[[Layouts, Path], list[Reader]]

    def missing(self) -> list[str]:
        """Modules that are not installed here."""
        return [module for module in self.modules if find_spec(module) is None]


def zarr_python(layouts: Layouts, folder: Path) -> list[Reader]:
    """The store's own files, read by zarr-python."""
    import zarr

    path = layouts.store.path

    def batches(epoch: int) -> Iterator[np.ndarray]:
        array = zarr.open_group(path, mode="r")["logits"]
        return from_blocks(lambda start, stop: array[0, start:stop], layouts.num_rows, epoch)

    return [Reader(name="zarr-python, the store's files", path=path, batches=batches, warmup_rows=BUFFER_ROWS)]


def parquet(layouts: Layouts, folder: Path) -> list[Reader]:
    """Columns of lists of float16, and of binary rows; one row group per block, uncompressed."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    width = layouts.flat.shape[1]

    def fixed(values: pa.Array) -> pa.Array:
        return pa.FixedSizeListArray.from_arrays(values, width)

    def lists(values: pa.Array) -> pa.Array:
        return pa.ListArray.from_arrays(pa.array(np.arange(len(values) // width + 1, dtype=np.int32) * width), values)

    def binary(values: pa.Array) -> pa.Array:
        return pa.FixedSizeBinaryArray.from_buffers(pa.binary(2 * width), len(values) // width, values.buffers())

    def write(path: Path, as_column: Callable[[pa.Array], pa.Array], dictionary: bool) -> Path:
        schema = pa.schema([("logits", as_column(pa.array(np.empty(0, np.float16))).type)])
        with pq.ParquetWriter(path, schema, compression="none", use_dictionary=dictionary) as writer:
            for start in range(0, layouts.num_rows, BLOCK_ROWS):
                values = pa.array(np.array(layouts.flat[start : start + BLOCK_ROWS]).reshape(-1))
                writer.write_table(pa.table({"logits": as_column(values)}, schema), row_group_size=BLOCK_ROWS)
        return path

    def batches(path: Path, epoch: int) -> Iterator[np.ndarray]:
        file = pq.ParquetFile(path)

        def block(start: int, stop: int) -> np.ndarray:
            column = file.read_row_group(start // BLOCK_ROWS)["logits"].combine_chunks()
            if pa.types.is_fixed_size_binary(column.type):
                return np.frombuffer(column.buffers()[1], np.float16).reshape(-1, width)
            return column.flatten().to_numpy(zero_copy_only=False).reshape(-1, width)

        return from_blocks(block, layouts.num_rows, epoch)

    ways = {
        "fixed-size lists": write(folder / "fixed.parquet", fixed, False),
        "lists": write(folder / "lists.parquet", lists, False),
        "lists with a dictionary (the default)": write(folder / "dictionary.parquet", lists, True),
        "fixed-size binary": write(folder / "binary.parquet", binary, False),
    }
    return [
        Reader(name=f"Parquet (pyarrow), {way}", path=path, batches=partial(batches, path), warmup_rows=BUFFER_ROWS)
        for way, path in ways.items()
    ]


def hugging_face(layouts: Layouts, folder: Path) -> list[Reader]:
    """A dataset on disk: its shuffled iterable, and slices as blocks; numpy and torch are float32 there unless said."""
    import datasets
    import pyarrow as pa
    from torch.utils.data import DataLoader

    datasets.disable_progress_bars()
    path = folder / "hugging_face"
    width = layouts.flat.shape[1]
    column = pa.FixedSizeListArray.from_arrays(pa.array(np.asarray(layouts.flat).reshape(-1)), width)
    written = datasets.Dataset(datasets.table.InMemoryTable.from_arrays([column], names=["logits"]))
    written.save_to_disk(path)
    del written, column

    def opened() -> Any:
        return datasets.load_from_disk(path)

    def shuffled_iterable(format_: str, epoch: int) -> Any:
        stream = opened().to_iterable_dataset(num_shards=max(1, layouts.num_rows // BLOCK_ROWS))
        return stream.shuffle(seed=epoch, buffer_size=min(BUFFER_ROWS, layouts.num_rows)).with_format(format_)

    def data_loader(epoch: int) -> Iterator[Any]:
        return (batch["logits"] for batch in DataLoader(shuffled_iterable("torch", epoch), batch_size=BATCH_ROWS))

    def iterable(format_: str, epoch: int) -> Iterator[Any]:
        return (batch["logits"] for batch in shuffled_iterable(format_, epoch).iter(batch_size=BATCH_ROWS))

    def iterable_arrow(epoch: int) -> Iterator[np.ndarray]:
        return (as_rows(batch["logits"]) for batch in shuffled_iterable("arrow", epoch).iter(batch_size=BATCH_ROWS))

    def slices(epoch: int, **formatting: Any) -> Iterator[np.ndarray]:
        rows = opened().with_format("numpy", **formatting)
        return from_blocks(lambda start, stop: rows[start:stop]["logits"], layouts.num_rows, epoch)

    def slices_arrow(epoch: int) -> Iterator[np.ndarray]:
        rows = opened().with_format("arrow")
        return from_blocks(lambda start, stop: as_rows(rows[start:stop]["logits"]), layouts.num_rows, epoch)

    def as_rows(column: Any) -> np.ndarray:
        return column.combine_chunks().flatten().to_numpy().reshape(-1, width)

    ways = {
        "shuffled iterable, DataLoader": data_loader,
        "shuffled iterable, numpy batches": partial(iterable, "numpy"),
        "shuffled iterable, torch batches": partial(iterable, "torch"),
        "shuffled iterable, arrow batches": iterable_arrow,
        "block slices, numpy": slices,
        "block slices, numpy of dtype=float16": partial(slices, dtype=np.float16),
        "block slices, arrow": slices_arrow,
    }
    return [
        Reader(name=f"HF datasets, {way}", path=path, batches=batches, warmup_rows=BUFFER_ROWS)
        for way, batches in ways.items()
    ]


def litdata(layouts: Layouts, folder: Path) -> list[Reader]:
    """A streaming dataset with shuffle=True, as arrays and as its blocks of tokens."""
    import torch
    from litdata import StreamingDataset, TokensLoader
    from litdata.streaming.writer import BinaryWriter

    width = layouts.flat.shape[1]
    kinds = {"samples": None, "token blocks": TokensLoader(block_size=width)}
    paths = {kind: folder / f"litdata {kind}" for kind in kinds}
    for kind, loader in kinds.items():
        writer = BinaryWriter(str(paths[kind]), chunk_bytes="64MB", item_loader=loader)
        for index, row in enumerate(layouts.flat):
            writer[index] = np.array(row) if loader is None else torch.from_numpy(np.array(row))
        writer.done()
        writer.merge()

    def batches(kind: str, epoch: int) -> Iterator[Any]:
        loader = None if kinds[kind] is None else TokensLoader(block_size=width)
        stream = StreamingDataset(str(paths[kind]), item_loader=loader, shuffle=True, seed=epoch)
        stack = np.stack if loader is None else torch.stack
        return (stack(batch) for batch in _batched(stream))

    return [
        Reader(name=f"litdata, {kind}", path=paths[kind], batches=partial(batches, kind), warmup_rows=BUFFER_ROWS)
        for kind in kinds
    ]


def mosaic(layouts: Layouts, folder: Path) -> list[Reader]:
    """MDS shards with shuffle=True."""
    _stand_in_for_unused_imports()
    from streaming import MDSWriter, StreamingDataset
    from streaming.base.util import clean_stale_shared_memory

    path, columns = folder / "mds", {"logits": f"ndarray:float16:{layouts.flat.shape[1]}"}
    with MDSWriter(out=str(path), columns=columns, progress_bar=False) as writer:
        for row in layouts.flat:
            writer.write({"logits": np.array(row)})
    clean_stale_shared_memory()

    def batches(epoch: int) -> Iterator[np.ndarray]:
        stream = StreamingDataset(
            local=str(path), shuffle=True, shuffle_seed=epoch, batch_size=BATCH_ROWS, num_canonical_nodes=1
        )
        return (np.stack([row["logits"] for row in batch]) for batch in _batched(stream))

    return [Reader(name="MDS (mosaicml-streaming)", path=path, batches=batches, warmup_rows=BUFFER_ROWS)]


PEERS = {
    "zarr": Peer(modules=("zarr",), prepare=zarr_python),
    "pyarrow": Peer(modules=("pyarrow",), prepare=parquet),
    "datasets": Peer(modules=("datasets",), prepare=hugging_face),
    "litdata": Peer(modules=("litdata",), prepare=litdata),
    "mosaicml-streaming": Peer(modules=("streaming",), prepare=mosaic),
}


def _batched(stream: Iterable[Any]) -> Iterator[tuple[Any, ...]]:
    rows = (row for row in stream)  # litdata's iterator starts anew at every iter()
    while batch := tuple(itertools.islice(rows, BATCH_ROWS)):
        yield batch


def _stand_in_for_unused_imports() -> None:
    """Classes that mosaicml-streaming imports for vision and text data, which are not read here.

    There is no torchvision for a CPU build of torch where these figures were taken.
    """
    wanted = {
        "torchvision.datasets": "VisionDataset",
        "torchvision.transforms.functional": "to_tensor",
        "transformers.feature_extraction_utils": "BatchFeature",
        "transformers.tokenization_utils_base": "BatchEncoding",
        "transformers.models.auto.tokenization_auto": "AutoTokenizer",
    }
    for path, name in wanted.items():
        parts = path.split(".")
        for length in range(1, len(parts) + 1):
            sys.modules.setdefault(".".join(parts[:length]), types.ModuleType(parts[length - 1]))
        setattr(sys.modules[path], name, type(name, (), {}))


def main(
    num_rows: int = 200_000, num_classes: int = 1000, rounds: int = 5, only: str = "", folder: Path | None = None
) -> None:
    """Print the table of the store and every peer that is installed; `only` names some, with commas."""
    chosen = [name for name in only.split(",") if name] or list(PEERS)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        layouts = read_store.build(Path(scratch), num_rows, num_classes)
        readers, used = read_store.readers(layouts), []
        for name in chosen:
            if missing := PEERS[name].missing():
                print(f"{name}: left out, {', '.join(missing)} is not installed (make bench-peers)")
                continue
            with contextlib.redirect_stdout(io.StringIO()):
                readers += PEERS[name].prepare(layouts, Path(scratch))
            used.append(name)
        costs = compare(readers, num_rows, (num_classes,), rounds)
        print(f"{num_rows:,} rows x {num_classes:,} classes float16, batches of {BATCH_ROWS}, {rounds} rounds")
        print(machine("numpy", "torch", "google-crc32c", *used) + "\n")
        print(table(costs, [read_store.BASE, read_store.STREAM, read_store.KEPT]))
