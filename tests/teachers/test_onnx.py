from __future__ import annotations

import re

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from kdpipe.errors import ConfigError, TeacherError
from kdpipe.preprocess import ImageTensor, Standardize
from kdpipe.targets import OutputSpec
from kdpipe.teachers.asking import Asking
from kdpipe.teachers.base import Teacher
from kdpipe.teachers.onnx import OnnxTeacher

WEIGHTS = np.random.default_rng(1).normal(size=(4, 3)).astype(np.float32)
COLUMNS = {"features": np.random.default_rng(0).normal(3, 2, (6, 4)).astype(np.float32)}
PROBE = {"features": COLUMNS["features"][:1]}


def write(path, nodes, inputs, outputs, weights=WEIGHTS):
    """A model of `nodes`, whose weights are called w."""
    tensors = [helper.make_tensor_value_info(name, kind, shape) for name, kind, shape in inputs]
    results = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs]
    graph = helper.make_graph(nodes, "net", tensors, results, [numpy_helper.from_array(weights, "w")])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)


def linear(tmp_path, outputs=("logits",), batch="rows", weights=WEIGHTS):
    """x w, its softmax, and x itself, under the names of `outputs`."""
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["logits"]),
        helper.make_node("Softmax", ["logits"], ["probabilities"]),
        helper.make_node("Sigmoid", ["logits"], ["probability"]),
        helper.make_node("Relu", ["x"], ["hidden"]),
    ]
    write(tmp_path / "net.onnx", nodes, [("x", TensorProto.FLOAT, [batch, 4])], outputs, weights)


def fitted():
    preprocess = Standardize()
    preprocess.fit([COLUMNS])
    return preprocess


def teacher_of(tmp_path, num_classes=3, **arguments):
    named = {"preprocess": fitted(), "probe": PROBE, "path": "net.onnx"} | arguments
    return OnnxTeacher(num_classes=num_classes, **named | {"path": tmp_path / named["path"]})


EXPECTED = fitted()(COLUMNS) @ torch.from_numpy(WEIGHTS)


def test_it_says_what_the_model_says(tmp_path):
    linear(tmp_path)
    teacher = teacher_of(tmp_path)
    assert isinstance(teacher, Teacher)
    assert teacher.outputs == (OutputSpec(name="logits", shape=(3,)),)
    torch.testing.assert_close(teacher.predict(COLUMNS)["logits"], EXPECTED)


def test_further_outputs_are_features_and_the_first_holds_the_logits(tmp_path):
    linear(tmp_path, outputs=("logits", "hidden"))
    teacher = teacher_of(tmp_path, outputs=["logits", "hidden"])
    assert teacher.outputs[1] == OutputSpec(name="hidden", shape=(4,), kind="features")
    torch.testing.assert_close(teacher.predict(COLUMNS)["hidden"], fitted()(COLUMNS).relu())


def test_probabilities_become_logits(tmp_path):
    linear(tmp_path, outputs=("probabilities",))
    logits = teacher_of(tmp_path, probabilities=True).predict(COLUMNS)["logits"]
    torch.testing.assert_close(logits, EXPECTED.log_softmax(dim=1), atol=1e-5, rtol=1e-5)


def test_a_sigmoid_is_two_classes(tmp_path):
    linear(tmp_path, outputs=("probability",), weights=WEIGHTS[:, :1])
    logits = teacher_of(tmp_path, 2, probabilities=True).predict(COLUMNS)["logits"]
    torch.testing.assert_close(logits.softmax(dim=1)[:, 1], EXPECTED[:, 0].sigmoid(), atol=1e-5, rtol=1e-5)


def test_images_with_their_channels_last(tmp_path):
    nodes = [helper.make_node("ReduceMean", ["x"], ["logits"], axes=[1, 2], keepdims=0)]
    write(tmp_path / "net.onnx", nodes, [("x", TensorProto.FLOAT, ["rows", 5, 4, 3])], ["logits"])
    images = {"image": np.random.default_rng(0).integers(0, 255, (6, 5, 4, 3)).astype(np.uint8)}
    preprocess = ImageTensor(mean=[0.0] * 3, std=[1.0] * 3)
    probe = {"image": images["image"][:1]}
    with pytest.raises(TeacherError, match=r"(?s)failed on inputs of shape \[1, 3, 5, 4\].*x tensor\(float\)"):
        teacher_of(tmp_path, preprocess=preprocess, probe=probe)
    teacher = teacher_of(tmp_path, preprocess=preprocess, probe=probe, layout="channels_last")
    means = torch.from_numpy(images["image"]).float().mean(dim=(1, 2)) / 255
    torch.testing.assert_close(teacher.predict(images)["logits"], means)


