"""What `verify` does: every byte of a store against what was committed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kdpipe.fingerprint import digest_file
from kdpipe.store.extent import zarr_files
from kdpipe.store.records import CommitRecord

if TYPE_CHECKING:
    from kdpipe.store.target_store import TargetStore


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One thing that is wrong: where, and what."""

    view: int | None
    shard: int | None
    what: str


def problems_of(store: TargetStore) -> list[Problem]:
    """Read every file and compare; an empty list means that all is well."""
    problems = [Problem(view=None, shard=None, what=what) for what in _metadata_problems(store)]
    rows_intact = store.extent.rows_intact(store.path)
    if not rows_intact:
        problems.append(Problem(view=None, shard=None, what="rows.parquet is absent or was changed"))
    for view, shard in store.missing():
        what = "no valid commit record, or files of another size"
        problems.append(Problem(view=view, shard=shard.index, what=what))
    for (view, index), record in store.records.items():
        if rows_intact and store.is_row_range(record) and not _is_of_those_rows(store, record):
            what = "the rows that it was computed from are not those of rows.parquet"
            problems.append(Problem(view=view, shard=index, what=what))
        problems += [Problem(view=view, shard=index, what=what) for what in _file_problems(store, record)]
    return problems


def _is_of_those_rows(store: TargetStore, record: CommitRecord) -> bool:
    return record.inputs == store.inputs_digest(record.start, record.stop)


def _file_problems(store: TargetStore, record: CommitRecord) -> Iterator[str]:
    for name, (size, checksum) in record.files.items():
        path = store.path / store.layouts[name].shard_path(*record.key)
        if not path.is_file():
            yield f"{path.name} of {name} is absent"
        elif path.stat().st_size != size:
            yield f"{path.name} of {name} has {path.stat().st_size} bytes, {size} were committed"
        elif digest_file(path) != checksum:
            yield f"{path.name} of {name} differs from its checksum"


def _metadata_problems(store: TargetStore) -> Iterator[str]:
    for path, content in zarr_files(store.manifest, store.num_views, store.num_rows).items():
        if not (store.path / path).is_file() or (store.path / path).read_bytes() != content:
            yield f"{path} is absent or was changed"
