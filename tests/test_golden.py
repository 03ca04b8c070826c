"""Losses and encodings against values computed outside of kdpipe (env `KDPIPE_GOLDEN`, default `../shared/golden`)."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kdpipe.encodings import FeaturesInt8, Int8, Sampled, TopK
from kdpipe.encodings.topk import tail_log_masses
from kdpipe.losses import (
    DIST,
    DKD,
    LOSSES,
    NKD,
    RKD,
    ULD,
    AttentionTransfer,
    CosineFeature,
    DistillLoss,
    ForwardKL,
    GeneralisedJSD,
    HintMSE,
    LabelLoss,
    LogitMSE,
    ReverseKL,
    SimilarityPreserving,
    SoftTargetCE,
    TopKRenormKL,
    TotalVariation,
    class_weighted,
    cross_entropy,
    kd_loss,
    logit_adjusted,
    make_projector,
    valid_rows,
    values_of,
)
from kdpipe.targets import DenseTargets, FeatureTargets, OutputSpec, SparseTargets, Targets
from toy_targets import dense_of

GOLDEN = Path(os.environ.get("KDPIPE_GOLDEN", Path(__file__).parents[2] / "shared" / "golden"))

NOT_IN_FLOAT32 = {"high-T limit"}
"""T^2 is so large there that what float32 holds is off by 1.4e-5 of the value."""

DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])


def read(name: str) -> dict[str, Any] | None:
    path = GOLDEN / name
    return json.loads(path.read_text()) if path.is_file() else None


def skipped() -> list:
    return [pytest.param(None, marks=pytest.mark.skip(reason=f"no golden values in {GOLDEN} (env KDPIPE_GOLDEN)"))]


def loss_cases(other_than: set[str]) -> list:
    content = read("losses.json")
    if content is None:
        return skipped()
    return [pytest.param(case, id=case["id"]) for case in content["cases"] if case["loss"] not in other_than]


def everything_but(names: set[str]) -> set[str]:
    """Losses with golden values other than these."""
    content = read("losses.json")
    return set() if content is None else {case["loss"] for case in content["cases"]} - names


def encoding_cases(section: str) -> list:
    content = read("encodings.json")
    if content is None:
        return skipped()
    cases = content["sections"][section]["cases"]
    return [pytest.param(case, id=case["tag"].replace(" ", "-")) for case in cases]


def tensor(values: Any, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.tensor(values, dtype=dtype)


def sparse_of(inputs: dict[str, Any], dtype: torch.dtype) -> SparseTargets:
    tails = inputs["teacher_tail_logmass"]
    filled = [[-torch.inf if tail is None else tail for tail in tails[key]] for key in tails]
    return SparseTargets(
        ids=torch.tensor(inputs["teacher_topk_ids"]),
        head=tensor(inputs["teacher_topk_logprobs"], dtype),
        tails=tensor(filled, dtype).T,
        temperatures=tuple(float(Fraction(key)) for key in tails),
        num_classes=len(inputs["student_logits"][0]),
    )


def teacher_of(inputs: dict[str, Any], dtype: torch.dtype) -> Targets:
    if "teacher_topk_ids" in inputs:
        return sparse_of(inputs, dtype)
    given = inputs.get("teacher_probs")
    logits = tensor(inputs["teacher_logits"], dtype) if given is None else tensor(given, dtype).log()
    return dense_of(logits, torch.tensor(inputs["mask"], dtype=torch.bool) if "mask" in inputs else None)


KINDS = {
    "dist": DIST,
    "dkd": DKD,
    "forward_kl": ForwardKL,
    "gjsd": GeneralisedJSD,
    "logit_mse": LogitMSE,
    "logit_std_kl": partial(ForwardKL, standardise=True),
    "nkd": NKD,
    "reverse_kl": ReverseKL,
    "soft_target_ce": SoftTargetCE,
    "token_kl": ForwardKL,
    "topk_bucket_kl": ForwardKL,
    "topk_renorm_kl": TopKRenormKL,
    "total_variation": TotalVariation,
    "uld": ULD,
}
OPTIONS = {
    "dist": ("beta", "gamma", "eps"),
    "dkd": ("alpha", "beta"),
    "gjsd": ("beta",),
    "logit_mse": ("class_reduction", "centred"),
    "nkd": ("gamma",),
}
CONVENTIONS = {
    "dist": {"eps_mode": "added to the product of norms"},
    "logit_std_kl": {"eps": 1e-7, "std": "unbiased (C-1)"},
    "nkd": {"t_squared": True},
}
"""Parameters that are no options of kdpipe's."""


