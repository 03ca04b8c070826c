"""An ONNX file as a teacher, by ONNX Runtime: models of TensorFlow, Keras, JAX and others.

Shapes: B rows, T tokens, C classes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdpipe.config import package
from kdpipe.data.columns import Columns
from kdpipe.errors import ConfigError, TeacherError, is_out_of_memory
from kdpipe.fingerprint import digest, digest_file
from kdpipe.inputs import (
    LOGITS,
    Inputs,
    about_classes,
    class_logits,
    described,
    look_like_probabilities,
    num_rows,
    trimmed,
)
from kdpipe.preprocess import Preprocess
from kdpipe.targets import OutputSpec

_SMALLEST, _EPSILON = 1e-38, 1e-7
_RANGE_TOLERANCE, _SUM_TOLERANCE = 1e-3, 1e-2
_NO_MEMORY = re.compile("failed to allocate memory|bad_alloc|out of memory", re.IGNORECASE)
_PROVIDERS = ("CUDAExecutionProvider", "CPUExecutionProvider")
_DTYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(double)": np.float64,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(bool)": np.bool_,
    "tensor(uint8)": np.uint8,
}
_WEIGHTS_BESIDE = re.compile(rb"\x0a\x08location\x12(.)", re.DOTALL)
"""ONNX's `external_data`, a `StringStringEntryProto`: key "location", then the length of the file's name."""


class OnnxTeacher:
    """A model file with its own preprocess.

    Inputs are matched by name; a single input takes a single tensor, whatever they are called. `layout: channels_last`
    gives images as `[B, H, W, channels]`, as TensorFlow wants them. `logits` names the output that holds the logits
    (None: `logits`, or the first); with `probabilities: true` it holds probabilities, whose logarithm is taken.
    `outputs` may name others, which are stored as features. A file that was exported for batches of one size is shown
    so many rows at a time.
    """

    def __init__(
        self,
        path: Path,
        num_classes: int,
        preprocess: Preprocess,
        probe: Columns,
        *,
        outputs: Sequence[str] = (LOGITS,),
        logits: str | None = None,
        probabilities: bool = False,
        layout: Literal["channels_first", "channels_last"] = "channels_first",
    ) -> None:
        """It runs on a GPU where ONNX Runtime has one, else on as many CPU threads as torch. Raises `ConfigError`.

        Raises `TeacherError` where `probe`, one prepared row, does not fit the model.
        """
        self._path, self._preprocess, self._num_classes = path, preprocess, num_classes
        self._probabilities, self._channels_last = probabilities, layout == "channels_last"
        self._session = _session(path)
        self._inputs = {each.name: _DTYPES[each.type] for each in self._session.get_inputs() if each.type in _DTYPES}
        fixed = {each.shape[0] for each in self._session.get_inputs() if each.shape and isinstance(each.shape[0], int)}
        self._at_once = fixed.pop() if len(fixed) == 1 else None
        found = [each.name for each in self._session.get_outputs()]
        self._names = {LOGITS: logits or self._only(found, outputs)}
        self._names |= {name: name for name in outputs if name != LOGITS}
        for name in self._names.values():
            if name not in found:
                raise ConfigError(f"OnnxTeacher: {self._path} has no output {name!r}; it has {', '.join(found)}")
        for each in self._session.get_outputs():
            if each.name in self._names.values() and not each.type.startswith("tensor("):
                raise ConfigError(
                    f"OnnxTeacher: the output {each.name!r} of {self._path} is {each.type}; expected a tensor. Export "
                    "it as one (skl2onnx: options={'zipmap': False})"
                )
        said = self._say(probe)
        if said[LOGITS].ndim < 2 or said[LOGITS].shape[-1] != num_classes:
            raise TeacherError(
                f"{self._path} gives {self._names[LOGITS]} of shape {list(said[LOGITS].shape)} for one row; expected "
                f"[1, …, {num_classes}]{about_classes(said[LOGITS].shape, num_classes)}"
            )
        if not probabilities and look_like_probabilities(said[LOGITS]):
            raise TeacherError(
                f"{self._path} gives {self._names[LOGITS]} from 0 to 1 with a sum of 1: probabilities; expected "
                "logits. Say so: probabilities: true"
            )
        self.outputs = tuple(
            OutputSpec(name=name, shape=tuple(each.shape[1:]), kind="logits" if name == LOGITS else "features")
            for name, each in said.items()
        )
        self.description = {"size_bytes": self._path.stat().st_size}

    @staticmethod
    def reads(arguments: Mapping[str, Any], root: Path) -> dict[str, str]:
        """Digests of the file, and of the files beside it that hold its weights."""
        path = root / str(arguments.get("path"))
        files = [path, *_weights_beside(path)] if path.is_file() else []
        return {each.relative_to(root).as_posix(): digest_file(each) for each in files if each.is_relative_to(root)}

    def _only(self, found: Sequence[str], features: Sequence[str]) -> str:
        """The output `logits`, or the one that is no feature."""
        others = [name for name in found if name not in features]
        if LOGITS in found or len(others) == 1:
            return LOGITS if LOGITS in found else others[0]
        raise ConfigError(
            f"OnnxTeacher: {self._path} has the outputs {', '.join(found)}; say which of them holds the logits, such "
            f"as logits: {found[0]}"
        )

    @property
    def fingerprint(self) -> Mapping[str, Any]:
        """Digests of the file, of weights beside it, and of the preprocess."""
        return {
            "model": [digest_file(each) for each in (self._path, *_weights_beside(self._path))],
            "preprocess_state": digest(dict(self._preprocess.state())),
        }

    def predict(self, columns: Columns) -> dict[str, Tensor]:
        """Every output `[B, …]`, float32. Raises `TeacherError` where the model fails or gives other shapes."""
        said = self._say(columns)
        rows = len(next(iter(said.values())))
        for spec in self.outputs:
            if said[spec.name].shape != (rows, *spec.shape):
                raise TeacherError(
                    f"{self._path} gives {spec.name} of shape {list(said[spec.name].shape)}; expected "
                    f"{[rows, *spec.shape]}"
                )
        return said

    def _say(self, columns: Columns) -> dict[str, Tensor]:
        inputs = self._preprocess(columns)
        fed = self._fed(inputs if len(self._names) > 1 else trimmed(inputs))
        try:
            values = self._run(fed)
        except Exception as error:  # the library's own
            if is_out_of_memory(error):
                raise
            if _NO_MEMORY.search(str(error)):
                raise torch.OutOfMemoryError(str(error)) from None
            wanted = ", ".join(f"{each.name} {each.type} {each.shape}" for each in self._session.get_inputs())
            raise TeacherError(
                f"{self._path} failed on inputs of shape {described(inputs)}: {type(error).__name__}: {error}. Its "
                f"inputs are {wanted}"
            ) from None
        said = {
            name: torch.from_numpy(np.asarray(each)).float() for name, each in zip(self._names, values, strict=True)
        }
        if any(len(each) != num_rows(inputs) for each in said.values()):
            raise TeacherError(f"{self._path} does not give a line per row; export it with a dynamic first axis")
        said[LOGITS] = self._logits(said[LOGITS])
        return said

    def _run(self, fed: Mapping[str, NDArray[Any]]) -> list[NDArray[Any]]:
        """Every output `[B, …]`; so many rows at a time as the file was exported for, the last ones filled up."""
        rows = len(next(iter(fed.values())))
        at_once = self._at_once or rows
        parts = []
        for start in range(0, rows, at_once):
            some = {name: each[start : start + at_once] for name, each in fed.items()}
            used = len(next(iter(some.values())))
            filled = {name: np.concatenate([each, *[each[-1:]] * (at_once - used)]) for name, each in some.items()}
            given = map(np.atleast_1d, self._session.run(list(self._names.values()), filled))
            parts.append([each[:used] if len(each) == at_once else each for each in given])
        return [np.concatenate(each) for each in zip(*parts, strict=True)]

    def _logits(self, given: Tensor) -> Tensor:
        """Logits `[B, …, C]` of the output that holds them, or their probabilities. Raises `TeacherError`."""
        if not self._probabilities:
            return class_logits(given, self._num_classes)
        single = self._num_classes == 2 and given.shape[1:] in ((), (1,))
        low, high = float(given.min()), float(given.max())
        if low < -_RANGE_TOLERANCE or high > 1 + _RANGE_TOLERANCE:
            raise self._no_probabilities(f"values from {low:.4g} to {high:.4g}", "probabilities, from 0 to 1")
        sums = given.sum(dim=-1)
        farthest = float(sums.flatten()[(sums - 1).abs().argmax()])
        if not single and abs(farthest - 1) > _SUM_TOLERANCE:
            raise self._no_probabilities(f"values that sum to {farthest:.4g}", "probabilities of classes, a sum of 1")
        return _of_sigmoid(given) if single else given.clamp(min=_SMALLEST).log()

    def _no_probabilities(self, found: str, expected: str) -> TeacherError:
        return TeacherError(
            f"{self._path} gives {self._names[LOGITS]} with {found}; expected {expected}. Leave `probabilities` out "
            "where it holds logits"
        )

    def _fed(self, inputs: Inputs) -> dict[str, Any]:
        if not isinstance(inputs, Mapping):
            if len(self._inputs) != 1:
                raise ConfigError(
                    f"OnnxTeacher: the preprocess gives one tensor, {self._path} takes {', '.join(self._inputs)}"
                )
            inputs = {next(iter(self._inputs)): inputs.movedim(1, -1) if self._channels_last else inputs}
        absent = self._inputs.keys() - inputs.keys()
        if absent:
            raise ConfigError(
                f"OnnxTeacher: {self._path} takes {', '.join(self._inputs)}; the preprocess gives {', '.join(inputs)}"
            )
        return {name: self._as(name, inputs[name].numpy(), np.dtype(dtype)) for name, dtype in self._inputs.items()}

    def _as(self, name: str, values: NDArray[Any], dtype: np.dtype[Any]) -> NDArray[Any]:
        """What an input takes. Raises `ConfigError` where it cannot hold these numbers."""
        with np.errstate(invalid="ignore"):
            cast = np.ascontiguousarray(values.astype(dtype))
        if dtype.kind in "biu" and values.dtype != dtype and not np.array_equal(cast, values):
            bad = np.extract(cast != values, values)[0]
            raise ConfigError(
                f"OnnxTeacher: {self._path} takes {name} as {dtype}, and the preprocess gives {bad}; expected "
                "numbers that it can hold (of pixels, ImageTensor's scale: 1, mean: [0.0], std: [1.0])"
            )
        return cast


def _of_sigmoid(probability: Tensor) -> Tensor:
    """`[0, logit(p)]` of the probability of class 1, `[B]` or `[B, 1]`."""
    return class_logits(torch.logit(probability.double(), eps=_EPSILON).float(), 2)


def _weights_beside(path: Path) -> list[Path]:
    """The files in which a model keeps tensors outside its own."""
    content = path.read_bytes()
    found = {content[each.end() : each.end() + each[1][0]].decode() for each in _WEIGHTS_BESIDE.finditer(content)}
    return sorted(path.parent / name for name in found)


def _session(path: Path) -> Any:
    onnxruntime = package("onnxruntime", "onnx")
    if not path.is_file():
        raise ConfigError(f"OnnxTeacher: there is no file {path}")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    providers = [each for each in _PROVIDERS if each in onnxruntime.get_available_providers()]
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=providers)
    except Exception as error:  # the library's own
        raise ConfigError(f"OnnxTeacher: {path} is no ONNX model that ONNX Runtime can load: {error}") from None
