"""Files of the project that a teacher was made of.

Its store names them, so that a student can tell without the teacher whether they are others today.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from kdpipe.fingerprint import digest_file, files_in
from kdpipe_stages.building import WEIGHTS
from kdpipe_stages.project import Project

_CODE = re.compile(r"(?P<file>[^:\n]+\.py):\w+")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_SIGN_OF_A_PATH = re.compile(r"[./]")


def files_of(project: Project, name: str, fingerprint: Mapping[str, Any]) -> dict[str, str]:
    """Digests, by path, of the files and code that a teacher's section and its fingerprint name, or whose folder.

    What is not there is left out, as are folders that hold the pipeline's own data.
    """
    root = project.root
    named = {*_of_section(project, name, ()), *_of_values(fingerprint, root)}
    there = [each for each in named if _exists(root / each) and not _holds_data(root, each)]
    files = {file for each in there for file in _files(root, each)}
    return {each: digest_file(root / each) for each in sorted(files)}


def first_changed(root: Path, files: Mapping[str, str]) -> str | None:
    """The first of such files that is there and has another digest."""
    there = (name for name in files if (root / name).is_file())
    return next((name for name in there if digest_file(root / name) != files[name]), None)


def _files(root: Path, name: str) -> list[str]:
    """A file by itself, or a folder's."""
    return [name] if (root / name).is_file() else [f"{name}/{each}" for each in files_in(root / name)]


def _of_section(project: Project, name: str, above: tuple[str, ...]) -> Iterator[str]:
    """What params.yaml says that a teacher is made of, and what it learnt here; the same of its members."""
    section = project.teacher(name)
    yield from (each for each in (section.weights, section.table) if each is not None)
    learnt = project.teacher_model(name).relative_to(project.root)
    if section.train is not None:
        yield (learnt / WEIGHTS).as_posix()
    if section.fit_on is not None:
        yield learnt.as_posix()
    for each in _strings(section.teacher.arguments if section.teacher else {}):
        if each in project.params.teachers and each not in (*above, name):
            yield from _of_section(project, each, (*above, name))


def _of_values(value: Any, root: Path) -> Iterator[str]:
    """Whatever may be a path in a fingerprint: its `path`, texts with a dot or slash, `file.py:Name`, its `sources`."""
    for key, each in value.items() if isinstance(value, Mapping) else enumerate(value):
        if key == "sources" and isinstance(each, Mapping):
            for module, digest in each.items():
                if _DIGEST.fullmatch(str(digest)):  # others are versions of packages
                    yield from (module, *_modules_files(module, root))
        elif isinstance(each, str):
            code = _CODE.fullmatch(each)
            if key == "path" or _SIGN_OF_A_PATH.search(each):
                yield code["file"] if code else each
        elif isinstance(each, Mapping | list | tuple):
            yield from _of_values(each, root)


def _modules_files(module: str, root: Path) -> Iterator[str]:
    path = module.replace(".", "/")
    yield from (f"{path}.py", f"{path}/__init__.py")
    loaded = getattr(sys.modules.get(module), "__file__", None)
    if loaded is not None and Path(loaded).is_relative_to(root):
        yield Path(loaded).relative_to(root).as_posix()


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for each in value.values() if isinstance(value, Mapping) else value:
            yield from _strings(each)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # a text that is too long for a path, or may not be looked at
        return False


def _holds_data(root: Path, name: str) -> bool:
    return (root / "data").resolve().is_relative_to((root / name).resolve())
