"""Losses on sparse targets: over K + 1 buckets, and without a copy of the student's logits."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import kdpipe.losses as kdpipe_losses
from kdpipe.losses import buckets
from kdpipe.targets import SampledTargets
from loss_definitions import DEFINED, full_sparse_of, random_logits, value_and_gradient
from toy_targets import dense_of, sparse_of

TEMPERATURES = (1.0, 1.5, 2.0, 3.0)
LOSSES = {name: each.make(kdpipe_losses) for name, each in DEFINED.items() if each.sparse}
TOPK_RENORM = kdpipe_losses.TopKRenormKL(temperature=2.0)
ALL = {**LOSSES, "topk_renorm_kl": TOPK_RENORM}

every_loss = pytest.mark.parametrize("name", LOSSES)
few = settings(max_examples=12)  # for each of many losses


def pair(seed: int, num_rows: int, num_classes: int) -> tuple[Tensor, Tensor]:
    """Student and teacher."""
    return random_logits(seed, num_rows, num_classes), random_logits(seed + 1, num_rows, num_classes)


def close(found, expected, tolerance: float = 1e-8) -> None:
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@every_loss
@few
@given(seed=st.integers(0, 2**31), num_rows=st.integers(2, 5), num_classes=st.integers(2, 7))
def test_with_every_class_kept_sparse_is_dense(name, seed, num_rows, num_classes):
    student, teacher = pair(seed, num_rows, num_classes)
    dense = value_and_gradient(LOSSES[name], student, dense_of(teacher), None)
    close(value_and_gradient(LOSSES[name], student, full_sparse_of(teacher), None), dense)


@pytest.mark.parametrize("name", sorted(set(LOSSES) - {"probability_mse", "euclidean"}))
@few
@given(seed=st.integers(0, 2**31), num_rows=st.integers(2, 5), num_classes=st.integers(2, 7))
def test_fewer_buckets_never_see_more(name, seed, num_rows, num_classes):
    student, teacher = pair(seed, num_rows, num_classes)
    values = [LOSSES[name](student, sparse_of(teacher, k, TEMPERATURES)) for k in range(1, num_classes + 1)]
    rounding = 1e-9 * (1 + values[-1].abs())
    assert all((fewer <= values[-1] + rounding).all() for fewer in values)


@every_loss
@pytest.mark.parametrize("k", [1, 3])
def test_gradcheck_over_buckets(name, k):
    student, teacher = pair(7, 4, 5)
    targets = sparse_of(teacher.view(2, 2, 5), k, TEMPERATURES)
    assert torch.autograd.gradcheck(
        lambda logits: LOSSES[name](logits, targets), student.view(2, 2, 5).requires_grad_()
    )


@every_loss
@few
@given(seed=st.integers(0, 2**31), num_kept=st.integers(1, 5), filler=st.integers(0, 5))
def test_an_unused_place_adds_nothing_whatever_id_it_holds(name, seed, num_kept, filler):
    student, teacher = pair(seed, 3, 6)
    exact = sparse_of(teacher, num_kept, TEMPERATURES)
    padded = replace(
        exact,
        ids=torch.cat([exact.ids, torch.full((3, 2), filler)], dim=-1),
        head=torch.cat([exact.head, torch.full((3, 2), -torch.inf, dtype=torch.float64)], dim=-1),
    )
    expected = value_and_gradient(LOSSES[name], student, exact, None)
    close(value_and_gradient(LOSSES[name], student, padded, None), expected, 1e-11)
    expected = value_and_gradient(TOPK_RENORM, student, exact, None)
    close(value_and_gradient(TOPK_RENORM, student, padded, None), expected, 1e-11)


@every_loss
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("agree", [False, True])
def test_extreme_logits_are_finite_over_buckets(name, dtype, agree):
    signs = torch.ones(3, 5)
    signs[:, 1::2] = -1
    teacher = 1e4 * (signs if agree else -signs)
    for k in (1, 4, 5):
        targets = sparse_of(teacher, k, TEMPERATURES)
        value, gradient = value_and_gradient(LOSSES[name], (1e4 * signs).to(dtype), targets, None)
        assert torch.isfinite(value)
        assert torch.isfinite(gradient).all()


def sampled_of(teacher: Tensor) -> SampledTargets:
    p = torch.softmax(teacher, dim=-1)
    ids = torch.arange(p.shape[-1]).expand_as(p)
    entropy = torch.special.entr(p).sum(dim=-1)
    return SampledTargets(ids=ids, weights=p, entropy=entropy, num_classes=p.shape[-1])


def test_exact_draws_give_the_dense_cross_entropy():
    student, teacher = pair(3, 4, 6)
    loss = kdpipe_losses.SoftTargetCE()
    expected = value_and_gradient(loss, student, dense_of(teacher), None)
    close(value_and_gradient(loss, student, sampled_of(teacher), None), expected)


class Made(TorchDispatchMode):
    """Remembers the memory of every result with as many numbers as the student's logits, or more."""

    def __init__(self, student: Tensor) -> None:
        super().__init__()
        self._student, self.memory = student, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for each in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(each, Tensor) and each.numel() >= self._student.numel():
                self.memory.add(each.untyped_storage().data_ptr())
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("name", "kind"), [*((name, "sparse") for name in ALL), ("forward_kl", "sampled"), ("soft_target_ce", "sampled")]
)
def test_a_sparse_loss_makes_nothing_as_large_as_the_logits_but_their_gradient(name, kind, dtype, monkeypatch):
    monkeypatch.setattr(buckets, "_BLOCK_NUMBERS", 2000)
    student = torch.randn(2, 8, 1000).to(dtype).requires_grad_()
    targets = sparse_of(torch.randn(2, 8, 1000), 5, TEMPERATURES)
    loss = ALL[name]
    if kind == "sampled":
        loss = replace(loss, temperature=1.0)
        p = torch.full((2, 8, 5), 0.2)
        targets = SampledTargets(ids=targets.ids, weights=p, entropy=torch.zeros(2, 8), num_classes=1000)
    own = {student.untyped_storage().data_ptr()}
    with Made(student) as forward:
        total = loss(student, targets).sum()
    assert forward.memory <= own
    if name == "topk_renorm_kl":  # its backward is that of PyTorch's gather, which makes another copy while watched
        return
    with Made(student) as backward:
        total.backward()
    assert len(backward.memory - own) == 1
    assert torch.isfinite(student.grad).all()


