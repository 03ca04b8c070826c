"""What is true of every loss, whatever its formula."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import kdpipe.losses as kdpipe_losses
from kdpipe.batches import Batch
from kdpipe.losses import LossTerm, needs_labels, needs_whole_batch, values_of
from kdpipe.terms import DistillTerm
from loss_definitions import DEFINED, mean_loss, random_logits, value_and_gradient
from toy_targets import dense_of

NAMES = list(DEFINED)
LOSSES = {name: each.make(kdpipe_losses) for name, each in DEFINED.items()}
TOPK_RENORM = kdpipe_losses.TopKRenormKL(temperature=2.0)
LABELLED = [name for name in NAMES if needs_labels(LOSSES[name])]
RELATIONAL = [name for name in NAMES if needs_whole_batch(LOSSES[name])]

every_loss = pytest.mark.parametrize("name", NAMES)
few = settings(max_examples=12)  # for each of many losses


def with_seed(test):
    """Try a law on batches of 2 to 5 rows and 2 to 7 classes."""
    return few(given(seed=st.integers(0, 2**31), num_rows=st.integers(2, 5), num_classes=st.integers(2, 7))(test))


def which(condition) -> list[str]:
    return [name for name in NAMES if condition(DEFINED[name])]


def triple(seed: int, num_rows: int, num_classes: int, scale: float = 3.0) -> tuple[Tensor, Tensor, Tensor]:
    """Student, teacher, labels."""
    generator = torch.Generator().manual_seed(seed + 2)
    labels = torch.randint(num_classes, (num_rows,), generator=generator)
    shape = (num_rows, num_classes)
    return random_logits(seed, *shape, scale=scale), random_logits(seed + 1, *shape, scale=scale), labels


def close(found, expected, tolerance: float = 1e-8) -> None:
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def test_what_losses_need_is_declared():
    assert set(LABELLED) == {"dkd", "nkd"}
    assert RELATIONAL == ["dist"]
    linear = {name for name in NAMES if getattr(LOSSES[name], "linear_in_targets", False)}
    assert linear == {"forward_kl", "soft_target_ce", "standardised_kl", "standardised_ce"}


# Invariances


@pytest.mark.parametrize("name", which(lambda each: each.shifts))
@few
@given(seed=st.integers(0, 2**31), constant=st.floats(-50, 50))
def test_a_constant_per_row_changes_nothing(name, seed, constant):
    student, teacher, labels = triple(seed, 3, 5)
    shift = constant * torch.arange(1, 4, dtype=torch.float64).unsqueeze(-1)
    expected = value_and_gradient(LOSSES[name], student, dense_of(teacher), labels)
    close(value_and_gradient(LOSSES[name], student + shift, dense_of(teacher), labels), expected, 1e-7)
    close(value_and_gradient(LOSSES[name], student, dense_of(teacher + shift), labels), expected, 1e-7)


@pytest.mark.parametrize("name", which(lambda each: not each.shifts))
def test_a_loss_that_sees_a_constant_says_so(name):
    student, teacher, labels = triple(0, 3, 5)
    moved = mean_loss(LOSSES[name], student + 1, dense_of(teacher), labels)
    assert abs(moved - mean_loss(LOSSES[name], student, dense_of(teacher), labels)) > 0.1


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("standardised")])
@few
@given(seed=st.integers(0, 2**31), scale=st.floats(0.2, 20))
def test_standardised_losses_do_not_see_the_scale_of_either_side(name, seed, scale):
    student, teacher, _ = triple(seed, 3, 5)
    expected = mean_loss(LOSSES[name], student, dense_of(teacher), None)
    close(mean_loss(LOSSES[name], scale * student, dense_of(teacher), None), expected, 1e-5)
    close(mean_loss(LOSSES[name], student, dense_of(scale * teacher), None), expected, 1e-5)
    assert abs(mean_loss(LOSSES[name], -student, dense_of(teacher), None) - expected) > 1e-6 * abs(expected)


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "standardised_kl", "gjsd", "dkd", "dist"])
@with_seed
def test_a_high_temperature_leaves_float32_its_digits(name, seed, num_rows, num_classes):
    """T^2 = 400 shows what is lost where student and teacher are nearly alike."""
    loss = replace(LOSSES[name], temperature=20.0)
    student, teacher, labels = triple(seed, num_rows, num_classes, scale=2.0)
    exact = values_of(loss, student, dense_of(teacher), labels)
    found = values_of(loss, student.float(), dense_of(teacher.float()), labels).double()
    exact, found = (400 * loss.unscaled(each) for each in (exact, found))
    torch.testing.assert_close(found, exact, rtol=1e-5, atol=1e-5)


@every_loss
@with_seed
def test_renaming_classes_renames_the_gradient(name, seed, num_rows, num_classes):
    student, teacher, labels = triple(seed, num_rows, num_classes)
    order = torch.randperm(num_classes, generator=torch.Generator().manual_seed(seed))
    value, gradient = value_and_gradient(LOSSES[name], student, dense_of(teacher), labels)
    renamed = value_and_gradient(LOSSES[name], student[:, order], dense_of(teacher[:, order]), order.argsort()[labels])
    close(renamed, (value, gradient[:, order]), 1e-6)


@pytest.mark.parametrize("name", which(lambda each: each.padded))
@with_seed
def test_a_class_that_both_rule_out_changes_nothing(name, seed, num_rows, num_classes):
    student, teacher, labels = triple(seed, num_rows, num_classes)
    value, gradient = value_and_gradient(LOSSES[name], student, dense_of(teacher), labels)
    pad = torch.full((num_rows, 2), -torch.inf, dtype=torch.float64)
    padded = [torch.cat([each, pad], dim=-1) for each in (student, teacher)]
    expected = value, torch.cat([gradient, torch.zeros_like(pad)], dim=-1)
    close(value_and_gradient(LOSSES[name], padded[0], dense_of(padded[1]), labels), expected)


@every_loss
@with_seed
def test_duplicating_a_batch_changes_nothing(name, seed, num_rows, num_classes):
    student, teacher, labels = triple(seed, num_rows, num_classes)
    once = mean_loss(LOSSES[name], student, dense_of(teacher), labels)
    twice = mean_loss(LOSSES[name], student.repeat(3, 1), dense_of(teacher.repeat(3, 1)), labels.repeat(3))
    close(twice, once)


@every_loss
@with_seed
def test_leaving_rows_uncovered_is_deleting_them(name, seed, num_rows, num_classes):
    """Whatever stands in their targets, as a store leaves it."""
    student, teacher, labels = triple(seed, 2 * num_rows, num_classes)
    covered = torch.arange(2 * num_rows) % 2 == 0
    targets = dense_of(teacher, covered)
    targets = replace(targets, values=torch.where(covered[:, None], targets.values, 0.0))
    value, gradient = value_and_gradient(LOSSES[name], student, targets, labels)
    alone = value_and_gradient(LOSSES[name], student[covered], dense_of(teacher[covered]), labels[covered])
    close((value, gradient[covered]), alone)
    assert (gradient[~covered] == 0).all()


@every_loss
def test_a_batch_of_which_nothing_counts_is_0(name):
    student, teacher, labels = triple(0, 3, 4)
    nothing = torch.zeros(3, dtype=torch.bool)
    value, gradient = value_and_gradient(LOSSES[name], student, dense_of(teacher, nothing), labels)
    assert value == 0
    assert (gradient == 0).all()


@pytest.mark.parametrize("name", LABELLED)
def test_rows_without_label_are_left_out(name):
    student, teacher, labels = triple(0, 6, 4)
    known = torch.tensor([True, False, True, True, False, True])
    expected = value_and_gradient(LOSSES[name], student[known], dense_of(teacher[known]), labels[known])
    for missing in (-1, -100):
        given_labels = torch.where(known, labels, missing)
        value, gradient = value_and_gradient(LOSSES[name], student, dense_of(teacher), given_labels)
        close((value, gradient[known]), expected)
        assert (gradient[~known] == 0).all()
        assert (values_of(LOSSES[name], student, dense_of(teacher), given_labels)[~known] == 0).all()
    covered = torch.tensor([True, True, False, True, False, True])
    both = mean_loss(LOSSES[name], student, dense_of(teacher, covered), torch.where(known, labels, -1))
    used = known & covered
    close(both, mean_loss(LOSSES[name], student[used], dense_of(teacher[used]), labels[used]))


@every_loss
def test_tokens_are_rows(name):
    student, teacher, labels = triple(3, 6, 5)
    covered = torch.tensor([True, False, True, True, True, False])
    flat = value_and_gradient(LOSSES[name], student, dense_of(teacher, covered), labels)
    targets = dense_of(teacher.view(2, 3, 5), covered.view(2, 3))
    value, gradient = value_and_gradient(LOSSES[name], student.view(2, 3, 5), targets, labels.view(2, 3))
    close((value, gradient.view(6, 5)), flat, 1e-12)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in RELATIONAL])
def test_a_row_does_not_see_the_other_rows(name):
    student, teacher, labels = triple(4, 6, 5)
    whole = values_of(LOSSES[name], student, dense_of(teacher), labels)
    parts = [
        values_of(LOSSES[name], student[rows], dense_of(teacher[rows]), labels[rows])
        for rows in (slice(0, 4), slice(4, 6))
    ]
    close(torch.cat(parts), whole, 1e-12)


@pytest.mark.parametrize("name", RELATIONAL)
def test_a_loss_on_whole_batches_says_so(name):
    student, teacher, labels = triple(4, 6, 5)
    whole = values_of(LOSSES[name], student, dense_of(teacher), labels)
    part = values_of(LOSSES[name], student[:4], dense_of(teacher[:4]), labels[:4])
    assert (part - whole[:4]).abs().max() > 0.01


# Values


@pytest.mark.parametrize("name", which(lambda each: each.zero))
@with_seed
def test_0_where_student_and_teacher_agree_and_above_0_elsewhere(name, seed, num_rows, num_classes):
    student, teacher, labels = triple(seed, num_rows, num_classes)
    assert (values_of(LOSSES[name], student, dense_of(teacher), labels) > -1e-12).all()
    value, gradient = value_and_gradient(LOSSES[name], teacher, dense_of(teacher), labels)
    assert abs(value) < 1e-9
    assert gradient.abs().max() < 1e-7


@pytest.mark.parametrize("name", ["soft_target_ce", "standardised_ce", "nkd"])
def test_a_cross_entropy_is_least_at_the_teacher_but_not_0(name):
    _, teacher, labels = triple(0, 3, 5)
    value, gradient = value_and_gradient(LOSSES[name], teacher, dense_of(teacher), labels)
    assert value > 0.1
    if name != "nkd":
        assert gradient.abs().max() < 1e-9


@every_loss
def test_gradcheck(name):
    student, teacher, labels = triple(6, 3, 4)
    targets = dense_of(teacher)
    assert torch.autograd.gradcheck(
        lambda logits: values_of(LOSSES[name], logits, targets, labels), student.requires_grad_()
    )


@pytest.mark.parametrize(
    ("name", "masked"), [(name, False) for name in NAMES] + [(name, True) for name in which(lambda each: each.padded)]
)
def test_second_derivatives(name, masked):
    """Penalties on gradients, and Hessians, are of the loss as well."""
    student, teacher, labels = triple(6, 3, 4)
    if masked:
        teacher[torch.arange(3), (labels + 1) % 4] = -torch.inf
    targets = dense_of(teacher)
    assert torch.autograd.gradgradcheck(
        lambda logits: values_of(LOSSES[name], logits, targets, labels), student.requires_grad_()
    )


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "gjsd", "soft_target_ce", "total_variation", "logit_mse"])
def test_gradients_of_single_rows_by_torch_func(name):
    student, teacher, _ = triple(6, 3, 4)

    def value(row, teachers):
        return values_of(LOSSES[name], row.unsqueeze(0), dense_of(teachers.unsqueeze(0)), None).sum()

    gradients = torch.func.vmap(torch.func.grad(value))(student, teacher)
    _, expected = value_and_gradient(LOSSES[name], student, dense_of(teacher), None)
    close(gradients, len(student) * expected, 1e-12)


@pytest.mark.parametrize("name", LABELLED)
def test_where_both_rule_out_all_but_one_class(name):
    """Neither the label alone nor the label's absence is a reason for NaN."""
    student, labels = torch.zeros(2, 3, dtype=torch.float64), torch.tensor([0, 0])
    student[0, 1:] = -torch.inf
    student[1, 0] = -torch.inf
    value, gradient = value_and_gradient(LOSSES[name], student, dense_of(student.clone()), labels)
    assert torch.isfinite(value).all()
    assert torch.isfinite(gradient).all()


