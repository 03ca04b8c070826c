"""Labelling rules: what they are, and what they say about rows. A rule votes for one class, or abstains.

Shapes: B rows, L rules, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from kdpipe.config import did_you_mean, load_module, load_yaml, resolve
from kdpipe.data.columns import Columns
from kdpipe.errors import ConfigError, TeacherError, is_out_of_memory
from kdpipe.fingerprint import digest_file, joined, source_digests
from kdpipe.teachers.rules.conditions import Values, parse_condition

ABSTAIN = -1
Rules = str | list[dict[str, Any]]
"""A YAML file's path, or the list in it: `{name, when | function, label, weight}`."""
_KEYS = ("name", "when", "function", "label", "weight")


class RuleTask(Protocol):
    """What rules need to know of a task.

    Where it has a method `column_values(columns)`, rules see the columns by the names that it gives, else the prepared
    columns as they are.
    """

    num_classes: int
    class_names: Sequence[str] | None


@dataclass(frozen=True, kw_only=True)
class Rule:
    """A rule by name; `votes` gives class ids, int64 `[B]`, -1 where it abstains; `weight` is above 0.

    `identity` (JSON) says what it is: as it was written, the class it votes for, the code it reaches.
    """

    name: str
    weight: float
    votes: Callable[[Values], NDArray[np.int64]]
    identity: Mapping[str, Any]


class RuleSet:
    """The rules of one task, in their order."""

    def __init__(self, rules: Sequence[Rule], task: RuleTask) -> None:
        self.rules, self.num_classes = tuple(rules), task.num_classes
        self._column_values = getattr(task, "column_values", dict)

    @classmethod
    def read(cls, rules: Rules, task: RuleTask, root: Path) -> RuleSet:
        """Rules of a YAML file (below `root`) or a list. Raises `ConfigError` naming the rule and what is wrong."""
        specs, where = _load(rules, root)
        parsed = [_parse_rule(spec, task, root, f"{where}: rule {index + 1}") for index, spec in enumerate(specs)]
        names = [rule.name for rule in parsed]
        twice = [name for name in dict.fromkeys(names) if names.count(name) > 1]
        if twice:
            raise ConfigError(f"{where}: {names.count(twice[0])} rules have the name {twice[0]!r}")
        return cls(parsed, task)

    @property
    def names(self) -> list[str]:
        """Names `[L]`."""
        return [rule.name for rule in self.rules]

    @property
    def weights(self) -> NDArray[np.float64]:
        """Weights `[L]`."""
        return np.array([rule.weight for rule in self.rules])

    @property
    def identity(self) -> list[dict[str, Any]]:
        """JSON values of whatever changes the votes."""
        return [dict(rule.identity) for rule in self.rules]

    def votes(self, columns: Columns) -> NDArray[np.int64]:
        """What every rule says of prepared rows: class ids `[B, L]`, -1 where it abstains.

        Raises `ConfigError` where a condition does not fit its column, `TeacherError` where a function fails.
        """
        values = self._column_values(columns)
        return np.stack([rule.votes(values) for rule in self.rules], axis=1)


def is_covered(votes: NDArray[np.int64]) -> NDArray[np.bool_]:
    """In which rows `[B]` of votes `[B, L]` any rule votes."""
    return np.asarray((votes != ABSTAIN).any(axis=1))


def digests_of(rules: Any, root: Path) -> dict[str, str]:
    """Digests of a rules file and of the code that rules reach, by name. Raises `ConfigError`."""
    specs, where = _load(rules, root)
    digests = {rules: digest_file(root / rules)} if isinstance(rules, str) else {}
    for spec in specs:
        if isinstance(spec, Mapping) and isinstance(spec.get("function"), str):
            function = resolve(spec["function"], root, where)
            code = source_digests(function, load_module(spec["function"], root, where).__name__)
            digests = joined(digests, code)
    return digests


def _brief(value: Any) -> str:
    return f"a mapping with {', '.join(map(str, value))}" if isinstance(value, Mapping) else repr(value)[:80]


