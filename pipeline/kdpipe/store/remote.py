"""A store in an object store: files are fetched whole, on first touch, into a folder on this machine."""

from __future__ import annotations

import errno
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from kdpipe import durable
from kdpipe.errors import ConfigError, CorruptStoreError, StoreError, StoreNotFoundError
from kdpipe.fingerprint import digest, digest_file

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

CACHE = "KDPIPE_CACHE"
"""Environment variable: where fetched files are kept (default ~/.cache/kdpipe)."""


class RemoteFolder:
    """`url` (s3://, gs://, …, whatever fsspec has a package for), mirrored file by file at `path`.

    The mirror is named after the url and the content of `versions`: a store published anew gets another mirror. Fetched
    files stay; what is read from them is verified as in any store.
    """

    def __init__(self, url: str, versions: Sequence[str], cache: Path | None = None) -> None:
        """Raises `ConfigError` when the package for the url is absent, `StoreNotFoundError` when nothing is there.

        Like every method, `StoreError` when the object store refuses or does not answer.
        """
        self.url = url.rstrip("/")
        self._files, self._root = _open(self.url)
        contents = []
        for name in versions:
            try:
                with _answers(self.url):
                    contents.append(self._files.cat_file(f"{self._root}/{name}"))
            except FileNotFoundError:
                raise StoreNotFoundError(
                    f"there is no target store at {_shown(url)}: it has no {name}, or its bucket does not exist"
                ) from None
        base = cache or Path(os.environ.get(CACHE) or Path.home() / ".cache" / "kdpipe")
        self.path = base / digest([self.url, *(each.hex() for each in contents)])
        self.path.mkdir(parents=True, exist_ok=True)

    def size(self, name: str) -> int | None:
        """Bytes of a file; None where there is none."""
        try:
            with _answers(self.url):
                found: int = self._files.size(f"{self._root}/{name}")
        except FileNotFoundError:
            return None
        return found

    def fetch(self, name: str, sha256: str | None = None) -> None:
        """Have a file at `path / name`, where the url has it; several processes may do so at once.

        Raises `CorruptStoreError` when its content is not the one that was committed.
        """
        target = self.path / name
        if target.is_file():
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(suffix=durable.TEMPORARY_SUFFIX, dir=target.parent)
        os.close(descriptor)
        try:
            with _answers(self.url):
                self._files.get_file(f"{self._root}/{name}", temporary)
            if sha256 is not None and digest_file(Path(temporary)) != sha256:
                raise CorruptStoreError(
                    f"{_shown(self.url)}/{name} differs from its checksum: it was damaged, or the store was published "
                    "anew since it was opened. Open it again."
                )
            Path(temporary).replace(target)
        except FileNotFoundError:
            pass
        finally:
            Path(temporary).unlink(missing_ok=True)


def is_url(path: Path | str) -> bool:
    """Whether a path names an object store."""
    return "://" in str(path)


_ACCESS = {
    "s3": "Credentials come from the environment (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE; "
    "FSSPEC_S3_ANON=1 for a public bucket), the server's address from AWS_ENDPOINT_URL where it is not Amazon's.",
    "gs": "Credentials come from the environment (GOOGLE_APPLICATION_CREDENTIALS).",
}
"""What to set, by the url's scheme."""
_LOCAL = (errno.ENOSPC, errno.EDQUOT)


def _open(url: str) -> tuple[AbstractFileSystem, str]:
    try:
        from fsspec.core import url_to_fs

        with _answers(url, passed=(ImportError, ValueError)):
            files, root = url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise ConfigError(
            f"{_shown(url)} cannot be opened: {_said(url, error)}. Install the package for it (s3fs for s3://, gcsfs "
            "for gs://), or give a local path."
        ) from None
    return files, root


@contextmanager
def _answers(url: str, passed: tuple[type[Exception], ...] = (FileNotFoundError,)) -> Iterator[None]:
    """Turn what an object store's package raises, of whatever type, into one `StoreError`; but not what is `passed`."""
    try:
        yield
    except passed:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno in _LOCAL:
            raise
        raise StoreError(
            f"{_shown(url)} cannot be read: {_said(url, error)}. Check the url and the network. "
            f"{_ACCESS.get(url.partition('://')[0], '')}".rstrip()
        ) from None


def _said(url: str, error: Exception) -> str:
    """What a package says, without secrets; parts of one that is in the url may stand in any form."""
    name = type(error).__name__
    return name if url != _shown(url) else f"{name}: {_shown(' '.join(str(error).split()))}".rstrip(".")


def _shown(text: str) -> str:
    """A text without user, password and query of the urls in it."""
    return re.sub(r"\?[^\s\"']*", "?…", re.sub(r"://[^\s\"']*:[^\s\"']*@", "://…@", text))