def loss_of(case: dict[str, Any]) -> DistillLoss:
    """The loss of a case. T^2 is the test's business: it multiplies what the loss calls `unscaled`."""
    params, name = case["params"], case["loss"]
    assert CONVENTIONS.get(name, {}).items() <= params.items()
    options = {key: params[key] for key in OPTIONS.get(name, ())}
    return KINDS[name](temperature=float(params.get("T", 1)), **options)


FEATURE_LOSSES = {
    "attention_transfer": AttentionTransfer,
    "cosine_feature": CosineFeature,
    "fitnet_mse": HintMSE,
    "rkd": RKD,
    "rkd_angle": partial(RKD, distance_weight=0, angle_weight=1),
    "rkd_distance": partial(RKD, distance_weight=1, angle_weight=0),
    "sp": SimilarityPreserving,
}
LABEL_LOSSES = {"ce", "class_weighted_ce", "label_smoothed_ce", "logit_adjusted_ce"}


def label_loss_of(case: dict[str, Any]) -> LabelLoss:
    params = case["params"]
    if case["loss"] == "class_weighted_ce":
        return class_weighted(cross_entropy, tensor(params["class_weights"]))
    if case["loss"] == "logit_adjusted_ce":
        return logit_adjusted(cross_entropy, tensor(params["class_counts"]), params["tau"])
    return cross_entropy


def tolerances(case: dict[str, Any], dtype: torch.dtype) -> tuple[float, float]:
    """rtol and atol of the values: 1e-10, except where the numbers themselves cannot be had so exactly."""
    if dtype == torch.float32:
        return 1e-5, 1e-5
    given = case["tol"]
    return (1e-10, 1e-10) if given["rtol"] <= 1e-9 else (given["rtol"], given["atol"])


def assert_as_expected(
    case: dict[str, Any], values: Tensor, used: Tensor, mean: Tensor, student: Tensor, of: str = "logits"
) -> None:
    """The values of the used rows, the mean of all, and its gradient."""
    expected = case["expected"]
    rtol, atol = tolerances(case, values.dtype)
    assert values.dtype == student.dtype
    assert mean.item() == pytest.approx(expected["value"], rel=rtol, abs=atol)
    if "per_row" in expected:
        found = torch.where(used, values, torch.nan).flatten().tolist()
        wanted = [torch.nan if each is None else each for each in np.ravel(np.array(expected["per_row"], dtype=object))]
        assert found == pytest.approx(wanted, rel=rtol, abs=atol, nan_ok=True)
    (gradient,) = torch.autograd.grad(mean, student, retain_graph=True)
    wanted = tensor(expected[f"grad_student_{of}"])
    assert (gradient - wanted).abs().max() <= atol + rtol * wanted.abs().max()
    assert (gradient[~used] == 0).all()


def mean_over(used: Tensor, values: Tensor) -> Tensor:
    return torch.where(used, values, 0.0).sum() / used.sum().clamp(min=1)


@DTYPES
@pytest.mark.parametrize("case", loss_cases(LABEL_LOSSES | set(FEATURE_LOSSES)))
def test_loss_and_gradient(case, dtype):
    if dtype == torch.float32 and NOT_IN_FLOAT32 & set(case["tags"]):
        pytest.skip("float32 cannot hold this one")
    inputs, params, expected = case["inputs"], case["params"], case["expected"]
    student = tensor(inputs["student_logits"], dtype).requires_grad_()
    loss, targets = loss_of(case), teacher_of(inputs, dtype)
    labels = torch.tensor(inputs["labels"]) if "labels" in inputs else None
    values = values_of(loss, student, targets, labels)
    own, unscaled = values, loss.unscaled(values)
    if case["loss"] != "nkd":
        values = unscaled * float(params["T"]) ** 2 if params.get("t_squared") else unscaled
    used = valid_rows(loss, targets, labels)
    used = torch.ones_like(values, dtype=torch.bool) if used is None else used
    mean = mean_over(used, values)
    assert_as_expected(case, values, used, mean, student)
    rtol, atol = tolerances(case, dtype)
    if "value_unscaled" in expected:
        found = mean_over(used, unscaled).item()
        assert found == pytest.approx(expected["value_unscaled"], rel=rtol, abs=atol)
    assert kd_loss(student, targets, loss=loss, labels=labels).item() == mean_over(used, own).item()
    factor = float(params.get("T", 1)) ** 2
    for part, alone in PARTS.get(case["loss"], {}).items():
        found = mean_over(used, loss.unscaled(values_of(replace(loss, **alone), student, targets, labels))).item()
        assert found * factor == pytest.approx(expected[part], rel=rtol, abs=atol)


