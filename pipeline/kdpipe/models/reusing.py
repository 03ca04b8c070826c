"""A student that predicts by its teacher's last layer (Chen et al. 2022, SimKD)."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from kdpipe.errors import ConfigError
from kdpipe.inputs import Head, Inputs, Outputs

PROJECTED = "projected"
STUDENT = "student"


class ReusesClassifier(nn.Module):
    """Output `output` of a student -> projector -> the teacher's last layer, which is not trained.

    Forward gives the `logits` `[B, …, C]`, what goes into that layer as `projected`, and what the student gives as
    `student`. Maps `[B, D, H, W]` are averaged over their places before the last layer. The student's own last layer is
    kept, but is not heard.
    """

    def __init__(
        self,
        student: nn.Module,
        head: Head,
        output: str,
        projector: nn.Module | None,
        weight: Tensor,
        bias: Tensor | None,
    ) -> None:
        """`head` takes the student's own logits out; `weight [C, D]` and `bias [C]` are the teacher's."""
        super().__init__()
        self.student, self.projector = student, projector or nn.Identity()
        self.classifier = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
        self.classifier.load_state_dict({"weight": weight} | ({} if bias is None else {"bias": bias}))
        self.classifier.requires_grad_(False)
        self._output, self._outputs = output, Outputs(student, [output], head)

    def forward(self, *inputs: Tensor, **named: Tensor) -> dict[str, Any]:
        """One tensor, or several by name, as the student takes them."""
        given: Inputs = named or inputs[0]
        returned = self._outputs(given)
        heard = self._outputs.tensor(self._output, self._outputs.named(returned), f"the output {self._output!r}")
        projected = self.projector(heard)
        pooled = projected.mean(dim=(2, 3)) if projected.ndim == 4 else projected
        return {"logits": self.classifier(pooled), PROJECTED: projected, STUDENT: returned}


def check_reusable(features: tuple[int, ...], weight: tuple[int, ...], num_classes: int) -> None:
    """Raise `ConfigError` unless a last layer `[C, D]` takes features of a row `[D]`, `[T, D]` or maps `[D, H, W]`."""
    width = features[0] if len(features) == 3 else features[-1] if features else 0
    if weight[1] != width:
        raise ConfigError(
            f"the teacher's classifier takes {weight[1]} numbers, its features have shape {list(features)}; expected "
            f"what goes into that layer: [{weight[1]}], or maps [{weight[1]}, H, W] that are averaged before it"
        )
    if weight[0] != num_classes and not (weight[0] == 1 and num_classes == 2):
        raise ConfigError(f"the teacher's classifier gives {weight[0]} logits; expected {num_classes}")
