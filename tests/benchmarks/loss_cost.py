"""What each loss costs beside plain cross-entropy: value and gradient of a batch of logits, CPU or GPU."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.measuring import cpu_s, machine, shown
from kdpipe.encodings import Dense, Sampled, TargetEncoding, TopK
from kdpipe.errors import ConfigError
from kdpipe.losses import (
    LOSSES,
    RKD,
    AttentionTransfer,
    BalancedKL,
    CosineFeature,
    DistillLoss,
    HintMSE,
    SimilarityPreserving,
    cross_entropy,
    needs_labels,
    values_of,
)
from kdpipe.targets import FeatureTargets, OutputSpec, SampledTargets, Targets
from kdpipe.views import row_keys

PLAIN = "cross-entropy"
FEATURES = {
    "HintMSE": HintMSE(),
    "CosineFeature": CosineFeature(),
    "AttentionTransfer": AttentionTransfer(),
    "SimilarityPreserving": SimilarityPreserving(),
    "RKD": RKD(),
}
"""Without projector."""
SHAPES = {
    "images": (256, 10),
    "many classes": (256, 1000),
    "tokens": (2, 256, 50_304),
    "features": (256, 64, 2, 2),
}
K = 64


def targets_of(encoding: TargetEncoding, logits: Tensor, device: str) -> Targets:
    """Targets of a teacher's logits `[..., C]`, as they come from a store."""
    output = OutputSpec(name="logits", shape=tuple(logits.shape[1:]))
    keys = row_keys([str(row) for row in range(len(logits))], 0)
    return encoding.decode(encoding.encode(logits, keys), output).to(torch.device(device))


def cases(shape: tuple[int, ...], device: str) -> dict[str, Callable[[Tensor], Tensor]]:
    """Name -> a function of the student's logits `[..., C]` that gives a value per row, all about the same targets."""
    generator = torch.Generator().manual_seed(0)
    teacher = 3 * torch.randn(*shape, generator=generator)
    labels = torch.randint(shape[-1], shape[:-1], generator=generator).to(device)
    encodings: dict[str, TargetEncoding] = {
        "dense": Dense(),
        "topk": TopK(k=min(K, shape[-1] // 2), temperatures=(1.0,)),
        "sampled": Sampled(draws=50),
    }
    if len(shape) > 2:  # a token's targets of every class would be as large as its logits
        encodings.pop("dense")
    found: dict[str, Callable[[Tensor], Tensor]] = {PLAIN: lambda logits: cross_entropy(logits, labels)}
    for kind, encoding in encodings.items():
        targets = targets_of(encoding, teacher, device)
        for name, make in LOSSES.items():
            loss = make(temperature=1.0)
            if _serves(loss, targets, shape, labels):
                found[f"{name}, {kind}"] = lambda logits, loss=loss, targets=targets: values_of(
                    loss, logits, targets, labels if needs_labels(loss) else None
                )
        if kind == "dense":
            balanced = BalancedKL(class_counts=range(1, shape[-1] + 1), temperature=1.0)
            found["balanced_kl, dense"] = partial(balanced, targets=targets)
    return found


def cases_of_features(shape: tuple[int, ...], device: str) -> dict[str, Callable[[Tensor], Tensor]]:
    """The same of features `[B, D, H, W]`, beside cross-entropy of their means over places, as of D classes."""
    teacher = torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(device)
    labels = torch.randint(shape[1], shape[:1], generator=torch.Generator().manual_seed(0)).to(device)
    targets = FeatureTargets(values=teacher)
    found: dict[str, Callable[[Tensor], Tensor]] = {
        PLAIN: lambda features: cross_entropy(features.mean(dim=(2, 3)), labels)
    }
    for name, loss in FEATURES.items():
        found[name] = lambda features, loss=loss: values_of(loss, features, targets, None)
    return found


def _serves(loss: DistillLoss, targets: Targets, shape: tuple[int, ...], labels: Tensor) -> bool:
    """Whether a loss can be computed from such targets."""
    if isinstance(targets, SampledTargets) and not getattr(loss, "linear_in_targets", False):
        return False
    try:
        values_of(loss, torch.zeros(shape, device=labels.device), targets, labels)
    except ConfigError:
        return False
    return True


def step_ms(values: Callable[[Tensor], Tensor], logits: Tensor) -> float:
    """Milliseconds of one value and gradient: of CPU time, or of the GPU's clock."""
    logits = logits.detach().requires_grad_()
    on_gpu = logits.is_cuda
    if on_gpu:
        torch.cuda.synchronize()
    began = time.perf_counter() if on_gpu else cpu_s()
    values(logits).mean().backward()
    if on_gpu:
        torch.cuda.synchronize()
    return 1e3 * ((time.perf_counter() if on_gpu else cpu_s()) - began)


def main(rounds: int = 15, shapes: dict[str, tuple[int, ...]] = SHAPES, folder: Path | None = None) -> None:
    """Print a table per shape: medians with ranges, and the ratio to cross-entropy in the same round."""
    del folder  # nothing is written
    device = "cuda" if torch.cuda.is_available() else "cpu"
    threads = torch.get_num_threads()
    print(f"{device}, {threads} thread{'s' * (threads > 1)} (OMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS')})")
    print(machine("torch") + "\n")
    for name, shape in shapes.items():
        compared = cases_of_features(shape, device) if len(shape) == 4 else cases(shape, device)
        logits = torch.randn(*shape, generator=torch.Generator().manual_seed(1)).to(device)
        costs: dict[str, list[float]] = {each: [] for each in compared}
        for number in range(-1, rounds):
            for each, values in compared.items():
                cost = step_ms(values, logits)
                if number >= 0:  # the first round warms up
                    costs[each].append(cost)
        print(f"{name}: {list(shape)}, {rounds} rounds interleaved\n")
        print("| loss, targets | ms per step | x cross-entropy |\n| --- | --- | --- |")
        for each, found in costs.items():
            ratios = [cost / base for cost, base in zip(found, costs[PLAIN], strict=True)]
            print(f"| {each} | {shown(found)} | {shown(ratios)} |", flush=True)
        print()
