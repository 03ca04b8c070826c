"""What single losses promise besides, what they refuse, and `kd_loss`."""

from __future__ import annotations

import itertools
from dataclasses import replace

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import kdpipe.losses as kdpipe_losses
from kdpipe.errors import ConfigError
from kdpipe.losses import (
    DIST,
    DKD,
    LOSSES,
    NKD,
    RKD,
    ULD,
    AttentionTransfer,
    BalancedKL,
    DistillLoss,
    ForwardKL,
    GeneralisedJSD,
    LogitMSE,
    ReverseKL,
    SoftTargetCE,
    TopKRenormKL,
    TotalVariation,
    class_weighted,
    cross_entropy,
    forward_kl,
    kd_loss,
    logit_adjusted,
    reverse_kl,
    standardised,
)
from kdpipe.targets import DenseTargets, FeatureTargets, SampledTargets, SparseTargets
from loss_definitions import DEFINED, mean_loss, random_logits, value_and_gradient
from toy_targets import dense_of, sparse_of

STUDENT, TEACHER = random_logits(0, 6, 5), random_logits(1, 6, 5)
LABELS = torch.tensor([0, 1, 4, 2, 2, 3])
FEATURES = FeatureTargets(values=torch.zeros(6, 5))
DRAWS = SampledTargets(
    ids=torch.zeros(6, 1, dtype=torch.int64), weights=torch.ones(6, 1), entropy=torch.zeros(6), num_classes=5
)


