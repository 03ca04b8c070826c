"""Several teachers as one, and any function as a teacher.

Shapes: B rows, T tokens, C classes.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kdpipe.config import load_module, resolve
from kdpipe.data.columns import Columns
from kdpipe.errors import ConfigError, TeacherError, is_out_of_memory
from kdpipe.fingerprint import source_digests
from kdpipe.inputs import LOGITS, class_logits, kind, look_like_probabilities
from kdpipe.targets import OutputSpec
from kdpipe.teachers.base import COVERED, Teacher, abstains


class Ensemble:
    """The mean of the members' probabilities (Lakshminarayanan et al. 2017, equation 2), each times its weight.

    Where a member abstains the others speak; where all do, so does the ensemble.
    """

    def __init__(
        self, members: Sequence[str], teacher_of: Callable[[str], Teacher], weights: Sequence[float] | None = None
    ) -> None:
        """`members`: names of other teachers of params.yaml. Raises `ConfigError`."""
        if not members:
            raise ConfigError("Ensemble: members is empty; expected names of other teachers")
        weights = [1.0] * len(members) if weights is None else weights
        if len(weights) != len(members) or not all(0 < each < math.inf for each in weights):
            raise ConfigError(f"Ensemble: weights are {list(weights)}; expected a number above 0 for each of {members}")
        self._members = [teacher_of(name) for name in members]
        for name, each in zip(members, self._members, strict=True):
            if hasattr(each, "num_kept"):
                raise ConfigError(
                    f"Ensemble: {name} knows its most probable classes only; the mean needs the logits of all of them"
                )
        self._weights = torch.tensor(weights, dtype=torch.float64)
        shapes = {name: _logits_of(each).shape for name, each in zip(members, self._members, strict=True)}
        if len(set(shapes.values())) > 1:
            raise ConfigError(f"Ensemble: the members' logits have different shapes per row: {shapes}")
        self.outputs = (_logits_of(self._members[0]),)
        self.abstains = all(abstains(each) for each in self._members)

    @property
    def fingerprint(self) -> Mapping[str, Any]:
        """The members' and their weights."""
        return {"members": [dict(each.fingerprint) for each in self._members], "weights": self._weights.tolist()}

    def predict(self, columns: Columns) -> dict[str, Tensor]:
        """`log` of the mean probabilities `[B, …, C]`, and `covered` where all members abstain."""
        said = [each.predict(columns) for each in self._members]
        log_probs = torch.stack([torch.log_softmax(each[LOGITS].double().cpu(), dim=-1) for each in said])
        spoken = torch.stack(
            [each[COVERED].cpu() if COVERED in each else torch.ones(log_probs.shape[1:-1]).bool() for each in said]
        )
        log_probs = torch.where(spoken.unsqueeze(-1), log_probs, 0.0)  # which may be NaN where a member abstains
        weights = self._weights.view(-1, *[1] * (spoken.ndim - 1)) * spoken
        log_weights = (weights / weights.sum(dim=0).clamp(min=torch.finfo().tiny)).log()
        mean = torch.logsumexp(log_probs + log_weights.unsqueeze(-1), dim=0)
        covered = spoken.any(dim=0)
        answer = {LOGITS: torch.where(covered.unsqueeze(-1), mean, 0.0).float()}
        return answer | {COVERED: covered} if self.abstains else answer


class FunctionTeacher:
    """Any function `(columns) -> logits [B, …, C]` (a NumPy array or tensor), by its import path."""

    def __init__(self, root: Path, function: str, num_classes: int, probe: Columns) -> None:
        """`function`: "package.module:name" or "file.py:name". Raises `ConfigError`, `TeacherError`."""
        found: Any = resolve(function, root, "function")
        self._function: Any = found() if inspect.isclass(found) else found
        self._name, self._num_classes = function, num_classes
        self._sources = source_digests(found, load_module(function, root, "function").__name__)
        said = self.predict(probe)[LOGITS]
        if look_like_probabilities(said):
            raise TeacherError(
                f"{function} gives numbers from 0 to 1 with a sum of 1: probabilities; expected logits. Give their "
                "logarithm"
            )
        shape = tuple(said.shape[1:])
        self.outputs = (OutputSpec(name=LOGITS, shape=shape),)

    @property
    def fingerprint(self) -> Mapping[str, Any]:
        """The source code that the function reaches."""
        return {"function": self._name, "sources": self._sources}

    def predict(self, columns: Columns) -> dict[str, Tensor]:
        """What the function gives, float32."""
        try:
            found = self._function(columns)
            is_real = isinstance(found, Tensor) and not found.is_complex()
            array = np.asarray(found.detach().cpu().float() if is_real else found)
        except Exception as error:  # anything that a user's function raises
            if is_out_of_memory(error):
                raise
            raise TeacherError(f"{self._name} failed: {type(error).__name__}: {error}") from error
        rows = len(next(iter(columns.values())))
        if array.dtype.kind not in "biuf":
            raise TeacherError(
                f"{self._name} gave {kind(found)} for {rows} rows; expected logits of shape "
                f"[{rows}, …, {self._num_classes}], a NumPy array or tensor"
            )
        with np.errstate(over="ignore"):  # infinite numbers are refused where rows are named
            values = torch.from_numpy(array.astype(np.float32))
        logits = class_logits(values, self._num_classes) if values.ndim else values
        if logits.ndim < 2 or (len(logits), logits.shape[-1]) != (rows, self._num_classes):
            raise TeacherError(
                f"{self._name} gave {list(values.shape)} for {rows} rows; expected logits of shape "
                f"[{rows}, …, {self._num_classes}]"
            )
        return {LOGITS: logits}


def _logits_of(teacher: Teacher) -> OutputSpec:
    return next(each for each in teacher.outputs if each.name == LOGITS)
