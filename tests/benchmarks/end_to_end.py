"""What a student costs when its targets come from the store on disk instead of a tensor in memory: paired CPU times."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import torch

from benchmarks.measuring import cpu_s, interval_95, machine, shown
from benchmarks.read_store import BATCH_ROWS, build
from kdpipe.batches import RAM_BUDGET_BYTES, BatchStream, Rows, TargetReader
from kdpipe.losses import ForwardKL, LossTerm
from kdpipe.models.mlp import MLP
from kdpipe.order import BatchOrder, Group
from kdpipe.store import TargetStore
from kdpipe.store.aligned import AlignedTargets
from kdpipe.targets import DenseTargets
from kdpipe.terms import DistillTerm
from kdpipe.training import TrainPlan, fit

NUM_FEATURES = 256
RUNS = ((1, 1), (1, 3), (4, 1))
"""Times `num_rows`, and epochs: what a training pays once (two pools' memory) is divided by its steps."""
IN_MEMORY = "RAM tensor"


class Inputs:
    """Random inputs in memory, as rows that a store is about."""

    def __init__(self, store: TargetStore) -> None:
        self.sample_ids, self.digests = store.sample_ids, store.digests
        self._features = torch.randn(len(self), NUM_FEATURES, generator=torch.Generator().manual_seed(1))

    def __len__(self) -> int:
        return len(self.sample_ids)

    def read(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        return {"features": self._features.numpy()[rows]}


class TensorTargets:
    """The same targets as one tensor in memory."""

    def __init__(self, store: TargetStore) -> None:
        self._targets = store.read(np.arange(store.num_rows))["logits"]
        self.row_bytes = store.row_bytes()

    def read(self, rows: np.ndarray, view: int = 0) -> dict[str, DenseTargets]:
        return {"logits": self._targets[torch.from_numpy(rows)]}

    def read_ahead(self, groups: Iterable[tuple[int, Group]]) -> Iterator[dict[str, DenseTargets]]:
        return (self.read(rows, view) for view, group in groups for rows in group.batches)


def train(
    inputs: Inputs,
    targets: Callable[[], TargetReader],
    hidden: int,
    num_classes: int,
    seed: int,
    budget: int,
    epochs: int,
) -> float:
    """CPU us per row and epoch of a student of one hidden layer, from opening its targets to the last step."""
    began = cpu_s()
    reader = targets()
    opening = cpu_s() - began
    rows = Rows(
        inputs=inputs,
        rows=np.arange(len(inputs)),
        preprocess=lambda columns: torch.from_numpy(columns["features"]),
        labels=np.full(len(inputs), -1),
        targets={"teacher": reader},
    )
    order = BatchOrder(rows=rows.rows, batch_size=BATCH_ROWS, seed=seed)
    term = DistillTerm(term=LossTerm(teacher="teacher", output="logits", loss=ForwardKL(temperature=4.0), weight=1.0))
    torch.manual_seed(seed)
    student = MLP((NUM_FEATURES,), num_classes, [hidden])
    plan = TrainPlan(steps=epochs * order.steps_per_epoch, seed=seed, threads=1, checkpoint_every_s=float("inf"))
    with tempfile.TemporaryDirectory() as folder:
        began = cpu_s()
        fit(student, BatchStream(rows, order, ram_budget_bytes=budget), [term], plan, Path(folder) / "checkpoint")
        return (opening + cpu_s() - began) / (epochs * len(inputs)) * 1e6


def measure(store: TargetStore, hidden: int, rounds: int, epochs: int) -> dict[str, list[float]]:
    """CPU us per row of each way to hold the targets, one value per round; every other round runs backwards."""
    num_rows, num_classes, inputs = store.num_rows, store.manifest.num_classes, Inputs(store)
    tensor = TensorTargets(store)

    def opened() -> TargetReader:
        return AlignedTargets(TargetStore.open(store.path), inputs, np.arange(num_rows))

    ways: dict[str, tuple[Callable[[], TargetReader], int]] = {
        IN_MEMORY: (lambda: tensor, 0),
        "store, read ahead": (opened, 0),
    }
    if epochs > 1:  # rows that come once are not kept
        ways["store, kept in memory"] = (opened, RAM_BUDGET_BYTES)
    found: dict[str, list[float]] = {name: [] for name in ways}
    for seed in range(-1, rounds):
        for name in list(ways)[:: -1 if seed % 2 else 1]:
            targets, budget = ways[name]
            cost = train(inputs, targets, hidden, num_classes, max(seed, 0), budget, epochs)
            if seed >= 0:  # the first round warms up
                found[name].append(cost)
    return found


def table(found: dict[str, list[float]]) -> str:
    """Markdown: medians with ranges, and the paired difference to the tensor in memory."""
    lines = ["| targets | CPU us/row | more CPU than the RAM tensor: mean, 95 % interval |", "| --- | --- | --- |"]
    for name, costs in found.items():
        more = [100 * (cost / base - 1) for cost, base in zip(costs, found[IN_MEMORY], strict=True)]
        mean, low, high = interval_95(more)
        difference = "-" if name == IN_MEMORY else f"{mean:+.1f} % ({low:+.1f} to {high:+.1f} %)"
        lines.append(f"| {name} | {shown(costs)} | {difference} |")
    return "\n".join(lines)


def main(
    num_rows: int = 50_000, num_classes: int = 1000, hidden: int = 544, rounds: int = 20, folder: Path | None = None
) -> None:
    """Print a table for each of `RUNS`."""
    print(f"MLP {NUM_FEATURES}-{hidden}-{num_classes}, batches of {BATCH_ROWS}, {rounds} pairs")
    print(machine("numpy", "torch"))
    for times, epochs in RUNS:
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            store = build(Path(scratch), times * num_rows, num_classes).store
            found = table(measure(store, hidden, rounds, epochs))
        print(f"\nRows: {times * num_rows:,}, epochs: {epochs}\n\n{found}", flush=True)