def test_inputs_by_name_in_the_types_that_the_model_wants(tmp_path):
    class Tokens(Standardize):
        def state(self):
            return {}

        def __call__(self, columns):
            rows = len(columns["features"])
            ids = torch.arange(rows * 5).view(rows, 5) % 7
            return {"attention_mask": torch.ones(rows, 5).long(), "input_ids": ids, "unused": ids}

    nodes = [
        helper.make_node("Mul", ["input_ids", "attention_mask"], ["product"]),
        helper.make_node("Cast", ["product"], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("Gemm", ["floats", "w"], ["logits"]),
    ]
    kinds = [(name, TensorProto.INT32, ["rows", 5]) for name in ("input_ids", "attention_mask")]
    write(tmp_path / "net.onnx", nodes, kinds, ["logits"], np.eye(5, 3, dtype=np.float32))
    logits = teacher_of(tmp_path, preprocess=Tokens()).predict(COLUMNS)["logits"]
    assert logits.tolist() == [[k % 7, (k + 1) % 7, (k + 2) % 7] for k in range(0, 30, 5)]


@pytest.mark.parametrize(
    ("kind", "mean", "number"),
    [
        (TensorProto.UINT8, 0.5, "-0.5"),
        (TensorProto.UINT8, 1.0, "-1.0"),
        (TensorProto.UINT8, -300.0, "300.0"),
        (TensorProto.INT64, 0.25, "-0.25"),
    ],
)
def test_numbers_that_an_input_cannot_hold_are_refused(tmp_path, kind, mean, number):
    nodes = [
        helper.make_node("Cast", ["x"], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("Gemm", ["floats", "w"], ["logits"]),
    ]
    write(tmp_path / "net.onnx", nodes, [("x", kind, ["rows", 4])], ["logits"], np.eye(4, 3, dtype=np.float32))
    rows = {"features": np.array([[0, 1, 2, 3]], np.float32)}
    teacher = teacher_of(tmp_path, preprocess=Standardize(mean=[0.0] * 4, std=[1.0] * 4), probe=rows)
    assert teacher.predict(rows)["logits"].tolist() == [[0, 1, 2]]
    moved = Standardize(mean=[mean] * 4, std=[1.0] * 4)
    with pytest.raises(
        ConfigError, match=rf"takes x as u?int\d+, and the preprocess gives {re.escape(number)}; expected"
    ):
        teacher_of(tmp_path, preprocess=moved, probe=rows)


def test_one_input_of_a_fixed_number_of_rows(tmp_path):
    class Twice(Standardize):
        def state(self):
            return {}

        def __call__(self, columns):
            rows = torch.from_numpy(columns["features"])
            return {"a": rows, "b": rows}

    nodes = [helper.make_node("Add", ["a", "b"], ["sum"]), helper.make_node("MatMul", ["sum", "w"], ["logits"])]
    kinds = [("a", TensorProto.FLOAT, [4, 4]), ("b", TensorProto.FLOAT, ["rows", 4])]
    write(tmp_path / "net.onnx", nodes, kinds, ["logits"])
    logits = teacher_of(tmp_path, preprocess=Twice()).predict(COLUMNS)["logits"]
    np.testing.assert_allclose(logits, 2 * COLUMNS["features"] @ WEIGHTS, rtol=1e-5, atol=1e-5)


def test_another_file_or_preprocess_is_another_teacher(tmp_path):
    linear(tmp_path)
    before = teacher_of(tmp_path).fingerprint
    assert teacher_of(tmp_path).fingerprint == before
    assert teacher_of(tmp_path, preprocess=Standardize(mean=[0.0] * 4, std=[1.0] * 4)).fingerprint != before
    linear(tmp_path, weights=2 * WEIGHTS)
    assert teacher_of(tmp_path).fingerprint != before


def test_weights_beside_the_file_belong_to_the_teacher(tmp_path):
    found = []
    for weights in (WEIGHTS, 2 * WEIGHTS):
        linear(tmp_path, weights=weights)
        model = onnx.load(tmp_path / "net.onnx")
        (tmp_path / "any name.bin").unlink(missing_ok=True)
        onnx.save(model, tmp_path / "net.onnx", save_as_external_data=True, location="any name.bin", size_threshold=0)
        found.append(((tmp_path / "net.onnx").read_bytes(), teacher_of(tmp_path).fingerprint))
    assert found[0][0] == found[1][0], "the file itself is the same"
    assert found[0][1] != found[1][1]


def test_a_padded_vocabulary_is_told_apart_from_wrong_classes(tmp_path):
    nodes = [
        helper.make_node("Unsqueeze", ["x", "axis"], ["wide"]),
        helper.make_node("MatMul", ["wide", "w"], ["logits"]),
    ]
    write(
        tmp_path / "net.onnx", nodes, [("x", TensorProto.FLOAT, ["rows", 4])], ["logits"], np.ones((1, 6), np.float32)
    )
    model = onnx.load(tmp_path / "net.onnx")
    model.graph.initializer.append(numpy_helper.from_array(np.array([2]), "axis"))
    onnx.save(model, tmp_path / "net.onnx")
    with pytest.raises(TeacherError, match=r"\[1, 4, 6\] for one row; expected \[1, …, 5\] .*set it to .* outputs, 6"):
        teacher_of(tmp_path, 5)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"path": "nowhere.onnx"}, ConfigError, "there is no file"),
        ({"path": "text.onnx"}, ConfigError, "no ONNX model that ONNX Runtime can load"),
        ({"path": "cut.onnx"}, ConfigError, "no ONNX model that ONNX Runtime can load"),
        ({"logits": "scores"}, ConfigError, "no output 'scores'; it has logits, hidden"),
        ({"outputs": ["logits", "features"]}, ConfigError, "no output 'features'"),
        (
            {"path": "two.onnx"},
            ConfigError,
            "outputs probabilities, hidden; say which of them holds the logits",
        ),
        ({"num_classes": 5}, TeacherError, r"gives logits of shape \[1, 3\] for one row; expected \[1, …, 5\]"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, arguments, error, message):
    linear(tmp_path, outputs=("probabilities", "hidden"))
    (tmp_path / "net.onnx").rename(tmp_path / "two.onnx")
    linear(tmp_path, outputs=("logits", "hidden"))
    (tmp_path / "text.onnx").write_text("import os")
    (tmp_path / "cut.onnx").write_bytes((tmp_path / "net.onnx").read_bytes()[:80])
    with pytest.raises(error, match=message):
        teacher_of(tmp_path, **arguments)


