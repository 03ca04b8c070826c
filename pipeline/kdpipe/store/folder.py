"""A store's folder, held open: a store that is published anew meanwhile is an error, never a mixture of the two."""

from __future__ import annotations

import os
import weakref
from pathlib import Path

from kdpipe.errors import StaleStoreError, StoreNotFoundError


class HeldFolder:
    """The folder that was at `path` at first: its files are found whatever has that name since.

    Whoever publishes puts another folder there, and removes this one.
    """

    def __init__(self, path: Path) -> None:
        """Raises `StoreNotFoundError`."""
        self.path = path
        try:
            self._descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        except (FileNotFoundError, NotADirectoryError):
            raise no_store(path) from None
        weakref.finalize(self, os.close, self._descriptor)

    def opener(self, name: str, flags: int) -> int:
        """For `open(name, opener=…)`, the name relative to the folder. Raises as `check` does."""
        try:
            return os.open(name, flags, dir_fd=self._descriptor)
        except (FileNotFoundError, NotADirectoryError):
            self.check()
            raise

    def size(self, name: str) -> int | None:
        """Bytes of a file; None where it is absent. Raises as `check` does."""
        try:
            return os.stat(name, dir_fd=self._descriptor).st_size
        except (FileNotFoundError, NotADirectoryError):
            self.check()
            return None

    def check(self) -> None:
        """Raise `StaleStoreError` where another folder has the name by now."""
        try:
            is_same = os.path.samestat(os.fstat(self._descriptor), os.stat(self.path))
        except FileNotFoundError:
            return
        if not is_same:
            raise published_anew(self.path)


def no_store(path: Path) -> StoreNotFoundError:
    """What a reader is told where no store is."""
    return StoreNotFoundError(f"there is no target store at {path}. Run `kdpipe cache-teacher NAME`.")


def published_anew(path: Path | str) -> StaleStoreError:
    """What a reader is told whose store was replaced by another one of the same name."""
    return StaleStoreError(
        f"{path} was published anew since it was opened, so it holds other targets by now. Open it again (run the "
        "command again)."
    )