@every_loss
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(("num_rows", "num_classes"), [(1, 2), (1, 5), (3, 2), (3, 5)])
def test_extreme_logits_are_finite(name, dtype, num_rows, num_classes):
    signs = torch.ones(num_rows, num_classes)
    signs[:, 1::2] = -1
    signs[0, 0] = 0.5
    for teacher in (1e4 * signs, -1e4 * signs, signs):
        for labels in (torch.zeros(num_rows, dtype=torch.int64), torch.ones(num_rows, dtype=torch.int64)):
            targets = dense_of(teacher)
            value, gradient = value_and_gradient(LOSSES[name], (1e4 * signs).to(dtype), targets, labels)
            assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
            assert torch.isfinite(value)
            assert gradient.dtype == dtype
            # float16 ends at 65,504, which a squared difference of such logits exceeds in its gradient.
            assert torch.isfinite(gradient).all() or (dtype == torch.float16 and name.endswith("logit_mse"))


@every_loss
def test_a_student_that_says_nothing_yet_is_finite(name):
    """Equal logits, as a head of zeros gives them."""
    _, teacher, labels = triple(0, 3, 4)
    for student in (torch.zeros(3, 4), torch.full((3, 4), 0.1)):
        value, gradient = value_and_gradient(LOSSES[name], student, dense_of(teacher.float()), labels)
        assert torch.isfinite(value)
        assert torch.isfinite(gradient).all()


