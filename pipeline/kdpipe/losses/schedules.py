"""Weights of terms that change over a training."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from kdpipe.errors import ConfigError

ScheduleKind = Literal["constant", "warmup", "linear", "cosine"]


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How a term's weight changes over the steps of a training. It depends on the step alone.

    `warmup`: from 0 to the weight, evenly over the first `fraction` of the steps, as Zhao et al. 2022 do with DKD over
    20 epochs. `linear`, `cosine`: from the weight in the first step to `to` in the last, evenly or by half a cosine.
    """

    kind: ScheduleKind = "constant"
    fraction: float | None = None
    to: float | None = None

    def __post_init__(self) -> None:
        """Refuse parameters of another kind, and those that mean nothing."""
        if self.kind not in get_args(ScheduleKind):
            raise ConfigError(f"kind {self.kind!r} is unknown; the choices are {', '.join(get_args(ScheduleKind))}")
        wanted = {"constant": None, "warmup": "fraction"}.get(self.kind, "to")
        for key in ("fraction", "to"):
            if (getattr(self, key) is not None) != (key == wanted):
                problem = f"is missing; {self.kind} needs it" if key == wanted else f"does not go with {self.kind}"
                raise ConfigError(f"{key} {problem}")
        if self.fraction is not None and not 0 < self.fraction <= 1:
            raise ConfigError(f"fraction is {self.fraction}; expected a share of the steps, above 0 and up to 1")
        if self.to is not None and not 0 <= self.to < math.inf:
            raise ConfigError(f"to is {self.to}; expected a weight of 0 or more")

    def weight_at(self, weight: float, step: int, steps: int) -> float:
        """The weight in step 0 to `steps - 1`."""
        if self.fraction is not None:
            return weight * min(1.0, (step + 1) / max(1, round(steps * self.fraction)))
        if self.to is None:
            return weight
        progress = step / max(1, steps - 1)
        if self.kind == "cosine":
            progress = 0.5 * (1 - math.cos(math.pi * progress))
        return weight + progress * (self.to - weight)


CONSTANT = Schedule()
