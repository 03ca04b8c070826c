from __future__ import annotations

from collections import namedtuple

import numpy as np
import pytest
import torch
from torch import nn

from kdpipe.errors import ConfigError, TeacherError
from kdpipe.fingerprint import digest
from kdpipe.preprocess import Standardize
from kdpipe.targets import OutputSpec
from kdpipe.teachers.asking import Asking
from kdpipe.teachers.base import Teacher, abstains
from kdpipe.teachers.torch import PRECISIONS, TorchTeacher

FEATURES = {"features": np.random.default_rng(0).normal(3, 2, (6, 4)).astype(np.float32)}
PROBE = {"features": FEATURES["features"][:1]}
IDENTITY = {"weights": "sha256 of the file", "model": {"factory": "nets:Net", "width": 3}}


def fitted(scale=1.0):
    preprocess = Standardize()
    preprocess.fit([{"features": FEATURES["features"] * scale}])
    return preprocess


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 3))


def teacher_of(model, num_classes=3, **arguments):
    named = {"preprocess": fitted(), "identity": IDENTITY, "probe": PROBE} | arguments
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


def test_logits_in_float64_stay_so():
    """As float32, 1e9 + 1 is 1e9."""

    class Far(nn.Module):
        def forward(self, inputs):
            return inputs.flatten(1)[:, :3].double() + 1e9

    said = teacher_of(Far()).predict(FEATURES)["logits"]
    near = fitted()(FEATURES).flatten(1)[:, :3].double()
    assert said.dtype == torch.float64
    torch.testing.assert_close(on_cpu(said) - 1e9, near, rtol=0, atol=1e-6)


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
        (lambda inputs: inputs.new_zeros(len(inputs), 4), r"\[1, 4\]"),
        (lambda inputs: inputs.new_zeros(len(inputs), 5, 2), r"\[1, 5, 2\]"),
        (lambda inputs: inputs.new_zeros(len(inputs)), r"\[1\]"),
        (lambda inputs: inputs.new_zeros(2, 3), r"\[2, 3\]"),
    ],
)
def test_what_is_no_logits_of_the_tasks_classes_is_refused(value, found):
    with pytest.raises(
        TeacherError, match=found + r" for 1 rows; expected logits of shape \[1, …, 3\] .*num_classes is 3"
    ):
        teacher_of(Returns(value))


@pytest.mark.parametrize(
    ("value", "found"),
    [
        (lambda inputs: inputs.new_zeros(1, 3), r"\[1, 3\]"),
        (lambda inputs: inputs.new_zeros(len(inputs), len(inputs), 3)[:, 1:].squeeze(1), r"\[6, 5, 3\]"),
        (lambda inputs: inputs.new_zeros(len(inputs), 2 + (len(inputs) == 1)), r"\[6, 2\]"),
    ],
)
def test_a_batch_with_other_logits_than_one_row_is_refused(value, found):
    teacher = teacher_of(Returns(lambda inputs: value(inputs) if len(inputs) > 1 else inputs.new_zeros(1, 3)))
    with pytest.raises(
        TeacherError, match=found + r" for 6 rows; expected logits of shape \[6, 3\] .*num_classes is 3"
    ):
        teacher.predict(FEATURES)


def test_a_forward_that_fails_is_the_teachers_error():
    with pytest.raises(TeacherError, match=r"forward failed on an input of shape \[1, 4\]: RuntimeError"):
        teacher_of(nn.Linear(5, 3))


class Hungry(nn.Linear):
    """Has memory for two rows."""

    def forward(self, inputs):
        return super().forward(inputs if len(inputs) <= 2 else torch.empty(2**50))


def test_a_forward_that_runs_out_of_memory_on_the_cpu_is_shown_fewer_rows():
    model = Hungry(4, 3)
    ask = Asking(teacher_of(model))
    said = ask(FEATURES, 6)["logits"]
    assert ask.at_once == 1
    assert torch.equal(said, torch.cat([model(row) for row in fitted()(FEATURES).split(1)]))


def test_logits_may_have_a_token_axis():
    teacher = teacher_of(Returns(lambda inputs: inputs.unsqueeze(-1).expand(-1, -1, 3)))
    assert teacher.outputs == (OutputSpec(name="logits", shape=(4, 3)),)
    assert teacher.predict(FEATURES)["logits"].shape == (6, 4, 3)


# Further outputs