def close(found, expected, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


# Jensen-Shannon


@pytest.mark.parametrize(("end", "kl"), [(0.0, forward_kl), (1.0, reverse_kl)])
@pytest.mark.parametrize(("dtype", "distance", "tolerance"), [(torch.float64, 1e-9, 1e-6), (torch.float32, 1e-4, 1e-2)])
def test_normalised_jsd_is_continuous_at_its_ends(end, kl, dtype, distance, tolerance):
    student, targets = STUDENT.to(dtype) / 3, dense_of(TEACHER.to(dtype) / 3)
    near = GeneralisedJSD(beta=abs(end - distance), normalise=True)
    at = GeneralisedJSD(beta=end, normalise=True)
    close(at(student, targets), kl(student, targets))
    value, gradient = value_and_gradient(near, student, targets, None)
    expected, wanted = value_and_gradient(at, student, targets, None)
    close(value, expected, tolerance)
    close(gradient, wanted, tolerance)


@pytest.mark.parametrize("beta", [1e-12, 1e-9, 1e-7, 1e-5, 1e-3, 0.02, 0.5, 0.98, 1 - 1e-5, 1 - 1e-8])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_jsd_keeps_its_digits_where_one_side_is_sure_of_what_the_other_rules_out(beta, dtype, tolerance):
    teacher = torch.tensor([[20, 0, 0.25], [0, 30, 1], [0.5, 0, 0.25]], dtype=dtype)
    student = torch.tensor([[0, 0.5, 20], [1, 0, 0.5], [40, 0, 40]], dtype=dtype)
    found = GeneralisedJSD(beta=beta, normalise=True)(student, dense_of(teacher)).tolist()
    with mpmath.workdps(50):
        expected = [float(exact_jsd(*rows, mpmath.mpf(beta))) for rows in zip(teacher, student, strict=True)]
    assert found == pytest.approx(expected, rel=tolerance)


def exact_jsd(teacher, student, beta):
    """KL(p || m) / (1 - beta) + KL(q || m) / beta, in mpmath's numbers."""
    p, q = (exact_probabilities(row.tolist()) for row in (teacher, student))
    m = [beta * p_c + (1 - beta) * q_c for p_c, q_c in zip(p, q, strict=True)]
    of_teacher, of_student = (
        mpmath.fsum(r_c * mpmath.log(r_c / m_c) for r_c, m_c in zip(r, m, strict=True)) for r in (p, q)
    )
    return of_teacher / (1 - beta) + of_student / beta


def exact_probabilities(logits):
    shares = [mpmath.exp(z) for z in logits]
    return [each / mpmath.fsum(shares) for each in shares]


def test_the_second_derivative_of_jsd_is_a_number_at_its_ends():
    teacher = torch.tensor([[1.0, -torch.inf, 2, 0], [40, 0, 0, 0]])
    student = torch.tensor([[1.0, 2, 0, 0], [0, 0, 0, 40]], requires_grad=True)
    loss = GeneralisedJSD(beta=0.99999999, normalise=True)(student, dense_of(teacher)).sum()
    (gradient,) = torch.autograd.grad(loss, student, create_graph=True)
    (second,) = torch.autograd.grad(gradient.square().sum(), student)
    assert torch.isfinite(second).all()


def test_jsd_goes_to_0_at_its_ends():
    values = [GeneralisedJSD(beta=beta)(STUDENT, dense_of(TEACHER)) for beta in (1e-1, 1e-3, 1e-6, 1e-12)]
    assert all((later < earlier).all() for earlier, later in itertools.pairwise(values))
    assert (values[-1] < 1e-9).all()
    for beta in (0.0, 1.0):
        with pytest.raises(ConfigError, match="set normalise: true, which gives forward KL at 0 and reverse KL at 1"):
            GeneralisedJSD(beta=beta)
    for beta in (-0.1, 1.5, float("nan")):
        with pytest.raises(ConfigError, match=f"beta is {beta}; expected a number from 0"):
            GeneralisedJSD(beta=beta, normalise=True)


@given(seed=st.integers(0, 2**31), scale=st.floats(0.1, 100))
def test_jsd_at_one_half_is_symmetric_and_at_most_log_2(seed, scale):
    student, teacher = random_logits(seed, 3, 4, scale=scale), random_logits(seed + 1, 3, 4, scale=scale)
    value = GeneralisedJSD()(student, dense_of(teacher))
    close(value, GeneralisedJSD()(teacher, dense_of(student)))
    assert (value <= torch.log(torch.tensor(2.0)) + 1e-12).all()


# DKD and NKD


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_kl_is_the_weighted_sum_of_dkds_parts(temperature):
    targets = dense_of(TEACHER)
    target_class, others = (
        DKD(temperature=temperature, alpha=alpha, beta=1 - alpha)(STUDENT, targets, LABELS) for alpha in (1, 0)
    )
    p_y = torch.softmax(TEACHER / temperature, dim=-1).gather(-1, LABELS[:, None]).squeeze(-1)
    close(target_class + (1 - p_y) * others, ForwardKL(temperature=temperature)(STUDENT, targets))


def test_of_two_classes_the_others_say_nothing():
    student, targets, labels = STUDENT[:, :2], dense_of(TEACHER[:, :2]), LABELS % 2
    alone = DKD(beta=0.0)(student, targets, labels)
    close(DKD(beta=8.0)(student, targets, labels), alone)
    close(alone, ForwardKL(temperature=4.0)(student, targets))
    log_q_y = torch.log_softmax(student, dim=-1).gather(-1, labels[:, None]).squeeze(-1)
    p_y = torch.softmax(TEACHER[:, :2], dim=-1).gather(-1, labels[:, None]).squeeze(-1)
    close(NKD()(student, targets, labels), -p_y * log_q_y)


@pytest.mark.parametrize("gap", [400.0, 1500.0, 1e4])
def test_a_student_certain_of_the_label_still_learns_from_the_others(gap):
    """`log(1 - q_y)` is -inf here in float32, and its gradient NaN."""
    student = torch.tensor([[gap, 0.0, 1.0, 2.0]], requires_grad=True)
    loss = DKD(temperature=1.0)(student, dense_of(torch.tensor([[1.0, 0.5, 0.0, -0.5]])), torch.tensor([0]))
    (gradient,) = torch.autograd.grad(loss.sum(), student)
    assert torch.isfinite(loss).all()
    assert torch.isfinite(gradient).all()
    assert gradient[0, 1] < 0


@pytest.mark.parametrize("loss", [DKD(), NKD()])
def test_labels_must_be_given_and_fit(loss):
    with pytest.raises(ConfigError, match=f"{type(loss).__name__} needs labels, and got none"):
        loss(STUDENT, dense_of(TEACHER))
    with pytest.raises(ConfigError, match=r"got labels that are a tensor of torch.int64 \[5\]; .*shape \[6\]"):
        loss(STUDENT, dense_of(TEACHER), LABELS[:5])
    with pytest.raises(ConfigError, match=r"got the label 5; expected 0 to 4, or -1 for none"):
        loss(STUDENT, dense_of(TEACHER), LABELS.clone().fill_(5))
    with pytest.raises(ConfigError, match=r"got labels that are a tensor of torch.float64 \[6\]"):
        loss(STUDENT, dense_of(TEACHER), LABELS.double())


# DIST


def test_of_one_row_dists_second_term_is_a_constant():
    student, targets = STUDENT[:1], dense_of(TEACHER[:1])
    within_rows = value_and_gradient(DIST(temperature=2.0, gamma=0.0), student, targets, None)
    both = value_and_gradient(DIST(temperature=2.0, gamma=3.0), student, targets, None)
    close(both[0], within_rows[0] + 12)
    close(both[1], within_rows[1])


def test_dist_is_0_where_rows_and_classes_agree_up_to_its_eps():
    value, gradient = value_and_gradient(DIST(), TEACHER, dense_of(TEACHER), None)
    assert abs(value) < 1e-5
    assert gradient.abs().max() < 1e-5
    scaled = value_and_gradient(DIST(eps=1e-13), TEACHER, dense_of(TEACHER), None)[0]
    assert abs(scaled) < 1e-10
    assert (DIST()(STUDENT, dense_of(TEACHER)) > 0.01).all()


def test_dists_eps_must_keep_it_finite():
    with pytest.raises(ConfigError, match="eps is 0"):
        DIST(eps=0.0)


# Logits and probabilities


def test_logit_mse_is_the_same_at_every_temperature():
    values = [LogitMSE(temperature=each)(STUDENT, dense_of(TEACHER)) for each in (1.0, 4.0)]
    assert torch.equal(*values)


def test_a_centred_logit_mse_knows_no_offset():
    """Not even one beside which float32 would round the classes together."""
    teacher, student = torch.tensor([[1.0, -2.0, 0.5]]), torch.tensor([[0.3, 0.1, -0.7]])
    far = DenseTargets(values=teacher - 1, row_max=torch.tensor([1e9]))
    loss = LogitMSE(centred=True)
    torch.testing.assert_close(loss(student, far), loss(student, DenseTargets.of(teacher)))


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_logit_mse_leaves_out_what_the_teacher_masks(centred, reduction):
    teacher = TEACHER.clone()
    teacher[:, 2] = -torch.inf
    loss, kept = LogitMSE(centred=centred, class_reduction=reduction), [0, 1, 3, 4]
    value, gradient = value_and_gradient(loss, STUDENT, dense_of(teacher), None)
    expected, wanted = value_and_gradient(loss, STUDENT[:, kept], dense_of(teacher[:, kept]), None)
    close(value, expected)
    close(gradient[:, kept], wanted)
    assert (gradient[:, 2] == 0).all()


def test_the_euclidean_distance_has_gradient_0_where_it_is_0():
    loss = LogitMSE(of="probabilities", squared=False)
    value, gradient = value_and_gradient(loss, TEACHER, dense_of(TEACHER), None)
    assert value == 0
    assert (gradient == 0).all()


def test_standardised_rows_have_mean_0_and_deviation_1():
    logits = random_logits(5, 4, 7)
    logits[1, 2:4] = -torch.inf
    found = standardised(logits)
    assert torch.equal(torch.isneginf(found), torch.isneginf(logits))
    for row in found:
        finite = row[torch.isfinite(row)]
        assert abs(finite.mean()) < 1e-12
        assert abs(finite.std() - 1) < 1e-6
    assert (standardised(torch.full((2, 3), 7.0)) == 0).all()


# Other vocabularies


@given(seed=st.integers(0, 2**31), num_student=st.integers(2, 9), num_teacher=st.integers(2, 9), data=st.data())
def test_uld_fills_the_shorter_vocabulary_up(seed, num_student, num_teacher, data):
    student, teacher = random_logits(seed, 3, num_student), random_logits(seed + 1, 3, num_teacher)
    size = max(num_student, num_teacher)
    filled = [
        torch.nn.functional.pad(torch.softmax(each, dim=-1), (0, size - each.shape[1])) for each in (student, teacher)
    ]
    q, p = (each.sort(dim=-1, descending=True).values for each in filled)
    exact = ULD()(student, dense_of(teacher))
    close(exact, (p - q).abs().sum(dim=-1))
    close(ULD()(student, sparse_of(teacher, num_teacher, (1.0,))), exact)
    k = data.draw(st.integers(1, num_teacher))
    assert (ULD()(student, sparse_of(teacher, k, (1.0,))) <= exact + 1e-9).all()


# What does not fit


@pytest.mark.parametrize(
    "loss",
    [LogitMSE(), DKD(), NKD(), DIST(), ForwardKL(standardise=True, temperature=1.0), ReverseKL(standardise=True)],
)
def test_a_loss_on_every_class_refuses_targets_that_hold_fewer(loss):
    for targets, kind in ((sparse_of(TEACHER, 3, (1.0,)), "the top k classes"), (DRAWS, "draws")):
        with pytest.raises(ConfigError, match=rf"{kind}.*dense"):
            mean_loss(loss, STUDENT, targets, LABELS)


@pytest.mark.parametrize("loss", [GeneralisedJSD(), TotalVariation(), ULD(), LogitMSE(of="probabilities")])
def test_a_loss_that_is_not_linear_in_p_refuses_draws(loss):
    with pytest.raises(ConfigError, match="linear in the teacher's probabilities"):
        loss(STUDENT, DRAWS)


def test_the_kept_head_alone_needs_a_head():
    for targets in (dense_of(TEACHER), DRAWS):
        with pytest.raises(ConfigError, match="use ForwardKL, or cache with encoding: topk"):
            TopKRenormKL()(STUDENT, targets)


@pytest.mark.parametrize("name", LOSSES)
def test_features_and_other_shapes_are_refused(name):
    loss = LOSSES[name]()
    if name != "topk_renorm_kl":
        with pytest.raises(ConfigError, match="expected an output of kind logits"):
            mean_loss(loss, STUDENT, FEATURES, LABELS)
    targets = sparse_of(TEACHER, 3, (1.0, 4.0)) if name == "topk_renorm_kl" else dense_of(TEACHER)
    rows = "rows" if name == "uld" else "rows and classes"
    with pytest.raises(ConfigError, match=f"expected the same {rows}$"):
        mean_loss(loss, STUDENT[:5], targets, LABELS[:5])
    if name != "uld":
        with pytest.raises(ConfigError, match="expected the same rows and classes"):
            mean_loss(loss, STUDENT[:, :4], targets, LABELS % 4)


@pytest.mark.parametrize("name", LOSSES)
def test_a_temperature_that_means_nothing_is_refused(name):
    assert isinstance(LOSSES[name](), DistillLoss)
    for wrong in (0.0, -1.0, float("inf"), float("nan"), "4", None, True):
        with pytest.raises(ConfigError, match="temperature is"):
            LOSSES[name](temperature=wrong)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DKD(beta=float("nan")), "beta is nan; expected a number from 0"),
        (lambda: DKD(beta=-3), "beta is -3; expected a number from 0"),
        (lambda: NKD(gamma=float("inf")), "gamma is inf; expected a number from 0"),
        (lambda: DIST(beta="1"), "beta is 1; expected a number from 0"),
        (lambda: RKD(distance_weight=float("nan")), "distance_weight is nan"),
        (lambda: AttentionTransfer(p=float("inf")), "p is inf"),
        (lambda: AttentionTransfer(form="papr"), "form is 'papr'; the choices are paper, code"),
        (lambda: LogitMSE(class_reduction="men"), "class_reduction is 'men'; the choices are sum, mean"),
        (lambda: LogitMSE(of="probs"), "of is 'probs'; the choices are logits, probabilities"),
        (lambda: ForwardKL(standardise="yes"), "standardise is 'yes'; expected true or false"),
    ],
)
def test_arguments_that_mean_nothing_are_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


