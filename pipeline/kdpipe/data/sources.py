"""Where rows come from: a `Source` yields Arrow record batches; nothing is held in memory whole."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Protocol, runtime_checkable

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from kdpipe import durable
from kdpipe.errors import ConfigError, DataError


@runtime_checkable
class Source(Protocol):
    """Where rows come from."""

    def batches(self) -> Iterator[pa.RecordBatch]:
        """The rows in order, in blocks of any size; every call starts from the first row."""


class Table:
    """A Parquet (`.parquet`) or CSV (`.csv`, `.csv.gz`) file with a header row."""

    def __init__(self, path: Path, batch_rows: int = 8192) -> None:
        self.path = path
        self.batch_rows = batch_rows

    def batches(self) -> Iterator[pa.RecordBatch]:
        """The file's rows in order. Raises `DataError` when it is absent or unreadable."""
        if not self.path.is_file():
            raise DataError(f"no file {self.path}: expected the rows there. Correct data.path in params.yaml.")
        try:
            if self.path.suffix == ".parquet":
                with pq.ParquetFile(self.path) as file:
                    yield from file.iter_batches(batch_size=self.batch_rows)
            elif self.path.name.endswith((".csv", ".csv.gz")):
                with pyarrow.csv.open_csv(self.path) as reader:
                    yield from reader
            else:
                raise DataError(f"{self.path}: expected a name ending in .parquet, .csv or .csv.gz")
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{self.path} cannot be read: {error}") from error


class Digits(Table):
    """scikit-learn's handwritten digits: 1,797 grey 8x8 images, 10 classes; 1,197 rows of `train`, 600 of `test`.

    Columns `id`, `image` (64 uint8, row-major, 0..16), `label`, `split`. The file is written the first time.
    """

    def batches(self) -> Iterator[pa.RecordBatch]:
        """The file's rows; needs scikit-learn (`pip install kdpipe[demo]`) only when the file is absent."""
        if not self.path.is_file():
            write_digits(self.path)
        return super().batches()


def write_digits(path: Path) -> None:
    """Write scikit-learn's digits as a Parquet file; the split is drawn once, with seed 0."""
    import numpy as np

    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise ConfigError("the digits come with scikit-learn: pip install 'kdpipe[demo]'") from None
    bunch = load_digits()
    images = bunch.data.astype(np.uint8)
    split = np.full(len(images), "train", dtype=object)
    split[np.random.default_rng(0).permutation(len(images))[:600]] = "test"
    table = pa.table(
        {
            "id": pa.array(range(len(images)), pa.int32()),
            "image": pa.FixedSizeListArray.from_arrays(pa.array(images.ravel()), images.shape[1]),
            "label": pa.array(bunch.target, pa.int32()),
            "split": pa.array(split, pa.string()),
        }
    )
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    path.parent.mkdir(parents=True, exist_ok=True)
    durable.write_bytes(path, sink.getvalue())
