"""`kdpipe export-targets` and `import-targets`, and teachers of which there is only a table of what they said."""

from __future__ import annotations

import math
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kdpipe import durable
from kdpipe.caching import CacheProgress, Captured, Share
from kdpipe.data.prepared import MISSING_LABEL, PreparedInputs
from kdpipe.distributed import Shard
from kdpipe.encodings import Features, FeaturesInt8, TargetEncoding, TopK, encoding_from_json
from kdpipe.errors import ConfigError, DataError, UsageError
from kdpipe.fingerprint import canonical_json, digest_file
from kdpipe.store import TargetStore
from kdpipe.store.layout import choose_shard_rows
from kdpipe.store.manifest import COVERED, Manifest
from kdpipe.store.tables import (
    FORMATS,
    TableTargets,
    export_table,
    fill,
    open_table,
    own_rows,
    prepared_rows,
    stored_encodings,
)
from kdpipe.targets import OutputSpec
from kdpipe.tasks.base import Task, TokenTask, token_labels
from kdpipe_stages.building import encodings_of
from kdpipe_stages.params import PARAMETERS
from kdpipe_stages.project import Project

ALL_VIEWS = "all"
ENCODINGS_OF_TABLES = ("dense", "int8", "topk")


def export_targets(
    store: Path | str, table_format: str, out: Path | None, view: str, outputs: Sequence[str], replace: bool
) -> tuple[Path, int]:
    """Write a store as a table; returns the file's path and its number of rows. Raises `UsageError`, `DataError`."""
    if table_format not in FORMATS:
        raise UsageError(f"--format is {table_format!r}; the choices are {', '.join(FORMATS)}")
    ending = FORMATS[table_format]
    path = Path(Path(os.path.abspath(str(store))).name + ending) if out is None else out
    if path.suffix != ending:
        raise UsageError(f"--out is {path}; expected a name that ends in {ending}, as --format is {table_format}")
    if view != ALL_VIEWS and not view.isdecimal():
        raise UsageError(f"--view is {view!r}; expected a number from 0 up, or {ALL_VIEWS}")
    if path.is_dir():
        raise DataError(f"--out is {path}, which is a folder; name a file")
    if not path.absolute().parent.is_dir():
        raise DataError(
            f"No such file or directory: {path.parent}, the folder of --out {path}; make it, or name another"
        )
    _check_is_in_no_store(path)
    views = None if view == ALL_VIEWS else [int(view)]
    opened = TargetStore.open(store)
    return path, export_table(opened, path, views=views, outputs=outputs or None, replace=replace)


def _check_is_in_no_store(path: Path) -> None:
    """Refuse to write into a store's folder, which the next one that is published there replaces."""
    for folder in path.resolve().parents:
        if (folder / "manifest.json").is_file() and (folder / "extent.json").is_file():
            raise DataError(f"{path} lies in the target store {folder}; name a place outside of it")


@dataclass(frozen=True, kw_only=True)
class Imported:
    """A store of a table alone, the table's columns that are not in it, and how much of it has no targets.

    `num_not_covered` and `num_places` count rows of all views, or their tokens.
    """

    store: TargetStore
    columns_not_read: Sequence[str]
    num_places: int
    num_not_covered: int

    @property
    def places(self) -> str:
        """What is counted."""
        return "rows" if len(self.store.outputs["logits"].shape) == 1 else "tokens"


def import_targets(
    table: Path,
    folder: Path,
    *,
    num_classes: int | None = None,
    encoding: str | None = None,
    parameters: Mapping[str, object],
    temperatures: Sequence[float] = (),
) -> Imported:
    """Make a store of a table alone, rows in the table's order; nothing stands at `folder` before it is complete.

    `parameters` are the encoding's. Without `encoding` it is the one that an exported table was stored in, else dense
    or topk, as the columns are; an exported table's features come along. Content digests are zero: nothing is known of
    the rows' content. Raises `UsageError`, `ConfigError`, `DataError`.
    """
    if folder.exists():
        raise DataError(f"{folder} exists already; remove it, or name another folder")
    _check_is_in_no_store(folder)
    opened = open_table(table)
    stored = stored_encodings(opened)
    features = {name: each for name, each in stored.items() if isinstance(each, Features | FeaturesInt8)}
    said = TableTargets(opened, num_classes=num_classes, temperatures=temperatures or None, features=list(features))
    chosen = {"logits": _chosen_encoding(said, stored.get("logits"), encoding, parameters, temperatures), **features}
    said.check(chosen)
    own = own_rows(said)
    manifest = _manifest_of(table, said, chosen, len(own.sample_ids))
    work = durable.own_temporary(folder)
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
    made = TargetStore.open(folder)
    num_places, num_covered = _count_covered(made, own.in_views)
    return Imported(
        store=made,
        columns_not_read=said.columns_not_read,
        num_places=num_places,
        num_not_covered=num_places - num_covered,
    )


