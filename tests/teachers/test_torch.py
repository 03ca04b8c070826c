from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from kdpipe.errors import TeacherError
from kdpipe.fingerprint import digest
from kdpipe.preprocess import Standardize
from kdpipe.targets import OutputSpec
from kdpipe.teachers.base import Teacher
from kdpipe.teachers.torch import PRECISIONS, TorchTeacher

FEATURES = {"features": np.random.default_rng(0).normal(3, 2, (6, 4)).astype(np.float32)}
IDENTITY = {"weights": "sha256 of the file", "model": {"factory": "nets:Net", "width": 3}}


def fitted(scale=1.0):
    preprocess = Standardize()
    preprocess.fit([{"features": FEATURES["features"] * scale}])
    return preprocess


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 3))


def teacher_of(model, num_classes=3, **arguments):
    named = {"preprocess": fitted(), "identity": IDENTITY} | arguments
    return TorchTeacher(model, num_classes=num_classes, **named)


def on_cpu(tensor):
    assert not tensor.requires_grad
    return tensor.cpu()


def test_it_is_a_teacher():
    teacher = teacher_of(network())
    assert isinstance(teacher, Teacher)
    assert teacher.outputs == (OutputSpec(name="logits", shape=(3,)),)


def test_it_says_what_the_module_says_of_its_own_preprocess_in_eval_mode():
    model = network()
    model.train()
    said = on_cpu(teacher_of(model).predict(FEATURES)["logits"])
    reference = network()
    reference.load_state_dict(model.state_dict())
    with torch.no_grad():
        expected = reference.eval()(fitted()(FEATURES))
    torch.testing.assert_close(said, expected)
    assert said.dtype == torch.float32


def test_it_says_the_same_again():
    teacher = teacher_of(network())
    assert torch.equal(teacher.predict(FEATURES)["logits"], teacher.predict(FEATURES)["logits"])


@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_precision_gives_float32_near_the_exact_logits(precision):
    exact = on_cpu(teacher_of(network()).predict(FEATURES)["logits"])
    said = on_cpu(teacher_of(network(), precision=precision).predict(FEATURES)["logits"])
    assert said.dtype == torch.float32
    torch.testing.assert_close(said, exact, rtol=0, atol=0.05)
    assert torch.equal(said, exact) == (precision == "float32")


class Returns(nn.Module):
    def __init__(self, value):
        super().__init__()
        self.value = value

    def forward(self, inputs):
        return self.value(inputs)


@pytest.mark.parametrize(
    ("value", "found"),
    [
        (lambda inputs: inputs.new_zeros(len(inputs), 4), r"\[6, 4\]"),
        (lambda inputs: inputs.new_zeros(len(inputs), 2), r"\[6, 2\]"),
        (lambda inputs: inputs.new_zeros(len(inputs)), r"\[6\]"),
        (lambda inputs: inputs.new_zeros(len(inputs), 1, 3), r"\[6, 1, 3\]"),
        (lambda inputs: inputs.new_zeros(1, 3), r"\[1, 3\]"),
        (lambda inputs: {"logits": inputs}, "dict"),
        (lambda inputs: (inputs, inputs), "tuple"),
    ],
)
def test_what_is_no_logits_of_the_tasks_classes_is_refused(value, found):
    with pytest.raises(
        TeacherError, match=found + r" for 6 rows; expected logits of shape \[6, 3\] .*num_classes is 3"
    ):
        teacher_of(Returns(value)).predict(FEATURES)


def test_a_fingerprint_is_json_and_the_same_for_the_same_teacher():
    assert digest(teacher_of(network()).fingerprint) == digest(teacher_of(network()).fingerprint)


@pytest.mark.parametrize(
    "other",
    [
        pytest.param({"identity": {**IDENTITY, "weights": "another"}}, id="weights"),
        pytest.param({"identity": {**IDENTITY, "model": {"factory": "nets:Net", "width": 4}}}, id="arguments"),
        pytest.param({"preprocess": fitted(scale=1.001)}, id="preprocess state"),
        pytest.param({"precision": "bfloat16"}, id="bfloat16"),
        pytest.param({"precision": "float16"}, id="float16"),
        pytest.param({"model": network().double()}, id="parameters"),
    ],
)
def test_a_fingerprint_changes_with_whatever_changes_numbers(other):
    assert digest(teacher_of(**({"model": network()} | other)).fingerprint) != digest(teacher_of(network()).fingerprint)


def test_three_precisions_have_three_fingerprints():
    found = {digest(teacher_of(network(), precision=precision).fingerprint) for precision in PRECISIONS}
    assert len(found) == len(PRECISIONS)


def test_a_fingerprint_keeps_what_identity_says():
    fingerprint = teacher_of(network()).fingerprint
    assert {key: fingerprint[key] for key in IDENTITY} == IDENTITY
    assert fingerprint["preprocess_state"] == fitted().state()
