"""What the arguments of losses, and what is given to them, may be."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, Literal, get_args, get_origin, get_type_hints

import numpy as np
import torch
from torch import Tensor

from kdpipe.errors import ConfigError
from kdpipe.targets import Targets, check_temperature, is_number

_TARGETS = get_args(Targets)
_WHOLE = (torch.int8, torch.int16, torch.int32, torch.int64)


def check_arguments(loss: Any) -> None:
    """Raise `ConfigError` unless each argument of a loss fits its type: a finite number from 0, a bool, a choice.

    Numbers of NumPy become Python's: the square of a narrow one would overflow.
    """
    hints = _hints_of(loss.__class__)
    for each in fields(loss):
        value, hint = getattr(loss, each.name, None), hints[each.name]
        if each.name == "temperature":
            check_temperature(value)
        elif hint is float and not (is_number(value) and 0 <= value < math.inf):
            raise ConfigError(f"{each.name} is {value}; expected a number from 0")
        elif hint is bool and not isinstance(value, bool):
            raise ConfigError(f"{each.name} is {value!r}; expected true or false")
        elif get_origin(hint) is Literal and value not in get_args(hint):
            raise ConfigError(f"{each.name} is {value!r}; the choices are {', '.join(get_args(hint))}")
        if isinstance(value, np.number):
            object.__setattr__(loss, each.name, value.item())


@functools.cache
def _hints_of(kind: type[object]) -> Mapping[str, Any]:
    return get_type_hints(kind)


def check_labels(name: str, labels: Any, rows: tuple[int, ...], num_classes: int) -> Tensor:
    """Labels of rows of this shape, int64. Raises `ConfigError` where they are absent, or no labels of such rows.

    That a label is no class is seen on a CPU only: elsewhere looking would wait for the device.
    """
    expected = f"expected an integer tensor of shape {list(rows)}, a label per row, -1 where there is none"
    if labels is None:
        raise ConfigError(f"{name} needs labels, and got none; {expected}")
    if not isinstance(labels, Tensor) or labels.dtype not in _WHOLE or tuple(labels.shape) != tuple(rows):
        raise ConfigError(f"{name} got labels that are {described(labels)}; {expected}")
    if labels.device.type == "cpu" and labels.numel() and int(labels.max()) >= num_classes:
        raise ConfigError(f"{name} got the label {int(labels.max())}; expected 0 to {num_classes - 1}, or -1 for none")
    return labels.long()


def check_logits(logits: Any) -> None:
    """Raise `ConfigError` unless they are a tensor of numbers with a decimal point, `[B, ..., C]`."""
    if not isinstance(logits, Tensor) or not logits.dtype.is_floating_point or logits.ndim < 2:
        raise ConfigError(f"the student's logits are {described(logits)}; expected a float tensor [B, ..., C]")


def check_targets(targets: Any, what: str = "targets") -> None:
    """Raise `ConfigError` unless they are what a store gives."""
    if not isinstance(targets, _TARGETS):
        raise ConfigError(
            f"{what} are {described(targets)}; expected what a store gives: store.targets(sample_ids), or of logits in "
            "memory kdpipe.targets.DenseTargets.of(logits)"
        )


def described(value: Any) -> str:
    """Kind, and of a tensor dtype and shape, for a message."""
    if isinstance(value, Tensor):
        return f"a tensor of {value.dtype} {list(value.shape)}"
    return "nothing" if value is None else f"a {type(value).__name__}"
