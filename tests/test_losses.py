from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kdpipe.errors import ConfigError
from kdpipe.losses import DistillLoss, ForwardKL, forward_kl, kd_loss
from kdpipe.targets import DenseTargets

GOLDEN = Path(os.environ.get("KDPIPE_GOLDEN", Path(__file__).parents[2] / "shared" / "golden"))
TEMPERATURES = st.floats(0.5, 20)


def golden_cases(loss: str) -> list:
    path = GOLDEN / "losses.json"
    if not path.is_file():
        return [pytest.param(None, marks=pytest.mark.skip(reason=f"no golden values at {path} (env KDPIPE_GOLDEN)"))]
    cases = [case for case in json.loads(path.read_text())["cases"] if case["loss"] == loss]
    assert cases, f"{path} has no case of {loss}"
    return [pytest.param(case, id=case["id"]) for case in cases]


def targets_of(logits: Tensor) -> DenseTargets:
    row_max = logits.amax(dim=-1)
    return DenseTargets(values=logits - row_max.unsqueeze(-1), row_max=row_max)


def random_logits(seed: int, *shape: int, scale: float = 3.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


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
    targets = targets_of(teacher)
    assert relative(ForwardKL(temperature=temperature)(student, targets), expected) < 1e-10
    assert relative(forward_kl(student, targets, temperature) * temperature**2, expected) < 1e-10
    assert relative(kd_loss(student, targets, temperature=temperature), expected.mean()) < 1e-10


@given(pair=pairs(), temperature=TEMPERATURES)
def test_gradient_is_that_of_the_definition(pair, temperature):
    student, teacher = pair
    student.requires_grad_()
    (ours,) = torch.autograd.grad(kd_loss(student, targets_of(teacher), temperature=temperature), student)
    p, q = (torch.softmax(each.detach() / temperature, dim=-1) for each in (teacher, student))
    assert relative(ours, temperature * (q - p) / len(student)) < 1e-10


@pytest.mark.parametrize("case", golden_cases("forward_kl"))
def test_golden_value_and_gradient(case):
    student = torch.tensor(case["inputs"]["student_logits"], dtype=torch.float64, requires_grad=True)
    targets = targets_of(torch.tensor(case["inputs"]["teacher_logits"], dtype=torch.float64))
    temperature, expected = case["params"]["T"], case["expected"]
    loss = ForwardKL(temperature=temperature)
    per_row = loss(student, targets)
    rtol, atol = (case["tol"]["rtol"], case["tol"]["atol"]) if "high-T limit" in case["tags"] else (1e-10, 1e-10)
    if not case["params"]["t_squared"]:
        per_row = loss.unscaled(per_row)
    elif "value_unscaled" in expected:
        assert loss.unscaled(per_row).mean().item() == pytest.approx(expected["value_unscaled"], rel=rtol, abs=atol)
    assert per_row.tolist() == pytest.approx(expected["per_row"], rel=rtol, abs=atol)
    assert per_row.mean().item() == pytest.approx(expected["value"], rel=rtol, abs=atol)
    if case["params"]["t_squared"]:
        assert kd_loss(student, targets, temperature=temperature).item() == per_row.mean().item()
    (gradient,) = torch.autograd.grad(per_row.mean(), student)
    wanted = torch.tensor(expected["grad_student_logits"], dtype=torch.float64)
    assert (gradient - wanted).abs().max() <= atol + rtol * wanted.abs().max()


def test_the_definition_tells_wrong_formulas_apart():
    student, teacher, temperature = random_logits(0, 6, 5), random_logits(1, 6, 5, scale=9.0), 3.0
    targets = targets_of(teacher)
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
    ours = ForwardKL(temperature=temperature)(student, targets_of(teacher))
    assert relative(ForwardKL(temperature=temperature)(student + shift, targets_of(teacher)), ours) < 1e-9
    shifted = DenseTargets(values=teacher + shift, row_max=torch.zeros(len(teacher)))
    assert relative(ForwardKL(temperature=temperature)(student, shifted), ours) < 1e-9


@given(pair=pairs(), temperature=TEMPERATURES, data=st.data())
def test_renaming_classes_changes_nothing(pair, temperature, data):
    student, teacher = pair
    order = data.draw(st.permutations(range(student.shape[1])))
    ours = ForwardKL(temperature=temperature)(student, targets_of(teacher))
    renamed = ForwardKL(temperature=temperature)(student[:, order], targets_of(teacher[:, order]))
    assert relative(renamed, ours) < 1e-10


@given(pair=pairs(), temperature=TEMPERATURES, copies=st.integers(2, 4))
def test_duplicating_a_batch_changes_nothing(pair, temperature, copies):
    student, teacher = pair
    once = kd_loss(student, targets_of(teacher), temperature=temperature)
    more = kd_loss(student.repeat(copies, 1), targets_of(teacher.repeat(copies, 1)), temperature=temperature)
    assert relative(more, once) < 1e-12


@given(pair=pairs(), temperature=TEMPERATURES)
def test_never_negative_and_zero_at_equality(pair, temperature):
    student, teacher = pair
    assert (forward_kl(student, targets_of(teacher), temperature) > -1e-13).all()
    same = teacher.clone().requires_grad_()
    value = kd_loss(same, targets_of(teacher), temperature=temperature)
    assert abs(value.item()) < 1e-10
    (gradient,) = torch.autograd.grad(value, same)
    assert gradient.abs().max() < 1e-12


def test_infinite_temperature_is_half_the_mean_square_of_centred_logits():
    student, teacher = random_logits(2, 4, 7), random_logits(3, 4, 7)
    difference = student - teacher
    centred = difference - difference.mean(dim=-1, keepdim=True)
    limit = centred.square().sum(dim=-1) / (2 * 7)
    errors = [
        relative(ForwardKL(temperature=temperature)(student, targets_of(teacher)), limit) for temperature in (1e2, 1e4)
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
    loss = kd_loss(student, targets_of(-1e4 * signs), temperature=temperature)
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
    loss = ForwardKL(temperature=2.0)(student, targets_of(teacher))
    (gradient,) = torch.autograd.grad(loss.sum(), student)
    p, q = (torch.softmax(each.detach() / 2.0, dim=-1) for each in (teacher, student))
    assert relative(loss, definition(student.detach(), teacher, 2.0)) < 1e-10
    assert relative(gradient, 2.0 * (q - p)) < 1e-10


def test_gradcheck():
    student, targets = random_logits(6, 3, 4).requires_grad_(), targets_of(random_logits(7, 3, 4))
    assert torch.autograd.gradcheck(ForwardKL(temperature=2.5), (student, targets))


def test_tokens_are_rows():
    student, teacher = random_logits(8, 2, 3, 5), random_logits(9, 2, 3, 5)
    per_token = ForwardKL(temperature=2.0)(student, targets_of(teacher))
    assert per_token.shape == (2, 3)
    assert relative(per_token, definition(student, teacher, 2.0)) < 1e-10
    flat = kd_loss(student.flatten(0, 1), targets_of(teacher.flatten(0, 1)), temperature=2.0)
    assert relative(kd_loss(student, targets_of(teacher), temperature=2.0), flat) < 1e-12


def test_autocast_does_not_narrow_the_loss():
    student, targets = random_logits(10, 8, 6).float(), targets_of(random_logits(11, 8, 6).float())
    plain = ForwardKL(temperature=4.0)(student, targets)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ForwardKL(temperature=4.0)(student, targets), plain)


def test_float16_targets_are_as_good_as_their_rounding():
    student, teacher = random_logits(12, 50, 10).float(), random_logits(13, 50, 10).float()
    exact = targets_of(teacher)
    narrow = DenseTargets(values=exact.values.half(), row_max=exact.row_max)
    assert relative(forward_kl(student, narrow, 2.0), forward_kl(student, exact, 2.0)) < 0.02
    assert not torch.equal(forward_kl(student, narrow, 2.0), forward_kl(student, exact, 2.0))


def test_forward_kl_is_a_distill_loss_with_a_positive_temperature():
    assert isinstance(ForwardKL(), DistillLoss)
    for wrong in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ConfigError, match="temperature is"):
            ForwardKL(temperature=wrong)
