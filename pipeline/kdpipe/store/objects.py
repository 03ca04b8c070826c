"""What lies below a url (s3://, gs://, …, whatever fsspec has a package for); failures are one `StoreError`."""

from __future__ import annotations

import errno
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from kdpipe.errors import ConfigError, StoreError

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

_ACCESS = {
    "s3": "Credentials come from the environment (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE; "
    "FSSPEC_S3_ANON=1 for a public bucket), the server's address from AWS_ENDPOINT_URL where it is not Amazon's.",
    "gs": "Credentials come from the environment (GOOGLE_APPLICATION_CREDENTIALS).",
}
"""What to set, by the url's scheme."""
_LOCAL = (errno.ENOSPC, errno.EDQUOT)


class Objects:
    """Objects by name below a url; nothing that an object store lists is remembered.

    Every method raises `StoreError` when the object store refuses or does not answer.
    """

    def __init__(self, url: str) -> None:
        """Raises `ConfigError` when the package for the url is absent."""
        self.url = url.rstrip("/")
        self._files, self._root = _open(self.url)

    def read(self, name: str) -> bytes:
        """Content of an object. Raises `FileNotFoundError`."""
        with _answers(self.url):
            content: bytes = self._files.cat_file(self._path(name))
        return content

    def read_all(self, names: Collection[str]) -> dict[str, bytes]:
        """Contents by name, of those that are there."""
        if not names:
            return {}
        paths = {self._path(name): name for name in names}
        with _answers(self.url):
            found = self._files.cat(list(paths), on_error="return")
            for each in found.values():
                if isinstance(each, Exception) and not isinstance(each, FileNotFoundError):
                    raise each
        return {paths[path]: each for path, each in found.items() if isinstance(each, bytes)}

    def size(self, name: str) -> int | None:
        """Bytes of an object; None where there is none."""
        try:
            with _answers(self.url):
                found: int = self._files.size(self._path(name))
        except FileNotFoundError:
            return None
        return found

    def sizes(self, folder: str) -> dict[str, int]:
        """Name -> bytes of everything below a folder."""
        try:
            with _answers(self.url):
                found = self._files.find(self._path(folder), detail=True)
        except FileNotFoundError:
            return {}
        start = len(self._root) + 1
        return {path[start:]: int(each["size"]) for path, each in found.items()}

    def download(self, name: str, path: Path) -> None:
        """An object's content as a file. Raises `FileNotFoundError`."""
        with _answers(self.url):
            self._files.get_file(self._path(name), str(path))

    def upload(self, path: Path, name: str) -> None:
        """A file's content as an object; it is there whole, or not at all."""
        with _answers(self.url, "written", passed=()):
            self._files.put_file(str(path), self._path(name))

    def write(self, name: str, content: bytes) -> None:
        """An object of this content; it is there whole, or not at all."""
        with _answers(self.url, "written", passed=()):
            self._files.pipe_file(self._path(name), content)

    def copy(self, sources: Mapping[str, str]) -> None:
        """Copy objects inside the object store, new name -> name; one that is absent is left out."""
        if sources:
            originals, copies = ([self._path(name) for name in names] for names in (sources.values(), sources))
            with _answers(self.url, "written"):
                self._files.copy(originals, copies, on_error="ignore")

    def withdraw(self, name: str) -> None:
        """Remove an object, where there is one; it is gone afterwards."""
        with suppress(FileNotFoundError), _answers(self.url, "written"):
            self._files.rm_file(self._path(name))

    def remove(self, names: Sequence[str]) -> None:
        """Remove what nobody needs any more; what another process removed meanwhile is not missed."""
        if names:
            with suppress(FileNotFoundError), _answers(self.url, "written"):
                self._files.rm([self._path(name) for name in names])

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"


def is_url(path: Path | str) -> bool:
    """Whether a path names an object store."""
    return "://" in str(path)


def shown(text: str) -> str:
    """A text without user, password and query of the urls in it."""
    return re.sub(r"\?[^\s\"']*", "?…", re.sub(r"://[^\s\"']*:[^\s\"']*@", "://…@", text))


def access(url: str) -> str:
    """Where credentials for a url come from, as a sentence."""
    return _ACCESS.get(url.partition("://")[0], "Credentials come from the environment of the url's package.")


def _open(url: str) -> tuple[AbstractFileSystem, str]:
    try:
        from fsspec.core import url_to_fs

        with _answers(url, passed=(ImportError, ValueError)):
            files, root = url_to_fs(url, use_listings_cache=False)
    except (ImportError, ValueError) as error:
        raise ConfigError(
            f"{shown(url)} cannot be opened: {_said(url, error)}. Install the package for it (s3fs for s3://, gcsfs "
            "for gs://), or give a local path."
        ) from None
    return files, root


@contextmanager
def _answers(
    url: str, done: str = "read", passed: tuple[type[Exception], ...] = (FileNotFoundError,)
) -> Iterator[None]:
    """Turn what an object store's package raises, of whatever type, into one `StoreError`; but not what is `passed`."""
    try:
        yield
    except passed:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno in _LOCAL:
            raise
        raise StoreError(
            f"{shown(url)} cannot be {done}: {_said(url, error)}. Check the url and the network. "
            f"{_ACCESS.get(url.partition('://')[0], '')}".rstrip()
        ) from None


def _said(url: str, error: Exception) -> str:
    """What a package says, without secrets; parts of one that is in the url may stand in any form."""
    name = type(error).__name__
    return name if url != shown(url) else f"{name}: {shown(' '.join(str(error).split()))}".rstrip(".")
