"""Adult's rows as they are to be read: numbered, as some are in the file twice, and `?` as a missing value."""

from __future__ import annotations

from collections.abc import Iterator

import pyarrow as pa
import pyarrow.compute as pc

from kdpipe.data.sources import Table


class Adult(Table):
    """The table with a column `row`."""

    def batches(self) -> Iterator[pa.RecordBatch]:
        """The rows in order."""
        first = 0
        for batch in super().batches():
            columns = {name: _without_marks(batch[name]) for name in batch.schema.names}
            yield pa.RecordBatch.from_pydict({"row": pa.array(range(first, first + len(batch))), **columns})
            first += len(batch)


def _without_marks(values: pa.Array) -> pa.Array:
    return pc.if_else(pc.equal(values, "?"), None, values) if pa.types.is_string(values.type) else values