class Block(nn.Module):
    """Its convolution's output is overwritten by the next module."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv1d(1, 2, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)
        self.pair = Returns(lambda hidden: (hidden, hidden))
        self.head = nn.Linear(8, 3)

    def forward(self, inputs):
        hidden, _ = self.pair(self.relu(self.conv(inputs.unsqueeze(1))))
        flat = hidden.flatten(1)
        return {"logits": self.head(flat), "embedding": flat, "both": (flat, flat)}


def test_a_key_of_forwards_dict_and_a_submodules_output_are_outputs():
    model = Block()
    teacher = teacher_of(model, outputs=["conv", "logits", "embedding"])
    assert teacher.outputs == (
        OutputSpec(name="logits", shape=(3,)),
        OutputSpec(name="conv", shape=(2, 4), kind="features"),
        OutputSpec(name="embedding", shape=(8,), kind="features"),
    )
    said = {name: on_cpu(value) for name, value in teacher.predict(FEATURES).items()}
    with torch.no_grad():
        convolved = model.conv(fitted()(FEATURES).unsqueeze(1))
    torch.testing.assert_close(said["conv"], convolved)
    assert (said["conv"] < 0).any(), "what the module itself gave, before the next one worked in place"
    assert torch.equal(said["embedding"], convolved.relu().flatten(1))


def test_parts_of_a_tuple_are_what_the_module_gave_before_the_next_one_worked_in_place():
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.rnn, self.relu, self.head = nn.GRU(4, 5), nn.ReLU(inplace=True), nn.Linear(5, 3)

        def forward(self, inputs):
            return self.head(self.relu(self.rnn(inputs)[0]))

    model = Recurrent()
    said = teacher_of(model, outputs=["logits", "rnn.0"]).predict(FEATURES)
    with torch.no_grad():
        given, _ = model.rnn(fitted()(FEATURES))
    assert (given < 0).any()
    torch.testing.assert_close(on_cpu(said["rnn.0"]), given)


def test_logits_alone_are_the_same_with_and_without_further_outputs():
    alone, among = teacher_of(Block()), teacher_of(Block(), outputs=["logits", "conv"])
    assert set(alone.predict(FEATURES)) == {"logits"}
    assert torch.equal(alone.predict(FEATURES)["logits"], among.predict(FEATURES)["logits"])


def test_parts_of_tuples_go_by_position():
    model = Block()
    teacher = teacher_of(model, outputs=["logits", "both.1", "pair.0"])
    assert [each.shape for each in teacher.outputs] == [(3,), (8,), (2, 4)]
    said = teacher.predict(FEATURES)
    assert torch.equal(said["both.1"], said["pair.0"].flatten(1))
    named = teacher_of(Returns(lambda inputs: (inputs[:, :2], inputs[:, 1:])), logits="1")
    assert torch.equal(on_cpu(named.predict(FEATURES)["logits"]), fitted()(FEATURES)[:, 1:])
    pair = namedtuple("pair", "hidden scores")
    named = teacher_of(Returns(lambda inputs: pair(inputs[:, :2], inputs[:, 1:])), logits="1")
    assert torch.equal(on_cpu(named.predict(FEATURES)["logits"]), fitted()(FEATURES)[:, 1:])


def test_probabilities_are_not_taken_for_logits():
    with pytest.raises(TeacherError, match="numbers from 0 to 1 with a sum of 1: probabilities, of a softmax"):
        teacher_of(Returns(lambda inputs: inputs[:, 1:].softmax(dim=1)))
    sure = teacher_of(Returns(lambda inputs: torch.eye(3)[inputs[:, 1:].argmax(dim=1)]))
    assert set(sure.predict(FEATURES)["logits"].flatten().tolist()) == {0, 1}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (lambda inputs: {"scores": inputs, "loss": inputs}, "gives no tensor 'logits'; it gives scores, loss. Name"),
        (lambda inputs: (inputs, inputs), "it gives 0, 1"),
        (lambda inputs: None, "it gives NoneType"),
    ],
)
def test_a_forward_that_does_not_tell_its_logits_is_refused(value, message):
    with pytest.raises(TeacherError, match=message):
        teacher_of(Returns(value))


@pytest.mark.parametrize("shape", [(), (1,)])
def test_a_single_logit_is_two_classes(shape):
    teacher = teacher_of(Returns(lambda inputs: inputs[:, 0].view(len(inputs), *shape)), num_classes=2)
    logits = on_cpu(teacher.predict(FEATURES)["logits"])
    z = fitted()(FEATURES)[:, 0]
    assert torch.equal(logits, torch.stack([torch.zeros_like(z), z], dim=1))
    assert torch.allclose(logits.softmax(dim=1)[:, 1], z.sigmoid())


def test_inputs_by_name_are_forwards_arguments_without_their_padding():
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 0, 0, 0, 0]])

    class Tokens(Standardize):
        def state(self):
            return {}

        def __call__(self, columns):
            rows = len(columns["features"])
            return {"input_ids": torch.arange(5).repeat(rows, 1), "attention_mask": mask[:rows]}

    lengths = []

    class Takes(nn.Module):
        def forward(self, input_ids, attention_mask):
            lengths.append(input_ids.shape[1])
            assert input_ids.shape == attention_mask.shape
            return (input_ids * attention_mask).sum(dim=1, keepdim=True).float().expand(-1, 3)

    teacher = teacher_of(Takes(), preprocess=Tokens())
    logits = on_cpu(teacher.predict({name: column[:2] for name, column in FEATURES.items()})["logits"])
    assert logits[:, 0].tolist() == [3, 0]
    assert lengths == [3, 3]


def test_a_deep_submodule_is_named_by_its_path():
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 8), nn.ReLU()), nn.Linear(8, 3))
    teacher = teacher_of(model, outputs=["logits", "0.1"])
    assert teacher.outputs[1] == OutputSpec(name="0.1", shape=(8,), kind="features")
    assert (teacher.predict(FEATURES)["0.1"] >= 0).all()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("embeding", r"'embeding' of the teacher does not exist: forward gives logits, embedding, both.0, .*head"),
        ("", r"'' of the teacher does not exist"),
        ("both", r"'both' of the teacher does not exist: .*both.0, both.1"),
        ("pair", r"'pair' of the teacher does not exist: .*pair.0"),
        ("covered", r"'covered' of the teacher needs not be asked for"),
        ("statistics", r"'statistics' of the teacher needs not be asked for"),
    ],
)
def test_an_output_that_cannot_be_had_is_the_users_error(name, message):
    with pytest.raises(ConfigError, match=message):
        teacher_of(Block(), outputs=["logits", name])


def test_a_submodule_that_is_not_called_says_nothing():
    class Unused(Block):
        def __init__(self):
            super().__init__()
            self.spare = nn.Linear(4, 4)

    with pytest.raises(ConfigError, match="'spare' of the teacher is a submodule that forward does not call"):
        teacher_of(Unused(), outputs=["logits", "spare"])


def test_of_many_names_the_nearest_are_shown():
    model = nn.ModuleDict({f"layer{number}": nn.Linear(4, 3) for number in range(100)})
    model.forward = lambda inputs: model["layer0"](inputs)
    with pytest.raises(ConfigError, match=r"layer77.*\(101 in all\)"):
        teacher_of(model, outputs=["logits", "layer_77"])


# Abstention


def covering(covered, *, tokens=False):
    """Forward gives zeros, and what `covered` says about the inputs."""

    def value(inputs):
        return {"logits": inputs.new_zeros(len(inputs), *([4] if tokens else []), 3), "covered": covered(inputs)}

    return Returns(value)


def test_a_teacher_that_covers_abstains_and_others_do_not():
    assert abstains(teacher_of(covering(lambda inputs: inputs[:, 0] > 0)))
    assert not abstains(teacher_of(network()))


def test_coverage_is_what_forward_says():
    teacher = teacher_of(covering(lambda inputs: inputs[:, 0] > 0))
    covered = on_cpu(teacher.predict(FEATURES)["covered"])
    assert torch.equal(covered, fitted()(FEATURES)[:, 0] > 0)
    assert covered.any()
    assert not covered.all()


def test_coverage_of_rows_is_spread_over_their_tokens():
    by_row = teacher_of(covering(lambda inputs: inputs[:, 0] > 0, tokens=True)).predict(FEATURES)["covered"]
    by_token = teacher_of(covering(lambda inputs: inputs > 0, tokens=True)).predict(FEATURES)["covered"]
    inputs = fitted()(FEATURES)
    assert torch.equal(on_cpu(by_row), (inputs[:, :1] > 0).expand(6, 4))
    assert torch.equal(on_cpu(by_token), inputs > 0)


@pytest.mark.parametrize(
    ("covered", "found"),
    [
        (lambda inputs: inputs[:, 0], r"\[6\]; expected bool, of shape \[6\]"),
        (lambda inputs: inputs > 0, r"\[6, 4\] bool; expected bool, of shape \[6\]"),
        (lambda inputs: None, "nothing; expected bool"),
        (lambda inputs: inputs[:1, 0] > 0, r"\[1\] bool; expected"),
    ],
)
def test_what_is_no_coverage_is_refused(covered, found):
    with pytest.raises(TeacherError, match=found):
        teacher_of(covering(covered)).predict(FEATURES)


def test_coverage_comes_always_or_never():
    def sometimes(inputs):
        return {"logits": inputs.new_zeros(len(inputs), 3)} | ({"covered": inputs} if len(inputs) > 1 else {})

    with pytest.raises(TeacherError, match="`covered` for some batches"):
        teacher_of(Returns(sometimes)).predict(FEATURES)


# Fingerprint


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
        pytest.param({"model": nn.Sequential(Returns(torch.Tensor.double), network().double())}, id="parameters"),
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
