"""Files that survive a crash: written whole under a temporary name, fsynced, renamed; published by hard links."""

from __future__ import annotations

import ctypes
import errno
import glob
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import IO

from filelock import FileLock, Timeout

from kdpipe.errors import LockedError

TEMPORARY_SUFFIX = ".tmp"
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_GLANCE_S = 0.2
"""Longer than `is_held` keeps a lock."""


@contextmanager
def writing(path: Path, temporary: Path | None = None) -> Iterator[IO[bytes]]:
    """A new file for `path`, which holds all that the block writes, or what it held before, even after a power cut.

    File and folder are on disk after the block. `temporary` is its name until then, where several processes may write
    to `path` at once. Raises `OSError` (disk full, read-only), which names `path`; no temporary file is left when the
    block or the disk fails.
    """
    temporary = temporary or path.with_name(path.name + TEMPORARY_SUFFIX)
    try:
        with temporary.open("wb") as file:
            yield file
            fsync_file(file)
        temporary.replace(path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise
    fsync_folder(path.parent)


def write_bytes(path: Path, content: bytes | bytearray | memoryview) -> None:
    """Write a file whole: see `writing`."""
    with writing(path) as file:
        file.write(content)


def write_text(path: Path, content: str) -> None:
    """`write_bytes` for UTF-8 text."""
    write_bytes(path, content.encode())


def fsync_file(file: IO[bytes]) -> None:
    """Make an open file's content durable."""
    file.flush()
    os.fsync(file.fileno())


def fsync_folder(folder: Path) -> None:
    """Make renames and new names in `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sweep_temporaries(folder: Path) -> None:
    """Remove what a killed writer left behind. Only the one writer of `folder` may call this."""
    for leftover in folder.rglob(f"*{TEMPORARY_SUFFIX}"):
        _remove(leftover)


def own_temporary(path: Path) -> Path:
    """A name beside `path` that is this process's alone; what processes that are gone left under theirs is removed."""
    for leftover in path.absolute().parent.glob(f".{glob.escape(path.name)}.*{TEMPORARY_SUFFIX}"):
        process = leftover.name[len(path.name) + 2 : -len(TEMPORARY_SUFFIX)]
        if process.isdecimal() and not _is_running(int(process)):
            _remove(leftover)
    return path.with_name(f".{path.name}.{os.getpid()}{TEMPORARY_SUFFIX}")


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


def make_folder(folder: Path) -> None:
    """Make a folder and its parents where they are absent, durably."""
    absent = [each for each in (folder, *folder.parents) if not each.is_dir()]
    folder.mkdir(parents=True, exist_ok=True)
    for each in reversed(absent):
        fsync_folder(each.parent)


@contextmanager
def only_writer(lock_file: Path, doing: str, *, wait: bool = False) -> Iterator[None]:
    """Hold a lock that the kernel releases when the process dies, however it dies.

    When another process holds it, `wait` waits for it; else `LockedError` is raised.
    """
    lock_file.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(lock_file)
    try:
        lock.acquire(timeout=-1 if wait else _GLANCE_S)
    except Timeout:
        raise LockedError(
            f"another process is {doing} (it holds {lock_file}). Wait for it to end, or stop it, and run again."
        ) from None
    try:
        yield
    finally:
        lock.release()


def is_held(lock_file: Path) -> bool:
    """Whether some process holds a lock; the lock is taken for an instant to find out."""
    if not lock_file.is_file():
        return False
    try:
        with FileLock(lock_file).acquire(timeout=0):
            return False
    except Timeout:
        return True


class Workers:
    """Who works at one thing: somebody alone, or `count` of them, each at its own part `index`.

    Locks, all of which vanish with their process: `<lock_file>` of whoever works alone (part 0 of 1),
    `<lock_file>.shards-<index>-of-<count>` of each other part, and `<lock_file>.door` that all pass one by one.
    """

    def __init__(self, lock_file: Path, doing: str) -> None:
        self._lock_file, self._doing = lock_file, doing

    def door(self) -> AbstractContextManager[None]:
        """Wait to be the only one behind the door: to begin, and for whatever concerns every part."""
        return only_writer(self._beside("door"), self._doing, wait=True)

    @contextmanager
    def part(self, index: int, count: int) -> Iterator[None]:
        """Hold one part for as long as it takes; begin it behind the door.

        Raises `LockedError` when another process holds the same part, or a part of another count.
        """
        of_another_count = [each for each in self.held() if not self._is_part_of(each, count)]
        if of_another_count:
            raise LockedError(
                f"another process is {self._doing}, {self._described(of_another_count[0])} (it holds "
                f"{of_another_count[0]}); this one would be {self._described(self._lock_of(index, count))}. "
                "Wait for it to end, or stop it, and run again."
            )
        with only_writer(self._lock_of(index, count), self._doing):
            yield

    def held(self) -> list[Path]:
        """Locks of parts that somebody holds now; behind the door nobody begins meanwhile."""
        parts = sorted(self._lock_file.parent.glob(f"{self._lock_file.name}.shards-*"))
        return [each for each in (self._lock_file, *parts) if is_held(each)]

    def _beside(self, suffix: str) -> Path:
        return self._lock_file.with_name(f"{self._lock_file.name}.{suffix}")

    def _lock_of(self, index: int, count: int) -> Path:
        return self._lock_file if count == 1 else self._beside(f"shards-{index}-of-{count}")

    def _is_part_of(self, lock_file: Path, count: int) -> bool:
        return lock_file == self._lock_file if count == 1 else lock_file.name.endswith(f"-of-{count}")

    def _described(self, lock_file: Path) -> str:
        return "alone" if lock_file == self._lock_file else lock_file.name.rpartition(".")[2].replace("-", " ")


def link_tree(source: Path, destination: Path) -> None:
    """Give every file below `source` a second name below `destination` (a copy where hard links are impossible).

    What a link leads to gets the name, not the link (into DVC's cache, say, where it may be removed); a link to nothing
    is no file.
    """
    for path in sorted(each for each in source.rglob("*") if each.exists()):
        target = destination / path.relative_to(source)
        if path.is_dir():
            target.mkdir(parents=True, exist_ok=True)
        elif not path.name.endswith(TEMPORARY_SUFFIX):
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(path.resolve(), target)
            except OSError:
                shutil.copyfile(path, target)
                with target.open("rb") as file:
                    fsync_file(file)


def publish(parts: Mapping[str, Path], destination: Path, staging: Path | None = None) -> None:
    """Make `destination` hold exactly `parts` (relative name -> folder; "" is the top), in one rename.

    Files are hard links. A reader sees the old folder or the new one, never a mixture; no published file is ever
    opened for writing. The new folder is put together as `staging` (beside `destination` when not given, or when it
    lies on another disk), by one process at a time. A `destination` that is a link is followed. Raises `OSError`; then
    `destination` is what it was.
    """
    destination = destination.resolve()
    if destination.exists() and not destination.is_dir():
        raise FileExistsError(
            errno.EEXIST, "there is a file where a folder is to be published; remove it", str(destination)
        )
    if staging is None or not _on_one_disk(staging.parent, destination.parent):
        staging = destination.with_name(f".{destination.name}{TEMPORARY_SUFFIX}")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    for name, folder in parts.items():
        (staging / name).mkdir(parents=True, exist_ok=True)
        link_tree(folder, staging / name)
    for folder in (staging, *(path for path in staging.rglob("*") if path.is_dir())):
        fsync_folder(folder)
    make_folder(destination.parent)
    if destination.exists():
        _exchange(staging, destination)
        shutil.rmtree(staging)
    else:
        staging.rename(destination)
    fsync_folder(destination.parent)


def _on_one_disk(first: Path, second: Path) -> bool:
    """Whether what lies in one folder can be renamed into the other; folders may be absent yet."""
    devices = [next(each for each in (path, *path.parents) if each.exists()).stat().st_dev for path in (first, second)]
    return devices[0] == devices[1]


def _exchange(first: Path, second: Path) -> None:
    """Swap two folders' names atomically (Linux); elsewhere by two renames, with no folder for an instant."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is not None:
        names = os.fsencode(first), os.fsencode(second)
        if renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0:
            return
    aside = second.with_name(f".{second.name}.old{TEMPORARY_SUFFIX}")
    shutil.rmtree(aside, ignore_errors=True)
    second.rename(aside)
    try:
        first.rename(second)
    except OSError:
        aside.rename(second)
        raise
    aside.rename(first)
