from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kdpipe.errors import ConfigError
from kdpipe.losses import DistillLoss, ForwardKL, ReverseKL, forward_kl, kd_loss, reverse_kl
from kdpipe.targets import DenseTargets, FeatureTargets, SampledTargets, SparseTargets, Targets
from loss_definitions import random_logits
from toy_targets import dense_of, sparse_of

TEMPERATURES = st.floats(0.5, 20)


def definition(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """`T^2 KL(p || q)` per row as Hinton et al. write it, in float64."""
    p = torch.softmax(teacher.double() / temperature, dim=-1)
    q = torch.softmax(student.double() / temperature, dim=-1)
    return temperature**2 * torch.where(p > 0, p * (p.log() - q.log()), 0.0).sum(dim=-1)


def drawn(draw: st.DrawFn, shape: tuple[int, ...]) -> Tensor:
    """Logits at some scale, sometimes with ties."""
    logits = random_logits(draw(st.integers(0, 2**31)), *shape, scale=draw(st.sampled_from([0.0, 1e-3, 1.0, 10.0])))
    return logits.round() if draw(st.booleans()) else logits


@st.composite
def pairs(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Student and teacher logits `[B, C]`, B from 1 and C from 2."""
    shape = draw(st.tuples(st.integers(1, 5), st.integers(2, 8)))
    return drawn(draw, shape), drawn(draw, shape)


def relative(found: Tensor, expected: Tensor) -> float:
    return float(((found - expected).abs() / expected.abs().clamp(min=1.0)).max().detach())


@given(pair=pairs(), temperature=TEMPERATURES)
def test_forward_kl_is_its_definition(pair, temperature):
    student, teacher = pair
    expected = definition(student, teacher, temperature)
    targets = dense_of(teacher)
    assert relative(ForwardKL(temperature=temperature)(student, targets), expected) < 1e-10
    assert relative(forward_kl(student, targets, temperature) * temperature**2, expected) < 1e-10
    assert relative(kd_loss(student, targets, temperature=temperature), expected.mean()) < 1e-10


@given(pair=pairs(), temperature=TEMPERATURES)
def test_gradient_is_that_of_the_definition(pair, temperature):
    student, teacher = pair
    student.requires_grad_()
    (ours,) = torch.autograd.grad(kd_loss(student, dense_of(teacher), temperature=temperature), student)
    p, q = (torch.softmax(each.detach() / temperature, dim=-1) for each in (teacher, student))
    assert relative(ours, temperature * (q - p) / len(student)) < 1e-10


def test_the_definition_tells_wrong_formulas_apart():
    student, teacher, temperature = random_logits(0, 6, 5), random_logits(1, 6, 5, scale=9.0), 3.0
    targets = dense_of(teacher)
    ours = kd_loss(student, targets, temperature=temperature)
    log_p, log_q = (torch.log_softmax(each / temperature, dim=-1) for each in (teacher, student))
    kl_div = torch.nn.functional.kl_div
    right = temperature**2 * kl_div(log_q, log_p, reduction="batchmean", log_target=True)
    wrong = {
        "no T^2": kl_div(log_q, log_p, reduction="batchmean", log_target=True),
        "T instead of T^2": temperature * kl_div(log_q, log_p, reduction="batchmean", log_target=True),
        "swapped arguments": temperature**2 * kl_div(log_p, log_q, reduction="batchmean", log_target=True),
        "mean over classes": temperature**2 * kl_div(log_q, log_p, reduction="none", log_target=True).mean(),
        "sum over rows": temperature**2 * kl_div(log_q, log_p, reduction="sum", log_target=True),
        "wrong sign": -right,
        "cross-entropy": -(temperature**2) * (log_p.exp() * log_q).sum(dim=-1).mean(),
        "student not softened": definition(student * temperature, teacher, temperature).mean(),
        "teacher not softened": definition(student, teacher * temperature, temperature).mean(),
    }
    assert relative(ours, right) < 1e-12
    seen = {name: abs(float(value - ours)) > 0.1 * abs(float(ours)) for name, value in wrong.items()}
    assert all(seen.values()), seen


@given(pair=pairs(), temperature=TEMPERATURES, constant=st.floats(-50, 50))
def test_a_constant_per_row_changes_nothing(pair, temperature, constant):
    student, teacher = pair
    shift = constant * torch.arange(1, len(student) + 1, dtype=torch.float64).unsqueeze(-1)
    ours = ForwardKL(temperature=temperature)(student, dense_of(teacher))
    assert relative(ForwardKL(temperature=temperature)(student + shift, dense_of(teacher)), ours) < 1e-9
    shifted = DenseTargets(values=teacher + shift, row_max=torch.zeros(len(teacher)))
    assert relative(ForwardKL(temperature=temperature)(student, shifted), ours) < 1e-9


@given(pair=pairs(), temperature=TEMPERATURES, data=st.data())
def test_renaming_classes_changes_nothing(pair, temperature, data):
    student, teacher = pair
    order = data.draw(st.permutations(range(student.shape[1])))
    ours = ForwardKL(temperature=temperature)(student, dense_of(teacher))
    renamed = ForwardKL(temperature=temperature)(student[:, order], dense_of(teacher[:, order]))
    assert relative(renamed, ours) < 1e-10


@given(pair=pairs(), temperature=TEMPERATURES, copies=st.integers(2, 4))
def test_duplicating_a_batch_changes_nothing(pair, temperature, copies):
    student, teacher = pair
    once = kd_loss(student, dense_of(teacher), temperature=temperature)
    more = kd_loss(student.repeat(copies, 1), dense_of(teacher.repeat(copies, 1)), temperature=temperature)
    assert relative(more, once) < 1e-12


@given(pair=pairs(), temperature=TEMPERATURES)
def test_never_negative_and_zero_at_equality(pair, temperature):
    student, teacher = pair
    assert (forward_kl(student, dense_of(teacher), temperature) > -1e-13).all()
    same = teacher.clone().requires_grad_()
    value = kd_loss(same, dense_of(teacher), temperature=temperature)
    assert abs(value.item()) < 1e-10
    (gradient,) = torch.autograd.grad(value, same)
    assert gradient.abs().max() < 1e-12


def test_infinite_temperature_is_half_the_mean_square_of_centred_logits():
    student, teacher = random_logits(2, 4, 7), random_logits(3, 4, 7)
    difference = student - teacher
    centred = difference - difference.mean(dim=-1, keepdim=True)
    limit = centred.square().sum(dim=-1) / (2 * 7)
    errors = [
        relative(ForwardKL(temperature=temperature)(student, dense_of(teacher)), limit) for temperature in (1e2, 1e4)
    ]
    assert errors[1] < 1e-3
    assert errors[0] > 10 * errors[1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
@pytest.mark.parametrize(("num_rows", "num_classes"), [(1, 2), (1, 5), (3, 2)])
def test_extreme_logits_are_finite(dtype, temperature, num_rows, num_classes):
    signs = torch.ones(num_rows, num_classes)
    signs[:, 1::2] = -1
    student = (1e4 * signs).to(dtype).requires_grad_()
    loss = kd_loss(student, dense_of(-1e4 * signs), temperature=temperature)
    (gradient,) = torch.autograd.grad(loss, student)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.isfinite(loss)
    assert torch.isfinite(gradient).all()
    gap = float(student.detach().double()[0, 0] - student.detach().double()[0, 1])
    expected = temperature * gap + temperature**2 * np.log((num_classes + 1) // 2 / (num_classes // 2))
    assert loss.item() == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("student_masks_too", [False, True])
def test_a_class_that_the_teacher_masks_adds_nothing(student_masks_too):
    student, teacher = random_logits(4, 3, 5), random_logits(5, 3, 5)
    teacher[:, 1] = -torch.inf
    teacher[2, 3:] = -torch.inf
    if student_masks_too:
        student[:, 1] = -torch.inf
    student.requires_grad_()
    loss = ForwardKL(temperature=2.0)(student, dense_of(teacher))
    (gradient,) = torch.autograd.grad(loss.sum(), student)
    p, q = (torch.softmax(each.detach() / 2.0, dim=-1) for each in (teacher, student))
    assert relative(loss, definition(student.detach(), teacher, 2.0)) < 1e-10
    assert relative(gradient, 2.0 * (q - p)) < 1e-10


def test_gradcheck():
    student, targets = random_logits(6, 3, 4).requires_grad_(), dense_of(random_logits(7, 3, 4))
    assert torch.autograd.gradcheck(ForwardKL(temperature=2.5), (student, targets))


def test_tokens_are_rows():
    student, teacher = random_logits(8, 2, 3, 5), random_logits(9, 2, 3, 5)
    per_token = ForwardKL(temperature=2.0)(student, dense_of(teacher))
    assert per_token.shape == (2, 3)
    assert relative(per_token, definition(student, teacher, 2.0)) < 1e-10
    flat = kd_loss(student.flatten(0, 1), dense_of(teacher.flatten(0, 1)), temperature=2.0)
    assert relative(kd_loss(student, dense_of(teacher), temperature=2.0), flat) < 1e-12


def test_autocast_does_not_narrow_the_loss():
    student, targets = random_logits(10, 8, 6).float(), dense_of(random_logits(11, 8, 6).float())
    plain = ForwardKL(temperature=4.0)(student, targets)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ForwardKL(temperature=4.0)(student, targets), plain)


def test_float16_targets_are_as_good_as_their_rounding():
    student, teacher = random_logits(12, 50, 10).float(), random_logits(13, 50, 10).float()
    exact = dense_of(teacher)
    narrow = DenseTargets(values=exact.values.half(), row_max=exact.row_max)
    assert relative(forward_kl(student, narrow, 2.0), forward_kl(student, exact, 2.0)) < 0.02
    assert not torch.equal(forward_kl(student, narrow, 2.0), forward_kl(student, exact, 2.0))


def test_forward_kl_is_a_distill_loss_with_a_positive_temperature():
    assert isinstance(ForwardKL(), DistillLoss)
    for wrong in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ConfigError, match="temperature is"):
            ForwardKL(temperature=wrong)


# Sparse targets: k + 1 buckets

KINDS = pytest.mark.parametrize("kl", [forward_kl, reverse_kl])


def buckets(logits: Tensor, ids: Tensor, temperature: float) -> Tensor:
    """Probabilities of the kept classes and of all others together, as one would write them down."""
    probs = torch.softmax(logits / temperature, dim=-1)
    head = probs.gather(-1, ids)
    return torch.cat([head, probs.scatter(-1, ids, 0.0).sum(dim=-1, keepdim=True)], dim=-1)


def bucket_definition(kl, student: Tensor, teacher: Tensor, ids: Tensor, temperature: float) -> Tensor:
    p, q = buckets(teacher, ids, temperature), buckets(student, ids, temperature)
    p, q = (p, q) if kl is forward_kl else (q, p)
    return torch.where(p > 0, p * (p.log() - q.log()), 0.0).sum(dim=-1)


@KINDS
@given(pair=pairs(), temperature=TEMPERATURES, data=st.data())
def test_sparse_kl_and_gradient_are_those_of_the_buckets(kl, pair, temperature, data):
    student, teacher = (each.clamp(-20, 20) for each in pair)
    targets = sparse_of(teacher, data.draw(st.integers(1, teacher.shape[1] - 1)), (1.0, temperature))
    student.requires_grad_()
    ours = kl(student, targets, temperature)
    expected = bucket_definition(kl, student, teacher, targets.ids, temperature)
    assert relative(ours, expected) < 1e-9
    (gradient,) = torch.autograd.grad(ours.sum(), student)
    (wanted,) = torch.autograd.grad(expected.sum(), student)
    assert relative(gradient, wanted) < 1e-8


@KINDS
@given(pair=pairs(), temperature=TEMPERATURES)
def test_with_every_class_kept_sparse_is_dense(kl, pair, temperature):
    student, teacher = pair
    student.requires_grad_()
    dense = kl(student, dense_of(teacher), temperature)
    sparse = kl(student, sparse_of(teacher, teacher.shape[1], (1.0, temperature)), temperature)
    assert relative(sparse, dense) < 1e-9
    gradients = [torch.autograd.grad(each.sum(), student)[0] for each in (sparse, dense)]
    assert relative(*gradients) < 1e-9


@KINDS
@given(pair=pairs(), temperature=TEMPERATURES)
def test_fewer_buckets_never_see_more(kl, pair, temperature):
    """Data processing: merging classes cannot raise a KL."""
    student, teacher = pair
    seen = [kl(student, sparse_of(teacher, k, (1.0, temperature)), temperature) for k in range(1, teacher.shape[1] + 1)]
    scale = 1 + seen[-1].abs()
    assert all((fewer <= full + 1e-9 * scale).all() for fewer, full in itertools.pairwise(seen))


@KINDS
@given(pair=pairs(), temperature=TEMPERATURES, constant=st.floats(-50, 50))
def test_sparse_loss_does_not_see_a_constant_per_row(kl, pair, temperature, constant):
    student, teacher = pair
    targets = sparse_of(teacher, 1, (1.0, temperature))
    assert relative(kl(student + constant, targets, temperature), kl(student, targets, temperature)) < 1e-9


@KINDS
@given(pair=pairs(), temperature=TEMPERATURES, data=st.data())
def test_an_unused_place_adds_nothing_whatever_id_it_holds(kl, pair, temperature, data):
    student, teacher = pair
    exact = sparse_of(teacher, data.draw(st.integers(1, teacher.shape[1])), (1.0, temperature))
    filler = data.draw(st.integers(0, teacher.shape[1] - 1))
    padded = SparseTargets(
        ids=torch.cat([exact.ids, torch.full((len(teacher), 2), filler)], dim=-1),
        head=torch.cat([exact.head, torch.full((len(teacher), 2), -torch.inf)], dim=-1),
        tails=exact.tails,
        temperatures=exact.temperatures,
        num_classes=exact.num_classes,
    )
    student.requires_grad_()
    results = []
    for targets in (exact, padded):
        loss = kl(student, targets, temperature)
        results.append((loss, torch.autograd.grad(loss.sum(), student)[0]))
    assert relative(results[0][0], results[1][0]) < 1e-12
    assert relative(results[0][1], results[1][1]) < 1e-12


@KINDS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
@pytest.mark.parametrize(("num_classes", "k"), [(2, 1), (5, 1), (5, 4), (5, 5)])
@pytest.mark.parametrize("agree", [False, True])
def test_extreme_logits_are_finite_over_buckets(kl, dtype, temperature, num_classes, k, agree):
    signs = torch.ones(3, num_classes)
    signs[:, 1::2] = -1
    student = (1e4 * signs).to(dtype).requires_grad_()
    teacher = 1e4 * (signs if agree else -signs)
    loss = kl(student, sparse_of(teacher, k, (1.0, temperature)), temperature)
    (gradient,) = torch.autograd.grad(loss.sum(), student)
    assert torch.isfinite(loss).all()
    assert torch.isfinite(gradient).all()
    assert not agree or (loss.abs() < 1e-3).all()


@KINDS
def test_a_student_certain_of_the_head_still_learns_from_the_tail(kl):
    """`log(1 - Q)` is -inf here and its gradient NaN."""
    student = torch.tensor([[60.0, 0.0, 1.0, 2.0]], requires_grad=True)
    loss = kl(student, sparse_of(torch.tensor([[1.0, 0.5, 0.0, -0.5]]), 1, (1.0, 2.0)), 1.0)
    (gradient,) = torch.autograd.grad(loss.sum(), student)
    wanted = torch.autograd.grad(
        bucket_definition(
            kl, student.double(), torch.tensor([[1.0, 0.5, 0.0, -0.5]]).double(), torch.tensor([[0]]), 1.0
        ).sum(),
        student,
    )[0]
    torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-12)
    assert (gradient[:, 1:] < 0).all()


@KINDS
@pytest.mark.parametrize("k", [1, 3, 5])
def test_gradcheck_over_buckets(kl, k):
    student, targets = random_logits(6, 2, 3, 5).requires_grad_(), sparse_of(random_logits(7, 2, 3, 5), k, (1.0, 2.5))
    assert torch.autograd.gradcheck(lambda logits: kl(logits, targets, 2.5), student)


@pytest.mark.parametrize("kl", [forward_kl, reverse_kl])
def test_no_second_derivative_over_buckets(kl):
    """None is better than a wrong one."""
    student, targets = random_logits(6, 3, 5).requires_grad_(), sparse_of(random_logits(7, 3, 5), 2, (1.0,))
    with pytest.raises(ConfigError, match="no second derivative, which create_graph=True asks for"):
        torch.autograd.grad(kl(student, targets).sum(), student, create_graph=True)


@pytest.mark.parametrize("offset", [-8192.0, 1024.0])
@pytest.mark.parametrize("temperature", [0.3, 1.0, 3.0])
def test_an_offset_of_the_logits_costs_float32_no_digit(offset, temperature):
    """8,192 is a power of 2, so that the sum is exact; numbers are in steps of 1/256."""
    student, teacher = ((256 * random_logits(each, 4, 9)).round() / 256 for each in (1, 2))
    dense, sparse = dense_of(teacher.float()), sparse_of(teacher, 3, (0.3, 1.0, 3.0))
    for targets in (dense, sparse):
        for loss in (ForwardKL(temperature=temperature), ReverseKL(temperature=temperature)):
            exact = loss(student.double(), targets)
            assert relative(loss((student + offset).float(), targets).double(), exact) < 1e-6


def test_a_student_may_mask_classes_of_the_tail():
    student = random_logits(8, 3, 6)
    targets = sparse_of(random_logits(9, 3, 6), 2, (1.0, 2.0))
    student[:, [each for each in range(6) if each not in targets.ids]] = -torch.inf
    student.requires_grad_()
    loss = reverse_kl(student, targets, 2.0)
    (gradient,) = torch.autograd.grad(loss.sum(), student)
    assert torch.isfinite(loss).all()
    assert torch.isfinite(gradient).all()


def test_autocast_does_not_narrow_the_sparse_loss():
    student, targets = random_logits(10, 8, 6).float(), sparse_of(random_logits(11, 8, 6).float(), 2, (1.0, 4.0))
    plain = ForwardKL(temperature=4.0)(student, targets)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ForwardKL(temperature=4.0)(student, targets), plain)


def test_the_loss_asks_for_interpolation_only_where_told():
    student, teacher = random_logits(1, 4, 30), random_logits(2, 4, 30)
    exact, targets = (sparse_of(teacher, 5, stored) for stored in ((1.0, 3.0), (1.0, 2.0, 4.0, 8.0)))
    for loss in (ForwardKL, ReverseKL):
        with pytest.raises(ConfigError, match="temperature 3 is not stored"):
            loss(temperature=3.0)(student, targets)
        near = loss(temperature=3.0, allow_interpolation=True)(student, targets)
        assert relative(near, loss(temperature=3.0)(student, exact)) < 0.02


@pytest.mark.parametrize("loss", ["forward_kl", "reverse_kl"])
def test_ones_own_loop_may_ask_for_interpolation(loss):
    student, teacher = random_logits(1, 4, 30), random_logits(2, 4, 30)
    exact, targets = (sparse_of(teacher, 5, stored) for stored in ((1.0, 3.0), (1.0, 2.0, 4.0, 8.0)))
    with pytest.raises(ConfigError, match=r"temperature 3 is not stored.*allow_interpolation"):
        kd_loss(student, targets, temperature=3.0, loss=loss)
    near = kd_loss(student, targets, temperature=3.0, loss=loss, allow_interpolation=True)
    assert relative(near, kd_loss(student, exact, temperature=3.0, loss=loss)) < 0.02


# Reverse KL


@given(pair=pairs(), temperature=TEMPERATURES)
def test_reverse_kl_is_forward_kl_the_other_way_round(pair, temperature):
    student, teacher = (each.clamp(-20, 20) for each in pair)
    expected = forward_kl(teacher, dense_of(student), temperature)
    assert relative(reverse_kl(student, dense_of(teacher), temperature), expected) < 1e-10
    loss = ReverseKL(temperature=temperature)
    assert relative(loss(student, dense_of(teacher)), temperature**2 * expected) < 1e-10
    assert relative(loss.unscaled(loss(student, dense_of(teacher))), expected) < 1e-10


@pytest.mark.parametrize("student_masks_too", [False, True])
def test_reverse_kl_compares_on_the_classes_that_the_teacher_does_not_mask(student_masks_too):
    student, teacher = random_logits(4, 3, 5), random_logits(5, 3, 5)
    teacher[:, 1] = -torch.inf
    if student_masks_too:
        student[:, 1] = -torch.inf
    student.requires_grad_()
    loss = reverse_kl(student, dense_of(teacher), 2.0)
    (gradient,) = torch.autograd.grad(loss.sum(), student)
    kept = [0, 2, 3, 4]
    assert relative(loss, reverse_kl(student[:, kept], dense_of(teacher[:, kept]), 2.0)) < 1e-12
    assert (gradient[:, 1] == 0).all()
    assert torch.isfinite(gradient).all()


# Sampled targets


def sampled_of(p: Tensor, ids: Tensor, weights: Tensor) -> SampledTargets:
    entropy = torch.special.entr(p).sum(dim=-1)
    return SampledTargets(ids=ids, weights=weights, entropy=entropy, num_classes=p.shape[-1])


@given(pair=pairs())
def test_sampled_kl_with_the_exact_weights_is_the_dense_one(pair):
    student, teacher = pair
    p = torch.softmax(teacher, dim=-1)
    targets = sampled_of(p, torch.arange(p.shape[1]).expand_as(p), p)
    student.requires_grad_()
    ours, dense = ForwardKL(temperature=1.0)(student, targets), forward_kl(student, dense_of(teacher))
    assert relative(ours, dense) < 1e-9
    gradients = [torch.autograd.grad(each.sum(), student)[0] for each in (ours, dense)]
    assert relative(*gradients) < 1e-9


def test_the_mean_over_all_draws_is_the_dense_loss_and_gradient():
    """One draw, enumerated: exactly unbiased."""
    student, teacher = random_logits(3, 1, 6).requires_grad_(), random_logits(4, 1, 6)
    p = torch.softmax(teacher, dim=-1)
    draws = [sampled_of(p, torch.tensor([[c, 0]]), torch.tensor([[1.0, 0.0]], dtype=p.dtype)) for c in range(6)]
    mean = sum(p[0, c] * forward_kl(student, draws[c]) for c in range(6))
    dense = forward_kl(student, dense_of(teacher))
    assert relative(mean, dense) < 1e-12
    gradients = [torch.autograd.grad(each.sum(), student)[0] for each in (mean, dense)]
    assert relative(*gradients) < 1e-12


def test_an_unused_draw_of_an_impossible_class_adds_nothing():
    student = torch.tensor([[0.0, 0.0, -torch.inf]], requires_grad=True)
    p = torch.tensor([[0.5, 0.5, 0.0]])
    loss = forward_kl(student, sampled_of(p, torch.tensor([[0, 1, 2]]), p))
    (gradient,) = torch.autograd.grad(loss.sum(), student)
    assert abs(loss.item()) < 1e-6
    assert gradient.abs().max() < 1e-6


def test_draws_serve_forward_kl_at_temperature_one_only():
    p = torch.full((2, 4), 0.25)
    targets, logits = sampled_of(p, torch.zeros(2, 1, dtype=torch.long), torch.ones(2, 1)), torch.zeros(2, 4)
    assert ForwardKL.linear_in_targets
    assert not hasattr(ReverseKL, "linear_in_targets")
    with pytest.raises(ConfigError, match="cannot be softened; set temperature: 1"):
        ForwardKL(temperature=4.0)(logits, targets)
    with pytest.raises(ConfigError, match="linear in the teacher's probabilities"):
        ReverseKL(temperature=1.0)(logits, targets)


# All kinds of targets


def every_kind(covered: Tensor | None) -> dict[str, Targets]:
    """Targets of six classes for logits `[2, 3, 6]`; what does not count is zero, as a store leaves it."""
    teacher = random_logits(2, 2, 3, 6)
    p, sparse = torch.softmax(teacher, dim=-1), sparse_of(teacher, 2, (1.0, 4.0))
    used = torch.ones(2, 3, dtype=torch.bool) if covered is None else covered
    dense = dense_of(teacher)
    return {
        "dense": DenseTargets(values=dense.values * used[..., None], row_max=dense.row_max * used, covered=covered),
        "sparse": SparseTargets(
            ids=sparse.ids * used[..., None],
            head=sparse.head * used[..., None],
            tails=sparse.tails * used[..., None],
            temperatures=(1.0, 4.0),
            num_classes=6,
            covered=covered,
        ),
        "sampled": SampledTargets(
            ids=torch.arange(6).expand(2, 3, 6) * used[..., None],
            weights=p * used[..., None],
            entropy=torch.special.entr(p).sum(dim=-1) * used,
            num_classes=6,
            covered=covered,
        ),
    }


@pytest.mark.parametrize("kind", ["dense", "sparse", "sampled"])
@pytest.mark.parametrize("loss", ["forward_kl", "reverse_kl"])
def test_only_covered_tokens_count(kind, loss):
    if (kind, loss) == ("sampled", "reverse_kl"):
        return
    covered = torch.tensor([[True, False, True], [False, False, True]])
    student = random_logits(1, 2, 3, 6).requires_grad_()
    alone = every_kind(None)[kind]
    ours = kd_loss(student, every_kind(covered)[kind], temperature=1.0, loss=loss)
    (gradient,) = torch.autograd.grad(ours, student)
    kl = {"forward_kl": ForwardKL, "reverse_kl": ReverseKL}[loss](temperature=1.0)
    assert relative(ours, kl(student, alone)[covered].mean()) < 1e-12
    assert (gradient[~covered] == 0).all()
    assert (gradient[covered] != 0).any()
    nothing = kd_loss(student, every_kind(torch.zeros(2, 3, dtype=torch.bool))[kind], temperature=1.0, loss=loss)
    assert nothing.item() == 0
    assert (torch.autograd.grad(nothing, student)[0] == 0).all()
    assert relative(kd_loss(student, alone, temperature=1.0, loss=loss), kl(student, alone).mean()) < 1e-12


@pytest.mark.parametrize("kind", ["dense", "sparse", "sampled"])
def test_a_student_of_another_shape_is_refused(kind):
    targets = every_kind(None)[kind]
    for shape in ((2, 3, 7), (2, 4, 6), (6, 6)):
        with pytest.raises(ConfigError, match="expected the same rows and classes"):
            forward_kl(torch.zeros(shape), targets)


def test_features_are_no_logits():
    targets = FeatureTargets(values=torch.zeros(2, 4))
    for loss in (ForwardKL(temperature=1.0), ReverseKL()):
        with pytest.raises(ConfigError, match="expected an output of kind logits"):
            loss(torch.zeros(2, 4), targets)


def test_an_unknown_loss_is_refused():
    with pytest.raises(ConfigError, match="'mse' is unknown; the choices are forward_kl, reverse_kl"):
        kd_loss(torch.zeros(1, 2), dense_of(torch.zeros(1, 2)), loss="mse")
    assert isinstance(ReverseKL(), DistillLoss)
    with pytest.raises(ConfigError, match="temperature is"):
        ReverseKL(temperature=0.0)


def test_kd_loss_of_no_rows_is_0():
    logits = torch.zeros(0, 3, requires_grad=True)
    value = kd_loss(logits, DenseTargets(values=torch.zeros(0, 3), row_max=torch.zeros(0)))
    value.backward()
    assert value == 0
    assert logits.grad.shape == (0, 3)
