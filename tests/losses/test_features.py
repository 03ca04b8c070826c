"""Losses on features: their definitions, written plainly, and what is true of each."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import kdpipe.losses as kdpipe_losses
from kdpipe.errors import ConfigError
from kdpipe.losses import (
    RKD,
    AttentionTransfer,
    CosineFeature,
    DistillLoss,
    ForwardKL,
    HintMSE,
    SimilarityPreserving,
    features,
    kd_loss,
    make_projector,
    needs_whole_batch,
    similarities,
)
from kdpipe.targets import FeatureTargets
from loss_definitions import random_logits, value_and_gradient
from losses.test_definitions import mutated
from toy_targets import dense_of


def of_maps(maps: Tensor, p: float = 2.0) -> Tensor:
    """Attention `[B, H * W]` of maps `[B, D, H, W]`, as the paper has it."""
    rows = [torch.stack([(maps[i, :, y, x].abs() ** p).sum() for y in range(3) for x in range(2)]) for i in range(5)]
    return torch.stack([row / row.norm() for row in rows])


def distances(rows: Tensor) -> Tensor:
    apart = torch.stack([torch.stack([(a - b).norm() if a is not b else a.new_zeros(()) for b in rows]) for a in rows])
    return apart / apart[apart > 0].mean()


def huber(difference: Tensor) -> Tensor:
    size = difference.abs()
    return torch.where(size < 1, 0.5 * size**2, size - 0.5)


def rkd_distance(student: Tensor, teacher: Tensor) -> Tensor:
    rows = [each.flatten(1).unbind() for each in (student, teacher)]
    return huber(distances(rows[0]) - distances(rows[1])).mean()


def rkd_angle(student: Tensor, teacher: Tensor) -> Tensor:
    total = student.new_zeros(())
    for i, j, k in itertools.product(range(len(student)), repeat=3):
        if i in (j, k):
            continue
        both = []
        for each in (student.flatten(1), teacher.flatten(1)):
            first, second = each[j] - each[i], each[k] - each[i]
            both.append(first @ second / (first.norm() * second.norm()))
        total = total + huber(both[0] - both[1])
    return total / len(student) ** 3


def similar(student: Tensor, teacher: Tensor) -> Tensor:
    grams = []
    for each in (student.flatten(1), teacher.flatten(1)):
        gram = torch.stack([torch.stack([a @ b for b in each]) for a in each])
        grams.append(torch.stack([row / row.norm() for row in gram]))
    return (grams[0] - grams[1]).norm() ** 2 / len(student) ** 2


def cosine(student: Tensor, teacher: Tensor) -> Tensor:
    rows = zip(student.movedim(1, -1).reshape(-1, 4), teacher.movedim(1, -1).reshape(-1, 4), strict=True)
    return torch.stack([1 - a @ b / (a.norm() * b.norm()) for a, b in rows]).mean()


@dataclass(frozen=True, kw_only=True)
class Defined:
    """A loss, its definition as a mean over student and teacher maps `[5, 4, 3, 2]`, and what it does not see.

    `rotations`: of all rows' features alike. `scale`: of the student's features. `widths`: any two go together.
    `maps`: places are needed.
    """

    make: Callable[..., DistillLoss]
    definition: Callable[[Tensor, Tensor], Tensor]
    rotations: bool = False
    scale: bool = False
    widths: bool = False
    maps: bool = False


DEFINED = {
    "hint": Defined(make=lambda losses: losses.HintMSE(), definition=lambda s, t: ((s - t) ** 2).mean()),
    "simkd": Defined(make=lambda losses: losses.SimKD(), definition=lambda s, t: ((s - t) ** 2).mean()),
    "cosine": Defined(make=lambda losses: losses.CosineFeature(), definition=cosine, scale=True),
    "attention": Defined(
        make=lambda losses: losses.AttentionTransfer(),
        definition=lambda s, t: (of_maps(s) - of_maps(t)).norm(dim=-1).mean(),
        scale=True,
        widths=True,
        maps=True,
    ),
    "attention_code": Defined(
        make=lambda losses: losses.AttentionTransfer(form="code", p=3),
        definition=lambda s, t: ((of_maps(s, 3) - of_maps(t, 3)) ** 2).mean(),
        scale=True,
        widths=True,
        maps=True,
    ),
    "similarity": Defined(
        make=lambda losses: losses.SimilarityPreserving(),
        definition=similar,
        rotations=True,
        scale=True,
        widths=True,
    ),
    "rkd_distance": Defined(
        make=lambda losses: losses.RKD(distance_weight=2, angle_weight=0),
        definition=lambda s, t: 2 * rkd_distance(s, t),
        rotations=True,
        scale=True,
        widths=True,
    ),
    "rkd_angle": Defined(
        make=lambda losses: losses.RKD(distance_weight=0, angle_weight=3),
        definition=lambda s, t: 3 * rkd_angle(s, t),
        rotations=True,
        scale=True,
        widths=True,
    ),
    "rkd": Defined(
        make=lambda losses: losses.RKD(),
        definition=lambda s, t: 25 * rkd_distance(s, t) + 50 * rkd_angle(s, t),
        rotations=True,
        scale=True,
        widths=True,
    ),
}
LOSSES = {name: each.make(kdpipe_losses) for name, each in DEFINED.items()}
RELATIONAL = [name for name in DEFINED if needs_whole_batch(LOSSES[name])]
every_loss = pytest.mark.parametrize("name", DEFINED)
seeds = given(seed=st.integers(0, 2**31))


def which(condition) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("name", [name for name, each in DEFINED.items() if condition(each)])


def features_of(seed: int, *shape: int, scale: float = 1.0) -> Tensor:
    return random_logits(seed, *(shape or (5, 4, 3, 2)), scale=scale)


def targets_of(values: Tensor, covered: Tensor | None = None) -> FeatureTargets:
    return FeatureTargets(values=values, covered=covered)


def found(name: str, student: Tensor, teacher: Tensor, covered: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Mean and gradient."""
    return value_and_gradient(LOSSES[name], student, targets_of(teacher, covered), None)


