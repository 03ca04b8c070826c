"""`kdpipe gc`: what data/.work holds, and removal of what is not wanted. Nothing outside data/.work is touched."""

from __future__ import annotations

import os
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from kdpipe import durable
from kdpipe.errors import ConfigError, LockedError
from kdpipe_stages.building import DESCRIPTION
from kdpipe_stages.findings import CHECKPOINT, Finding, InUse, Kind, State, described, kind_of
from kdpipe_stages.project import Project

STAGING = "staging"
SHORTEST_PREFIX = 4
_FINGERPRINT = re.compile(r"[0-9a-f]{64}")
_CLEARED_AWAY = ("earlier", "leftover")


@dataclass(frozen=True, kw_only=True)
class Holding:
    """One folder of the work area: what it is, whether it is wanted, and what its removal frees and costs.

    `freed_bytes` are less than `num_bytes` where files are hard links to what is published (or in DVC's cache).
    `leftovers` are temporary files of dead processes, relative to the folder.
    """

    fingerprint: str
    kind: Kind
    what: str
    state: State
    why: str
    cost: str
    num_bytes: int
    freed_bytes: int
    leftovers: Sequence[str] = ()

    def to_json(self) -> dict[str, Any]:
        """For a program."""
        return {**asdict(self), "leftovers": list(self.leftovers)}


@dataclass(frozen=True, kw_only=True)
class Removal:
    """What was removed, how many bytes that freed, and what stayed because another process works there."""

    removed: Sequence[str]
    freed_bytes: int
    left: Sequence[str]

    def to_json(self) -> dict[str, Any]:
        """For a program."""
        return asdict(self)


class WorkArea:
    """data/.work of a project."""

    def __init__(self, project: Project) -> None:
        self._project = project
        self.path = project.work(STAGING).parent
        self._locks = project.work("locks")
        self._held: set[str] = set()

    def holdings(self) -> list[Holding]:
        """Every fingerprint's folder, and what stopped runs left in staging."""
        in_use = InUse(self._project, self._folders())
        found = [self._look(path, in_use) for path in self._folders()]
        if (self.path / STAGING).is_dir() and _files(self.path / STAGING):
            found.append(self._look(self.path / STAGING, in_use))
        return sorted(found, key=lambda each: (each.kind, each.state, -each.num_bytes, each.fingerprint))

    def named(self, prefixes: Sequence[str]) -> list[Holding]:
        """Holdings by the first characters of their fingerprints. Raises `ConfigError`."""
        holdings = [each for each in self.holdings() if each.kind != STAGING]
        found = []
        for prefix in prefixes:
            fitting = [each for each in holdings if each.fingerprint.startswith(prefix.lower())]
            if len(prefix) < SHORTEST_PREFIX or len(fitting) != 1:
                choices = ", ".join(each.fingerprint[:12] for each in fitting or holdings) or "none"
                raise ConfigError(
                    f"{prefix!r} fits {len(fitting)} folders of {self.path}; expected the first characters of one "
                    f"fingerprint, at least {SHORTEST_PREFIX}; the choices are {choices}"
                )
            found += [each for each in fitting if each not in found]
        return found

    def remove(self, prefixes: Sequence[str]) -> Removal:
        """Remove the named folders, unfinished work among them: all of them, or none where one is in use.

        Raises `ConfigError` for one that is current, `LockedError` for one at which another process works.
        """
        with self._project.only_writer("gc", "removing earlier work"), ExitStack() as held:
            named = self.named(prefixes)
            _refuse_wanted(named)
            for each in named:
                held.enter_context(self._alone_at(each))
            named = self.named(prefixes)  # somebody may have published one of them meanwhile
            _refuse_wanted(named)
            for each in named:
                self._discard(each)
        return _removal(named)

    def remove_earlier(self) -> Removal:
        """Remove earlier work and leftovers; everything else stays, and whatever another process works at."""
        removed: list[Holding] = []
        left: list[str] = []
        with self._project.only_writer("gc", "removing earlier work"):
            for each in self.holdings():
                if each.state in _CLEARED_AWAY or each.leftovers:
                    try:
                        removed += self._clear(each)
                    except LockedError as error:
                        left.append(str(error))
        return _removal(removed, left)

    def _clear(self, seen: Holding) -> list[Holding]:
        """Remove a folder that is still earlier work when nobody else can be at it, or else its leftovers."""
        with self._alone_at(seen):
            now = self._look(self.path / seen.fingerprint, InUse(self._project, self._folders()))
            if now.state in _CLEARED_AWAY:
                self._discard(now)
                return [now]
            return self._sweep(now)

    def _folders(self) -> list[Path]:
        if not self.path.is_dir():
            return []
        return sorted(each for each in self.path.iterdir() if _FINGERPRINT.fullmatch(each.name) and each.is_dir())

    def _look(self, path: Path, in_use: InUse) -> Holding:
        finding = self._find_out(path, in_use)
        idle = finding.state != "in progress"
        leftovers = [each for each in _files(path) if idle and finding.kind != STAGING and _is_leftover(each)]
        if finding.state in ("unknown", "unfinished") and len(leftovers) == len(_files(path)):
            finding = Finding(kind=finding.kind, what=f"{finding.what}: nothing but temporary files", state="leftover")
        return Holding(
            fingerprint=path.name,
            **asdict(finding),
            num_bytes=_size(path),
            freed_bytes=_freed([path]),
            leftovers=[str(each.relative_to(path)) for each in leftovers],
        )

    def _find_out(self, path: Path, in_use: InUse) -> Finding:
        if path.name == STAGING:
            busy = self._is_busy("staging")
            what = "folders on their way to being published or removed"
            return Finding(kind="staging", what=what, state="in progress" if busy else "leftover")
        kind = kind_of(path)
        if durable.Workers(self._locks / path.name, "working").held():
            return Finding(kind=kind, what=described(path), state="in progress")
        if kind == "targets":
            return in_use.of_targets(path)
        if kind == "unknown":
            finding = Finding(kind=kind, what="no store and no model", state="unknown")
        else:
            finding = in_use.of_teacher(path) if kind == "teacher" else in_use.of_student(path)
        at_work = finding.state in ("unknown", "unfinished") and self._is_busy(kind)
        return replace(finding, state="in progress", cost="") if at_work else finding

    def _is_busy(self, kind: Kind) -> bool:
        """Whether another process may work at such a folder."""
        return any(name not in self._held and durable.is_held(self._locks / name) for name in self._locks_of(kind))

    def _locks_of(self, kind: Kind) -> dict[str, str]:
        """Locks of whoever may work at such a folder, or publish from it: name -> what is done meanwhile.

        A store has locks of its own, besides.
        """
        known = [each.name.partition("-") for each in self._locks.glob("*-*")]
        names = {*self._project.params.teachers, *(name for what, _, name in known if what in ("teacher", "targets"))}
        student = {"student": "training the student"}
        teachers = {f"teacher-{name}": f"training teacher {name}" for name in sorted(names)}
        stores = {f"targets-{name}": f"caching teacher {name}" for name in sorted(names)}
        some = {"targets": {}, "student": student, "teacher": teachers}
        return some.get(kind, {**student, **teachers, **stores})

    @contextmanager
    def _alone_at(self, holding: Holding) -> Iterator[None]:
        """Keep everybody else away from a folder. Raises `LockedError` when another process works there."""
        with ExitStack() as held:
            if holding.kind != STAGING:
                workers = durable.Workers(self._locks / holding.fingerprint, f"working at {holding.fingerprint[:12]}")
                held.enter_context(workers.door())
                if workers.held():
                    raise LockedError(
                        f"another process is working at {holding.fingerprint[:12]}, {holding.what} (it holds "
                        f"{workers.held()[0]}). Wait for it to end, or stop it, and run again."
                    )
            for name, doing in self._locks_of(holding.kind).items():
                if name not in self._held:
                    held.enter_context(self._project.only_writer(name, doing))
                    self._held.add(name)
                    held.callback(self._held.discard, name)
            yield

    def _discard(self, holding: Holding) -> None:
        """Take a folder away in one rename, so that nobody ever meets half of it; then remove its files."""
        if holding.kind == STAGING:
            shutil.rmtree(self.path / STAGING)
            return
        aside = self.path / STAGING / "removed" / holding.fingerprint
        durable.make_folder(aside.parent)
        shutil.rmtree(aside, ignore_errors=True)
        (self.path / holding.fingerprint).rename(aside)
        durable.fsync_folder(self.path)
        if aside.is_symlink():
            aside.unlink()
        else:
            shutil.rmtree(aside)

    def _sweep(self, holding: Holding) -> list[Holding]:
        """Remove the leftovers of a folder that stays."""
        paths = [self.path / holding.fingerprint / each for each in holding.leftovers]
        swept = replace(holding, what=f"{len(paths)} temporary files in {holding.what}", freed_bytes=_freed(paths))
        for path in paths:
            path.unlink()
        return [swept] if paths else []


