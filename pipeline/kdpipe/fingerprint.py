"""Digests of whatever changes numbers: values, files, and the source code that a factory reaches."""

from __future__ import annotations

import ast
import fnmatch
import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import sys
import sysconfig
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import Any

import numpy as np

from kdpipe import __version__

RECORDED_ELSEWHERE = frozenset({"numpy", "torch"})
"""Packages whose version may change last bits only: a store records it, the fingerprint does not cover it."""

_LONG = 4096
_IMPORTERS = ("import_module", "__import__")
_STANDARD_LIBRARY = Path(sysconfig.get_path("stdlib")).resolve()


def canonical_json(value: Any) -> str:
    """One text per value: sorted keys, no spaces. Raises `TypeError` for what JSON cannot hold."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def digest(value: Any) -> str:
    """SHA-256 (hex) of a JSON value."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def digest_file(path: Path) -> str:
    """SHA-256 (hex) of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_path(path: Path) -> str:
    """SHA-256 (hex) of a file's bytes, or of the names and bytes of a folder's files that count."""
    return digest_file(path) if path.is_file() else digest({name: digest_file(path / name) for name in files_in(path)})


def files_in(folder: Path) -> list[str]:
    """A model's folder: its files, sorted, without hidden ones and what says or logs how the model came to be.

    None where there is no folder.
    """
    counted = _counted(folder, ()) if folder.is_dir() else ()
    return sorted(each.relative_to(folder).as_posix() for each in counted)


def _counted(folder: Path, around: tuple[Path, ...]) -> Iterator[Path]:
    """Files in links to folders too, but in none that leads to a folder `around`: that has no end."""
    around = (*around, folder.resolve())
    for each in folder.iterdir():
        if each.name.startswith(".") or any(fnmatch.fnmatch(each.name, pattern) for pattern in _NOTES):
            continue
        if each.is_file():
            yield each
        elif each.is_dir() and not any(outer.is_relative_to(each.resolve()) for outer in around):
            yield from _counted(each, around)


_NOTES = (
    *("*.md", "LICENSE*", "NOTICE*", "*.png", "*.log", "runs", "events.out.*", "__pycache__"),
    *("training_args.bin", "trainer_state.json", "optimizer.*", "scheduler.*", "rng_state*"),
)
"""Model cards and pictures, and what a trainer leaves beside the weights."""


def brief(state: Mapping[str, Any]) -> dict[str, Any]:
    """JSON values, each longer than 4,096 characters (a vocabulary, say) as its digest."""
    is_long = {key: len(canonical_json(value)) > _LONG for key, value in state.items()}
    return {key: f"sha256:{digest(value)}" if is_long[key] else value for key, value in state.items()}


def uniform_by_id(sample_ids: Sequence[str], seed: int, purpose: str) -> np.ndarray[Any, np.dtype[np.float64]]:
    """One number in [0, 1) per sample id `[N]`: stable under growth and order, independent between purposes."""
    prefix = f"{purpose}\0{seed}\0".encode()
    raw = b"".join(hashlib.blake2b(prefix + key.encode(), digest_size=8).digest() for key in sample_ids)
    return np.frombuffer(raw, dtype="<u8").astype(np.float64) / 2.0**64


def source_digests(factory: Any, named_in: str | None = None) -> dict[str, str]:
    """What code `factory` (a class or function) and the module it was `named_in` reach.

    Project-local modules by the SHA-256 of their source, followed through their imports (lazy ones too); installed
    packages by version.
    """
    local: dict[str, str] = {}
    installed: dict[str, str] = {}
    waiting = [getattr(factory, "__module__", None) or "builtins", *([named_in] if named_in else [])]
    while waiting:
        name = waiting.pop()
        top = name.partition(".")[0]
        label = "".join(name.partition("@")[:2])  # a factory's file is loaded as stem@digest
        known = label in local or top in installed or top in RECORDED_ELSEWHERE or _is_standard(top)
        path = None if known else _locate(name)
        if path is None:
            continue
        if top == "kdpipe":
            installed[top] = __version__
        elif any(part in ("site-packages", "dist-packages") for part in path.parts):
            installed[top] = _installed_version(top)
        else:
            local[label] = digest_file(path)
            waiting += [*_packages_above(name), *_imports(path, name)]
    return local | installed


def joined(*several: Mapping[str, str]) -> dict[str, str]:
    """Digests by name; of different files that have one name (`a/net.py`, `b/net.py`) a digest of their digests."""
    all_of: dict[str, str] = {}
    for digests in several:
        for name, each in digests.items():
            all_of[name] = each if all_of.get(name, each) == each else digest([all_of[name], each])
    return all_of


def _is_standard(top: str) -> bool:
    """Whether a name is the standard library's; a file of the project may take it."""
    if top not in sys.stdlib_module_names:
        return False
    path = _locate(top)
    return path is None or path.resolve().is_relative_to(_STANDARD_LIBRARY)