def _chosen_encoding(
    said: TableTargets,
    stored: TargetEncoding | None,
    name: str | None,
    parameters: Mapping[str, object],
    temperatures: Sequence[float],
) -> TargetEncoding:
    given = {key: value for key, value in parameters.items() if value is not None}
    if name is None and not given and not temperatures and stored is not None:
        return stored
    name = name or ("topk" if said.is_sparse else "dense")
    if name not in ENCODINGS_OF_TABLES:
        raise UsageError(f"--encoding is {name!r}; the choices for a table are {', '.join(ENCODINGS_OF_TABLES)}")
    for key in given:
        if key not in PARAMETERS[name]:
            raise UsageError(f"--{key.replace('_', '-')}: encoding {name!r} has no such parameter")
    if name != "topk" and temperatures:
        raise UsageError(f"--temperature: encoding {name!r} serves every temperature; leave it out")
    if name == "topk":
        given["temperatures"] = _temperatures_of_tails(said, temperatures) if said.is_sparse else tuple(temperatures)
        if "k" not in given and not said.is_sparse:
            raise ConfigError("--k: encoding 'topk' needs it, as the table names every class")
        given["k"] = given.get("k") or said.widest()
    return encoding_from_json({"name": name, **given})


def _temperatures_of_tails(said: TableTargets, asked: Sequence[float]) -> Sequence[float]:
    """Those that a table of some classes serves. Raises `ConfigError` where others are asked for."""
    served = said.temperatures or (1.0,)
    if asked and tuple(asked) != served:
        why = "" if said.temperatures else ", as it has no tail_log_mass"
        raise ConfigError(
            f"--temperature is {', '.join(f'{each:g}' for each in asked)}, but {said.table.path} has its tails at "
            f"{', '.join(f'{each:g}' for each in served)}{why}; leave the option out, or make a table with a "
            "tail_log_mass at each"
        )
    return served


def _count_covered(store: TargetStore, in_views: NDArray[np.bool_]) -> tuple[int, int]:
    """How many rows (tokens) of all views there are, and how many of them the teacher spoke about."""
    shape = store.outputs["logits"].shape[:-1]
    rows_of = {view: np.flatnonzero(in_views) for view in range(1, store.num_views)} | {0: np.arange(store.num_rows)}
    num_places = sum(map(len, rows_of.values())) * math.prod(shape)
    if not store.manifest.coverage:
        return num_places, num_places
    num_covered = 0
    for view, rows in rows_of.items():
        for start in range(0, len(rows), store.manifest.shard_rows):
            some = rows[start : start + store.manifest.shard_rows]
            num_covered += int(store.read_arrays(some, view, [COVERED])[COVERED].sum())
    return num_places, num_covered


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


def _num_tokens(task: Task, inputs: PreparedInputs | None) -> int | None:
    """How many tokens a prepared row has."""
    if inputs is None or not isinstance(task, TokenTask):
        return None
    (labels,) = task.token_labels(inputs.read(np.zeros(1, np.int64)))
    return len(labels)


def _check_lists(said: TableTargets, task: Task) -> None:
    """Raise `ConfigError` where a table speaks per token and the task does not, or the other way round."""
    kinds = {True: "tokens, in lists of lists", False: "rows, in one list each"}
    found, expected = len(said.outputs[0].shape) > 1, isinstance(task, TokenTask)
    if found != expected:
        raise ConfigError(f"{said.table.path} is about {kinds[found]}; the task needs targets of {kinds[expected]}")


