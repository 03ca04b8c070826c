"""`kdpipe export-targets` and `import-targets`, and teachers of which there is only a table of what they said."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from kdpipe import durable
from kdpipe.caching import CacheProgress, Captured, Share
from kdpipe.data.prepared import PreparedInputs
from kdpipe.encodings import TargetEncoding, TopK, encoding_from_json
from kdpipe.errors import ConfigError, DataError
from kdpipe.fingerprint import digest_file
from kdpipe.store import TargetStore
from kdpipe.store.layout import choose_shard_rows
from kdpipe.store.manifest import Manifest
from kdpipe.store.tables import FORMATS, TableTargets, export_table, fill, open_table, own_rows, prepared_rows
from kdpipe.targets import OutputSpec
from kdpipe_stages.building import encodings_of
from kdpipe_stages.params import PARAMETERS
from kdpipe_stages.project import Project

ALL_VIEWS = "all"
ENCODINGS_OF_TABLES = ("dense", "int8", "topk")


def export_targets(
    store: Path | str, table_format: str, out: Path | None, view: str, outputs: Sequence[str], replace: bool
) -> tuple[Path, int]:
    """Write a store as a table; returns the file's path and its number of rows. Raises `ConfigError`, `DataError`."""
    if table_format not in FORMATS:
        raise ConfigError(f"--format is {table_format!r}; the choices are {', '.join(FORMATS)}")
    ending = FORMATS[table_format]
    path = Path(Path(str(store)).name + ending) if out is None else out
    if path.suffix != ending:
        raise ConfigError(f"--out is {path}; expected a name that ends in {ending}, as --format is {table_format}")
    if view != ALL_VIEWS and not view.isdecimal():
        raise ConfigError(f"--view is {view!r}; expected a number from 0 up, or {ALL_VIEWS}")
    views = None if view == ALL_VIEWS else [int(view)]
    opened = TargetStore.open(store)
    return path, export_table(opened, path, views=views, outputs=outputs or None, replace=replace)


def import_targets(
    table: Path,
    folder: Path,
    *,
    num_classes: int | None = None,
    encoding: str | None = None,
    parameters: Mapping[str, object],
    temperatures: Sequence[float] = (),
) -> TargetStore:
    """Make a store of a table alone, rows in the table's order; nothing stands at `folder` before it is complete.

    `parameters` are the encoding's. Without `encoding` it is the one that an exported table was stored in, else dense
    or topk, as the columns are. Content digests are zero: nothing is known of the rows' content.
    """
    if folder.exists():
        raise DataError(f"{folder} exists already; remove it, or name another folder")
    said = TableTargets(open_table(table), num_classes=num_classes, temperatures=temperatures or None)
    chosen = {"logits": _chosen_encoding(said, encoding, parameters, temperatures)}
    said.check(chosen)
    own = own_rows(said)
    manifest = _manifest_of(table, said, chosen, len(own.sample_ids))
    work = folder.with_name(f".{folder.name}.{os.getpid()}{durable.TEMPORARY_SUFFIX}")
    try:
        digests = np.zeros((len(own.sample_ids), 16), np.uint8)
        store = TargetStore.create(work, manifest, own.sample_ids, digests, own.num_views)
        store.want_in_views(own.in_views)
        fill(store, said, own.rows, store.missing())
        store.finish()
        work.rename(folder)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
    durable.fsync_folder(folder.absolute().parent)
    return TargetStore.open(folder)


def _chosen_encoding(
    said: TableTargets, name: str | None, parameters: Mapping[str, object], temperatures: Sequence[float]
) -> TargetEncoding:
    given = {key: value for key, value in parameters.items() if value is not None}
    stored = said.table.about.get("encodings", {}).get("logits")
    if name is None and not given and not temperatures and stored:
        return encoding_from_json(stored)
    name = name or ("topk" if said.is_sparse else "dense")
    if name not in ENCODINGS_OF_TABLES:
        raise ConfigError(f"--encoding is {name!r}; the choices for a table are {', '.join(ENCODINGS_OF_TABLES)}")
    for key in given:
        if key not in PARAMETERS[name]:
            raise ConfigError(f"--{key}: encoding {name!r} has no such parameter")
    if name == "topk":
        given["temperatures"] = said.temperatures if said.is_sparse else tuple(temperatures)
        if "k" not in given and not said.is_sparse:
            raise ConfigError("--k: encoding 'topk' needs it, as the table names every class")
        given["k"] = given.get("k") or said.widest()
    return encoding_from_json({"name": name, **given})