@pytest.mark.parametrize("kind", [SoftTargetCE, GeneralisedJSD, TotalVariation, ULD, ForwardKL, ReverseKL])
def test_a_temperature_that_is_not_stored_is_refused_unless_asked_for(kind):
    exact, targets = (sparse_of(TEACHER, 3, stored) for stored in ((1.0, 3.0), (1.0, 2.0, 4.0, 8.0)))
    loss = kind(temperature=3.0)
    with pytest.raises(ConfigError, match=r"temperature 3 is not stored.*allow_interpolation"):
        loss(STUDENT, targets)
    near = replace(loss, allow_interpolation=True)(STUDENT, targets)
    close(near, loss(STUDENT, exact), 0.02)


# Your own loop


def test_kd_loss_knows_every_loss_by_name():
    defaults = {name: kind() for name, kind in LOSSES.items()}
    assert {type(each.make(kdpipe_losses)) for each in DEFINED.values()} <= set(LOSSES.values())
    for name, loss in defaults.items():
        targets = sparse_of(TEACHER, 3, (1.0, 2.0, 4.0)) if name == "topk_renorm_kl" else dense_of(TEACHER)
        expected = mean_loss(loss, STUDENT, targets, LABELS)
        close(kd_loss(STUDENT, targets, loss=name, labels=LABELS), expected, 1e-12)
        close(kd_loss(STUDENT, targets, loss=loss, labels=LABELS), expected, 1e-12)
        expected = mean_loss(replace(loss, temperature=2.0), STUDENT, targets, LABELS)
        close(kd_loss(STUDENT, targets, loss=name, temperature=2.0, labels=LABELS), expected, 1e-12)


