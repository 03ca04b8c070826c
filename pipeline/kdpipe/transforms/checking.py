"""What the arguments of transforms may be."""

from __future__ import annotations

from typing import Any

from kdpipe.errors import ConfigError
from kdpipe.targets import is_number


def check_probability(transform: object, name: str = "probability") -> None:
    """Raise `ConfigError` unless an attribute is from 0 to 1."""
    check_range(transform, name, 0, 1)


def check_range(transform: object, name: str, low: float, high: float) -> None:
    """Raise `ConfigError` unless an attribute, a number or an ascending pair, lies in `[low, high]`.

    The first of a pair is above `low`: they are sizes, and there is none of 0.
    """
    found = getattr(transform, name)
    if isinstance(found, tuple | list):
        fits = len(found) == 2 and all(map(is_number, found)) and low < found[0] <= found[1] <= high
        _refuse(
            transform,
            name,
            f"two ascending numbers above {low:g}" + ("" if high == float("inf") else f", up to {high:g}"),
            fits,
        )
    else:
        _refuse(transform, name, f"a number from {low:g} to {high:g}", is_number(found) and low <= found <= high)


def check_whole(transform: object, name: str, low: int, high: int) -> None:
    """Raise `ConfigError` unless an attribute is a whole number from `low` to `high`."""
    found = getattr(transform, name)
    fits = isinstance(found, int) and not isinstance(found, bool) and low <= found <= high
    _refuse(transform, name, f"a whole number from {low} to {high}", fits)


def _refuse(transform: object, name: str, expected: str, fits: Any) -> None:
    if not fits:
        raise ConfigError(f"{type(transform).__name__}: {name} is {getattr(transform, name)}; expected {expected}")
