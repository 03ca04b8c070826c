"""scikit-learn objects as bytes, by skops: nothing is unpickled, and the same object gives the same bytes."""

from __future__ import annotations

import io
import itertools
import json
import zipfile
from collections.abc import Sequence
from typing import Any

from kdpipe.config import package
from kdpipe.errors import ConfigError

_SCHEMA = "schema.json"
_KNOWN = ("sklearn.", "numpy.dtype")
"""Beginnings of types that are loaded though skops asks about them: scikit-learn's own, and kinds of numbers."""


def dumps(value: Any) -> bytes:
    """A fitted estimator or transformer. Raises `ConfigError` for one that skops cannot store."""
    skops = _library()
    try:
        content: bytes = skops.dumps(value)
    except Exception as error:  # whatever a part of the object raises
        raise ConfigError(
            f"{type(value).__name__} cannot be stored by skops: {type(error).__name__}: {error}"
        ) from error
    return _canonical(content)


def loads(content: bytes, where: str, trusted: Sequence[str] = ()) -> Any:
    """What `dumps` wrote. Raises `ConfigError` for anything else, and for unknown types that are not `trusted`."""
    skops = _library()
    if not zipfile.is_zipfile(io.BytesIO(content)):
        raise ConfigError(
            f"{where} is no skops file; expected one written by skops.io.dump, whole. A pickle is not loaded: it may "
            "hold any code"
        )
    try:
        unknown = [each for each in skops.get_untrusted_types(data=content) if not each.startswith(_KNOWN)]
        refused = sorted(set(unknown) - set(trusted))
        if not refused:
            return skops.loads(content, trusted=skops.get_untrusted_types(data=content))
    except Exception as error:  # a damaged file, or one of another version of scikit-learn
        raise ConfigError(f"{where} cannot be loaded: {type(error).__name__}: {error}") from None
    raise ConfigError(
        f"{where} holds types that are not known to be safe: {', '.join(refused)}. If you trust them, name them in "
        "`trusted:`"
    )


def _canonical(content: bytes) -> bytes:
    """The same file without times, and with numbers in place of memory addresses."""
    with zipfile.ZipFile(io.BytesIO(content)) as source:
        files = {name: source.read(name) for name in source.namelist()}
    numbers = _Numbers()
    schema = numbers.in_place_of_addresses(json.loads(files.pop(_SCHEMA)))
    renamed = {numbers.file_name(name): each for name, each in files.items()}
    renamed[_SCHEMA] = json.dumps(schema, indent=1).encode()
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w") as archive:
        for name in sorted(renamed):
            archive.writestr(zipfile.ZipInfo(name), renamed[name])
    return target.getvalue()


class _Numbers:
    """Addresses of objects -> 0, 1, … in the order of a schema."""

    def __init__(self) -> None:
        self._of_address: dict[str, int] = {}
        self._next = itertools.count()

    def in_place_of_addresses(self, value: Any) -> Any:
        """A part of the schema. Texts and numbers that are equal may be one object or several: each gets its own."""
        if isinstance(value, list):
            return [self.in_place_of_addresses(each) for each in value]
        if not isinstance(value, dict):
            return value
        changed = {key: self.in_place_of_addresses(each) for key, each in value.items()}
        if "__id__" in changed:
            plain = changed.get("is_json", False)
            changed["__id__"] = next(self._next) if plain else self._number(str(changed["__id__"]))
        if isinstance(changed.get("file"), str):
            changed["file"] = self.file_name(changed["file"])
        return changed

    def file_name(self, name: str) -> str:
        """The name of an array's file, which begins with the array's address."""
        address, dot, ending = name.partition(".")
        return f"{self._number(address)}{dot}{ending}"

    def _number(self, address: str) -> int:
        if address not in self._of_address:
            self._of_address[address] = next(self._next)
        return self._of_address[address]


def _library() -> Any:
    return package("skops.io", "sklearn")
