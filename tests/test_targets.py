from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kdpipe.errors import ConfigError
from kdpipe.targets import DenseTargets, FeatureTargets, SampledTargets
from toy_targets import dense_of, sparse_of

LOGITS_BTC = torch.randn(3, 2, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 4


def test_logits_are_those_of_the_teacher():
    torch.testing.assert_close(dense_of(LOGITS_BTC).logits(), LOGITS_BTC, rtol=0, atol=1e-14)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0, 10.0])
def test_softened_and_log_probs_are_those_of_the_teacher_at_every_temperature(temperature):
    targets = dense_of(LOGITS_BTC)
    expected = torch.softmax(LOGITS_BTC / temperature, dim=-1)
    torch.testing.assert_close(torch.softmax(targets.softened(temperature), dim=-1), expected, rtol=0, atol=1e-14)
    torch.testing.assert_close(targets.log_probs(temperature).exp(), expected, rtol=0, atol=1e-14)


def test_a_masked_class_has_no_probability():
    logits = LOGITS_BTC.clone()
    logits[..., 2] = -torch.inf
    targets = dense_of(logits)
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
    targets = dense_of(LOGITS_BTC, dtype=stored)
    assert targets.values.dtype == stored
    assert targets.softened(4.0).dtype == targets.log_probs(4.0).dtype == wide
    exact = torch.log_softmax(targets.values.double() / 3.0, dim=-1)
    torch.testing.assert_close(targets.log_probs(3.0).double(), exact, rtol=0, atol=2e-6)


@pytest.mark.parametrize("rows", [slice(1, 3), torch.tensor([2, 0, 2])])
def test_rows_keep_values_and_maximum_together(rows):
    part = dense_of(LOGITS_BTC)[rows]
    torch.testing.assert_close(part.logits(), LOGITS_BTC[rows], rtol=0, atol=1e-14)
    assert part.row_max.shape == (len(LOGITS_BTC[rows]), 2)


def test_num_classes_and_device():
    targets = dense_of(LOGITS_BTC)
    assert targets.num_classes == 5
    moved = targets.to(torch.device("meta"))
    assert moved.values.device.type == moved.row_max.device.type == "meta"
    assert torch.equal(targets.to(torch.device("cpu")).logits(), targets.logits())


def buckets_of(log_probs: Tensor, ids: Tensor, temperature: float) -> Tensor:
    """The same k + 1 log-probs from all classes."""
    softened = torch.log_softmax(log_probs / temperature, dim=-1)
    kept = torch.zeros_like(softened, dtype=torch.bool).scatter(-1, ids, True)
    tail = torch.logsumexp(softened.masked_fill(kept, -torch.inf), dim=-1, keepdim=True)
    return torch.cat([softened.gather(-1, ids), tail], dim=-1)


LOG_PROBS_BTC = torch.log_softmax(
    3 * torch.randn(4, 2, 60, generator=torch.Generator().manual_seed(1), dtype=torch.float64), dim=-1
)


@pytest.mark.parametrize("temperature", [1.0, 4 / 3, 2.0, 4.0])
def test_sparse_log_probs_are_exact_at_stored_temperatures(temperature):
    targets = sparse_of(LOG_PROBS_BTC, 7, (4.0, 1.0, 2.0, 4 / 3))
    expected = buckets_of(LOG_PROBS_BTC, targets.ids, temperature)
    torch.testing.assert_close(targets.log_probs(temperature), expected, rtol=0, atol=1e-13)
    softened = torch.log_softmax(targets.softened(temperature), dim=-1)
    torch.testing.assert_close(softened, expected, rtol=0, atol=1e-13)
    nearly = targets.log_probs(temperature * (1 + 1e-12))
    torch.testing.assert_close(nearly, expected, rtol=0, atol=1e-9)


def test_a_temperature_that_is_not_stored_is_refused():
    targets = sparse_of(LOG_PROBS_BTC, 7, (1.0, 2.0, 4.0))
    with pytest.raises(ConfigError, match=r"temperature 3 is not stored; .* 1, 2, 4\. .* allow_interpolation: true"):
        targets.log_probs(3.0)


