"""What a preprocess makes and a model takes, and the logits in what the model gives back.

Shapes: B batch, T tokens, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from kdpipe.errors import ConfigError

Inputs: TypeAlias = Tensor | Mapping[str, Tensor]
"""One tensor `[B, …]`, or several by the names of `forward`'s arguments."""
LOGITS = "logits"
ATTENTION_MASK = "attention_mask"


def call(model: nn.Module, inputs: Inputs) -> Any:
    """What a model gives for its inputs."""
    return model(**inputs) if isinstance(inputs, Mapping) else model(inputs)


def changed(inputs: Inputs, change: Callable[[Tensor], Tensor]) -> Inputs:
    """The same inputs with every tensor changed."""
    return {name: change(each) for name, each in inputs.items()} if isinstance(inputs, Mapping) else change(inputs)


def tensors_of(inputs: Inputs) -> list[Tensor]:
    """Every tensor."""
    return list(inputs.values()) if isinstance(inputs, Mapping) else [inputs]


def num_rows(inputs: Inputs) -> int:
    """B."""
    return len(tensors_of(inputs)[0])


def described(inputs: Inputs) -> str:
    """Shapes, for a message."""
    if isinstance(inputs, Mapping):
        return ", ".join(f"{name} {list(each.shape)}" for name, each in inputs.items())
    return str(list(inputs.shape))


def trimmed(inputs: Inputs) -> Inputs:
    """Without the last columns that `attention_mask [B, T]` hides in every row; at least one column is left."""
    if not isinstance(inputs, Mapping) or ATTENTION_MASK not in inputs:
        return inputs
    mask = inputs[ATTENTION_MASK]
    seen = mask.any(dim=0).nonzero()
    length = int(seen[-1]) + 1 if len(seen) else 1
    return {name: each[:, :length] if each.shape[:2] == mask.shape else each for name, each in inputs.items()}


def by_name(returned: Any) -> dict[str, Any]:
    """What a model gave, by name: a tensor is `logits`, parts of tuples go by position (`1`, `hidden_states.2`)."""
    return {LOGITS: returned} if isinstance(returned, Tensor) else parts_of(returned)


def parts_of(value: Any, prefix: str = "") -> dict[str, Any]:
    """The parts of nested dicts and tuples by dotted name, below `prefix`."""
    if isinstance(value, Mapping):
        items = [(str(key), each) for key, each in value.items()]
    elif isinstance(value, tuple | list):
        fields = getattr(value, "_fields", range(len(value)))
        items = [(str(key), each) for key, each in zip(fields, value, strict=True)]
    else:
        return {prefix: value} if prefix else {}
    parts: dict[str, Any] = {}
    for key, each in items:
        parts |= parts_of(each, f"{prefix}.{key}" if prefix else key)
    return parts


def class_logits(logits: Tensor, num_classes: int) -> Tensor:
    """Logits `[B, …, C]`; the single logit z of a sigmoid head, `[B]` or `[B, 1]`, is two classes `[0, z]`."""
    if num_classes != 2 or (logits.ndim > 1 and logits.shape[-1] != 1):
        return logits
    single = logits if logits.ndim > 1 else logits.unsqueeze(-1)
    return torch.cat([torch.zeros_like(single), single], dim=-1)


def about_classes(shape: Sequence[int], num_classes: int) -> str:
    """What to do about logits of `shape` that are not of `num_classes`, for the end of a message."""
    about = f"task.num_classes is {num_classes}"
    if len(shape) > 2 and shape[-1] > num_classes:
        about += (
            f"; where a vocabulary is padded, set it to the model's number of outputs, {shape[-1]}, which teacher and "
            "student must share"
        )
    return f" ({about})"


class Head:
    """Takes the logits out of what a model gives: the output called `name`, or the only one."""

    def __init__(self, name: str | None = None, num_classes: int | None = None) -> None:
        """`name`: a key or a position (None: `logits`, or the only output)."""
        self._name, self._num_classes = name, num_classes

    def __call__(self, returned: Any) -> Tensor:
        """Logits `[B, C]` or `[B, T, C]`. Raises `ConfigError` with the outputs that there are."""
        parts = by_name(returned)
        name = self._name or (LOGITS if LOGITS in parts else next(iter(parts)) if len(parts) == 1 else LOGITS)
        logits = parts.get(name)
        if not isinstance(logits, Tensor):
            raise ConfigError(
                f"the model's forward gives no tensor {name!r}; it gives {', '.join(parts) or type(returned).__name__}."
                " Name the one that holds the logits: `logits: NAME` (or its position) beside `model:`"
            )
        return logits if self._num_classes is None else class_logits(logits, self._num_classes)
