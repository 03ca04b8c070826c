"""From text to objects: YAML files, and factories (`module:Name` plus keyword arguments) that a run chooses.

Values are taken as JSON would say them, strictly: 3 may stand for 3.0, but "3", true and 3.0 are no whole numbers.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import json
import re
import sys
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, is_dataclass
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Annotated, Any, TypeVar

import yaml
from pydantic import BeforeValidator, PydanticSchemaGenerationError, TypeAdapter, ValidationError

from kdpipe.errors import ConfigError, naming
from kdpipe.fingerprint import digest, digest_file

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Factory:
    """What a run chooses: an import path and the keyword arguments for it.

    `path` is "package.module:Name", or "path/to/file.py:Name" relative to params.yaml.
    """

    path: str
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """As it stands in params.yaml."""
        return {"factory": self.path, **self.arguments}


def _parse_factory(value: Any) -> Any:
    if isinstance(value, Factory):
        return value
    if not isinstance(value, Mapping) or not isinstance(value.get("factory"), str):
        raise ValueError('expected a mapping with a key "factory" such as "package.module:Name"')
    arguments = {key: argument for key, argument in value.items() if key != "factory"}
    return Factory(path=value["factory"], arguments=arguments)


FactoryField = Annotated[Factory, BeforeValidator(_parse_factory)]
"""A params.yaml field `{factory: "module:Name", argument: value, …}`."""


class _Loader(yaml.SafeLoader):
    """Plain values only, as in YAML 1.2 (and in DVC, which rewrites params.yaml so), unlike PyYAML's 1.1.

    1e-3 is a number; 2024-01-31, no and 1:30 are texts; 010 is ten. A key that stands twice in one mapping is refused.
    """

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        """A whole number, such as 12, 1_000, 010 (ten), 0o10 (eight), 0x1f or 0b11."""
        text = node.value.replace("_", "")
        return int(text, 0 if text.lstrip("+-")[:2] in ("0b", "0o", "0x") else 10)

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """A mapping as it is written. Raises `ConfigError` for a key that it has twice."""
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        lines: dict[tuple[str, str], int] = {}
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                name, line = (key.tag, key.value), key.start_mark.line + 1
                if name in lines:
                    raise ConfigError(
                        f"line {line}: the key {key.value!r} stands on line {lines[name]} already; remove one of them"
                    )
                lines[name] = line
        return node


_TAG = "tag:yaml.org,2002:"
_WHOLE = r"[-+]?(0b[01_]+|0o[0-7_]+|0x[0-9a-fA-F_]+|[0-9][0-9_]*)$"
_FLOAT = r"([-+]?([0-9][0-9_]*(\.[0-9_]*)?|\.[0-9][0-9_]*)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))$"
_OTHERWISE_IN_1_1 = {_TAG + name for name in ("bool", "int", "float", "timestamp")}
_Loader.yaml_implicit_resolvers = {
    first: [each for each in resolvers if each[0] not in _OTHERWISE_IN_1_1]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(_TAG + "bool", re.compile("(true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
_Loader.add_implicit_resolver(_TAG + "int", re.compile(_WHOLE), list("-+0123456789"))
_Loader.add_implicit_resolver(_TAG + "float", re.compile(_FLOAT), list("-+.0123456789"))
_Loader.add_constructor(_TAG + "int", _Loader.construct_yaml_int)


class _Dumper(yaml.SafeDumper):
    """Quotes the texts that `_Loader` would take for something else."""


_Dumper.yaml_implicit_resolvers = _Loader.yaml_implicit_resolvers


def load_yaml(path: Path) -> Any:
    """Content of a YAML file. Raises `ConfigError` when it is absent, unreadable or no YAML, or has a key twice."""
    try:
        return yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except ConfigError as error:
        raise ConfigError(f"{path}, {error}") from None
    except FileNotFoundError:
        raise ConfigError(
            f"no {path}: expected the run's parameters there. `kdpipe demo DIR` writes an example."
        ) from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is no valid YAML: {error}") from error


def save_yaml(value: Any, path: Path) -> None:
    """Write plain values so that `load_yaml` gives them back."""
    path.write_text(yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True), encoding="utf-8")


def parse(cls: type[T], value: Any, where: str) -> T:
    """`value` as the pydantic dataclass `cls`. Raises `ConfigError` naming each wrong key and the choices."""
    try:
        return TypeAdapter(cls).validate_json(json.dumps(value, default=str), strict=True)
    except ValidationError as error:
        lines = [_explain(cls, problem) for problem in error.errors(include_url=False)]
        raise ConfigError(f"{where}: " + "; ".join(lines)) from None


_NO_KEYS = ("function-", "literal[", "tuple[")
"""What pydantic's locations name besides keys: validators, and the choices of a union."""