def test_kd_loss_leaves_out_what_is_not_covered_or_not_labelled():
    covered, labels = torch.tensor([True, True, False, True, True, True]), torch.tensor([0, -1, 1, -1, 2, 3])
    used = torch.tensor([True, False, False, False, True, True])
    for name, rows in (("dkd", used), ("forward_kl", covered)):
        found = kd_loss(STUDENT, dense_of(TEACHER, covered), loss=name, labels=labels)
        close(found, kd_loss(STUDENT[rows], dense_of(TEACHER[rows]), loss=name, labels=labels[rows]), 1e-12)
    with pytest.raises(ConfigError, match="DKD needs labels"):
        kd_loss(STUDENT, dense_of(TEACHER), loss="dkd")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            {"targets": TEACHER},
            r"targets are a tensor of torch.float64 \[6, 5\]; .* a store gives.*DenseTargets",
        ),
        ({"logits": STUDENT.numpy()}, "the student's logits are a ndarray; expected a float tensor"),
        ({"logits": STUDENT.long()}, r"the student's logits are a tensor of torch.int64"),
        ({"loss": ForwardKL}, r"expected one of forward_kl, .* or a loss object"),
        ({"loss": None}, "loss is None"),
        ({"temperature": "4"}, "temperature is '4'; expected a number above 0"),
        ({"loss": "dkd", "labels": LABELS.tolist()}, "DKD got labels that are a list; expected an integer tensor"),
    ],
)
def test_kd_loss_says_what_does_not_fit(wrong, message):
    arguments = {"logits": STUDENT, "targets": dense_of(TEACHER), **wrong}
    with pytest.raises(ConfigError, match=message):
        kd_loss(arguments.pop("logits"), arguments.pop("targets"), **arguments)


