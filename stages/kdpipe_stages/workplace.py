"""Where a store is worked at: the work folder of its fingerprint, or a url; and the folder that it is published to."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from kdpipe import durable
from kdpipe.caching import Share, read_intact
from kdpipe.data.prepared import PreparedInputs
from kdpipe.distributed import Shard
from kdpipe.errors import CorruptStoreError, LockedError, StaleStoreError, StoreError, StoreNotFoundError, some
from kdpipe.fingerprint import digest, digest_file
from kdpipe.store import TargetStore
from kdpipe.store.manifest import Manifest
from kdpipe.store.objects import Objects
from kdpipe.store.records import CommitLog, CommitRecord, Key, remove_damaged_records
from kdpipe.store.remote import LOG, LOG_DIGEST, describe, url_of
from kdpipe.store.uploading import Uploading
from kdpipe.store.verification import description_problems
from kdpipe.views import ViewSpec
from kdpipe_stages.project import Project
from kdpipe_stages.replay import check_kept_views, has_splits_of, keep_views

_FILES_OF_A_STORE = ("manifest.json", "extent.json", "rows.parquet", LOG, "zarr.json")


class Workplace:
    """The work folder of one fingerprint, and the published one of its teacher; all but `door` is called behind it."""

    def __init__(self, project: Project, name: str, manifest: Manifest) -> None:
        self._project, self._manifest, self._doing = project, manifest, f"caching teacher {name}"
        self._work, self._published, self._name = project.work(manifest.fingerprint), project.store(name), name
        self._repair = f"Run `kdpipe cache-teacher {name} --repair`"
        locks = project.work("locks")
        self.workers = durable.Workers(locks / manifest.fingerprint, self._doing)
        self._publishing = locks / f"targets-{name}"
        self._verified: set[Key] = set()

    def door(self) -> AbstractContextManager[None]:
        """See `Workers.door`."""
        return self.workers.door()

    def begin(self, inputs: PreparedInputs, repair: bool) -> TargetStore:
        """The store to work at, as others left it; who joins others at work changes nothing of it.

        `repair` reads every byte, and forgets the shards that differ from what was committed. Raises `LockedError` when
        others work on other rows, `CorruptStoreError` for what only a repair may touch.
        """
        _check_is_ours(self._published)
        if len(self.workers.held()) > 1:
            return self._join(inputs)
        if repair:
            self._mend_description()
        manifest = self._manifest
        if not (self._work / "manifest.json").is_file() or not CommitLog(self._work):
            self._adopt(repair)
        if (self._work / "manifest.json").is_file():
            # A store that grows keeps the shard size that it was started with.
            manifest = replace(manifest, shard_rows=Manifest.load(self._work).shard_rows)
        views = self._project.views_of(inputs)
        store = _created(self._work, manifest, inputs, views)
        if repair:
            store.repair()
            self._verified = set(store.records)
        store = self.open(inputs)
        keep_views(store, inputs, partial(read_intact, inputs), views, self._name, repair=repair)
        return store

    def open(self, inputs: PreparedInputs) -> TargetStore:
        """The store as it stands, told which rows augmented views are about."""
        return _told_of_views(TargetStore.open(self._work), self._project, len(inputs))

    def finish(self, store: TargetStore, written: Collection[Key], repair: bool) -> bool:
        """Finish a complete store, and publish it unless it is what was published already; returns whether it did.

        Shards that were not `written` just now are read before they are published. Raises `CorruptStoreError` when
        one of them is damaged, or the published store's description is.
        """
        store.finish()
        with durable.only_writer(self._publishing, self._doing, wait=True):
            if not repair and self._is_published(store):
                return False
            problems = store.verify(trusted={*self._verified, *written})
            if problems:
                raise CorruptStoreError(
                    f"{self._work} is damaged, so it was not published: {problems[0]} (problem 1 of {len(problems)}). "
                    f"{self._repair} to compute damaged shards again."
                )
            _keep_earlier(self._project, self._published, self._manifest)
            self._project.publish({"": self._work}, self._published)
        return True

    def _join(self, inputs: PreparedInputs) -> TargetStore:
        store, views = self.open(inputs), self._project.views_of(inputs)
        num_views = views.num_views
        same_ids = np.array_equal(store.sample_ids, inputs.sample_ids) and has_splits_of(store, views)
        if not same_ids or not np.array_equal(store.digests, inputs.digests) or store.num_views != num_views:
            raise LockedError(
                f"other processes are {self._doing} for {store.num_rows:,} rows as they were prepared before, in "
                f"{store.num_views} views; now there are {len(inputs):,} rows and {num_views} views. "
                "Wait for them to end, or stop them, and run again."
            )
        check_kept_views(store, inputs, views, self._name)
        return store

    def _mend_description(self) -> None:
        """Make the work folder's own description readable; rows and arrays are described anew by `create` anyway."""
        remove_damaged_records(self._work)
        try:
            records = CommitLog(self._work)
        except CorruptStoreError:
            shutil.rmtree(self._work)  # nothing vouches for its shards; the published store's log may
            return
        try:
            Manifest.load(self._work)
        except StoreNotFoundError:
            return
        except StoreError:
            # The folder's name is the fingerprint, so all but the shard size is as today.
            longest = max((record.stop - record.start for record in records.values()), default=0)
            shard_rows = self._manifest.ingredients["shard_rows"] or longest or self._manifest.shard_rows
            text = replace(self._manifest, shard_rows=shard_rows).to_text()
            durable.write_text(self._work / "manifest.json", text)

    def _adopt(self, repair: bool) -> None:
        """Go on from a published store (pulled by DVC, say), which the work area does not know."""
        with durable.only_writer(self._publishing, self._doing, wait=True):
            try:
                fingerprint = Manifest.load(self._published).fingerprint
                CommitLog(self._published)
            except CorruptStoreError:
                if not repair:
                    raise
                return
            except StoreError:
                return  # nothing there, or of another format
            if fingerprint == self._manifest.fingerprint:
                shutil.rmtree(self._work, ignore_errors=True)
                self._project.publish({"": self._whole_published()}, self._work)

    def _whole_published(self) -> Path:
        """The folder of the published store, or the mirror of one whose shards are at a url: with every file of it."""
        if url_of(self._published) is None:
            return self._published
        try:
            store = TargetStore.open(self._published)
            store.fetch_all()
        except StaleStoreError as error:
            raise StaleStoreError(f"{error} Or remove {self._published}, to compute it on this disk.") from None
        return store.path

    def _is_published(self, store: TargetStore) -> bool:
        """Raises `CorruptStoreError` where it is, with a damaged description."""
        try:
            is_of_today = Manifest.load(self._published).to_text() == store.manifest.to_text()
            if not is_of_today or url_of(self._published) is not None:
                return False
        except StoreError:
            return False
        published = TargetStore.open(self._published)
        if published.extent != store.extent or published.state_digest() != store.state_digest() or published.missing():
            return False
        problems = description_problems(published)
        if problems:
            raise CorruptStoreError(
                f"{self._published} is damaged: {problems[0]}. {self._repair}: it reads every byte, computes damaged "
                "shards again, and publishes the store anew."
            )
        return True


