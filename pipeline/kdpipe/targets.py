"""What the teacher said, as a loss sees it.

Shapes: B batch, C classes, K kept classes, N stored temperatures, D width; `...` stands for further axes (tokens).
T is the temperature.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, TypeGuard, TypeVar

import numpy as np
import torch
from torch import Tensor

from kdpipe.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class OutputSpec:
    """One thing that a teacher emits: a name, its shape per row, and what it is."""

    name: str
    shape: tuple[int, ...]
    kind: Literal["logits", "features"] = "logits"


_COLDEST, _HOTTEST = 1e-15, 1e15
"""Squares of temperatures, and logits divided by them, must be numbers in float32."""


def is_number(value: object) -> TypeGuard[float]:
    """Whether a value is one number, of Python or NumPy, and no bool."""
    return isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)


def check_temperature(temperature: object) -> None:
    """Raise `ConfigError` for a temperature that means nothing."""
    if not _is_temperature(temperature):
        raise ConfigError(
            f"temperature is {temperature!r}; expected a number above 0, from {_COLDEST:g} to {_HOTTEST:g}"
        )


def check_temperatures(temperatures: Sequence[object]) -> None:
    """Raise `ConfigError` unless there are some, and each means something."""
    if not temperatures or not all(map(_is_temperature, temperatures)):
        raise ConfigError(
            f"temperatures are {list(temperatures)}; expected numbers above 0, from {_COLDEST:g} to {_HOTTEST:g}"
        )


def _is_temperature(value: object) -> bool:
    number = value.item() if isinstance(value, np.number) else value  # a narrow one compares with narrow bounds
    return is_number(number) and _COLDEST <= number <= _HOTTEST


@dataclass(frozen=True, kw_only=True)
class DenseTargets:
    """Teacher logits of every class: `z - max` as `values [B, ..., C]`, the row's maximum as `row_max [B, ...]`.

    Exact at every temperature. A masked class is -inf in `values`. `covered [B, ...]` is False where the teacher
    abstained or the token is masked out; None: covered everywhere.
    """

    values: Tensor
    row_max: Tensor
    covered: Tensor | None = None

    @classmethod
    def of(cls, logits: Tensor, covered: Tensor | None = None) -> DenseTargets:
        """Of a teacher's logits `[B, ..., C]` in memory; those of rows that are not `covered [B, ...]` may be anything.

        Half precision is widened to float32 first, or differences from the maximum would be rounded once more. Raises
        `ConfigError` for another `covered`.
        """
        if covered is not None:
            if covered.dtype != torch.bool or covered.shape != logits.shape[:-1]:
                raise ConfigError(
                    f"covered is {covered.dtype} of shape {list(covered.shape)}; expected torch.bool of shape "
                    f"{list(logits.shape[:-1])}"
                )
            logits = torch.where(covered.unsqueeze(-1), logits, 0.0)
        logits = widened(logits)
        row_max = logits.amax(dim=-1)
        return cls(values=logits - row_max.unsqueeze(-1), row_max=row_max, covered=covered)

    @property
    def shape(self) -> tuple[int, ...]:
        """`[B, ..., C]`."""
        return tuple(self.values.shape)

    @property
    def num_classes(self) -> int:
        """C."""
        return self.values.shape[-1]

    @property
    def masked(self) -> Tensor:
        """Which classes the teacher rules out, bool `[B, ..., C]`."""
        return torch.isneginf(self.values)

    def logits(self) -> Tensor:
        """The teacher's logits `[B, ..., C]`, float32 (float64 when stored so)."""
        return widened(self.values) + self.row_max.unsqueeze(-1)

    def softened(self, temperature: float, allow_interpolation: bool = False) -> Tensor:
        """Softened logits `z / T [B, ..., C]`, up to a constant per row; exact, nothing is ever interpolated.

        Raises `ConfigError` for a temperature that is no number above 0.
        """
        check_temperature(temperature)
        return widened(self.values) / temperature

    def log_probs(self, temperature: float = 1.0, allow_interpolation: bool = False) -> Tensor:
        """Log-softmax of `z / T`, `[B, ..., C]`, computed in float32 or wider."""
        return torch.log_softmax(self.softened(temperature), dim=-1)

    def double(self) -> DenseTargets:
        """The same targets in float64, and what is computed of them."""
        return replace(self, values=self.values.double(), row_max=self.row_max.double())

    def to(self, device: torch.device) -> DenseTargets:
        """The same targets on another device."""
        return _moved(self, device)

    def __getitem__(self, rows: slice | Tensor) -> DenseTargets:
        return _changed(self, lambda tensor: tensor[rows])


