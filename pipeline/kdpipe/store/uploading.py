"""A store that is captured into an object store: each shard goes there when it is committed, and is not kept here.

Below the url, until the store is complete:

.work/<fingerprint>/manifest.json                 of whoever began
.work/<fingerprint>/shards/<SHA-256>              files of shards, by their content: nobody replaces another's
.work/<fingerprint>/commits/<view>-<shard>.json   a shard's record, put there after its files

Then the store lies there as in a folder, and its work folder is gone. extent.json, without which nobody opens a store,
is withdrawn before anything of an earlier one is touched, and comes back last.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

from kdpipe.errors import CorruptStoreError, StoreError
from kdpipe.fingerprint import digest_file
from kdpipe.store.classifier import CLASSIFIER
from kdpipe.store.kept import VIEWS
from kdpipe.store.manifest import Manifest
from kdpipe.store.objects import Objects
from kdpipe.store.records import CommitLog, CommitRecord, Key
from kdpipe.store.remote import LOG, LOG_DIGEST, VERSIONS

_EXTENT = "extent.json"
_MANIFEST = "manifest.json"


class Uploading:
    """The work folder of one fingerprint at a url, and the store that is published at the url itself.

    `folder` on this machine holds the description of the store, and a shard until it is uploaded. Several machines may
    work at one url, each at shards of its own; there is no lock between them.
    """

    def __init__(self, url: str, manifest: Manifest, folder: Path) -> None:
        self._objects, self._folder = Objects(url), folder
        self.url = self._objects.url
        self._fingerprint, self._layouts = manifest.fingerprint, manifest.layouts()
        self._work = f".work/{self._fingerprint}"
        self._places: dict[str, tuple[str, int]] = {}

    def manifest(self) -> bytes | None:
        """manifest.json of whoever began, or else of the published store, if that is one of this fingerprint."""
        found = self._objects.read_all([f"{self._work}/{_MANIFEST}", _MANIFEST])
        begun, published = found.get(f"{self._work}/{_MANIFEST}"), found.get(_MANIFEST)
        return begun or (published if _fingerprint_of(published) == self._fingerprint else None)

    def begin(self) -> None:
        """Put the manifest of `folder` there, before the first shard."""
        self._objects.write(f"{self._work}/{_MANIFEST}", (self._folder / _MANIFEST).read_bytes())

    def find(self) -> list[CommitRecord]:
        """Records of the shards that are there, for whatever rows; those at work go before those published.

        Raises `CorruptStoreError`.
        """
        # What is at work is looked at first: when the work folder goes, its store has been published.
        sizes = self._objects.sizes(self._work)
        at_work = [self._record(name, content) for name, content in self._singles(sizes).items()]
        published = self._records_published()
        sizes |= self._published_sizes()
        self._places = {}
        found: dict[Key, CommitRecord] = {}
        for record, is_at_work in [*((each, True) for each in at_work), *((each, False) for each in published)]:
            files = self._files_of(record)
            places = {name: (self._at_work(sha256) if is_at_work else name, size) for name, size, sha256 in files}
            if record.key not in found and all(sizes.get(place) == size for place, size in places.values()):
                self._places |= places
                found[record.key] = record
        return [found[key] for key in sorted(found)]

    def remove_damaged(self, described: Path | None = None) -> None:
        """Read every byte there, and remove what is not as it was written, so that those shards are missing.

        Where manifest or log of the published store are damaged, those of the folder `described` take their place.
        """
        for name, content in self._singles(self._objects.sizes(self._work)).items():
            try:
                self._record(name, content)
            except CorruptStoreError:
                self._objects.withdraw(name)
        if self._is_description_damaged():
            if described is None:  # nothing vouches for its shards
                for name in (LOG_DIGEST, LOG, _MANIFEST):
                    self._objects.withdraw(name)
            else:
                for name in (LOG_DIGEST, LOG, _MANIFEST):
                    self._objects.upload(described / name, name)
        for record in self.find():
            for name, _, sha256 in self._files_of(record):
                if self._digest(name) != sha256:
                    self._objects.withdraw(self._places[name][0])

    def size(self, name: str) -> int | None:
        """Bytes of a shard's file that is there; None where there is none."""
        return self._places[name][1] if name in self._places else None

    def fetch(self, name: str, sha256: str | None = None) -> None:
        """Have a shard's file in `folder`, where it is there; it is not verified."""
        if name in self._places and not (self._folder / name).is_file():
            self._objects.download(self._places[name][0], self._folder / name)

    def commit(self, record: CommitRecord) -> None:
        """Upload a shard of `folder`, then its record; then its files are here no more."""
        self.upload(record, self._folder)
        for name, _, _ in self._files_of(record):
            (self._folder / name).unlink()

    def upload(self, record: CommitRecord, folder: Path) -> None:
        """Upload a shard that was committed in a folder, then its record."""
        for name, size, sha256 in self._files_of(record):
            self._objects.upload(folder / name, self._at_work(sha256))
            self._places[name] = self._at_work(sha256), size
        self._objects.write(f"{self._work}/commits/{record.file_name}", record.to_text().encode())

    def is_published(self, records: Mapping[Key, CommitRecord]) -> bool:
        """Whether the store at the url is the one that `folder` describes, and none of its shards lies at work."""
        if any(self._places[name][0] != name for each in records.values() for name, _, _ in self._files_of(each)):
            return False
        found = self._objects.read_all(VERSIONS)
        return all(found.get(name) == (self._folder / name).read_bytes() for name in VERSIONS)

    def publish(self, records: Mapping[Key, CommitRecord], description: Collection[str]) -> None:
        """Make the url hold the complete store of these records, with the `description` files of `folder`.

        Processes that do so at once write the same bytes. Raises `StoreError` where shards went away meanwhile.
        """
        files = {name: size for record in records.values() for name, size, _ in self._files_of(record)}
        self._objects.withdraw(_EXTENT)
        if _fingerprint_of(self._objects.read_all([_MANIFEST]).get(_MANIFEST)) != self._fingerprint:
            for name in (LOG_DIGEST, LOG):  # which no longer vouch for the shards that are replaced now
                self._objects.withdraw(name)
        self._objects.copy({name: self._places[name][0] for name in files if self._places[name][0] != name})
        there = self._published_sizes()
        lacking = [name for name, size in files.items() if there.get(name) != size]
        if lacking:
            raise StoreError(
                f"{self.url} was not published: {len(lacking)} of {len(files)} files of shards, such as {lacking[0]}, "
                "went away meanwhile. Run `kdpipe cache-teacher NAME` again: it computes only those."
            )
        # Whatever earlier stores left, known to a log or not: a url holds one store.
        expected = {*files, *description}
        self._objects.remove(
            [name for name in self._objects.sizes("") if _is_of_a_store(name) and name not in expected]
        )
        for name in description:
            if name not in (LOG, LOG_DIGEST, _EXTENT):
                self._put(name)
        # Both digests are legal while the log is replaced, so that a kill in between loses no record.
        earlier = self._objects.read_all([LOG_DIGEST]).get(LOG_DIGEST, b"")
        self._objects.write(LOG_DIGEST, (self._folder / LOG_DIGEST).read_bytes() + earlier)
        for name in (LOG, LOG_DIGEST, _EXTENT):
            self._put(name)

    def discard(self) -> None:
        """Remove the work folder of a published store."""
        self._objects.remove(sorted(self._objects.sizes(self._work)))

    def _files_of(self, record: CommitRecord) -> list[tuple[str, int, str]]:
        """Name, bytes and SHA-256 of each file of a shard."""
        return [
            (self._layouts[name].shard_path(*record.key), file.num_bytes, file.sha256)
            for name, file in record.files.items()
        ]

    def _at_work(self, sha256: str) -> str:
        return f"{self._work}/shards/{sha256}"

    def _put(self, name: str) -> None:
        self._objects.upload(self._folder / name, name)

    def _singles(self, names: Iterable[str]) -> dict[str, bytes]:
        """Name -> content of the records at work, of all names there."""
        return self._objects.read_all([name for name in names if name.startswith(f"{self._work}/commits/")])

    def _record(self, name: str, content: bytes) -> CommitRecord:
        return CommitRecord.from_text(content, f"{self.url}/{name}")

    def _records_published(self) -> list[CommitRecord]:
        """What the log of the published store says, if that is of this fingerprint."""
        names = (_MANIFEST, LOG, LOG_DIGEST)
        found = self._objects.read_all(names)
        is_ours = _fingerprint_of(found.get(_MANIFEST)) == self._fingerprint
        lost = [name for name in names if name not in found]
        if lost and found and (is_ours or _MANIFEST in lost) and not self._objects.sizes(".work"):
            raise CorruptStoreError(
                f"{self.url}/{lost[0]} is absent, though {next(iter(found))} is there, so that nothing vouches for its "
                "shards. Run `kdpipe cache-teacher NAME --repair` where data/targets/NAME describes the store"
            )
        if lost or not is_ours:
            return []
        with tempfile.TemporaryDirectory() as folder:
            for name, content in found.items():
                (Path(folder) / name).write_bytes(content)
            try:
                Manifest.load(Path(folder))
                return list(CommitLog(Path(folder)).values())
            except StoreError as error:
                raise CorruptStoreError(str(error).replace(folder, self.url)) from None

    def _is_description_damaged(self) -> bool:
        manifest = self._objects.read_all([_MANIFEST]).get(_MANIFEST)
        if manifest is not None and _fingerprint_of(manifest) is None:
            return True
        try:
            self._records_published()
        except CorruptStoreError:
            return True
        return False

    def _published_sizes(self) -> dict[str, int]:
        return {name: size for array in self._layouts for name, size in self._objects.sizes(array).items()}

    def _digest(self, name: str) -> str:
        """SHA-256 of a shard's file that is there; it does not stay here."""
        path = self._folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        self.fetch(name)
        try:
            return digest_file(path)
        finally:
            path.unlink()


def _is_of_a_store(name: str) -> bool:
    """Whether a name is that of a shard's file, or of an optional part of a store's description."""
    return re.fullmatch(r"[^/]+/(c\.[0-9.]+|zarr\.json)", name) is not None or name in (VIEWS, CLASSIFIER)


def _fingerprint_of(manifest: bytes | None) -> str | None:
    """What a manifest.json says that it is of; None where there is none, or no JSON."""
    try:
        return str(json.loads(manifest or b"")["fingerprint"])
    except (ValueError, KeyError, TypeError):
        return None
