"""scikit-learn's handwritten digits: the demo's data."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from kdpipe import durable
from kdpipe.data.sources.tables import Table


class Digits(Table):
    """scikit-learn's handwritten digits: 1,797 grey 8x8 images, 10 classes; 1,197 rows of `train`, 600 of `test`.

    Columns `id`, `image` (64 uint8, row-major, 0..16), `label`, `split`. The file is written the first time.
    """

    def batches(self) -> Iterator[pa.RecordBatch]:
        """The file's rows."""
        if not self.path.is_file():
            write_digits(self.path)
        return super().batches()


def write_digits(path: Path) -> None:
    """Write scikit-learn's digits as a Parquet file; the split is drawn once, with seed 0."""
    import numpy as np
    from sklearn.datasets import load_digits

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