class RemoteWorkplace:
    """The same at a url: no shard stays on this disk, and workers on any machines share what lies there.

    A worker has a folder of its own in data/.work for what it has not uploaded yet.
    """

    def __init__(self, project: Project, name: str, manifest: Manifest, share: Share, url: str) -> None:
        self._project, self._manifest, self._share = project, manifest, share
        self._name, self._doing = name, f"caching teacher {name}"
        self._published, self._work = project.store(name), project.work(manifest.fingerprint)
        key = digest(["uploading", manifest.fingerprint, url, share.index, share.count])
        self._folder = project.work(key)
        locks = project.work("locks")
        self.workers = durable.Workers(locks / key, self._doing)
        self._publishing = locks / f"targets-{name}"
        self._uploading = Uploading(url, manifest, self._folder)

    def door(self) -> AbstractContextManager[None]:
        """See `Workers.door`."""
        return self.workers.door()

    def begin(self, inputs: PreparedInputs, repair: bool) -> TargetStore:
        """The store to work at, with whatever is committed at the url; what is committed here only goes there now.

        `repair` reads every byte there, and removes what differs from what was committed.
        """
        _check_is_ours(self._published)
        if repair:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._uploading.remove_damaged(self._published if self._is_described_here() else None)
        here = {} if repair else self._committed_here()
        store = self._as_it_stands(inputs, here)
        for view, shard in store.missing():
            if self._share.has(shard):
                self._send(store, view, shard, here)
        for leftover in self._folder.glob("*/c.*"):
            leftover.unlink()
        self._keep_views(store, inputs, repair)
        return store

    def open(self, inputs: PreparedInputs) -> TargetStore:
        """The store as it stands at the url by now."""
        return self._as_it_stands(inputs, {})

    def finish(self, store: TargetStore, _: Collection[Key], repair: bool) -> bool:
        """Publish a complete store at the url and its description here, unless both are; returns whether it did."""
        store.finish()
        with durable.only_writer(self._publishing, self._doing, wait=True):
            is_new = repair or not self._uploading.is_published(store.records)
            if is_new:
                self._uploading.publish(store.records, store.description_names())
            self._uploading.discard()
            is_described = _contents(self._folder) == _contents(self._published)
            if not is_described:
                _keep_earlier(self._project, self._published, self._manifest)
                self._project.publish({"": self._folder}, self._published)
        shutil.rmtree(self._folder)
        return is_new or not is_described

    def _is_described_here(self) -> bool:
        """Whether the folder that is published here describes, undamaged, a store of this fingerprint at the url."""
        try:
            CommitLog(self._published)
            fingerprint, url = Manifest.load(self._published).fingerprint, url_of(self._published)
        except StoreError:
            return False
        return fingerprint == self._manifest.fingerprint and url == self._uploading.url

    def _keep_views(self, store: TargetStore, inputs: PreparedInputs, repair: bool) -> None:
        """Those of the published store, too, must look the same: this worker's folder does not outlast a capture."""
        views = self._project.views_of(inputs)
        if views.count and store.extent.views_sha256 is None and not repair:
            try:
                published = TargetStore.open(self._uploading.url)
            except StoreNotFoundError:
                published = None
            if published is not None and published.fingerprint == store.fingerprint:
                store.keep_views(published.kept_views())
        keep_views(store, inputs, partial(read_intact, inputs), views, self._name, repair=repair)

    def _as_it_stands(self, inputs: PreparedInputs, here: Mapping[Path, Mapping[Key, CommitRecord]]) -> TargetStore:
        """A store without shards, whose records are those at the url."""
        found = self._uploading.find()
        durable.make_folder(self._folder)
        for name in (LOG, LOG_DIGEST):
            (self._folder / name).unlink(missing_ok=True)
        shutil.rmtree(self._folder / "commits", ignore_errors=True)
        CommitLog(self._folder).hold(found)
        there = self._uploading.manifest()
        begun = there or next(((folder / "manifest.json").read_bytes() for folder in here), None)
        manifest = self._manifest
        if begun is not None:
            # Who goes on with a store keeps its shard size, and what it recorded.
            durable.write_bytes(self._folder / "manifest.json", begun)
            manifest = replace(manifest, shard_rows=Manifest.load(self._folder).shard_rows)
        _created(self._folder, manifest, inputs, self._project.views_of(inputs))
        describe(self._folder, self._uploading.url)
        if there is None:
            self._uploading.begin()
        return _told_of_views(TargetStore(self._folder, self._uploading), self._project, len(inputs))

    def _committed_here(self) -> dict[Path, Mapping[Key, CommitRecord]]:
        """What a stopped worker did not upload any more, and what was captured before there was a url, by folder."""
        found: dict[Path, Mapping[Key, CommitRecord]] = {}
        for folder in (self._folder, self._work, self._published):
            try:
                fingerprint = Manifest.load(folder).fingerprint
            except CorruptStoreError:
                raise
            except StoreError:
                continue  # nothing there, or of another format
            if fingerprint == self._manifest.fingerprint:
                found[folder] = CommitLog(folder)
        return found

    def _send(
        self, store: TargetStore, view: int, shard: Shard, here: Mapping[Path, Mapping[Key, CommitRecord]]
    ) -> None:
        """Upload a shard that is missing there, if one of these folders has it."""
        for folder, records in here.items():
            record = records.get((view, shard.index))
            if record is not None and store.takes(record, shard) and _has_files(folder, store, record):
                self._uploading.upload(record, folder)
                store.records.add(record)
                return