def test_kd_loss_takes_logits_in_memory_and_labels_of_any_integer():
    close(kd_loss(STUDENT, DenseTargets.of(TEACHER)), kd_loss(STUDENT, dense_of(TEACHER)), 1e-12)
    found = kd_loss(STUDENT, DenseTargets.of(TEACHER), loss="dkd", labels=LABELS.int())
    close(found, kd_loss(STUDENT, dense_of(TEACHER), loss="dkd", labels=LABELS), 1e-12)


def test_label_losses_say_what_does_not_fit():
    with pytest.raises(ConfigError, match=r"class_counts are \[1, 0\]; expected a number above 0 for each class"):
        logit_adjusted(cross_entropy, torch.tensor([1, 0]))
    with pytest.raises(ConfigError, match=r"class_counts have shape \[2\]; expected one for each of 5 classes"):
        logit_adjusted(cross_entropy, torch.tensor([1, 2]))(STUDENT, LABELS)
    with pytest.raises(ConfigError, match=r"weights have shape \[2\]; expected one for each of 5 classes"):
        class_weighted(cross_entropy, torch.ones(2))(STUDENT, LABELS)
    assert torch.equal(
        logit_adjusted(cross_entropy, [1, 2, 3, 4, 5])(STUDENT, LABELS),
        logit_adjusted(cross_entropy, torch.tensor([1, 2, 3, 4, 5]))(STUDENT, LABELS),
    )
    weights = [0.5, 1.0, 1.0, 1.0, 1.5]
    assert torch.equal(
        class_weighted(cross_entropy, weights)(STUDENT, LABELS.int()),
        class_weighted(cross_entropy, torch.tensor(weights))(STUDENT, LABELS),
    )
    with pytest.raises(ConfigError, match="cross_entropy got the label 5; expected 0 to 4, or -1 for none"):
        cross_entropy(STUDENT, torch.full_like(LABELS, 5))
    with pytest.raises(ConfigError, match="no labelled row of class 2"):
        BalancedKL(class_counts=[1, 2, float("nan")])


class Quadratic:
    """Somebody's own loss, of the two methods that a loss must have."""

    temperature = 1.0

    def __call__(self, logits, targets):
        return (logits - targets.logits()).square().mean(dim=-1)

    def unscaled(self, values):
        return values