@pytest.mark.parametrize("batch", [1, 4, 64])
def test_a_model_of_a_fixed_number_of_rows_is_shown_so_many(tmp_path, batch):
    linear(tmp_path, outputs=("logits", "hidden"), batch=batch)
    said = teacher_of(tmp_path, outputs=["logits", "hidden"]).predict(COLUMNS)
    torch.testing.assert_close(said["logits"], EXPECTED)
    torch.testing.assert_close(said["hidden"], fitted()(COLUMNS).relu())


def test_a_model_that_runs_out_of_memory_is_shown_fewer_rows(tmp_path):
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["product"]),
        helper.make_node("Shape", ["x"], ["rows"], end=1),
        helper.make_node("Constant", [], ["power"], value=numpy_helper.from_array(np.array([24]))),
        helper.make_node("Pow", ["rows", "power"], ["size"]),  # 4 rows: a PiB, which no machine has
        helper.make_node("ConstantOfShape", ["size"], ["zeros"]),
        helper.make_node("ReduceSum", ["zeros"], ["zero"], keepdims=0),
        helper.make_node("Add", ["product", "zero"], ["logits"]),
    ]
    write(tmp_path / "net.onnx", nodes, [("x", TensorProto.FLOAT, ["rows", 4])], ["logits"])
    ask = Asking(teacher_of(tmp_path))
    torch.testing.assert_close(ask({"features": COLUMNS["features"][:4]}, 4)["logits"], EXPECTED[:4])
    assert ask.at_once == 2


@pytest.mark.parametrize(
    ("outputs", "columns", "num_classes", "message"),
    [
        (("logits",), 3, 3, r"gives logits with values from .* to .*; expected probabilities, from 0 to 1\. Leave"),
        (("logits",), 1, 2, "expected probabilities, from 0 to 1"),
        (("probability",), 3, 3, "gives probability with values that sum to .*; expected probabilities of classes"),
    ],
)
def test_what_are_no_probabilities_is_refused(tmp_path, outputs, columns, num_classes, message):
    linear(tmp_path, outputs=outputs, weights=WEIGHTS[:, :columns])
    with pytest.raises(TeacherError, match=message):
        teacher_of(tmp_path, num_classes, probabilities=True).predict(COLUMNS)


def test_probabilities_are_not_taken_for_logits(tmp_path):
    linear(tmp_path, outputs=("probabilities",))
    with pytest.raises(TeacherError, match=r"gives probabilities from 0 to 1 with a sum of 1: .*probabilities: true"):
        teacher_of(tmp_path)


def test_an_output_that_is_no_tensor_is_named(tmp_path):
    """As skl2onnx has probabilities unless it is told otherwise."""
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["z"]),
        helper.make_node("ZipMap", ["z"], ["said"], domain="ai.onnx.ml", classlabels_int64s=[0, 1, 2]),
    ]
    tensors = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", 4])]
    value = helper.make_tensor_type_proto(TensorProto.FLOAT, None)
    kind = helper.make_sequence_type_proto(helper.make_map_type_proto(TensorProto.INT64, value))
    graph = helper.make_graph(nodes, "net", tensors, [helper.make_value_info("said", kind)], [WEIGHTS_OF_NET])
    versions = [helper.make_opsetid("", 17), helper.make_opsetid("ai.onnx.ml", 3)]
    onnx.save(helper.make_model(graph, opset_imports=versions, ir_version=9), tmp_path / "net.onnx")
    with pytest.raises(ConfigError, match=r"'said' of \S+ is seq\(map\(.*expected a tensor.*'zipmap': False"):
        teacher_of(tmp_path, probabilities=True)


WEIGHTS_OF_NET = numpy_helper.from_array(WEIGHTS, "w")