def close(found, expected, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def assert_defined(name: str, losses) -> None:
    student, teacher = features_of(0).requires_grad_(), features_of(1)
    expected = DEFINED[name].definition(student, teacher)
    (gradient,) = torch.autograd.grad(expected, student)
    values = DEFINED[name].make(losses)(student, targets_of(teacher))
    assert values.shape == (5,)
    close(values.mean(), expected)
    close(torch.autograd.grad(values.mean(), student)[0], gradient)


@every_loss
def test_a_loss_is_its_definition(name):
    assert isinstance(LOSSES[name], DistillLoss)
    assert_defined(name, kdpipe_losses)


# Mistakes that people make. Each is put into the source, and the test above must see it.

MUTANTS = {
    "hint": [
        (features, "HintMSE", ".mean(dim=-1)", ".sum(dim=-1)"),
        (features, "HintMSE", "student - teacher", "student + teacher"),
        (features, "HintMSE", ".square()", ".abs()"),
    ],
    "simkd": [(features, "HintMSE", ".mean(dim=-1)", ".sum(dim=-1)")],
    "cosine": [
        (features, "CosineFeature", "1 - cosine", "cosine"),
        (features, "CosineFeature", "unit(vectors(student))", "vectors(student)"),
        (features, "CosineFeature", "unit(vectors(student)) * unit(vectors(teacher))", "unit(student) * unit(teacher)"),
        (features, "def vectors", "features.movedim(1, -1)", "features.flatten(2)"),
        (features, "def unit", "root(", "("),
    ],
    "attention": [
        (features, "AttentionTransfer", "root(squares.sum(dim=-1))", "squares.sum(dim=-1)"),
        (features, "AttentionTransfer", ".abs().pow(self.p)", ""),
        (features, "AttentionTransfer", ".pow(self.p).sum(dim=-1)", ".sum(dim=-1).pow(self.p)"),
        (features, "AttentionTransfer", "unit(vectors(features)", "(vectors(features)"),
        (features, "AttentionTransfer", ".sum(dim=-1).flatten(1)", ".flatten(1)"),
    ],
    "attention_code": [
        (features, "AttentionTransfer", "squares.mean(dim=-1) if", "squares.sum(dim=-1) if"),
        (features, "AttentionTransfer", ".pow(self.p)", ".pow(2)"),
    ],
    "similarity": [
        (similarities, "SimilarityPreserving", "unit((each @ each.T).masked_fill(~used, 0.0))", "each @ each.T"),
        (similarities, "SimilarityPreserving", "unit((each @ each.T)", "unit((unit(each) @ unit(each).T)"),
        (similarities, "SimilarityPreserving", ".square()", ".abs()"),
        (similarities, "def _mean_over", " / used.sum().clamp(min=1)", ""),
    ],
    "rkd_distance": [
        (similarities, "def _distances", " / mean", ""),
        (similarities, "def _distances", "& ~itself", ""),
        (similarities, "RKD", "self.distance_weight * _mean_over", "_mean_over"),
        (similarities, "RKD", 'reduction="none"', 'reduction="none", beta=0.5'),
    ],
    "rkd_angle": [
        (similarities, "def _angles", "unit(rows", "(rows"),
        (similarities, "def _angles", "rows.unsqueeze(0) - rows", "rows.unsqueeze(0) + rows"),
        (similarities, "RKD", "_angles(teacher)", "-_angles(teacher)"),
    ],
    "rkd": [
        (similarities, "RKD", "angle_weight: float = 50.0", "angle_weight: float = 2.0"),
        (similarities, "RKD", "distance_weight: float = 25.0", "distance_weight: float = 1.0"),
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "module", "where", "before", "after"),
    [(name, *mutant) for name, mutants in MUTANTS.items() for mutant in mutants],
)
def test_a_mistake_in_a_loss_fails_its_test(name, module, where, before, after):
    mutant = mutated(module, where, before, after)
    with pytest.raises((AssertionError, RuntimeError)):
        assert_defined(name, mutant)


def test_a_source_that_is_not_changed_passes():
    for name, mutants in MUTANTS.items():
        assert_defined(name, mutated(mutants[0][0], "import", "import", "import"))


# Invariances


@every_loss
@seeds
def test_0_where_both_agree_and_above_0_elsewhere(name, seed):
    student, teacher = features_of(seed), features_of(seed + 1)
    value, gradient = found(name, teacher, teacher)
    assert value.abs() < 1e-15
    assert gradient.abs().max() < 1e-15
    assert found(name, student, teacher)[0] > 1e-4


@every_loss
@seeds
def test_the_order_of_rows_is_that_of_the_gradient(name, seed):
    student, teacher = features_of(seed), features_of(seed + 1)
    order = torch.randperm(5, generator=torch.Generator().manual_seed(seed))
    value, gradient = found(name, student, teacher)
    close(found(name, student[order], teacher[order]), (value, gradient[order]))


@which(lambda each: each.rotations)
@seeds
def test_rotations_and_widths_of_either_side_are_not_seen(name, seed):
    student, teacher = features_of(seed, 5, 6), features_of(seed + 1, 5, 4)
    expected = found(name, student, teacher)
    rotation = torch.linalg.qr(features_of(seed + 2, 6, 6)).Q
    value, gradient = found(name, student @ rotation, teacher)
    close((value, gradient @ rotation.T), expected)
    wider = torch.cat([teacher, torch.zeros(5, 3, dtype=torch.float64)], dim=1)
    close(found(name, student, wider @ torch.linalg.qr(features_of(seed + 3, 7, 7)).Q), expected)


@pytest.mark.parametrize("name", ["rkd", "rkd_distance", "rkd_angle"])
@seeds
def test_relations_of_distances_do_not_see_where_the_rows_are(name, seed):
    student, teacher = features_of(seed, 5, 6), features_of(seed + 1, 5, 4)
    close(found(name, student + 7.0, teacher - 3.0), found(name, student, teacher))


@every_loss
def test_the_scale_is_seen_or_not(name):
    student, teacher = features_of(0), features_of(1)
    value, gradient = found(name, student, teacher)
    scaled, of_scaled = found(name, 5 * student, teacher)
    if DEFINED[name].scale:
        close((scaled, 5 * of_scaled), (value, gradient))
        close(found(name, student, 0.2 * teacher), (value, gradient))
    else:
        assert (scaled - value).abs() > 0.1 * value


@which(lambda each: each.maps)
def test_attention_does_not_see_the_order_of_channels(name):
    student, teacher = features_of(0), features_of(1, 5, 9, 3, 2)
    value, gradient = found(name, student, teacher)
    order = torch.tensor([2, 0, 3, 1])
    close(found(name, -student[:, order], teacher), (value, -gradient[:, order]))
    assert (found(name, student.flip(2), teacher)[0] - value).abs() > 1e-3


@every_loss
def test_duplicating_a_batch_or_leaving_rows_uncovered(name):
    student, teacher = features_of(0, 8, 4, 3, 2), features_of(1, 8, 4, 3, 2)
    covered = torch.arange(8) % 2 == 0
    value, gradient = found(name, student[covered], teacher[covered])
    unknown = torch.where(covered.view(-1, 1, 1, 1), teacher, 0.0)
    part, of_part = found(name, student, unknown, covered)
    close((part, of_part[covered]), (value, gradient))
    assert (of_part[~covered] == 0).all()
    nothing, of_nothing = found(name, student, teacher, torch.zeros(8, dtype=torch.bool))
    assert nothing == 0
    assert (of_nothing == 0).all()
    if name not in RELATIONAL:  # duplicating makes pairs of other kinds
        close(found(name, student.repeat(2, 1, 1, 1), teacher.repeat(2, 1, 1, 1))[0], found(name, student, teacher)[0])


@pytest.mark.parametrize("name", [name for name in DEFINED if name not in RELATIONAL])
def test_a_row_does_not_see_the_other_rows(name):
    student, teacher = features_of(0), features_of(1)
    whole = LOSSES[name](student, targets_of(teacher))
    parts = [LOSSES[name](student[rows], targets_of(teacher[rows])) for rows in (slice(2), slice(2, 5))]
    close(torch.cat(parts), whole)


@pytest.mark.parametrize("loss", [HintMSE(), CosineFeature(), SimilarityPreserving(), RKD()])
def test_of_no_row_there_is_no_loss(loss):
    assert kd_loss(torch.zeros(0, 4), FeatureTargets(values=torch.zeros(0, 4)), loss=loss) == 0


def test_losses_on_relations_say_so():
    assert set(RELATIONAL) == {"similarity", "rkd_distance", "rkd_angle", "rkd"}
    for name in RELATIONAL:
        student, teacher = features_of(0), features_of(1)
        whole = LOSSES[name](student, targets_of(teacher))
        assert (LOSSES[name](student[:3], targets_of(teacher[:3])) - whole[:3]).abs().max() > 1e-3


@which(lambda each: not each.maps)
def test_tokens_that_count_each_for_itself_are_rows(name):
    student, teacher = features_of(0, 6, 4), features_of(1, 6, 4)
    covered = torch.tensor([True, False, True, True, True, False])
    value, gradient = found(name, student, teacher, covered)
    tokens = student.view(2, 3, 4), teacher.view(2, 3, 4)
    assert LOSSES[name](tokens[0], targets_of(tokens[1], covered.view(2, 3))).shape == (2, 3)
    of_tokens, gradients = found(name, *tokens, covered.view(2, 3))
    close((of_tokens, gradients.view(6, 4)), (value, gradient))


def test_tokens_of_a_row_that_counts_as_a_whole_have_a_mean():
    student, teacher = features_of(0, 2, 3, 4), features_of(1, 2, 3, 4)
    for loss in (HintMSE(), CosineFeature()):
        per_token = loss(student.flatten(0, 1), targets_of(teacher.flatten(0, 1)))
        close(loss(student, targets_of(teacher)), per_token.view(2, 3).mean(dim=1))
    per_map = AttentionTransfer()(student.movedim(2, 1).unsqueeze(-1), targets_of(teacher.movedim(2, 1).unsqueeze(-1)))
    close(AttentionTransfer()(student, targets_of(teacher)), per_map)


# Numbers


@every_loss
def test_gradcheck(name):
    student, targets = features_of(0), targets_of(features_of(1))
    assert torch.autograd.gradcheck(lambda each: LOSSES[name](each, targets), student.requires_grad_())


@every_loss
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("num_rows", [1, 2, 4])
def test_zeros_equal_rows_and_large_numbers_are_finite(name, dtype, num_rows):
    shape = (num_rows, 3, 2, 2)
    random = features_of(0, *shape)
    equal = random[:1].expand(shape)
    for student in (torch.zeros(shape), torch.ones(shape), equal, 1e4 * random, 1e-3 * random):
        for teacher in (torch.zeros(shape), equal, 1e4 * random, features_of(1, *shape)):
            value, gradient = found(name, student.to(dtype), teacher.float())
            assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
            assert torch.isfinite(value)
            assert gradient.dtype == dtype
            # float16 ends at 65,504.
            assert torch.isfinite(gradient).all() or dtype == torch.float16


@every_loss
def test_autocast_does_not_narrow_a_loss(name):
    student, targets = features_of(0).float(), targets_of(features_of(1).float())
    plain = LOSSES[name](student, targets)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(LOSSES[name](student, targets), plain)


def test_rows_that_are_near_to_each_other_and_far_from_0_keep_their_distances():
    teacher, student = features_of(0, 6, 8), features_of(1, 6, 8)
    expected = kd_loss(student, targets_of(teacher), loss=RKD())
    away = 1024 + (student * 2**10).round() / 2**10  # exact in float32
    exact = kd_loss(away, targets_of(teacher), loss=RKD())
    narrow = kd_loss(away.float(), targets_of(teacher.float()), loss=RKD())
    close(narrow.double(), exact, 1e-5)
    close(exact, expected, 1e-2)


# What is refused


@pytest.mark.parametrize(
    ("loss", "student", "teacher", "message"),
    [
        (HintMSE(), (2, 3), (2, 4), r"features have shape \[2, 3\], the teacher's \[2, 4\].*projector: linear"),
        (CosineFeature(), (2, 3, 4, 4), (2, 8, 4, 4), r"\[2, 3, 4, 4\], the teacher's \[2, 8, 4, 4\].*conv1x1"),
        (AttentionTransfer(), (2, 3, 4, 4), (2, 3, 2, 2), r"\[2, 3, 4, 4\], the teacher's \[2, 3, 2, 2\].*same places"),
        (AttentionTransfer(), (2, 3), (2, 3), r"expected \[B, D, H, W\] or \[B, T, D\]"),
        (SimilarityPreserving(), (2, 3), (3, 3), "expected the same rows"),
        (RKD(), (2, 3), (3, 3), "expected the same rows"),
    ],
)
def test_shapes_that_cannot_be_compared_are_named(loss, student, teacher, message):
    with pytest.raises(ConfigError, match=message):
        loss(torch.zeros(student), targets_of(torch.zeros(teacher)))


def test_losses_on_features_and_on_logits_refuse_each_other():
    logits = torch.zeros(2, 3)
    for loss in (HintMSE(), AttentionTransfer(), RKD(), SimilarityPreserving()):
        with pytest.raises(ConfigError, match=f"{type(loss).__name__} is a loss on features, and got logits"):
            loss(logits, dense_of(logits))
    with pytest.raises(ConfigError, match="a loss on logits got features"):
        ForwardKL()(logits, targets_of(logits))


def test_features_without_tokens_of_a_teacher_that_covers_tokens_are_refused():
    covered = torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(ConfigError, match=r"features of shape \[2, 5\], of which \[2, 3\] are covered"):
        HintMSE()(torch.zeros(2, 5), targets_of(torch.zeros(2, 5), covered))
    with pytest.raises(ConfigError, match="tokens count each for itself"):
        AttentionTransfer()(torch.zeros(2, 3, 5), targets_of(torch.zeros(2, 3, 5), covered))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AttentionTransfer(p=0.5), r"p is 0\.5; expected a number from 1"),
        (lambda: RKD(distance_weight=-1), "distance_weight is -1"),
        (lambda: RKD(distance_weight=0, angle_weight=0), "expected numbers from 0, and one above"),
    ],
)
def test_options_that_mean_nothing_are_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


