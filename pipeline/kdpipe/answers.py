"""What models say about rows: a few numbers per position, whatever the number of rows, tokens and classes.

A position is a row, or a token that counts. Logits are looked at block by block and let go. Shapes: B batch, T tokens,
N positions, C classes. All at T = 1, in nats.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from kdpipe.batches import Batch, Rows
from kdpipe.data.prepared import MISSING_LABEL
from kdpipe.devices import compute_device
from kdpipe.errors import ConfigError, TrainingError
from kdpipe.inputs import Head, call, trimmed
from kdpipe.losses import forward_kl, reverse_kl
from kdpipe.store.aligned import AlignedTargets
from kdpipe.targets import DenseTargets, SampledTargets, SparseTargets, Targets

NUMBERS_AT_ONCE = 2**22
"""Logits that are looked at together: 32 MB in float64."""


@dataclass(frozen=True, kw_only=True)
class Answers:
    """What a model says at each position `[N]`, and the label there (-1: none).

    Its class, the class's probability, the entropy, and the label's negative log-likelihood (NaN without a label; None
    where it is not known). `spoken` is False where it abstained. `probabilities [N, C]` are None where not kept.
    """

    labels: NDArray[np.int64]
    top1: NDArray[np.int64]
    confidence: NDArray[np.float64]
    entropy: NDArray[np.float64]
    spoken: NDArray[np.bool_]
    nll: NDArray[np.float64] | None
    probabilities: NDArray[np.float64] | None = None

    @classmethod
    def of_logits(cls, logits: Tensor, labels: Tensor, *, keep_probabilities: bool = False) -> Answers:
        """Answers of logits `[N, C]` where the labels are `[N]`."""
        log_probs = torch.log_softmax(logits.double(), dim=-1)
        probabilities = log_probs.exp()
        confidence, top1 = probabilities.max(dim=-1)
        return cls(
            labels=_array(labels),
            top1=_array(top1),
            confidence=_array(confidence),
            entropy=_array(torch.special.entr(probabilities).sum(dim=-1)),
            spoken=np.ones(len(logits), np.bool_),
            nll=_array(_nll(log_probs, labels)),
            probabilities=_array(probabilities) if keep_probabilities else None,
        )

    @classmethod
    def of_targets(
        cls,
        statistics: Mapping[str, NDArray[np.float32]],
        targets: Targets,
        labels: Tensor,
        *,
        keep_probabilities: bool = False,
    ) -> Answers:
        """A teacher's answers: class, confidence and entropy as its store notes them whatever the encoding.

        The rest comes from the targets, where they tell: dense ones always, sparse ones while they keep every label.
        """
        covered = torch.ones_like(labels, dtype=torch.bool) if targets.covered is None else targets.covered
        probabilities = None
        if keep_probabilities and isinstance(targets, DenseTargets):
            probabilities = _array(_log_probs(targets).exp())
        nll = _known_nll(targets, torch.where(covered, labels, MISSING_LABEL))
        return cls(
            labels=_array(labels),
            top1=statistics["top1"].astype(np.int64),
            confidence=statistics["confidence"].astype(np.float64),
            entropy=statistics["entropy"].astype(np.float64),
            spoken=_array(covered),
            nll=None if nll is None else _array(nll),
            probabilities=probabilities,
        )

    def labelled(self) -> Answers:
        """Positions that have a label and are spoken about."""
        return _changed(self, lambda values: values[(self.labels != MISSING_LABEL) & self.spoken])


@dataclass(frozen=True, kw_only=True)
class Distance:
    """KL(teacher || model) and KL(model || teacher) at each position `[N]`; the latter is None for sampled targets."""

    kl: NDArray[np.float64]
    reverse_kl: NDArray[np.float64] | None

    @classmethod
    def of_logits(cls, logits: Tensor, targets: Targets) -> Distance:
        """Of logits `[N, C]` from targets of the same positions; some number where they are not covered."""
        wide = logits.double()
        reverse = None if isinstance(targets, SampledTargets) else _array(reverse_kl(wide, targets))
        return cls(kl=_array(forward_kl(wide, targets)), reverse_kl=reverse)


@torch.inference_mode()
def predict(model: nn.Module, rows: Rows, batch_size: int, head: Head) -> Iterator[tuple[Batch, Tensor]]:
    """Batches of `rows` in their order, with the model's logits `[B, C]` or `[B, T, C]` in float32, on its device."""
    device = compute_device()
    model = model.eval().to(device)
    for part in _parts(rows.rows, batch_size):
        batch = rows.batch(part).to(device)
        yield batch, head(call(model, trimmed(batch.inputs))).float()


