"""`TargetStore`: rows x views of what one teacher said."""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from kdpipe import durable
from kdpipe.distributed import Shard, shards_of
from kdpipe.encodings import TargetEncoding, encoding_from_json
from kdpipe.errors import ConfigError, CorruptStoreError, IncompleteStoreError, StaleStoreError, StoreError
from kdpipe.fingerprint import digest
from kdpipe.store.classifier import CLASSIFIER, TeacherClassifier
from kdpipe.store.extent import ROWS, Extent, rows_file, write_extent, zarr_files
from kdpipe.store.folder import HeldFolder, published_anew
from kdpipe.store.kept import VIEWS, KeptViews
from kdpipe.store.layout import ArrayLayout
from kdpipe.store.manifest import COVERED, STATISTICS, Manifest
from kdpipe.store.objects import is_url
from kdpipe.store.reading import ShardReader
from kdpipe.store.records import CommitLog, CommitRecord, Key, bits_of
from kdpipe.store.remote import LOG, LOG_DIGEST, RemoteFolder, url_of
from kdpipe.store.rows import StoredRows, row_numbers, rows_table
from kdpipe.store.shard_file import REPAIR, ShardFile, write_shard
from kdpipe.store.uploading import Uploading
from kdpipe.store.verification import Problem, problems_of
from kdpipe.targets import OutputSpec, Targets

_DESCRIPTION = ("manifest.json", "extent.json", LOG, LOG_DIGEST)


