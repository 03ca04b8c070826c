"""A task's own loss on labels, and what makes up for rare classes. A label below 0 is none, and its value is 0."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from kdpipe.errors import ConfigError
from kdpipe.losses.checking import check_labels
from kdpipe.targets import widened

_NONE = -1

LabelLoss = Callable[[Tensor, Tensor, float], Tensor]
"""Logits `[B, ..., C]`, labels `[B, ...]`, label smoothing -> one value per row `[B, ...]`."""


def cross_entropy(logits: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
    """`-(1 - e) log q_y - e/C sum log q`, e = smoothing: `[B, ..., C]` -> `[B, ...]` (Szegedy et al. 2016)."""
    labels = check_labels("cross_entropy", labels, tuple(logits.shape[:-1]), logits.shape[-1])
    values = torch.nn.functional.cross_entropy(
        widened(logits).flatten(0, -2),
        labels.flatten().clamp(min=_NONE),
        ignore_index=_NONE,
        reduction="none",
        label_smoothing=smoothing,
    )
    return values.view_as(labels)


def class_weighted(loss: LabelLoss, weights: Tensor | Sequence[float]) -> LabelLoss:
    """A label loss times the weight `[C]` of the row's class.

    A mean over rows divides by their number, so weights should be 1 on average over rows; PyTorch's `reduction="mean"`
    divides by the sum of the rows' weights. With label smoothing the whole value is weighted by the label's class.
    """
    weights = torch.as_tensor(weights)
    if not bool((weights >= 0).all()):
        raise ConfigError(f"weights are {weights.tolist()}; expected a number from 0 for each class")

    def weighted(logits: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
        _check_per_class("weights", weights, logits)
        values = loss(logits, labels, smoothing)
        return values * weights.to(values)[labels.clamp(min=0).long()]

    return weighted


def logit_adjusted(loss: LabelLoss, class_counts: Tensor | Sequence[float], tau: float = 1.0) -> LabelLoss:
    """A label loss on `z + tau log pi`, pi the share of each class `[C]` (Menon et al. 2021).

    Without the shift, as they are used, the student's logits then predict as if classes were equally frequent. Every
    class must have a count above 0.
    """
    class_counts = torch.as_tensor(class_counts)
    if not bool((class_counts > 0).all()):
        raise ConfigError(f"class_counts are {class_counts.tolist()}; expected a number above 0 for each class")

    def adjusted(logits: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
        _check_per_class("class_counts", class_counts, logits)
        wide = widened(logits)
        counts = class_counts.to(wide)
        return loss(wide + tau * (counts / counts.sum()).log(), labels, smoothing)

    return adjusted


def _check_per_class(name: str, values: Tensor, logits: Tensor) -> None:
    if values.shape != logits.shape[-1:]:
        raise ConfigError(
            f"{name} have shape {list(values.shape)}; expected one for each of {logits.shape[-1]} classes"
        )
