"""Preparing: how much memory a large source takes, and rows per second beside what its readers alone need."""

from __future__ import annotations

import io
import multiprocessing
import os
import random
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

from benchmarks.measuring import cpu_s, machine, shown
from benchmarks.read_store import BATCH_ROWS
from kdpipe.caching import capture
from kdpipe.data.columns import Columns
from kdpipe.data.prepared import PreparedInputs
from kdpipe.data.preparing import RowSchema, SourceColumns, SplitPlan, prepare
from kdpipe.data.sources import Table
from kdpipe.encodings import Dense
from kdpipe.store import TargetStore
from kdpipe.store.layout import choose_shard_rows
from kdpipe.store.manifest import Manifest
from kdpipe.targets import OutputSpec
from kdpipe.tasks.base import Task
from kdpipe.tasks.image import ImageClassification
from kdpipe.tasks.tabular import TabularClassification
from kdpipe.tasks.text import TextClassification

MB = 1e6
NUM_CLASSES = 10
WORDS = [f"{first}{second}" for first in ("ba", "do", "ki", "me", "su") for second in ("lar", "n", "pti", "ro", "x")]
COLUMNS = SourceColumns(id="id", label="label")
SPLITS = SplitPlan(shares={"train": 0.9, "test": 0.1}, validation_fraction=0.1)


@dataclass(frozen=True, kw_only=True)
class Rows:
    """A kind of rows: its task, and `make(numbers)`, the columns of rows beside id and label."""

    task: Task
    make: Callable[[np.ndarray], dict[str, pa.Array]]


def texts(num_words: int) -> Rows:
    """Texts of so many words, five letters or so each."""

    def make(numbers: np.ndarray) -> dict[str, pa.Array]:
        chosen = random.Random(int(numbers[0]))
        return {"text": pa.array([" ".join(chosen.choices(WORDS, k=num_words)) for _ in numbers])}

    return Rows(task=TextClassification(num_classes=NUM_CLASSES), make=make)


def table(num_columns: int) -> Rows:
    """Tables of float32 columns."""

    def make(numbers: np.ndarray) -> dict[str, pa.Array]:
        values = np.random.default_rng(numbers[0]).normal(size=(num_columns, len(numbers))).astype(np.float32)
        return {f"x{index}": pa.array(column) for index, column in enumerate(values)}

    names = [f"x{index}" for index in range(num_columns)]
    return Rows(task=TabularClassification(num_classes=NUM_CLASSES, columns=names), make=make)


