"""How a teacher is asked about rows: about tokens that count, and fewer rows at a time where memory runs out.

Shapes: B rows, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdpipe.data.columns import Columns, take
from kdpipe.data.prepared import MISSING_LABEL
from kdpipe.errors import TeacherError, is_out_of_memory
from kdpipe.teachers.base import COVERED, Teacher


class Asking:
    """Asks a teacher about batches; one that does not fit its memory is halved, and so are all that follow.

    Its answers last: what a teacher would fill again with its next answer is copied. On a GPU that is everything, as a
    CUDA graph may begin at any call; elsewhere a teacher shows by its second answer of one shape what it does.
    """

    def __init__(self, teacher: Teacher) -> None:
        self._teacher = teacher
        self._first: dict[str, Tensor] = {}
        self._fills_again: bool | None = None
        self.at_once: int | None = None
        """Rows that a batch had when memory ran out, halved; None when it never did."""

    def __call__(self, columns: Columns, num_rows: int) -> dict[str, Tensor]:
        """What the teacher says about `B` rows. Raises `TeacherError` when a single row does not fit."""
        if self.at_once is None or num_rows <= self.at_once:
            try:
                with torch.no_grad():
                    return self._lasting(self._teacher.predict(columns))
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                if num_rows == 1:
                    raise TeacherError(
                        f"the teacher runs out of memory on a single row: {error}. Free memory, shorten the rows "
                        "(max_length), or give it a lower precision"
                    ) from None
                self.at_once = num_rows // 2
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        size = self.at_once
        parts = [
            self({name: take(column, place) for name, column in columns.items()}, len(place))
            for place in (np.arange(start, min(start + size, num_rows)) for start in range(0, num_rows, size))
        ]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def _lasting(self, said: dict[str, Tensor]) -> dict[str, Tensor]:
        if self._fills_again is None:
            first = self._first = self._first or said
            if first is not said and _shapes(first) == _shapes(said):
                self._fills_again = any(each.data_ptr() == first[name].data_ptr() for name, each in said.items())
                self._first = {}
        return {
            name: each if self._fills_again is False and each.device.type == "cpu" else each.clone()
            for name, each in said.items()
        }


def _shapes(said: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    return {name: each.shape for name, each in said.items()}


class OfCountedTokens:
    """A teacher whose answers about tokens that do not count (prompts, padding) are not heard: it abstains there."""

    abstains = True

    def __init__(self, teacher: Teacher, token_labels: Callable[[Columns], NDArray[np.int64]]) -> None:
        self._teacher, self._token_labels = teacher, token_labels
        self.outputs, self.fingerprint = teacher.outputs, teacher.fingerprint
        for optional in ("lengths", "num_kept"):
            if hasattr(teacher, optional):
                setattr(self, optional, getattr(teacher, optional))

    def predict(self, columns: Columns) -> dict[str, Tensor]:
        """What the teacher says, and `covered` `[B, T]`."""
        said = self._teacher.predict(columns)
        device = next((each.device for each in said.values()), torch.device("cpu"))
        counted = torch.from_numpy(self._token_labels(columns) != MISSING_LABEL).to(device)
        covered = said.get(COVERED)
        if covered is not None:
            if covered.dtype != torch.bool or covered.shape != counted.shape:
                raise TeacherError(
                    f"the teacher's covered is {covered.dtype} of shape {list(covered.shape)}; expected bool "
                    f"{list(counted.shape)}, a value per token"
                )
            counted &= covered.to(device)
        return {**said, COVERED: counted}


def lengths_of(teacher: Teacher, columns: Columns) -> NDArray[np.int64] | None:
    """Tokens per row `[B]`, where the teacher can tell."""
    lengths = getattr(teacher, "lengths", None)
    return None if lengths is None else np.asarray(lengths(columns), np.int64)