@dataclass(frozen=True, kw_only=True)
class SparseTargets:
    """K classes and one tail: `ids [B, ..., K]` sorted, their log-probs at T = 1 as `head [B, ..., K]`.

    `tails [B, ..., N]` is `log R_T`, the unnormalised log-mass of all other classes (logsumexp of log-prob / T), at
    each of `temperatures`. An unused place is -inf in `head`. `covered [B, ...]` as in `DenseTargets`.
    """

    ids: Tensor
    head: Tensor
    tails: Tensor
    temperatures: tuple[float, ...]
    num_classes: int
    covered: Tensor | None = None

    def softened(self, temperature: float, allow_interpolation: bool = False) -> Tensor:
        """Softened logits of K + 1 buckets, the tail last: `[B, ..., K + 1]`, up to a constant per row.

        Raises `ConfigError` for a temperature that is no number above 0, and for one that is not stored, unless
        `allow_interpolation`: see `tail_bounds`.
        """
        check_temperature(temperature)
        tail = self._tail(temperature, allow_interpolation)
        return torch.cat([self.head / temperature, tail.unsqueeze(-1)], dim=-1)

    def log_probs(self, temperature: float = 1.0, allow_interpolation: bool = False) -> Tensor:
        """Log-probabilities of K + 1 buckets at T, the tail last: `[B, ..., K + 1]`."""
        return torch.log_softmax(self.softened(temperature, allow_interpolation), dim=-1)

    def to(self, device: torch.device) -> SparseTargets:
        """The same targets on another device."""
        return _moved(self, device)

    def __getitem__(self, rows: slice | Tensor) -> SparseTargets:
        return _changed(self, lambda tensor: tensor[rows])

    def tail_bounds(self, temperature: float) -> tuple[Tensor, Tensor]:
        """What `log R_T [B, ...]` cannot go below and above, from the stored temperatures on both sides of T.

        log R is convex in beta = 1 / T (a logsumexp of lines). So it lies under the chord of the two nodes around
        beta, and above the chords of the nodes further out, extended. The interpolated value is clamped to both, so
        its error is at most upper - lower, and the head's mass is off by at most a quarter of that.

        Both are what is stored at a stored temperature. Raises `ConfigError` for another with fewer than three stored
        ones, or that is not between them.
        """
        stored = self._stored_tail(temperature)
        if stored is not None:
            return stored, stored
        if len(self.temperatures) < 3 or not min(self.temperatures) < temperature < max(self.temperatures):
            raise ConfigError(
                f"temperature {temperature:g} cannot be interpolated from {self._choices}; expected three or more "
                "stored temperatures and one between the smallest and the largest"
            )
        beta, nodes, values = 1 / temperature, *self._nodes()
        right = next(index for index, node in enumerate(nodes) if node >= beta)
        upper = _line(nodes, values, right - 1, right, beta)
        outside = [(first, first + 1) for first in (right - 2, right) if first >= 0 and first + 1 < len(nodes)]
        lower = torch.stack([_line(nodes, values, *pair, beta) for pair in outside]).amax(dim=0)
        empty = torch.isneginf(values).any(dim=-1)  # no class is left: the mass of none is 0 at every temperature
        lower, upper = (each.masked_fill(empty, -torch.inf) for each in (torch.minimum(lower, upper), upper))
        return lower, upper

    def _stored_tail(self, temperature: float) -> Tensor | None:
        for index, stored in enumerate(self.temperatures):
            if math.isclose(stored, temperature, rel_tol=1e-9):
                return self.tails[..., index]
        return None

    def _tail(self, temperature: float, allow_interpolation: bool) -> Tensor:
        stored = self._stored_tail(temperature)
        if stored is not None:
            return stored
        if not allow_interpolation:
            between = len(self.temperatures) > 2 and min(self.temperatures) < temperature < max(self.temperatures)
            raise ConfigError(
                f"temperature {temperature:g} is not stored; these targets have {self._choices}. Cache it "
                "(temperatures: of the encoding)" + (", or set allow_interpolation: true" if between else "")
            )
        return self._interpolated(temperature)

    @property
    def _choices(self) -> str:
        return ", ".join(f"{stored:g}" for stored in self.temperatures)

    def _interpolated(self, temperature: float) -> Tensor:
        """The polynomial in beta through the nearest nodes, clamped to what convexity allows.

        Measured at T = 1.25 to 10 with T = 1, 4/3, 2, 4, 10 stored: the head's mass is off by at most 0.005 (language
        model, k = 64 of 131,072), 0.013 (k = 12), below 0.0001 (1,000 image classes, k = 10).
        """
        lower, upper = self.tail_bounds(temperature)
        nodes, values = self._nodes()
        beta = 1 / temperature
        nearest = sorted(range(len(nodes)), key=lambda index: abs(nodes[index] - beta))[:_NUM_NODES]
        value = torch.zeros_like(upper)
        for index in nearest:
            weight = math.prod((beta - nodes[j]) / (nodes[index] - nodes[j]) for j in nearest if j != index)
            value = value + weight * values[..., index]
        return torch.where(torch.isfinite(upper), value.clamp(lower, upper), upper)

    def _nodes(self) -> tuple[list[float], Tensor]:
        """Where log R is known: beta ascending `[N + 1]` and values `[B, ..., N + 1]`.

        At beta = 0 it is the log of the number of tail classes. Where the teacher masks some of them this is too
        large, which leaves both bounds of `tail_bounds` true.
        """
        order = sorted(range(len(self.temperatures)), key=lambda index: -self.temperatures[index])
        num_tail = self.num_classes - torch.isfinite(self.head).sum(dim=-1, keepdim=True)
        nodes = [0.0, *(1 / self.temperatures[index] for index in order)]
        return nodes, torch.cat([num_tail.to(self.tails.dtype).log(), self.tails[..., order]], dim=-1)


