"""Conditions of declarative rules: what YAML says about columns, as functions of their values.

    {column: age, at_least: 18, below: 65}        is, in; below, at_most, above, at_least; missing
    {column: text, words: [refund, money back]}   contains, words, matches
    {all: […]}  {any: […]}  {not: …}

Where a value is missing, a condition on it neither holds nor fails (Kleene 1952), so its negation does not hold either.
Shapes: B rows.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from kdpipe.config import did_you_mean
from kdpipe.errors import ConfigError

Values: TypeAlias = Mapping[str, Any]
"""Column name -> its values `[B]`: numbers (NaN where missing), or an object array of str (None where missing)."""
Bools: TypeAlias = NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class Truth:
    """Rows in which a condition holds and rows in which it fails, `[B]` each; neither where a value is missing."""

    holds: Bools
    fails: Bools


Condition: TypeAlias = Callable[[Values], Truth]

_COMPARISONS: Mapping[str, Callable[[Any, Any], Any]] = {
    "below": operator.lt,
    "at_most": operator.le,
    "above": operator.gt,
    "at_least": operator.ge,
}
_SEARCHES = ("contains", "words", "matches")
_TESTS = ("is", "in", *_COMPARISONS, *_SEARCHES, "missing")


_WHOLE_NUMBERS = 2**24
"""Below it, float32 holds every whole number."""


def parse_condition(spec: Any, where: str) -> Condition:
    """A condition as YAML gives it. Raises `ConfigError` naming the place and the choices."""
    if not isinstance(spec, Mapping) or not spec:
        raise ConfigError(f"{where}: expected a condition such as {{column: age, below: 10}} (found {spec!r})")
    combined = [key for key in ("all", "any", "not") if key in spec]
    if not combined:
        return _parse_column(spec, where)
    key = combined[0]
    if len(spec) > 1:
        others = ", ".join(str(each) for each in spec if each != key)
        raise ConfigError(f"{where}: {key!r} stands alone in its condition (found {others} beside it)")
    if key == "not":
        return _negation(parse_condition(spec[key], f"{where}.not"))
    parts = spec[key]
    if not isinstance(parts, list) or not parts:
        raise ConfigError(f"{where}.{key}: expected a list of conditions (found {parts!r})")
    conditions = [parse_condition(each, f"{where}.{key}.{index}") for index, each in enumerate(parts)]
    return _conjunction(conditions) if key == "all" else _disjunction(conditions)


def _negation(condition: Condition) -> Condition:
    def negated(values: Values) -> Truth:
        truth = condition(values)
        return Truth(holds=truth.fails, fails=truth.holds)

    return negated


def _conjunction(conditions: Sequence[Condition]) -> Condition:
    def every(values: Values) -> Truth:
        truths = [condition(values) for condition in conditions]
        return Truth(
            holds=np.logical_and.reduce([each.holds for each in truths]),
            fails=np.logical_or.reduce([each.fails for each in truths]),
        )

    return every


def _disjunction(conditions: Sequence[Condition]) -> Condition:
    return _negation(_conjunction([_negation(each) for each in conditions]))


def _parse_column(spec: Mapping[Any, Any], where: str) -> Condition:
    tests = {key: value for key, value in spec.items() if key != "column"}
    unknown = [key for key in tests if key not in _TESTS]
    if unknown:
        choices = ("column", *_TESTS, "all", "any", "not")
        raise ConfigError(
            f"{where}.{unknown[0]}: unknown key (the keys here are {', '.join(choices)})"
            f"{did_you_mean(unknown[0], choices)}"
        )
    column = spec.get("column")
    if not isinstance(column, str):
        raise ConfigError(f"{where}.column: expected the name of a column (found {column!r})")
    if not tests:
        raise ConfigError(f"{where}: what of {column!r}? Expected one of {', '.join(_TESTS)}")
    return _conjunction([_parse_test(column, test, value, f"{where}.{test}") for test, value in tests.items()])


def _parse_test(column: str, test: str, value: Any, where: str) -> Condition:
    if test == "missing":
        if not isinstance(value, bool):
            raise ConfigError(f"{where}: expected true or false (found {value!r})")
        return _missing(column, value, where)
    if test in _COMPARISONS:
        compare, bound = _COMPARISONS[test], _number(value, where)
        return _numbers(column, lambda found: compare(found, bound), where)
    if test in _SEARCHES:
        pattern = _pattern(test, value, where)
        return _texts(column, lambda text: pattern.search(text) is not None, where)
    choices = value if test == "in" else [value]
    if not isinstance(choices, list) or not choices:
        raise ConfigError(f"{where}: expected a list of values (found {value!r})")
    if all(isinstance(each, str) for each in choices):
        return _texts(column, frozenset(choices).__contains__, where)
    numbers = [_number(each, where, or_text=True) for each in choices]
    return _numbers(column, lambda found: _is_among(found, numbers, where), where)


def _number(value: Any, where: str, or_text: bool = False) -> float:
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise ConfigError(f"{where}: expected a number{' or text' if or_text else ''} (found {value!r})")
    return float(value)


def _is_among(found: NDArray[Any], numbers: Sequence[float], where: str) -> Bools:
    large = [each for each in numbers if abs(each) >= _WHOLE_NUMBERS]
    if found.dtype == np.float32 and large:
        raise ConfigError(
            f"{where}: {large[0]:.0f} cannot be told from its neighbours, as the rows' numbers are float32, which hold "
            f"whole ones below {_WHOLE_NUMBERS} only. Make the column a category (task.categorical)"
        )
    # Rounded as the column is: 0.1 is among float32 values too.
    among: Bools = np.isin(found, np.asarray(numbers, found.dtype if found.dtype.kind == "f" else np.float64))
    return among


def _pattern(test: str, value: Any, where: str) -> re.Pattern[str]:
    """`matches`: a regular expression as it stands. `contains`, `words`: any of these, whatever their case."""
    if test == "matches":
        if not isinstance(value, str):
            raise ConfigError(f"{where}: expected a regular expression (found {value!r})")
        try:
            return re.compile(value)
        except re.error as error:
            raise ConfigError(f"{where}: {value!r} is no regular expression: {error}") from None
    words = [value] if isinstance(value, str) else value
    if not isinstance(words, list) or not words or not all(isinstance(each, str) and each for each in words):
        raise ConfigError(f"{where}: expected words (found {value!r}); quote those that YAML takes for something else")
    either = "|".join(re.escape(each) for each in words)
    return re.compile(rf"(?<!\w)(?:{either})(?!\w)" if test == "words" else either, re.IGNORECASE)


def _numbers(column: str, test: Callable[[Any], Any], where: str) -> Condition:
    def condition(values: Values) -> Truth:
        found = _column(values, column, where)
        if _is_text(found):
            raise ConfigError(f"{where}: a number, but the column {column!r} is text; quote it, or take another test")
        with np.errstate(over="ignore"):  # a bound beyond float32 is infinite there
            holds, known = test(found), ~np.isnan(found)
        return Truth(holds=holds & known, fails=~holds & known)

    return condition


def _texts(column: str, test: Callable[[str], bool], where: str) -> Condition:
    def condition(values: Values) -> Truth:
        found = _column(values, column, where)
        if not _is_text(found):
            raise ConfigError(f"{where}: about text, but the column {column!r} holds numbers")
        known = ~_is_missing(found)
        holds = np.fromiter((text is not None and test(text) for text in found.tolist()), np.bool_, len(found))
        return Truth(holds=holds, fails=~holds & known)

    return condition


def _missing(column: str, wanted: bool, where: str) -> Condition:
    def condition(values: Values) -> Truth:
        missing = _is_missing(_column(values, column, where))
        return Truth(holds=missing == wanted, fails=missing != wanted)

    return condition


def _column(values: Values, column: str, where: str) -> NDArray[Any]:
    if column not in values:
        raise ConfigError(
            f"{where}: there is no column {column!r}; there are {', '.join(values) or 'none'}"
            f"{did_you_mean(column, values)}"
        )
    found = values[column]
    if not isinstance(found, np.ndarray) or found.ndim != 1 or found.dtype.kind not in "biufOUT":
        raise ConfigError(
            f"{where}: the column {column!r} does not hold one number or text per row; write a rule in Python about it"
        )
    return found


def _is_text(found: NDArray[Any]) -> bool:
    return found.dtype.kind in "OUT"


def _is_missing(found: NDArray[Any]) -> Bools:
    if _is_text(found):
        return np.fromiter((text is None for text in found.tolist()), np.bool_, len(found))
    missing: Bools = np.isnan(found)
    return missing
