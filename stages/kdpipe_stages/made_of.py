"""Files of the project that a teacher was made of.

Its store names them, so that a student can tell without the teacher whether they are others today.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from kdpipe.fingerprint import digest_path

_CODE = re.compile(r"(?P<file>[^:\n]+\.py):\w+")
_LONGEST = 255


def files_of(root: Path, *settings: Any) -> dict[str, str]:
    """Digests, by path, of the files, folders and code that settings and a fingerprint (JSON) name.

    What is not there is left out, as are folders that hold the pipeline's own data.
    """
    named = {name for each in settings for name in _names(each) if 0 < len(name) <= _LONGEST and "\n" not in name}
    paths = {name: root / name for name in sorted(named)}
    return {name: digest_path(path) for name, path in paths.items() if path.exists() and not _holds_data(path, root)}


def first_changed(root: Path, files: Mapping[str, str]) -> str | None:
    """The first of such files that is there and has another digest."""
    there = (name for name in files if (root / name).exists())
    return next((name for name in there if digest_path(root / name) != files[name]), None)


def _names(value: Any) -> Iterator[str]:
    """Whatever may be a path in JSON: its strings, the files of `file.py:Name`, the modules of `sources`."""
    if isinstance(value, str):
        code = _CODE.fullmatch(value)
        yield code["file"] if code else value
    elif isinstance(value, Mapping):
        for key, each in value.items():
            if key == "sources":
                for module in each:
                    path = module.replace(".", "/")
                    yield from (f"{path}.py", f"{path}/__init__.py")
            yield from _names(each)
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _names(each)


def _holds_data(path: Path, root: Path) -> bool:
    return (root / "data").resolve().is_relative_to(path.resolve())