PARTS = {
    "dkd": {"tckd": {"alpha": 1, "beta": 0}, "nckd": {"alpha": 0, "beta": 1}},
    "dist": {"inter": {"beta": 1, "gamma": 0}, "intra": {"beta": 0, "gamma": 1}},
}
"""Named parts of a value, T^2 included and weights left out, and the weights that give them."""


@DTYPES
@pytest.mark.parametrize("case", loss_cases(everything_but(set(FEATURE_LOSSES))))
def test_loss_on_features_and_gradient(case, dtype):
    inputs, params = case["inputs"], dict(case["params"])
    projector = params.pop("projector", "identity")
    assert params.pop("huber_delta", 1) == 1
    assert params.pop("eps", 1e-12) == 1e-12
    student = tensor(inputs["student_features"], dtype).requires_grad_()
    targets = FeatureTargets(values=tensor(inputs["teacher_features"], dtype))
    loss = FEATURE_LOSSES[case["loss"]](**params)
    features = student if projector == "identity" else projected(student, tensor(projector, dtype))
    values = loss(features, targets)
    assert_as_expected(case, values, torch.ones(len(values), dtype=torch.bool), values.mean(), student, "features")
    torch.testing.assert_close(kd_loss(features, targets, loss=loss), values.mean())


def projected(student: Tensor, matrix: Tensor) -> Tensor:
    """By kdpipe's linear projector with the weights of a case `[D_s, D_t]`."""
    projector = make_projector("linear", student.shape[1:], tuple(matrix.shape[1:]), seed=0).to(matrix.dtype)
    with torch.no_grad():
        projector.weight.copy_(matrix.T)
        projector.bias.zero_()
    return projector(student)


@DTYPES
@pytest.mark.parametrize("case", loss_cases(everything_but(LABEL_LOSSES)))
def test_loss_on_labels_and_gradient(case, dtype):
    inputs, params = case["inputs"], case["params"]
    student, labels = tensor(inputs["student_logits"], dtype).requires_grad_(), torch.tensor(inputs["labels"])
    values = label_loss_of(case)(student, labels, params.get("epsilon", 0.0))
    used = labels >= 0
    mean = mean_over(used, values)
    if params.get("normalise") == "sum of the target weights":
        mean = torch.where(used, values, 0.0).sum() / tensor(params["class_weights"])[labels[used]].sum()
    assert_as_expected(case, values, used, mean, student)


NAMES = {"token_kl": "forward_kl", "topk_bucket_kl": "forward_kl"}
"""What `kd_loss` calls a loss, where it is not the case's name."""


def cases_at_defaults() -> list:
    """Cases whose parameters, but for T, are the defaults of the loss that `kd_loss` knows by that name."""
    return [
        case
        for case in loss_cases(everything_but({*LOSSES, *NAMES}))
        if case.values[0] is None
        or replace(loss_of(case.values[0]), temperature=1.0) == LOSSES[name_of(case.values[0])](temperature=1.0)
    ]


def name_of(case: dict[str, Any]) -> str:
    return NAMES.get(case["loss"], case["loss"])


@pytest.mark.parametrize("case", cases_at_defaults())
def test_kd_loss_for_your_own_loop(case):
    params, inputs = case["params"], case["inputs"]
    temperature = float(params.get("T", 1))
    labels = torch.tensor(inputs["labels"]) if "labels" in inputs else None
    student, targets = tensor(inputs["student_logits"]), teacher_of(inputs, torch.float64)
    found = kd_loss(student, targets, temperature=temperature, loss=name_of(case), labels=labels)
    if case["loss"] in SCALED and not params["t_squared"]:
        found = found / temperature**2
    elif case["loss"] in UNSCALED and params.get("t_squared"):
        found = found * temperature**2
    rtol, atol = tolerances(case, torch.float64)
    assert found.item() == pytest.approx(case["expected"]["value"], rel=rtol, abs=atol)


SCALED = {"forward_kl", "reverse_kl", "token_kl", "topk_bucket_kl", "topk_renorm_kl", "soft_target_ce", "dkd", "dist"}
"""Losses with a factor T^2 of their own."""
UNSCALED = {"total_variation", "uld"}
"""Losses at a temperature without one."""