@pytest.mark.parametrize("block", [1, 7, 40])
@pytest.mark.parametrize("sliced", [False, True])
def test_blocks_and_slices_change_nothing(block, sliced, monkeypatch):
    whole = random_logits(0, 3, 6, 8)
    student, teacher = whole[:, 1:] if sliced else whole, random_logits(1, 3, 6, 8)
    teacher = teacher[:, 1:] if sliced else teacher
    targets = sparse_of(teacher, 3, (1.0, 3.0))
    expected = value_and_gradient(LOSSES["forward_kl"], student.clone(), targets, None)
    monkeypatch.setattr(buckets, "_BLOCK_NUMBERS", block)
    found = value_and_gradient(LOSSES["forward_kl"], student, targets, None)
    close(found, expected, 1e-13)


@pytest.mark.parametrize(
    ("name", "kind"), [*((name, "sparse") for name in ALL), ("forward_kl", "sampled"), ("soft_target_ce", "sampled")]
)
def test_tokens_that_do_not_count_have_no_part_in_the_gradient(name, kind):
    """NaN too, as padding may have; the others' is that without them."""
    student, teacher = pair(5, 6, 8)
    counts = torch.tensor([True, False, True, True, False, True])
    loss = ALL[name] if kind == "sparse" else replace(ALL[name], temperature=1.0)
    targets = sparse_of(teacher, 3, TEMPERATURES) if kind == "sparse" else sampled_of(teacher)
    there = student[counts].requires_grad_()
    expected = kdpipe_losses.kd_loss(there, targets[counts], loss=loss)
    expected.backward()
    given = torch.where(counts.unsqueeze(-1), student, torch.nan).requires_grad_()
    value = kdpipe_losses.kd_loss(given, replace(targets, covered=counts), loss=loss)
    value.backward()
    close(value, expected)
    close(given.grad[counts], there.grad)
    assert (given.grad[~counts] == 0).all()


def test_a_gradient_that_is_one_number_for_all_rows_stays_as_it_is():
    class Sum:
        temperature, needs_whole_batch = 1.0, True

        def __call__(self, logits, targets):
            return logits.sum().expand(len(logits))

        def unscaled(self, values):
            return values

    student, teacher = pair(5, 4, 6)
    counts = torch.tensor([True, False, True, True])
    student.requires_grad_()
    kdpipe_losses.kd_loss(student, replace(sparse_of(teacher, 3, TEMPERATURES), covered=counts), loss=Sum()).backward()
    assert (student.grad[counts] == 1).all()


def test_torch_func_takes_the_gradient_where_rows_do_not_count():
    student, teacher = pair(5, 4, 6)
    targets = replace(sparse_of(teacher, 3, TEMPERATURES), covered=torch.tensor([True, False, True, True]))
    by_func = torch.func.grad(lambda logits: kdpipe_losses.kd_loss(logits, targets, loss=TOPK_RENORM))(student)
    student.requires_grad_()
    kdpipe_losses.kd_loss(student, targets, loss=TOPK_RENORM).backward()
    close(by_func, student.grad)
