"""Where a store is worked at: the work folder of its fingerprint, and the folder that it is published to."""

from __future__ import annotations

import shutil
from collections.abc import Collection
from contextlib import AbstractContextManager
from dataclasses import replace

import numpy as np

from kdpipe import durable
from kdpipe.data.prepared import PreparedInputs
from kdpipe.errors import CorruptStoreError, LockedError, StoreError, StoreNotFoundError
from kdpipe.store import TargetStore
from kdpipe.store.manifest import Manifest
from kdpipe.store.records import CommitLog, Key, remove_damaged_records
from kdpipe.store.verification import description_problems
from kdpipe_stages.project import Project


class Workplace:
    """The work folder of one fingerprint, and the published one of its teacher; all but `door` is called behind it."""

    def __init__(self, project: Project, name: str, manifest: Manifest) -> None:
        self._project, self._manifest, self._doing = project, manifest, f"caching teacher {name}"
        self._work, self._published = project.work(manifest.fingerprint), project.store(name)
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
        if len(self.workers.held()) > 1:
            return self._join(inputs)
        if repair:
            self._mend_description()
        manifest = self._manifest
        if not (self._work / "manifest.json").is_file():
            self._adopt(repair)
        if (self._work / "manifest.json").is_file():
            # A store that grows keeps the shard size that it was started with.
            manifest = replace(manifest, shard_rows=Manifest.load(self._work).shard_rows)
        num_views = self._project.views().num_views
        store = TargetStore.create(self._work, manifest, inputs.sample_ids, inputs.digests, num_views)
        if repair:
            store.repair()
            self._verified = set(store.records)
        return self.open(inputs)

    def open(self, inputs: PreparedInputs) -> TargetStore:
        """The store as it stands, told which rows augmented views are about."""
        store = TargetStore.open(self._work)
        section = self._project.params.views
        if section.count:
            wanted = np.full(len(inputs), section.splits is None)
            if section.splits is not None:
                wanted[self._project.prepared_data().rows_of(section.splits)] = True
            store.want_in_views(wanted)
        return store

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
                    f"{self._work} is damaged, so it was not published: {problems[0]} ({len(problems)} problems). "
                    f"{self._repair} to compute damaged shards again."
                )
            self._project.publish({"": self._work}, self._published)
        return True

    def _join(self, inputs: PreparedInputs) -> TargetStore:
        store = self.open(inputs)
        num_views = self._project.views().num_views
        same_ids = np.array_equal(store.sample_ids, inputs.sample_ids)
        if not same_ids or not np.array_equal(store.digests, inputs.digests) or store.num_views != num_views:
            raise LockedError(
                f"other processes are {self._doing} for {store.num_rows:,} rows as they were prepared before, in "
                f"{store.num_views} views; now there are {len(inputs):,} rows and {num_views} views. "
                "Wait for them to end, or stop them, and run again."
            )
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
                self._project.publish({"": self._published}, self._work)

    def _is_published(self, store: TargetStore) -> bool:
        """Raises `CorruptStoreError` where it is, with a damaged description."""
        try:
            if Manifest.load(self._published).to_text() != store.manifest.to_text():
                return False
        except StoreError:
            return False
        published = TargetStore.open(self._published)
        if published.state_digest() != store.state_digest() or published.missing():
            return False
        problems = description_problems(published)
        if problems:
            raise CorruptStoreError(
                f"{self._published} is damaged: {problems[0]}. {self._repair}: it reads every byte, computes damaged "
                "shards again, and publishes the store anew."
            )
        return True
