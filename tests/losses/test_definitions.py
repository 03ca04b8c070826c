from __future__ import annotations

import inspect
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

import kdpipe.losses as kdpipe_losses
from kdpipe.losses import (
    DistillLoss,
    balanced,
    by_name,
    decoupled,
    divergences,
    labels,
    logits,
    relational,
    vocabularies,
)
from loss_definitions import DEFINED, assert_defined, random_logits, softmax
from toy_targets import dense_of, sparse_of


@pytest.mark.parametrize("name", DEFINED)
def test_a_loss_is_its_definition(name):
    assert_defined(name, kdpipe_losses)
    assert isinstance(DEFINED[name].make(kdpipe_losses), DistillLoss)


def assert_mean_of_covered(losses):
    """`kd_loss`: T^2 KL, over the rows that are covered."""
    student, teacher = random_logits(0, 6, 5), random_logits(1, 6, 5)
    covered = torch.tensor([True, True, False, True, False, True])
    p, q = softmax(teacher, 4.0), softmax(student, 4.0)
    rows = 16 * (p * (p.log() - q.log())).sum(dim=-1)
    torch.testing.assert_close(losses.kd_loss(student, dense_of(teacher)), rows.mean())
    torch.testing.assert_close(losses.kd_loss(student, dense_of(teacher, covered)), rows[covered].mean())


def assert_label_losses(losses):
    student, given = random_logits(2, 6, 5), torch.tensor([0, 3, -1, 3, 4, 1])
    counts, weights = torch.tensor([1, 5, 2, 8, 4]), torch.tensor([0.5, 2.0, 1.0, 3.0, 0.25], dtype=torch.float64)
    known = given >= 0

    def expected(logits, smoothing):
        q = torch.nn.functional.one_hot(given.clamp(min=0), 5) * (1 - smoothing) + smoothing / 5
        return torch.where(known, -(q * torch.log_softmax(logits, dim=-1)).sum(dim=-1), 0.0)

    for smoothing in (0.0, 0.1):
        plain = losses.cross_entropy(student, given, smoothing)
        torch.testing.assert_close(plain, expected(student, smoothing))
        weighted = losses.class_weighted(losses.cross_entropy, weights)(student, given, smoothing)
        torch.testing.assert_close(weighted, weights[given] * plain)
        adjusted = losses.logit_adjusted(losses.cross_entropy, counts, 0.5)(student, given, smoothing)
        torch.testing.assert_close(adjusted, expected(student + 0.5 * (counts / 20).log(), smoothing))


def assert_balanced(losses):
    """`BalancedKL`: T^2 sum w p (log p' - log q), p' the reweighted teacher."""
    student, teacher = random_logits(3, 6, 5), random_logits(4, 6, 5)
    weights = 1 / torch.tensor([1 - 0.99**count for count in (500, 100, 50, 10, 1)], dtype=torch.float64)
    weighed = weights / weights.mean() * softmax(teacher, 2.0)
    ratio = weighed / weighed.sum(dim=-1, keepdim=True) / softmax(student, 2.0)
    loss = losses.BalancedKL(class_counts=(500, 100, 50, 10, 1), beta=0.99)
    torch.testing.assert_close(loss(student, dense_of(teacher)), 4 * (weighed * ratio.log()).sum(dim=-1))


def assert_kept_head(losses):
    """`TopKRenormKL`: T^2 KL over the kept classes, both sides renormalised there."""
    student, teacher = random_logits(5, 6, 5), random_logits(6, 6, 5)
    targets = sparse_of(teacher, 3, (1.0,))
    p, q = (softmax(each.gather(-1, targets.ids), 2.0) for each in (teacher, student))
    expected = 4 * (p * (p / q).log()).sum(dim=-1)
    torch.testing.assert_close(losses.TopKRenormKL(temperature=2.0)(student, targets), expected)


def test_the_kept_head_alone_is_its_definition():
    assert_kept_head(kdpipe_losses)


def test_kd_loss_is_the_mean_over_covered_rows():
    assert_mean_of_covered(kdpipe_losses)


def test_balanced_kl_is_its_definition():
    assert_balanced(kdpipe_losses)


def test_losses_on_labels_are_their_definitions():
    assert_label_losses(kdpipe_losses)


# Mistakes that people make. Each is put into the source, and the tests above must see it.

