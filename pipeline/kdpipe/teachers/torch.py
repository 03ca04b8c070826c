"""A `torch.nn.Module` as a teacher.

Shapes: B rows, T tokens, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from kdpipe.data.columns import Columns
from kdpipe.devices import compute_device
from kdpipe.errors import ConfigError, TeacherError, is_out_of_memory
from kdpipe.fingerprint import brief
from kdpipe.inputs import (
    LOGITS,
    Head,
    Outputs,
    about_classes,
    changed,
    described,
    kind,
    look_like_probabilities,
    num_rows,
)
from kdpipe.preprocess import Preprocess
from kdpipe.targets import OutputSpec
from kdpipe.teachers.base import COVERED

PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}
_STORED_ANYWAY = (COVERED, "statistics")


def _first_device(model: nn.Module) -> torch.device:
    """Where a model that is placed takes its inputs; weights that are loaded when they are used lie nowhere."""
    return next((each.device for each in model.parameters() if each.device.type != "meta"), compute_device())


@dataclass(frozen=True, kw_only=True)
class Form:
    """What a teacher gives about each row, and whether it abstains from some."""

    outputs: Sequence[OutputSpec]
    abstains: bool


class TorchTeacher:
    """A module with its own preprocess; its forward returns logits `[B, C]` or `[B, T, C]`, or a dict or tuple.

    `logits` says which part of a dict or tuple they are: a key or a position (None: the key `logits`, or the only
    part). A single logit z, of a sigmoid head, is two classes `[0, z]`. Each further name in `outputs` is a part too
    (`1`, `hidden_states.2`), or the dotted path of a submodule, whose output is taken. A dict with bool `covered`
    (`[B]`, or `[B, T]`) makes a teacher that abstains from the other rows. `probe`, one prepared row, is run once to
    learn the shapes, unless `known`, which is given the fingerprint, can tell them. `identity` (JSON) says which module
    with which weights this is; preprocess state and numeric mode are added to it. Raises `ConfigError` for an output
    that does not exist, `TeacherError` where forward fails or gives no logits of `num_classes`.
    """

    def __init__(
        self,
        model: nn.Module,
        preprocess: Preprocess,
        num_classes: int,
        identity: Mapping[str, Any],
        probe: Columns,
        outputs: Sequence[str] = (LOGITS,),
        precision: str = "float32",
        logits: str | None = None,
        known: Callable[[Mapping[str, Any]], Form | None] = lambda _: None,
    ) -> None:
        is_placed = hasattr(model, "hf_device_map")  # by Transformers, on one device or several
        self._device = _first_device(model) if is_placed else compute_device()
        model = model.eval() if is_placed else model.eval().to(self._device)
        features = [name for name in dict.fromkeys(outputs) if name != LOGITS]
        self._forward = Outputs(model, features, Head(logits, num_classes))
        self._preprocess, self._num_classes = preprocess, num_classes
        self._autocast = PRECISIONS[precision]
        self.fingerprint = {
            **identity,
            "preprocess_state": brief(preprocess.state()),
            "numeric_mode": {
                "parameters": str(next(iter(model.state_dict().values()), torch.empty(0)).dtype),
                "autocast": precision,
                "tf32": torch.backends.cuda.matmul.allow_tf32 and self._device.type == "cuda",
            },
        }
        form = known(self.fingerprint) or self._tried(probe, features)
        self.outputs, self.abstains = tuple(form.outputs), form.abstains

    @torch.inference_mode()
    def predict(self, columns: Columns) -> dict[str, Tensor]:
        """Every output `[B, …]` as float32 (float64 as it is), and `covered` where it abstains.

        Raises `TeacherError` for other shapes.
        """
        said, num_rows = self._say(columns)
        answer = {}
        for spec in self.outputs:
            value, expected = said.get(spec.name), [num_rows, *spec.shape]
            if not isinstance(value, Tensor) or list(value.shape) != expected:
                raise self._misfit(said, spec.name, num_rows, str(expected))
            # What lies far from 0 would be rounded together.
            answer[spec.name] = value if value.dtype == torch.float64 else value.float()
        if self.abstains or COVERED in said:
            answer[COVERED] = self._covered(said.get(COVERED), answer[LOGITS].shape[:-1])
        return answer

    def lengths(self, columns: Columns) -> NDArray[np.int64]:
        """Tokens per row `[B]`; 1 each where the preprocess makes none."""
        of_tokens = getattr(self._preprocess, "lengths", None)
        if of_tokens is None:
            return np.ones(len(next(iter(columns.values()))), np.int64)
        lengths: NDArray[np.int64] = of_tokens(columns)
        return lengths

    @torch.no_grad()
    def _tried(self, probe: Columns, features: Sequence[str]) -> Form:
        """What forward gives about one row."""
        said, _ = self._say(probe)
        found = said[LOGITS]
        if found.ndim < 2 or found.shape[:1] + found.shape[-1:] != (1, self._num_classes):
            raise self._misfit(said, LOGITS, 1, f"[1, …, {self._num_classes}]")
        if look_like_probabilities(found):
            raise TeacherError(
                "the teacher's forward gives numbers from 0 to 1 with a sum of 1: probabilities, of a softmax at its "
                "end; expected logits. Take what goes into the softmax, or return the logarithm of what comes out"
            )
        logits = OutputSpec(name=LOGITS, shape=tuple(found.shape[1:]), kind="logits")
        shapes = {name: self._shape(name, said) for name in features}
        outputs = [OutputSpec(name=name, shape=shape, kind="features") for name, shape in shapes.items()]
        return Form(outputs=[logits, *outputs], abstains=COVERED in said)

    def _say(self, columns: Columns) -> tuple[dict[str, Any], int]:
        """What forward returns and its submodules give, as it comes, and the number of rows."""
        inputs = changed(self._preprocess(columns), lambda each: each.to(self._device))
        try:
            with torch.autocast(self._device.type, self._autocast, enabled=self._autocast is not None):
                returned = self._forward(inputs)
        except Exception as error:
            if is_out_of_memory(error):
                raise
            raise TeacherError(
                f"the teacher's forward failed on an input of shape {described(inputs)}: "
                f"{type(error).__name__}: {error}"
            ) from error
        try:
            return self._forward.named(returned), num_rows(inputs)
        except ConfigError as error:
            raise TeacherError(f"the teacher: {error}") from None

    def _shape(self, name: str, said: Mapping[str, Any]) -> tuple[int, ...]:
        """Shape per row of an output, from what was said about one row. Raises `ConfigError`."""
        where = f"the output {name!r} of the teacher"
        if name in _STORED_ANYWAY:
            raise ConfigError(
                f"{where} needs not be asked for: {', '.join(_STORED_ANYWAY)} are stored where they exist"
            )
        return self._forward.shape(name, said, where)

    def _covered(self, covered: Any, expected: torch.Size) -> Tensor:
        if not self.abstains:
            raise TeacherError("the teacher's forward gives `covered` for some batches; expected all of them, or none")
        of_rows_or_tokens = isinstance(covered, Tensor) and covered.shape in (expected, expected[:1])
        if not isinstance(covered, Tensor) or covered.dtype != torch.bool or not of_rows_or_tokens:
            raise TeacherError(f"the teacher's `covered` is {kind(covered)}; expected bool, of shape {list(expected)}")
        return covered.reshape(*covered.shape, *[1] * (len(expected) - covered.ndim)).expand(expected)

    def _misfit(self, said: Mapping[str, Any], name: str, num_rows: int, expected: str) -> TeacherError:
        found = kind(said[name]) if name in said else f"a dict of {', '.join(said) or 'nothing'}"
        number = about_classes(said[name].shape, self._num_classes) if name == LOGITS else ""
        return TeacherError(
            f"the teacher's forward returned {found} for {num_rows} rows; expected {name} of shape {expected}{number}"
        )
