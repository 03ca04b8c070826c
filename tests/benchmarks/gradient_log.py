"""What it costs a training to measure how strongly each term pulls: the same fit with and without."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from benchmarks.measuring import cpu_s, interval_95, machine, shown
from kdpipe.batches import Batch
from kdpipe.losses import ForwardKL, LossTerm, ReverseKL, cross_entropy
from kdpipe.models.mlp import MLP
from kdpipe.models.resnet import ResNet
from kdpipe.targets import DenseTargets
from kdpipe.terms import DistillTerm, LabelTerm
from kdpipe.training import TrainPlan, fit

NUM_CLASSES = 10
SHAPE = (3, 16, 16)
NO_CHECKPOINT = Path("/no such folder/checkpoint")


@dataclass(frozen=True)
class SameBatch:
    """A stream of one batch, so that nothing but the training is measured."""

    batch: Batch

    def from_step(self, first: int, last: int) -> Iterator[Batch]:
        """The batch, for each step."""
        return (self.batch for _ in range(first, last))


def batch_of(num_rows: int) -> Batch:
    """Random rows, labels and logits."""
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(num_rows, NUM_CLASSES, generator=generator)
    row_max = logits.amax(dim=-1)
    targets = DenseTargets(values=logits - row_max.unsqueeze(-1), row_max=row_max)
    return Batch(
        rows=np.arange(num_rows),
        inputs=torch.randn(num_rows, *SHAPE, generator=generator),
        labels=torch.randint(NUM_CLASSES, (num_rows,), generator=generator),
        targets={"teacher": {"logits": targets}},
    )


def models() -> Mapping[str, nn.Module]:
    """Small students."""
    torch.manual_seed(0)
    return {
        "MLP of 256 wide": MLP(SHAPE, NUM_CLASSES, hidden=[256]),
        "ResNet-8 of 16 wide": ResNet(SHAPE, NUM_CLASSES, depth=8),
    }


def fit_us(model: nn.Module, batch: Batch, steps: int, log_gradients: bool) -> float:
    """CPU microseconds per step of a fit with three terms."""
    losses = (ForwardKL(), ReverseKL())
    terms = [DistillTerm(term=LossTerm(teacher="teacher", output="logits", loss=each, weight=0.5)) for each in losses]
    plan = TrainPlan(steps=steps, seed=0, log_gradients=log_gradients, checkpoint_every_s=3600)
    gc.collect()
    began = cpu_s()
    fit(model, SameBatch(batch), [*terms, LabelTerm(loss=cross_entropy, weight=1.0)], plan, NO_CHECKPOINT)
    return (cpu_s() - began) / steps * 1e6


def main(steps: int = 400, num_rows: int = 128, rounds: int = 7, folder: Path | None = None) -> None:
    """Both ways take turns in every round; the difference is of the same round."""
    torch.set_num_threads(1)
    print(f"{machine('torch')}. {steps} steps of {num_rows} rows, 3 terms, {rounds} rounds, one thread.\n")
    print("| student | CPU us/step without | with | more, % (95 % interval) |\n| --- | --- | --- | --- |")
    batch = batch_of(num_rows)
    for name, model in models().items():
        fit_us(model, batch, steps, log_gradients=True)
        without, with_them = [], []
        for _ in range(rounds):
            without.append(fit_us(model, batch, steps, log_gradients=False))
            with_them.append(fit_us(model, batch, steps, log_gradients=True))
        more = [100 * (each / base - 1) for each, base in zip(with_them, without, strict=True)]
        mean, low, high = interval_95(more)
        print(f"| {name} | {shown(without)} | {shown(with_them)} | {mean:.1f} ({low:.1f} to {high:.1f}) |", flush=True)