T_SQUARED = "self.temperature**2 * "
MUTANTS = {
    "forward_kl": [
        (divergences, "ForwardKL", f"return {T_SQUARED}", "return "),
        (divergences, "ForwardKL", "self.temperature**2", "self.temperature"),
        (divergences, "def forward_kl", "kl_of(*", "(lambda p, q: kl_of(q, p))(*"),
        (divergences, "class _RelativeEntropy", ".sum(dim=-1)", ".mean(dim=-1)"),
        (divergences, "class _RelativeEntropy", "log_q - log_p", "log_p - log_q"),
        (divergences, "class _RelativeEntropy", "expected = log_p.exp()", "expected = log_q.exp()"),
        (divergences, "class _RelativeEntropy", "change - expected", "change + expected"),
    ],
    "reverse_kl": [
        (divergences, "ReverseKL", f"return {T_SQUARED}", "return "),
        (divergences, "def reverse_kl", "kl_of(", "(lambda q, p: kl_of(p, q))("),
        (divergences, "class _RelativeEntropy", ".sum(dim=-1)", ".mean(dim=-1)"),
        (divergences, "class _RelativeEntropy", "-expected * of_value", "expected * of_value"),
    ],
    "soft_target_ce": [
        (divergences, "SoftTargetCE", "-(self.temperature**2) * ", "-"),
        (divergences, "SoftTargetCE", "-(self.temperature**2)", "(self.temperature**2)"),
        (divergences, "SoftTargetCE", ".sum(dim=-1)", ".mean(dim=-1)"),
        (divergences, "SoftTargetCE", "log_p, log_q = ", "log_q, log_p = "),
    ],
    "standardised_kl": [
        (divergences, "ForwardKL", "self.allow_interpolation, self.standardise", "self.allow_interpolation"),
    ],
    "gjsd": [
        (divergences, "GeneralisedJSD", "(self.beta, 1 - self.beta)", "(1 - self.beta, self.beta)"),
        (divergences, "GeneralisedJSD", "log_p, log_q = ", "log_q, log_p = "),
        (divergences, "class _MixedEntropy", ".sum(dim=-1)", ".mean(dim=-1)"),
        (divergences, "class _MixedEntropy", "teachers + students", "teachers - students"),
        (divergences, "class _MixedEntropy", "students * of_value", "-students * of_value"),
        (divergences, "def _terms_of_mixture", "beta, 1 - beta, gap", "beta, 1 - beta, -gap"),
    ],
    "normalised_gjsd": [
        (divergences, "GeneralisedJSD", "(1 / (1 - self.beta), 1 / self.beta)", "(1 / self.beta, 1 / (1 - self.beta))"),
    ],
    "total_variation": [
        (divergences, "TotalVariation", "0.5 * ", ""),
        (divergences, "TotalVariation", ".sum(dim=-1)", ".mean(dim=-1)"),
        (divergences, "TotalVariation", "0.5 *", "-0.5 *"),
    ],
    "logit_mse": [
        (logits, "LogitMSE", ".sum(dim=-1)", ".mean(dim=-1)"),
        (logits, "LogitMSE", "wide - teacher", "wide + teacher"),
        (logits, "LogitMSE", "dense.logits()", "dense.values"),
    ],
    "mean_logit_mse": [(logits, "LogitMSE", "value / num_classes", "value")],
    "centred_logit_mse": [(logits, "LogitMSE", "difference - mean", "difference + mean")],
    "euclidean": [(logits, "LogitMSE", "else root(value)", "else value")],
    "dkd": [
        (decoupled, "DKD", f"labels >= 0, {T_SQUARED}", "labels >= 0, "),
        (decoupled, "DKD", "self.alpha * kl_of(binary_p, binary_q)", "self.alpha * kl_of(binary_q, binary_p)"),
        (decoupled, "DKD", "kl_of(others_p, others_q)", "kl_of(others_q, others_p)"),
        (decoupled, "DKD", "+ self.beta", "- self.beta"),
        (decoupled, "DKD", "self.alpha * ", ""),
        (decoupled, "def _split", "others = logits.scatter(-1, place, -torch.inf)", "others = logits"),
    ],
    "nkd": [
        (decoupled, "NKD", "self.gamma * self.temperature**2", "self.gamma"),
        (decoupled, "NKD", "value = -of_label", "value = of_label"),
        (decoupled, "NKD", "- self.gamma", "+ self.gamma"),
        (decoupled, "NKD", "others_p.exp()", "others_q.exp()"),
    ],
    "dist": [
        (relational, "DIST", f"return {T_SQUARED}", "return "),
        (relational, "DIST", "1 - within_rows", "1 + within_rows"),
        (relational, "DIST", "1 - within_classes", "within_classes"),
        (relational, "DIST", "self.beta", "self.gamma"),
        (relational, "def _centred_over", "values - mean", "values + mean"),
    ],
    "uld": [
        (vocabularies, "ULD", "self.temperature), dim", "1.0), dim"),
        (vocabularies, "def _distance", ".sum(dim=-1)", ".mean(dim=-1)"),
        (vocabularies, "ULD", "sort(dim=-1, descending=True).values for", "abs() for"),
    ],
}  # fmt: skip
ELSEWHERE = [
    (assert_kept_head, divergences, "TopKRenormKL", f"return {T_SQUARED}", "return "),
    (assert_kept_head, divergences, "TopKRenormKL", "kl_of(log_p, log_q)", "kl_of(log_q, log_p)"),
    (assert_kept_head, divergences, "TopKRenormKL", "softened(kept, self.temperature)", "kept"),
    (assert_kept_head, divergences, "TopKRenormKL", "to(log_q.dtype) / self.temperature", "to(log_q.dtype)"),
    (assert_mean_of_covered, by_name, "def kd_loss", "/ max(1, values.numel())", ""),
    (assert_mean_of_covered, by_name, "def kd_loss", "values.numel()", "logits.numel()"),
    (assert_mean_of_covered, by_name, "def kd_loss", "/ valid.sum().clamp(min=1)", "/ valid.numel()"),
    (assert_label_losses, labels, "def class_weighted", "weights.to(values)[", "(1 / weights.to(values))["),
    (assert_label_losses, labels, "def logit_adjusted", "wide + tau", "wide - tau"),
    (assert_label_losses, labels, "def logit_adjusted", "counts / counts.sum()", "counts.sum() / counts"),
    (assert_label_losses, labels, "def cross_entropy", "label_smoothing=smoothing", "label_smoothing=0.0"),
    (assert_balanced, balanced, "BalancedKL", f"return {T_SQUARED}", "return "),
    (assert_balanced, balanced, "BalancedKL", "kl_of(log_wp - log_total, log_q)", "kl_of(log_q, log_wp - log_total)"),
    (assert_balanced, balanced, "BalancedKL", "log_total.squeeze(-1).exp() * ", ""),
    (assert_balanced, balanced, "BalancedKL", "self.beta**counts", "self.beta**-counts"),
    (assert_balanced, balanced, "BalancedKL", "weights / weights.mean()", "weights / weights.sum()"),
]


