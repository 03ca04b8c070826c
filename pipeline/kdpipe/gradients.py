"""How strongly each term of a training loss pulls: the norms of their gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from kdpipe.errors import TrainingError


class TermGradients:
    """Gradients of each summand of a loss by a model's parameters, over the micro-batches of one step.

    By the parameters and not by the logits, so that a loss on features compares with one on logits. Each summand costs
    a backward pass more and as much memory as the trained parameters. `.grad` and the step that follows stay as they
    are, unless the model has a backward pass of its own that changes what it kept.
    """

    def __init__(self, model: nn.Module, num_summands: int) -> None:
        self._parameters = [each for each in model.parameters() if each.requires_grad]
        self._sums: list[Tensor | None] = [None] * num_summands

    def add(self, summands: Sequence[Tensor]) -> None:
        """Add those of one micro-batch's summands, scalars, before its backward pass.

        Raises `TrainingError` where memory is short, or where the model goes backward once only (compiled ones,
        reentrant checkpoints).
        """
        for index, summand in enumerate(summands):
            try:
                gradient, so_far = self._of(summand), self._sums[index]
            except RuntimeError as error:
                raise TrainingError(
                    "how strongly each term pulls cannot be measured with this model; set train.log_gradients: false. "
                    f"{type(error).__name__}: {error}"
                ) from error
            self._sums[index] = gradient if so_far is None else so_far.add_(gradient)

    def norms(self, sum_over_ranks: Callable[[Tensor], Tensor], scale: float) -> list[float]:
        """The norm of each summand's gradient over all micro-batches and ranks; summands came times `scale`."""
        gradients = (sum_over_ranks(each) for each in self._sums if each is not None)
        return [float(torch.linalg.vector_norm(each)) / scale for each in gradients]

    def _of(self, summand: Tensor) -> Tensor:
        """One vector, of all parameters; 0 where the summand does not depend on them."""
        found: Sequence[Tensor | None] = [None] * len(self._parameters)
        if summand.requires_grad:
            found = torch.autograd.grad(summand, self._parameters, retain_graph=True, allow_unused=True)
        pairs = zip(found, self._parameters, strict=True)
        return torch.cat([torch.zeros_like(each).flatten() if of is None else of.flatten() for of, each in pairs])


def pulls(norms: Mapping[str, float], reference: str) -> dict[str, float]:
    """For the log: each term's norm as `NAME gradient`, that over the reference's as `NAME gradient ratio`.

    What is not finite (an overflow of float16) is left out, and so are ratios to a gradient of 0 (a batch without
    labels).
    """
    finite = {name: norm for name, norm in norms.items() if math.isfinite(norm)}
    entries = {f"{name} gradient": norm for name, norm in finite.items()}
    if finite.get(reference, 0.0) > 0:
        others = (name for name in finite if name != reference)
        entries |= {f"{name} gradient ratio": finite[name] / finite[reference] for name in others}
    return entries
