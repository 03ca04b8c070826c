"""`TargetStore`: rows x views of what one teacher said."""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from kdpipe import durable
from kdpipe.data.columns import bytes_of, fixed_bytes
from kdpipe.distributed import Shard, shards_of
from kdpipe.encodings import encoding_from_json
from kdpipe.errors import CorruptStoreError, IncompleteStoreError, StaleStoreError, StoreError
from kdpipe.fingerprint import canonical_json, digest, digest_file
from kdpipe.store.layout import ArrayLayout
from kdpipe.store.manifest import STATISTICS, Manifest
from kdpipe.store.records import CommitLog, CommitRecord
from kdpipe.store.shard_file import ShardFile, encode_shard
from kdpipe.targets import Targets

MAX_OPEN_SHARDS = 1024


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One thing that `verify` found: where, and what."""

    view: int | None
    shard: int | None
    what: str


class TargetStore:
    """Rows x views of one teacher's targets. `create` or `open` it; shards not committed do not exist for readers."""

    def __init__(self, path: Path) -> None:
        """Open what is there; see `open` and `create`."""
        self.path = path
        self.manifest = Manifest.load(path)
        self._load_extent()
        self._layouts = self.manifest.layouts()
        self._log = CommitLog(path)
        self._open_shards: OrderedDict[tuple[str, int, int], ShardFile] = OrderedDict()

    @classmethod
    def open(cls, path: Path | str) -> TargetStore:
        """Open a store for reading. Raises `StoreNotFoundError`, `CorruptStoreError`, `StoreError`."""
        return cls(Path(path))

    @classmethod
    def create(
        cls,
        path: Path,
        manifest: Manifest,
        sample_ids: NDArray[np.str_],
        digests: NDArray[np.uint8],
        num_views: int = 1,
    ) -> TargetStore:
        """Start a store for rows `[N]` with content digests `[N, 16]`, or go on with one of the same manifest.

        The manifest stands before the first shard. Rows may have grown since; what was committed for rows that are
        still the same stays. The caller is the only writer. Raises `StaleStoreError` for another manifest.
        """
        path.mkdir(parents=True, exist_ok=True)
        durable.sweep_temporaries(path)
        found = Manifest.load(path) if (path / "manifest.json").is_file() else None
        if found is not None:
            if found.identity() != manifest.identity():
                raise StaleStoreError(f"{path} was made from other settings; remove it, or restore the settings")
            manifest = replace(manifest, recorded=found.recorded)
        if found is None or found.to_text() != manifest.to_text():
            durable.write_text(path / "manifest.json", manifest.to_text())
        _write_extent(path, manifest, sample_ids, digests, num_views)
        return cls(path)

    @property
    def num_rows(self) -> int:
        """Rows that the store is about."""
        return self._num_rows

    @property
    def num_views(self) -> int:
        """Views per row; view 0 is the clean row."""
        return self._num_views

    @property
    def fingerprint(self) -> str:
        """Digest of whatever changes the targets."""
        return self.manifest.fingerprint

    @property
    def num_bytes(self) -> int:
        """Bytes of all committed shards."""
        return sum(size for record in self._log.records.values() for size, _ in record.files.values())

    @cached_property
    def sample_ids(self) -> NDArray[np.str_]:
        """Sample ids `[N]`, in row order."""
        ids: NDArray[np.str_] = self._rows["sample_id"].to_numpy(zero_copy_only=False).astype(np.str_)
        return ids

    @cached_property
    def digests(self) -> NDArray[np.uint8]:
        """Content digests `[N, 16]` of the rows that the targets are about."""
        return bytes_of(self._rows["digest"])

    def state_digest(self) -> str:
        """Digest of what made the targets, of the rows they are about, and of their bytes."""
        files = [[*key, record.inputs, dict(record.files)] for key, record in sorted(self._log.records.items())]
        return digest([self.fingerprint, files])

    def missing(self) -> list[tuple[int, Shard]]:
        """(view, shard) without a valid commit record for today's rows, in order."""
        return [
            (view, shard) for view in range(self.num_views) for shard in self._shards if not self._valid(view, shard)
        ]

    def write(self, view: int, shard: Shard, arrays: Mapping[str, NDArray[Any]], batch_size: int) -> None:
        """Commit one shard of one view: every array's rows `[shard.num_rows, …]`, computed `batch_size` rows at a time.

        Files first (whole, fsynced, renamed), then the record. Raises `OSError` when the disk is full; what was
        committed stays.
        """
        if set(arrays) != set(self._layouts):
            raise StoreError(f"arrays {sorted(arrays)} do not fit the store's {sorted(self._layouts)}")
        files = {}
        for name, layout in self._layouts.items():
            if arrays[name].shape != (shard.num_rows, *layout.shape):
                expected = (shard.num_rows, *layout.shape)
                raise StoreError(f"array {name!r} has shape {arrays[name].shape}, expected {expected}")
            content = encode_shard(arrays[name], layout)
            durable.write_bytes(self.path / layout.shard_path(view, shard.index), content)
            files[name] = (len(content), hashlib.sha256(content).hexdigest())
            self._open_shards.pop((name, view, shard.index), None)
        record = CommitRecord(
            view=view,
            shard=shard.index,
            start=shard.start,
            stop=shard.stop,
            batch_size=batch_size,
            inputs=self._inputs_digest(shard),
            manifest=self._manifest_digest,
            layouts=self._layouts_digest,
            files=files,
        )
        self._log.add(record)

    def finish(self) -> None:
        """Compact the commit log. Raises `IncompleteStoreError` while shards are missing."""
        self.check_complete()
        valid = {(view, shard.index) for view in range(self.num_views) for shard in self._shards}
        for key in set(self._log.records) - valid:
            del self._log.records[key]
        expected = {layout.shard_path(*key) for layout in self._layouts.values() for key in valid}
        for name in self._layouts:
            for path in (self.path / name).glob("c.*"):
                if f"{name}/{path.name}" not in expected:
                    path.unlink()
        self._log.compact()

    def check_complete(self) -> None:
        """Raise `IncompleteStoreError` unless every row has targets in every view."""
        missing = self.missing()
        if missing:
            raise IncompleteStoreError(
                f"{self.path} lacks {len(missing)} of {len(self._shards) * self.num_views} shards. "
                "Run `kdpipe cache-teacher NAME`: it computes only those."
            )

    def read(self, rows: NDArray[np.int64], view: int = 0) -> dict[str, Targets]:
        """Targets of each output for row numbers `[B]`, in the given order. Raises for what is not committed."""
        names = [output + suffix for output, suffixes in self._suffixes.items() for suffix in suffixes]
        arrays = self.read_arrays(rows, view, names)
        return {
            output.name: encoding_from_json(self.manifest.encodings[output.name]).decode(
                {suffix: arrays[output.name + suffix] for suffix in self._suffixes[output.name]}
            )
            for output in self.manifest.outputs
        }

    def targets(self, sample_ids: Sequence[str], view: int = 0, output: str = "logits") -> Targets:
        """Targets of samples by id, in the given order: `[B, …]`."""
        if output not in self._suffixes:
            raise StoreError(f"{self.path} holds no output {output!r}; it holds {', '.join(self._suffixes)}")
        return self.read(self.rows_of(sample_ids), view)[output]

    def statistics(self, rows: NDArray[np.int64], view: int = 0) -> dict[str, NDArray[np.float32]]:
        """The teacher's class, confidence and entropy (nats) at T = 1 for row numbers `[B]`: `[B, …]` each."""
        values = self.read_arrays(rows, view, ["statistics"])["statistics"]
        return {name: values[..., column] for column, name in enumerate(STATISTICS)}

    def rows_of(self, sample_ids: Sequence[str]) -> NDArray[np.int64]:
        """Row numbers `[B]` of sample ids. Raises `IncompleteStoreError` naming ids that the store does not know."""
        order, ordered = self._sorted_ids
        wanted = np.asarray(sample_ids, dtype=np.str_)
        found = np.minimum(np.searchsorted(ordered, wanted), len(ordered) - 1)
        unknown = np.flatnonzero(ordered[found] != wanted)
        if len(unknown):
            raise IncompleteStoreError(
                f"{self.path} has no targets for {len(unknown)} of {len(wanted)} samples, such as "
                f"{str(wanted[unknown[0]])!r}. Run `kdpipe cache-teacher NAME`."
            )
        rows: NDArray[np.int64] = order[found]
        return rows

    def read_arrays(
        self, rows: NDArray[np.int64], view: int = 0, names: Sequence[str] | None = None
    ) -> dict[str, NDArray[Any]]:
        """Stored arrays for row numbers `[B]`, in the given order; all arrays unless `names` says which."""
        if not 0 <= view < self.num_views:
            raise IncompleteStoreError(f"{self.path} has views 0..{self.num_views - 1}; view {view} was asked")
        rows = np.asarray(rows, np.int64)
        if len(rows) and not 0 <= rows.min() <= rows.max() < self.num_rows:
            raise IncompleteStoreError(f"{self.path} has {self.num_rows} rows; row {rows.max()} was asked")
        shard_of, position = np.divmod(rows, self.manifest.shard_rows)
        layouts = [self._layouts[name] for name in names or self._layouts]
        result = {each.name: np.empty((len(rows), *each.shape), each.dtype) for each in layouts}
        for shard in np.unique(shard_of):
            here = np.flatnonzero(shard_of == shard)
            for layout in layouts:
                result[layout.name][here] = self._shard_file(layout, view, int(shard)).read(position[here])
        return result

    def repair(self) -> int:
        """Forget the records of damaged shards, so that they are missing; returns how many. For the one writer."""
        damaged = {(each.view, each.shard) for each in self.verify()}
        forgotten = [key for key in self._log.records if key in damaged]
        for key in forgotten:
            self._log.forget(key)
        return len(forgotten)

    def verify(self) -> list[Problem]:
        """Check every byte against what was committed; an empty list means that all is well."""
        problems = [Problem(view=None, shard=None, what=what) for what in self._metadata_problems()]
        for view, shard in self.missing():
            problems.append(
                Problem(view=view, shard=shard.index, what="no valid commit record, or files of another size")
            )
        for key, record in sorted(self._log.records.items()):
            problems += [Problem(view=key[0], shard=key[1], what=what) for what in self._shard_problems(record)]
        return problems

    def _shard_problems(self, record: CommitRecord) -> Iterator[str]:
        for name, (size, checksum) in record.files.items():
            path = self.path / self._layouts[name].shard_path(*record.key)
            if not path.is_file():
                yield f"{path.name} of {name} is absent"
            elif path.stat().st_size != size:
                yield f"{path.name} of {name} has {path.stat().st_size} bytes, {size} were committed"
            elif digest_file(path) != checksum:
                yield f"{path.name} of {name} differs from its checksum"

    def _metadata_problems(self) -> Iterator[str]:
        for path, content in _zarr_files(self.manifest, self.num_views, self.num_rows).items():
            if not (self.path / path).is_file() or (self.path / path).read_bytes() != content.encode():
                yield f"{path} is absent or was changed"
        if not self._rows_intact:
            yield "rows.parquet was changed"

    def _valid(self, view: int, shard: Shard) -> bool:
        record = self._log.records.get((view, shard.index))
        return (
            record is not None
            and (record.start, record.stop) == (shard.start, shard.stop)
            and record.manifest == self._manifest_digest
            and record.layouts == self._layouts_digest
            and record.inputs == self._inputs_digest(shard)
            and all(
                _size(self.path / self._layouts[name].shard_path(*record.key)) == size
                for name, (size, _) in record.files.items()
            )
        )

    def _shard_file(self, layout: ArrayLayout, view: int, shard: int) -> ShardFile:
        key = (layout.name, view, shard)
        if key in self._open_shards:
            self._open_shards.move_to_end(key)
            return self._open_shards[key]
        if not self._valid(view, self._shards[shard]):
            raise IncompleteStoreError(
                f"{self.path}: shard {shard} of view {view} is not committed. Run `kdpipe cache-teacher NAME`."
            )
        record = self._log.records[view, shard]
        path = self.path / layout.shard_path(view, shard)
        opened = ShardFile(path, layout, record.stop - record.start, record.files[layout.name][0])
        self._open_shards[key] = opened
        if len(self._open_shards) > MAX_OPEN_SHARDS:
            self._open_shards.popitem(last=False)
        return opened

    def _inputs_digest(self, shard: Shard) -> str:
        ids = "\0".join(self.sample_ids[shard.start : shard.stop].tolist()).encode()
        return hashlib.sha256(ids + self.digests[shard.start : shard.stop].tobytes()).hexdigest()

    def _load_extent(self) -> None:
        path = self.path / "extent.json"
        try:
            extent = json.loads(path.read_text())
            self._num_rows, self._num_views = int(extent["num_rows"]), int(extent["num_views"])
            self._rows_sha256 = str(extent["rows_sha256"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CorruptStoreError(f"{path} is damaged or absent: {error}") from None

    @cached_property
    def _rows(self) -> pa.Table:
        if not self._rows_intact:
            raise CorruptStoreError(f"{self.path / 'rows.parquet'} differs from its digest in extent.json")
        return pq.read_table(self.path / "rows.parquet", use_threads=False, pre_buffer=False)

    @property
    def _rows_intact(self) -> bool:
        path = self.path / "rows.parquet"
        return path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == self._rows_sha256

    @cached_property
    def _sorted_ids(self) -> tuple[NDArray[np.int64], NDArray[np.str_]]:
        order = np.argsort(self.sample_ids, kind="stable")
        return order, self.sample_ids[order]

    @cached_property
    def _shards(self) -> list[Shard]:
        return shards_of(self.num_rows, self.manifest.shard_rows)

    @cached_property
    def _manifest_digest(self) -> str:
        return self.manifest.identity()

    @cached_property
    def _layouts_digest(self) -> str:
        return digest([layout.digest() for layout in self._layouts.values()])

    @cached_property
    def _suffixes(self) -> dict[str, list[str]]:
        return {
            output.name: list(encoding_from_json(self.manifest.encodings[output.name]).arrays(output))
            for output in self.manifest.outputs
        }


def open_store(path: Path | str) -> TargetStore:
    """Open a store for reading: `targets = open_store(path).targets(sample_ids, view=0)`."""
    return TargetStore.open(path)


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return None


def _zarr_files(manifest: Manifest, num_views: int, num_rows: int) -> dict[str, str]:
    group = {"zarr_format": 3, "node_type": "group", "attributes": {"kdpipe": "see manifest.json"}}
    arrays = {
        f"{name}/zarr.json": canonical_json(layout.zarr_metadata(num_views, num_rows)) + "\n"
        for name, layout in manifest.layouts().items()
    }
    return {"zarr.json": canonical_json(group) + "\n", **arrays}


def _write_extent(
    path: Path, manifest: Manifest, sample_ids: NDArray[np.str_], digests: NDArray[np.uint8], num_views: int
) -> None:
    """Write rows.parquet, extent.json and the Zarr metadata, where they differ from what is there."""
    ids = pa.array(sample_ids.tolist(), pa.string())
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"sample_id": ids, "digest": fixed_bytes(digests)}), sink, compression="zstd")
    content = sink.getvalue().to_pybytes()
    extent = {
        "num_rows": len(sample_ids),
        "num_views": num_views,
        "rows_sha256": hashlib.sha256(content).hexdigest(),
    }
    files = {"rows.parquet": content, "extent.json": (canonical_json(extent) + "\n").encode()}
    files |= {name: text.encode() for name, text in _zarr_files(manifest, num_views, len(sample_ids)).items()}
    for name, wanted in files.items():
        target = path / name
        target.parent.mkdir(exist_ok=True)
        if not target.is_file() or target.read_bytes() != wanted:
            durable.write_bytes(target, wanted)