@torch.inference_mode()
def examine(
    model: nn.Module, rows: Rows, batch_size: int, head: Head, *, keep_probabilities: bool = False
) -> tuple[Answers, dict[str, Distance]]:
    """What a model says about `rows`, and its distance from the `logits` of each teacher in `rows.targets`.

    Raises `ConfigError` for logits that are not one vector per label, `TrainingError` for NaN.
    """
    answers: list[Answers] = []
    distances: dict[str, list[Distance]] = {teacher: [] for teacher in rows.targets}
    for batch, logits in predict(model, rows, batch_size, head):
        _check_logits(logits, batch.labels)
        for some in _masks(_counted(batch.labels), logits.shape[-1]):
            said = logits[some[:, : logits.shape[1]] if some.ndim == 2 else some]
            answers.append(Answers.of_logits(said, batch.labels[some], keep_probabilities=keep_probabilities))
            for teacher, each in distances.items():
                each.append(Distance.of_logits(said, batch.targets[teacher]["logits"][some]))
    return _joined(answers), {teacher: _joined(each) for teacher, each in distances.items()}


def teacher_answers(
    rows: Rows, teacher: AlignedTargets, batch_size: int, *, keep_probabilities: bool = False
) -> Answers:
    """What a teacher said about `rows`, out of its store."""
    answers = []
    for part in _parts(rows.rows, batch_size):
        labels = torch.from_numpy(rows.labels_of(part, rows.inputs.read(part)))
        targets, statistics = teacher.read(part)["logits"], teacher.statistics(part)
        for some in _masks(_counted(labels), _width(targets)):
            noted = {name: values[some.numpy()] for name, values in statistics.items()}
            answers.append(
                Answers.of_targets(noted, targets[some], labels[some], keep_probabilities=keep_probabilities)
            )
    return _joined(answers)


def _log_probs(targets: DenseTargets) -> Tensor:
    """`[N, C]` in float64."""
    return torch.log_softmax(targets.softened(1.0).double(), dim=-1)


def _nll(log_probs: Tensor, labels: Tensor) -> Tensor:
    """`-log p` of the labels `[N]`, NaN where there is none."""
    values = -log_probs.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return torch.where(labels == MISSING_LABEL, math.nan, values)


def _known_nll(targets: Targets, labels: Tensor) -> Tensor | None:
    """A teacher's, or None where the targets do not hold the probability of every label."""
    if isinstance(targets, DenseTargets):
        return _nll(_log_probs(targets), labels)
    if not isinstance(targets, SparseTargets):
        return None
    kept = (targets.ids == labels.unsqueeze(-1)) & ~torch.isneginf(targets.head)
    if not kept.any(dim=-1)[labels != MISSING_LABEL].all():
        return None
    values = -torch.where(kept, targets.head.double(), 0.0).sum(dim=-1)
    return torch.where(labels == MISSING_LABEL, math.nan, values)


def _parts(rows: NDArray[np.int64], size: int) -> Iterator[NDArray[np.int64]]:
    return (rows[start : start + size] for start in range(0, len(rows), size))


def _counted(labels: Tensor) -> Tensor:
    """Which positions count, bool like the labels: every row `[B]`, or the tokens that have a label `[B, T]`."""
    return torch.ones_like(labels, dtype=torch.bool) if labels.ndim == 1 else labels != MISSING_LABEL


def _masks(counted: Tensor, width: int) -> Iterator[Tensor]:
    """The counted positions, in order, some at a time: masks of the same shape; at least one."""
    for some in torch.split(counted.flatten().nonzero().squeeze(-1), max(1, NUMBERS_AT_ONCE // width)):
        mask = torch.zeros(counted.numel(), dtype=torch.bool, device=counted.device)
        mask[some] = True
        yield mask.view_as(counted)


def _check_logits(logits: Tensor, labels: Tensor) -> None:
    """Logits `[B, C]` for labels `[B]`; `[B, T, C]` for `[B, T]`, or shorter where no further token counts."""
    fits = logits.ndim == labels.ndim + 1 and len(logits) == len(labels)
    if fits and labels.ndim == 2:
        fits = not bool(_counted(labels)[:, logits.shape[1] :].any())
    if not fits:
        kind = "one vector per row" if labels.ndim == 1 else "one vector per token that counts"
        raise ConfigError(
            f"the model's logits have shape {list(logits.shape)} for labels of shape {list(labels.shape)}; "
            f"expected {kind}"
        )
    if logits.isnan().any():
        raise TrainingError("the model's logits are NaN for some rows. Lower train.learning_rate and train it again.")


def _width(targets: Targets) -> int:
    """Numbers per position."""
    return (targets.ids if isinstance(targets, SparseTargets | SampledTargets) else targets).shape[-1]


def _array(values: Tensor) -> NDArray[Any]:
    array: NDArray[Any] = values.cpu().numpy()
    return array


_Kind = TypeVar("_Kind", Answers, Distance)


def _changed(each: _Kind, change: Callable[[NDArray[Any]], NDArray[Any]]) -> _Kind:
    """The same with every array changed."""
    arrays = {field.name: getattr(each, field.name) for field in fields(each)}
    changed: dict[str, Any] = {name: None if values is None else change(values) for name, values in arrays.items()}
    return type(each)(**changed)


def _joined(parts: Sequence[_Kind]) -> _Kind:
    """Consecutive positions as one; what one of the parts does not know is not known."""
    joined: dict[str, Any] = {}
    for field in fields(parts[0]):
        values = [getattr(each, field.name) for each in parts]
        joined[field.name] = None if any(each is None for each in values) else np.concatenate(values)
    return type(parts[0])(**joined)