@every_loss
def test_a_teacher_that_masks_classes_is_finite(name):
    student, teacher, labels = triple(1, 4, 5)
    teacher[:, 1] = -torch.inf
    teacher[2, 3:] = -torch.inf
    teacher[3, :] = -torch.inf
    teacher[3, labels[3]] = 0.0
    value, gradient = value_and_gradient(LOSSES[name], student, dense_of(teacher), labels)
    assert torch.isfinite(value)
    assert torch.isfinite(gradient).all()
    assert gradient.abs().max() > 0


@every_loss
def test_autocast_does_not_narrow_a_loss(name):
    student, teacher, labels = triple(10, 8, 6)
    targets = dense_of(teacher.float())
    plain = values_of(LOSSES[name], student.float(), targets, labels)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(values_of(LOSSES[name], student.float(), targets, labels), plain)


@every_loss
def test_unscaled_leaves_out_T_squared_alone(name):
    loss = LOSSES[name]
    student, teacher, labels = triple(11, 4, 5)
    values = values_of(loss, student, dense_of(teacher), labels)
    ratio = (values / loss.unscaled(values)).unique()
    scaled = {"forward_kl", "reverse_kl", "soft_target_ce", "dkd", "dist", "standardised_kl", "standardised_reverse_kl"}
    expected = loss.temperature**2 if name in scaled | {"standardised_ce"} else 1.0
    close(ratio, torch.full_like(ratio, expected), 1e-12)