_NUM_NODES = 5


def _line(nodes: list[float], values: Tensor, first: int, second: int, beta: float) -> Tensor:
    """The line through two nodes at beta, `[B, ...]`."""
    share = (beta - nodes[first]) / (nodes[second] - nodes[first])
    return values[..., first] * (1 - share) + values[..., second] * share


@dataclass(frozen=True, kw_only=True)
class SampledTargets:
    """Draws from the teacher: `weights [B, ..., K]` of the classes `ids [B, ..., K]`, an unbiased estimate of p.

    A weight is 0 in an unused place. `entropy [B, ...]` is the teacher's at T = 1 in nats, so that KL is the
    cross-entropy minus it. Only for losses that are linear in the teacher's probabilities at T = 1.
    """

    ids: Tensor
    weights: Tensor
    entropy: Tensor
    num_classes: int
    covered: Tensor | None = None

    def softened(self, temperature: float, allow_interpolation: bool = False) -> Tensor:
        """Refuse: draws are no logits. Raises `ConfigError`."""
        raise ConfigError(_SAMPLED_ONLY)

    def log_probs(self, temperature: float = 1.0, allow_interpolation: bool = False) -> Tensor:
        """Refuse: the log of an unbiased estimate is biased. Raises `ConfigError`."""
        raise ConfigError(_SAMPLED_ONLY)

    def to(self, device: torch.device) -> SampledTargets:
        """The same targets on another device."""
        return _moved(self, device)

    def __getitem__(self, rows: slice | Tensor) -> SampledTargets:
        return _changed(self, lambda tensor: tensor[rows])


_SAMPLED_ONLY = (
    "sampled targets serve only losses that are linear in the teacher's probabilities at temperature 1 (forward KL, "
    "cross-entropy); found another use. Cache with encoding: topk or dense for it"
)


@dataclass(frozen=True, kw_only=True)
class FeatureTargets:
    """What the teacher computed inside: `values [B, ..., D]`. `covered [B, ...]` as in `DenseTargets`."""

    values: Tensor
    covered: Tensor | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """`[B, ..., D]`."""
        return tuple(self.values.shape)

    def to(self, device: torch.device) -> FeatureTargets:
        """The same targets on another device."""
        return _moved(self, device)

    def __getitem__(self, rows: slice | Tensor) -> FeatureTargets:
        return _changed(self, lambda tensor: tensor[rows])


