"""What the teacher said, as a loss sees it.

Shapes: B batch, C classes; `...` stands for further axes (tokens).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class OutputSpec:
    """One thing that a teacher emits: a name and its shape per row."""

    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class DenseTargets:
    """Teacher logits of every class: `z - max` as `values [B, ..., C]`, the row's maximum as `row_max [B, ...]`.

    Exact at every temperature. A masked class is -inf in `values`.
    """

    values: Tensor
    row_max: Tensor

    @property
    def num_classes(self) -> int:
        """C."""
        return self.values.shape[-1]

    def logits(self) -> Tensor:
        """The teacher's logits `[B, ..., C]`, float32 (float64 when stored so)."""
        return self._wide() + self.row_max.unsqueeze(-1)

    def softened(self, temperature: float) -> Tensor:
        """Softened logits `z / T [B, ..., C]`, up to a constant per row (the softmax is the same)."""
        return self._wide() / temperature

    def log_probs(self, temperature: float = 1.0) -> Tensor:
        """Log-softmax of `z / T`, `[B, ..., C]`, computed in float32 or wider."""
        return torch.log_softmax(self.softened(temperature), dim=-1)

    def to(self, device: torch.device) -> DenseTargets:
        """The same targets on another device."""
        return DenseTargets(
            values=self.values.to(device, non_blocking=True), row_max=self.row_max.to(device, non_blocking=True)
        )

    def __getitem__(self, rows: slice | Tensor) -> DenseTargets:
        return DenseTargets(values=self.values[rows], row_max=self.row_max[rows])

    def _wide(self) -> Tensor:
        return self.values if self.values.dtype == torch.float64 else self.values.float()


Targets = DenseTargets
"""All that a loss sees. Sparse forms join here."""