def _is_leftover(path: Path) -> bool:
    """A temporary file; not the checkpoint of a training that is not finished."""
    if not path.name.endswith(durable.TEMPORARY_SUFFIX):
        return False
    return path.name != CHECKPOINT or path.with_name(DESCRIPTION).is_file()


def _refuse_wanted(holdings: Iterable[Holding]) -> None:
    for each in holdings:
        name = f"{each.fingerprint[:12]} ({each.what})"
        if each.state == "current":
            raise ConfigError(f"{name} is current: {each.why}. Nothing was removed.")
        if each.state == "in progress":
            raise LockedError(f"another process is working at {name}. Wait for it to end, or stop it, and run again.")


def _removal(removed: Sequence[Holding], left: Sequence[str] = ()) -> Removal:
    return Removal(
        removed=[f"{each.fingerprint[:12]}  {each.what}" for each in removed],
        freed_bytes=sum(each.freed_bytes for each in removed),
        left=list(dict.fromkeys(left)),
    )


def _files(path: Path) -> list[Path]:
    """Every file and link at or below a path; links are not followed."""
    if not path.is_dir() or path.is_symlink():
        return [path]
    return [Path(folder) / name for folder, _, names in os.walk(path) for name in sorted(names)]


def _stats(paths: Iterable[Path]) -> dict[Path, os.stat_result]:
    """Every file below some paths; one that goes away meanwhile is left out."""
    found = {}
    for each in (each for path in paths for each in _files(path)):
        with suppress(FileNotFoundError):
            found[each] = each.lstat()
    return found


def _size(path: Path) -> int:
    """Bytes of every file below a path, each once."""
    return sum({(each.st_dev, each.st_ino): each.st_size for each in _stats([path]).values()}.values())


def _freed(paths: Iterable[Path]) -> int:
    """Bytes that removing some paths gives back: of the files that have no other name."""
    found = _stats(paths).values()
    names = Counter((each.st_dev, each.st_ino) for each in found)
    links = {(each.st_dev, each.st_ino): (each.st_nlink, each.st_size) for each in found}
    return sum(size for inode, (num_links, size) in links.items() if num_links == names[inode])
