"""A store in an object store: files are fetched whole, on first touch, into a folder on this machine."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kdpipe import durable
from kdpipe.errors import CorruptStoreError, StaleStoreError, StoreNotFoundError
from kdpipe.fingerprint import canonical_json, digest, digest_file
from kdpipe.store.objects import Objects, shown

CACHE = "KDPIPE_CACHE"
"""Environment variable: where fetched files are kept (default ~/.cache/kdpipe)."""
LOG = "commits.parquet"
LOG_DIGEST = "commits.parquet.sha256"
VERSIONS = (LOG_DIGEST, "manifest.json", "extent.json")
"""What tells two stores at one url apart, in the order of reading: whoever publishes withdraws extent.json first."""
REMOTE = "remote.json"
"""In a folder that describes a store: at which url its shards are."""


class RemoteFolder:
    """A published store at `url`, mirrored file by file at `path`.

    The mirror is named after the url and the content of `VERSIONS`: a store published anew gets another mirror. Fetched
    files stay; what is read from them is verified as in any store. `named` is what opens the same store again: the url,
    or the folder that describes the store.
    """

    def __init__(self, url: str, folder: Path | None = None, cache: Path | None = None) -> None:
        """Raises `ConfigError` when the package for the url is absent, `StoreNotFoundError` when nothing is there.

        With the `folder` that describes the store, `StaleStoreError` when nothing or another store is there.
        """
        self._objects = Objects(url)
        self.url, self.named = self._objects.url, folder or self._objects.url
        try:
            versions = {name: self._read(name) for name in VERSIONS}
        except StoreNotFoundError as error:
            if folder is None:
                raise
            raise StaleStoreError(
                f"{folder} describes a store at {shown(url)}, but {error}. If it stays so, run `kdpipe cache-teacher "
                "NAME` to compute it anew."
            ) from None
        if folder is not None:
            _check_described(folder, self.url, versions)
        base = cache or Path(os.environ.get(CACHE) or Path.home() / ".cache" / "kdpipe")
        self.path = base / digest([self.url, *(each.hex() for each in versions.values())])
        self.path.mkdir(parents=True, exist_ok=True)
        for name, content in versions.items():
            if not (self.path / name).is_file():
                self._keep(name, content)
        self.fetch(LOG, versions[LOG_DIGEST].decode().partition("\n")[0])

    @contextmanager
    def anew(self) -> Iterator[RemoteFolder]:
        """The same in a mirror of its own, where nothing was fetched yet; it is removed afterwards."""
        with tempfile.TemporaryDirectory(suffix=durable.TEMPORARY_SUFFIX, dir=self.path.parent) as folder:
            yield RemoteFolder(self.url, self.named if isinstance(self.named, Path) else None, Path(folder))

    def size(self, name: str) -> int | None:
        """Bytes of a file; None where there is none. Like every method, raises `StoreError` where nobody answers."""
        return self._objects.size(name)

    def fetch(self, name: str, sha256: str | None = None) -> None:
        """Have a file at `path / name`, where the url has it; several processes may do so at once.

        Raises `CorruptStoreError` when its content is not the one that was committed.
        """
        target = self.path / name
        if target.is_file():
            return
        temporary = _temporary_beside(target)
        try:
            self._objects.download(name, temporary)
            if sha256 is not None and digest_file(temporary) != sha256:
                raise CorruptStoreError(
                    f"{shown(self.url)}/{name} differs from its checksum: it was damaged, or the store was published "
                    "anew since it was opened. Open it again."
                )
            temporary.replace(target)
        except FileNotFoundError:
            pass
        finally:
            temporary.unlink(missing_ok=True)

    def _keep(self, name: str, content: bytes) -> None:
        temporary = _temporary_beside(self.path / name)
        temporary.write_bytes(content)
        temporary.replace(self.path / name)

    def _read(self, name: str) -> bytes:
        try:
            return self._objects.read(name)
        except FileNotFoundError:
            raise StoreNotFoundError(
                f"there is no target store at {shown(self.url)}: it has no {name}, or its bucket does not exist, or "
                "the store is being published at this moment"
            ) from None


def url_of(folder: Path) -> str | None:
    """The url of the store that a folder describes; None where the folder holds its shards itself.

    Raises `CorruptStoreError`.
    """
    path = folder / REMOTE
    if not path.is_file():
        return None
    try:
        return str(json.loads(path.read_text(encoding="utf-8"))["url"])
    except (ValueError, KeyError, TypeError) as error:
        raise CorruptStoreError(f"{path} is damaged: {error}. Run `kdpipe cache-teacher NAME`.") from None


def describe(folder: Path, url: str) -> None:
    """Make a folder with all files of a store but its shards the description of the store at a url."""
    durable.write_text(folder / REMOTE, canonical_json({"url": url}) + "\n")


def _check_described(folder: Path, url: str, versions: dict[str, bytes]) -> None:
    for name, content in versions.items():
        if not (folder / name).is_file() or (folder / name).read_bytes() != content:
            raise StaleStoreError(
                f"{folder} describes another store than the one at {shown(url)}: {name} differs. It was published anew "
                "from another folder or commit: run `kdpipe cache-teacher NAME` here, or fetch that description."
            )


def _temporary_beside(target: Path) -> Path:
    target.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(suffix=durable.TEMPORARY_SUFFIX, dir=target.parent)
    os.close(descriptor)
    return Path(temporary)