def _locate(name: str) -> Path | None:
    module = sys.modules.get(name)
    spec = _find_spec(name) if module is None else None
    origin = spec.origin if spec else getattr(module, "__file__", None)
    return Path(origin) if origin and Path(origin).is_file() else None


def _find_spec(name: str) -> ModuleSpec | None:
    """Where a module would be imported from. Runs no code: what is imported lazily may be heavy or not work here."""
    package = name.rpartition(".")[0]
    try:
        if not package:
            return importlib.util.find_spec(name)
        above = _find_spec(package)
    except (ImportError, ValueError):
        return None
    folders = above.submodule_search_locations if above else None
    return PathFinder.find_spec(name, folders) if folders else None


def _packages_above(name: str) -> Iterator[str]:
    """`a.b` and `a` for `a.b.c`: importing it runs their `__init__.py` too."""
    while name := name.rpartition(".")[0]:
        yield name


def _installed_version(top: str) -> str:
    """The same whether the package was imported already or not, also where its distribution has another name."""
    try:
        return importlib.metadata.version(top)
    except importlib.metadata.PackageNotFoundError:
        names = sorted(set(_distributions().get(top, ())))
        return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names) or "unknown"


@functools.cache
def _distributions() -> Mapping[str, list[str]]:
    return importlib.metadata.packages_distributions()


def _nodes(path: Path) -> list[ast.AST]:
    """Of a source file; none of a file that nobody can import."""
    try:
        return list(ast.walk(ast.parse(path.read_bytes()))) if path.suffix == ".py" else []
    except SyntaxError:
        return []


def _in_all_of(package: str) -> Iterator[str]:
    """What `from package import *` imports beside the package's own names: what its `__all__` names literally."""
    path = _locate(package)
    for node in _nodes(path) if path else ():
        if isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign):
            of = node.targets if isinstance(node, ast.Assign) else [node.target]
            if "__all__" in map(ast.unparse, of) and node.value is not None:
                literals = (each.value for each in ast.walk(node.value) if isinstance(each, ast.Constant))
                yield from (each for each in literals if isinstance(each, str))


def _imports(path: Path, name: str) -> Iterator[str]:
    """Names that may be modules, from the import statements of a source file, and `import_module("name")`."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    nodes = _nodes(path)
    froms = [alias for node in nodes if isinstance(node, ast.ImportFrom) for alias in node.names]
    importers = {*_IMPORTERS, *(each.asname for each in froms if each.name in _IMPORTERS)}
    for node in nodes:
        with suppress(ImportError):  # beyond the top: nobody can import that either
            if isinstance(node, ast.Import):
                yield from (alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                relative = "." * node.level + (node.module or "")
                base = importlib.util.resolve_name(relative, package) if node.level else relative
                yield base
                names = [alias.name for alias in node.names]
                yield from (f"{base}.{each}" for each in (names if names != ["*"] else _in_all_of(base)))
            elif isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in importers:
                by_keyword = {each.arg: each.value for each in node.keywords}
                match [*node.args, *(by_keyword[key] for key in ("name", "package") if key in by_keyword)]:
                    case [ast.Constant(value=str(named)), ast.Constant(value=str(within)), *_]:
                        yield importlib.util.resolve_name(named, within)
                    case [ast.Constant(value=str(named)), *_]:
                        yield importlib.util.resolve_name(named, package)