def _load(rules: Any, root: Path) -> tuple[list[Any], str]:
    """What stands in a rules file or list, and how messages name it."""
    if isinstance(rules, str) and not (root / rules).is_file():
        raise ConfigError(f"rules: there is no file {root / rules}; expected a YAML list of rules, or the list itself")
    specs, where = (load_yaml(root / rules), rules) if isinstance(rules, str) else (rules, "rules")
    if not isinstance(specs, list) or not specs:
        raise ConfigError(f"{where}: expected a list of rules, each with a name (found {_brief(specs)})")
    return specs, where


def _parse_rule(spec: Any, task: RuleTask, root: Path, where: str) -> Rule:
    if not isinstance(spec, Mapping) or not isinstance(spec.get("name"), str) or not spec["name"]:
        raise ConfigError(f"{where}: expected a mapping with a name (found {spec!r})")
    where = f"{where} ({spec['name']})"
    unknown = [key for key in spec if key not in _KEYS]
    if unknown:
        raise ConfigError(
            f"{where}.{unknown[0]}: unknown key (the keys here are {', '.join(_KEYS)}){did_you_mean(unknown[0], _KEYS)}"
        )
    weight = spec.get("weight", 1.0)
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < math.inf:
        raise ConfigError(f"{where}.weight: expected a number above 0 (found {weight!r})")
    if ("when" in spec) == ("function" in spec):
        raise ConfigError(f"{where}: expected either `when` and `label`, or `function`")
    if "function" in spec:
        votes, meaning = _parse_function(spec, task.num_classes, root, where)
    else:
        votes, meaning = _parse_when(spec, task, where)
    return Rule(name=spec["name"], weight=float(weight), votes=votes, identity={**spec, "weight": weight, **meaning})


_Parsed = tuple[Callable[[Values], NDArray[np.int64]], dict[str, Any]]


def _parse_when(spec: Mapping[str, Any], task: RuleTask, where: str) -> _Parsed:
    if "label" not in spec:
        raise ConfigError(f"{where}.label: missing; expected the class that the rule votes for")
    condition, label = parse_condition(spec["when"], f"{where}.when"), _class_id(spec["label"], task, f"{where}.label")

    def votes(values: Values) -> NDArray[np.int64]:
        return np.where(condition(values).holds, label, ABSTAIN)

    return votes, {"label": label}


def _class_id(label: Any, task: RuleTask, where: str) -> int:
    names = list(task.class_names or ())
    if isinstance(label, str) and label in names:
        return names.index(label)
    if isinstance(label, int) and not isinstance(label, bool) and 0 <= label < task.num_classes:
        return label
    choices = f"{', '.join(names)} or " if names else ""
    raise ConfigError(
        f"{where}: expected a class: {choices}a number in 0..{task.num_classes - 1} (found {label!r})"
        f"{did_you_mean(label, names)}"
    )


def _parse_function(spec: Mapping[str, Any], num_classes: int, root: Path, where: str) -> _Parsed:
    if "label" in spec:
        raise ConfigError(f"{where}.label: a function gives its labels itself; leave it out")
    path, where = spec["function"], f"{where}.function"
    if not isinstance(path, str):
        raise ConfigError(f'{where}: expected a path such as "my_rules.py:name" (found {path!r})')
    function, module = resolve(path, root, where), load_module(path, root, where)

    def votes(values: Values) -> NDArray[np.int64]:
        num_rows = len(next(iter(values.values())))
        try:
            given = np.asarray(function(values))
        except Exception as error:
            if is_out_of_memory(error):
                raise
            raise TeacherError(f"{where}: {path} failed: {type(error).__name__}: {error}") from error
        expected = f"expected whole numbers of shape [{num_rows}], a class in 0..{num_classes - 1} or -1 to abstain"
        if given.dtype.kind not in "iu" or given.shape != (num_rows,):
            raise TeacherError(f"{where}: {path} gave {given.dtype} of shape {list(given.shape)}; {expected}")
        wrong = given[(given < ABSTAIN) | (given >= num_classes)]
        if len(wrong):
            raise TeacherError(f"{where}: {path} gave {wrong[0]}; {expected}")
        return given.astype(np.int64)

    return votes, {"sources": source_digests(function, module.__name__)}
