"""A `torch.nn.Module` as a teacher."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from kdpipe.data.columns import Columns
from kdpipe.errors import TeacherError
from kdpipe.preprocess import Preprocess
from kdpipe.targets import OutputSpec

PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


def device() -> str:
    """Where teachers run: cuda where there is one, else cpu."""
    return "cuda" if torch.cuda.is_available() else "cpu"


class TorchTeacher:
    """A module with its own preprocess; its forward returns logits `[B, C]`.

    `identity` (JSON) says which module with which weights this is; preprocess state and numeric mode are added to it.
    """

    def __init__(
        self,
        model: nn.Module,
        preprocess: Preprocess,
        num_classes: int,
        identity: Mapping[str, Any],
        precision: str = "float32",
    ) -> None:
        self._device = torch.device(device())
        self._model = model.eval().to(self._device)
        self._preprocess = preprocess
        self._autocast = PRECISIONS[precision]
        self.outputs = (OutputSpec(name="logits", shape=(num_classes,)),)
        self.fingerprint = {
            **identity,
            "preprocess_state": dict(preprocess.state()),
            "numeric_mode": {
                "parameters": str(next(iter(model.state_dict().values()), torch.empty(0)).dtype),
                "autocast": precision,
                "tf32": torch.backends.cuda.matmul.allow_tf32 and self._device.type == "cuda",
            },
        }

    @torch.inference_mode()
    def predict(self, columns: Columns) -> dict[str, Tensor]:
        """`logits [B, C]` in float32. Raises `TeacherError` for another shape."""
        inputs = self._preprocess(columns).to(self._device)
        try:
            with torch.autocast(self._device.type, self._autocast, enabled=self._autocast is not None):
                logits = self._model(inputs)
        except Exception as error:
            raise TeacherError(
                f"the teacher's forward failed on an input of shape {list(inputs.shape)}: "
                f"{type(error).__name__}: {error}"
            ) from error
        expected = (len(inputs), *self.outputs[0].shape)
        if not isinstance(logits, Tensor) or logits.shape != expected:
            found = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise TeacherError(
                f"the teacher's forward returned {found} for {len(inputs)} rows; expected logits of shape "
                f"{list(expected)} (task.num_classes is {expected[-1]})"
            )
        return {"logits": logits.float()}