def images(side: int, keep_encoded: bool = False) -> Rows:
    """Square JPEG images, the same 64 over and over."""
    generator = np.random.default_rng(0)
    encoded = []
    for _ in range(64):
        coarse = Image.fromarray(generator.integers(0, 256, (side // 8, side // 8, 3), np.uint8))
        file = io.BytesIO()
        coarse.resize((side, side), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
        encoded.append(file.getvalue())

    def make(numbers: np.ndarray) -> dict[str, pa.Array]:
        return {"image": pa.array([encoded[number % 64] for number in numbers.tolist()], pa.binary())}

    return Rows(task=ImageClassification(num_classes=NUM_CLASSES, keep_encoded=keep_encoded), make=make)


def write(path: Path, rows: Rows, num_rows: int | None = None, num_bytes: float = float("inf")) -> int:
    """A Parquet file of so many rows, or of about so many bytes; returns the number of rows."""
    start, writer = 0, None
    with path.open("wb") as file:
        while file.tell() < num_bytes and (num_rows is None or start < num_rows):
            numbers = np.arange(start, min(start + 1024, num_rows or start + 1024))
            batch = pa.record_batch({"id": numbers, "label": numbers % NUM_CLASSES, **rows.make(numbers)})
            writer = writer or pq.ParquetWriter(file, batch.schema, compression="none", use_dictionary=False)
            writer.write_batch(batch)
            start += len(numbers)
        assert writer is not None
        writer.close()
    return start


def prepare_all(path: Path, rows: Rows, folder: Path) -> int:
    """Prepare a file; returns how many rows are new."""
    schema = RowSchema(to_inputs=rows.task.to_inputs, to_labels=rows.task.to_labels)
    return prepare(Table(path), schema, COLUMNS, SPLITS, folder).num_new


# Memory


class Nobody:
    """A teacher that says the same of every row, at once."""

    outputs = (OutputSpec(name="logits", shape=(NUM_CLASSES,)),)
    abstains = False

    def __init__(self) -> None:
        self.fingerprint = {"teacher": "nobody"}

    def predict(self, columns: Columns) -> dict[str, torch.Tensor]:
        """Logits `[B, C]`."""
        return {"logits": torch.arange(NUM_CLASSES).float().expand(len(next(iter(columns.values()))), -1)}


def capture_all(prepared: Path, store: Path) -> int:
    """Cache what `Nobody` says about prepared rows; returns how many."""
    inputs, teacher, encoding = PreparedInputs(prepared / "inputs"), Nobody(), Dense()
    manifest = Manifest(
        ingredients=teacher.fingerprint,
        outputs=teacher.outputs,
        encodings={"logits": encoding.to_json()},
        temperatures=[1.0],
        num_classes=NUM_CLASSES,
        class_names=None,
        shard_rows=choose_shard_rows(encoding.arrays(teacher.outputs[0]).values(), len(inputs)),
    )
    target = TargetStore.create(store, manifest, inputs.id_column(), inputs.digests)
    return capture(target, teacher, inputs, BATCH_ROWS).num_rows


def memory(folder: Path, cases: dict[str, tuple[Rows, int | None, float]], rounds: int) -> None:
    """Print by how much memory grows while each case is prepared and cached, in fresh processes."""
    print(
        "| rows | file, MB | number | preparing: RSS grew by at most, MB | bytes per row | caching: RSS, MB | of it "
        "anonymous, MB | seconds of preparing |\n| --- | --- | --- | --- | --- | --- | --- | --- |"
    )
    for name, (rows, wanted, num_bytes) in cases.items():
        path = folder / "rows.parquet"
        count = write(path, rows, wanted, num_bytes)
        found = []
        for number in range(rounds):
            with tempfile.TemporaryDirectory(dir=folder) as scratch:
                prepared, store = Path(scratch) / "prepared", Path(scratch) / "store"
                preparing = in_fresh_process(prepare_all_named, name, path, prepared)
                caching = in_fresh_process(capture_all, prepared, store)
                assert preparing.result == caching.result == count, number
                found.append(
                    (preparing.rss, preparing.rss / count * MB, caching.rss, caching.anonymous, preparing.seconds)
                )
        columns = " | ".join(shown(values) for values in zip(*found, strict=True))
        print(f"| {name} | {path.stat().st_size / MB:,.0f} | {count:,} | {columns} |", flush=True)
        path.unlink()


KINDS: dict[str, Callable[[], Rows]] = {
    "texts of 1 kB": lambda: texts(170),
    "JPEG images of 224 pixels, kept encoded": lambda: images(224, keep_encoded=True),
    "tables of 2 numbers": lambda: table(2),
}


def prepare_all_named(name: str, path: Path, folder: Path) -> int:
    """`prepare_all` of one of `KINDS`, for another process."""
    return prepare_all(path, KINDS[name](), folder)


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a call cost: MB by which RSS and its anonymous part grew at most, seconds, and what it returned."""

    rss: float
    anonymous: float
    seconds: float
    result: int


def in_fresh_process(call: Callable[..., int], *arguments: object) -> Cost:
    """Run a function of this module in a process that has done nothing else."""
    with multiprocessing.get_context("spawn").Pool(1) as fresh:
        return fresh.apply(measured, (call, arguments))


def measured(call: Callable[..., int], arguments: tuple[object, ...]) -> Cost:
    """What a call costs in this process; memory is looked at every 10 ms, and once more by the kernel's own mark."""
    before, began = _status(), time.perf_counter()
    peak = dict(before)
    with _watching(peak):
        result = call(*arguments)
    seconds = time.perf_counter() - began
    grown = {key: (max(peak[key], _status()[key]) - before[key]) / MB for key in peak}
    return Cost(rss=grown["VmHWM"], anonymous=grown["RssAnon"], seconds=seconds, result=result)


@contextmanager
def _watching(peak: dict[str, int]) -> Iterator[None]:
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.01):
            now = _status()
            peak.update({key: max(value, now[key]) for key, value in peak.items()})

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()


def _status() -> dict[str, int]:
    with open("/proc/self/status", encoding="utf-8") as file:
        lines = dict(line.split(":", 1) for line in file)
    return {key: int(lines[key].split()[0]) * 1024 for key in ("VmHWM", "RssAnon")}


# Rates


def read_alone(path: Path) -> Iterator[pa.RecordBatch]:
    """The file as pyarrow reads it."""
    with pq.ParquetFile(path) as file:
        yield from file.iter_batches(batch_size=8192)


def count_alone(path: Path) -> None:
    """pyarrow."""
    assert sum(batch.num_rows for batch in read_alone(path))


def decode_alone(path: Path) -> None:
    """pyarrow, and PIL for every image."""
    for batch in read_alone(path):
        for encoded in batch["image"].to_pylist():
            with Image.open(io.BytesIO(encoded)) as image:
                np.asarray(image.convert("RGB"), np.uint8)


def tokenize_alone(path: Path) -> Callable[[Path], None] | None:
    """pyarrow, and byte-pair encoding by `tokenizers`, learnt from the file's first rows; None where it is absent."""
    try:
        from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    except ImportError:
        return None
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    first = next(iter(read_alone(path)))["text"].to_pylist()
    tokenizer.train_from_iterator(first, trainers.BpeTrainer(vocab_size=500, show_progress=False))

    def tokenize(path: Path) -> None:
        for batch in read_alone(path):
            tokenizer.encode_batch_fast(batch["text"].to_pylist())

    return tokenize


def rates(folder: Path, num_rows: int, rounds: int) -> None:
    """Print CPU time per row of preparing and of what the readers alone need, interleaved."""
    print(f"{rounds} rounds interleaved, one process; CPU time of all its threads\n")
    print("| rows | what | CPU us/row | rows/s per core | x pyarrow alone |\n| --- | --- | --- | --- | --- |")
    kinds = {
        "tables of 20 numbers": (table(20), num_rows),
        "texts of 1 kB": (texts(170), num_rows),
        "JPEG images of 64 pixels": (images(64), num_rows // 5),
        "JPEG images of 224 pixels": (images(224), num_rows // 20),
    }
    for name, (rows, count) in kinds.items():
        path = folder / "rows.parquet"
        write(path, rows, count)
        calls: dict[str, Callable[[Path], object]] = {"pyarrow alone": count_alone}
        if name.startswith("JPEG"):
            calls["pyarrow and PIL alone"] = decode_alone
        if name.startswith("texts") and (tokenize := tokenize_alone(path)):
            calls["pyarrow and tokenizers alone"] = tokenize
        calls["`prepare`, all rows new"] = lambda path, rows=rows: _prepared_anew(path, rows, folder)
        calls["`prepare`, all rows known"] = lambda path, rows=rows: prepare_all(path, rows, folder / "known")
        prepare_all(path, rows, folder / "known")
        costs: dict[str, list[float]] = {each: [] for each in calls}
        for _ in range(rounds):
            for each, call in calls.items():
                began = cpu_s()
                call(path)
                costs[each].append((cpu_s() - began) / count * 1e6)
        for each, values in costs.items():
            ratios = [value / base for value, base in zip(values, costs["pyarrow alone"], strict=True)]
            per_s = [1e6 / value for value in values]
            print(f"| {count:,} {name} | {each} | {shown(values)} | {shown(per_s)} | {shown(ratios)} |", flush=True)


def _prepared_anew(path: Path, rows: Rows, folder: Path) -> None:
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        prepare_all(path, rows, Path(scratch) / "prepared")


def main(
    num_bytes: float = 2e9,
    tiny_rows: int = 5_000_000,
    num_rows: int = 100_000,
    rounds: int = 5,
    kinds: Sequence[str] = tuple(KINDS),
    folder: Path | None = None,
) -> None:
    """Print both tables; `kinds` are those whose memory is measured."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    print(machine("numpy", "pyarrow", "pillow") + "\n")
    limits = dict.fromkeys(KINDS, (None, num_bytes)) | {"tables of 2 numbers": (tiny_rows, float("inf"))}
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        memory(Path(scratch), {name: (KINDS[name](), *limits[name]) for name in kinds}, (rounds + 1) // 2)
        print()
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        rates(Path(scratch), num_rows, rounds)