def _explain(cls: Any, problem: Any) -> str:
    location = ".".join(str(part) for part in problem["loc"] if not str(part).startswith(_NO_KEYS))
    if problem["type"] == "unexpected_keyword_argument":
        choices = _keys_at(cls, problem["loc"][:-1])
        hint = did_you_mean(problem["loc"][-1], choices)
        return f"{location}: unknown key (the keys here are {', '.join(choices)}){hint}"
    if problem["type"] in ("missing", "missing_argument"):
        return f"{location}: missing"
    return f"{location}: {_expected(problem)}".removeprefix(": ")


_KINDS = {
    "int_type": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "text",
    "list_type": "a list",
    "tuple_type": "a list",
    "dict_type": "a mapping",
    "dataclass_type": "a mapping",
}


def _expected(problem: Any) -> str:
    """What a value had to be, and what it is, in the words of YAML."""
    kind, found = _KINDS.get(problem["type"]), json.dumps(problem["input"], ensure_ascii=False, default=str)
    message = f"expected {kind}" if kind else problem["msg"].removeprefix("Value error, ")
    return f"{message} (found {found})"


def did_you_mean(key: str, choices: Iterable[str]) -> str:
    """The end of a message about an unknown key: the nearest one that exists, or nothing."""
    close = difflib.get_close_matches(str(key), list(choices), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def _keys_at(cls: Any, location: tuple[Any, ...]) -> list[str]:
    """Field names of the dataclass that a validation error's location points into."""
    for part in location:
        fields = getattr(cls, "__dataclass_fields__", {})
        hint = typing.get_type_hints(cls)[part] if part in fields else cls
        cls = _innermost_dataclass(hint)
    return sorted(getattr(cls, "__dataclass_fields__", {}))


def _innermost_dataclass(hint: Any) -> Any:
    if hasattr(hint, "__dataclass_fields__"):
        return hint
    for argument in typing.get_args(hint):
        found = _innermost_dataclass(argument)
        if hasattr(found, "__dataclass_fields__"):
            return found
    return hint


def resolve(path: str, root: Path, where: str) -> Callable[..., Any]:
    """The class or function that a factory path names; files and project modules are sought below `root`.

    Raises `ConfigError` naming `where` (a key of params.yaml), what was sought and what exists.
    """
    module_name, _, name = path.rpartition(":")
    module = load_module(path, root, where)
    found = getattr(module, name, None)
    if not callable(found):
        public = {key: value for key, value in vars(module).items() if callable(value) and not key.startswith("_")}
        inside = f"{module.__name__}."
        own = sorted(key for key, value in public.items() if f"{getattr(value, '__module__', '')}.".startswith(inside))
        raise ConfigError(f"{where}: {module_name} has no {name!r}; it has {', '.join(own) or 'nothing callable'}")
    return typing.cast("Callable[..., Any]", found)


def load_module(path: str, root: Path, where: str) -> ModuleType:
    """The module that a factory path names. Raises `ConfigError`."""
    module_name, _, name = path.rpartition(":")
    if not module_name or not name:
        raise ConfigError(f'{where}: {path!r} is no factory; expected "package.module:Name" or "file.py:Name"')
    if str(root) not in sys.path:
        sys.path.insert(0, str(root))
    return _load_file(root / module_name, where) if module_name.endswith(".py") else _import(module_name, where)


def _import(name: str, where: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        package_name, _, within = name.partition(".")
        if within and error.name == package_name:
            raise ConfigError(
                f"{where}: {name} needs the package {package_name!r}, which is neither installed nor beside "
                "params.yaml. Install it, or correct the name"
            ) from error
        if error.name is not None and (name == error.name or name.startswith(error.name + ".")):
            raise ConfigError(
                f"{where}: there is no module {name!r} (sought beside params.yaml and installed)"
            ) from error
        raise ConfigError(f"{where}: {name} needs the package {error.name!r}, which is not installed") from error
    except Exception as error:
        raise ConfigError(f"{where}: {name} cannot be imported: {type(error).__name__}: {error}") from error


def _load_file(path: Path, where: str) -> ModuleType:
    if not path.is_file():
        raise ConfigError(f"{where}: there is no file {path}")
    # The same content elsewhere is another module: it may look for files beside it.
    name = f"{path.stem}@{digest([str(path.resolve()), digest_file(path)])[:12]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{where}: {path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise ConfigError(f"{where}: {path} cannot be imported: {type(error).__name__}: {error}") from error
    return module


@dataclass(frozen=True)
class Bound:
    """A factory whose arguments fit: `make()` calls it. `name` is its key in params.yaml and its path."""

    name: str
    target: Callable[..., Any]
    arguments: Mapping[str, Any]

    def make(self) -> Any:
        """Call the factory. Raises `ConfigError` where it fails."""
        with naming(ConfigError, f"{self.name} fails"):
            return self.target(**self.arguments)


def bind(
    factory: Factory,
    root: Path,
    where: str,
    beside: Sequence[str] = (),
    elsewhere: Mapping[str, str] = MappingProxyType({}),
    /,
    **offered: Any,
) -> Bound:
    """Check a factory's arguments against its signature, without calling it.

    `offered` are values that the pipeline knows (class count, input shape): passed when the signature names them and
    params.yaml does not. `beside` are keys that may stand beside the arguments; `elsewhere` are the sections of those
    arguments that do not stand at `where`. Arguments annotated `Path` are files and folders relative to `root`.
    Raises `ConfigError` for unknown, missing or wrongly typed arguments.
    """
    target = resolve(factory.path, root, where)
    signature = inspect.signature(target)
    accepts = signature.parameters
    arguments = {key: value for key, value in offered.items() if key in accepts} | dict(factory.arguments)
    takes_any = any(each.kind is each.VAR_KEYWORD for each in accepts.values())
    names = [name for name, each in accepts.items() if each.kind in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY)]
    unknown = [] if takes_any else [key for key in arguments if key not in names]
    if unknown:
        place = f"{elsewhere.get(unknown[0], where)}.{unknown[0]}"
        raise ConfigError(
            f"{place}: {factory.path} does not take it; it takes {', '.join(names) or 'nothing'}"
            f"{' beside ' if beside else ''}{', '.join(beside)}{did_you_mean(unknown[0], [*names, *beside])}"
        )
    missing = [name for name in names if name not in arguments and accepts[name].default is inspect.Parameter.empty]
    if missing:
        raise ConfigError(f"{where}.{missing[0]}: missing; {factory.path} needs it")
    checked = {
        key: _below(root, _checked(target, key, value, elsewhere.get(key, where)))
        for key, value in factory.arguments.items()
    }
    return Bound(f"{where}: {factory.path}", target, arguments | checked)


def _below(root: Path, value: Any) -> Any:
    return root / value if isinstance(value, Path) else value


def _checked(target: Callable[..., Any], name: str, value: Any, where: str) -> Any:
    """`value` validated against the annotation of a factory's argument, where it has one that can be validated."""
    function = target.__init__ if inspect.isclass(target) else target
    try:
        hint = typing.get_type_hints(function, include_extras=True).get(name)
        adapter, text = TypeAdapter(hint) if hint is not None else None, json.dumps(value)
    except (NameError, TypeError, PydanticSchemaGenerationError):
        return value
    if adapter is None:
        return value
    try:
        return adapter.validate_json(text, strict=True)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        if is_dataclass(hint) and problem["loc"]:
            raise ConfigError(f"{where}.{name}.{_explain(hint, problem)}") from None
        place = "".join(f".{part}" for part in problem["loc"] if isinstance(part, int))
        expected = f"missing (found {text})" if problem["type"] == "missing" else _expected(problem)
        raise ConfigError(f"{where}.{name}{place}: {expected}") from None


def package(name: str, extra: str) -> ModuleType:
    """A package that only some runs need. Raises `ConfigError` naming the extra of kdpipe that brings it."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name not in (name, name.partition(".")[0]):
            raise
        raise ConfigError(f"this needs the package {name}: pip install 'kdpipe[{extra}]'") from None


def takes(function: Callable[..., Any], count: int) -> bool:
    """Whether a callable can be called with `count` positional arguments."""
    try:
        inspect.signature(function).bind(*[None] * count)
    except TypeError:
        return False
    return True
