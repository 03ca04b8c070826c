from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kdpipe.targets import DenseTargets

LOGITS_BTC = torch.randn(3, 2, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 4


def targets_of(logits: Tensor, dtype: torch.dtype = torch.float64) -> DenseTargets:
    row_max = logits.amax(dim=-1)
    return DenseTargets(values=(logits - row_max.unsqueeze(-1)).to(dtype), row_max=row_max)


def test_logits_are_those_of_the_teacher():
    torch.testing.assert_close(targets_of(LOGITS_BTC).logits(), LOGITS_BTC, rtol=0, atol=1e-14)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0, 10.0])
def test_softened_and_log_probs_are_those_of_the_teacher_at_every_temperature(temperature):
    targets = targets_of(LOGITS_BTC)
    expected = torch.softmax(LOGITS_BTC / temperature, dim=-1)
    torch.testing.assert_close(torch.softmax(targets.softened(temperature), dim=-1), expected, rtol=0, atol=1e-14)
    torch.testing.assert_close(targets.log_probs(temperature).exp(), expected, rtol=0, atol=1e-14)


def test_a_masked_class_has_no_probability():
    logits = LOGITS_BTC.clone()
    logits[..., 2] = -torch.inf
    targets = targets_of(logits)
    assert (targets.log_probs(4.0).exp()[..., 2] == 0).all()
    assert torch.equal(targets.logits()[..., 2], logits[..., 2])
    kept = [0, 1, 3, 4]
    expected = torch.log_softmax(LOGITS_BTC[..., kept] / 4, dim=-1)
    torch.testing.assert_close(targets.log_probs(4.0)[..., kept], expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize(
    ("stored", "wide"),
    [(torch.float16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)],
)
def test_computes_in_float32_or_wider(stored, wide):
    targets = targets_of(LOGITS_BTC, stored)
    assert targets.values.dtype == stored
    assert targets.softened(4.0).dtype == targets.log_probs(4.0).dtype == wide
    exact = torch.log_softmax(targets.values.double() / 3.0, dim=-1)
    torch.testing.assert_close(targets.log_probs(3.0).double(), exact, rtol=0, atol=2e-6)


@pytest.mark.parametrize("rows", [slice(1, 3), torch.tensor([2, 0, 2])])
def test_rows_keep_values_and_maximum_together(rows):
    part = targets_of(LOGITS_BTC)[rows]
    torch.testing.assert_close(part.logits(), LOGITS_BTC[rows], rtol=0, atol=1e-14)
    assert part.row_max.shape == (len(LOGITS_BTC[rows]), 2)


def test_num_classes_and_device():
    targets = targets_of(LOGITS_BTC)
    assert targets.num_classes == 5
    moved = targets.to(torch.device("meta"))
    assert moved.values.device.type == moved.row_max.device.type == "meta"
    assert torch.equal(targets.to(torch.device("cpu")).logits(), targets.logits())
