"""Losses as their papers write them, in float64 and without care for overflow; and targets to try losses on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kdpipe.losses import DistillLoss, valid_rows, values_of
from kdpipe.targets import Targets
from toy_targets import dense_of, sparse_of

Definition = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Student logits `[B, C]`, teacher logits `[B, C]`, labels `[B]` -> one value per row `[B]`."""


def random_logits(seed: int, *shape: int, scale: float = 3.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def softmax(logits: Tensor, temperature: float = 1.0) -> Tensor:
    return torch.softmax(logits / temperature, dim=-1)


def kl(p: Tensor, q: Tensor) -> Tensor:
    return torch.where(p > 0, p * (p.log() - q.log()), 0.0).sum(dim=-1)


def z_scores(logits: Tensor) -> Tensor:
    return (logits - logits.mean(dim=-1, keepdim=True)) / (1e-7 + logits.std(dim=-1, keepdim=True))


def jensen_shannon(p: Tensor, q: Tensor, beta: float) -> Tensor:
    m = beta * p + (1 - beta) * q
    return beta * kl(p, m) + (1 - beta) * kl(q, m)


def others(probs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The label's probability `[B]`, and those of the other classes, renormalised: `[B, C - 1]`."""
    is_label = torch.nn.functional.one_hot(labels, probs.shape[-1]).bool()
    rest = probs[~is_label].view(len(probs), -1)
    return probs[is_label], rest / rest.sum(dim=-1, keepdim=True)


def dkd(student: Tensor, teacher: Tensor, labels: Tensor, alpha: float, beta: float) -> Tensor:
    (q_y, others_q), (p_y, others_p) = (others(softmax(each, 4.0), labels) for each in (student, teacher))
    binary_p, binary_q = (torch.stack([each, 1 - each], dim=-1) for each in (p_y, q_y))
    return 16 * (alpha * kl(binary_p, binary_q) + beta * kl(others_p, others_q))


def nkd(student: Tensor, teacher: Tensor, labels: Tensor, gamma: float, temperature: float) -> Tensor:
    (q_y, _), (p_y, _) = (others(softmax(each), labels) for each in (student, teacher))
    (_, others_q), (_, others_p) = (others(softmax(each, temperature), labels) for each in (student, teacher))
    return -p_y * q_y.log() - gamma * temperature**2 * (others_p * others_q.log()).sum(dim=-1)


def correlation(first: Tensor, second: Tensor) -> Tensor:
    """Pearson's, of columns."""
    first, second = (each - each.mean(dim=0) for each in (first, second))
    return (first * second).sum(dim=0) / (first.norm(dim=0) * second.norm(dim=0))


def dist(p: Tensor, q: Tensor, beta: float, gamma: float, temperature: float) -> Tensor:
    of_rows, of_classes = correlation(q.T, p.T), correlation(q, p).mean()
    return temperature**2 * (beta * (1 - of_rows) + gamma * (1 - of_classes))


def uld(p: Tensor, q: Tensor) -> Tensor:
    return (p.sort(dim=-1).values - q.sort(dim=-1).values).abs().sum(dim=-1)


def centred(logits: Tensor) -> Tensor:
    return logits - logits.mean(dim=-1, keepdim=True)


@dataclass(frozen=True, kw_only=True)
class Defined:
    """A loss of a namespace that holds kdpipe's, its definition, and what is true of it.

    `sparse`: it takes sparse targets. `shifts`: it does not see a constant per row of the student's logits. `zero`: it
    is 0 where student and teacher agree, to the last digits. `padded`: a class that both rule out changes nothing.
    """

    make: Callable[[Any], DistillLoss]
    definition: Definition
    sparse: bool = True
    shifts: bool = True
    zero: bool = True
    padded: bool = True


DEFINED: dict[str, Defined] = {
    "forward_kl": Defined(
        make=lambda losses: losses.ForwardKL(temperature=3.0),
        definition=lambda z, t, _: 9 * kl(softmax(t, 3), softmax(z, 3)),
    ),
    "reverse_kl": Defined(
        make=lambda losses: losses.ReverseKL(temperature=3.0),
        definition=lambda z, t, _: 9 * kl(softmax(z, 3), softmax(t, 3)),
    ),
    "soft_target_ce": Defined(
        make=lambda losses: losses.SoftTargetCE(temperature=3.0),
        definition=lambda z, t, _: -9 * (softmax(t, 3) * softmax(z, 3).log()).sum(dim=-1),
        zero=False,
    ),
    "standardised_kl": Defined(
        make=lambda losses: losses.ForwardKL(temperature=2.0, standardise=True),
        definition=lambda z, t, _: 4 * kl(softmax(z_scores(t), 2), softmax(z_scores(z), 2)),
        sparse=False,
    ),
    "standardised_reverse_kl": Defined(
        make=lambda losses: losses.ReverseKL(temperature=2.0, standardise=True),
        definition=lambda z, t, _: 4 * kl(softmax(z_scores(z), 2), softmax(z_scores(t), 2)),
        sparse=False,
    ),
    "standardised_ce": Defined(
        make=lambda losses: losses.SoftTargetCE(temperature=2.0, standardise=True),
        definition=lambda z, t, _: -4 * (softmax(z_scores(t), 2) * softmax(z_scores(z), 2).log()).sum(dim=-1),
        sparse=False,
        zero=False,
    ),
    "gjsd": Defined(
        make=lambda losses: losses.GeneralisedJSD(beta=0.2, temperature=1.5),
        definition=lambda z, t, _: jensen_shannon(softmax(t, 1.5), softmax(z, 1.5), 0.2),
    ),
    "normalised_gjsd": Defined(
        make=lambda losses: losses.GeneralisedJSD(beta=0.7, normalise=True),
        definition=lambda z, t, _: jensen_shannon(softmax(t), softmax(z), 0.7) / (0.7 * 0.3),
    ),
    "standardised_gjsd": Defined(
        make=lambda losses: losses.GeneralisedJSD(beta=0.5, standardise=True),
        definition=lambda z, t, _: jensen_shannon(softmax(z_scores(t)), softmax(z_scores(z)), 0.5),
        sparse=False,
    ),
    "total_variation": Defined(
        make=lambda losses: losses.TotalVariation(temperature=2.0),
        definition=lambda z, t, _: 0.5 * (softmax(t, 2) - softmax(z, 2)).abs().sum(dim=-1),
    ),
    "logit_mse": Defined(
        make=lambda losses: losses.LogitMSE(),
        definition=lambda z, t, _: (z - t).square().sum(dim=-1),
        sparse=False,
        shifts=False,
    ),
    "mean_logit_mse": Defined(
        make=lambda losses: losses.LogitMSE(class_reduction="mean"),
        definition=lambda z, t, _: (z - t).square().mean(dim=-1),
        sparse=False,
        shifts=False,
    ),
    "centred_logit_mse": Defined(
        make=lambda losses: losses.LogitMSE(centred=True),
        definition=lambda z, t, _: (centred(z) - centred(t)).square().sum(dim=-1),
        sparse=False,
    ),
    "probability_mse": Defined(
        make=lambda losses: losses.LogitMSE(of="probabilities", class_reduction="mean", temperature=2.0),
        definition=lambda z, t, _: (softmax(z, 2) - softmax(t, 2)).square().mean(dim=-1),
        padded=False,
    ),
    "euclidean": Defined(
        make=lambda losses: losses.LogitMSE(of="probabilities", squared=False),
        definition=lambda z, t, _: (softmax(z) - softmax(t)).norm(dim=-1),
    ),
    "dkd": Defined(
        make=lambda losses: losses.DKD(temperature=4.0, alpha=1.5, beta=6.0),
        definition=lambda z, t, y: dkd(z, t, y, 1.5, 6.0),
        sparse=False,
    ),
    "nkd": Defined(
        make=lambda losses: losses.NKD(temperature=3.0, gamma=1.5),
        definition=lambda z, t, y: nkd(z, t, y, 1.5, 3.0),
        sparse=False,
        zero=False,
    ),
    "dist": Defined(
        make=lambda losses: losses.DIST(temperature=4.0, beta=2.0, gamma=0.5, eps=1e-13),
        definition=lambda z, t, _: dist(softmax(t, 4), softmax(z, 4), 2.0, 0.5, 4.0),
        sparse=False,
        zero=False,
        padded=False,
    ),
    "uld": Defined(
        make=lambda losses: losses.ULD(temperature=2.0),
        definition=lambda z, t, _: uld(softmax(t, 2), softmax(z, 2)),
    ),
}

SPARSE = [name for name, each in DEFINED.items() if each.sparse]


def mean_loss(loss: DistillLoss, logits: Tensor, targets: Targets, labels: Tensor | None) -> Tensor:
    """The mean over the rows that count; 0 if there is none."""
    values, valid = values_of(loss, logits, targets, labels), valid_rows(loss, targets, labels)
    valid = torch.ones_like(values, dtype=torch.bool) if valid is None else valid
    return torch.where(valid, values, 0.0).sum() / valid.sum().clamp(min=1)


def value_and_gradient(
    loss: DistillLoss, logits: Tensor, targets: Targets, labels: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The mean over the rows that count, and its gradient."""
    logits = logits.detach().requires_grad_()
    value = mean_loss(loss, logits, targets, labels)
    return value.detach(), torch.autograd.grad(value, logits)[0]


def assert_defined(name: str, losses: Any) -> None:
    """That a loss of the namespace has the value per row, the mean and the gradient of its definition."""
    each = DEFINED[name]
    student, teacher, labels = random_logits(0, 6, 5), random_logits(1, 6, 5), torch.tensor([0, 1, 4, 2, 2, 3])
    loss = each.make(losses)
    student.requires_grad_()
    expected = each.definition(student, teacher, labels)
    torch.testing.assert_close(values_of(loss, student, dense_of(teacher), labels), expected, rtol=1e-9, atol=1e-11)
    (gradient,) = torch.autograd.grad(expected.mean(), student)
    value, found = value_and_gradient(loss, student, dense_of(teacher), labels)
    torch.testing.assert_close(value, expected.mean().detach(), rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(found, gradient, rtol=1e-8, atol=1e-11)


def full_sparse_of(teacher: Tensor) -> Targets:
    """Sparse targets that hold every class, at the temperatures of `DEFINED`."""
    return sparse_of(teacher, teacher.shape[-1], (1.0, 1.5, 2.0, 3.0, 4.0))
