"""A preprocess whose own errors name it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from kdpipe.data.columns import Columns, layout_of
from kdpipe.errors import ConfigError, at, naming
from kdpipe.inputs import Inputs, described, kind, tensors_of
from kdpipe.preprocess.base import Preprocess, State


class NamedPreprocess:
    """Another preprocess: what it raises names it, and what it makes has as many rows as it was given.

    All else (its class, `offers`, `lengths`, …) is the other one's.
    """

    def __init__(self, name: str, preprocess: Preprocess) -> None:
        """`name`: its key in params.yaml and its path, say, as messages show it."""
        self._name, self._preprocess = name, preprocess

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        """The other one's, for `isinstance`."""
        return type(self._preprocess)

    def __reduce__(self) -> tuple[type, tuple[str, Preprocess]]:
        return NamedPreprocess, (self._name, self._preprocess)

    def __getattr__(self, attribute: str) -> Any:
        return getattr(self._preprocess, attribute)

    def fit(self, blocks: Iterable[Columns]) -> None:
        """The other one's. Raises `ConfigError` where its code fails."""
        with naming(ConfigError, f"{self._name} fit fails", OSError):
            self._preprocess.fit(blocks)

    def state(self) -> State:
        """The other one's. Raises `ConfigError` where it has learnt nothing yet."""
        with at(self._name):
            return self._preprocess.state()

    def load_state(self, state: State) -> None:
        """The other one's."""
        self._preprocess.load_state(state)

    def __call__(self, columns: Columns) -> Inputs:
        """The other one's. Raises `ConfigError` where its code fails, or gives no tensors of as many rows."""
        with naming(ConfigError, lambda: f"{self._name} fails on {layout_of(columns)}", OSError), at(self._name):
            inputs = self._preprocess(columns)
        rows = len(next(iter(columns.values())))
        if not _are_inputs(inputs):
            raise ConfigError(
                f"{self._name} gives {kind(inputs)} for {layout_of(columns)}; expected a tensor with one row for each "
                f"of the {rows}, or several by name"
            )
        if any(each.ndim == 0 or len(each) != rows for each in tensors_of(inputs)):
            raise ConfigError(
                f"{self._name} gives {described(inputs)} for {layout_of(columns)}; expected one row for each of the "
                f"{rows}"
            )
        return inputs


def _are_inputs(value: Any) -> bool:
    if isinstance(value, Mapping):
        return bool(value) and all(isinstance(each, Tensor) for each in value.values())
    return isinstance(value, Tensor)