# Projectors


@pytest.mark.parametrize(
    ("kind", "student", "teacher"),
    [
        ("linear", (3,), (5,)),
        ("linear", (7, 3), (7, 5)),
        ("mlp", (3,), (5,)),
        ("mlp", (7, 3), (7, 5)),
        ("conv1x1", (3, 4, 2), (5, 4, 2)),
    ],
)
def test_projectors_change_the_width_and_no_other_random_number(kind, student, teacher):
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    projector = make_projector(kind, student, teacher, seed=5)
    assert torch.equal(torch.rand(3), expected)
    inputs = torch.randn(2, *student)
    assert projector(inputs).shape == (2, *teacher)
    assert torch.equal(make_projector(kind, student, teacher, seed=5)(inputs), projector(inputs))
    assert not torch.equal(make_projector(kind, student, teacher, seed=6)(inputs), projector(inputs))


@pytest.mark.parametrize(
    ("kind", "student", "teacher"),
    [
        ("linear", (7, 3), (6, 5)),
        ("linear", (3, 4, 4), (5,)),
        ("mlp", (), (5,)),
        ("conv1x1", (3, 4, 4), (5, 2, 2)),
        ("conv1x1", (3, 4), (5, 4)),
    ],
)
def test_a_projector_that_does_not_fit_names_both_shapes(kind, student, teacher):
    with pytest.raises(ConfigError) as caught:
        make_projector(kind, student, teacher, seed=0)
    assert f"projector: {kind} takes" in str(caught.value)
    assert f"found {list(student)} of the student and {list(teacher)} of the teacher" in str(caught.value)


@every_loss
def test_features_that_do_not_count_have_no_part_in_the_gradient(name):
    """NaN too, on either side; the others' is that without these rows."""
    student, teacher = features_of(0), features_of(1)
    counts = torch.tensor([True, True, False, True, False])
    there = student[counts].requires_grad_()
    expected = kd_loss(there, targets_of(teacher[counts]), loss=LOSSES[name])
    expected.backward()
    wide = counts.view(-1, 1, 1, 1)
    said = torch.where(wide, teacher, torch.nan)
    given = torch.where(wide, student, torch.nan).requires_grad_()
    value = kd_loss(given, FeatureTargets(values=said, covered=counts), loss=LOSSES[name])
    value.backward()
    close(value, expected)
    close(given.grad[counts], there.grad)
    assert (given.grad[~counts] == 0).all()