def mutated(module: ModuleType, where: str, before: str, after: str) -> SimpleNamespace:
    """kdpipe's losses, with those of one module compiled from a source that is changed in one place."""
    source = inspect.getsource(module)
    start = source.index(where)
    assert before in source[start:], (where, before)
    changed = source[:start] + source[start:].replace(before, after, 1)
    made = ModuleType(module.__name__)
    assert sys.modules[module.__name__] is module
    exec(compile(changed, str(module.__file__), "exec"), vars(made))
    return SimpleNamespace(**{**vars(kdpipe_losses), **vars(made)})


@pytest.mark.parametrize(
    ("name", "module", "where", "before", "after"),
    [(name, *mutant) for name, mutants in MUTANTS.items() for mutant in mutants],
)
def test_a_mistake_in_a_loss_fails_its_test(name, module, where, before, after):
    mutant = mutated(module, where, before, after)
    with pytest.raises(AssertionError):
        assert_defined(name, mutant)


@pytest.mark.parametrize(("check", "module", "where", "before", "after"), ELSEWHERE)
def test_a_mistake_in_a_mean_or_a_label_loss_fails_its_test(check, module, where, before, after):
    mutant = mutated(module, where, before, after)
    with pytest.raises(AssertionError):
        check(mutant)


def test_a_source_that_is_not_changed_passes():
    for module in {mutant[0] for mutants in MUTANTS.values() for mutant in mutants}:
        same = mutated(module, "import", "import", "import")
        for name in MUTANTS:
            assert_defined(name, same)