def test_kd_loss_takes_a_loss_of_ones_own():
    assert isinstance(Quadratic(), DistillLoss)
    covered = torch.tensor([True, True, False, True, False, True])
    expected = (STUDENT - TEACHER).square().mean(dim=-1)[covered].mean()
    close(kd_loss(STUDENT, dense_of(TEACHER, covered), loss=Quadratic(), labels=LABELS), expected, 1e-12)


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        (
            lambda values: values.unsqueeze(1),
            r"gives a tensor of torch.float64 \[6, 1\]; expected one number per row, \[6\]",
        ),
        (lambda values: values.mean(), r"gives a tensor of torch.float64 \[\]; expected"),
        (lambda values: values[:5], r"gives a tensor of torch.float64 \[5\]; expected"),
        (lambda values: values > 0, r"gives a tensor of torch.bool \[6\]; expected a tensor of floats"),
        (lambda values: 3.0, "gives a float; expected a tensor of floats, one per row"),
    ],
)
def test_a_loss_of_ones_own_gives_one_number_per_row(monkeypatch, wrong, named):
    right = Quadratic.__call__
    monkeypatch.setattr(Quadratic, "__call__", lambda self, *given: wrong(right(self, *given)))
    covered = torch.tensor([True, True, False, True, False, True])
    with pytest.raises(ConfigError, match="Quadratic " + named):
        kd_loss(STUDENT, dense_of(TEACHER, covered), loss=Quadratic(), labels=LABELS)


def test_kd_loss_refuses_what_would_not_count():
    targets = dense_of(TEACHER)
    with pytest.raises(ConfigError, match="'mse' is unknown; the choices are forward_kl, reverse_kl, soft_target_ce"):
        kd_loss(STUDENT, targets, loss="mse")
    with pytest.raises(ConfigError, match="got temperature and a DKD, which has its own"):
        kd_loss(STUDENT, targets, loss=DKD(), temperature=2.0, labels=LABELS)
    with pytest.raises(ConfigError, match="'dist' interpolates no temperature"):
        kd_loss(STUDENT, targets, loss="dist", allow_interpolation=True)


def test_interpolation_may_be_asked_for_in_your_own_loop():
    targets = sparse_of(TEACHER, 3, (1.0, 2.0, 4.0, 8.0))
    assert isinstance(targets, SparseTargets)
    found = kd_loss(STUDENT, targets, temperature=3.0, loss="uld", allow_interpolation=True)
    close(found, ULD(temperature=3.0, allow_interpolation=True)(STUDENT, targets).mean(), 1e-12)


# Labels


@pytest.mark.parametrize("missing", [-1, -100])
def test_no_gradient_flows_from_rows_without_label(missing):
    logits = torch.zeros(2, 3, requires_grad=True)
    values = cross_entropy(logits, torch.tensor([missing, 1]))
    values.sum().backward()
    assert values[0] == 0
    assert logits.grad[0].tolist() == [0, 0, 0]
    assert logits.grad[1].abs().sum() > 0


def test_the_loss_on_labels_is_float32_at_least():
    for dtype, expected in ((torch.float16, torch.float32), (torch.float32, torch.float32), (torch.float64,) * 2):
        assert cross_entropy(torch.zeros(2, 3, dtype=dtype), torch.tensor([0, 1])).dtype == expected


def test_logits_that_learnt_adjusted_predict_as_if_classes_were_equally_frequent():
    """Menon et al.: the student that minimises it has softmax(z) prop. P(y | x) / P(y)."""
    counts = torch.tensor([80, 15, 5])
    posterior = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64)
    best = (posterior / counts).log()
    loss = logit_adjusted(cross_entropy, counts)
    logits = best.expand(3, 3).clone().requires_grad_()
    expected = (posterior * loss(logits, torch.arange(3), 0.0)).sum()
    (gradient,) = torch.autograd.grad(expected, logits)
    assert gradient.sum(dim=0).abs().max() < 1e-12


@pytest.mark.parametrize("temperature", [np.int8(16), np.uint8(20), np.int16(200), np.float16(300)])
@pytest.mark.parametrize("loss", ["forward_kl", "reverse_kl", "dkd"])
def test_the_square_of_a_narrow_temperature_does_not_overflow(temperature, loss):
    said = DenseTargets.of(TEACHER)
    found = kd_loss(STUDENT, said, loss=loss, temperature=temperature, labels=LABELS)
    close(found, kd_loss(STUDENT, said, loss=loss, temperature=float(temperature), labels=LABELS), 1e-12)
