"""What every `Source` owes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from kdpipe.data.columns import Columns, Ragged
from kdpipe.data.prepared import MISSING_LABEL, PreparedInputs
from kdpipe.data.preparing import NameOf, RowSchema, SourceColumns, SplitPlan, column_of, prepare
from kdpipe.data.sources.base import Source


class SourceContract:
    """Tests of a source. In a test file of yours: `class TestMine(SourceContract)`, with `source` and `large`.

    `id_column` is the column for data.columns.id, None where the content is the id; `content` names the columns that a
    task takes, None for all but the id.
    """

    id_column: str | None = None
    content: Sequence[str] | None = None
    num_rows = 7
    max_block_bytes = 32 * 2**20

    def source(self, folder: Path, rows: Sequence[int]) -> Source:
        """A source that holds the rows of these numbers, in this order where it has one; `folder` is empty.

        The number of a row decides its content, and no two rows have the same. The numbers are all of 0 to n - 1.
        """
        raise NotImplementedError

    def large(self, folder: Path) -> Source:
        """A source of more than two times `max_block_bytes`, of rows of at most 1 MiB."""
        raise NotImplementedError

    def test_it_is_a_source(self, tmp_path: Path) -> None:
        assert isinstance(self.source(tmp_path, range(1)), Source)

    def test_there_is_a_row_for_each_number(self, tmp_path: Path) -> None:
        assert _table(self.source(tmp_path, range(self.num_rows))).num_rows == self.num_rows

    def test_every_pass_gives_the_same_rows(self, tmp_path: Path) -> None:
        source = self.source(tmp_path, range(self.num_rows))
        assert _table(source).equals(_table(source))

    def test_two_passes_at_once_do_not_disturb_each_other(self, tmp_path: Path) -> None:
        source = self.source(tmp_path, range(self.num_rows))
        begun = source.batches()
        first = next(begun)
        whole = _table(source)
        assert pa.Table.from_batches([first, *begun]).equals(whole)

    def test_another_source_of_the_same_rows_gives_the_same(self, tmp_path: Path) -> None:
        tables = []
        for name in ("one", "other"):
            (tmp_path / name).mkdir()
            tables.append(_table(self.source(tmp_path / name, range(self.num_rows))))
        assert tables[0].equals(tables[1])

    def test_columns_and_types_are_the_same_in_every_block(self, tmp_path: Path) -> None:
        schemas = [batch.schema for batch in self.large(tmp_path).batches()]
        assert all(each.equals(schemas[0]) for each in schemas)

    def test_blocks_are_bounded(self, tmp_path: Path) -> None:
        """Nothing is loaded whole: what `batches` yields is a part."""
        sizes = [batch.nbytes for batch in self.large(tmp_path).batches()]
        assert sum(sizes) > 2 * self.max_block_bytes, "large() is not large"
        assert max(sizes) <= self.max_block_bytes

    def test_rows_do_not_depend_on_their_order(self, tmp_path: Path) -> None:
        """Ids, content and drawn split."""
        forward, backward = range(self.num_rows), range(self.num_rows)[::-1]
        assert self._prepared(tmp_path / "forward", forward) == self._prepared(tmp_path / "backward", backward)

    def test_rows_do_not_depend_on_others(self, tmp_path: Path) -> None:
        few = self._prepared(tmp_path / "few", range(self.num_rows))
        many = self._prepared(tmp_path / "many", range(self.num_rows + 3)[::-1])
        assert len(many) == len(few) + 3
        assert few.items() <= many.items()

    def test_growth_is_appended(self, tmp_path: Path) -> None:
        self._prepared(tmp_path / "few", range(self.num_rows), tmp_path / "prepared")
        before = PreparedInputs(tmp_path / "prepared" / "inputs").sample_ids.tolist()
        self._prepared(tmp_path / "many", range(self.num_rows + 3)[::-1], tmp_path / "prepared")
        after = PreparedInputs(tmp_path / "prepared" / "inputs").sample_ids.tolist()
        assert after[: self.num_rows] == before
        assert len(after) == self.num_rows + 3

    def _prepared(
        self, folder: Path, rows: Sequence[int], prepared: Path | None = None
    ) -> Mapping[str, tuple[bytes, str]]:
        """Digest and split by sample id, after preparing these rows."""
        folder.mkdir()
        prepared = prepared or folder.with_name(f"{folder.name}-prepared")
        schema = RowSchema(to_inputs=self._to_inputs, to_labels=lambda values, _: np.full(len(values), MISSING_LABEL))
        plan = SplitPlan(shares={"train": 0.5, "test": 0.5})
        prepare(self.source(folder, rows), schema, SourceColumns(id=self.id_column), plan, prepared)
        inputs = PreparedInputs(prepared / "inputs")
        splits = pq.read_table(prepared / "labels" / "labels.parquet")["split"].to_pylist()
        digests = [each.tobytes() for each in inputs.digests]
        return dict(zip(inputs.sample_ids.tolist(), zip(digests, splits, strict=True), strict=True))

    def _to_inputs(self, batch: pa.RecordBatch, name_of: NameOf) -> Columns:
        """The content as text, whatever it is."""
        names = self.content or [name for name in batch.schema.names if name != self.id_column]
        columns = [column_of(batch, name).to_pylist() for name in names]
        texts = [repr(row).encode() for row in zip(*columns, strict=True)]
        offsets = np.cumsum([0, *map(len, texts)], dtype=np.int64)
        return {"row": Ragged(values=np.frombuffer(b"".join(texts), np.uint8), offsets=offsets)}


def _table(source: Source) -> pa.Table:
    return pa.Table.from_batches(list(source.batches()))
