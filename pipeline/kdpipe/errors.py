"""Every error that kdpipe raises on purpose.

    KdpipeError
    ├── ConfigError            (ValueError)         params.yaml, a factory, a loss that does not fit
    │   └── UsageError                              a command's options
    ├── DataError              (ValueError)         a source, prepared rows, labels, splits
    ├── TeacherError           (ValueError)         a teacher's weights or outputs
    ├── TrainingError          (RuntimeError)       a training that cannot go on
    └── StoreError             (RuntimeError)       a target store
        ├── StoreNotFoundError (FileNotFoundError)  nothing there
        ├── IncompleteStoreError (LookupError)      rows or shards without targets
        ├── StaleStoreError    (ValueError)         targets of other settings or other inputs
        ├── CorruptStoreError  (ValueError)         bytes that differ from what was committed
        └── LockedError        (BlockingIOError)    another process writes here

A message says what was found, what was expected and what to do.
"""

from __future__ import annotations

import re
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence


_CPU_ALLOCATOR = re.compile("DefaultCPUAllocator: (can't allocate|not enough) memory")


class KdpipeError(Exception):
    """Root of the tree: `except KdpipeError` catches every error above."""


class ConfigError(KdpipeError, ValueError):
    """params.yaml, a factory or a combination of settings is wrong."""


class UsageError(ConfigError):
    """An option of a command has no such value, or does not go with another one."""


class DataError(KdpipeError, ValueError):
    """A source, a prepared row, a label or a split is wrong."""


class TeacherError(KdpipeError, ValueError):
    """A teacher's weights or outputs cannot be used."""


class TrainingError(KdpipeError, RuntimeError):
    """A training cannot go on."""


class StoreError(KdpipeError, RuntimeError):
    """A target store cannot be used."""


class StoreNotFoundError(StoreError, FileNotFoundError):
    """There is no target store at the path."""


class IncompleteStoreError(StoreError, LookupError):
    """Rows or shards have no targets."""


class StaleStoreError(StoreError, ValueError):
    """The targets belong to other settings or other inputs."""


class CorruptStoreError(StoreError, ValueError):
    """Bytes differ from what was committed."""


class LockedError(StoreError, BlockingIOError):
    """Another process writes here."""


def some(names: Sequence[object], shown: int = 5) -> str:
    """The first of the names, and how many more there are: what a message shows of a list of any length."""
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(map(str, names[:shown])) + more


def is_out_of_memory(error: Exception) -> bool:
    """Whether memory ran out: Python's, a device's, or that of torch's allocator for the CPU, which has no own class.

    Imports no torch.
    """
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return not isinstance(error, KdpipeError) and _CPU_ALLOCATOR.search(str(error)) is not None


@contextmanager
def at(place: str, *kinds: type[KdpipeError]) -> Iterator[None]:
    """Puts a key of params.yaml before what an error of `kinds` (`ConfigError`) says, unless that begins with it."""
    named = kinds or (ConfigError,)
    try:
        yield
    except named as error:
        if str(error).startswith(place):
            raise
        raise type(error)(f"{place}: {error}") from error


@contextmanager
def naming(kind: type[KdpipeError], what: str | Callable[[], str], *passing: type[Exception]) -> Iterator[None]:
    """Whatever a user's code raises, as one `kind` of error that says `what` fails (a function: asked only then).

    kdpipe's own errors, those of memory that ran out and those `passing` stay as they are.
    """
    try:
        yield
    except KdpipeError:
        raise
    except passing:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        failed = what if isinstance(what, str) else what()
        raise kind(f"{failed}: {type(error).__name__}: {error}") from error