@pytest.mark.parametrize(
    ("make", "limit"),
    [
        (lambda temperature: kdpipe_losses.ForwardKL(temperature=temperature), 1 / 2),
        (lambda temperature: kdpipe_losses.ReverseKL(temperature=temperature), 1 / 2),
        (lambda temperature: kdpipe_losses.GeneralisedJSD(beta=0.3, normalise=True, temperature=temperature), 1 / 2),
    ],
)
def test_infinite_temperature_is_the_squared_distance_of_centred_logits(make, limit):
    student, teacher, _ = triple(2, 4, 7)
    expected = limit / 7 * mean_loss(LOSSES["centred_logit_mse"], student, dense_of(teacher), None)
    errors = []
    for temperature in (1e2, 1e4):
        loss = make(temperature)
        value = loss.unscaled(mean_loss(loss, student, dense_of(teacher), None)) * temperature**2
        errors.append(abs(value / expected - 1))
    assert errors[1] < 1e-3
    assert errors[0] > 10 * errors[1]


# In training


@pytest.mark.parametrize("name", LABELLED)
def test_a_training_term_leaves_rows_without_label_out(name):
    student, teacher, labels = triple(0, 6, 4)
    labels[1] = -1
    covered = torch.tensor([True, True, False, True, True, True])
    targets = dense_of(teacher, covered)
    batch = Batch(rows=torch.arange(6).numpy(), inputs=student, labels=labels, targets={"big": {"logits": targets}})
    term = DistillTerm(term=LossTerm(teacher="big", output="logits", loss=LOSSES[name], weight=1.0))
    assert term.valid(batch).tolist() == [True, False, False, True, True, True]
    assert torch.equal(term.values(student, batch), values_of(LOSSES[name], student, targets, labels))


@every_loss
def test_whatever_stands_in_rows_that_do_not_count_has_no_part_in_the_gradient(name):
    """NaN too, on either side; the others' is that without these rows."""
    loss = LOSSES[name]
    student, teacher, labels = triple(7, 6, 4)
    counts = torch.tensor([True, False, True, True, False, True])
    known = {"labels": labels} if name in LABELLED else {}
    there = student[counts].requires_grad_()
    kept = {key: each[counts] for key, each in known.items()}
    expected = kdpipe_losses.kd_loss(there, dense_of(teacher[counts]), loss=loss, **kept)
    expected.backward()
    if name in LABELLED:
        unlabelled = torch.where(counts, labels, -1)
        given = torch.where(counts.unsqueeze(-1), student, torch.nan).requires_grad_()
        value = kdpipe_losses.kd_loss(given, dense_of(teacher), loss=loss, labels=unlabelled)
        value.backward()
        close(value, expected)
        close(given.grad[counts], there.grad)
        assert (given.grad[~counts] == 0).all()
    for bad in (torch.nan, -torch.inf):
        given = torch.where(counts.unsqueeze(-1), student, bad).requires_grad_()
        said = replace(dense_of(torch.where(counts.unsqueeze(-1), teacher, bad)), covered=counts)
        value = kdpipe_losses.kd_loss(given, said, loss=loss, **known)
        value.backward()
        close(value, expected)
        close(given.grad[counts], there.grad)
        assert (given.grad[~counts] == 0).all()