def _manifest_of(table: Path, said: TableTargets, encodings: Mapping[str, TargetEncoding], num_rows: int) -> Manifest:
    encodings_json = {name: each.to_json() for name, each in encodings.items()}
    specs = [spec for each in said.outputs for spec in encodings[each.name].arrays(each).values()]
    logits = encodings["logits"]
    return Manifest(
        ingredients={"teacher": _identity(table, said), "encodings": encodings_json},
        outputs=said.outputs,
        encodings=encodings_json,
        temperatures=logits.temperatures if isinstance(logits, TopK) else (1.0,),
        num_classes=said.num_classes,
        class_names=said.table.about.get("class_names"),
        shard_rows=choose_shard_rows(specs, num_rows),
        coverage=said.has_coverage,
        teacher=_description(table.name, table, said),
    )


def _identity(table: Path, said: TableTargets) -> dict[str, object]:
    """Whatever changes the numbers."""
    return {"table": digest_file(table), "tail_temperatures": list(said.temperatures)}


def _description(name: str, table: Path, said: TableTargets) -> dict[str, object]:
    about: dict[str, object] = {"name": name, "table": table.name}
    exported = said.table.about.get("fingerprint")
    return about if exported is None else {**about, "exported_from": exported}


class TableTeacher:
    """teachers.<name>.table as `cache-teacher` meets it: not a model, but what one said about rows of the project.

    Rows that the table lacks are not covered.
    """

    def __init__(self, project: Project, name: str) -> None:
        """Raises `ConfigError` and `DataError` for a table that does not fit the task and targets.<name>."""
        section, targets = project.teacher(name), project.targets(name)
        assert section.table is not None
        path, task = project.root / section.table, project.task()
        features = [each for each in targets.outputs if each != "logits"]
        try:
            table = open_table(path)
            self._said = TableTargets(
                table, num_classes=task.num_classes, temperatures=targets.temperatures, features=features
            )
            self._said.check(encodings_of(targets, self._said.outputs))
        except ConfigError as error:
            raise ConfigError(f"targets.{name}: {error}") from None
        self._path = path
        self.rows_not_covered = 0
        self.description = _description(name, path, self._said)

    @property
    def outputs(self) -> Sequence[OutputSpec]:
        """What the table holds."""
        return self._said.outputs

    @property
    def fingerprint(self) -> Mapping[str, object]:
        """Digest of the file."""
        return _identity(self._path, self._said)

    def capture(
        self,
        store: TargetStore,
        inputs: PreparedInputs,
        on_progress: Callable[[CacheProgress], None],
        share: Share,
    ) -> Captured:
        """Commit every missing shard of one share, as `caching.capture` does; then `rows_not_covered` is known."""
        missing = [(view, shard) for view, shard in store.missing() if share.has(shard)]
        started = time.perf_counter()
        if missing:
            self._check_views(store.num_views)
            rows = prepared_rows(self._said, inputs.sample_ids)
            total = len(rows)
            spoken = np.unique(rows[self._said.index[1] == 0])
            self.rows_not_covered = len(inputs) - len(spoken)

            def on_rows(done: int) -> None:
                rate = done / (time.perf_counter() - started)
                on_progress(CacheProgress(rows_done=done, rows_total=total, rows_per_s=rate))

            fill(store, self._said, rows, missing, on_rows)
        num_rows = sum(int(store.wanted(view, shard).sum()) for view, shard in missing)
        seconds = time.perf_counter() - started
        return Captured(num_rows=num_rows, num_shards=len(missing), teacher_seconds=0.0, seconds=seconds)

    def _check_views(self, num_views: int) -> None:
        """A student would learn nothing from the teacher in an epoch of a view that the table does not have."""
        lacking = sorted(set(range(num_views)) - set(np.unique(self._said.index[1]).tolist()))
        if lacking:
            raise ConfigError(
                f"{self._path} has no line about view {lacking[0]}, but views.count is {num_views - 1}; give it a "
                "column view with all of them, or set views.count: 0"
            )