@pytest.mark.parametrize(
    ("temperatures", "temperature"), [((1.0, 4.0), 2.0), ((1.0, 2.0, 4.0), 0.9), ((1.0, 2.0, 4.0), 4.1)]
)
def test_interpolation_needs_three_nodes_around_it(temperatures, temperature):
    targets = sparse_of(LOG_PROBS_BTC, 7, temperatures)
    with pytest.raises(ConfigError, match="three or more stored temperatures and one between"):
        targets.softened(temperature, allow_interpolation=True)


@given(
    seed=st.integers(0, 2**31),
    scale=st.floats(0.01, 10),
    k=st.integers(1, 59),
    nodes=st.sets(st.sampled_from([0.5, 0.8, 1.0, 1.25, 1.5, 2.0, 3.0, 4.0, 7.0, 10.0]), min_size=3),
    share=st.floats(0.01, 0.99),
    num_masked=st.integers(0, 30),
)
def test_interpolation_is_within_its_bound(seed, scale, k, nodes, share, num_masked):
    random = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(3, 60, generator=random, dtype=torch.float64)
    logits[:, :num_masked] = -torch.inf
    log_probs = torch.log_softmax(logits, dim=-1)
    k = min(k, 60 - num_masked)
    temperatures = tuple(sorted(nodes))
    targets = sparse_of(log_probs, k, temperatures)
    temperature = temperatures[0] + share * (temperatures[-1] - temperatures[0])
    if any(math.isclose(temperature, each, rel_tol=1e-6) for each in temperatures):
        return
    exact = buckets_of(log_probs, targets.ids, temperature)
    found = targets.log_probs(temperature, allow_interpolation=True)
    if num_masked + k == 60:
        torch.testing.assert_close(found, exact, rtol=0, atol=1e-12)
        return
    log_tail = sparse_of(log_probs, k, (temperature,)).tails[..., 0]
    lower, upper = targets.tail_bounds(temperature)
    assert (lower <= log_tail + 1e-9).all()
    assert (log_tail <= upper + 1e-9).all()
    error = (found[..., :-1].exp().sum(dim=-1) - exact[..., :-1].exp().sum(dim=-1)).abs()
    assert (error <= (upper - lower) / 4 + 1e-9).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_half_precision_of_a_teacher_in_memory_is_not_rounded_once_more(dtype, temperature):
    logits = LOGITS_BTC.to(dtype)
    targets = DenseTargets.of(logits)
    assert torch.equal(targets.logits(), logits.float())
    expected = torch.log_softmax(logits.double() / temperature, dim=-1)
    torch.testing.assert_close(targets.log_probs(temperature).double(), expected, rtol=0, atol=1e-5)


def test_logits_of_rows_that_are_not_covered_may_be_anything():
    logits = LOGITS_BTC.clone()
    logits[0, 0], logits[0, 1], logits[1, 0] = math.nan, -math.inf, math.inf
    covered = torch.isfinite(logits).all(dim=-1)
    targets = DenseTargets.of(logits, covered)
    assert targets.covered is covered
    assert torch.isfinite(targets.log_probs(2.0)).all()
    expected = DenseTargets.of(LOGITS_BTC).log_probs(2.0)
    torch.testing.assert_close(targets.log_probs(2.0)[covered], expected[covered])
    for wrong in (covered.float(), covered[0]):
        with pytest.raises(ConfigError, match=r"covered is torch.\w+ of shape .*; expected torch.bool of shape"):
            DenseTargets.of(logits, wrong)


@pytest.mark.parametrize("temperature", [0.0, -1.0, -2.0, math.inf, math.nan, 1e16, 1e-16])
@pytest.mark.parametrize("allow_interpolation", [False, True])
def test_a_temperature_that_means_nothing_is_refused(temperature, allow_interpolation):
    for targets in (dense_of(LOGITS_BTC), sparse_of(LOG_PROBS_BTC, 7, (1.0, 2.0, 4.0))):
        for ask in (targets.softened, targets.log_probs):
            with pytest.raises(ConfigError, match="expected a number above 0"):
                ask(temperature, allow_interpolation)