def _check_is_ours(published: Path) -> None:
    """Raise `StoreError` for a folder to publish to that holds other things than a store."""
    inside = sorted(each.name for each in published.iterdir()) if published.is_dir() else []
    if inside and not any(each in inside for each in _FILES_OF_A_STORE):
        raise StoreError(
            f"{published} holds {some(inside)}, and no target store; publishing one there would remove that. Move it "
            "elsewhere, and run again."
        )


def _keep_earlier(project: Project, published: Path, manifest: Manifest) -> None:
    """Take over what is to be replaced, a store of other settings, unless data/.work holds it (it was pulled, say)."""
    try:
        fingerprint = Manifest.load(published).fingerprint
    except StoreError:
        return  # nothing there, or nothing that could be gone back to
    earlier = project.work(fingerprint)
    is_here = fingerprint != manifest.fingerprint and url_of(published) is None
    if is_here and not (earlier / "manifest.json").is_file():
        shutil.rmtree(earlier, ignore_errors=True)
        project.publish({"": published}, earlier)


def check_url(project: Project, name: str) -> None:
    """Raise `ConfigError` or `StoreError` where a teacher's store goes to a url that cannot be read."""
    url = project.targets(name).url
    if url is not None:
        Objects(url).size("manifest.json")


def _has_files(folder: Path, store: TargetStore, record: CommitRecord) -> bool:
    """Whether a folder has the very bytes that were committed."""
    paths = {folder / store.layouts[name].shard_path(*record.key): file for name, file in record.files.items()}
    return all(path.is_file() and digest_file(path) == file.sha256 for path, file in paths.items())


def _contents(folder: Path) -> dict[str, str]:
    """Name and SHA-256 of every file."""
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): digest_file(path) for path in paths}


def _created(folder: Path, manifest: Manifest, inputs: PreparedInputs, views: ViewSpec) -> TargetStore:
    """See `TargetStore.create`."""
    splits = None if views.partners is None else views.partners.splits
    return TargetStore.create(folder, manifest, inputs.id_column(), inputs.digests, views.num_views, splits=splits)


def _told_of_views(store: TargetStore, project: Project, num_rows: int) -> TargetStore:
    """A store that knows which rows augmented views are about."""
    section = project.params.views
    if section.count:
        wanted = np.full(num_rows, section.splits is None)
        if section.splits is not None:
            rows = project.prepared_data().rows_of(section.splits)
            wanted[rows[rows < num_rows]] = True  # some may have been prepared since
        store.want_in_views(wanted)
    return store
