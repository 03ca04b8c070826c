"""Balanced KL, whose definition here is the paper's, written out."""

from __future__ import annotations

import pytest
import torch

from kdpipe.errors import ConfigError
from kdpipe.losses import BalancedKL, DistillLoss, ForwardKL
from kdpipe.targets import FeatureTargets
from loss_definitions import random_logits, softmax
from toy_targets import dense_of, sparse_of

STUDENT, TEACHER = random_logits(0, 6, 5), random_logits(1, 6, 5)
COUNTS = [500, 100, 50, 10, 1]


def weights(beta, counts=COUNTS):
    effective = torch.tensor([(1 - beta**count) / (1 - beta) for count in counts], dtype=torch.float64)
    return 5 * (1 / effective) / (1 / effective).sum()


def gradient(loss, student=STUDENT):
    student = student.clone().requires_grad_()
    loss(student).sum().backward()
    return student.grad


@pytest.mark.parametrize(("temperature", "beta"), [(1.0, 0.99), (2.0, 0.9999), (4.0, 0.5)])
def test_its_gradient_is_that_of_the_paper(temperature, beta):
    loss = BalancedKL(class_counts=COUNTS, temperature=temperature, beta=beta)
    p = softmax(TEACHER, temperature)

    def of_the_paper(student):
        q = softmax(student, temperature)
        return -(temperature**2) * (weights(beta) * p * q.log()).sum(dim=-1)

    torch.testing.assert_close(gradient(lambda student: loss(student, dense_of(TEACHER))), gradient(of_the_paper))


def test_it_is_0_where_the_student_says_the_reweighted_teacher_and_nowhere_else():
    loss = BalancedKL(class_counts=COUNTS, temperature=2.0, beta=0.99)
    reweighted = TEACHER + 2.0 * weights(0.99).log()
    at = loss(reweighted, dense_of(TEACHER))
    torch.testing.assert_close(at, torch.zeros(6, dtype=torch.float64))
    assert (loss(STUDENT, dense_of(TEACHER)) > 0.01).all()


def test_classes_of_one_size_make_it_forward_kl():
    value = BalancedKL(class_counts=[7] * 5, temperature=3.0)(STUDENT, dense_of(TEACHER))
    torch.testing.assert_close(value, ForwardKL(temperature=3.0)(STUDENT, dense_of(TEACHER)))
    torch.testing.assert_close(BalancedKL(class_counts=COUNTS, beta=0).weights, torch.ones(5, dtype=torch.float64))


def test_rare_classes_weigh_more():
    assert isinstance(BalancedKL(class_counts=COUNTS), DistillLoss)
    found = BalancedKL(class_counts=COUNTS).weights
    assert (found.diff() > 0).all()
    assert float(found.mean()) == pytest.approx(1)
    values = torch.tensor([4.0, 8.0])
    assert BalancedKL(class_counts=COUNTS, temperature=2.0).unscaled(values).tolist() == [1.0, 2.0]


def test_masked_classes_and_large_logits_are_finite():
    masked = TEACHER.clone()
    masked[:, 1] = -torch.inf
    loss = BalancedKL(class_counts=COUNTS)
    for teacher, student in ((masked, STUDENT), (1e4 * TEACHER.sign(), -1e4 * TEACHER.sign())):
        assert loss(student, dense_of(teacher)).isfinite().all()
        assert gradient(lambda each, teacher=teacher: loss(each, dense_of(teacher)), student).isfinite().all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"class_counts": [1, 0, 2, 0, 5]}, "no labelled row of class 1, 3"),
        ({"class_counts": []}, "no labelled row of class none at all"),
        ({"class_counts": COUNTS, "beta": 1.0}, "beta is 1.0; expected 0 <= beta < 1"),
        ({"class_counts": COUNTS, "temperature": 0.0}, "temperature"),
    ],
)
def test_numbers_that_mean_nothing_are_refused(arguments, message):
    with pytest.raises(ConfigError, match=message):
        BalancedKL(**arguments)


def test_targets_that_do_not_fit_are_refused():
    with pytest.raises(ConfigError, match="class_counts has 4 numbers, the logits 5 classes; expected one per class"):
        BalancedKL(class_counts=COUNTS[:4])(STUDENT, dense_of(TEACHER))
    with pytest.raises(ConfigError, match="BalancedKL: these targets hold the top k classes and their tail"):
        BalancedKL(class_counts=COUNTS)(STUDENT, sparse_of(TEACHER, 3, (1.0, 2.0)))
    with pytest.raises(ConfigError, match="a loss on logits got features"):
        BalancedKL(class_counts=COUNTS)(STUDENT, FeatureTargets(values=torch.zeros(6, 5)))
