"""Losses for one's own training loop."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from kdpipe.errors import ConfigError
from kdpipe.losses.base import DistillLoss, needs_labels, needs_whole_batch, valid_rows, values_of
from kdpipe.losses.checking import check_labels, check_logits, check_targets
from kdpipe.losses.decoupled import DKD, NKD
from kdpipe.losses.divergences import ForwardKL, GeneralisedJSD, ReverseKL, SoftTargetCE, TopKRenormKL, TotalVariation
from kdpipe.losses.logits import LogitMSE
from kdpipe.losses.relational import DIST
from kdpipe.losses.vocabularies import ULD
from kdpipe.targets import SampledTargets, SparseTargets, Targets, only_where, zero_unless

LOSSES: Mapping[str, type[Any]] = {
    "forward_kl": ForwardKL,
    "reverse_kl": ReverseKL,
    "soft_target_ce": SoftTargetCE,
    "gjsd": GeneralisedJSD,
    "total_variation": TotalVariation,
    "logit_mse": LogitMSE,
    "topk_renorm_kl": TopKRenormKL,
    "dkd": DKD,
    "nkd": NKD,
    "dist": DIST,
    "uld": ULD,
}
"""What `kd_loss` calls them."""


def kd_loss(
    logits: Tensor,
    targets: Targets,
    *,
    temperature: float | None = None,
    loss: str | DistillLoss = "forward_kl",
    labels: Tensor | None = None,
    allow_interpolation: bool = False,
) -> Tensor:
    """Distillation loss for your own loop: the mean over valid rows (or tokens), a scalar; 0 if there is none.

    Student logits `[B, ..., C]`; targets from `store.targets(sample_ids)`. `loss` is a name of `LOSSES`, at its own
    default where `temperature` is None; or any `DistillLoss`, which has a temperature of its own. `labels [B, ...]` are
    for a loss that needs them (-1: none); a row without is left out, as is one that is not covered.
    `allow_interpolation` between the temperatures of sparse targets, see `SparseTargets.tail_bounds`. Raises
    `ConfigError`.
    """
    loss = _loss(loss, temperature, allow_interpolation)
    check_logits(logits)
    check_targets(targets)
    if labels is not None and needs_labels(loss):
        labels = check_labels(type(loss).__name__, labels, tuple(logits.shape[:-1]), logits.shape[-1])
    valid = valid_rows(loss, targets, labels)
    counts = targets.covered if needs_whole_batch(loss) else valid
    if counts is not None and logits.shape[: counts.ndim] == counts.shape:
        # Whatever stands in rows that do not count, NaN too, has no part in the gradient.
        targets = only_where(counts, targets)
        is_sparse = isinstance(targets, SparseTargets | SampledTargets)  # of whose logits there is to be no copy
        logits = _counted(logits, counts) if is_sparse else zero_unless(counts, logits)
    values = values_of(loss, logits, targets, labels)
    if valid is None:
        return values.sum() / max(1, values.numel())
    return torch.where(valid, values, 0.0).sum() / valid.sum().clamp(min=1)


def _counted(logits: Tensor, counts: Tensor) -> Tensor:
    counted: Tensor = _Counted.apply(logits, counts)  # type: ignore[no-untyped-call]
    return counted


class _Counted(torch.autograd.Function):
    """Logits as they are; what their gradient has of NaN by rows that do not count, `[B, ...]`, becomes 0.

    A copy of the gradient is made only then: without NaN there, those rows' gradient is what the loss says, 0.
    """

    @staticmethod
    def forward(logits: Tensor, counts: Tensor) -> Tensor:
        return logits.view_as(logits)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        """Keep what `backward` needs."""
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        """The gradient by the logits."""
        (counts,) = ctx.saved_tensors
        is_finite = bool(torch.isfinite(gradient.sum()))
        return gradient if is_finite else gradient.masked_fill(~counts.unsqueeze(-1), 0.0), None


def _loss(loss: str | DistillLoss, temperature: float | None, allow_interpolation: bool) -> DistillLoss:
    asked: dict[str, Any] = {} if temperature is None else {"temperature": temperature}
    if allow_interpolation:
        asked["allow_interpolation"] = True
    if not isinstance(loss, str):
        if isinstance(loss, type) or not isinstance(loss, DistillLoss):
            raise ConfigError(
                f"loss is {loss!r}; expected one of {', '.join(LOSSES)}, or a loss object such as "
                "ForwardKL(temperature=2)"
            )
        if asked:
            raise ConfigError(
                f"kd_loss got {', '.join(asked)} and a {type(loss).__name__}, which has its own; set it there"
            )
        return loss
    if loss not in LOSSES:
        raise ConfigError(f"loss {loss!r} is unknown; the choices are {', '.join(LOSSES)}")
    kind = LOSSES[loss]
    if allow_interpolation and "allow_interpolation" not in kind.__dataclass_fields__:
        raise ConfigError(f"loss {loss!r} interpolates no temperature; leave allow_interpolation out")
    made: DistillLoss = kind(**asked)
    return made