class TargetStore:
    """Rows x views of one teacher's targets. `create` or `open` it; shards not committed do not exist for readers."""

    def __init__(self, path: Path, remote: RemoteFolder | Uploading | None = None) -> None:
        """Open what is there, the mirror of what is remote, or what goes there; see `open` and `create`."""
        self.path, self._remote = path.absolute(), remote  # the working directory may be another one tomorrow
        self._folder = HeldFolder(self.path)
        try:
            self.manifest = Manifest.load(path)
            self.extent = Extent.load(path)
            self.records = CommitLog(path)
        finally:  # files of two stores, read while one took the other's place, are nobody's fault
            self._folder.check()
        if self.records.rows_sha256 not in ("", self.extent.rows_sha256):
            raise CorruptStoreError(
                f"{path}: {LOG} and {ROWS} are of two versions of this store, such as a copy over an older one leaves "
                f"that broke off. {REPAIR}"
            )
        self.layouts: dict[str, ArrayLayout] = self.manifest.layouts()
        this = weakref.proxy(self)  # no cycle: the folder is let go of as soon as the store is
        self.rows = StoredRows(lambda: this._read_rows())
        self.reader = ShardReader(lambda *which: this._open_shard(*which))
        self._found_valid: set[Key] = set()
        self._in_views: NDArray[np.bool_] | None = None
        self._computed_rows: dict[int, NDArray[np.bool_]] = {}

    @classmethod
    def open(cls, path: Path | str) -> TargetStore:
        """Open a store for reading: a folder, or a url (s3://, gs://) whose files are fetched when they are touched.

        A folder that describes a store at a url is followed there. Raises `StoreNotFoundError`, `CorruptStoreError`,
        `StaleStoreError` for a description of another store than the one at its url, `StoreError`.
        """
        if is_url(path):
            remote = RemoteFolder(str(path))
        elif url := url_of(Path(path)):
            remote = RemoteFolder(url, Path(path))
        else:
            return cls(Path(path))
        return cls(remote.path, remote)

    @classmethod
    def create(
        cls,
        path: Path,
        manifest: Manifest,
        sample_ids: NDArray[np.str_] | pa.ChunkedArray,
        digests: NDArray[np.uint8],
        num_views: int = 1,
        *,
        splits: NDArray[np.str_] | None = None,
        sweep: bool = True,
    ) -> TargetStore:
        """Start a store for rows `[N]` with content digests `[N, 16]`, or go on with one of the same manifest.

        `sample_ids` are an array, or `PreparedInputs.id_column()`, which is smaller in memory. `splits [N]` are those
        of `PartnerPlan` where views mix rows.

        The manifest stands before the first shard. Rows may have grown since; what was committed for rows that are
        still the same stays. `sweep` removes what killed writers left: only for one that is alone. Raises
        `StaleStoreError` for another manifest.
        """
        manifest.check_outputs()
        durable.make_folder(path)
        if sweep:
            durable.sweep_temporaries(path)
        found = Manifest.load(path) if (path / "manifest.json").is_file() else None
        if found is not None:
            if found.identity() != manifest.identity():
                raise StaleStoreError(f"{path} was made from other settings; remove it, or restore the settings")
            manifest = replace(manifest, recorded=found.recorded)
        if found is None or found.to_text() != manifest.to_text():
            durable.write_text(path / "manifest.json", manifest.to_text())
        rows = rows_table(sample_ids, digests, splits)
        content = rows_file(rows)
        extent = Extent.of(path, content, len(sample_ids), num_views)
        _forget_other_rows(CommitLog(path), StoredRows(lambda: rows), extent)
        write_extent(path, manifest, extent, content)
        return cls(path)

    def __reduce__(self) -> tuple[Any, ...]:
        """A store that goes to another process is opened there."""
        named = self._remote.named if isinstance(self._remote, RemoteFolder) else self.path
        return _opened_again, (named, self._version)

    @property
    def num_rows(self) -> int:
        """Rows that the store is about."""
        return self.extent.num_rows

    @property
    def num_views(self) -> int:
        """Views per row; view 0 is the clean row."""
        return self.extent.num_views

    @property
    def fingerprint(self) -> str:
        """Digest of whatever changes the targets."""
        return self.manifest.fingerprint

    @property
    def num_bytes(self) -> int:
        """Bytes of all committed shards."""
        return sum(file.num_bytes for record in self.records.values() for file in record.files.values())

    @cached_property
    def outputs(self) -> dict[str, OutputSpec]:
        """What is stored, by name."""
        return {output.name: output for output in self.manifest.outputs}

    @cached_property
    def encodings(self) -> dict[str, TargetEncoding]:
        """How each output is stored."""
        return {name: encoding_from_json(self.manifest.encodings[name]) for name in self.outputs}

    @property
    def sample_ids(self) -> NDArray[np.str_]:
        """Sample ids `[N]`, in row order."""
        return self.rows.sample_ids

    @property
    def digests(self) -> NDArray[np.uint8]:
        """Content digests `[N, 16]` of the rows that the targets are about."""
        return self.rows.digests

    def state_digest(self) -> str:
        """Digest of what made the targets, of the rows they are about, and of their bytes."""
        files = [
            [*key, record.inputs, {name: [file.num_bytes, file.sha256] for name, file in record.files.items()}]
            for key, record in self.records.items()
        ]
        return digest([self.fingerprint, files])

    def want_in_views(self, rows: NDArray[np.bool_]) -> None:
        """Say which rows `[N]` augmented views are about, for the writer; view 0 is about all of them."""
        self._in_views = rows

    def wanted(self, view: int, shard: Shard) -> NDArray[np.bool_]:
        """Which rows of a shard `[shard.num_rows]` a view is about."""
        if view == 0 or self._in_views is None:
            return np.ones(shard.num_rows, np.bool_)
        return self._in_views[shard.start : shard.stop]

    def kept_views(self) -> KeptViews | None:
        """Rows as view 1 showed them to the teacher; None where the store keeps none. Raises `CorruptStoreError`."""
        sha256 = self.extent.views_sha256
        if sha256 is None:
            return None
        self._fetch(VIEWS, sha256)
        return KeptViews.load(self.path, sha256)

    def keep_views(self, kept: KeptViews | None) -> None:
        """Keep rows as view 1 shows them, instead of those that are kept; for the one writer."""
        # Without extent.json's word the file is none, so that a kill in between leaves none.
        self._write_extent(None)
        if kept is None:
            (self.path / VIEWS).unlink(missing_ok=True)
            return
        content = kept.to_bytes()
        durable.write_bytes(self.path / VIEWS, content)
        self._write_extent(hashlib.sha256(content).hexdigest())

    def classifier(self) -> TeacherClassifier | None:
        """The teacher's last layer; None where the store has none. Raises `CorruptStoreError`."""
        about = self.manifest.classifier
        if about is None:
            return None
        self._fetch(CLASSIFIER, about["sha256"])
        return TeacherClassifier.load(self.path, about)

    def keep_classifier(self, classifier: TeacherClassifier | None) -> None:
        """Have the teacher's last layer beside the manifest that tells of it, or none; for a writer."""
        path = self.path / CLASSIFIER
        if classifier is None:
            path.unlink(missing_ok=True)
        elif not path.is_file() or path.read_bytes() != classifier.content:
            durable.write_bytes(path, classifier.content)

    def _write_extent(self, views_sha256: str | None) -> None:
        extent = replace(self.extent, views_sha256=views_sha256)
        if extent != self.extent:
            durable.write_text(self.path / "extent.json", extent.to_text())
            self.extent = extent

    def missing(self) -> list[tuple[int, Shard]]:
        """(view, shard) without a valid commit record for today's rows, in order."""
        return [
            (view, shard) for view in range(self.num_views) for shard in self.shards if not self._valid(view, shard)
        ]

    def write(self, view: int, shard: Shard, arrays: Mapping[str, NDArray[Any]], batch_size: int) -> None:
        """Commit one shard of one view: every array's rows `[shard.num_rows, …]`, computed `batch_size` rows at a time.

        Files first (whole, fsynced, renamed), then the record; then both go to the url of a store that is worked at
        there. Raises `OSError` when the disk is full; what was committed stays.
        """
        if set(arrays) != set(self.layouts):
            raise StoreError(f"arrays {sorted(arrays)} do not fit the store's {sorted(self.layouts)}")
        files = {}
        for name, layout in self.layouts.items():
            if arrays[name].shape != (shard.num_rows, *layout.shape):
                expected = (shard.num_rows, *layout.shape)
                raise StoreError(f"array {name!r} has shape {arrays[name].shape}, expected {expected}")
            with durable.writing(self.path / layout.shard_path(view, shard.index)) as file:
                files[name] = write_shard(file, arrays[name], layout)
        self.reader.forget(view, shard.index)
        self._found_valid.discard((view, shard.index))
        self._computed_rows.pop(view, None)
        record = CommitRecord(
            view=view,
            shard=shard.index,
            start=shard.start,
            stop=shard.stop,
            batch_size=batch_size,
            inputs=self.inputs_digest(view, shard.start, shard.stop),
            manifest=self._manifest_digest,
            layouts=self._layouts_digest,
            files=files,
            computed=bits_of(self.wanted(view, shard)),
        )
        self.records.add(record)
        if isinstance(self._remote, Uploading):
            self._remote.commit(record)

    def finish(self) -> None:
        """Compact the commit log and remove what no record names. Raises `IncompleteStoreError` while shards miss."""
        self.check_complete()
        valid: set[Key] = {(view, shard.index) for view in range(self.num_views) for shard in self.shards}
        self.records.keep(valid, self.extent.rows_sha256)
        expected = {layout.shard_path(*key) for layout in self.layouts.values() for key in valid}
        for name in self.layouts:
            for path in (self.path / name).glob("c.*"):
                if f"{name}/{path.name}" not in expected:
                    path.unlink()

    def check_complete(self) -> None:
        """Raise `IncompleteStoreError` unless every row has targets in every view."""
        missing = self.missing()
        if missing:
            raise IncompleteStoreError(
                f"{self.path} lacks {len(missing)} of {len(self.shards) * self.num_views} shards. "
                "Run `kdpipe cache-teacher NAME`: it computes only those."
            )

    def verify(self, trusted: Collection[Key] = ()) -> list[Problem]:
        """Check every byte against what was committed; an empty list means that all is well.

        Shards (view, shard) that are `trusted`, as they were written just now, are not read again.
        """
        if not isinstance(self._remote, RemoteFolder):
            self.fetch_all()
            return problems_of(self, trusted)
        with self._remote.anew() as remote:  # as it lies there now, whatever was fetched before
            store = TargetStore(remote.path, remote)
            store.fetch_all()
            return problems_of(store, trusted)

    def fetch_all(self) -> None:
        """Have every file below `path`, where some are remote; they are not verified."""
        for name in self.file_names() if self._remote else ():
            self._fetch(name)

    def description_names(self) -> list[str]:
        """Every file of a finished store that is no shard, relative to its folder."""
        kept = [VIEWS] if self.extent.views_sha256 else []
        kept += [] if self.manifest.classifier is None else [CLASSIFIER]
        return [*_DESCRIPTION, ROWS, *kept, *zarr_files(self.manifest, self.num_views, self.num_rows)]

    def file_names(self) -> list[str]:
        """Every file of a finished store, relative to its folder."""
        shards = [self.layouts[name].shard_path(*key) for key in self.records for name in self.layouts]
        return [*self.description_names(), *shards]

    def repair(self) -> int:
        """Forget the records of damaged shards, so that they are missing; returns how many. For the one writer."""
        damaged = {(each.view, each.shard) for each in self.verify()}
        forgotten = [key for key in self.records if key in damaged]
        if forgotten:
            self.records.keep(set(self.records) - damaged)
            self._found_valid.clear()
        return len(forgotten)

    def read(self, rows: NDArray[np.int64], view: int = 0, outputs: Sequence[str] | None = None) -> dict[str, Targets]:
        """Targets of each output for row numbers `[B]`, in the given order. Raises for what is not committed."""
        return self.decode(self.read_arrays(rows, view, self.array_names(outputs)), outputs)

    def targets(self, sample_ids: Sequence[str], view: int = 0, output: str = "logits") -> Targets:
        """Targets of samples by id, in the given order: `[B, …]`."""
        return self.read(self.rows_of(sample_ids), view, [output])[output]

    def array_names(self, outputs: Sequence[str] | None = None) -> list[str]:
        """Arrays that the named outputs (None: all) are decoded from."""
        for name in outputs or ():
            if name not in self.outputs:
                raise StoreError(f"{self.path} holds no output {name!r}; it holds {', '.join(self.outputs)}")
        names = [name + suffix for name in outputs or self.outputs for suffix in self._suffixes[name]]
        return [*names, COVERED] if self.manifest.coverage else names

    def row_bytes(self, outputs: Sequence[str] | None = None) -> int:
        """Bytes of a row of the named outputs (None: all), uncompressed."""
        return sum(self.layouts[name].row_bytes for name in self.array_names(outputs))

    def decode(self, arrays: Mapping[str, NDArray[Any]], outputs: Sequence[str] | None = None) -> dict[str, Targets]:
        """Stored rows of arrays -> targets by output."""
        result: dict[str, Targets] = {}
        for name in outputs or self.outputs:
            stored = {suffix: arrays[name + suffix] for suffix in self._suffixes[name]}
            result[name] = self.encodings[name].decode(stored, self.outputs[name])
            if self.manifest.coverage:
                result[name] = replace(result[name], covered=torch.from_numpy(arrays[COVERED]))
        return result

    def statistics(self, rows: NDArray[np.int64], view: int = 0) -> dict[str, NDArray[np.float32]]:
        """The teacher's class, confidence and entropy (nats) at T = 1 for row numbers `[B]`: `[B, …]` each."""
        values = self.read_arrays(rows, view, ["statistics"])["statistics"]
        return {name: values[..., column] for column, name in enumerate(STATISTICS)}

    def rows_of(self, sample_ids: Sequence[str]) -> NDArray[np.int64]:
        """Row numbers `[B]` of sample ids. Raises `IncompleteStoreError` naming ids that the store does not know."""
        rows = self.rows.find(sample_ids)
        unknown = np.flatnonzero(rows < 0)
        if len(unknown):
            raise IncompleteStoreError(
                f"{self.path} has no targets for {len(unknown)} of {len(rows)} samples, such as "
                f"{str(np.asarray(sample_ids)[unknown[0]])!r}. Run `kdpipe cache-teacher NAME`."
            )
        return rows

    def read_arrays(
        self, rows: NDArray[np.int64], view: int = 0, names: Sequence[str] | None = None
    ) -> dict[str, NDArray[Any]]:
        """Stored arrays for row numbers `[B]`, in the given order; all arrays unless `names` says which."""
        rows = row_numbers(rows)
        self.check_rows(rows, view)
        return self.reader.read([self.layouts[name] for name in names or self.layouts], view, rows)

    @property
    def num_answers(self) -> int:
        """How many rows the teacher was shown, over all views: augmented views may be of some rows only."""
        return sum(int(self._computed(view).sum()) for view in range(self.num_views))

    def check_rows(self, rows: NDArray[np.int64], view: int) -> None:
        """Raise `IncompleteStoreError` for a view or row that the store does not have, `ConfigError` for no number."""
        if isinstance(view, bool) or not isinstance(view, int | np.integer):
            raise ConfigError(f"view is {view!r}; expected the number of a view, 0 is the clean rows")
        if not 0 <= view < self.num_views:
            raise IncompleteStoreError(
                f"{self.path} has views 0..{self.num_views - 1}; view {view} was asked. "
                "Run `kdpipe cache-teacher NAME` where params.yaml asks for more views."
            )
        if len(rows) and not 0 <= rows.min() <= rows.max() < self.num_rows:
            asked = rows.min() if rows.min() < 0 else rows.max()
            raise IncompleteStoreError(f"{self.path} has rows 0..{self.num_rows - 1}; row {asked} was asked")
        if view > 0:
            absent = int((~self._computed(view)[rows]).sum())
            if absent:
                raise IncompleteStoreError(
                    f"{self.path}: view {view} holds no targets for {absent} of {len(rows)} rows: views are cached for "
                    "some splits only (views.splits)"
                )

    @cached_property
    def shards(self) -> list[Shard]:
        """The shards of one view."""
        return shards_of(self.num_rows, self.manifest.shard_rows)

    def is_row_range(self, record: CommitRecord) -> bool:
        """Whether a record is about a shard of today's rows."""
        index = record.shard
        return index < len(self.shards) and (self.shards[index].start, self.shards[index].stop) == (
            record.start,
            record.stop,
        )

    def inputs_digest(self, view: int, start: int, stop: int) -> str:
        """Digest of what rows `[start, stop)` are in a view; see `StoredRows.inputs_digest`."""
        return self.rows.inputs_digest(view, start, stop)

    def _computed(self, view: int) -> NDArray[np.bool_]:
        """Which rows `[N]` the teacher saw in a view."""
        if view not in self._computed_rows:
            rows = np.zeros(self.num_rows, np.bool_)
            for shard in self.shards:
                record = self.records.get((view, shard.index))
                if record is not None and self.is_row_range(record):
                    rows[shard.start : shard.stop] = record.rows_computed
            self._computed_rows[view] = rows
        return self._computed_rows[view]

    def _valid(self, view: int, shard: Shard) -> bool:
        """Whether a shard has a record for today's rows, made as this store says, and files of the size it names.

        That the rows have the ids and contents of the record was made sure by `create`; `verify` checks it again.
        """
        record = self.records.get((view, shard.index))
        return (
            record is not None
            and self._is_for(record, shard)
            and all(
                self.file_size(self.layouts[name].shard_path(*record.key)) == file.num_bytes
                for name, file in record.files.items()
            )
        )

    def takes(self, record: CommitRecord, shard: Shard) -> bool:
        """Whether a record that another folder holds is one of a shard of this store, for today's rows."""
        return self._is_for(record, shard) and record.inputs == self.inputs_digest(record.view, shard.start, shard.stop)

    def _is_for(self, record: CommitRecord, shard: Shard) -> bool:
        return (
            (record.start, record.stop) == (shard.start, shard.stop)
            and record.manifest == self._manifest_digest
            and record.layouts == self._layouts_digest
            and (
                record.view == 0
                or self._in_views is None
                or bool(record.rows_computed[self.wanted(record.view, shard)].all())
            )
        )

    def _open_shard(self, layout: ArrayLayout, view: int, shard: int) -> ShardFile:
        if (view, shard) not in self._found_valid and not self._valid(view, self.shards[shard]):
            raise IncompleteStoreError(
                f"{self.path}: shard {shard} of view {view} is not committed, or a file of it is absent or has another "
                "size than was committed. Run `kdpipe cache-teacher NAME`, or fetch the store again."
            )
        self._found_valid.add((view, shard))  # not looked at again for each of its arrays
        record = self.records[view, shard]
        name, stored = layout.shard_path(view, shard), record.files[layout.name]
        self._fetch(name, stored.sha256)
        return ShardFile(self.path / name, layout, record.stop - record.start, stored, self._folder)

    def _fetch(self, name: str, sha256: str | None = None) -> None:
        """Have a file of this store below `path`. Raises `StaleStoreError` where it has given way to another one."""
        if self._remote is not None:
            self._remote.fetch(name, sha256)
        self._folder.check()

    def file_size(self, name: str) -> int | None:
        """Bytes of one of the store's files; None where it is absent."""
        size = self._folder.size(name)
        return self._remote.size(name) if size is None and self._remote is not None else size

    def _read_rows(self) -> pa.Table:
        self._fetch(ROWS, self.extent.rows_sha256)
        return self.extent.read_rows(self.path)

    @property
    def _version(self) -> str:
        """What tells this store from another one that is published at the same place."""
        return digest([self.manifest.identity(), self.extent.to_text(), self.records.log_sha256])

    @cached_property
    def _manifest_digest(self) -> str:
        return self.manifest.identity()

    @cached_property
    def _layouts_digest(self) -> str:
        return digest([layout.digest() for layout in self.layouts.values()])

    @cached_property
    def _suffixes(self) -> dict[str, list[str]]:
        return {name: list(self.encodings[name].arrays(output)) for name, output in self.outputs.items()}


def open_store(path: Path | str) -> TargetStore:
    """Open a store (a folder, or an s3:// or gs:// url): `targets = open_store(path).targets(sample_ids, view=0)`."""
    return TargetStore.open(path)


def _opened_again(path: Path | str, version: str) -> TargetStore:
    """A store that another process has open. Raises `StaleStoreError` where it was published anew meanwhile."""
    store = open_store(path)
    if store._version != version:
        raise published_anew(path)
    return store


def _forget_other_rows(records: CommitLog, rows: StoredRows, extent: Extent) -> None:
    """Drop records of shards whose rows are others today, before the store is told of today's rows.

    Of other rows than it was finished with, the log is one of work in progress from here on.

    A shard that only grew keeps its record until it is written again; its other row range makes it invalid.
    """
    same = {
        record.key
        for record in records.values()
        if record.stop <= extent.num_rows
        and record.inputs == rows.inputs_digest(record.view, record.start, record.stop)
    }
    if len(same) < len(records) or records.rows_sha256 not in ("", extent.rows_sha256):
        records.keep(same)
