"""Files of the project that a teacher was made of.

Its store names them, so that a student can tell without the teacher whether they are others today.
"""

from __future__ import annotations

import itertools
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from kdpipe.fingerprint import digest_file, files_in
from kdpipe_stages.building import WEIGHTS
from kdpipe_stages.params import teacher_and_members
from kdpipe_stages.project import Project, exists, holds_data

_CODE = re.compile(r"(?P<file>[^:\n]+\.py):\w+")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_SIGN_OF_A_PATH = re.compile(r"[./]")


def files_of(project: Project, name: str, fingerprint: Mapping[str, Any]) -> dict[str, str]:
    """Digests, by path, of the files and code that a teacher's section and its fingerprint name, or whose folder.

    What is not there is left out, as are folders that hold the pipeline's own data.
    """
    code = {**fingerprint, "of training": [_transforms_code(project, each) for each in _all_of(project, name)]}
    files = {file for each in _named(project, name, code) for file in _files(project.root, each)}
    return {each: digest_file(project.root / each) for each in sorted(files)}


def first_changed(project: Project, name: str, fingerprint: Mapping[str, Any], files: Mapping[str, str]) -> str | None:
    """The first of such files that has another digest today, or that joined one of their folders; None: none did."""
    root = project.root
    there = (each for each in files if (root / each).is_file())
    folders = (each for each in sorted(_named(project, name, fingerprint)) if files and not (root / each).is_file())
    joined = (each for folder in folders for each in _files(root, folder) if each not in files)
    return next(itertools.chain((each for each in there if digest_file(root / each) != files[each]), joined), None)


def _named(project: Project, name: str, fingerprint: Mapping[str, Any]) -> set[str]:
    """The files and folders."""
    root = project.root
    named = {each for every in _all_of(project, name) for each in _of_section(project, every)}
    named |= set(_of_values(fingerprint, root))
    return {each for each in named if exists(root / each) and not holds_data(root, each)}


def _all_of(project: Project, name: str) -> list[str]:
    return teacher_and_members(project.params, name)


def _transforms_code(project: Project, name: str) -> dict[str, Any]:
    """The code that a teacher saw rows through while it learnt here."""
    train = project.teacher(name).train
    if train is None or train.transform is None:
        return {}
    sources = project.sources_and_files(train.transform, f"teachers.{name}.train.transform")
    return {"sources": sources, "transform": train.transform.to_json()}


def _files(root: Path, name: str) -> list[str]:
    """A file by itself, or a folder's."""
    return [name] if (root / name).is_file() else [f"{name}/{each}" for each in files_in(root / name)]


def _of_section(project: Project, name: str) -> Iterator[str]:
    """What params.yaml says that a teacher is made of, and what it learnt here."""
    section = project.teacher(name)
    yield from (each for each in (section.weights, section.table) if each is not None)
    learnt = project.teacher_model(name).relative_to(project.root)
    if section.train is not None:
        yield (learnt / WEIGHTS).as_posix()
    if section.fit_on is not None:
        yield learnt.as_posix()


def _of_values(value: Any, root: Path) -> Iterator[str]:
    """Whatever may be a path in a fingerprint: its `path`, texts with a dot or slash, `file.py:Name`, its `sources`."""
    for key, each in value.items() if isinstance(value, Mapping) else enumerate(value):
        if key == "sources" and isinstance(each, Mapping):
            for module, digest in each.items():
                if _DIGEST.fullmatch(str(digest)):  # others are versions of packages
                    is_package = exists(root / module / "__init__.py")
                    yield from (*([] if is_package else [module]), *_modules_files(module, root))
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