@dataclass(frozen=True, kw_only=True)
class MixedTargets:
    """Several teachers' probabilities in one: `sum_k w_k softmax(z_k / T)`, with `log w` as `log_weights [B, ..., K]`.

    Exact at every temperature. `covered [B, ...]` is False where no teacher speaks. Made by `kdpipe.losses.mixed`.
    """

    parts: tuple[DenseTargets, ...]
    log_weights: Tensor
    covered: Tensor | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """`[B, ..., C]`."""
        return self.parts[0].shape

    def softened(self, temperature: float, allow_interpolation: bool = False) -> Tensor:
        """Log-probabilities of the mixture at T `[B, ..., C]`: it has no logits that are the same at every T."""
        return self.log_probs(temperature)

    def log_probs(self, temperature: float = 1.0, allow_interpolation: bool = False) -> Tensor:
        """`log sum_k w_k p_k` at T, `[B, ..., C]`, computed in float32 or wider.

        Raises `ConfigError` for a temperature that is no number above 0.
        """
        weighted = [
            log_weight.unsqueeze(-1) + part.log_probs(temperature)
            for log_weight, part in zip(self.log_weights.unbind(dim=-1), self.parts, strict=True)
        ]
        return torch.logsumexp(torch.stack(weighted), dim=0)

    def double(self) -> MixedTargets:
        """The same targets in float64, and what is computed of them."""
        return replace(self, parts=tuple(each.double() for each in self.parts), log_weights=self.log_weights.double())

    def to(self, device: torch.device) -> MixedTargets:
        """The same targets on another device."""
        return replace(_moved(self, device), parts=tuple(each.to(device) for each in self.parts))

    def __getitem__(self, rows: slice | Tensor) -> MixedTargets:
        return replace(_changed(self, lambda tensor: tensor[rows]), parts=tuple(each[rows] for each in self.parts))


Targets = DenseTargets | SparseTargets | SampledTargets | FeatureTargets | MixedTargets
"""All that a loss sees."""

_Kind = TypeVar("_Kind", bound=Targets)


def only_where(counts: Tensor, targets: _Kind) -> _Kind:
    """The same targets with zeros in rows that do not count, `counts` bool `[B, ...]`: NaN there spreads nowhere."""
    kept = _changed(targets, lambda each: zero_unless(counts, each) if each.is_floating_point() else each)
    if isinstance(kept, MixedTargets):
        return replace(kept, parts=tuple(only_where(counts, each) for each in kept.parts))
    return kept


def are_of_places(shape: Sequence[int], places: Sequence[int]) -> bool:
    """Whether values of `shape` are of `places`, the rows `[B]` or tokens `[B, T]` that a teacher speaks about.

    Those of tokens are `[B, T, D]`. Of `[B, T]`, and of maps `[B, T, H, W]`, T is how many numbers or channels a row
    has.
    """
    axes = len(places)
    return tuple(shape[:axes]) == tuple(places) and (axes == 1 or len(shape) == axes + 1)


def zero_unless(counts: Tensor, values: Tensor) -> Tensor:
    """`values [B, ...]` with zeros where `counts` is False: bool, of `values`' first axes."""
    return torch.where(spread(counts, values.ndim), values, 0)


def spread(values: Tensor, num_axes: int) -> Tensor:
    """`values [B, ...]` with axes of length 1 behind their own, `num_axes` in all, to broadcast with more of them."""
    return values.reshape(*values.shape, *[1] * (num_axes - values.ndim))


def widened(values: Tensor) -> Tensor:
    """In float32, or float64 where they are."""
    return values if values.dtype == torch.float64 else values.float()


def _moved(targets: _Kind, device: torch.device) -> _Kind:
    return _changed(targets, lambda tensor: tensor.to(device, non_blocking=True))


def _changed(targets: _Kind, change: Callable[[Tensor], Tensor]) -> _Kind:
    """The same targets with every tensor changed."""
    every = {field.name: getattr(targets, field.name) for field in fields(targets)}
    changed: dict[str, Any] = {name: change(each) for name, each in every.items() if isinstance(each, Tensor)}
    return replace(targets, **changed)