@pytest.mark.parametrize("case", encoding_cases("tail_logmass"))
def test_tail_log_masses(case):
    log_probs = tensor([case["logprobs_T1"]])
    keys = list(case["expected"])
    temperatures = [float(Fraction(key)) for key in keys]
    wanted = [case["expected"][key]["log_tail"] for key in keys]
    wanted = tensor([-torch.inf if each is None else each for each in wanted])
    ids = torch.tensor([case["topk_ids"]])
    torch.testing.assert_close(tail_log_masses(log_probs, ids, temperatures)[0], wanted, rtol=1e-12, atol=1e-12)
    encoding = TopK(k=case["k"], temperatures=temperatures)
    targets = encoding.decode(encoding.encode(log_probs), OutputSpec(name="logits", shape=(case["C"],)))
    assert targets.ids[0].tolist() == sorted(case["topk_ids"])
    stored = targets.tails[0, [encoding.temperatures.index(each) for each in temperatures]]
    same = stored.double() == wanted
    assert (same | ((stored - wanted).abs() <= 2.0**-24 * wanted.abs() * (1 + 1e-9))).all()


@pytest.mark.parametrize("case", encoding_cases("int8_row_affine"))
@pytest.mark.parametrize("encoding", [Int8(), FeaturesInt8()], ids=["int8", "features_int8"])
def test_int8_rows(case, encoding):
    row, expected = tensor([case["row"]]), case["expected"]
    arrays = encoding.encode(row)
    assert arrays[".scale"][0] == pytest.approx(expected["scale"], rel=2.0**-23)
    targets = encoding.decode(arrays, OutputSpec(name="logits", shape=(len(case["row"]),)))
    found = targets.values.double() + (targets.row_max.double() if isinstance(targets, DenseTargets) else 0.0)
    assert (found - row).abs().max() <= expected["max_abs_error_bound_float32_params"]
    for temperature, bounds in expected["kl"].items():
        p, q = (torch.log_softmax(each / float(Fraction(temperature)), dim=-1) for each in (row, found))
        allowed = bounds["bound"] * (1 + 2.0**-12) + 1e-12
        assert (p.exp() * (p - q)).sum() <= allowed
        assert (q.exp() * (q - p)).sum() <= allowed
        assert (p - q).abs().max() <= bounds["max_abs_dlogp_bound"] * (1 + 2.0**-10) + 1e-6


@pytest.mark.parametrize("stratified", [False, True])
@pytest.mark.parametrize("case", encoding_cases("sampling"))
def test_sampling_moments(case, stratified):
    """Means and variances of the estimates of p and of the cross-entropy, over 20,000 rows."""
    if case["proposal_power"] != 1:
        pytest.skip("kdpipe draws from p itself, not from a power of it")
    num_rows, head, expected = 20_000, case["head_k"], case["expected"]
    logits = tensor(case["teacher_logits"]).expand(num_rows, -1)
    encoding = Sampled(draws=case["n"], head=head, stratified=stratified)
    arrays = encoding.encode(logits, np.random.default_rng(5).integers(0, 2**64, num_rows, dtype=np.uint64))
    targets = encoding.decode(arrays, OutputSpec(name="logits", shape=(logits.shape[1],)))
    assert targets.ids[0, :head].tolist() == sorted(case["head_ids"])
    estimates = torch.zeros(logits.shape, dtype=torch.float64).scatter_add(-1, targets.ids, targets.weights.double())
    log_q = torch.log_softmax(tensor(case["student_logits"]), dim=-1)
    cross_entropy = -(estimates * log_q).sum(dim=-1, keepdim=True)
    rounding = 2e-3 if head else 1e-6
    for values, name in ((estimates, "estimator"), (cross_entropy, "ce")):
        mean, variance = (tensor(expected[f"{name}_{moment}"]).reshape(-1) for moment in ("mean", "var"))
        allowed = 4.5 * (variance / num_rows).sqrt() + rounding * mean.abs()
        assert ((values.mean(dim=0) - mean).abs() <= allowed).all()
        ratio = values.var(dim=0) / variance.clamp(min=1e-12)
        seen = variance > 1e-6
        assert (ratio[seen] < 1.1).all()
        if not stratified:
            assert (ratio[seen] > 0.9).all()
    if not stratified:
        distinct = head + (arrays[".counts"] > 0).sum(axis=-1).mean()
        assert distinct == pytest.approx(expected["expected_unique_ids"], abs=4.5 * case["n"] / 2 / num_rows**0.5)