@pytest.mark.parametrize("temperature", [0.0, 0.9, 4.1])
def test_there_is_no_bound_outside_the_stored_temperatures(temperature):
    with pytest.raises(ConfigError, match=r"cannot be interpolated from 1, 2, 4; expected three or more"):
        sparse_of(LOG_PROBS_BTC, 7, (1.0, 2.0, 4.0)).tail_bounds(temperature)


@pytest.mark.parametrize("temperatures", [(1.0, 2.0, 4.0), (1.0, 4.0)])
def test_the_bounds_at_a_stored_temperature_are_what_is_stored(temperatures):
    targets = sparse_of(LOG_PROBS_BTC, 7, temperatures)
    for index, temperature in enumerate(temperatures):
        for bound in targets.tail_bounds(temperature):
            torch.testing.assert_close(bound, targets.tails[..., index], rtol=0, atol=0)


def test_the_bound_shrinks_with_more_nodes():
    gaps = []
    for temperatures in ((1.0, 4.0, 8.0), (1.0, 2.0, 4.0, 8.0), (1.0, 2.0, 3.0, 4.0, 8.0)):
        lower, upper = sparse_of(LOG_PROBS_BTC, 7, temperatures).tail_bounds(2.5)
        gaps.append(float((upper - lower).max()))
    assert gaps[0] > 2 * gaps[1] > 4 * gaps[2]


def test_interpolation_meets_the_stored_temperatures():
    targets = sparse_of(LOG_PROBS_BTC, 7, (1.0, 4 / 3, 2.0, 4.0, 10.0))
    for stored in (4 / 3, 2.0, 4.0):
        for near in (stored * (1 - 1e-6), stored * (1 + 1e-6)):
            found = targets.log_probs(near, allow_interpolation=True)
            torch.testing.assert_close(found, targets.log_probs(stored), rtol=0, atol=1e-4)


def test_dense_targets_need_no_interpolation():
    targets = dense_of(LOGITS_BTC)
    assert torch.equal(targets.log_probs(3.3, allow_interpolation=True), targets.log_probs(3.3))


def sampled() -> SampledTargets:
    return SampledTargets(
        ids=torch.arange(6).view(3, 2),
        weights=torch.tensor([[0.5, 0.5], [1.0, 0.0], [0.25, 0.75]]),
        entropy=torch.tensor([0.7, 0.0, 0.6]),
        num_classes=9,
        covered=torch.tensor([True, False, True]),
    )


def test_draws_have_no_log_probs():
    for ask in (sampled().log_probs, sampled().softened):
        with pytest.raises(ConfigError, match="linear in the teacher's probabilities"):
            ask(1.0)


@pytest.mark.parametrize(
    "targets",
    [
        DenseTargets(values=torch.randn(3, 4), row_max=torch.randn(3), covered=torch.tensor([True, False, True])),
        sparse_of(LOG_PROBS_BTC[:3], 7, (1.0, 2.0)),
        sampled(),
        FeatureTargets(values=torch.randn(3, 8), covered=torch.tensor([True, False, True])),
    ],
    ids=lambda targets: type(targets).__name__,
)
def test_rows_and_devices_take_every_tensor_along(targets):
    rows = torch.tensor([2, 0])
    part, moved = targets[rows], targets.to(torch.device("meta"))
    assert type(part) is type(moved) is type(targets)
    for name, value in vars(targets).items():
        if isinstance(value, Tensor):
            assert torch.equal(getattr(part, name), value[rows])
            assert getattr(moved, name).device.type == "meta"
        else:
            assert getattr(part, name) == getattr(moved, name) == value


def test_masked_classes_are_named():
    logits = LOGITS_BTC.clone()
    logits[..., 2] = -torch.inf
    assert torch.equal(dense_of(logits).masked, torch.isneginf(logits))
    assert dense_of(logits, dtype=torch.float16).masked.sum() == logits.shape[0] * logits.shape[1]
