"""What `verify` does: every byte of a store against what was committed."""

from __future__ import annotations

from collections.abc import Container, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kdpipe.fingerprint import digest_file
from kdpipe.store.classifier import CLASSIFIER, classifier_intact
from kdpipe.store.extent import ROWS, zarr_files
from kdpipe.store.kept import VIEWS, is_intact
from kdpipe.store.records import CommitRecord, Key

if TYPE_CHECKING:
    from kdpipe.store.target_store import TargetStore


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One thing that is wrong: where (None: in the description of the whole store), and what."""

    view: int | None = None
    shard: int | None = None
    what: str

    def __str__(self) -> str:
        return self.what if self.shard is None else f"view {self.view}, shard {self.shard}: {self.what}"


def problems_of(store: TargetStore, trusted: Container[Key] = ()) -> list[Problem]:
    """Read every file, save those of `trusted` shards, and compare; an empty list means that all is well."""
    rows_intact = store.extent.rows_intact(store.path)
    problems = description_problems(store)
    for key, record in store.records.items():
        if key in trusted:
            continue
        if rows_intact and store.is_row_range(record) and not _is_of_those_rows(store, record):
            what = "the rows that it was computed from are not those of rows.parquet"
            problems.append(Problem(view=record.view, shard=record.shard, what=what))
        problems += [Problem(view=record.view, shard=record.shard, what=what) for what in _file_problems(store, record)]
    told = {(each.view, each.shard) for each in problems}
    absent = [(view, shard.index) for view, shard in store.missing() if (view, shard.index) not in told]
    return problems + [Problem(view=view, shard=index, what="no valid commit record") for view, index in absent]


def description_problems(store: TargetStore) -> list[Problem]:
    """What is wrong with the row ids, Zarr's metadata, the kept views and the classifier; shards are not read."""
    found = []
    for path, content in zarr_files(store.manifest, store.num_views, store.num_rows).items():
        if not (store.path / path).is_file() or (store.path / path).read_bytes() != content:
            found.append(path)
    if not store.extent.rows_intact(store.path):
        found.append(ROWS)
    if not is_intact(store.path, store.extent.views_sha256):
        found.append(VIEWS)
    if not classifier_intact(store.path, store.manifest.classifier):
        found.append(CLASSIFIER)
    return [Problem(what=f"{path} is absent or was changed") for path in found]


def _is_of_those_rows(store: TargetStore, record: CommitRecord) -> bool:
    return record.inputs == store.inputs_digest(record.view, record.start, record.stop)


def _file_problems(store: TargetStore, record: CommitRecord) -> Iterator[str]:
    for name, committed in record.files.items():
        path = store.path / store.layouts[name].shard_path(*record.key)
        if not path.is_file():
            yield f"{path.name} of {name} is absent"
        elif path.stat().st_size != committed.num_bytes:
            yield f"{path.name} of {name} has {path.stat().st_size} bytes, {committed.num_bytes} were committed"
        elif digest_file(path) != committed.sha256:
            yield f"{path.name} of {name} differs from its checksum"