def _check_classes(said: TableTargets, task: Task) -> None:
    """Raise `ConfigError` where a class of the task has another number in the table; one may have been renamed."""
    then, today = said.table.about.get("class_names") or (), list(task.class_names or ())
    for number, name in enumerate(then):
        if name in today and today.index(name) != number:
            raise ConfigError(
                f"{said.table.path} was exported with the class {name!r} as number {number}, and task.class_names has "
                f"it as number {today.index(name)}; put them into the table's order, {list(then)}, or export it again"
            )


class TableTeacher:
    """teachers.<name>.table as `cache-teacher` meets it: not a model, but what one said about rows of the project.

    Rows and tokens that the table lacks are not covered.
    """

    def __init__(self, project: Project, name: str, inputs: PreparedInputs | None = None) -> None:
        """`inputs` tell how many tokens a row has, where a task's rows have some.

        Raises `ConfigError` and `DataError` for a table that does not fit the task, the rows and targets.<name>.
        """
        section, targets = project.teacher(name), project.targets(name)
        assert section.table is not None
        path, task = project.root / section.table, project.task()
        try:
            self._said = TableTargets(
                open_table(path),
                num_classes=task.num_classes,
                temperatures=targets.temperatures,
                features=[each for each in targets.outputs if each != "logits"],
                num_tokens=_num_tokens(task, inputs),
            )
            _check_lists(self._said, task)
            _check_classes(self._said, task)
            self._said.check(encodings_of(targets, self._said.outputs))
        except ConfigError as error:
            raise ConfigError(f"targets.{name}: {error}") from None
        self._path, self._task, self._views = path, task, project.views_ingredient()
        self.rows_not_covered = self.rows_read = 0
        self.description = _description(name, path, self._said)

    @property
    def outputs(self) -> Sequence[OutputSpec]:
        """What the table holds."""
        return self._said.outputs

    @property
    def columns_not_read(self) -> Sequence[str]:
        """The table's further columns."""
        return self._said.columns_not_read

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
        """Commit every missing shard of one share, as `caching.capture` does.

        Then `rows_not_covered`, of all rows, and `rows_read`, of those committed now, are known.
        """
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

            fill(store, self._said, rows, missing, on_rows, counted=self._counted(inputs))
            self.rows_read = self._count_read(store, rows, missing)
        num_rows = sum(int(store.wanted(view, shard).sum()) for view, shard in missing)
        seconds = time.perf_counter() - started
        return Captured(num_rows=num_rows, num_shards=len(missing), teacher_seconds=0.0, seconds=seconds)

    def _count_read(self, store: TargetStore, rows: NDArray[np.int64], filled: Sequence[tuple[int, Shard]]) -> int:
        """How many rows of the shards that were filled the table has; `rows` `[M]` are those of its lines."""
        num_read, views = 0, self._said.index[1]
        for view in {view for view, _ in filled}:
            has = np.zeros(store.num_rows, np.bool_)
            has[rows[views == view]] = True
            shards = [shard for of, shard in filled if of == view]
            num_read += sum(int((has[each.start : each.stop] & store.wanted(view, each)).sum()) for each in shards)
        return num_read

    def _counted(self, inputs: PreparedInputs) -> Callable[[NDArray[np.int64]], NDArray[np.bool_]] | None:
        """Which tokens of rows count, where the task has some."""
        labels = token_labels(self._task)
        return None if labels is None else lambda rows: labels(inputs.read(rows)) != MISSING_LABEL

    def _check_views(self, num_views: int) -> None:
        """A student would learn nothing from the teacher in an epoch of a view that the table does not have."""
        lacking = sorted(set(range(num_views)) - set(np.unique(self._said.index[1]).tolist()))
        if lacking:
            raise ConfigError(
                f"{self._path} has no line about view {lacking[0]}, but views.count is {num_views - 1}; give it a "
                "column view with all of them, or set views.count: 0"
            )
        then = self._said.table.about.get("views")
        if num_views > 1 and then is not None and canonical_json(then) != canonical_json(self._views):
            raise ConfigError(
                f"{self._path} is about other views: it was exported from a store of views {canonical_json(then)}, "
                f"and params.yaml has {canonical_json(self._views)}; export it again, or restore views"
            )
